"""What a tensor of a decoder block is for: mixing tokens (attention and what stands in its place), the feed-forward part, or a norm.

Told by the classes and names of the modules that it lies in, outermost first, and where these say nothing by what a module's forward is given: only
a mixer needs masks, caches or positions. Nothing falls through: what is neither a mixer nor a norm belongs to the feed-forward part (OPT's `fc1`,
routers, shared experts).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

Part = Literal["attention", "mlp", "norm"]

_NORM = re.compile(r"norm", re.IGNORECASE)
_NORM_NAME = re.compile(r"(^|_)(norm|ln)(_|\d|$)|layernorm", re.IGNORECASE)
_FORWARD = re.compile(r"mlp|moe|feed_?forward|ffn|expert", re.IGNORECASE)
_MIXER = re.compile(r"attn|attention|mamba|conv|ssm|recurrent|temporal|delta_?net|lstm|rwkv", re.IGNORECASE)
_FORWARD_CLASS = re.compile(r"(MLP|MoE|MOE|Experts?|FeedForward|FFN)$")


_MIXED = frozenset(
    {"attention_mask", "causal_mask", "past_key_values", "past_key_value", "layer_past", "cache_params", "cache_position", "position_embeddings",
     "position_ids", "position_bias", "alibi", "state"}
)  # fmt: skip
"""Arguments of a forward that look at other tokens."""


@dataclass(frozen=True)
class Found:
    """A module of a block that is one part as a whole."""

    name: str
    """As the block names it."""
    module: nn.Module
    part: Literal["attention", "mlp"]


def part_of(block: nn.Module, name: str) -> Part:
    """The part that the parameter or buffer `name` (as the block names it, peft's wrappers included) belongs to."""
    module, found, unsaid = block, None, False
    for step in name.split(".")[:-1]:
        module = getattr(module, step)
        if _is_norm(module, step):
            return "norm"
        found = found or _said(module, step)
        unsaid = unsaid or mixes(module)
    return found or ("attention" if unsaid else "mlp")


def outermost(block: nn.Module) -> list[Found]:
    """The mixers and feed-forward modules of a block, each as large as it goes without holding the other kind; norms are left out. Where a module
    called attention only wraps another one with norms around it (DBRX), or is a list of them (LongCat), what it wraps is taken."""
    return [Found(name, module, part) for name, module, part, _ in _walk(block, "")]


def mixes(module: nn.Module) -> bool:
    """Whether the module's forward takes what only a mixer of tokens needs."""
    return bool(_MIXED & inspect.signature(module.forward).parameters.keys())


def _walk(module: nn.Module, prefix: str, given: Part | None = None) -> Iterator[tuple[str, nn.Module, Part, bool]]:
    """(name, module, part, whether its name or class says so). given: the part that a list of modules is."""
    for step, child in module.named_children():
        name, part = f"{prefix}{step}", given or _said(child, step)
        if _is_norm(child, step):
            continue
        inner = list(_walk(child, f"{name}.", part if isinstance(child, nn.ModuleList | nn.ModuleDict) else None))
        several = isinstance(child, nn.ModuleList | nn.ModuleDict)
        wrapper = any(said for *_, said in inner) if part is None else part == "attention" and _only_wraps(child, inner)
        if several or wrapper:
            yield from inner
        else:
            yield name, child, part or ("attention" if mixes(child) else "mlp"), part is not None


def _only_wraps(module: nn.Module, inner: list[tuple[str, nn.Module, Part, bool]]) -> bool:
    norms = any(_is_norm(child, step) for step, child in module.named_children())
    return norms and any(part == "attention" and said and mixes(one) for _, one, part, said in inner)


def _is_norm(module: nn.Module, step: str) -> bool:
    leaf = not list(module.children())
    return bool(_NORM.search(type(module).__name__) and leaf or _NORM_NAME.fullmatch(step) or step.endswith("norm") and leaf)


def _said(module: nn.Module, step: str) -> Part | None:
    """By a module's name; by its class where the name is `mixer`, which some families call every part. None for a wrapper that says nothing."""
    if step == "mixer":
        return "mlp" if _FORWARD_CLASS.search(type(module).__name__) else "attention"
    return "mlp" if _FORWARD.search(step) else "attention" if _MIXER.search(step) else None
