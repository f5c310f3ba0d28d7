"""Weight updates: what fine-tuning changed in each weight matrix, read, measured and replaced one module at a time.

An update is `trained - aligned` of one weight, held as it is: low rank (B A of an adapter) or dense. The matrices of a batch (experts) are
updates of their own, named by index (`strategies.matrices`). Everything is matched by parameter NAME, never by order. Peak memory of `edit`
is that of the model plus a few matrices, not of a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from strategies import adapted, blocks, matrices, merging
from strategies.adapted import Adapted, adapters
from strategies.base import StrategyError, Tensors
from strategies.matrices import is_linear
from strategies.updates import Update

TINY = 1e-9
"""Norms below this have no direction."""




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
    """(left (..., d_out, k), right (..., k, d_in)), float32, whose product is the best approximation of `matrix` (..., d_out, d_in) of rank
    k = min(rank, d_out, d_in)."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :]


def projected(update: Update, direction: Tensor) -> Update:
    """The update with its output side taken `onto` the direction; a low-rank one keeps its rank and its right factor."""
    return update.replaced(left=onto(direction, update.left)) if update.low_rank else update.replaced(full=onto(direction, update.full))


def pick(weights: Tensors, name: str, shape: tuple[int, ...] | None = None, role: str = "aligned") -> Tensor:
    """`weights[name]`, or the matrix of a batch that `name` means. Raises StrategyError where the model lacks it or has it in another shape."""
    whole, index = matrices.split(name)
    if whole not in weights:
        raise StrategyError(f"the {role} model has no parameter {whole}; it must be the same architecture as the trained one")
    found = weights[whole]
    if index is not None:
        if found.ndim != 3 or index >= len(found):
            raise StrategyError(f"{whole} is {tuple(found.shape)} in the {role} model, so it has no matrix {index}; they do not belong together")
        found = found[index]
    if shape is not None and tuple(found.shape) != tuple(shape):
        raise StrategyError(f"{name} is {tuple(found.shape)} in the {role} model and {tuple(shape)} in the trained one; they do not belong together")
    return found


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside decoder blocks by module name, of a model without adapters."""
    inside = blocks.of(model)
    return {n: m for n, m in model.named_modules() if inside.holds(n) and is_linear(m)}


def updates(model: nn.Module, aligned: Tensors, only: Callable[[str], bool] | None = None) -> Iterator[Update]:
    """The updates of a trained model against the aligned weights, one at a time: of its adapters where it has any, else of every
    parameter whose name `only` accepts (without it those of the decoder blocks). Weights that did not move are left out. Raises StrategyError
    where names or shapes differ.
    """
    only = only or blocks.of(model).holds
    with torch.no_grad():
        wrapped = adapters(model)
        for name, one in wrapped.items():
            left, right = one.factors()
            if only(name) and left.count_nonzero() and right.count_nonzero():
                yield Update(name, left=left, right=right, transposed=one.stored.transposed)
        if wrapped:
            return
        known = matrices.stored(model)
        for name, parameter in model.named_parameters():
            if only(name) and parameter.is_floating_point():
                before = pick(aligned, name, tuple(parameter.shape))
                yield from _of_parameter(name, parameter, before, known.get(name))


def _of_parameter(name: str, parameter: Tensor, before: Tensor, how: matrices.Stored | None) -> Iterator[Update]:
    if how is None or how.count is None:
        change = parameter.float() - before.to(parameter.device, torch.float32)
        if change.count_nonzero():
            yield Update(name, full=change.T if how and how.transposed else change, transposed=bool(how and how.transposed), matrix=how is not None)
        return
    for index in range(how.count):
        change = parameter[index].float() - before[index].to(parameter.device, torch.float32)
        if change.count_nonzero():
            yield Update(matrices.named(name, index), full=change.T if how.transposed else change, transposed=how.transposed)


def edit(model: nn.Module, aligned: Tensors, change: Callable[[Update], Update | None], only: Callable[[str], bool] | None = None) -> nn.Module:
    """Replace the update of each weight by `change(update)`; None keeps it, bit for bit. Returns the model.

    An adapter stays an adapter as long as every new update is low rank (of any rank); one dense update makes it a whole model, since no
    adapter could hold it. The merge is held against the unmerged model's logits (`merging`); raises StrategyError where they differ.
    """
    wrapped, widened = adapters(model), False
    pending: dict[str, tuple[Adapted, Tensor, Tensor]] = {}
    with torch.no_grad():
        for update in updates(model, aligned, only):
            if pending and wrapped[update.name].module is not next(iter(pending.values()))[0].module:
                adapted.write(model, pending)
                pending = {}
            new = change(update)
            if new is None:
                continue
            if not wrapped:
                _write_weight(model, aligned, new)
            elif new.low_rank:
                pending[new.name] = (wrapped[new.name], new.left, new.right)
            else:
                one = wrapped[new.name]
                one.weight.add_((new.full.T if new.transposed else new.full).to(one.weight.dtype))
                one.clear()
                widened = True
        if pending:
            adapted.write(model, pending)
    return merging.merged(model, "the edited adapter") if widened else model


def _write_weight(model: nn.Module, aligned: Tensors, new: Update) -> None:
    name, index = matrices.split(new.name)
    parameter, full = model.get_parameter(name), new.dense()
    stored = parameter if index is None else parameter[index]
    before = pick(aligned, new.name).to(parameter.device, torch.float32)
    stored.copy_((before + (full.T if new.transposed else full)).to(parameter.dtype))
