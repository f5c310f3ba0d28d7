"""Pure helpers on gradients held as {parameter name: tensor}: inner product, norm, linear combination.

Sums run in float64 over pieces of at most 2^24 elements (fewer on a CPU), so that neither float32 round-off nor the 2^31-element limit of `torch.dot`
decides whether two gradients conflict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor]

PIECE = 1 << 24
CACHED = 1 << 16
"""Elements of a piece on a CPU: its float64 copy stays in the core's cache."""


def tensors_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product of two lists of tensors of equal shapes on one device, one number over all of them, summed in float64; 0.0 for empty
    lists. The device is asked for the sum once. Raises ValueError on unequal shapes."""
    products = [torch.dot(x, y) for x, y in _pieces(a, b)]
    return float(torch.stack(products).sum()) if products else 0.0


def tensors_gram(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float, float]:
    """(<a, a>, <a, b>, <b, b>) as `tensors_dot` gives them, in one pass: each tensor is read and converted once, not three times."""
    products = [torch.stack([torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)]) for x, y in _pieces(a, b)]
    return tuple(torch.stack(products).sum(dim=0).tolist()) if products else (0.0, 0.0, 0.0)


def _pieces(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat float64 pieces of at most PIECE elements of both lists, side by side; one tensor where the two lists hold the same."""
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"inner product of tensors of shape {tuple(x.shape)} and {tuple(y.shape)}; shapes must be equal")
        same, x, y = x is y, x.detach().reshape(-1), y.detach().reshape(-1)
        size = min(PIECE, CACHED) if x.device.type == "cpu" else PIECE
        for left, right in zip(x.split(size), y.split(size), strict=True):
            left = left.double()
            yield left, left if same else right.double()


def dot(a: Gradients, b: Gradients) -> float:
    """Inner product over all parameters. Raises ValueError where the two do not hold the same names."""
    names = list(_names(a, b))
    return tensors_dot([a[name] for name in names], [b[name] for name in names])


def gram(a: Gradients, b: Gradients) -> tuple[float, float, float]:
    """(<a, a>, <a, b>, <b, b>) over all parameters. Raises ValueError where the two do not hold the same names."""
    names = list(_names(a, b))
    return tensors_gram([a[name] for name in names], [b[name] for name in names])


def norm(a: Gradients) -> float:
    """Euclidean norm over all parameters; 0.0 where there are none."""
    values = list(a.values())
    return math.sqrt(tensors_dot(values, values))


def axpy(alpha: float, x: Gradients, y: Gradients) -> dict[str, Tensor]:
    """alpha * x + y, a new dict. `alpha` 0 gives a copy of y bit for bit."""
    return {name: y[name].clone() if alpha == 0 else torch.add(y[name], x[name], alpha=alpha) for name in _names(x, y)}


def linear(terms: Sequence[tuple[float, Gradients]]) -> dict[str, Tensor]:
    """Sum of coefficient * gradients. A single term with coefficient 1 is a copy of it bit for bit. Raises ValueError without terms."""
    if not terms:
        raise ValueError("linear combination of no gradients; give at least one (coefficient, gradients)")
    names = list(_names(*(g for _, g in terms)))
    return dict(zip(names, linear_tensors([(c, [g[name] for name in names]) for c, g in terms]), strict=True))


def linear_tensors(terms: Sequence[tuple[float, Sequence[Tensor]]]) -> list[Tensor]:
    """Sum of coefficient * tensors, new tensors: element i of the result is that of the lists' elements i, equal in shape.

    Terms with coefficient 0 are left out, so that they change no bit (not even -0.0). Raises ValueError without terms and where lists
    differ in length.
    """
    if not terms:
        raise ValueError("linear combination of no vectors; give at least one (coefficient, vector)")
    if len({len(tensors) for _, tensors in terms}) > 1:
        raise ValueError(f"linear combination of lists of {', '.join(str(len(t)) for _, t in terms)} tensors; lengths must be equal")
    used = [(c, list(tensors)) for c, tensors in terms if c != 0]
    if not used or not used[0][1]:
        return [torch.zeros_like(t) for t in terms[0][1]]
    (c, first), rest = used[0], used[1:]
    if c == 1 and rest:  # the usual case in one pass instead of a copy and a sum
        (c, second), rest = rest[0], rest[1:]
        out = list(torch._foreach_add(first, second, alpha=c))
    else:
        out = [t.clone() for t in first] if c == 1 else list(torch._foreach_mul(first, c))
    for c, tensors in rest:
        torch._foreach_add_(out, tensors, alpha=c)
    return out


def _names(*dicts: Gradients) -> Iterable[str]:
    first = dicts[0]
    for other in dicts[1:]:
        if other.keys() != first.keys():
            odd = sorted(set(first) ^ set(other))[:3]
            raise ValueError(f"gradients of different parameters: {', '.join(odd)} ... is in one of them only")
    return first.keys()
