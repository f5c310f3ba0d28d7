"""One recipe's Optuna study with what Optuna does not keep: which points ran, in which order, and what the next one shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna

from orchestrator.search.spaces import RecipeSpace


@dataclass
class RecipeStudy:
    """One recipe's study, and what was asked of it."""

    space: RecipeSpace
    study: optuna.Study
    sampler: Callable[[int], optuna.samplers.BaseSampler]
    """Seed -> sampler."""
    seed: int
    per_training: int = 1
    """Trials that share one training, where the recipe has parameters that act after it."""
    seen: dict[str, int] = field(default_factory=dict)
    """Point (canonical JSON of the sampled parameters) -> number of the trial that ran it."""
    accepted: list[int] = field(default_factory=list)
    """Numbers of the trials that ran, in the order they were asked."""
    passed_over: list[dict[str, Any]] = field(default_factory=list)
    """Of the trial that is asked next."""
    exhausted: bool = False

    @property
    def count(self) -> int:
        return len(self.accepted)

    def shared(self) -> dict[str, Any]:
        """The training's parameters that the next trial takes over from the first of its group; empty for the first."""
        place = self.count % self.per_training
        if not place:
            return {}
        first = self.study.get_trials(deepcopy=False)[self.accepted[self.count - place]]
        return {key: value for key, value in first.params.items() if key not in self.space.after_training}

    def may_end_early(self, number: int) -> bool:
        """Whether a trial that ran need not go to its end; a recipe's first one has to."""
        return self.space.ends_early and self.accepted[:1] != [number]
