"""The trainer: `transformers.Trainer` on the stream of scored groups, with the GRPO loss.

    stream → micro-batch → log-probabilities (+ reference's) → policy_loss → backward   (× micro-batches of the step)
           → optimizer step → next step of the stream publishes the new weights

The library owns the loop, optimizer, schedule, DDP, checkpoints. Ours: the loss, what is logged, the end marker of a
checkpoint.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from rlx.config import Config
from rlx.learner.incoming.stream import RolloutStream, StepBatch
from rlx.learner.microbatches.batching import MicroBatch
from rlx.learner.microbatches.logprobs import completion_logprobs
from rlx.learner.objective.entropy import EntropyBonus, high_entropy
from rlx.learner.objective.loss_metrics import LossMetrics
from rlx.learner.objective.losses import LossOptions, policy_loss
from rlx.learner.policy.adapters import WEIGHTS, saved_tensors, without_adapter
from rlx.learner.policy.checkpoints import base_fingerprint, clear, seal
from rlx.learner.policy.kept import CHECKPOINT_MARKER, drop_older
from rlx.learner.policy.reference import load_reference, mix_into, save_reference
from rlx.learner.policy.sharding import load_whole, prepare_fsdp, shard, whole_state
from rlx.learner.ranks import Ranks
from rlx.learner.watch.bottleneck import StepTimes
from rlx.learner.watch.step_metrics import mean, step_metrics


def loss_options(config: Config) -> LossOptions:
    trl = config.trl
    named_alike = {field.name: getattr(trl, field.name) for field in fields(LossOptions)}
    return LossOptions(**named_alike | {"vllm_importance_sampling_clip_max": trl.is_clip_max})


class GRPOTrainer(Trainer):
    """Trains `model` on what `stream` yields. `feed_state` tells, on rank 0, what a checkpoint keeps of the feed: the
    `weight_version` that is published, and the `ledger`. `on_trained` is called on every rank after an optimizer step."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        arguments: TrainingArguments,
        model: nn.Module,
        reference: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase,
        make_stream: Callable[[GRPOTrainer], RolloutStream],
        feed_state: Callable[[], Mapping[str, Any]],
        save_open_batch: Callable[[Path], None],
        callbacks: list[TrainerCallback],
        on_trained: Callable[[], None] = lambda: None,
    ):
        self._base = base_fingerprint(model) if ranks.rank == 0 else None
        super().__init__(model=model, args=arguments, processing_class=tokenizer, callbacks=callbacks)
        self._config, self._ranks, self._options = config, ranks, loss_options(config)
        self._reference = self._placed(reference) if reference is not None else None
        self._offloading: AbstractContextManager[Any] = nullcontext()
        if config.activation_offloading and torch.cuda.is_available():
            from trl.models.activation_offloading import get_act_offloading_ctx_manager  # slow to import

            self._offloading = get_act_offloading_ctx_manager(self.model)
        self._feed_state, self._save_open_batch, self._on_trained = feed_state, save_open_batch, on_trained
        self._loss_metrics = LossMetrics.zero()
        self._bonus, self._entropy_sum, self._num_entropy_tokens = EntropyBonus.of(config), torch.zeros(()), 0
        self._step_metrics: dict[str, list[float]] = {}
        self._step_ended = self._training_began = time.perf_counter()
        self._times_before, self._step_times = StepTimes(), []  # type: tuple[StepTimes, list[StepTimes]]
        self.stream = make_stream(self)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = prepare_fsdp(self.accelerator, self.args)

    def _placed(self, reference: nn.Module) -> nn.Module:
        placed = shard(reference, self.accelerator) if self.is_fsdp_enabled else reference.to(self.args.device)
        return placed.eval()

    def get_train_dataloader(self) -> RolloutStream:  # type: ignore[override]
        return self.stream

    def begin_step(self, batch: StepBatch) -> None:
        """Called on every rank when the groups of a step have arrived and its training begins."""
        self._training_began, self._times_before = time.perf_counter(), batch.times
        for name, value in step_metrics(self._config, batch).items():
            self._step_metrics.setdefault(name, []).append(value)

    def end_step(self) -> None:
        """Called on every rank after the optimizer step."""
        if self._bonus.adaptive:
            if self._num_entropy_tokens:
                self._bonus.adapt(self._ranks.sum_(self._entropy_sum).item() / self._num_entropy_tokens)
            self._entropy_sum = torch.zeros(())
            self._step_metrics.setdefault("entropy_coef", []).append(self._bonus.coefficient)
        trl = self._config.trl
        if (
            trl.sync_ref_model
            and self._reference is not None
            and self.state.global_step % trl.ref_model_sync_steps == 0
        ):
            mix_into(self._reference, self.accelerator.unwrap_model(self.model), trl.ref_model_mixup_alpha)
        now = time.perf_counter()
        step_s = now - self._step_ended - self._times_before.eval_s
        times = replace(self._times_before, step_s=step_s, fwd_bwd_s=now - self._training_began)
        self._step_times.append(replace(times, processes=float(self._ranks.size)))
        self._step_ended = now
        self._on_trained()

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """One item: the micro-batches of the next optimizer step, with what the loss needs to know of the whole step's
        entropy: `high_entropy_T`, which costs a forward pass of the step, and `entropy_weight`."""
        samples = list(itertools.islice(epoch_iterator, 1))
        if samples:
            samples += itertools.islice(epoch_iterator, self.stream.num_micro_batches - 1)
            samples = self._with_entropy(samples)
        return [{"micro_batches": samples}] if samples else [], None

    def _with_entropy(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        share = self._config.trl.top_entropy_quantile
        if share == 1 and not self._bonus.adaptive and self._bonus.applied == 0:
            return samples
        masks: list[Tensor | None] = [None] * len(samples)
        count = sum(sample["micro_batch"].target_ids_T.numel() for sample in samples)
        if share < 1:
            entropies = [self._entropies(sample["micro_batch"].to(self.args.device)) for sample in samples]
            masks = list(high_entropy(entropies, share, self._ranks))
            count = sum(int(mask.sum()) for mask in masks if mask is not None)
        self._num_entropy_tokens = int(self._ranks.sum_(torch.tensor(count)))
        weight = self._bonus.applied / max(1, self._num_entropy_tokens)
        pairs = zip(samples, masks, strict=True)
        return [sample | {"high_entropy_T": mask, "entropy_weight": weight} for sample, mask in pairs]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all micro-batches; ranks add up their gradients in the last."""
        micro_batches, total = inputs["micro_batches"], torch.zeros((), device=self.args.device)
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            # FSDP sums at once: what waits for the sum would be the gradients of the whole model.
            sums = is_last or self.is_fsdp_enabled
            with nullcontext() if sums else self.accelerator.no_sync(model=model), self._offloading:
                total += super().training_step(model, micro_batch, num_items_in_batch)
        return total

    def old_logprobs(self, batch: MicroBatch) -> Tensor:
        """Of the present policy, float32 [T] on the CPU: what the steps on a generation batch compare theirs with."""
        self.model_wrapped.train()
        with torch.no_grad():
            device, temperature = self.args.device, self._config.trl.temperature
            return completion_logprobs(self.model_wrapped, batch.to(device), temperature, False)[0].float().cpu()

    def _entropies(self, batch: MicroBatch) -> Tensor:
        with torch.no_grad():
            _, entropies_T = completion_logprobs(self.model_wrapped, batch, self._config.trl.temperature)
        assert entropies_T is not None
        return entropies_T

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        batch: MicroBatch = inputs["micro_batch"].to(self.args.device)
        high_entropy_T, entropy_weight = inputs.get("high_entropy_T"), inputs.get("entropy_weight", 0.0)
        temperature = self._config.trl.temperature
        logprobs_T, entropies_T = completion_logprobs(model, batch, temperature, entropy_gradient=entropy_weight != 0)
        self.stream.keep_logprobs(inputs["samples"], logprobs_T)
        assert entropies_T is not None
        ref_logprobs_T = None
        if self._config.trl.beta > 0:
            with torch.no_grad(), self._as_reference(model) as reference:
                ref_logprobs_T, _ = completion_logprobs(reference, batch, temperature, compute_entropy=False)
        out = policy_loss(
            logprobs_T, batch.old_logprobs_T, ref_logprobs_T, batch.sampling_logprobs_T, batch.advantages_T, batch.weights_T,
            batch.lengths_B, self._options, entropies_T, high_entropy_T, entropy_weight,
        )  # fmt: skip
        self._loss_metrics = self._loss_metrics + out.metrics.cpu()
        if self._bonus.adaptive:
            acted_T = entropies_T.detach() if high_entropy_T is None else entropies_T.detach()[high_entropy_T]
            self._entropy_sum = self._entropy_sum + acted_T.sum().cpu()
        # The weights already hold the step's normalisation: undo DDP's mean over ranks.
        return out.loss * self._ranks.size

    def _as_reference(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        if self._reference is not None:
            return nullcontext(self._reference)
        return without_adapter(self.accelerator.unwrap_model(model))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: over steps for rollouts and times, over tokens for the loss."""
        if "loss" in logs:
            logs |= self._loss_metrics.of_all(self._ranks).report()
            logs |= {name: mean(values) for name, values in self._step_metrics.items()}
            logs |= StepTimes.mean(self._step_times).logs()  # type: ignore[arg-type] # the library hands them on
            self._loss_metrics, self._step_metrics, self._step_times = LossMetrics.zero(), {}, []
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the library's estimate wants padded `input_ids`."""
        return 0

    @property
    def _gathers_checkpoints(self) -> bool:
        """Whether a model that is cut over the ranks is saved whole, which the library does not do for a tied head."""
        return self.is_fsdp_enabled and "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._gathers_checkpoints:
            return super().save_model(output_dir, _internal_call)
        state = whole_state(self.model, None, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._gathers_checkpoints:
            return super()._save_optimizer_and_scheduler(output_dir)
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._gathers_checkpoints:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        load_whole(saved_tensors(self.model), [*folder.glob("model*.safetensors"), *folder.glob(WEIGHTS)])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._bonus.adaptive:
            state = json.loads((Path(checkpoint) / CHECKPOINT_MARKER).read_text())
            if "entropy_bonus" in state:  # not where the key use_adaptive_entropy is new
                self._bonus.restore(state["entropy_bonus"])
        if checkpoint is not None and self._config.trl.sync_ref_model and self._reference is not None:
            load_reference(self._reference, Path(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The marker comes when every rank has written its files, and the older checkpoints go after it."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._ranks.rank == 0:
            clear(folder)
        self._ranks.wait_for_all()
        super()._save_checkpoint(model, trial)
        self._ranks.wait_for_all()
        if self._config.trl.sync_ref_model and self._reference is not None:
            save_reference(self._reference, folder, is_first=self._ranks.rank == 0)
        if self._ranks.rank == 0:
            self._save_open_batch(folder)
            state = {"step": self.state.global_step, "optimizer": self._config.optimizer, **self._feed_state()}
            if self._base is not None:
                state["base"] = self._base
            if self._bonus.adaptive:
                state["entropy_bonus"] = self._bonus.state()
            seal(folder, state)
            if (most := self._config.save_total_limit) is not None:
                drop_older(folder.parent, most)


class StepClock(TrainerCallback):
    """Tells the trainer when a step ended, and the epochs that a number of steps makes."""

    def __init__(self, epochs_per_step: float):
        self._epochs_per_step = epochs_per_step
        self.trainer: GRPOTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step * self._epochs_per_step
        if self.trainer is not None:
            self.trainer.end_step()
