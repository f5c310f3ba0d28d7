"""One Optuna study per recipe in one journal file, under one budget; every study is told score and constraints.

Knows Optuna and nothing of Ray. What it guards against (Optuna 5): a trial without constraints counts as feasible; a constraint
is written once and NaN is refused; GPSampler wants the same constraints on every trial; a sampler's random state is not in the
storage. So every trial that is told anything carries every named constraint, set before `tell`, what is missing is infeasible, and
every ask gets a sampler seeded by how many trials its recipe had: a restored search goes on as if nothing had happened.

A restored search is built anew from what the trial records say (`Past`), never from the journal, which is a cache.

States told: complete with a finite score -> COMPLETE; stopped by the monitor -> PRUNED (its constraints still steer TPE);
failed, cancelled or without a score -> FAIL, which samplers ignore.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from orchestrator.config import Experiment
from orchestrator.errors import StorageError
from orchestrator.search import points
from orchestrator.search.asked import Asked, Earlier, Outcome, Past
from orchestrator.search.joint_search import ENDED, INFEASIBLE, UNMEASURED, JointSearch
from orchestrator.search.journal import open_storage, reopen, storage_path
from orchestrator.search.recipe_study import RecipeStudy
from orchestrator.search.samplers import JOINT, SAMPLERS, JointSampler, make_sampler
from orchestrator.search.spaces import RecipeSpace
from orchestrator.trial.record_check import next_number, number_of

__all__ = [
    "INFEASIBLE", "SAMPLERS", "Asked", "Earlier", "Outcome", "Past", "Studies", "make_sampler", "open_storage", "past_of_journal", "storage_path",
]  # fmt: skip

RE_ASKS = 5
"""How often a study is asked again when it proposes what was tried."""


class Studies:
    """The search of one experiment. Build with `create` or `restore`; then `ask` and `tell` until `ask` returns None."""

    def __init__(
        self, recipes: dict[str, RecipeStudy], trials: int, constraint_names: Sequence[str], next_id: int = 1, second_seed: int | None = None
    ):
        self._recipes = recipes
        self._second_seed = second_seed
        self._rerun = 0
        """Trials on the second seed."""
        self._trials = trials
        self._names = tuple(constraint_names)
        self._running: dict[str, tuple[str, optuna.Trial]] = {}
        self._again: list[Asked] = []
        self._next = next_id
        self._joint: JointSearch | None = None

    @classmethod
    def create(cls, experiment: Experiment, spaces: dict[str, RecipeSpace], constraint_names: Sequence[str]) -> Studies:
        """New studies in `search.storage` (else `<output.dir>/study.journal`). Raises StorageError where they exist already."""
        return cls._made(experiment, spaces, constraint_names, open_storage(experiment), 1)

    @classmethod
    def restore(
        cls, experiment: Experiment, spaces: dict[str, RecipeSpace], constraint_names: Sequence[str], earlier: Earlier | None = None
    ) -> Studies:
        """Go on with an interrupted search: studies built anew from `earlier`, whatever became of the journal.

        Trials without an outcome are asked again first, under the same id. Without `earlier` what the journal holds counts; raises
        StorageError where that is not there or damaged.
        """
        if earlier is None:
            path = storage_path(experiment)
            if not path.exists():
                raise StorageError(f"{path} does not exist, so there is no search to go on with; start a new one")
            earlier = Earlier(past_of_journal(experiment, spaces))
        past = sorted(earlier.past, key=lambda one: number_of(one.trial_id))
        next_id = next_number((number_of(one.trial_id) for one in past), earlier.next_id)
        storage = reopen(experiment, [f"{experiment.name}/{name}" for name in spaces], earlier.say)
        return cls._made(experiment, spaces, constraint_names, storage, next_id, past)

    @classmethod
    def _made(cls, experiment, spaces, constraint_names, storage, next_id: int, past: Sequence[Past] = ()) -> Studies:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        search = experiment.search
        budget = max(1, search.trials // len(spaces))
        early = bool(experiment.monitor.actions - {"log"})
        named = {"auto": "tpe", JOINT: "random"}.get(search.sampler, search.sampler)  # where the joint model asks, no study's own sampler is used
        make = functools.partial(make_sampler, named, budget=budget, early_stopping=early)
        recipes = {}
        for position, (name, space) in enumerate(spaces.items()):
            study_name = f"{experiment.name}/{name}"
            seed = (search.sampler_seed * 1009 + position) * 100_003
            try:
                study = optuna.create_study(study_name=study_name, storage=storage, sampler=make(seed), direction="maximize")
            except optuna.exceptions.DuplicatedStudyError as error:
                raise StorageError(f"{storage_path(experiment)} holds a study {study_name!r} already; set "
                                   "search.storage or output.dir to another place") from error
            recipes[name] = RecipeStudy(space, study, make, seed, search.trials_per_training if space.after_training else 1)
        studies = cls(recipes, search.trials, constraint_names, next_id, search.second_seed)
        studies._joint = JointSearch.of(experiment, recipes, constraint_names)
        for one in past:
            studies._rebuild(one)
        for recipe in recipes.values():
            if not recipe.count and recipe.space.defaults:
                recipe.study.enqueue_trial(recipe.space.defaults)
        return studies

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self) -> Asked | None:
        """The next trial: one that was interrupted, else the joint model's, else of the recipe with the fewest so far. None when the budget
        or every recipe's space is used up."""
        if self._again:
            return self._again.pop(0)
        while self._asked < self._trials:
            open_recipes = [name for name, recipe in self._recipes.items() if not recipe.exhausted]
            if not open_recipes:
                return None
            again = False
            if self._joint is not None:
                name, trial, again = self._ask_joint(self._joint, open_recipes)
            else:
                name = min(open_recipes, key=lambda key: self._recipes[key].count)
                trial = self._ask_new(self._recipes[name])
            if trial is not None:
                return self._accept(name, trial, self._second_seed if again else None)
            self._recipes[name].exhausted = True
        return None

    @property
    def _asked(self) -> int:
        """Trials so far, further seeds included."""
        return self._rerun + sum(recipe.count for recipe in self._recipes.values())

    @property
    def notes(self) -> dict[str, str]:
        """Recipe -> a sentence on why it is not asked any more."""
        return dict(self._joint.dropped) if self._joint is not None else {}

    def _ask_joint(self, joint: JointSearch, open_recipes: list[str]) -> tuple[str, optuna.Trial | None, bool]:
        """(recipe, its new trial, whether it is of a known point on the second seed); (recipe, None, False) for a recipe without a new point."""
        used = [name for name in open_recipes if len(self._recipes[name].seen) >= self._recipes[name].space.size]
        if used:
            return used[0], None, False
        asked = self._asked
        found = joint.next(open_recipes, asked)
        if found is None:  # nothing new among the points it looked at: a small space that is nearly used up
            name = min(open_recipes, key=lambda key: self._recipes[key].count)
            return name, self._ask_random(self._recipes[name]), False
        recipe, params = self._recipes[found.recipe], found.params
        given = recipe.space.defaults if params is None else params
        propose = functools.cache(functools.partial(joint.completed, found.recipe, given, asked))
        recipe.study.sampler = JointSampler(recipe.space.distributions, propose)
        return found.recipe, recipe.study.ask(recipe.space.distributions), found.again

    def _accept(self, name: str, trial: optuna.Trial, seed: int | None) -> Asked:
        recipe = self._recipes[name]
        trial_id = f"t{self._next:04d}"
        self._next += 1
        trial.set_user_attr("trial_id", trial_id)
        if seed is None:
            recipe.seen[points.key(trial.params)] = trial.number
            recipe.accepted.append(trial.number)
        else:
            trial.set_user_attr("seed", seed)
            self._rerun += 1
        self._running[trial_id] = (name, trial)
        passed_over, recipe.passed_over = tuple(recipe.passed_over), []
        params = {**recipe.space.fixed, **trial.params}
        return Asked(trial_id, name, params, False, passed_over, _noted(recipe, trial.number), seed, recipe.may_end_early(trial.number))

    def _ask_new(self, recipe: RecipeStudy) -> optuna.Trial | None:
        if len(recipe.seen) >= recipe.space.size:
            return None
        for attempt in range(RE_ASKS):
            recipe.study.sampler = self._sampler(recipe, RE_ASKS * recipe.count + attempt)
            trial = recipe.study.ask(recipe.space.distributions)
            if points.key(trial.params) not in recipe.seen:
                return trial
            self._tell_duplicate(recipe, trial)
        return self._ask_random(recipe)

    def _ask_random(self, recipe: RecipeStudy) -> optuna.Trial | None:
        """A random point that is new, with the group's training where that has settings left; the sampler insists on what it knows."""
        random = optuna.samplers.RandomSampler(seed=len(recipe.study.get_trials(deepcopy=False)))
        frozen = recipe.study.get_trials(deepcopy=False)[-1]
        shared = recipe.shared()
        for fixed in (shared, {}) if shared else ({},):
            for _ in range(500):
                point = {
                    key: fixed[key] if key in fixed else random.sample_independent(recipe.study, frozen, key, distribution)
                    for key, distribution in recipe.space.distributions.items()
                }
                if points.key(point) not in recipe.seen:
                    recipe.study.enqueue_trial(point)
                    return recipe.study.ask(recipe.space.distributions)
        return None

    def _sampler(self, recipe: RecipeStudy, turn: int) -> optuna.samplers.BaseSampler:
        """A fresh sampler; inside a group of trials that share one training, the training's parameters are those of the group's first."""
        sampler, shared = recipe.sampler(recipe.seed + turn), recipe.shared()
        if not shared:
            return sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.PartialFixedSampler(shared, sampler)

    def _tell_duplicate(self, recipe: RecipeStudy, trial: optuna.Trial) -> None:
        """A point that was tried is not run again: the study is told what is known of it, or FAIL while that still runs."""
        number = recipe.seen[points.key(trial.params)]
        twin = recipe.study.get_trials(deepcopy=False)[number]
        trial.set_user_attr("duplicate_of", number)
        self._constrain(trial, dict(twin.constraints))
        complete = twin.state == TrialState.COMPLETE
        recipe.passed_over.append({
            "params": dict(trial.params), "of": twin.user_attrs["trial_id"], "complete": complete, "sampler": _noted(recipe, trial.number),
        })  # fmt: skip
        if complete:
            recipe.study.tell(trial, twin.value)
        else:
            recipe.study.tell(trial, state=TrialState.FAIL)

    # -- telling -----------------------------------------------------------------------------------------------------

    def tell(self, trial_id: str, state: str, score: float | None = None, constraints: dict[str, float | None] | None = None) -> TrialState:
        """Tell a trial's study how it went; returns the state it was told.

        `state`: "complete", "stopped" (by the monitor), "failed" or "cancelled". A constraint that is missing, None, NaN or
        infinite is told as infeasible. Raises ValueError for a constraint that was not announced, and whatever Optuna raises.
        """
        constraints = constraints or {}
        unknown = set(constraints) - set(self._names)
        if unknown:
            raise ValueError(f"constraints {sorted(unknown)} were not announced; announced: {list(self._names)}")
        name, trial = self._running[trial_id]
        study = self._recipes[name].study
        self._constrain(trial, constraints)
        trial.set_user_attr(ENDED, state)
        trial.set_user_attr(UNMEASURED, self._unmeasured(constraints))
        told = _end(state, score)
        study.tell(trial, float(score)) if told == TrialState.COMPLETE else study.tell(trial, state=told)
        del self._running[trial_id]
        return told

    def _constrain(self, trial: optuna.Trial, values: dict[str, float | None]) -> None:
        for name, value in self._all(values).items():
            trial.set_constraint(name, value)

    def _all(self, values: dict[str, float | None]) -> dict[str, float]:
        """Every announced constraint; what is not there is infeasible."""
        found = {name: values.get(name) for name in self._names}
        return {name: float(value) if value is not None and math.isfinite(value) else INFEASIBLE for name, value in found.items()}

    def _unmeasured(self, values: dict[str, float | None]) -> list[str]:
        """Announced constraints that are told without having been measured."""
        return [name for name in self._names if (value := values.get(name)) is None or not math.isfinite(value)]

    # -- keeping -----------------------------------------------------------------------------------------------------

    @property
    def trials(self) -> dict[str, list[FrozenTrial]]:
        """Optuna's record of every recipe's trials, duplicates included."""
        return {name: recipe.study.get_trials(deepcopy=False) for name, recipe in self._recipes.items()}

    def _rebuild(self, one: Past) -> None:
        """Add a past trial as the undisturbed study would hold it: what was passed over before it, then itself, running if it was."""
        recipe = self._recipes[one.recipe]
        by_id = {t.user_attrs["trial_id"]: t for t in recipe.study.get_trials(deepcopy=False) if "trial_id" in t.user_attrs}
        for known in one.passed_over:
            twin = by_id.get(known["of"])
            if twin is None:  # its records are gone: what it was told is, too
                continue
            complete = known["complete"] and twin.state == TrialState.COMPLETE
            outcome = ("complete" if complete else "failed", twin.value if complete else None, dict(twin.constraints))
            self._add(recipe, known["params"], outcome, {"duplicate_of": twin.number}, known["sampler"])
        again = one.seed is not None and one.seed == self._second_seed
        number = self._add(recipe, one.params, one.outcome, {"trial_id": one.trial_id} | ({"seed": one.seed} if again else {}), one.sampler)
        frozen = recipe.study.get_trials(deepcopy=False)[number]
        if again:
            self._rerun += 1
        else:
            recipe.accepted.append(number)
            recipe.seen.setdefault(points.key(frozen.params), number)
        if one.outcome is None:
            self._running[one.trial_id] = (one.recipe, optuna.Trial(recipe.study, frozen._trial_id))
            params = {**recipe.space.fixed, **frozen.params}
            ends = recipe.may_end_early(number)
            self._again.append(Asked(one.trial_id, one.recipe, params, True, one.passed_over, one.sampler, one.seed if again else None, ends))

    def _add(self, recipe: RecipeStudy, params: dict[str, Any], outcome: Outcome | None, attrs: dict[str, Any], noted: dict[str, int]) -> int:
        """Add a trial to a study, RUNNING without an outcome; returns its number."""
        distributions = recipe.space.distributions
        state, score, constraints = outcome or ("running", None, {})
        attrs = attrs if outcome is None else {**attrs, ENDED: state, UNMEASURED: self._unmeasured(constraints)}
        told = TrialState.RUNNING if outcome is None else _end(state, score)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            recipe.study.add_trial(optuna.trial.create_trial(
                state=told, params={key: params[key] for key in distributions}, distributions=distributions, user_attrs=attrs,
                system_attrs=dict(noted), value=float(score) if told == TrialState.COMPLETE else None,
                constraints=None if outcome is None else self._all(constraints),
            ))  # fmt: skip
        return len(recipe.study.get_trials(deepcopy=False)) - 1


