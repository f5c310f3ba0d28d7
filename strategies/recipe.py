"""A recipe: strategies that run together, composed by phase. Knobs arrive as plain values and are coerced to their declared types."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

import strategies
from strategies.base import Batch, Engine, Generate, Strategy, StrategyError, TrainingData, unknown

Items = Sequence[tuple[str, Mapping[str, Any]]]


class Recipe:
    """Strategies in the order of the recipe. Finish and wrap run in that order, data by `data_rank`, setups by `setup_rank`, one may own
    the step."""

    def __init__(self, members: Sequence[Strategy], waiting: Sequence[Strategy] = ()):
        for method in waiting:
            _may_wait(method)
        members = [*members, *waiting]
        names = [s.name for s in members]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise StrategyError(f"a recipe names {', '.join(twice)} twice; name each strategy once, with all its knobs")
        owners = [s.name for s in members if s.owns_step()]
        if len(owners) > 1:
            raise StrategyError(f"{' and '.join(owners)} both replace a step's gradient, so they cannot run together; keep one of them")
        if {"full", "lora"} <= set(names):
            raise StrategyError("full trains every weight and lora none of them; keep one of them")
        for method in members:
            if method.changes_start and {"lora"} & set(names[: names.index(method.name)]):
                raise StrategyError(f"{method.name} changes the weights before training, lora adapts what it leaves: name {method.name} first")
        self.trains = all(method.trains for method in members)
        """False: the untouched model is measured with the recipe's defences, and nothing is trained."""
        _may_stay_untouched(members, self.trains)
        self.strategies = tuple(members)
        self._waiting = frozenset(s.name for s in waiting)

    @property
    def active(self) -> tuple[Strategy, ...]:
        """The strategies without those that wait."""
        return tuple(s for s in self.strategies if s.name not in self._waiting)

    def wake(self) -> None:
        """From now on the waiting strategies run too: with what they prepared of the untouched model before training."""
        self._waiting = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.strategies)

    def prepare_data(self, data: TrainingData) -> TrainingData:
        for strategy in sorted(self.strategies, key=lambda s: s.data_rank):
            data = _unchanged_rows(strategy, data) if strategy.name in self._waiting else strategy.prepare_data(data)
        for strategy in self.strategies:
            strategy.take_rows(data)
        return data

    def setup(self, model: nn.Module) -> nn.Module:
        for strategy in sorted(self.strategies, key=lambda s: s.setup_rank):
            model = _unchanged_model(strategy, model) if strategy.name in self._waiting else strategy.setup(model)
        return model

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        owner = next((s for s in self.active if s.owns_step()), None)
        return owner.step(engine, batches, step) if owner else {"loss": engine.gradient(batches)}

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for strategy in self.active:
            metrics |= strategy.after_step(engine, step)
        return metrics

    def end(self, engine: Engine) -> None:
        for strategy in self.active:
            strategy.end(engine)

    def system_prompt(self, system_prompt: str | None) -> str | None:
        """The system prompt of evaluation and serving."""
        for strategy in self.active:
            system_prompt = strategy.system_prompt(system_prompt)
        return system_prompt

    def finish(self, model: nn.Module) -> nn.Module:
        # a method that changed the start comes last: it may have to merge adapters that the others still want to see
        for strategy in sorted(self.active, key=lambda s: s.changes_start):
            model = strategy.finish(model)
        return model

    @property
    def wraps(self) -> bool:
        """Whether a strategy defends at inference time."""
        return any(type(s).wrap is not Strategy.wrap for s in self.active)

    @property
    def training_key(self) -> str | None:
        """Text that two recipes share when their trained models (before `finish`) are the same; None where every method trains."""
        if all(s.changes_training for s in self.strategies):
            return None
        return repr([(s.name, s.config) for s in self.strategies if s.changes_training])

    def wrap(self, generate: Generate) -> Generate:
        for strategy in self.active:
            generate = strategy.wrap(generate)
        return generate

    def facts(self, training: bool = False) -> dict[str, Any]:
        """What shows that the methods acted, as {strategy: {fact: value}}; strategies with nothing to say are left out. `training`: only
        of those that train."""
        return {s.name: facts for s in self.active if (s.changes_training or not training) and (facts := s.facts())}

    def inference_facts(self) -> dict[str, dict[str, int]]:
        """`facts` of the strategies that defend at inference: counts of this worker's share of the prompts."""
        return {s.name: s.facts() for s in self.active if type(s).wrap is not Strategy.wrap}

    def state_dict(self) -> dict[str, Any]:
        return {s.name: s.state_dict() for s in self.strategies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises StrategyError where the state is another recipe's."""
        if set(state) != set(self.names):
            raise StrategyError(f"the checkpoint is of the recipe {sorted(state)}, this one is {sorted(self.names)}; start the trial over")
        for strategy in self.strategies:
            strategy.load_state_dict(state[strategy.name])


def _may_stay_untouched(members: Sequence[Strategy], trains: bool) -> None:
    """Raises StrategyError where one method wants untouched weights and another one is there to change them."""
    changing = [s.name for s in members if s.changes_training or type(s).finish is not Strategy.finish]
    if not trains and changing:
        idle = next(s.name for s in members if not s.trains)
        raise StrategyError(f"{idle}.train=false leaves the weights untouched, so {', '.join(changing)} cannot be in the same recipe")


def _may_wait(method: Strategy) -> None:
    """Raises StrategyError for a method that cannot join in the middle of a training."""
    kind = type(method)
    if kind.changes_start or (kind.step is Strategy.step and kind.after_step is Strategy.after_step):
        raise StrategyError(f"{method.name} acts before or after training, so it cannot join at a breach; name a method of steps, say safegrad")


def _unchanged_rows(method: Strategy, data: TrainingData) -> TrainingData:
    """Let a waiting method read the rows. Raises StrategyError where it would change them."""
    made = method.prepare_data(data)
    if (made.task, made.batch_size) != (data.task, data.batch_size):
        raise StrategyError(f"{method.name} changes the training rows, so it cannot join at a breach; put it into the recipe from the start")
    return data


def _unchanged_model(method: Strategy, model: nn.Module) -> nn.Module:
    """Let a waiting method read the untouched model. Raises StrategyError where it would change what is trained."""
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    made = method.setup(model)
    if made is not model or before != [(name, p.requires_grad) for name, p in made.named_parameters()]:
        raise StrategyError(f"{method.name} changes what is trained, so it cannot join at a breach; put it into the recipe from the start")
    return model


def build(items: Items, waiting: Items = ()) -> Recipe:
    """The recipe of [(strategy name, knobs)]; knobs not given keep their defaults. `waiting`: strategies that prepare with the others
    but run only from `Recipe.wake` on.

    Raises StrategyError for unknown strategies and knobs (with the nearest names), values of the wrong type or outside their range,
    duplicates, and strategies that cannot run together. An empty list is plain fine-tuning.
    """
    return Recipe([_strategy(name, knobs) for name, knobs in items], [_strategy(name, knobs) for name, knobs in waiting])


def check(
    items: Items, zero_stage: int, num_workers: int, num_layers: int | None, available: set[str], waiting: Items = ()
) -> list[str]:
    """What `build` refuses, and what cannot run under this ZeRO stage, model or data; returns warnings. Raises StrategyError.

    `available` holds what there is of `Strategy.needs`; `num_layers` None leaves out what depends on the model's depth.
    """
    recipe = build(items, waiting)
    warnings: list[str] = []
    merging = [s.name for s in recipe.strategies if s.merges]
    if len(merging) > 1:
        warnings.append(f"{' and '.join(merging)} both change the trained weights; safety deltas add up twice, so measure each alone too")
    layers = frozenset(range(num_layers or 0))
    for strategy in sorted(recipe.strategies, key=lambda s: s.setup_rank):
        if zero_stage > strategy.max_zero_stage:
            raise StrategyError(
                f"{strategy.name} runs up to ZeRO stage {strategy.max_zero_stage}, not {zero_stage}: {strategy.zero_reason};"
                f" set deepspeed.zero_optimization.stage={strategy.max_zero_stage}"
            )
        for need in sorted(strategy.needs - set(available)):
            raise StrategyError(f"{strategy.name} needs {NEEDS.get(need, need)}")
        warnings += strategy.check(num_layers=num_layers, num_workers=num_workers)
        if num_layers is not None:
            layers = strategy.leaves(layers, num_layers)
    return warnings


NEEDS = {
    "safety": "safety rows: give safety.data",
    "harmful": "harmful answers to harmful prompts: give safety.harmful_data, or a column `rejected` in safety.data",
    "unaligned_base": "the model before its alignment: give model.unaligned_name_or_path",
    "reference": "the untouched model",
}


def _strategy(name: str, knobs: Mapping[str, Any]) -> Strategy:
    cls = strategies.get(name)
    fields = {f.name for f in dataclasses.fields(cls.Config)}
    for knob in knobs:
        if knob not in fields:
            raise unknown(f"knob of {name}", knob, fields) if fields else StrategyError(f"{name} has no knobs, so {knob!r} cannot be set")
    hints, values = typing.get_type_hints(cls.Config), {}
    for field in dataclasses.fields(cls.Config):
        if field.name in knobs:
            label = f"{name}.{field.name}"
            values[field.name] = _bounded(coerce(knobs[field.name], hints[field.name], label), field.metadata.get("max", MOST), label)
    return cls(cls.Config(**values))


MOST = 1_000_000
"""Bound of a knob's number where its field's metadata has no `max`: it catches slips of the pen, not ambition."""


def _bounded(value: Any, most: float, label: str) -> Any:
    """The value, where its size is one that anybody could mean. Raises StrategyError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > most:
        raise StrategyError(f"{label}={value:g} is beyond {most:g}, the largest that makes sense; correct it")
    return value


def coerce(value: Any, hint: Any, label: str) -> Any:
    """`value` as the declared type: "3e-4" for a float, "8" or 8.0 for an int, "true" for a bool, a list for a tuple.

    Raises StrategyError naming `label`, the value and what is wanted.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in options:
            return value
        raise StrategyError(f"{label}={value!r} is not one of {', '.join(map(str, options))}")
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(value, options, label)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(coerce(item, options[0], label) for item in value)
        raise StrategyError(f"{label}={value!r} is not a list")
    if hint is bool:
        text = str(value).lower()
        if text in ("true", "false"):
            return text == "true"
    elif hint is str:
        if isinstance(value, str):
            return value
    elif (number := _number(value)) is not None:
        if hint is float:
            return number
        if hint is int and number.is_integer():
            return int(number)
    raise StrategyError(f"{label}={value!r} is not {_NOUNS.get(hint, hint)}")


def _number(value: Any) -> float | None:
    try:
        number = None if isinstance(value, bool) else float(value)
        return number if number is None or math.isfinite(number) else None
    except (TypeError, ValueError, OverflowError):
        return None


_NOUNS = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}


def _coerce_union(value: Any, options: tuple[Any, ...], label: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return coerce(value, option, label)
        except StrategyError as error:
            errors.append(str(error))
    raise StrategyError(errors[0])
