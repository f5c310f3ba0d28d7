"""The decoder blocks of a model, found by its structure: the list of as many modules as the text config counts layers, in the part that reads text.

A name such as `layers.3` says nothing: vision towers have such lists too, and other families call theirs otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from strategies.base import StrategyError

BESIDE = 0.05
"""Share of the chosen list's parameters from which another list as long counts as a part of the layers too; norms kept in lists hold less."""


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks in order, 0 the first after the embedding."""

    container: str
    """Name of the list in the bare model, e.g. `model.layers`."""
    modules: tuple[nn.Module, ...]

    @property
    def count(self) -> int:
        return len(self.modules)

    def name(self, index: int) -> str:
        """Name of a block in the bare model."""
        return f"{self.container}.{index}"

    def index(self, name: str) -> int | None:
        """Which block a parameter or module belongs to, by its name with or without what peft puts around it; None for one outside."""
        own = original_name(name)
        if not own.startswith(f"{self.container}."):
            return None
        number = own[len(self.container) + 1 :].partition(".")[0]
        return int(number) if number.isdecimal() and int(number) < self.count else None

    def holds(self, name: str) -> bool:
        """Whether a parameter belongs to a decoder block."""
        return self.index(name) is not None


def original_name(name: str) -> str:
    """The name a parameter had before adapters were wrapped around its module."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name.removeprefix("base_model.model."))


def bare(model: nn.Module) -> nn.Module:
    """The model of transformers inside adapters of peft."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def of(model: nn.Module) -> Blocks:
    """The blocks of a causal language model, wrapped in adapters or not, with weights or on the meta device.

    Raises StrategyError where the part that reads text holds no list of modules that could be they.
    """
    core = bare(model)
    config = getattr(core, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    backbone = core.get_decoder() if hasattr(core, "get_decoder") else core
    lists = {name: module for name, module in core.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    inside = {id(module) for module in backbone.modules()}
    within = {name: module for name, module in lists.items() if id(module) in inside}
    outer = _outermost(within or lists)
    chosen = {name: module for name, module in outer.items() if len(module) == count} or outer
    if not chosen:
        raise StrategyError(
            f"no decoder blocks found in {type(core).__name__}: no list of {count or 'several'} modules in the part that reads text; methods "
            "that act on layers cannot be used with this model"
        )
    name = max(chosen, key=lambda one: (_size(chosen[one]), -len(one)))
    others = [one for one in chosen if one != name and len(chosen[one]) == len(chosen[name]) and _size(chosen[one]) > BESIDE * _size(chosen[name])]
    if others:
        raise StrategyError(
            f"the layers of {type(core).__name__} are spread over several lists ({', '.join([name, *others])}), so no one list is its decoder "
            "blocks, on which methods act; take another model"
        )
    return Blocks(name, tuple(chosen[name]))


def _size(module: nn.Module) -> int:
    """Number of its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def unread(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that no text passes, by name in the bare model: vision and audio towers of a shell around a text model; empty for a text model.

    They get no gradient, but weight decay would shrink them.
    """
    core = bare(model)
    config = getattr(core, "config", None)
    if config is None or config.get_text_config() is config:
        return {}
    parts = [core.get_decoder(), core.get_input_embeddings(), core.get_output_embeddings()]
    read = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return {name: parameter for name, parameter in core.named_parameters() if id(parameter) not in read}


def _outermost(lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Lists that lie in no other one: a block may hold lists of its own, as long as that of the blocks by chance."""
    return {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
