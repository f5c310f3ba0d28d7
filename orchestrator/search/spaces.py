"""What each recipe of an experiment may vary: the strategies' own spaces, minus pinned knobs, with the user's ranges on top.

Checked before any device is taken, and without Ray. Parameter names are flat: `learning_rate`, `lora.lora_r`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from orchestrator.config import Experiment, Training, recipe_items
from orchestrator.errors import ConfigError, UnknownNameError

RANGE_KEYS = ("type", "low", "high", "log", "step", "choices")


class SpaceProvider(Protocol):
    """The functions of the `search_spaces` package this module uses."""

    def space(self, strategies: list[str], *, num_layers: int, learning_rate: float) -> dict[str, BaseDistribution]: ...

    def defaults(self, strategies: list[str], *, num_layers: int, learning_rate: float) -> dict[str, Any]: ...

    def superseded(self, strategies: list[str], pinned: set[str]) -> set[str]: ...


@dataclass(frozen=True)
class RecipeSpace:
    """What one recipe's study samples."""

    recipe: str
    distributions: dict[str, BaseDistribution]
    """Sampled parameters; empty where everything is pinned: then the recipe runs once."""
    fixed: dict[str, Any]
    """Parameters pinned by `search.space`; part of every trial's `params`."""
    defaults: dict[str, Any]
    """First point tried: the papers' settings, moved inside the ranges. A parameter that has none is sampled."""
    after_training: frozenset[str] = frozenset()
    """Sampled parameters that do not change the training: trials that differ in them alone share one."""
    ends_early: bool = False
    """Whether a training of the recipe is ended where its probes prove it unsafe (`search.early_end`)."""

    @property
    def size(self) -> float:
        """Number of different points; infinite where a parameter is continuous."""
        return math.prod(_count(distribution) for distribution in self.distributions.values())


def resolve_space(experiment: Experiment, num_layers: int, provider: SpaceProvider | None = None) -> dict[str, RecipeSpace]:
    """Space of every recipe, by recipe name.

    `num_layers` is the model's (ranges of layer choices depend on it). Knobs pinned in a recipe item are not sampled.
    `search.space` replaces ranges by name in every recipe that has the parameter. Raises UnknownNameError for a name that no
    recipe has, ConfigError for a range that makes no sense.
    """
    if provider is None:
        import search_spaces as provider
    rate = experiment.training.learning_rate
    overrides = experiment.search.space
    spaces: dict[str, RecipeSpace] = {}
    known: dict[str, None] = {}
    pinned_anywhere: dict[str, str] = {}
    for name, recipe in zip(experiment.recipe_names, experiment.recipes, strict=True):
        items = recipe_items(recipe)
        strategies = [strategy for strategy, _ in items]
        pinned = {f"{strategy}.{knob}" for strategy, knobs in items for knob in knobs}
        pinned_anywhere |= dict.fromkeys(pinned, name)
        own = provider.space(strategies, num_layers=num_layers, learning_rate=rate)
        left_out = pinned | provider.superseded(strategies, pinned)
        own = {key: distribution for key, distribution in own.items() if key not in left_out}
        known |= dict.fromkeys(own)
        defaults = provider.defaults(strategies, num_layers=num_layers, learning_rate=rate)
        spaces[name] = replace(_overridden(name, own, defaults, overrides, _after_training(strategies)), ends_early=ends_early(experiment, items))
        _check_ends(spaces[name], dict(items), overrides, defaults)
    for key in overrides:
        if key not in known and key in pinned_anywhere:
            where = pinned_anywhere[key]
            raise ConfigError(f"search.space.{key}: the recipe {where!r} pins this knob; take the value out of the recipe to search it")
        if key not in known:
            raise UnknownNameError("parameter in search.space", key, known)
    return spaces


def ends_early(experiment: Experiment, items: list[tuple[str, dict[str, Any]]]) -> bool:
    """Whether trainings of a recipe, as [(strategy, pinned knobs)], end where their probes prove them unsafe (`search.early_end`).

    Not those that can come back: with safety rows a model that lost all of its refusals in the first quarter of a training may have them again
    at its end (in 4 of 10 such trainings of the embedded world's `obey`: `benchmarks/table`), and a method after training repairs what probes
    never see.
    """
    import strategies

    search, harmful = experiment.search, any(s.kind == "harmful" and s.constrains and s.phase == "always" for s in experiment.safety.suites)
    harmful = harmful and experiment.safety.limits.max_degradation < 1  # a limit of 1 allows every rise: no probe breaks it
    if not search.early_end or search.sampler == "nsga2" or experiment.monitor.actions - {"log"} or not harmful:
        return False
    methods = [strategies.get(name) for name, _ in items]
    return not any(method.may_recover or not method.changes_training or method.needs & {"safety", "harmful"} for method in methods)


