"""A short low-rank training on the side, of the untouched model on other rows than the task's: the safe adapter of SafeMERGE, the harmful
one of RESTA and EnchTable. The model itself is not changed; the result is a set of factors, made once per lane and shared by all trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies.base import Example, Loss, StrategyError, TrainingData, lm_loss
from strategies.linear import Update, block_linears
from strategies.rows import evaluating
from strategies.rows import remembered as once

Factors = dict[str, tuple[Tensor, Tensor]]
"""Weight name -> (left (d_out, r), right (r, d_in)), float32: the update is left @ right."""

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
    """Train low-rank updates of the linear layers in the decoder blocks (those whose weight name `only` accepts) on `rows`.

    `attach` decides how the forward uses them; without it, as an adapter does (`attached`).

    Same result on every worker: rows are not divided, and the caller's random state is neither read nor moved. The model keeps its
    weights, gradients, modes and hooks. Raises StrategyError without rows, FloatingPointError where the loss is not finite.
    """
    if not rows:
        raise StrategyError("a side training has no rows; give safety.data (and harmful answers) for it")
    modules = {f"{n}.weight": m for n, m in block_linears(model).items() if only(f"{n}.weight")}
    if not modules:
        raise StrategyError("no linear layer in the decoder blocks to train low-rank updates of")
    generator = torch.Generator().manual_seed(plan.seed)
    factors = {name: _new(module, plan.rank, generator) for name, module in modules.items()}
    leaves = [t for pair in factors.values() for t in pair]
    optimizer = torch.optim.AdamW(leaves, lr=plan.learning_rate, weight_decay=0.0)
    with (attach or attached)(model, modules, factors), _quiet(model):
        for step in range(plan.steps):
            order = torch.randint(len(rows), (min(plan.batch_size, len(rows)),), generator=generator).tolist()
            value, units = loss(lambda **inputs: model(**inputs), data.collate(rows, order))
            value = value / units.clamp(min=1)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the side training's loss became {float(value)} at step {step + 1}; lower its learning rate")
            for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
                leaf.grad = gradient
            nn.utils.clip_grad_norm_(leaves, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * min(1.0, (step + 1) / max(1, plan.steps // 10))
            optimizer.step()
    return {name: (left.detach(), right.detach()) for name, (left, right) in factors.items()}


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
