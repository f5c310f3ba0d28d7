"""Forms of what may stand under `deepspeed:`, and the values "auto" of Hugging Face's files. Text only: DeepSpeed is not imported.

In those files "auto" means: taken from the training arguments, or from the model's width. Here `training` is what they are; what depends on the
width alone (three sizes of buffers, which change no result) is left to DeepSpeed's own defaults. An "auto" that Hugging Face fills with something
there is not here is refused by name, and so is one that nobody fills.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import ConfigError, brief

ZERO_FLAGS = {
    "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions", "overlap_comm", "compute_grad_norm",
    "load_from_fp32_weights", "elastic_checkpoint", "cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload",
    "gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params",
    "stage3_use_all_reduce_for_fetch_params", "allgather_sequential", "stage3_allgather_sequential", "stage3_gather_fp16_weights_on_model_save",
    "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint",
    "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory",
}  # fmt: skip
ZERO_NUMBERS = {
    "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "prefetch_bucket_size", "stage3_prefetch_bucket_size",
    "param_persistence_threshold", "stage3_param_persistence_threshold", "model_persistence_threshold", "stage3_model_persistence_threshold",
    "max_live_parameters", "stage3_max_live_parameters", "max_reuse_distance", "stage3_max_reuse_distance", "module_granularity_threshold",
    "stage3_module_granularity_threshold", "zero_hpz_partition_size",
}  # fmt: skip
ZERO_OTHERS = {"stage", "offload_param", "offload_optimizer", "zenflow", "leaf_module"}
OFFLOAD_FLAGS = {"pin_memory", "pipeline_read", "pipeline_write", "fast_init", "super_offload"}
OFFLOAD_NUMBERS = {"buffer_count", "buffer_size", "max_in_cpu", "ratio", "cpuadam_cores_perc"}
OFFLOAD_OTHERS = {"device", "nvme_path"}
BY_WIDTH = {
    "reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "prefetch_bucket_size", "param_persistence_threshold",
}  # fmt: skip
"""Of `zero_optimization`: what Hugging Face fills from the model's width."""
AUTO = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16.enabled", "bfloat16.enabled",
    "fp16.enabled", "amp.enabled", *(f"zero_optimization.{key}" for key in BY_WIDTH), "optimizer.params.lr", "optimizer.params.betas",
    "optimizer.params.eps", "optimizer.params.weight_decay",
}  # fmt: skip
"""Where "auto" is understood. Not in `scheduler`: DeepSpeed's warms up along a logarithm, `training`'s along a line."""
LARGEST = 2**62
OPTIMIZER = {"betas": [0.9, 0.999], "eps": 1e-8}
"""AdamW's as the engine has them."""


def check_form(deepspeed: Mapping[str, Any]) -> None:
    """Mappings, switches and numbers are what they must be, keys of `zero_optimization` are known, and every "auto" is one that is understood.

    Raises ConfigError: the key, the value, the remedy.
    """
    zero = section(deepspeed, "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in (0, 1, 2, 3):
        why = "; nothing here says which" if stage == "auto" else ""
        raise ConfigError(f"deepspeed.zero_optimization.stage={brief(stage)} is not 0, 1, 2 or 3{why}")
    for key in ("fp16", "bf16", "bfloat16", "amp"):
        enabled = section(deepspeed, key).get("enabled", False)
        if enabled != "auto" and not isinstance(enabled, bool):
            raise ConfigError(f"deepspeed.{key}.enabled={brief(enabled)} is not true, false or auto")
    for path, value in _leaves(deepspeed):
        if value == "auto" and path not in AUTO:
            raise ConfigError(f"deepspeed.{path}=auto is filled by nothing here; write the value, or remove the key")
    _check_keys("zero_optimization", zero, ZERO_FLAGS, ZERO_NUMBERS, ZERO_OTHERS)
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict):
            _check_keys(f"zero_optimization.{key}", zero[key], OFFLOAD_FLAGS, OFFLOAD_NUMBERS, OFFLOAD_OTHERS)


def section(deepspeed: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping inside the settings, empty for none. Raises ConfigError where it is something else."""
    value = deepspeed.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"deepspeed.{key}={brief(value)} is not a mapping; write {key}: {{...}}, or remove it")
    return value or {}


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        return [leaf for i, inner in enumerate(value) for leaf in _leaves(inner, f"{path}.{i}")]
    return [(path, value)]


def _check_keys(where: str, values: Mapping[str, Any], flags: set[str], numbers: set[str], others: set[str]) -> None:
    for key, value in values.items():
        name = f"deepspeed.{where}.{key}"
        if key not in flags | numbers | others:
            close = difflib.get_close_matches(key, flags | numbers | others, n=2)
            raise ConfigError(f"unknown key {name}; " + (f"did you mean {' or '.join(close)}?" if close else "remove it"))
        if key in flags and not isinstance(value, bool | None):
            raise ConfigError(f"{name}={brief(value)} is not true or false")
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST
        if key in numbers and value != "auto" and not number:
            raise ConfigError(f"{name}={brief(value)} is not a number from 0 on")


def check_optimizer(optimizer: Any, training: Any) -> None:
    """An `optimizer` of Hugging Face's files: AdamW with "auto" or the same values as `training`. Raises ConfigError for any other."""
    told = "AdamW comes from training.learning_rate, weight_decay and max_grad_norm; remove deepspeed.optimizer"
    if not isinstance(optimizer, dict) or optimizer.get("type") != "AdamW" or set(optimizer) != {"type", "params"}:
        raise ConfigError(f"deepspeed.optimizer cannot be used: {told}")
    given = optimizer["params"] if isinstance(optimizer["params"], dict) else {}
    ours = {"lr": training.learning_rate, "weight_decay": training.weight_decay, **OPTIMIZER}
    if not {"lr", "weight_decay"} <= set(given):  # what is left out is DeepSpeed's own, not training's
        raise ConfigError(f"deepspeed.optimizer cannot be used: {told}")
    names = {"lr": "training.learning_rate", "weight_decay": "training.weight_decay"}
    for key, value in given.items():
        if key not in ours:
            raise ConfigError(f"deepspeed.optimizer.params.{key} cannot be used: {told}")
        if value not in ("auto", ours[key]) or isinstance(value, bool):
            other = f"{names.get(key, 'AdamW')}={ours[key]}"
            raise ConfigError(f"deepspeed.optimizer.params.{key}={brief(value)} contradicts {other}; write auto, or remove the optimizer")


def filled(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those whose "auto" is left to DeepSpeed or to `training`; the others are as they were."""
    zero = deepspeed.get("zero_optimization")
    made = {key: value for key, value in deepspeed.items() if value != "auto"}
    if isinstance(zero, dict):
        made["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    return made
