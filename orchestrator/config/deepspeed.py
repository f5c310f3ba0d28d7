"""What a user may write under `deepspeed:` and what is made of it. Reads text only: DeepSpeed is not imported.

Everything that decides the mathematics comes from `training`; a key of ours in the user's file is accepted where it says the same
(or "auto", as Hugging Face's templates do) and refused where it contradicts.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from orchestrator.config import deepspeed_keys
from orchestrator.errors import ConfigError

PASSED = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "flops_profiler", "comms_logger", "communication_data_type",
    "activation_checkpointing", "disable_allgather", "gradient_allreduce_op",
}  # fmt: skip
OWNED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "bfloat16",
}  # fmt: skip
REFUSED = {
    "optimizer": "AdamW comes from training.learning_rate, weight_decay and max_grad_norm; remove deepspeed.optimizer",
    "scheduler": "the rate's shape is training.lr_scheduler_type and training.warmup_ratio; remove deepspeed.scheduler",
    "fp16": "float16 needs loss scaling, which gradient surgery would have to undo; use training.bf16=true",
    "amp": "mixed precision is training.bf16",
    "torch_autocast": "mixed precision is training.bf16",
    "data_types": "gradients are accumulated in float32; remove deepspeed.data_types",
    "managed_gradient_accumulation": "accumulation is training.gradient_accumulation_steps; remove the key",
    "tensor_parallel": "a strategy reads gradients per data-parallel worker only; remove deepspeed.tensor_parallel",
    "pipeline": "pipeline stages hide gradients from strategies; remove deepspeed.pipeline",
    "sequence_parallel_size": "sequence parallelism is not supported; remove the key",
    "data_parallel_size": "the number of workers is ray.num_workers; remove the key",
    "hybrid_engine": "evaluation uses a plain copy of the model; remove deepspeed.hybrid_engine",
    "compression_training": "compressed weights cannot be compared with the untouched model; remove the key",
    "elasticity": "the number of workers is fixed during a trial; remove deepspeed.elasticity",
    "data_efficiency": "the rows of a step come from the trial's seed; remove the key",
    "curriculum_learning": "the rows of a step come from the trial's seed; remove the key",
    "prescale_gradients": "gradients are scaled by the number of loss units; remove the key",
    "gradient_predivide_factor": "gradients are scaled by the number of loss units; remove the key",
    "sparse_gradients": "sparse gradients have no shards to project; remove the key",
    "compile": "DeepCompile moves gradients out of reach; remove deepspeed.compile",
    "zenflow": "ZenFlow updates weights outside the step; remove the key",
    "tensorboard": "it writes outside output.dir; loss, rate and gradient norm of every step are in MLflow",
    "csv_monitor": "it writes outside output.dir; loss, rate and gradient norm of every step are in MLflow",
}
OFF_BY_DEFAULT = {"fp16", "amp", "tensorboard", "csv_monitor", "hybrid_engine", "elasticity", "torch_autocast", "curriculum_learning"}
"""Sections that DeepSpeed leaves off where they do not say `enabled`."""
REFUSED_ZERO = {
    "cpu_offload": "DeepSpeed renamed it; write offload_optimizer: {device: cpu}",
    "cpu_offload_param": "DeepSpeed renamed it; write offload_param: {device: cpu}",
    "cpu_offload_use_pin_memory": "DeepSpeed renamed it; write offload_optimizer: {device: cpu, pin_memory: true}",
    "zero_quantized_weights": "quantised weights differ from those that are evaluated; remove it",
    "zero_quantized_nontrainable_weights": "quantised weights differ from those that are evaluated; remove it",
    "zero_quantized_gradients": "quantised gradients differ between workers and PlainEngine; remove it",
    "zenflow": "ZenFlow updates weights outside the step; remove it",
    "elastic_checkpoint": "checkpoints are per worker; remove it",
    "legacy_stage1": "DeepSpeed removed it; remove it here too",
}
OFFLOAD = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""What may live in the workers' host memory, and under which ZeRO stages."""
BUCKET = 500_000_000
"""DeepSpeed's own number of elements in a bucket of gradients on their way to the other workers."""


