"""How much of a figure's good values each searched knob explains: Optuna's PED-ANOVA (Watanabe et al. 2023) on finished trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LEAST = 8
"""Trials below which no importance is given."""
LOG = 10.0
"""Ratio of the largest to the smallest value from which a positive knob is looked at on a logarithmic scale."""


def importances(points: Sequence[Mapping[str, Any]], values: Sequence[float], *, higher: bool) -> dict[str, float]:
    """Knob -> importance, the largest first, summing to 1 (all 0 where nothing tells the good trials from the others).

    `points`: the knobs of each trial; only those that every trial has and that vary are looked at. `values`: the figure of each; `higher`: whether
    more of it is better. {} for fewer than LEAST trials, fewer than two such knobs, or a figure that is the same throughout. Raises ValueError for
    unequal lengths.
    """
    if len(points) != len(values):
        raise ValueError(f"importances need a value for each point, got {len(values)} for {len(points)}")
    common = [name for name in (points[0] if points else {}) if all(name in point for point in points)]
    spaces = {name: found for name in common if (found := _distribution([point[name] for point in points])) is not None}
    if len(points) < LEAST or len(spaces) < 2 or len(set(values)) < 2:
        return {}
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize" if higher else "minimize")
        for point, value in zip(points, values, strict=True):
            params = {name: _told(point[name], spaces[name]) for name in spaces}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=dict(spaces), value=float(value)))
        found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    finally:
        optuna.logging.set_verbosity(level)
    return {name: float(share) for name, share in sorted(found.items(), key=lambda one: -one[1])}


def _distribution(values: Sequence[Any]) -> BaseDistribution | None:
    """The range that values were drawn from, as far as they show it; None where they are all the same."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if len({repr(value) for value in values}) < 2:
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = min(values), max(values)
    log = low > 0 and high / low >= LOG
    whole = all(isinstance(value, int) for value in values)
    return IntDistribution(low, high, log=log) if whole else FloatDistribution(float(low), float(high), log=log)


def _told(value: Any, distribution: BaseDistribution) -> Any:
    from optuna.distributions import CategoricalDistribution

    return str(value) if isinstance(distribution, CategoricalDistribution) else value
