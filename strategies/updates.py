"""The update of one weight matrix, whole or as two low-rank factors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """The update of one weight, in the orientation (d_out, d_in) for matrices whatever the module stores; float32."""

    name: str
    """The parameter's name in the untouched model, e.g. `model.layers.0.self_attn.q_proj.weight`, with `[i]` for matrix i of a batch."""
    full: Tensor | None = None
    """(d_out, d_in), or any shape for what is no matrix; None for a low-rank update."""
    left: Tensor | None = None
    """(d_out, r), the adapter's scale included."""
    right: Tensor | None = None
    """(r, d_in)."""
    transposed: bool = False
    """Whether the module stores the weight as (d_in, d_out) (GPT-2's Conv1D)."""
    matrix: bool = True
    """False for a tensor that maps no vectors (convolutions, norms, biases), whatever its shape: nothing to project or decompose."""

    @property
    def is_matrix(self) -> bool:
        """Whether there is anything to project or decompose."""
        return self.matrix and len(self.shape) == 2

    @property
    def low_rank(self) -> bool:
        return self.full is None

    def dense(self) -> Tensor:
        """The whole matrix, (d_out, d_in)."""
        return self.full if self.full is not None else self.left @ self.right

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight of the untouched or unaligned model in this update's orientation, float32, on its device."""
        weight = weight.to(self.device, torch.float32)
        return weight.T if self.transposed else weight

    @property
    def device(self) -> torch.device:
        return (self.full if self.full is not None else self.left).device

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.full.shape) if self.full is not None else (self.left.shape[0], self.right.shape[1])

    def on(self, device: torch.device | str) -> Update:
        """The same update with its tensors on `device`."""
        parts = {part: None if (tensor := getattr(self, part)) is None else tensor.to(device) for part in ("full", "left", "right")}
        return dataclasses.replace(self, **parts)

    def times(self, scale: float) -> Update:
        """The update multiplied by a number; a low-rank one stays so."""
        return self.replaced(left=scale * self.left) if self.low_rank else self.replaced(full=scale * self.full)

    def replaced(self, full: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None) -> Update:
        """The same place with another update: `full`, or `left` and `right` (one of them kept where it is None)."""
        if full is not None:
            return dataclasses.replace(self, full=full, left=None, right=None)
        left, right = self.left if left is None else left, self.right if right is None else right
        return dataclasses.replace(self, full=None, left=left, right=right)
