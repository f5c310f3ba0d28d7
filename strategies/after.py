"""Losses and gradients of a finished model, outside any engine: for methods that take a few steps of their own in `finish`.

Everything runs in evaluation mode on the whole model, over all given rows, the same on every worker. Vectors are {parameter name: float32
tensor of the parameter's shape}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from strategies import blocks, matrices, trying
from strategies.base import Batch, Example, Loss, StrategyError, TrainingData, lm_loss
from strategies.blocks import original_name
from strategies.rows import evaluating

Parameters = Mapping[str, nn.Parameter]
Vector = dict[str, Tensor]


def movable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters training moved: those that require a gradient (adapters, or all that is not frozen).

    Of a model that an earlier method has merged, where none requires one: the weight matrices in the decoder blocks, experts too.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        inside, matrices_of = blocks.of(model), matrices.stored(model)
        found = {name: p for name, p in model.named_parameters() if name in matrices_of and inside.holds(name)}
    if not found:
        raise StrategyError("no parameter to move: nothing requires a gradient, and there is no weight matrix in decoder blocks")
    return found


@contextmanager
def moving(model: nn.Module, parameters: Parameters) -> Iterator[None]:
    """Evaluation mode, gradients for `parameters` alone; modes and flags are put back, also after an exception. No `.grad` is written."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters.values()}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def batches(rows: Sequence[Example], data: TrainingData, size: int | None = None) -> Iterator[Batch]:
    """All rows in order, `size` (without it `per_device_batch_size`) at a time."""
    size = size or data.per_device_batch_size
    for start in range(0, len(rows), size):
        yield data.collate(rows, range(start, min(start + size, len(rows))))


def mean_loss(model: nn.Module, rows: Sequence[Example], data: TrainingData, loss: Loss = lm_loss) -> float:
    """Mean loss per unit over all rows; infinity where it is not a number, so that no comparison takes it for an improvement."""
    total = units = 0.0
    forward = trying.forward(model)
    with torch.no_grad():
        for batch in batches(rows, data):
            value, count = loss(forward, batch)
            total, units = total + float(value), units + float(count)
    _some(units)
    return total / units if total == total else float("inf")


def gradient(model: nn.Module, parameters: Parameters, rows: Sequence[Example], data: TrainingData, loss: Loss = lm_loss) -> tuple[float, Vector]:
    """(mean loss per unit over all rows, its gradient). Call inside `moving`. Raises StrategyError for rows without a label, FloatingPointError
    for a gradient that is not finite."""
    found, total, units, forward = _zeros(parameters), 0.0, 0.0, trying.forward(model)
    for batch in batches(rows, data):
        value, count = loss(forward, batch)
        _add(found, torch.autograd.grad(value, list(parameters.values()), allow_unused=True))
        total, units = total + float(value.detach()), units + float(count)
    _some(units)
    return total / units, _finite({name: part / units for name, part in found.items()}, "gradient")


def hessian_vector(model: nn.Module, parameters: Parameters, rows: Sequence[Example], data: TrainingData, vector: Mapping[str, Tensor]) -> Vector:
    """H v, H the Hessian of the mean `lm_loss` over all rows. Exact, by differentiating twice; call inside `moving`.

    Attention is computed by plain matrix products inside, since fused kernels cannot be differentiated twice. Raises StrategyError for a
    model with another attention than `sdpa` or `eager`, FloatingPointError for a product that is not finite.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = getattr(model.config, "_attn_implementation", "eager")
    if kind not in ("sdpa", "eager", None):
        raise StrategyError(f"second derivatives need model.attn_implementation=sdpa or eager, not {kind}; or use solver=diagonal or lbfgs")
    found, units, leaves, forward = _zeros(parameters), 0.0, list(parameters.values()), trying.forward(model)
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches(rows, data):
            value, count = lm_loss(forward, batch)
            first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            along = sum((g.float() * vector[name]).sum() for name, g in zip(parameters, first, strict=True) if g is not None)
            _add(found, torch.autograd.grad(along, leaves, allow_unused=True))
            units += float(count)
    _some(units)
    return _finite({name: part / units for name, part in found.items()}, "product of the Hessian with a vector")


def squared_gradients(model: nn.Module, parameters: Parameters, rows: Sequence[Example], data: TrainingData) -> Vector:
    """The diagonal of the empirical Fisher matrix: mean over rows of the squared gradient of the row's mean loss. Inside `moving`."""
    found, used, forward = _zeros(parameters), 0, trying.forward(model)
    for batch in batches(rows, data, 1):
        value, count = lm_loss(forward, batch)
        if not count:
            continue
        parts = torch.autograd.grad(value / count, list(parameters.values()), allow_unused=True)
        _add(found, [None if part is None else part.float().square() for part in parts])
        used += 1
    _some(used)
    return _finite({name: part / used for name, part in found.items()}, "squared gradient")


def copies(parameters: Parameters) -> Vector:
    """Copies in the parameters' own type, for `restore`."""
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def restore(parameters: Parameters, saved: Mapping[str, Tensor]) -> None:
    """Put copies back, bit for bit."""
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


@torch.no_grad()
def displace(parameters: Parameters, origin: Mapping[str, Tensor], scale: float, vector: Mapping[str, Tensor]) -> None:
    """Set each parameter to origin + scale * vector, added in float32."""
    for name, parameter in parameters.items():
        parameter.copy_((origin[name].float() + scale * vector[name]).to(parameter.dtype))


def length(parameters: Parameters, aligned: Mapping[str, Tensor] | None) -> float:
    """What a step is measured by: of adapters their norm, of other weights that of their change from `aligned` (their own norm where the
    untouched model is not known)."""
    total = 0.0
    for name, parameter in parameters.items():
        value = parameter.detach().float()
        if "lora_" not in name and aligned is not None and original_name(name) in aligned:
            value = value - aligned[original_name(name)].to(value.device, torch.float32)
        total += float(value.double().square().sum())
    return total**0.5


def _zeros(parameters: Parameters) -> Vector:
    return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}


def _add(to: Vector, parts: Sequence[Tensor | None]) -> None:
    for held, part in zip(to.values(), parts, strict=True):
        if part is not None:
            held.add_(part.detach())


def _finite(found: Vector, what: str) -> Vector:
    """As given. Raises FloatingPointError where something in it is not finite, so that no step is taken along it."""
    odd = next((name for name, part in found.items() if not bool(torch.isfinite(part).all())), None)
    if odd is not None:
        raise FloatingPointError(f"the {what} of {odd} is not finite, so the tuned model is left as it is; lower training.learning_rate")
    return found


def _some(units: float) -> None:
    if not units:
        raise StrategyError("the rows hold no labelled token, so there is no loss; check task.max_length and the data")
