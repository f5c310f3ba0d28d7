"""A point of a recipe's space as a record holds it: whether it is one, and what the sampler had given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator.search.spaces import RecipeSpace
from orchestrator.storage import files


def outside(space: RecipeSpace, params: dict[str, Any]) -> str | None:
    """Why parameters are no point of a recipe's space, in words; None where they are."""
    for key, value in space.fixed.items():
        if key not in params or files.plain(params[key]) != files.plain(value):
            return f"params.{key} is {params.get(key)!r:.60}, and {value!r:.60} is pinned"
    for key, distribution in space.distributions.items():
        if key not in params:
            return f"params.{key} is missing"
        if not _holds(distribution, params[key]):
            return f"params.{key}={params[key]!r:.60} is outside {_shown(distribution)}"
    stray = sorted(set(params) - set(space.fixed) - set(space.distributions))
    return f"params.{stray[0]} is no parameter of {space.recipe}" if stray else None


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return _choice(distribution, value) is not None
    if isinstance(value, bool) or not isinstance(value, int if isinstance(distribution, IntDistribution) else (int, float)):
        return False
    return bool(distribution._contains(value))


def _choice(distribution: CategoricalDistribution, value: Any) -> tuple[Any] | None:
    """The choice that a value of JSON stands for, in a tuple of one."""
    for choice in distribution.choices:
        if files.plain(choice) == value and isinstance(choice, bool) == isinstance(value, bool):
            return (choice,)
    return None


def sampled(space: RecipeSpace, params: dict[str, Any]) -> dict[str, Any]:
    """The sampled parameters of a point, as the sampler gave them before they went through JSON."""
    found = {}
    for key, distribution in space.distributions.items():
        choice = _choice(distribution, params[key]) if isinstance(distribution, CategoricalDistribution) else None
        found[key] = choice[0] if choice else float(params[key]) if isinstance(distribution, FloatDistribution) else params[key]
    return found


def _shown(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"the choices {list(distribution.choices)}"
    return f"{distribution.low:g} to {distribution.high:g}"


def key(params: Mapping[str, Any]) -> str:
    """A point as text, equal for equal points."""
    return json.dumps(dict(params), sort_keys=True, default=str)
