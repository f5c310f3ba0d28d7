"""Which weights get an adapter: what was asked for, what of it peft and the model's own code can do, and whether that is what was made.

peft chooses by the ends of names, renames targets of mixtures of experts, and refuses some modules of state-space models; fused kernels read
weights past the modules that hold them. So the choice is made here by name, tried on a copy without weights, and read back.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from strategies import blocks, matrices
from strategies.adapted import adapters
from strategies.base import StrategyError
from strategies.blocks import original_name
from strategies.lora_effect import bypassed, read_elsewhere, without_weights

if TYPE_CHECKING:
    from peft import LoraConfig

TRIES = 4
"""How often a target list is mended after peft was tried."""


class Knobs(Protocol):
    """What of lora's settings decides on targets."""

    @property
    def lora_r(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def target_modules(self) -> str | tuple[str, ...]: ...
    @property
    def layers(self) -> str | tuple[int, ...] | None: ...


@dataclass(frozen=True)
class Targets:
    """What gets an adapter, by name in the bare model."""

    modules: tuple[str, ...]
    """Linear layers."""
    parameters: tuple[str, ...]
    """Parameters that peft adapts directly: batches of matrices (experts), and layers whose names it would take for others."""
    transposed: bool
    """Whether the linear layers store (d_in, d_out)."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(end of a name, why) of linear layers and experts that `all-linear` does not reach in this model."""

    def config(self, knobs: Knobs) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=knobs.lora_r, lora_alpha=knobs.lora_alpha, lora_dropout=knobs.lora_dropout, target_modules=list(self.modules),
            target_parameters=list(self.parameters) or None, task_type="CAUSAL_LM", fan_in_fan_out=self.transposed,
        )  # fmt: skip

    @property
    def names(self) -> frozenset[str]:
        """Of the parameters that get an adapter."""
        return frozenset(f"{name}.weight" for name in self.modules) | frozenset(self.parameters)

    @property
    def facts(self) -> dict[str, Any]:
        """For a trial's record."""
        found: dict[str, Any] = {"adapted_modules": len(self.names)}
        return found | ({"not_adapted": {name: why for name, why in self.left_out}} if self.left_out else {})

    @property
    def notes(self) -> list[str]:
        """One a reason."""
        whys = dict.fromkeys(why for _, why in self.left_out)
        names = {why: ", ".join(name for name, own in self.left_out if own == why) for why in whys}
        return [f"lora: {names[why]} of the decoder blocks gets no adapter ({why})" for why in whys]


def of(model: nn.Module, knobs: Knobs, layers: tuple[int, ...] | None) -> Targets:
    """The targets in a model without adapters, read back from peft on a copy without weights. `layers`: decoder layers, None for all.
    A model on the meta device cannot be asked anything: what its code reads past its layers is then not seen, and such layers are targets.

    Raises StrategyError, in a sentence, where nothing is left to adapt, where a named module is not there or cannot be adapted, and where
    peft would adapt something else than was asked for.
    """
    names = [one.strip() for one in knobs.target_modules.split(",")] if isinstance(knobs.target_modules, str) else list(knobs.target_modules)
    everything = names == ["all-linear"]
    asked = _asked(model, None if everything else names, layers)
    if not everything:
        _all_there(model, names)
    if not asked.names:
        raise StrategyError(
            f"lora: no module to adapt (target_modules={knobs.target_modules!r}, layers={knobs.layers!r}, frozen ones left out);"
            " widen target_modules or narrow freeze_layers"
        )
    asked = _without(asked, _shared(model, asked), "several layers share it, and each one's adapter would be merged into all of them", everything)
    past = frozenset() if without_weights(model) else bypassed(model, asked.modules) | read_elsewhere(model, asked.parameters)
    asked = _without(asked, past, "this model's own code reads its weight past it, so an adapter has no effect", everything)
    if asked.parameters and knobs.lora_dropout:
        raise StrategyError(
            f"lora.lora_dropout={knobs.lora_dropout:g} cannot be had on {_end(asked.parameters[0])}, experts in one tensor; set "
            "lora.lora_dropout=0, or name other target_modules"
        )
    return _tried(model, asked, knobs, everything)


def _asked(model: nn.Module, ends: list[str] | None, layers: tuple[int, ...] | None) -> Targets:
    """Linear layers and batches of matrices of the decoder blocks whose names end so (None: all but routers), in `layers`, and not frozen."""
    inside, known, owners = blocks.of(model), matrices.stored(model), matrices.owners(model)
    choosing = matrices.routers(model) if ends is None else frozenset()
    modules, parameters, transposed = [], [], False
    for name, how in known.items():
        layer, (module, leaf) = inside.index(name), owners[name]
        if layer is None or (layers is not None and layer not in layers) or not module._parameters[leaf].requires_grad:
            continue
        own = name.removesuffix(".weight") if leaf == "weight" else name
        if ends is not None and own.rpartition(".")[2] not in ends:
            continue
        if leaf == "weight" and matrices.is_linear(module):
            if own not in choosing:
                modules.append(own)
                transposed = how.transposed
        elif how.count is not None or leaf != "weight" or ends is not None:
            parameters.append(name)  # a router's 2-D `weight` only where it is named
    return Targets(tuple(modules), tuple(parameters), transposed)


