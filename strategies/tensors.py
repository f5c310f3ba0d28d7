"""What the pure functions of the methods demand of the tensors they are given: one shape, and no NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_alike(what: str, **tensors: Tensor) -> None:
    """Raises ValueError, naming the argument, where the tensors are not of one shape or hold what is not finite; `what` is who asks."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{what}: tensors of one weight must have one shape, got {told}; compare models of one architecture")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{what}: {name} holds NaN or infinity; the model or training it is from is broken")


def check_mappings(what: str, **groups: Mapping[str, Tensor]) -> None:
    """The same for {name: tensor} mappings: alike wherever several of them have a name, and finite everywhere."""
    for name in {name: None for group in groups.values() for name in group}:
        check_alike(f"{what}, {name}", **{own: group[name] for own, group in groups.items() if name in group})