def past_of_journal(experiment: Experiment, spaces: dict[str, RecipeSpace]) -> list[Past]:
    """What the journal says was asked, for trials of before the records said it. Raises StorageError where it cannot be read."""
    storage, found = open_storage(experiment), {}
    for name, space in spaces.items():
        try:
            study = optuna.load_study(study_name=f"{experiment.name}/{name}", storage=storage)
        except KeyError as error:
            raise StorageError(f"{storage_path(experiment)} holds no study of {name!r}, so there is nothing to resume") from error
        for trial in study.get_trials(deepcopy=False):
            trial_id = trial.user_attrs.get("trial_id")
            if isinstance(trial_id, str) and set(trial.params) == set(space.distributions):
                over = trial.state.is_finished() and "interrupted" not in trial.user_attrs
                state = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped"}.get(trial.state, "failed")
                outcome = (state, trial.value, dict(trial.constraints)) if over else None
                found[trial_id] = Past(trial_id, name, dict(trial.params), outcome, seed=trial.user_attrs.get("seed"))
    return list(found.values())


def _end(state: str, score: float | None) -> TrialState:
    if state == "complete" and score is not None and math.isfinite(score):
        return TrialState.COMPLETE
    return TrialState.PRUNED if state == "stopped" else TrialState.FAIL


def _noted(recipe: RecipeStudy, number: int) -> dict[str, int]:
    attrs = recipe.study.get_trials(deepcopy=False)[number].system_attrs
    return {key: value for key, value in attrs.items() if key.endswith(":generation")}
