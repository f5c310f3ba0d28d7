"""A short low-rank training on the side, of the untouched model on other rows than the task's: the safe adapter of SafeMERGE, the harmful
one of RESTA and EnchTable. The model itself is not changed; the result is a set of factors, made once per lane and shared by all trials.

Trained are the weight matrices of the decoder blocks: linear layers, and the experts of a mixture, each with factors of its own. Routers keep
their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strategies import blocks, matrices, trying
from strategies.base import Example, Loss, StrategyError, TrainingData, lm_loss
from strategies.linear import block_linears
from strategies.matrices import Stored
from strategies.rows import evaluating
from strategies.rows import remembered as once
from strategies.updates import Update

Factors = dict[str, tuple[Tensor, Tensor]]
"""Weight name -> (left (d_out, r), right (r, d_in)), float32: the update is left @ right."""

Batches = dict[str, tuple[nn.Module, str, Stored]]
"""Name of a parameter that holds a batch of matrices -> (the module that owns it, its name there, how it is stored). Their factors are
(left (n, d_out, r), right (n, r, d_in)) while they are trained."""

Attach = Callable[[nn.Module, dict[str, nn.Module], Batches, Factors], AbstractContextManager[None]]
"""(model, {weight name: linear layer}, batches, factors of both) -> context in which the model's forward uses the factors."""


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

    `attach` decides how the forward uses them; without it, as an adapter does (`added`).

    Same result on every worker: rows are not divided, and the caller's random state is neither read nor moved. The model keeps its
    weights, gradients, modes and hooks. Raises StrategyError without rows, FloatingPointError where the loss or a gradient is not finite.
    """
    if not rows:
        raise StrategyError("a side training has no rows; give safety.data (and harmful answers) for it")
    choosing = matrices.routers(model)
    own = dict(model.named_parameters())  # a tensor that several modules share has its first name here, and one pair of factors
    named = {f"{n}.weight": m for n, m in block_linears(model).items() if n not in choosing}
    modules = {name: module for name, module in named.items() if name in own and only(name)}
    batches = {name: batch for name, batch in block_batches(model).items() if name in own and only(name)}
    if not modules and not batches:
        raise StrategyError("no linear layer in the decoder blocks to train low-rank updates of")
    generator = torch.Generator().manual_seed(plan.seed)
    factors = {name: _new(module, plan.rank, generator) for name, module in modules.items()}
    factors |= {name: _new_batch(batch, plan.rank, generator) for name, batch in batches.items()}
    leaves = [t for pair in factors.values() for t in pair]
    optimizer = torch.optim.AdamW(leaves, lr=plan.learning_rate, weight_decay=0.0)
    forward = trying.forward(model)
    with (attach or added)(model, modules, batches, factors), _quiet(model):
        for step in range(plan.steps):
            order = torch.randint(len(rows), (min(plan.batch_size, len(rows)),), generator=generator).tolist()
            value, units = loss(forward, data.collate(rows, order))
            value = value / units.clamp(min=1)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the side training's loss became {float(value)} at step {step + 1}; lower its learning rate")
            for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves, allow_unused=True), strict=True):
                leaf.grad = torch.zeros_like(leaf) if gradient is None else gradient  # an expert that no row was sent to
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
    """Inside, each module's output has x @ right.T @ left.T added; the hooks are gone afterwards, also after an exception.

    Where the model reads a layer's weight itself and never calls the layer (Mamba's time step), left @ right is added to that weight while the model
    runs.
    """

    def hook(left: Tensor, right: Tensor):
        return lambda module, inputs, output: output + (inputs[0].to(right.dtype) @ right.T @ left.T).to(output.dtype)

    direct = read_directly(model, modules)
    called = {name: module for name, module in modules.items() if name not in direct}
    handles = [one.register_forward_hook(hook(*factors[n])) for n, module in called.items() for one in users(model, module.weight)]
    swap = Swap(model, of_linears({name: modules[name] for name in direct}))
    handles.append(model.register_forward_pre_hook(lambda *_: swap.put(factors)))
    handles.append(model.register_forward_hook(lambda *_: swap.back()))
    try:
        yield
    finally:
        swap.back()
        for handle in handles:
            handle.remove()


@contextmanager
def added(model: nn.Module, modules: dict[str, nn.Module], batches: Batches, factors: Factors) -> Iterator[None]:
    """`attached`, and the modules that own the batches see them plus left @ right."""
    with attached(model, modules, factors), _filled(batches, factors):
        yield


def read_directly(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """Names of the layers that one forward of a few plain tokens does not call: their weight is read by another module, or they are experts that
    none of the tokens met. Modes and weights stay."""
    called: set[str] = set()
    handles = [
        one.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, m in modules.items() for one in users(model, m.weight)
    ]
    try:
        with torch.no_grad(), evaluating(model):
            batch = trying.batch(model)
            trying.forward(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name for name in modules if name not in called)


def of_linears(modules: Mapping[str, nn.Module]) -> Batches:
    """Linear layers by weight name, described as batches are."""
    return {name: (module, "weight", Stored(transposed=not isinstance(module, nn.Linear))) for name, module in modules.items()}


def users(model: nn.Module, weight: Tensor, leaf: str = "weight") -> list[nn.Module]:
    """The modules whose parameter `leaf` is this very tensor: several where blocks share it (Zamba2)."""
    return [module for module in model.modules() if module._parameters.get(leaf) is weight]


class Swap:
    """Weights replaced by themselves plus left @ right, wherever they are used, and put back; the parameters stay where and as they are."""

    def __init__(self, model: nn.Module, places: Batches):
        self._held = {name: (m._parameters[leaf], users(model, m._parameters[leaf], leaf), leaf, how) for name, (m, leaf, how) in places.items()}
        self._made: dict[int, tuple[Tensor, Callable[[Any], Tensor]]] = {}

    def put(self, factors: Mapping[str, tuple[Tensor, Tensor]], amount: Tensor | float = 1.0) -> None:
        """factors: (left (..., d_out, r), right (..., r, d_in)) of every weight held; their product is taken `amount` times."""
        for name, (weight, modules, leaf, how) in self._held.items():
            left, right = factors[name]
            at = partial(_plus, weight, left, right, how, amount)
            new = at(...)
            if how.count is not None:
                self._made[id(new)] = (new, at)
            for module in modules:
                module._parameters[leaf] = new  # not set as an attribute: that would refuse a tensor that is no parameter

    def one(self, tensor: Any, index: Any) -> Tensor | None:
        """Matrix `index` of a batch that `put` made, computed alone, so that the derivative of one expert is not as large as all of them; None for
        another tensor or kind of index."""
        made = self._made.get(id(tensor))
        whole = isinstance(index, int) or isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()
        return made[1](int(index)) if made is not None and whole else None

    def back(self) -> None:
        self._made.clear()
        for weight, modules, leaf, _ in self._held.values():
            for module in modules:
                module._parameters[leaf] = weight


def _plus(weight: Tensor, left: Tensor, right: Tensor, how: Stored, amount: Tensor | float, index: Any) -> Tensor:
    """weight[index] + amount * (left @ right)[index], as the weight is stored; `...` for all of it."""
    change = amount * (left[index] @ right[index])
    return weight[index] + (change.mT if how.transposed else change).to(weight.dtype)


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
