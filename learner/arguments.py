"""The configuration as `transformers.TrainingArguments`."""

from __future__ import annotations

import os

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.learner.policy.sharding import arguments as sharding_arguments
from rlx.learner.policy.sharding import process_group_backend


class _Arguments(TrainingArguments):
    """The library's, except that a CPU has no index: accelerate calls it `cpu:0` where there are several processes,
    and `torch.load` of a checkpoint cannot restore to that."""

    @property
    def device(self) -> torch.device:
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def check_optimizer(config: Config) -> None:
    """Makes optimizer and schedule for one number. ConfigError where a name is unknown to transformers, a package is
    missing, or an argument does not fit."""
    common = {"output_dir": config.output_dir, "report_to": "none", "use_cpu": True}
    key = "optimizer"
    try:
        arguments = TrainingArguments(**common, optim=config.optimizer)
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))
        optimizer = kind([torch.nn.Parameter(torch.zeros(1, 1))], **settings)
        key = "lr_scheduler"
        TrainingArguments(**common, lr_scheduler_type=config.lr_scheduler)
        get_scheduler(config.lr_scheduler, optimizer, 0, 1, config.lr_scheduler_kwargs)
    except (ValueError, TypeError, ImportError) as error:
        value = getattr(config, key)
        raise ConfigError(
            f"{config.path}: {key}: {value} cannot be used: {error}. Write another, or remove it"
        ) from error


def training_arguments(
    config: Config, total_steps: int, steps_per_epoch: int, ddp_timeout_s: float
) -> TrainingArguments:
    """The library's arguments; the stream knows no epochs, so everything is counted in steps."""
    on_gpu, num_processes = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    return _Arguments(
        output_dir=config.output_dir,
        max_steps=total_steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=1,  # one batch of the library's holds all micro-batches of a step
        learning_rate=config.learning_rate,
        optim=config.optimizer,
        lr_scheduler_type=config.lr_scheduler,
        lr_scheduler_kwargs=config.lr_scheduler_kwargs,
        warmup_steps=int(config.warmup_ratio * total_steps) if config.warmup_ratio is not None else config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=on_gpu and torch.cuda.is_bf16_supported() if config.bf16 == "auto" else config.bf16,
        tf32=True if config.tf32 is True else None,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs or None,
        logging_steps=config.logging_steps,
        save_strategy="no" if config.save_strategy == "no" else "steps",
        save_steps=config.save_steps or max(1, steps_per_epoch // (config.saves_per_epoch or 1)),
        use_cpu=not on_gpu,
        ddp_backend=None if "RANK" not in os.environ else process_group_backend(config) if on_gpu else "gloo",
        ddp_timeout=int(ddp_timeout_s),
        ddp_find_unused_parameters=False,
        ignore_data_skip=True,
        disable_tqdm=True,
        report_to="none",
        log_level_replica="error",
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        use_liger_kernel=config.use_liger_kernel,
        liger_kernel_config={"fused_linear_cross_entropy": False} if config.use_liger_kernel else None,
        **sharding_arguments(config, num_processes),
    )
