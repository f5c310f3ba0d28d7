"""Weight updates: what fine-tuning changed in each weight matrix, read, measured and replaced one module at a time.

An update is `trained - aligned` of one weight, held as it is: low rank (B A of an adapter) or dense. Everything is matched by
parameter NAME, never by order. Peak memory of `edit` is that of the model plus a few matrices, not of a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strategies import blocks, merging
from strategies.base import StrategyError, Tensors
from strategies.blocks import original_name

TINY = 1e-9
"""Norms below this have no direction."""


@dataclass(frozen=True)
class Update:
    """The update of one weight, in the orientation (d_out, d_in) for matrices whatever the module stores; float32."""

    name: str
    """The parameter's name in the untouched model, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    full: Tensor | None = None
    """(d_out, d_in), or any shape for what is no matrix; None for a low-rank update."""
    left: Tensor | None = None
    """(d_out, r), the adapter's scale included."""
    right: Tensor | None = None
    """(r, d_in)."""
    transposed: bool = False
    """Whether the module stores the weight as (d_in, d_out) (GPT-2's Conv1D)."""

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
        return Update(self.name, transposed=self.transposed, **parts)

    def times(self, scale: float) -> Update:
        """The update multiplied by a number; a low-rank one stays so."""
        return self.replaced(left=scale * self.left) if self.low_rank else self.replaced(full=scale * self.full)

    def replaced(self, full: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None) -> Update:
        """The same place with another update: `full`, or `left` and `right` (one of them kept where it is None)."""
        if full is not None:
            return Update(self.name, full=full, transposed=self.transposed)
        left, right = self.left if left is None else left, self.right if right is None else right
        return Update(self.name, left=left, right=right, transposed=self.transposed)


def added(a: Update, b: Update, a_scale: float = 1.0, b_scale: float = 1.0) -> Update:
    """a_scale * a + b_scale * b, exact: two low-rank updates become one of rank r_a + r_b, anything else dense."""
    if a.low_rank and b.low_rank:
        return a.replaced(left=torch.cat([a_scale * a.left, b_scale * b.left], dim=1), right=torch.cat([a.right, b.right]))
    return a.replaced(full=a_scale * a.dense() + b_scale * b.dense())


def norm(update: Update) -> float:
    """Frobenius norm, float64; a low-rank update is not multiplied out."""
    if not update.low_rank:
        return float(update.full.double().norm())
    left, right = update.left.double(), update.right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of equal shape taken as vectors, float64; 0.0 where one of them is (near) zero."""
    a, b = a.double().reshape(-1), b.double().reshape(-1)
    scale = float(a.norm()) * float(b.norm())
    return float(a @ b) / scale if scale > TINY**2 else 0.0


def inner(a: Update, b: Update) -> float:
    """Inner product of two updates of equal shape, float64; two low-rank ones are not multiplied out."""
    if a.low_rank and b.low_rank:
        return float(((a.left.double().T @ b.left.double()) * (a.right.double() @ b.right.double().T)).sum())
    return float((a.dense().double() * b.dense().double()).sum())


def similarity(a: Update, b: Update) -> float:
    """Cosine of two updates taken as vectors; 0.0 where one of them is (near) zero."""
    scale = norm(a) * norm(b)
    return inner(a, b) / scale if scale > TINY**2 else 0.0


def alignment(update: Update, aligned: Tensors, unaligned: Tensors) -> Tensor | None:
    """What alignment did to the weight of `update`: aligned - unaligned, (d_out, d_in) float32; None where that is (near) zero."""
    stored = update.shape[::-1] if update.transposed else update.shape
    before, after = (update.oriented(pick(w, update.name, stored, role)) for w, role in ((unaligned, "unaligned"), (aligned, "aligned")))
    direction = after - before
    return direction if float(direction.norm()) > TINY else None


def onto(direction: Tensor, delta: Tensor) -> Tensor:
    """C delta with C = V V^T / ||V||_F of V = `direction` (d_out, d_in); delta (d_out, n). C itself is formed only where that is cheapest.

    C is no projector: applying it twice is not applying it once, and it rescales. Raises ValueError for a direction of norm (near) zero.
    """
    length = float(direction.norm())
    if length <= TINY:
        raise ValueError("the direction is zero, nothing can be projected onto it")
    return torch.linalg.multi_dot([direction, direction.T, delta]) / length


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left (d_out, k), right (k, d_in)), float32, whose product is the best approximation of `matrix` of rank k = min(rank, d_out, d_in)."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def projected(update: Update, direction: Tensor) -> Update:
    """The update with its output side taken `onto` the direction; a low-rank one keeps its rank and its right factor."""
    return update.replaced(left=onto(direction, update.left)) if update.low_rank else update.replaced(full=onto(direction, update.full))


def pick(weights: Tensors, name: str, shape: tuple[int, ...] | None = None, role: str = "aligned") -> Tensor:
    """`weights[name]`. Raises StrategyError where the model lacks it or has it in another shape."""
    if name not in weights:
        raise StrategyError(f"the {role} model has no parameter {name}; it must be the same architecture as the trained one")
    found = weights[name]
    if shape is not None and tuple(found.shape) != tuple(shape):
        raise StrategyError(f"{name} is {tuple(found.shape)} in the {role} model and {tuple(shape)} in the trained one; they do not belong together")
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer (transformers' Conv1D is one with its weight transposed)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside decoder blocks by module name, of a model without adapters."""
    inside = blocks.of(model)
    return {n: m for n, m in model.named_modules() if is_linear(m) and inside.holds(n)}


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA modules by the name of the weight they adapt; empty for a model without adapters. Raises StrategyError for several adapters."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer") and len(module.lora_A):
            if list(module.lora_A) != ["default"]:
                raise StrategyError(f"{name} carries the adapters {list(module.lora_A)}; merge them into one named `default` first")
            if getattr(module, "lora_variant", {}).get("default"):
                raise StrategyError(f"{name} carries a variant of LoRA (such as DoRA) whose update is no low-rank matrix; merge it first")
            found[f"{original_name(name)}.weight"] = module
    return found


