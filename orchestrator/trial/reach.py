"""What of a tuned model a method that acts after training cannot reach: heads, embeddings, biases, norms, whole modules saved with an adapter.

Such methods change the weight matrices of the decoder blocks. Whatever else training moved keeps its update, harmful or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from orchestrator.records import TrialResult
    from strategies.base import Strategy, Tensors
    from strategies.recipe import Recipe

WARN = 0.1
"""Share of the update from which on it is a warning."""
SHOWN = 4
"""Tensors that are named."""


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
        return _sentence(method, self.share, len(self.parts), self.parts) if self.parts else ""


def of(model: nn.Module, aligned: Tensors, method: Strategy) -> Untouched:
    """The part of a tuned model's update that `method`, which acts after training, cannot change; measured before it acts. One pass over the
    updates; the matrices of a batch (experts) count as one tensor."""
    from strategies import linear, matrices

    missed = {} if method.moves_outside else {part.name: part.norm**2 for part in outside_parts(model, aligned).values()}
    reached = 0.0
    for update in linear.updates(model, aligned):
        size = linear.norm(update) ** 2
        if method.reaches(update):
            reached += size
        else:
            name = matrices.split(update.name)[0]
            missed[name] = missed.get(name, 0.0) + size
    parts = sorted((Part(name, kind_of(name), size**0.5) for name, size in missed.items() if size > 0), key=lambda part: -part.norm)
    total = sum(missed.values())
    return Untouched(total / (total + reached) if total else 0.0, tuple(parts))


def before_finish(model: nn.Module, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For a trial's record, {method: {"share": of the update's squared norm, "tensors": how many, "largest": [Part, ...]}}, of every method of the
    recipe that changes trained weights after training; empty where none does."""
    found = {}
    for method in recipe.active:
        if method.merges and method.data is not None and "aligned" in method.data.weights:
            left = of(model, method.data.weights["aligned"], method)
            found[method.name] = {"share": left.share, "tensors": len(left.parts), "largest": [asdict(part) for part in left.parts[:SHOWN]]}
    return found


def told(left: Any) -> bool:
    """Whether it is what `before_finish` records of a method, read back from a file."""
    if not isinstance(left, dict) or not isinstance(left.get("share"), float | int) or not isinstance(left.get("tensors"), int):
        return False
    parts = left.get("largest")
    return isinstance(parts, list) and all(isinstance(one, dict) and set(one) == {"name", "kind", "norm"} for one in parts)


def alerts(results: Iterable[TrialResult]) -> list[str]:
    """A sentence for every method that could not change more than `WARN` of the update in some trial; the largest share is told."""
    worst: dict[str, dict[str, Any]] = {}
    for result in results:
        for name, told in (result.facts.get("untouched") or {}).items():
            if told["share"] > worst.get(name, {"share": WARN})["share"]:
                worst[name] = told
    return [_sentence(name, told["share"], told["tensors"], [Part(**one) for one in told["largest"]]) for name, told in worst.items()]


def _sentence(method: str, share: float, count: int, largest: Sequence[Part]) -> str:
    shown = ", ".join(f"{part.name} ({part.kind})" for part in largest[:SHOWN])
    more = f" and {count - len(largest[:SHOWN])} more" if count > SHOWN else ""
    return f"{share:.1%} of the update (of its squared norm) lies in {count} tensor{'s' * (count > 1)} that {method} does not change: {shown}{more}"


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
    if "expert" in name:
        return "experts"
    if any(word in name.lower() for word in ("router", "gate.weight")):
        return "router"
    if any(word in name for word in ("conv", "A_log", ".D")):
        return "convolution or state"
    return "matrix of a decoder block"
