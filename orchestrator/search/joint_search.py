"""The model over all recipes beside the studies: what it knows is read from them, what it proposes is put into one of them.

Nothing is kept here that the trial records do not hold, so a restored search asks what an undisturbed one would have: the random numbers of the
nth trial are those of (search.sampler_seed, n), and trials are read in the order of their ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from orchestrator.config import Experiment
from orchestrator.search.joint import Joint, Known, Proposal, Recipe
from orchestrator.search.points import key
from orchestrator.search.recipe_study import RecipeStudy
from orchestrator.search.samplers import JOINT

INFEASIBLE = 1.0
"""Told for a constraint that was not measured. Rates differ by at most 1, so nothing measured looks worse."""
ENDED, UNMEASURED = "ended", "unmeasured"
"""Attributes of a trial in its study: how it ended (`Studies.tell`), and constraints that were told and not measured."""
LEAST_LIMIT = 0.02
"""A limit below this is taken as this when violations are measured in limits."""
REUSED = 0.3
"""Cost of a trial that takes over another one's training, of one that trains."""
ENDED_COST = 0.3
"""Cost of a training that its probes end, of one that goes to its end and is evaluated."""


LEAST_TRIED = 1
"""Trials of a recipe before it may be left out."""
HOPELESS = 0.05
"""Chance of holding a better feasible configuration below which a recipe is left out."""


@dataclass(frozen=True)
class Next:
    """The next trial: of which recipe, and its point; None: the recipe's defaults, which wait in its study."""

    recipe: str
    params: dict[str, Any] | None
    again: bool = False
    """Whether the point was tried and is run once more, on another seed, before it counts as the best."""


class JointSearch:
    """Chooses recipe and point of each next trial. Build with `of`."""

    def __init__(self, recipes: Mapping[str, RecipeStudy], scales: Mapping[str, float], seed: int, adaptive: bool):
        self._recipes, self._scales, self._seed, self.adaptive = dict(recipes), dict(scales), seed, adaptive
        self._kinds = tuple(dict.fromkeys(kind_of(name) for name in scales))
        self._spaces = {name: recipe.space.distributions for name, recipe in recipes.items()}
        names = list(recipes)
        self.dropped: dict[str, str] = {}
        """Recipe -> why it is not asked any more, as it was when it was first left out."""
        self._first = [names[i] for i in np.random.default_rng([seed, 0]).permutation(len(names))]
        """Recipes in the order their defaults are tried: which one comes first must favour none."""

    @classmethod
    def of(cls, experiment: Experiment, recipes: Mapping[str, RecipeStudy], names: Sequence[str]) -> JointSearch | None:
        """The model that `search.sampler` asks for; None for one of Optuna's, and for a search of one trial."""
        search = experiment.search
        if search.sampler not in (JOINT, "auto") or search.sampler == "auto" and search.trials < 2:
            return None
        return cls(recipes, limits_of(experiment, names), search.sampler_seed, search.allocation == "adaptive")

    def next(self, open_recipes: Sequence[str], asked: int) -> Next | None:
        """The trial after `asked` ones, of one of these recipes; None where none of them has a new point.

        With adaptive allocation a new best is run on another seed first, and as soon as something feasible is known the model takes the recipe
        that it expects most of.
        """
        fresh = [name for name in self._first if name in open_recipes and not self._recipes[name].count]
        if fresh and self._recipes[fresh[0]].space.defaults:
            return Next(fresh[0], None)
        model = self.model()
        if self.adaptive:
            unsure = new_best(model.known)
            if unsure is not None:
                return Next(unsure.recipe, dict(unsure.params), again=True)
        if self.adaptive and model.best is not None:
            chosen = self._hopeful(model, open_recipes, asked)
        else:  # while nothing feasible is known, the model would insist on whatever is nearly safe (`benchmarks/samplers.py`)
            least = min(self._recipes[name].count for name in open_recipes)
            chosen = [name for name in open_recipes if self._recipes[name].count == least]
        found = model.propose({name: self._offer(name) for name in chosen}, np.random.default_rng([self._seed, 1, asked]))
        return None if found is None else Next(found.recipe, found.params)

    def _hopeful(self, model: Joint, open_recipes: Sequence[str], asked: int) -> list[str]:
        """The recipes that may hold the best, by the model as it is now; all of them while nothing feasible is known."""
        rng, found = np.random.default_rng([self._seed, 3, asked]), []
        for name in open_recipes:
            tried = sum(known.recipe == name and not known.running for known in model.known)
            chance = model.chance_of_best(name, rng) if tried >= LEAST_TRIED else 1.0
            if chance >= HOPELESS:
                found.append(name)
            elif name not in self.dropped:
                self.dropped[name] = (
                    f"{name} is left out after {tried} of its trials ({asked} in all): by the model of all trials the chance that it holds a better "
                    f"feasible configuration is {chance:.3f}, below {HOPELESS:g}"
                )
        return found or list(open_recipes)

    def model(self) -> Joint:
        """With everything that is known now."""
        return Joint(self._spaces, self._kinds, self._known())

    def completed(self, name: str, given: Mapping[str, Any], asked: int) -> dict[str, Any]:
        """A point of the recipe with these values, the rest by the model; for defaults that name a part of the parameters."""
        space = self._recipes[name].space
        if set(given) >= set(space.distributions):
            return dict(given)
        found: Proposal | None = self.model().propose({name: Recipe(fixed=given)}, np.random.default_rng([self._seed, 2, asked]))
        assert found is not None, "a point with nothing left out can always be drawn"
        return found.params

    def _offer(self, name: str) -> Recipe:
        recipe = self._recipes[name]
        fixed = recipe.shared()
        cost = REUSED if fixed else 1.0
        return Recipe(fixed, frozenset(recipe.seen), cost, ENDED_COST if recipe.space.ends_early and not fixed else cost)

    def _known(self) -> list[Known]:
        found: list[tuple[int, Known]] = []
        for name, recipe in self._recipes.items():
            for trial in recipe.study.get_trials(deepcopy=False):
                known = self._trial(name, trial) if "trial_id" in trial.user_attrs else None
                if known is not None:
                    found.append((int(trial.user_attrs["trial_id"][1:]), known))
        return [known for _, known in sorted(found, key=lambda pair: pair[0])]

    def _trial(self, name: str, trial: FrozenTrial) -> Known | None:
        """What a study's trial says; None for one that says nothing: cancelled, or failed by no fault of its own."""
        if trial.state == TrialState.RUNNING:
            return Known(name, trial.params, running=True)
        if trial.state == TrialState.COMPLETE:
            return Known(name, trial.params, self._violations(trial), float(trial.value))
        ended = trial.user_attrs.get(ENDED)
        if ended not in ("stopped", "failed", "complete"):
            return None
        violations = self._violations(trial)  # a training that broke down is as good as an unsafe one: nothing to go back to
        return Known(name, trial.params, violations or {self._kinds[0]: INFEASIBLE / min(self._scales.values())}, ended_early=True)

    def _violations(self, trial: FrozenTrial) -> dict[str, float]:
        """Kind -> largest measured violation of that kind, in limits."""
        found: dict[str, float] = {}
        for name, value in trial.constraints.items():
            if name not in trial.user_attrs.get(UNMEASURED, ()):
                kind = kind_of(name)
                found[kind] = max(found.get(kind, -math.inf), value / self._scales[name])
        return found


