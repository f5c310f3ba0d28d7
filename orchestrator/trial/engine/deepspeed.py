"""DeepSpeedEngine: the verbs of `strategies.plain.PlainEngine` on DeepSpeed, ZeRO stages 0-3. The only file that imports deepspeed.

Nothing here gathers a gradient: inner products are taken on shards and one number is summed over workers. `validate` can be asked
before any device is taken.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.config import deepspeed as engine_config
from orchestrator.config.deepspeed import validate
from orchestrator.errors import ConfigError
from orchestrator.trial.engine import shards
from strategies.optim import parameter_groups
from strategies.plain import PlainEngine

__all__ = ["DeepSpeedEngine", "validate"]


_LINEAR = torch.nn.functional.linear
"""Torch's own, as it is before DeepSpeed is imported."""


class DeepSpeedEngine(PlainEngine):
    """Trains `model` (whole, not yet sharded) under DeepSpeed; see PlainEngine for the verbs.

    `training` is `config.Training`, `deepspeed` the user's own DeepSpeed config. A process group of the caller is used as it is;
    without one and with one worker, a group of one is made in memory (no port). Raises ConfigError for a config that cannot work.
    """

    def __init__(
        self, model: nn.Module, *, training: Any, deepspeed: dict[str, Any], max_steps: int,
        rank: int = 0, world_size: int = 1, device: Any = "cpu",
    ):  # fmt: skip
        validate(deepspeed, training, num_workers=world_size)
        self.stage = engine_config.stage_of(deepspeed)
        self._on_host = engine_config.offloaded(deepspeed, "offload_optimizer")
        self._config = engine_config.complete(deepspeed, training, world_size)
        try:
            super().__init__(model, training=training, max_steps=max_steps, rank=rank, world_size=world_size, device=device)
        except BaseException:
            torch.nn.functional.linear = _LINEAR
            raise

    def _signature(self) -> dict[str, Any]:
        return super()._signature() | {"stage": self.stage}

    def _build(self) -> None:
        deepspeed = _import(self.device)
        _process_group(self.device, self.world_size)
        model = self.module
        self._skeleton = shards.skeleton(model) if self.stage == 3 else None
        # a bucket is allocated whole, however little is trained: DeepSpeed's 500 M elements are 2 GB
        trained = sum(p.numel() for p in self.trainable.values())
        self._config["zero_optimization"].setdefault("reduce_bucket_size", min(engine_config.BUCKET, trained))
        self._known = {id(p): set(vars(p)) for p in model.parameters()}
        optimizer = self._adam()
        _local_rank(self.device)
        # told that the group exists, DeepSpeed does not look for an MPI launcher
        self._ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._config, dist_init_required=False)
        self._optimizer = optimizer
        self._layout = shards.layout(self._ds, self.trainable, stage=self.stage, on_host=self._on_host)
        self.sharded = self._layout.sharded
        self._share = self.world_size  # DeepSpeed averages over workers
        # accumulating in place of reducing is DeepSpeed's for stages 0 and 1; 2 and 3 reduce with every backward and are added up here,
        # and so is stage 1 with its gradients on the host, where DeepSpeed would add what an earlier step left there
        self._late = self.stage < 2 and not self._on_host
        self._partial: list[Tensor] | None = None
        self._gather = lambda parameters: deepspeed.zero.GatheredParameters(parameters)

    def _adam(self) -> torch.optim.Optimizer:
        """torch's AdamW; on CPUs the one that passes over memory once, or DeepSpeed's own, which is compiled, where the config asks for it."""
        groups = parameter_groups(self.trainable, self.training.weight_decay)
        if self._on_host and self._config["zero_force_ds_cpu_optimizer"]:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups)
        return torch.optim.AdamW(groups, fused=self._on_host or self.device.type == "cpu" or None)

    def _forward(self, **inputs: Any) -> Any:
        return self._ds(**inputs)

    def _aside(self, **inputs: Any) -> Any:
        # DeepSpeed follows every output of its engine and refuses a backward that it did not start
        return self.module.forward(**self._options, **inputs)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self._ds.set_gradient_accumulation_boundary(last or not self._late)
        self._ds.backward(loss)
        if not self._late and not last:
            parts = self._layout.collect()
            self._partial = parts if self._partial is None else [a.add_(b) for a, b in zip(self._partial, parts, strict=True)]

    def _collect(self) -> list[Tensor]:
        parts, partial = self._layout.collect(), self._partial
        self._partial = None
        return parts if partial is None else [a.add_(b) for a, b in zip(partial, parts, strict=True)]

    def _apply(self, parts: list[Tensor]) -> None:
        self._layout.put(parts)
        self._ds.set_gradient_accumulation_boundary(True)
        self._ds.step()
        self._layout.clear()

    def _weights(self) -> list[Tensor]:
        return self._layout.weights()

    def _moments(self) -> list[Tensor]:
        return self._layout.moments()

    def _publish(self) -> None:
        self._layout.publish()

    @contextmanager
    def _gathered(self) -> Iterator[nn.Module]:
        if self.stage < 3:
            with super()._gathered() as module:
                yield module
            return
        self._alive()
        with self.autocast():
            yield self._copy()

    def _copy(self) -> nn.Module:
        """A plain, whole copy of a ZeRO-3 model. Collective."""
        import copy

        whole = copy.deepcopy(self._skeleton)
        shards.gather_into(whole, self.module, self.device, self._gather)
        return whole

    def _release(self) -> nn.Module:
        if self.stage == 3:
            return self._copy()
        for parameter in self.trainable.values():
            # out of DeepSpeed's flat buffer, which would otherwise live, and be saved, with the model
            parameter.data = parameter.data.clone()
        return self.module

    def close(self) -> None:
        """Destroy the DeepSpeed engine and cut what it tied to the model, so that a process can build many. May be called twice."""
        torch.nn.functional.linear = _LINEAR  # stage 3 puts its own in its place, for every model of the process
        if getattr(self, "_ds", None) is None:
            return super().close()
        engine, module, self._ds = self._ds, self.module, None
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        engine.destroy()
        for parameter in module.parameters():
            for name in set(vars(parameter)) - self._known.get(id(parameter), set()):
                delattr(parameter, name)
        self._layout = self._skeleton = self._gather = None
        self.trainable = {}
        if self.stage == 3 and self._exported is None:
            self.module = nn.Module()  # its parameters are empty now
        super().close()
        del engine
        gc.collect()  # DeepSpeed's engine and its optimiser refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _import(device: torch.device) -> Any:
    """DeepSpeed for this device, quiet, and without the shared-memory op it would compile for a minute on CPU.

    The op serves only `inference_all_reduce` (tensor-parallel inference); gloo does all that training asks for, so it is declared
    absent before DeepSpeed's backend is made. Raises ConfigError where DeepSpeed was imported for another kind of device.
    """
    first = "deepspeed" not in sys.modules
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch's own advice to DeepSpeed, repeated with every backward; no user can act on it
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if get_accelerator()._name != device.type:
        raise ConfigError(
            f"deepspeed runs on {get_accelerator()._name} in this process, the model is on {device.type};"
            f" start the process with DS_ACCELERATOR={device.type}, or set ray.use_gpu accordingly"
        )
    if device.type == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # stage 3 asks with every bucket how many devices the machine has, and starts `numactl` to find out; the answer is used for
        # quantised gradients only, which are refused
        os.environ.setdefault("LOCAL_SIZE", "1")
    if first:
        # the collection in `close` would walk all that the imports left, a quarter of a second each time
        gc.collect()
        gc.freeze()
    return deepspeed


def _process_group(device: torch.device, world_size: int) -> None:
    """Make a group of one in memory where there is none, and tell DeepSpeed of the group. Raises ConfigError for missing workers."""
    if not dist.is_initialized():
        if world_size > 1:
            raise ConfigError(f"{world_size} workers need an initialised torch.distributed process group; the lane makes it")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if dist.get_world_size() != world_size:
        raise ConfigError(f"the process group has {dist.get_world_size()} workers, the engine was told {world_size}")
    from deepspeed import comm

    if comm.comm.cdb is None:
        comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _local_rank(device: torch.device) -> None:
    """Set LOCAL_RANK, from which DeepSpeed takes its device all through training, to the index of this worker's device."""
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
