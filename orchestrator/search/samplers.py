"""Optuna's samplers by name, and the one that hands a study the point that the model over all recipes chose."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from orchestrator.config import seeds
from orchestrator.errors import ConfigError, UnknownNameError

SAMPLERS = ("tpe", "gp", "random", "nsga2")
"""Of one recipe each, as Optuna has them."""
JOINT = "joint"
"""The model over all recipes (`orchestrator.search.joint`)."""


def make_sampler(name: str, seed: int, budget: int, *, early_stopping: bool = False) -> optuna.samplers.BaseSampler:
    """Sampler by name for a study that will see about `budget` trials.

    Random start-up trials are at most a third of the budget (Optuna's 10 would leave small searches random). Raises
    UnknownNameError (`auto` and `joint` are no sampler of one study: `joint_search`), and ConfigError for `nsga2` with early
    stopping: it cannot learn from a trial that has no score.
    """
    if name not in SAMPLERS:
        raise UnknownNameError("search.sampler", name, SAMPLERS)
    startup, seed = min(10, max(2, budget // 3)), seeds.of_32_bits(seed)
    if name == "nsga2" and early_stopping:
        raise ConfigError("search.sampler=nsga2 cannot use trials that monitor.on_breach=stop ends; use tpe, or monitor.on_breach=log")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=startup)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, budget // 4)))


class JointSampler(optuna.samplers.BaseSampler):
    """Gives a study's next trial the point that a model of all studies proposes for it; `propose` is called once, when a value is wanted."""

    def __init__(self, distributions: dict[str, BaseDistribution], propose: Callable[[], dict[str, Any]]):
        self._distributions, self._propose = distributions, propose

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of the recipe's parameters, whatever was tried before."""
        return dict(self._distributions)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return {key: value for key, value in self._propose().items() if key in search_space} if search_space else {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Never needed for a parameter of the recipe's space. Raises ValueError for one that is not."""
        if param_name not in self._distributions:
            raise ValueError(f"{param_name} is no parameter of this recipe; it has {', '.join(self._distributions) or 'none'}")
        return self._propose()[param_name]
