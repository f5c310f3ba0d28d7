"""Modules of decoder blocks linearised around their weights: f(x; W0 + d) replaced by f(x; W0) + J d, the neural tangent kernel's regime.

Which modules is decided by what they are (see `block_parts`): whatever mixes tokens, attention or what stands in its place, and on demand the
feed-forward modules too. A family whose modules have no forward-mode derivative, or one that is not finite, is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from strategies import auxiliary, blocks
from strategies.base import StrategyError
from strategies.block_parts import outermost

PARTS = {"attention": frozenset({"attention"}), "attention_mlp": frozenset({"attention", "mlp"})}


def containers(model: nn.Module, which: str) -> list[str]:
    """Names of the modules in decoder blocks that are linearised as a whole: `attention` or `attention_mlp`. A module that several blocks share is
    named once; modules without parameters are left out, and so are lone linear layers (OPT's `fc1`), which are linear in their weights already."""
    found, seen, inside = [], set(), blocks.of(model)
    for index, block in enumerate(inside.modules):
        for one in outermost(block):
            lone = not list(one.module.children())
            if one.part in PARTS[which] and id(one.module) not in seen and not lone and next(one.module.parameters(), None) is not None:
                seen.add(id(one.module))
                found.append(f"{inside.name(index)}.{one.name}")
    return found


def trained_in(model: nn.Module, which: str) -> tuple[str, ...]:
    """Beginnings of the names of all parameters in the modules of `containers`, and in lone linear layers of the same parts."""
    inside = blocks.of(model)
    return tuple(
        f"{inside.name(index)}.{one.name}." for index, block in enumerate(inside.modules) for one in outermost(block) if one.part in PARTS[which]
    )


class Differentiable(TorchFunctionMode):
    """Inside, attention by torch's scaled dot products sees the least finite number where a mask says no, as eager attention does; and one expert of
    a batch that is swapped is computed alone.

    With minus infinity a row that may look at nothing (padding beyond a narrow window) has a softmax of 0 / 0, whose derivative is NaN.
    """

    def __init__(self, swaps: Sequence[auxiliary.Swap] = ()):
        super().__init__()
        self._swaps = swaps

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__:
            for swap in self._swaps:
                if (one := swap.one(*args)) is not None:
                    return one
        if func is nn.functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None:
                finite = finite_mask(mask, args[0] if args else kwargs["query"])
                args, kwargs = (*args[:3], finite, *args[4:]) if len(args) > 3 else args, kwargs if len(args) > 3 else kwargs | {"attn_mask": finite}
        return func(*args, **kwargs)


def finite_mask(mask: Tensor, query: Tensor) -> Tensor:
    """What is added to attention scores: 0 where a boolean mask is true, else the least finite number of the query's type; an additive mask without
    infinities. Same shape."""
    least = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, least)
    return mask.clamp(min=least)


@contextmanager
def linearised(model: nn.Module, modules: Mapping[str, nn.Module], batches: auxiliary.Batches, factors: auxiliary.Factors,
               names: Sequence[str]) -> Iterator[None]:  # fmt: skip
    """Inside, the modules called `names` give f(x; W0) + d/de f(x; W0 + e * left @ right) at e = 0: first order in their weights.

    modules: {weight name: linear layer}, batches: experts and the like, all with factors. The derivative is forward-mode through a module as a
    whole, in every tensor that it returns. What lies outside `names` simply has its update added. Hooks and patches are gone afterwards, also
    after an exception.
    """
    within = {id(part) for name in names for part in model.get_submodule(name).modules()}
    direct = auxiliary.read_directly(model, dict(modules))
    swapped = auxiliary.of_linears({name: modules[name] for name in direct}) | batches
    shift: list[Tensor | None] = [None]
    swaps: list[auxiliary.Swap] = []
    start = torch.zeros((), device=next(iter(factors.values()))[0].device)
    with ExitStack() as stack:
        lone = {name: module for name, module in modules.items() if id(module) not in within}
        outside = {name: place for name, place in batches.items() if id(place[0]) not in within}
        stack.enter_context(auxiliary.added(model, lone, outside, factors))
        for name in names:
            module = model.get_submodule(name)
            parts = {id(part) for part in module.modules()}
            swap = auxiliary.Swap(model, {one: place for one, place in swapped.items() if id(place[0]) in parts})
            swaps.append(swap)
            stack.callback(swap.back)
            stack.enter_context(_patched(module, _first_order(module.forward, shift, start, swap, factors)))
        for name, module in modules.items():
            for twin in auxiliary.users(model, module.weight) if name not in lone and name not in direct else ():
                stack.callback(twin.register_forward_hook(_added(name, *factors[name], shift)).remove)
        stack.enter_context(_plain_experts(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no forward-mode derivative
        stack.enter_context(Differentiable(swaps))
        yield


@contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """Inside, experts are computed one by one, in transformers' own way: its grouped kernels have no forward-mode derivative."""
    configs = {id(c): c for module in model.modules() if getattr(c := getattr(module, "config", None), "_experts_implementation", None) is not None}
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, own in before:
            config._experts_implementation = own


def _added(name: str, left: Tensor, right: Tensor, shift: list[Tensor | None]) -> Callable[..., Tensor]:
    """The hook of one linear layer of a linearised module: its update times the shift."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not inputs or shift[0] is None:
            how = "outside the module that it belongs to" if isinstance(output, Tensor) else "for more than one tensor"
            raise StrategyError(f"{name.removesuffix('.weight')} is called {how}, so its module cannot be linearised")
        return output + (shift[0] * (inputs[0].to(right.dtype) @ right.T @ left.T)).to(output.dtype)

    return add


def _first_order(forward: Callable[..., Any], shift: list[Tensor | None], start: Tensor, swap: auxiliary.Swap,
                 factors: auxiliary.Factors) -> Callable[..., Any]:  # fmt: skip
    """`forward` plus its derivative by the shift at 0. Of a tuple or list every floating tensor is taken so; the rest of it (caches) is None."""

    def first_order(*args: Any, **kwargs: Any) -> Any:
        # nothing is generated, and a cache would keep tensors of the derivative
        kwargs |= {cache: None for cache in ("past_key_values", "past_key_value", "layer_past", "cache_params") if cache in kwargs}
        shape: list[Any] = []

        def moved(amount: Tensor) -> tuple[Tensor, ...]:
            outer, shift[0] = shift[0], amount
            swap.put(factors, amount)
            try:
                output = forward(*args, **kwargs)
            finally:
                shift[0] = outer
                swap.back()
            parts = list(output) if isinstance(output, tuple | list) else [output]
            wanted = [i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.is_floating_point()]
            shape[:] = [type(output) if isinstance(output, tuple | list) else None, len(parts), wanted]
            return tuple(parts[i] for i in wanted)

        values, slopes = torch.func.jvp(moved, (start,), (torch.ones_like(start),))
        kind, count, wanted = shape
        found: list[Any] = [None] * count
        for i, value, slope in zip(wanted, values, slopes, strict=True):
            found[i] = value + slope
        return found[0] if kind is None else found if kind is list else tuple(found)

    return first_order


@contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
