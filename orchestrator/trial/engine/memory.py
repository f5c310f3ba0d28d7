"""Memory that one worker needs to train a model, by ZeRO stage and offload, before a weight is loaded. Arithmetic on parameter counts.

What is counted: weights, gradients, Adam's moments, buffers. What comes on top: activations (they depend on batch and length; see
`training.gradient_checkpointing`), CUDA's own context (about 0.5 GiB) and fragmentation. `tests/contract/test_engine_lifetime.py` holds the
sums to what DeepSpeed allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.config import deepspeed
from orchestrator.config.deepspeed import BUCKET

if TYPE_CHECKING:
    from orchestrator.config import Experiment

GIB = 2**30
MASTER = 4
"""Bytes of a trained weight, of its gradient and of each of Adam's two moments: float32, whatever the model is loaded in."""


@dataclass(frozen=True)
class Parameters:
    """How many weights a recipe trains and leaves, and what the frozen ones take."""

    trained: int
    frozen: int
    bytes_each: int
    """Bytes of a weight as the model is loaded."""
    largest: int
    """Elements of the largest trained tensor."""
    held: int = 0
    """Further gradients that a method holds at once while it combines them."""


@dataclass
class Need:
    """Bytes of one worker by part, on its device and in its host memory."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    whole: int = 0
    """Bytes of the whole model with trained weights in float32, which is on the device before it is sharded."""

    @property
    def peak(self) -> int:
        """Bytes on the device: while training, or with the model still whole."""
        return max(sum(self.device.values()), self.whole)

    def sentence(self, *, gpu: bool) -> str:
        """One line: totals, parts, and what is not counted."""
        host = sum(self.host.values())
        if not gpu:
            return f"{gib(self.peak + host)} a worker ({parts(_joined(self.device, self.host))}), activations on top"
        text = f"{gib(self.peak)} of a GPU ({parts(self.device)}"
        if self.whole > sum(self.device.values()):
            text += f"; {gib(self.whole)} with the model still whole"
        return f"{text}) and {gib(host)} of host memory ({parts(self.host)}) a worker, activations on top"


def need(
    parameters: Parameters, *, stage: int, workers: int = 1, offload_optimizer: bool = False, offload_param: bool = False,
    bucket: int = BUCKET, two_buckets: bool = False,
) -> Need:  # fmt: skip
    """Bytes of one of `workers` workers under a ZeRO stage; on CPU workers device and host are the same memory.

    `bucket`: elements DeepSpeed reduces at once (no more than are trained), twice where it reduces while it computes. Every worker
    keeps the untouched model in host memory for the next trial.
    """
    trained, shard = MASTER * parameters.trained, MASTER * -(-parameters.trained // workers)
    frozen, untouched = parameters.bytes_each * parameters.frozen, parameters.bytes_each * (parameters.trained + parameters.frozen)
    reduced = MASTER * min(bucket, max(parameters.trained, 1)) * (2 if two_buckets else 1)
    found = Need(whole=trained + frozen, host={"untouched model": untouched})
    place = found.host if offload_optimizer else found.device
    if stage == 0:
        found.device |= {"weights": trained + frozen, "gradients": trained * (1 + parameters.held), "moments": 2 * trained}
        found.device["buffers"] = reduced if workers > 1 else 0
        return found
    if stage < 3:
        found.device["weights"] = trained + frozen
        place["float32 shards"] = shard * (2 if offload_optimizer else 1)  # on the host also what is sent back
    else:
        home = found.host if offload_param else found.device
        home["weights"] = shard + -(-frozen // workers)
        place["float32 shards"] = shard
    # what DeepSpeed fills and what is taken out; stage 3 fills two on the host; before it reduces, stage 1 has the whole gradient
    copies = parameters.held + (3 if stage == 3 and offload_optimizer else 2)
    place["gradients"] = shard * copies + (trained if stage == 1 and not offload_optimizer else 0)
    place["moments"] = 2 * shard
    found.device["buffers"] = reduced
    if offload_optimizer:
        found.device["buffers"] += MASTER * parameters.largest + (trained if stage == 1 else 0)
    return found


def of_experiment(experiment: Experiment, recipe: Sequence[tuple[str, dict[str, Any]]], network: Any) -> Need:
    """What one worker of `experiment` needs to train `recipe` on a model of the shape `network` (see `identity.shape`)."""
    settings = experiment.deepspeed if experiment.training.engine == "deepspeed" else {}
    zero, stage = settings.get("zero_optimization") or {}, deepspeed.stage_of(settings)
    bucket = zero.get("reduce_bucket_size", BUCKET)
    return need(
        count(network, recipe), stage=stage, workers=experiment.ray.num_workers,
        offload_optimizer=deepspeed.offloaded(settings, "offload_optimizer"),
        offload_param=deepspeed.offloaded(settings, "offload_param"),
        bucket=int(float(bucket)) if bucket != "auto" else BUCKET, two_buckets=bool(zero.get("overlap_comm", False)) and stage < 3,
    )  # fmt: skip


def count(network: Any, recipe: Sequence[tuple[str, dict[str, Any]]]) -> Parameters:
    """Parameters of a model on the meta device once the recipe's adapters are in place, with pinned knobs or defaults. Ties count once.

    Freezing is left out, since its range is searched or located: with `freeze_layers` the counts are an upper bound. `network` is changed.
    """
    import torch

    import strategies
    from strategies.recipe import build

    adapters = [(name, knobs) for name, knobs in recipe if name == "lora"]
    bytes_each = next(network.parameters()).element_size()
    with torch.device("meta"):
        network = build(adapters).setup(network) if adapters else network
    trained = [p.numel() for p in network.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    held = 2 if any(strategies.get(name).owns_step() for name, _ in recipe) else 0
    return Parameters(sum(trained), frozen, bytes_each, max(trained, default=0), held)


def gib(amount: int) -> str:
    """Bytes in words: MiB below one GiB."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / 2**20:.0f} MiB"


def parts(found: dict[str, int]) -> str:
    """`weights 2.0 GiB, gradients ...`, empty parts left out."""
    return ", ".join(f"{name} {gib(amount)}" for name, amount in found.items() if amount)


def _joined(device: dict[str, int], host: dict[str, int]) -> dict[str, int]:
    return {name: device.get(name, 0) + host.get(name, 0) for name in {**device, **host}}
