"""What a decoder block gives to the next one: its hidden states among whatever else it returns, and how wide they are.

Families return a tensor, a tuple or a list, with the hidden states first or not. Which part it is is seen in one forward: the one that the next
block is given. A method that reads or changes hidden states at blocks goes through here, so that what cannot carry it is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies import blocks, trying
from strategies.base import Batch, StrategyError, lm_loss
from strategies.rows import evaluating


@dataclass(frozen=True)
class Place:
    """Where in a block's output its hidden states are."""

    index: int | None
    """Position in a tuple or list; None where the output is the tensor itself."""
    width: int

    def of(self, output: Any) -> Tensor:
        """The hidden states (R, L, width)."""
        return output if self.index is None else output[self.index]

    def replaced(self, output: Any, hidden: Tensor) -> Any:
        """The output with other hidden states, of the same kind (tensor, tuple or list)."""
        if self.index is None:
            return hidden
        made = list(output)
        made[self.index] = hidden
        return made if isinstance(output, list) else tuple(made)


def places(model: nn.Module, owner: str) -> tuple[Place, ...]:
    """Of every block, in order. One forward of a few plain tokens in evaluation mode; the model is left as it was.

    Raises StrategyError, naming the strategy `owner`, where a block's output holds no states of (rows, tokens, width), or is not called at all.
    """
    batch, found = trying.batch(model, (7, 7)), blocks.of(model)
    rows, tokens = batch["input_ids"].shape
    outputs: dict[int, Any] = {}
    inputs: dict[int, list[Any]] = {}

    def before(layer: int):
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[layer] = [*args, *kwargs.values()]

        return keep

    def behind(layer: int):
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[layer] = output

        return keep

    handles = [block.register_forward_pre_hook(before(i), with_kwargs=True) for i, block in enumerate(found.modules)]
    handles += [block.register_forward_hook(behind(i)) for i, block in enumerate(found.modules)]
    try:
        with torch.no_grad(), evaluating(model):
            trying.forward(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in handles:
            handle.remove()
    made = []
    for layer, block in enumerate(found.modules):
        place = _place(outputs.get(layer), inputs.get(layer + 1, []), (rows, tokens))
        if place is None:
            raise StrategyError(
                f"{owner} acts on the hidden states that a decoder block gives to the next one, and {type(block).__name__} of this model gives none "
                f"of the shape (rows, tokens, width); leave {owner} out for this model"
            )
        made.append(place)
    return tuple(made)


def _place(output: Any, following: Sequence[Any], shape: tuple[int, int]) -> Place | None:
    """The part that the next block is given; else the first that could be hidden states."""
    several = list(enumerate(output)) if isinstance(output, tuple | list) else []
    options = [(None, output)] if isinstance(output, Tensor) else several
    options = [(index, one) for index, one in options if isinstance(one, Tensor) and one.is_floating_point() and _fits(one, shape)]
    for index, one in options:
        if any(one is given for given in following):
            return Place(index, one.shape[-1])
    return Place(options[0][0], options[0][1].shape[-1]) if options else None


def _fits(tensor: Tensor, shape: tuple[int, int]) -> bool:
    return tensor.ndim == 3 and tuple(tensor.shape[:2]) == shape


@contextmanager
def changed(modules: Sequence[nn.Module], where: Sequence[Place], change: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the hidden output h (R, L, width) of module j is change[j](h); the hooks are gone afterwards, also after an exception."""

    def hook(place: Place, own: Callable[[Tensor], Tensor]):
        return lambda module, inputs, output: place.replaced(output, own(place.of(output)))

    handles = [module.register_forward_hook(hook(*one)) for module, *one in zip(modules, where, change, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def added(modules: Sequence[nn.Module], where: Sequence[Place], vectors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, vector j (width,) is added to the hidden output (R, L, width) of module j at every position."""

    def plus(vector: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden + vector.to(hidden.dtype)

    with changed(modules, where, [plus(vector) for vector in vectors]):
        yield


def check_carries(model: nn.Module, layers: Sequence[int], where: Sequence[Place], owner: str, batch: Batch | None = None) -> None:
    """The loss depends on what is added to the hidden states of each of the layers. One short forward and backward, no parameter's gradient.

    Raises StrategyError, naming `owner` and the first layer, where it does not or the dependence is not finite.
    """
    found = blocks.of(model)
    batch = batch if batch is not None else trying.batch(model, (7, 7))
    device = batch["input_ids"].device
    leaves = [torch.zeros(where[layer].width, device=device, requires_grad=True) for layer in layers]
    with torch.enable_grad(), evaluating(model), added([found.modules[i] for i in layers], [where[i] for i in layers], leaves):
        total, _ = lm_loss(trying.forward(model), batch)
        slopes = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    for layer, slope in zip(layers, slopes, strict=True):
        if slope is None or not bool(torch.isfinite(slope).all()) or not slope.count_nonzero():
            what = "is not finite" if slope is not None and not bool(torch.isfinite(slope).all()) else "does not depend on it"
            raise StrategyError(
                f"{owner} adds vectors to the output of decoder blocks, and what this model says {what} at layer {layer} "
                f"({type(found.modules[layer]).__name__}); leave {owner} out for this model"
            )