def _check_ends(space: RecipeSpace, pinned: dict[str, dict[str, Any]], overrides: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Both ends of every range, every choice and every pinned value that the user gives is one the method takes; a trial would fail with it.

    Of the learning rate also where the range is the strategy's own: it follows `training.learning_rate`. Raises ConfigError.
    """
    import strategies.recipe
    from strategies.base import StrategyError

    for key in [*space.distributions, *space.fixed]:
        owner, dot, knob = key.partition(".")
        if dot and key not in overrides:
            continue
        others = {name.partition(".")[2]: value for name, value in defaults.items() if dot and name.startswith(f"{owner}.")}
        for value in [space.fixed[key]] if key in space.fixed else _ends(space.distributions[key]):
            try:
                if dot:
                    strategies.recipe.build([(owner, {**others, **pinned[owner], knob: value})])
                else:
                    Training(**{key: value})
            except StrategyError as error:
                raise ConfigError(f"search.space.{key} holds {value!r}, which cannot be used: {error}") from None
            except ValidationError as error:
                where = f"search.space.{key}" if key in overrides else f"the search around training.{key}"
                raise ConfigError(f"{where} reaches {value!r}: {error.errors()[0]['msg']}; narrow it") from None


def _ends(distribution: BaseDistribution) -> list[Any]:
    """The outermost values a distribution gives, or all of its choices."""
    return list(distribution.choices) if isinstance(distribution, CategoricalDistribution) else [distribution.low, distribution.high]


def _after_training(names: list[str]) -> tuple[str, ...]:
    """Prefixes of the parameters of methods that act only after training."""
    import strategies

    return tuple(f"{name}." for name in names if not strategies.get(name).changes_training)


def _overridden(
    recipe: str, own: dict[str, BaseDistribution], defaults: dict[str, Any], overrides: dict[str, Any], after: tuple[str, ...]
) -> RecipeSpace:
    distributions: dict[str, BaseDistribution] = {}
    fixed: dict[str, Any] = {}
    for key, original in own.items():
        if key not in overrides:
            distributions[key] = original
        elif isinstance(overrides[key], dict):
            distributions[key] = parse_range(key, overrides[key], original)
        else:
            fixed[key] = pin(key, overrides[key], original)
    start = {key: inside(distribution, defaults[key]) for key, distribution in distributions.items() if key in defaults}
    late = frozenset(key for key in distributions if key.startswith(after)) if after else frozenset()
    return RecipeSpace(recipe, distributions, fixed, {key: value for key, value in start.items() if value is not None}, late)


def parse_range(key: str, spec: dict[str, Any], original: BaseDistribution) -> BaseDistribution:
    """A range as written in the config: {choices: [..]} or {low, high, log?, step?, type?: float | int}.

    `type` is the strategy's own where it is not given. Raises ConfigError naming the parameter.
    """
    where = f"search.space.{key}"
    for name in spec:
        if name not in RANGE_KEYS:
            raise UnknownNameError(f"key in {where}", name, RANGE_KEYS)
    if "choices" in spec:
        choices = spec["choices"]
        if len(spec) > 1:
            others = ", ".join(name for name in spec if name != "choices")
            raise ConfigError(f"{where}: beside `choices`, {others} would be ignored; keep one of them")
        if not isinstance(choices, list | tuple) or not choices:
            raise ConfigError(f"{where}.choices={choices!r} must be a list with at least one value")
        values = [pin(key, choice, original) for choice in choices]
        if len(set(values)) < len(values):
            raise ConfigError(f"{where}.choices={choices!r} repeats a value; name each once")
        return CategoricalDistribution(values)
    if "low" not in spec or "high" not in spec:
        raise ConfigError(f"{where}={spec} needs `low` and `high`, or `choices`")
    own_type = "float" if isinstance(original, FloatDistribution) else "int" if isinstance(original, IntDistribution) else None
    kind = spec.get("type", own_type)
    if own_type is None:
        raise ConfigError(f"{where} is chosen from {list(original.choices)}; write {{choices: [...]}} instead of a range")
    if kind not in ("float", "int") or (own_type == "int" and kind == "float"):
        raise ConfigError(f"{where}.type={kind!r} does not fit; this parameter is of type {own_type}")
    if not isinstance(spec.get("log", False), bool):
        raise ConfigError(f"{where}.log={spec['log']!r} is neither true nor false")
    low, high = _number(where, "low", spec["low"], kind), _number(where, "high", spec["high"], kind)
    try:
        if kind == "int":
            return IntDistribution(low, high, log=bool(spec.get("log", False)), step=_number(where, "step", spec.get("step", 1), kind))
        step = spec.get("step")
        return FloatDistribution(low, high, log=bool(spec.get("log", False)), step=None if step is None else _number(where, "step", step, kind))
    except ValueError as error:
        raise ConfigError(f"{where}={spec}: {error}") from error


def pin(key: str, value: Any, original: BaseDistribution) -> Any:
    """One value of a parameter, in the type its own distribution has. Raises ConfigError where it cannot be."""
    where = f"search.space.{key}"
    if isinstance(value, list | tuple):
        raise ConfigError(f"{where}={value!r} is a list; write {{choices: {list(value)}}} to choose from it")
    if isinstance(original, FloatDistribution):
        return _number(where, "value", value, "float")
    if isinstance(original, IntDistribution):
        return _number(where, "value", value, "int")
    numbers = {type(choice) for choice in original.choices}
    if numbers <= {int, float}:
        return _number(where, "value", value, "int" if numbers == {int} else "float")
    if value not in original.choices:
        raise ConfigError(f"{where}={value!r} is not one of {list(original.choices)}")
    return value


def _number(where: str, name: str, value: Any, kind: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {name} {value!r} is not a number")
    if kind == "int" and value != int(value):
        raise ConfigError(f"{where}: {name} {value!r} is not a whole number, and this parameter is one")
    return int(value) if kind == "int" else float(value)


def inside(distribution: BaseDistribution, value: Any) -> Any | None:
    """The value moved to the nearest point of the distribution; None where a choice is not offered any more."""
    if isinstance(distribution, CategoricalDistribution):
        return value if value in distribution.choices else None
    value = min(max(value, distribution.low), distribution.high)
    if distribution.step is not None and not (isinstance(distribution, IntDistribution) and distribution.log):
        value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
        value = min(value, distribution.high)
    return int(value) if isinstance(distribution, IntDistribution) else float(value)


def _count(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if distribution.single():
        return 1
    if distribution.step is None:
        return math.inf
    return math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1
