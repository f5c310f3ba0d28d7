"""What every engine shares about the optimiser: its settings, the rate's schedule, AdamW's groups, float32 weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Settings:
    """The fields of `training` that an engine reads; any object with these attributes will do."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.05
    bf16: bool = False


def lr_at(step: int, *, max_steps: int, learning_rate: float, kind: str = "linear", warmup_ratio: float = 0.0) -> float:
    """Learning rate of optimiser step `step` (0-based) of `max_steps`.

    The first w = ceil(warmup_ratio * max_steps) steps rise as (step + 1) / w, so that no step is lost at rate 0. From step w on:
    `constant` the peak; `linear` (max_steps - step) / (max_steps - w); `cosine` half a cosine over the same steps. Steps past the end
    have the last step's rate under `constant` and 0 under the others. Raises ValueError for another `kind`.
    """
    warmup = math.ceil(warmup_ratio * max_steps)
    if step < warmup:
        return learning_rate * ((step + 1) / warmup)
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    if kind == "constant":
        return learning_rate
    if kind == "linear":
        return learning_rate * (1.0 - done)
    if kind == "cosine":
        return learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"lr_scheduler_type {kind!r} is not one of constant, linear, cosine")


def parameter_groups(trainable: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors (norms, biases) do not. One group where there is no decay."""
    if not weight_decay:
        return [{"params": list(trainable.values()), "weight_decay": 0.0}]
    split = [(weight_decay, [p for p in trainable.values() if p.ndim > 1]), (0.0, [p for p in trainable.values() if p.ndim <= 1])]
    return [{"params": params, "weight_decay": decay} for decay, params in split if params]


def master_weights(trainable: dict[str, nn.Parameter], *, bf16: bool) -> dict[str, torch.dtype]:
    """Bring what is trained to float32; returns the type each changed parameter had. Raises ValueError without `bf16`.

    A float32 weight cannot meet a bfloat16 one outside autocast, so a model loaded in half precision needs `training.bf16`.
    """
    changed = {name: p.dtype for name, p in trainable.items() if p.dtype != torch.float32}
    if changed and not bf16:
        kind = str(next(iter(changed.values()))).removeprefix("torch.")
        raise ValueError(f"the model is loaded in {kind}, but training.bf16 is off; set training.bf16=true or model.dtype=float32")
    for name in changed:
        trainable[name].data = trainable[name].data.float()
    return changed