def new_best(known: Sequence[Known]) -> Known | None:
    """The trial that would be the best and was tried on one seed only: feasible there, and of a higher score than what stood on two; None
    where there is none, or its second seed runs.

    A search that goes where results are good finds lucky ones: without this the best is a lottery's winner in a fifth to a third of searches.
    """
    points: dict[tuple[str, str], list[Known]] = {}
    for one in known:
        points.setdefault((one.recipe, key(one.params)), []).append(one)
    stands = [float(np.mean([one.score for one in trials])) for trials in points.values() if len(trials) > 1 and all(t.feasible for t in trials)]
    single = [trials[0] for trials in points.values() if len(trials) == 1 and trials[0].feasible]
    best = max(single, key=lambda one: one.score, default=None)
    waits = any(len(trials) > 1 and any(one.running for one in trials) for trials in points.values())
    return best if best is not None and not waits and best.score > max(stands, default=-math.inf) else None


def kind_of(name: str) -> str:
    """`degradation` of `degradation/<suite>`: limits of one kind are broken together more often than not, and are modelled by the worst."""
    return name.partition("/")[0]


def limits_of(experiment: Experiment, names: Sequence[str]) -> dict[str, float]:
    """Constraint -> its limit, at least LEAST_LIMIT: the unit that its violations are measured in."""
    limits = experiment.safety.limits
    drops = {f"external/{one.name}": one.max_drop for one in experiment.safety.external}
    own = {
        "degradation": limits.max_degradation, "over_refusal_rise": limits.max_over_refusal_rise, "asr": limits.max_asr,
        "worst_case": limits.max_worst_case_degradation,
    }  # fmt: skip
    return {name: max(LEAST_LIMIT, drops.get(name) or own.get(kind_of(name)) or limits.max_degradation) for name in names}
