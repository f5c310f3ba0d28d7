"""What a tensor of a decoder block is for: mixing tokens (attention and what stands in its place), the feed-forward part, or a norm.

Told by the classes and names of the modules that it lies in, outermost first. Nothing falls through: what is neither a mixer nor a norm belongs to
the feed-forward part (OPT's `fc1`, routers, shared experts).
"""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

Part = Literal["attention", "mlp", "norm"]

_NORM = re.compile(r"norm", re.IGNORECASE)
_NORM_NAME = re.compile(r"(^|_)(norm|ln)(_|\d|$)|layernorm", re.IGNORECASE)
_FORWARD = re.compile(r"mlp|moe|feed_?forward|ffn|expert", re.IGNORECASE)
_MIXER = re.compile(r"attn|attention|mamba|conv|ssm|recurrent|temporal|delta_?net|lstm|rwkv", re.IGNORECASE)
_FORWARD_CLASS = re.compile(r"(MLP|MoE|MOE|Experts?|FeedForward|FFN)$")


def part_of(block: nn.Module, name: str) -> Part:
    """The part that the parameter or buffer `name` (as the block names it, peft's wrappers included) belongs to."""
    module, found = block, None
    for step in name.split(".")[:-1]:
        module = getattr(module, step)
        kind = type(module).__name__
        if _NORM.search(kind) and not list(module.children()) or _NORM_NAME.fullmatch(step) or step.endswith("norm") and not list(module.children()):
            return "norm"
        if found is None:
            found = _one(kind, step)
    return found or "mlp"


def _one(kind: str, step: str) -> Part | None:
    """By a module's name; by its class where the name is `mixer`, which some families call every part. None for a wrapper that says nothing."""
    if step == "mixer":
        return "mlp" if _FORWARD_CLASS.search(kind) else "attention"
    return "mlp" if _FORWARD.search(step) else "attention" if _MIXER.search(step) else None
