"""What of a tuned model a method that acts after training cannot reach: heads, embeddings, biases, norms, whole modules saved with an adapter.

Such methods change the weight matrices of the decoder blocks. Whatever else training moved keeps its update, harmful or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from strategies.base import Tensors

WARN = 0.1
"""Share of the update from which on it is a warning."""


@dataclass(frozen=True)
class Part:
    """One tensor outside a method's reach that training moved."""

    name: str
    kind: str
    """head, embedding, norm, bias, ...: as users speak of it."""
    norm: float
    """Frobenius norm of its update."""


@dataclass(frozen=True)
class Untouched:
    """The part of an update that a method leaves as it is because it acts on other tensors."""

    share: float
    """Of the squared norm of the whole update, 0..1."""
    parts: tuple[Part, ...]
    """Largest first."""

    @property
    def warns(self) -> bool:
        return self.share > WARN

    def sentence(self, method: str) -> str:
        """Empty where there is nothing of the kind."""
        if not self.parts:
            return ""
        shown = ", ".join(f"{part.name} ({part.kind})" for part in self.parts[:4])
        more = f" and {len(self.parts) - 4} more" if len(self.parts) > 4 else ""
        return (
            f"{self.share:.1%} of the update (of its squared norm) lies in {len(self.parts)} tensor{'s' * (len(self.parts) > 1)} that {method} does "
            f"not change: {shown}{more}"
        )


def untouched(outside: Mapping[str, Part], inside: Mapping[str, Mapping[str, Any]], aligned: Tensors) -> Untouched:
    """outside: as `outside_parts`, of the model before the method. inside: weight -> `norm_before`, `changed`, of what the method was shown.

    Of the latter, tensors that are no matrix and were not changed count as out of reach too.
    """
    odd = {
        name: Part(name, kind_of(name), module["norm_before"])
        for name, module in inside.items() if not module["changed"] and name in aligned and aligned[name].ndim != 2
    }  # fmt: skip
    parts = sorted([*outside.values(), *odd.values()], key=lambda part: -part.norm)
    reached = sum(module["norm_before"] ** 2 for name, module in inside.items() if name not in odd)
    missed = sum(part.norm**2 for part in parts)
    return Untouched(missed / (missed + reached) if missed else 0.0, tuple(parts))


def outside_parts(model: nn.Module, aligned: Tensors) -> dict[str, Part]:
    """Tensors outside what `strategies.linear.updates` shows a method, by name, with the norm of what training did to them."""
    import torch

    from strategies import blocks, linear

    inside = blocks.of(model)
    with torch.no_grad():
        found: dict[str, float] = {}
        adapted = bool(linear.adapters(model))
        for name, norm in _wrapped(model):
            found[name] = norm
        if adapted:
            for update in linear.updates(model, aligned, lambda name: not inside.holds(name)):
                found[update.name] = linear.norm(update)
        for name, parameter in model.named_parameters():
            own = _plain(name)
            if own in found or not parameter.is_floating_point() or "lora_" in name or ".modules_to_save." in name or "trainable_tokens" in name:
                continue
            if not adapted and inside.holds(own):
                continue  # shown to the method
            norm = _moved(parameter, _before(own, parameter, model, aligned))
            if norm:
                found[own] = norm
    return {name: Part(name, kind_of(name), norm) for name, norm in found.items() if norm > 0}


def _wrapped(model: nn.Module) -> Iterator[tuple[str, float]]:
    """What peft keeps beside a module: whole copies, rows of trained tokens, low-rank updates of an embedding."""
    for name, module in model.named_modules():
        own = _plain(name)
        if _default(module, "lora_embedding_A"):
            yield f"{own}.weight", float(module.get_delta_weight("default").double().norm())
        if _default(module, "trainable_tokens_delta"):
            rows = module.base_layer.weight[list(module.token_indices["default"])]
            yield f"{own}.weight", float((module.trainable_tokens_delta["default"] - rows).double().norm())
        if _default(module, "modules_to_save"):
            start = dict(module.original_module.named_parameters())
            for part, parameter in module.modules_to_save["default"].named_parameters():
                yield f"{own}.{part}", _moved(parameter, start.get(part))


def _plain(name: str) -> str:
    """A name without what peft's wrappers put into it."""
    from strategies import blocks

    for part in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(part, "")
    return blocks.original_name(name)


def _default(module: nn.Module, part: str) -> bool:
    """Whether a module of peft keeps this part for the adapter `default`; the model itself has lists of names under some of these."""
    from torch import nn

    kept = getattr(module, part, None)
    return isinstance(kept, nn.ModuleDict | nn.ParameterDict) and "default" in kept


def _before(name: str, parameter: Tensor, model: nn.Module, aligned: Tensors) -> Tensor | None:
    """The aligned model's tensor of that name; for a head that it has not of its own, its embedding."""
    if name in aligned:
        return aligned[name]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not parameter:
        return None
    embedding = base.get_input_embeddings().weight
    shared = next((_plain(n) for n, p in model.named_parameters() if p is embedding), None)
    return aligned.get(shared)


def _moved(parameter: Tensor, before: Tensor | None) -> float:
    """Norm of the change; rows that were added count whole."""
    import torch

    change = parameter.detach().to(torch.float64).clone()
    if before is not None:
        rows = tuple(slice(0, min(a, b)) for a, b in zip(change.shape, before.shape, strict=True))
        change[rows] -= before[rows].to(change)
    return float(change.norm())


def kind_of(name: str) -> str:
    """How users call the tensor."""
    if name.endswith(".bias"):
        return "bias"
    if any(word in name.lower() for word in ("norm", "ln_")):
        return "norm"
    if any(word in name for word in ("lm_head", "embed_out", "output_projection")):
        return "head"
    if any(word in name for word in ("embed", "wte", "wpe")):
        return "embedding"
    return "no matrix of a decoder block"