def ends(model: nn.Module) -> frozenset[str]:
    """What target modules may be called: last parts of the names of what may be a weight matrix in the decoder blocks. Also of a model without
    weights; whether each can be adapted is seen by `of`."""
    inside = blocks.of(model)
    return frozenset(_end(name) for name, (module, leaf) in matrices.owners(model).items() if inside.holds(name) and matrices.may_be(module, leaf))


def _all_there(model: nn.Module, names: list[str]) -> None:
    """Raises StrategyError for a name that no linear layer or batch of the decoder blocks has, in any layer."""
    inside = blocks.of(model)
    there = {_end(name) for name in matrices.stored(model) if inside.holds(name)}
    for name in names:
        if name not in there:
            raise StrategyError(
                f"lora.target_modules: no linear layer of the decoder blocks is called {name!r}; there are {', '.join(sorted(there))} "
                "(all-linear for all)"
            )


def _end(name: str) -> str:
    """What users call a target: the last part of its name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _shared(model: nn.Module, targets: Targets) -> frozenset[str]:
    """Targets whose weight other targets have too (Zamba2's shared blocks)."""
    owners, places = matrices.owners(model), {}
    for name in (*targets.modules, *targets.parameters):
        module, leaf = owners[name if name in owners else f"{name}.weight"]
        places.setdefault(id(module._parameters[leaf]), []).append(name)
    return frozenset(name for names in places.values() if len(names) > 1 for name in names)


def _without(targets: Targets, gone: frozenset[str], why: str, everything: bool) -> Targets:
    """The targets without those in `gone`. Raises StrategyError where they were named, or nothing is left."""
    if not gone:
        return targets
    ends = sorted({_end(name) for name in gone})
    kept = replace(
        targets, modules=tuple(name for name in targets.modules if name not in gone), left_out=(*targets.left_out, *((end, why) for end in ends)),
        parameters=tuple(name for name in targets.parameters if name not in gone),
    )  # fmt: skip
    if not everything or not kept.names:
        rest = sorted({_end(name) for name in kept.names})
        remedy = f"leave it out of target_modules ({', '.join(rest)} are left)" if rest else "train this model with full"
        raise StrategyError(f"lora.target_modules: {', '.join(ends)} cannot be adapted: {why}; {remedy}")
    return kept


# ------------------------------------------------------------------------------------------------ what the model's own code does




















# ------------------------------------------------------------------------------------------------ what peft does


def _tried(model: nn.Module, targets: Targets, knobs: Knobs, everything: bool) -> Targets:
    """The targets as peft makes exactly them. Layers it would take for others are given as parameters."""
    wrong: set[str] = set()
    for _ in range(TRIES):
        try:
            made = _made(model, targets, knobs)
        except ValueError as error:
            if not (refused := _refused(error, targets)):
                raise StrategyError(f"lora: peft refuses this model: {' '.join(str(error).split())[:300]}") from error
            targets = _without(targets, refused, "peft refuses it, since this family's kernels read its weight past it", everything)
            continue
        wrong = made ^ targets.names
        lost = [name for name in targets.modules if f"{name}.weight" not in made]
        if not lost:
            break
        ends = {_end(name) for name in lost}
        # every layer of that name, since what peft renames it renames everywhere
        turned = tuple(f"{name}.weight" for name in targets.modules if _end(name) in ends)
        targets = replace(
            targets, modules=tuple(name for name in targets.modules if _end(name) not in ends), parameters=(*targets.parameters, *turned)
        )
    if wrong:
        raise StrategyError(
            f"lora: peft would adapt other weights than asked for ({len(wrong)} differ, such as {sorted(wrong)[0]}); name target_modules that this "
            "model has, or train it with full"
        )
    if knobs.lora_dropout and targets.parameters:
        raise StrategyError(
            f"lora.lora_dropout={knobs.lora_dropout:g} cannot be had on {_end(targets.parameters[0])} of this family, which peft adapts as a "
            "parameter; set lora.lora_dropout=0"
        )
    return targets


def _refused(error: ValueError, targets: Targets) -> frozenset[str]:
    """The targets that peft names in its refusal of state-space models."""
    found = re.search(r"Module '([^']+)' is incompatible", str(error))
    return frozenset(name for name in (*targets.modules, *targets.parameters) if found and _end(name) == found.group(1).rpartition(".")[2])


def _made(model: nn.Module, targets: Targets, knobs: Knobs) -> frozenset[str]:
    """Names of the parameters that peft puts an adapter on, tried on a copy of the model without weights. Raises what peft raises."""
    from peft import get_peft_model

    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return _adapted_names(get_peft_model(copy.deepcopy(model, memo), targets.config(knobs), low_cpu_mem_usage=True))


def _adapted_names(model: nn.Module) -> frozenset[str]:
    found = set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer") and len(module.lora_A):
            found.add(f"{original_name(name)}.{getattr(module, 'parameter_name', 'weight')}")
    return frozenset(found)


def check_same(model: nn.Module, targets: Targets) -> None:
    """Raises StrategyError where the adapters that were made are not the targets."""
    wrong = {one.parameter for one in adapters(model).values()} ^ targets.names
    if wrong:
        raise StrategyError(f"lora: peft made other adapters than asked for: {', '.join(sorted(wrong)[:3])}; this is a fault of ours, report it")


# ------------------------------------------------------------------------------------------------ what is loaded again