def stage_of(deepspeed: dict[str, Any]) -> int:
    """The ZeRO stage a config asks for; 0 without one. Raises ConfigError where it is not 0..3."""
    deepspeed_keys.check_form(deepspeed)
    return int(deepspeed_keys.section(deepspeed, "zero_optimization").get("stage", 0))


def validate(deepspeed: dict[str, Any], training: Any, num_workers: int | None = None) -> None:
    """Refuse what the engine cannot do right, before any device is taken. Raises ConfigError: the key, the value, the remedy."""
    stage_of(deepspeed)
    for key, value in deepspeed.items():
        if key == "optimizer" and not _off(value):
            deepspeed_keys.check_optimizer(value, training)
        elif key in REFUSED:
            if not _off(value, key):
                raise ConfigError(f"deepspeed.{key} cannot be used: {REFUSED[key]}")
        elif key not in PASSED | OWNED:
            close = difflib.get_close_matches(key, PASSED | OWNED, n=2)
            raise ConfigError(f"unknown key deepspeed.{key}; " + (f"did you mean {' or '.join(close)}?" if close else "remove it"))
    if deepspeed_keys.section(deepspeed, "flops_profiler").get("output_file"):
        raise ConfigError("deepspeed.flops_profiler.output_file would be written outside output.dir; remove it: the profile goes to the worker's log")
    if deepspeed.get("gradient_allreduce_op", "mean") != "mean":
        raise ConfigError("deepspeed.gradient_allreduce_op must be mean: the engine undoes the mean itself; remove the key")
    _check_owned(deepspeed, training, num_workers)
    for key, value in (deepspeed.get("zero_optimization") or {}).items():
        if key in REFUSED_ZERO and not _off(value):
            raise ConfigError(f"deepspeed.zero_optimization.{key} cannot be used: {REFUSED_ZERO[key]}")
        if key == "zero_hpz_partition_size" and value not in (0, 1):
            raise ConfigError("deepspeed.zero_optimization.zero_hpz_partition_size above 1 keeps second copies of weights; remove it")
    _check_offload(deepspeed)


def offloaded(deepspeed: dict[str, Any], key: str) -> bool:
    """Whether a config puts `key` (a key of OFFLOAD) into host memory."""
    return _device(deepspeed, key) not in (None, "none")


def ds_cpu_adam(deepspeed: dict[str, Any]) -> bool:
    """Whether DeepSpeed's own CPU Adam is asked for, which DeepSpeed compiles on first use; without it the step on the host is torch's AdamW."""
    return offloaded(deepspeed, "offload_optimizer") and deepspeed.get("zero_force_ds_cpu_optimizer") is True


def warnings(deepspeed: dict[str, Any]) -> list[str]:
    """What a user should know of an accepted config before it runs."""
    if not ds_cpu_adam(deepspeed):
        return []
    return [
        "deepspeed.zero_force_ds_cpu_optimizer=true: DeepSpeed compiles its CPU Adam on every machine at the first trial (a minute or more, once;"
        " a C++ compiler is needed); leave it out for torch's AdamW, which needs none"
    ]


def _device(deepspeed: dict[str, Any], key: str) -> str | None:
    value = (deepspeed.get("zero_optimization") or {}).get(key)
    return None if value is None else value.get("device", "none")


