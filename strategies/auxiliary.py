"""A short low-rank training on the side, of the untouched model on other rows than the task's: the safe adapter of SafeMERGE, the harmful
one of RESTA and EnchTable. The model itself is not changed; the result is a set of factors, made once per lane and shared by all trials.

Trained are the weight matrices of the decoder blocks: linear layers, and the experts of a mixture, each with factors of its own. Routers keep
their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies import blocks, matrices
from strategies.base import Example, Loss, StrategyError, TrainingData, lm_loss
from strategies.linear import Update, block_linears
from strategies.matrices import Stored
from strategies.rows import evaluating
from strategies.rows import remembered as once

Factors = dict[str, tuple[Tensor, Tensor]]
"""Weight name -> (left (d_out, r), right (r, d_in)), float32: the update is left @ right."""

Batches = dict[str, tuple[nn.Module, str, Stored]]
"""Name of a parameter that holds a batch of matrices -> (the module that owns it, its name there, how it is stored). Their factors are
(left (n, d_out, r), right (n, r, d_in)) while they are trained."""

Attach = Callable[[nn.Module, dict[str, nn.Module], Factors], AbstractContextManager[None]]
"""(model, {weight name: linear layer}, factors) -> context in which the model's forward uses the factors."""


@dataclass(frozen=True)
class Plan:
    """How the side training runs: AdamW at a constant rate after a tenth of warm-up, gradients clipped to norm 1."""

    steps: int = 50
    learning_rate: float = 1e-2
    rank: int = 8
    batch_size: int = 16
    seed: int = 0


def train(model: nn.Module, rows: Sequence[Example], data: TrainingData, plan: Plan, loss: Loss = lm_loss,
          only: Callable[[str], bool] = lambda name: True, attach: Attach | None = None) -> Factors:  # fmt: skip
    """Train low-rank updates of the matrices in the decoder blocks (those whose weight name `only` accepts) on `rows`.

    `attach` decides how the forward uses those of linear layers, and then no others are trained; without it, as an adapter does (`attached`).

    Same result on every worker: rows are not divided, and the caller's random state is neither read nor moved. The model keeps its
    weights, gradients, modes and hooks. Raises StrategyError without rows, FloatingPointError where the loss or a gradient is not finite.
    """
    if not rows:
        raise StrategyError("a side training has no rows; give safety.data (and harmful answers) for it")
    choosing = matrices.routers(model)
    modules = {f"{n}.weight": m for n, m in block_linears(model).items() if only(f"{n}.weight") and n not in choosing}
    batches = {} if attach else {name: batch for name, batch in block_batches(model).items() if only(name)}
    if not modules and not batches:
        raise StrategyError("no linear layer in the decoder blocks to train low-rank updates of")
    generator = torch.Generator().manual_seed(plan.seed)
    factors = {name: _new(module, plan.rank, generator) for name, module in modules.items()}
    factors |= {name: _new_batch(batch, plan.rank, generator) for name, batch in batches.items()}
    leaves = [t for pair in factors.values() for t in pair]
    optimizer = torch.optim.AdamW(leaves, lr=plan.learning_rate, weight_decay=0.0)
    with (attach or attached)(model, modules, factors), _filled(batches, factors), _quiet(model):
        for step in range(plan.steps):
            order = torch.randint(len(rows), (min(plan.batch_size, len(rows)),), generator=generator).tolist()
            value, units = loss(lambda **inputs: model(**inputs), data.collate(rows, order))
            value = value / units.clamp(min=1)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the side training's loss became {float(value)} at step {step + 1}; lower its learning rate")
            for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
                leaf.grad = gradient
            if not torch.isfinite(nn.utils.clip_grad_norm_(leaves, 1.0)):
                raise FloatingPointError(f"the side training's gradient is not finite at step {step + 1}; lower its learning rate")
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * min(1.0, (step + 1) / max(1, plan.steps // 10))
            optimizer.step()
    return _one_by_one({name: (left.detach(), right.detach()) for name, (left, right) in factors.items()})


def block_batches(model: nn.Module) -> Batches:
    """The parameters of the decoder blocks that hold batches of matrices, of a model without adapters."""
    inside, owners = blocks.of(model), matrices.owners(model)
    return {name: (*owners[name], how) for name, how in matrices.stored(model).items() if how.count is not None and inside.holds(name)}


def _one_by_one(factors: Factors) -> Factors:
    """Factors of batches, taken apart into those of their matrices."""
    found: Factors = {}
    for name, (left, right) in factors.items():
        if left.ndim == 2:
            found[name] = (left, right)
            continue
        found |= {matrices.named(name, i): pair for i, pair in enumerate(zip(left, right, strict=True))}
    return found


def remembered(model: nn.Module, rows: Sequence[Example], data: TrainingData, plan: Plan, what: str, **options: Any) -> Factors:
    """`train`, once per lane: kept on the CPU in `data.cache` under what it depends on.

    `what` names the purpose (safe, harmful) and whatever `options` of `train` are given, which are no part of the key themselves.
    """

    def make() -> Factors:
        return {name: (left.cpu(), right.cpu()) for name, (left, right) in train(model, rows, data, plan, **options).items()}

    return once(data, f"side training: {what}", rows, make, plan)


def as_updates(factors: Factors, scale: float = 1.0) -> dict[str, Update]:
    """The factors as updates by weight name, times `scale`."""
    return {name: Update(name, left=scale * left, right=right) for name, (left, right) in factors.items()}


@contextmanager
def attached(model: nn.Module, modules: dict[str, nn.Module], factors: Factors) -> Iterator[None]:
    """Inside, each module's output has x @ right.T @ left.T added; the hooks are gone afterwards, also after an exception."""

    def hook(left: Tensor, right: Tensor):
        return lambda module, inputs, output: output + (inputs[0].to(right.dtype) @ right.T @ left.T).to(output.dtype)

    handles = [module.register_forward_hook(hook(*factors[name])) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _filled(batches: Batches, factors: Factors) -> AbstractContextManager[None]:
    """Inside, the modules that own the batches see them plus left @ right."""

    def plus(left: Tensor, right: Tensor, how: Stored) -> Callable[[Tensor], Tensor]:
        def add(weight: Tensor) -> Tensor:
            change = left @ right
            return weight + (change.mT if how.transposed else change).to(weight.dtype)

        return add

    return matrices.changed({n: (m, leaf) for n, (m, leaf, _) in batches.items()}, {n: plus(*factors[n], how) for n, (_, _, how) in batches.items()})


def _new_batch(batch: tuple[nn.Module, str, Stored], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`_new` for every matrix of a batch."""
    module, leaf, how = batch
    weight = module._parameters[leaf]
    count, d_out, d_in = weight.mT.shape if how.transposed else weight.shape
    right = torch.randn(count, rank, d_in, generator=generator) / d_in**0.5
    return torch.zeros(count, d_out, rank).to(weight.device).requires_grad_(), right.to(weight.device).requires_grad_()


def _new(module: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Zero left factor, random right one, as an adapter starts."""
    weight = module.weight
    d_out, d_in = weight.shape if isinstance(module, nn.Linear) else (weight.shape[1], weight.shape[0])
    right = torch.randn(rank, d_in, generator=generator) / d_in**0.5
    left = torch.zeros(d_out, rank)
    return left.to(weight.device).requires_grad_(), right.to(weight.device).requires_grad_()


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no random draw) and no parameter gradients inside."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
