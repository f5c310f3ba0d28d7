"""Where DeepSpeed keeps a worker's shards, stage by stage: gradients after a backward, float32 weights, optimiser state.

These are DeepSpeed's internals (hence its narrow version range in pyproject.toml); `tests/contract/test_engine.py` holds every stage to
PlainEngine. With a float32 model and `gradient_accumulation_steps` 1:

    stage 0   param.grad, already averaged over workers
    stage 1-2 optimizer.averaged_gradients[group]: tensors that tile the worker's flat partition, padding included
    stage 3   optimizer.averaged_gradients[sub-group]: views into a buffer DeepSpeed keeps; what no backward reached keeps old values

With the optimiser offloaded, a worker's gradients, weights and moments are in its host memory: `.grad` of the flat float32 partitions,
allocated once (and pinned), written parameter by parameter with every backward, so here too what no backward reached keeps old values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Replicated:
    """Stage 0: every worker holds all."""

    sharded = False

    def __init__(self, engine: Any, trainable: dict[str, nn.Parameter]):
        self.engine, self.parameters = engine, list(trainable.values())

    def collect(self) -> list[Tensor]:
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        self.clear()
        return parts

    def put(self, parts: list[Tensor]) -> None:
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def weights(self) -> list[Tensor]:
        return [p.data for p in self.parameters]

    def moments(self) -> list[Tensor]:
        return list(self.parameters)

    def publish(self) -> None:
        pass


class Partitioned:
    """Stages 1 and 2: flat float32 partitions of optimiser state (and gradients); the model's weights are whole on every worker."""

    sharded = True

    def __init__(self, engine: Any, trainable: dict[str, nn.Parameter]):
        self.zero = engine.optimizer

    def collect(self) -> list[Tensor]:
        averaged = self.zero.averaged_gradients
        parts = [torch.cat([t.reshape(-1) for t in averaged[group]]) for group in range(len(self.moments()))]
        self.clear()
        return parts

    def put(self, parts: list[Tensor]) -> None:
        for group, part in enumerate(parts):
            self.zero.averaged_gradients[group] = [part]

    def clear(self) -> None:
        self.zero.averaged_gradients, self.zero.all_grad_tensors = {}, {}
        self.zero.zero_grad()

    def weights(self) -> list[Tensor]:
        return [w.data for w in self.moments()]

    def moments(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def publish(self) -> None:
        self.zero.update_lp_params()


class FullyPartitioned(Partitioned):
    """Stage 3: weights too are in parts, gathered module by module while computing."""

    def collect(self) -> list[Tensor]:
        averaged = self.zero.averaged_gradients
        parts = []
        for group in range(len(self.moments())):
            parts.append(torch.cat([t.reshape(-1) for t in averaged[group]]))
            for tensor in averaged[group]:
                tensor.zero_()
        self.clear()
        return parts

    def clear(self) -> None:
        self.zero.averaged_gradients = {}
        self.zero.zero_grad()

    def moments(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def publish(self) -> None:
        zero = self.zero
        # as at the end of DeepSpeed's own step: drop gathered copies, write the parts, gather what stays gathered
        zero._partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


class OnHost:
    """What the two layouts with an offloaded optimiser share: the gradient is `.grad` of the flat partitions, for good.

    DeepSpeed keeps views of these tensors, so they are copied from and into and never replaced.
    """

    def collect(self) -> list[Tensor]:
        self._arrived()
        parts = [partition.grad.clone() for partition in self.moments()]
        self.clear()
        return parts

    def put(self, parts: list[Tensor]) -> None:
        for partition, part in zip(self.moments(), parts, strict=True):
            partition.grad.copy_(part)

    def clear(self) -> None:
        for partition in self.moments():
            partition.grad.zero_()
        self.zero.reset_cpu_buffers()  # norms and overflow flags of gradients that are not DeepSpeed's any more
        self.zero.zero_grad()

    def _arrived(self) -> None:
        """Wait until what the device sends is in host memory."""


class PartitionedOnHost(OnHost, Partitioned):
    """Stages 1 and 2 with `offload_optimizer`."""

    def clear(self) -> None:
        super().clear()
        zero = self.zero
        # the next backward is the first of a step, not one that adds to what was taken out
        zero.micro_step_id, zero.accumulated_grads_in_cpu = -1, {}
        zero._offload_accumulated_param_ids = set()

    def _arrived(self) -> None:
        self.zero._wait_for_offload_copies()


class FullyPartitionedOnHost(OnHost, FullyPartitioned):
    """Stage 3 with `offload_optimizer`. DeepSpeed waits for the copies itself at the end of a backward."""


_LAYOUTS = {0: Replicated, 1: Partitioned, 2: Partitioned, 3: FullyPartitioned}
_LAYOUTS_ON_HOST = {1: PartitionedOnHost, 2: PartitionedOnHost, 3: FullyPartitionedOnHost}


def layout(engine: Any, trainable: dict[str, nn.Parameter], *, stage: int, on_host: bool) -> Replicated | Partitioned:
    """Where `engine` keeps its shards under this stage; `on_host` with the optimiser offloaded."""
    return (_LAYOUTS_ON_HOST if on_host else _LAYOUTS)[stage](engine, trainable)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters are on the meta device: its shape, buffers and ties, without its weights."""
    import copy

    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def gather_into(copy: nn.Module, model: nn.Module, device: torch.device, gather: Any) -> None:
    """Fill `copy` (a `skeleton` of `model` taken before sharding) with the gathered parameters of a ZeRO-3 `model`. Collective.

    One parameter is gathered at a time, so that the peak is the copy plus the largest parameter. Ties are kept: a parameter met
    under several names is filled once. `gather([parameter])` is the context in which a parameter is whole.
    """
    sources = dict(model.named_parameters())
    for name, target in list(copy.named_parameters()):
        source = sources[name]
        with gather([source]), torch.no_grad():
            whole = source.detach().to(device, copy=True)
        if whole.shape != target.shape:
            raise RuntimeError(f"ZeRO-3 gathered {name} as {tuple(whole.shape)}, expected {tuple(target.shape)}")
        _replace(copy, target, nn.Parameter(whole, requires_grad=target.requires_grad))


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is old:
                module._parameters[key] = new