def _check_offload(deepspeed: dict[str, Any]) -> None:
    zero, stage = deepspeed.get("zero_optimization") or {}, stage_of(deepspeed)
    for key, stages in OFFLOAD.items():
        name, value = f"deepspeed.zero_optimization.{key}", zero.get(key)
        if not isinstance(value, dict | None):
            raise ConfigError(f"{name}={value!r} is not a mapping; write {{device: cpu}}, or remove it")
        device = _device(deepspeed, key)
        if device == "nvme":
            raise ConfigError(
                f"{name}.device=nvme cannot be used: what is swapped to files comes back only inside DeepSpeed's own step, where no strategy can"
                " reach it; use device: cpu, or more workers"
            )
        if device not in (None, "none", "cpu"):
            raise ConfigError(f"{name}.device={device!r} is not cpu or none")
        if device == "cpu" and stage not in stages:
            wanted = f"stage 3, or leave weights on the device and offload the optimizer (offload_optimizer), not stage {stage}"
            raise ConfigError(f"{name} needs zero_optimization." + (wanted if key == "offload_param" else f"stage 1, 2 or 3, not {stage}"))
    optimizer = zero.get("offload_optimizer") or {}
    if not offloaded(deepspeed, "offload_optimizer"):
        return
    if optimizer.get("super_offload"):
        raise ConfigError("deepspeed.zero_optimization.offload_optimizer.super_offload steps outside the step, out of a strategy's reach; remove it")
    if optimizer.get("ratio", 1.0) != 1.0:
        raise ConfigError(
            f"deepspeed.zero_optimization.offload_optimizer.ratio={optimizer['ratio']} splits the optimizer over two devices, and checkpoints hold"
            " one; use ratio 1, or no offload"
        )
    if stage < 3 and zero.get("ignore_unused_parameters") is False:
        raise ConfigError(
            "deepspeed.zero_optimization.ignore_unused_parameters=false cannot be used with offload_optimizer: a gradient that was combined no longer"
            " tells which parameters a backward reached; remove it"
        )


def _check_owned(deepspeed: dict[str, Any], training: Any, num_workers: int | None) -> None:
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    ours = {
        "train_micro_batch_size_per_gpu": (rows, "training.per_device_train_batch_size"),
        "gradient_accumulation_steps": (steps, "training.gradient_accumulation_steps"),
        "gradient_clipping": (training.max_grad_norm, "training.max_grad_norm"),
    }
    if num_workers is not None:
        ours["train_batch_size"] = (rows * steps * num_workers, "training's batch size x accumulation x ray.num_workers")
    for key, (value, name) in ours.items():
        if deepspeed.get(key, "auto") not in ("auto", value) or isinstance(deepspeed.get(key), bool):
            raise ConfigError(f"deepspeed.{key}={deepspeed[key]!r} contradicts {name}={value}; remove the one under deepspeed")
    for key in ("bf16", "bfloat16"):
        enabled = (deepspeed.get(key) or {}).get("enabled", "auto")
        if enabled not in ("auto", training.bf16):
            raise ConfigError(f"deepspeed.{key}.enabled={enabled} contradicts training.bf16={training.bf16}; remove deepspeed.{key}")


def _off(value: Any, key: str = "") -> bool:
    """Whether a section or switch asks for nothing. "auto" switches on what `training` switches on: neither fp16 nor amp, which there is not."""
    if isinstance(value, dict):
        enabled = value.get("enabled", key not in OFF_BY_DEFAULT)
        return enabled is False or (enabled == "auto" and key in ("fp16", "amp"))
    return value is None or value is False or (value == 0 and not isinstance(value, bool))


def complete(deepspeed: dict[str, Any], training: Any, world_size: int) -> dict[str, Any]:
    """The config handed to `deepspeed.initialize`: the user's, with our keys set.

    Accumulation is 1 and clipping 0 there because the engine accumulates and clips itself, after surgery; DeepSpeed's default is 1.0.
    bfloat16 is autocast around the forward, so DeepSpeed sees float32 weights, gradients and moments.
    """
    config = {k: copy.deepcopy(v) for k, v in deepspeed_keys.filled(deepspeed).items() if k in PASSED}
    rows = training.per_device_train_batch_size
    config |= {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "train_batch_size": rows * world_size,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    config.setdefault("steps_per_print", 2**31)
    zero = dict(config.get("zero_optimization") or {})
    for key in REFUSED_ZERO:
        zero.pop(key, None)  # only switched-off ones are left
    for key in OFFLOAD:
        if not offloaded(deepspeed, key):
            zero.pop(key, None)
    if offloaded(deepspeed, "offload_optimizer"):
        # DeepSpeed would take nothing but its own CPU Adam, and compile it
        config["zero_force_ds_cpu_optimizer"] = ds_cpu_adam(deepspeed)
        zero.pop("compute_grad_norm", None)  # DeepSpeed knows no false here; what it computes is not used
    elif zero.get("stage", 0) in (1, 2):
        zero["compute_grad_norm"] = False  # the engine has computed it
    config["zero_optimization"] = zero | {"stage": zero.get("stage", 0)}
    return config
