"""Keys that Axolotl's users bring and rlx does not honour: why, and what to write instead.

A key is listed with the values that mean "off" there, which are accepted and change nothing; any other value is an
error. Nothing is dropped silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_OFF: tuple[Any, ...] = (None, False)


@dataclass(frozen=True)
class Refusal:
    why: str
    instead: str
    harmless: tuple[Any, ...] = _OFF


def _refuse(keys: str, why: str, instead: str, harmless: tuple[Any, ...] = _OFF) -> dict[str, Refusal]:
    return {key: Refusal(why, instead, harmless) for key in keys.split()}


_REMOVE = "Remove the key."
_TRACKERS = "Write `wandb_project: NAME`, `mlflow_experiment_name: NAME`, `use_tensorboard: true` or `use_trackio: true`, or nothing."

REFUSED: dict[str, Refusal] = {
    **_refuse("dpo_beta orpo_alpha kto_desirable_weight kto_undesirable_weight simpo_gamma cpo_alpha dpo_label_smoothing dpo_loss_type "
              "dpo_loss_weights precompute_ref_log_probs rl_beta", "it belongs to preference training, and rlx trains with `rl: grpo`",
              "Remove the key; the KL weight of GRPO is `trl.beta`."),
    **_refuse("load_in_8bit", "base models are quantised to 4 bits only", "Write `adapter: qlora`, or remove the key."),
    **_refuse("qlora_sharded_model_loading", "each learner process loads the quantised model itself", _REMOVE),
    **_refuse("peft", "LoftQ is not supported", _REMOVE, (None, {})),
    **_refuse("lora_fan_in_fan_out", "PEFT sees it by the layer", _REMOVE),
    **_refuse("lora_target_parameters peft_layers_to_transform peft_layers_pattern peft_layer_replication peft_trainable_token_indices", "which layers "
              "are updated is said in one place", "Write a regular expression for whole names in `lora_target_modules`.", (None, False, [], "", {})),
    **_refuse("peft_init_lora_weights loraplus_lr_ratio loraplus_lr_embedding", "it is not supported", _REMOVE, (None, True, "")),
    **_refuse("lora_mlp_kernel lora_qkv_kernel lora_o_kernel", "Axolotl's own kernels are not part of rlx", _REMOVE),
    **_refuse("reward_model process_reward_model", "training a reward model is not supported", "Remove the key."),
    **_refuse("fsdp_config.mixed_precision_policy", "weights are float32, and what is computed in is said elsewhere", "Write `bf16: true`, or nothing.", (None, "")),
    **_refuse("fsdp_config.cpu_offload_pin_memory", "memory is pinned with offload_params", _REMOVE, (None, True)),
    **_refuse("liger_rms_norm liger_rope liger_glu_activation liger_swiglu liger_layer_norm liger_cross_entropy liger_fused_linear_cross_entropy "
              "liger_use_token_scaling", "Liger's kernels are switched on together", "Write `use_liger_kernel: true`."),
    **_refuse("use_ray ray_num_workers ray_run_name resources_per_worker", "the learner does not run inside Ray; the rollout service always does",
              "Remove the key; `rlx train CFG --num-processes N` starts the learner's processes."),
    **_refuse("use_comet comet_api_key comet_project_name comet_workspace comet_experiment_key comet_mode comet_online comet_experiment_config "
              "swanlab_project use_swanlab", "rlx logs to wandb, mlflow, tensorboard and trackio", _TRACKERS, (None, False, "", [], {}, "none")),
    **_refuse("report_to", "each tracker has a key of its own", _TRACKERS, (None, "", [], "none")),
    **_refuse("pad_to_sequence_len eval_sample_packing multipack_real_batches", "packed rows are as long as their sequences", _REMOVE),
    **_refuse("group_by_length train_on_inputs strict dataset_processes overrides_of_model_config xformers_attention flex_attention s2_attention",
              "it has no effect on GRPO", _REMOVE),
    **_refuse("fp16", "the learner keeps float32 master weights and computes in bfloat16 at most", "Write `bf16: true`, or nothing on a CPU."),
    **_refuse("special_tokens tokens added_tokens_overrides", "changing the vocabulary would part the learner from the rollout workers",
              "Save the model and tokenizer with those tokens once, and name that folder in `base_model`.", (None, [], {})),
    **_refuse("eval_batch_size eval_table_size eval_max_new_tokens eval_causal_lm_metrics do_bench_eval", "evaluation runs through the service",
              "Remove the key; use `test_datasets` and `eval_steps`.", (None, False, [], 0, 128)),
    **_refuse("hub_model_id hub_strategy push_dataset_to_hub push_to_hub", "nothing is uploaded", "Remove the key, and upload output_dir yourself."),
    **_refuse("save_only_model", "a checkpoint without optimizer cannot be resumed", _REMOVE),
    **_refuse("early_stopping_patience loss_watchdog_threshold loss_watchdog_patience", "it watches a supervised loss", _REMOVE),
    **_refuse("plugins", "Axolotl's plugins are not loaded", _REMOVE, (None, False, [])),
    **_refuse("model_type tokenizer_type processor_type", "transformers takes the class from the model's own files", _REMOVE,
              (None, "", "AutoModelForCausalLM", "AutoTokenizer")),
    **_refuse("base_model_config base_model_ignore_patterns tokenizer_use_fast tokenizer_legacy is_falcon_derived_model is_llama_derived_model "
              "is_qwen_derived_model is_mistral_derived_model", "model and tokenizer are used as they were saved", _REMOVE, (None, False, "", [])),
    **_refuse("rope_scaling resize_token_embeddings_to_32x", "learner and rollout workers read it from the model's folder",
              "Save the model with it once, and name that folder in `base_model`.", (None, False, "", {})),
    **_refuse("neftune_noise_alpha noisy_embedding_alpha", "noise would part the learner's policy from the workers'", _REMOVE, (None, 0)),
    **_refuse("bnb_4bit_quant_type bnb_4bit_use_double_quant", "it stands with bitsandbytes' other arguments", "Write `bnb_config_kwargs: {KEY: VALUE}`.", (None, "")),
    **_refuse("gptq llm_int8_has_fp16_weight", "base models are quantised to 4 bits only", "Write `adapter: qlora`, or remove the key."),
    **_refuse("loftq_config lora_on_cpu relora relora_steps relora_warmup_steps relora_anneal_steps relora_prune_ratio relora_cpu_offload",
              "it is not supported", _REMOVE, (None, False, "", {})),
    **_refuse("torch_compile torch_compile_backend torch_compile_mode flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv "
              "flash_attn_fuse_mlp flash_optimum", "the learner's kernels are those of transformers and Liger",
              "Remove the key; Liger's are `use_liger_kernel: true`.", (None, False, "")),
    **_refuse("local_rank world_size device_map gpu_memory_limit max_memory ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers "
              "ddp_find_unused_parameters", "`rlx train` starts the learner's processes, one to a device, and joins them", _REMOVE, (None, False, "")),
    **_refuse("evals_per_epoch eval_strategy evaluation_strategy do_eval", "held-out prompts are evaluated every so many steps", "Write `eval_steps: N`.",
              (None, False, "", 0, "no", "steps")),
    **_refuse("save_safetensors", "nothing is written but safetensors", _REMOVE, (None, True, "")),
    **_refuse("optim_args optim_target_modules", "an optimizer's arguments have keys of their own", "Write `adam_beta1`, `adam_beta2`, `adam_epsilon` or `weight_decay`.",
              (None, "", [], {})),
    **_refuse("lr_quadratic_warmup lr_div_factor", "it is not among the schedules of transformers", "Remove the key; `lr_scheduler` names a schedule."),
    **_refuse("cosine_min_lr_ratio cosine_constant_lr_ratio", "a schedule's arguments stand together",
              "Write `lr_scheduler: cosine_with_min_lr` and `lr_scheduler_kwargs: {min_lr_rate: 0.1}`."),
    **_refuse("hf_use_auth_token", "the hub's own log-in is used", "Remove the key; type `hf auth login`, or set HF_TOKEN.", (None, True, False, "")),
    **_refuse("remove_unused_columns", "the rewards get every column that the transform leaves", "Remove the key; drop columns with the transform's `remove_columns`."),
    **_refuse("system_prompt default_system_message", "the transform writes the whole prompt", 'Let it begin with {"role": "system", "content": ...}.', (None, "")),
    **_refuse("pretraining_dataset dataset_keep_in_memory dataset_shard_num dataset_shard_idx sample_packing_eff_est total_num_tokens", "it has no effect on GRPO",
              _REMOVE, (None, False, "", [])),
    **_refuse("debug", "there is no such mode", "Remove the key; `rlx rollout test` shows an episode token by token.", (None, False, "")),
    **_refuse("trl.use_liger_loss", "Liger's fused GRPO loss has some of the losses only; rlx's never holds all logits either, for every loss", "Remove the key; Liger's other kernels are `use_liger_kernel: true`."),
    **_refuse("trl.vllm_enable_sleep_mode", "the workers have GPUs of their own and never sleep", _REMOVE),
    **_refuse("trl.router_aux_loss_coef", "no balancing loss is added for the router of a mixture of experts: it is a mean over a micro-batch, "
              "so that the loss would change with micro_batch_size", "Remove the key, or write 0.", (None, 0, 0.0)),
    **_refuse("trl.model_init_kwargs", "each of its keys has a name of its own", "Write `revision_of_model`, `attn_implementation`, `adapter: qlora`, ...", (None, {})),
    **_refuse("trl.pad_to_multiple_of", "rows are as long as their sequences", _REMOVE, (None, "auto")),
    **_refuse("trl.vllm_gpu_memory_utilization trl.vllm_max_model_length trl.vllm_model_impl trl.vllm_group_port trl.ds3_gather_for_generation", "it is of TRL's own "
              "engine", "Write `vllm: {gpu_memory_utilization: ..., max_model_len: ...}`, or remove the key."),
    **_refuse("trl.use_transformers_paged trl.use_transformers_continuous_batching trl.transformers_continuous_batching_config trl.cache_implementation",
              "rlx generates with vLLM only", _REMOVE),
    **_refuse("trl.log_unique_prompts trl.log_completions_hub_repo trl.log_multimodal", "samples.jsonl holds what was sampled", _REMOVE, (None, False, True)),
    **_refuse("trl.use_data_producer trl.async_prefetch trl.prefetch_depth", "generation runs beside training, unless max_staleness is 0",
              "Remove the key; how far it may run ahead is `async: {max_staleness: N}`.", (None, False, 0)),
    **_refuse("trl.vllm_sync_interval", "weights are published after every step", _REMOVE, (None, 0, 1)),
    **_refuse("trl.streaming_partial_batch", "a step trains whole groups only", _REMOVE),
    **_refuse("trl.replay_buffer_size", "old samples are not kept", "Remove the key; `trl.num_iterations` trains several times on a batch.", (None, 0)),
    **_refuse("trl.skip_zero_advantage_batches", "groups that teach nothing are replaced instead",
              "Remove the key, or write `async: {dynamic_sampling: true}`."),
    **_refuse("trl.vllm_lora_sync", "rlx sends adapters over HTTP, without a shared folder", "Write `lora_sync: adapter` at the top level."),
    **_refuse("trl.reward_num_workers", "rlx sets the processes per reward function elsewhere", "Write `rewards: {workers: N}`.", (None, 0)),
    **_refuse("vllm.enable_reasoning vllm.reasoning_parser vllm.device", "it does nothing in Axolotl either", _REMOVE, (None, False, "", "auto")),
    **_refuse("vllm.serve_module vllm.worker_extension_cls", "the workers are rlx's own", _REMOVE, (None, "")),
    **{f"{section}.{key}": refusal for section in ("datasets", "test_datasets") for key, refusal in _refuse(
        "field field_chosen field_completion field_human field_input field_instruction field_label field_messages field_model field_output field_prompt "
        "field_rejected field_system message_property_mappings roles roles_to_train train_on_eos train_on_eot train_on_split conversation chat_template "
        "system_prompt shards shards_idx preprocess_shards", "the function that `type` names makes the prompt of a row",
        "Remove the key, and let that function read the columns.", (None, "", [], {})).items()},
}  # fmt: skip

RENAMED: dict[str, str] = {
    "model_name_or_path": "base_model",
    "dataset_name": "datasets[].path",
    "train_files": "datasets[].path",
    "max_new_tokens": "trl.max_completion_length",
    "max_tokens": "trl.max_completion_length",
    "max_response_length": "trl.max_completion_length",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "kl_coef": "trl.beta",
    "init_kl_coef": "trl.beta",
    "kl_loss_coef": "trl.beta",
    "group_size": "trl.num_generations",
}
"""What other trainers call a key, and what it is here."""

VALUE_HINTS: dict[tuple[str, Any], str] = {
    (
        "bf16",
        "full",
    ): "weights in bfloat16 would lose updates as small as those of reinforcement learning. Write `bf16: true`, which "
    "computes in bfloat16 over float32 weights.",
    ("fsdp_version", 1): "FSDP1 leaves transformers soon. Write `fsdp_version: 2`, or remove the key.",
    ("trl.use_vllm", False): "rlx generates with vLLM only. Write `use_vllm: true` or remove the key.",
    (
        "trl.vllm_mode",
        "colocate",
    ): "the learner and the workers are separate processes. Write `vllm_mode: server` or remove the key.",
}
"""What to say of a value that other tools accept."""

METHODS_ELSEWHERE = ("dpo", "ipo", "orpo", "kto", "simpo")
