"""The low-rank updates that a model's LoRA adapters hold, one per weight matrix, read and replaced: of linear layers, and of the parameters that
peft adapts directly (`target_parameters`), such as the experts of a mixture, all in one tensor.

peft keeps for a batch of n matrices, all of one rank r, `lora_A` (n r, in) and `lora_B` (out, r n); a matrix as it is stored changes by
B_i A_i, or by its transpose where the module says `is_transposed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strategies import matrices
from strategies.base import StrategyError
from strategies.blocks import original_name
from strategies.matrices import Stored


@dataclass(frozen=True)
class Adapted:
    """The adapter of one matrix."""

    parameter: str
    """Name of the adapted parameter in the bare model."""
    module: nn.Module
    """peft's wrapper; the matrices of one batch share it."""
    index: int | None
    """Which matrix of a batch."""
    stored: Stored

    @property
    def direct(self) -> bool:
        """Whether peft adapts the parameter itself, not a linear layer's output."""
        return hasattr(self.module, "parameter_name")

    @property
    def weight(self) -> Tensor:
        """The matrix underneath, as stored; a view of the parameter."""
        if not self.direct:
            return self.module.base_layer.weight
        whole = getattr(self.module.get_base_layer(), self.module.parameter_name)
        return whole if self.index is None else whole[self.index]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left (d_out, r), right (r, d_in)), float32, the adapter's scale included."""
        b, a = self._parts()
        return self._turned(b.float() * self.module.scaling["default"], a.float())

    def clear(self) -> None:
        """Set the update to zero."""
        b, _ = self._parts()
        b.zero_()

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Views of peft's (B (out, r), A (r, in)) of this matrix."""
        a, b = self.module.lora_A["default"].weight, self.module.lora_B["default"].weight
        if not self.direct:
            return b, a
        count, number = self.module.num_experts, self.index or 0
        return b.view(b.shape[0], -1, count)[:, :, number], a.view(count, -1, a.shape[-1])[number]

    def _turned(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """From peft's order of factors to (left, right) of the matrix as (d_out, d_in), and back: the same exchange, or none."""
        if not self.direct or self._as_peft_has_it:
            return b, a
        return a.T, b.T

    @property
    def _as_peft_has_it(self) -> bool:
        """peft takes a batch for transposed where its module says so, and one matrix never."""
        taken = bool(getattr(self.module.get_base_layer(), "is_transposed", False)) and self.index is not None
        return taken == self.stored.transposed


def adapters(model: nn.Module) -> dict[str, Adapted]:
    """The adapted matrices by name; empty for a model without adapters. Raises StrategyError for several adapters, and for variants of LoRA."""
    wrapped = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}
    wrapped = {name: module for name, module in wrapped.items() if len(module.lora_A)}
    if not wrapped:
        return {}
    known, found = matrices.stored(model), {}
    for name, module in wrapped.items():
        if list(module.lora_A) != ["default"]:
            raise StrategyError(f"{name} carries the adapters {list(module.lora_A)}; merge them into one named `default` first")
        if getattr(module, "lora_variant", {}).get("default"):
            raise StrategyError(f"{name} carries a variant of LoRA (such as DoRA) whose update is no low-rank matrix; merge it first")
        parameter = f"{original_name(name)}.{getattr(module, 'parameter_name', 'weight')}"
        how = known.get(parameter, Stored(transposed=type(module.get_base_layer()).__name__ == "Conv1D"))
        count = getattr(module, "num_experts", 1) if hasattr(module, "parameter_name") else 1
        for index in range(count) if how.count or count > 1 else [None]:
            found[matrices.named(parameter, index)] = Adapted(parameter, module, index, how)
    return found


def write(model: nn.Module, changes: Mapping[str, tuple[Adapted, Tensor, Tensor]]) -> None:
    """Put factors (left (d_out, k), right (k, d_in)) of any rank into the adapters of one of peft's modules; its other matrices keep their update.

    The scale is 1 where the rank changes. Raises ValueError for adapters of several modules.
    """
    several = {id(one.module): one for one, _, _ in changes.values()}
    if len(several) > 1:
        raise ValueError("adapters of one module at a time")
    (one,) = several.values()
    module, old = one.module, one.module.r["default"]
    turned = {chosen.index or 0: chosen._turned(left, right) for chosen, left, right in changes.values()}
    rank = max((b.shape[1] for b, _ in turned.values()), default=old)
    if one.direct and module.num_experts > len(turned):
        rank = max(rank, old)  # the others keep theirs
    if rank == old:
        scale = module.scaling["default"]
        for chosen, left, right in changes.values():
            (to_b, to_a), (b, a) = chosen._parts(), chosen._turned(left, right)
            b, a = b / scale, a.clone()  # they may be views of what is written
            to_b.zero_()  # a factor of smaller rank leaves the rest without effect
            to_a.zero_()
            to_b[:, : b.shape[1]].copy_(b)
            to_a[: a.shape[0]].copy_(a)
        return
    _widen(one, rank, turned)
    _note_rank(model, one, rank)


def _widen(one: Adapted, rank: int, turned: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Give the module adapters of `rank`: those in `turned`, (B (out, k), A (k, in)) by index, and the others as they are, padded with zeros."""
    module, count = one.module, one.module.num_experts if one.direct else 1
    a, b = module.lora_A["default"], module.lora_B["default"]
    new_a = torch.zeros(count, rank, a.weight.shape[-1], device=a.weight.device)
    new_b = torch.zeros(b.weight.shape[0], rank, count, device=b.weight.device)
    for index in range(count):
        other = Adapted(one.parameter, module, index, one.stored)
        part_b, part_a = turned[index] if index in turned else other._turned(*other.factors())
        new_b[:, : part_b.shape[1], index], new_a[index, : part_a.shape[0]] = part_b, part_a
    for part, weight in ((a, new_a.flatten(0, 1)), (b, new_b.flatten(1))):
        part.weight = nn.Parameter(weight.to(part.weight), requires_grad=part.weight.requires_grad)
        part.out_features, part.in_features = weight.shape


def _note_rank(model: nn.Module, one: Adapted, rank: int) -> None:
    """Say the rank and the scale where peft, saving and loading look for them."""
    module, config = one.module, model.peft_config["default"]
    alpha = rank**0.5 if config.use_rslora else rank  # rank-stabilised adapters divide by the root of their rank
    module.r["default"], module.lora_alpha["default"], module.scaling["default"] = rank, alpha, 1.0
    key = one.parameter if one.direct else one.parameter.removesuffix(".weight")
    config.rank_pattern, config.alpha_pattern = {**config.rank_pattern, key: rank}, {**config.alpha_pattern, key: alpha}