def updates(model: nn.Module, aligned: Tensors, only: Callable[[str], bool] | None = None) -> Iterator[Update]:
    """The updates of a trained model against the aligned weights, one at a time: of its adapters where it has any, else of every
    parameter whose name `only` accepts (without it those of the decoder blocks). Weights that did not move are left out. Raises StrategyError
    where names or shapes differ.
    """
    only = only or blocks.of(model).holds
    with torch.no_grad():
        wrapped = adapters(model)
        for name, module in wrapped.items():
            left = module.lora_B["default"].weight.float() * module.scaling["default"]
            if only(name) and left.count_nonzero():
                yield Update(name, left=left, right=module.lora_A["default"].weight.float(), transposed=not _plain(module.base_layer))
        if wrapped:
            return
        kinds = {f"{n}.weight": m for n, m in model.named_modules() if is_linear(m)}
        for name, parameter in model.named_parameters():
            if not only(name) or not parameter.is_floating_point():
                continue
            before = pick(aligned, name, tuple(parameter.shape)).to(parameter.device, torch.float32)
            change = parameter.float() - before
            if change.count_nonzero():
                transposed = name in kinds and not _plain(kinds[name])
                yield Update(name, full=change.T if transposed else change, transposed=transposed)


def edit(model: nn.Module, aligned: Tensors, change: Callable[[Update], Update | None], only: Callable[[str], bool] | None = None) -> nn.Module:
    """Replace the update of each weight by `change(update)`; None keeps it, bit for bit. Returns the model.

    An adapter stays an adapter as long as every new update is low rank (of any rank); one dense update makes it a whole model, since no
    adapter could hold it. The merge is held against the unmerged model's logits (`merging`); raises StrategyError where they differ.
    """
    wrapped, widened = adapters(model), False
    with torch.no_grad():
        for update in updates(model, aligned, only):
            new = change(update)
            if new is None:
                continue
            if not wrapped:
                _write_weight(model, aligned, new)
            elif new.low_rank:
                _write_adapter(model, wrapped[new.name], new)
            else:
                module = wrapped[new.name]
                weight = module.base_layer.weight
                weight.add_((new.full.T if new.transposed else new.full).to(weight.dtype))
                module.lora_B["default"].weight.zero_()
                widened = True
    return merging.merged(model, "the edited adapter") if widened else model


def add_to_weights(model: nn.Module, name: str, delta: Tensor, transposed: bool = False) -> None:
    """Add (d_out, d_in) `delta` to the stored weight `name`, in the weight's own type."""
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.copy_((weight.float() + (delta.T if transposed else delta).to(weight.device)).to(weight.dtype))


def _write_weight(model: nn.Module, aligned: Tensors, new: Update) -> None:
    parameter, full = model.get_parameter(new.name), new.dense()
    before = pick(aligned, new.name).to(parameter.device, torch.float32)
    parameter.copy_((before + (full.T if new.transposed else full)).to(parameter.dtype))


def _write_adapter(model: nn.Module, module: nn.Module, new: Update) -> None:
    """Put low-rank factors of any rank into a LoRA module, its scale 1 where the rank changes."""
    a, b = module.lora_A["default"], module.lora_B["default"]
    rank = new.left.shape[1]
    if rank == a.weight.shape[0]:
        b.weight.copy_(new.left / module.scaling["default"])
        a.weight.copy_(new.right)
        return
    for part, weight in ((a, new.right), (b, new.left)):
        part.weight = nn.Parameter(weight.to(part.weight), requires_grad=part.weight.requires_grad)
        part.out_features, part.in_features = weight.shape
    config = model.peft_config["default"]
    alpha = rank**0.5 if config.use_rslora else rank  # rank-stabilised adapters divide by the root of their rank
    module.r["default"], module.lora_alpha["default"], module.scaling["default"] = rank, alpha, 1.0
    # what save_pretrained writes and from_pretrained reads the rank and scale of a single module from
    key = new.name.removesuffix(".weight")
    config.rank_pattern, config.alpha_pattern = {**config.rank_pattern, key: rank}, {**config.alpha_pattern, key: alpha}


def _plain(module: nn.Module) -> bool:
    return type(module).__name__ != "Conv1D"
