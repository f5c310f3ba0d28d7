"""One Optuna study per recipe in one journal file, under one budget; every study is told score and constraints.

Knows Optuna and nothing of Ray. What it guards against (Optuna 5): a trial without constraints counts as feasible; a constraint
is written once and NaN is refused; GPSampler wants the same constraints on every trial; a sampler's random state is not in the
storage. So every trial that is told anything carries every named constraint, set before `tell`, what is missing is infeasible, and
every ask gets a sampler seeded by how many trials its recipe had: a restored search goes on as if nothing had happened.

States told: complete with a finite score -> COMPLETE; stopped by the monitor -> PRUNED (its constraints still steer TPE);
failed, cancelled or without a score -> FAIL, which samplers ignore.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from orchestrator import seeds
from orchestrator.config import Experiment
from orchestrator.errors import ConfigError, StorageError, UnknownNameError
from orchestrator.ranges import RecipeSpace

INFEASIBLE = 1.0
"""Told for a constraint that was not measured. Rates differ by at most 1, so nothing measured looks worse."""

RE_ASKS = 5
"""How often a study is asked again when it proposes what was tried."""

SAMPLERS = ("tpe", "gp", "random", "nsga2")


@dataclass(frozen=True)
class Asked:
    """One trial to run."""

    trial_id: str
    recipe: str
    params: dict[str, Any]
    """Sampled and pinned parameters together."""
    resumed: bool = False
    """Whether an interrupted driver had started it already: it may go on from its checkpoint."""


Finished = dict[str, tuple[str, float | None, dict[str, float | None]]]
"""Trial id -> (state, score, constraints), as `Studies.tell` takes them."""


@dataclass
class _Recipe:
    space: RecipeSpace
    study: optuna.Study
    sampler: Callable[[int], optuna.samplers.BaseSampler]
    """Seed -> sampler."""
    seed: int
    per_training: int = 1
    """Trials that share one training, where the recipe has parameters that act after it."""
    seen: dict[str, int] = field(default_factory=dict)
    """Point (canonical JSON of the sampled parameters) -> number of the trial that ran it."""
    count: int = 0
    exhausted: bool = False


def make_sampler(name: str, seed: int, budget: int, *, early_stopping: bool = False) -> optuna.samplers.BaseSampler:
    """Sampler by name for a study that will see about `budget` trials.

    Random start-up trials are at most a third of the budget (Optuna's 10 would leave small searches random). Raises
    UnknownNameError, and ConfigError for `nsga2` with early stopping: it cannot learn from a trial that has no score.
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


class Studies:
    """The search of one experiment. Build with `create` or `restore`; then `ask` and `tell` until `ask` returns None."""

    def __init__(self, recipes: dict[str, _Recipe], trials: int, constraint_names: Sequence[str]):
        self._recipes = recipes
        self._trials = trials
        self._names = tuple(constraint_names)
        self._running: dict[str, tuple[str, optuna.Trial]] = {}
        self._next = 1 + max((_number(t) for r in recipes.values() for t in r.study.get_trials(deepcopy=False)), default=0)

    @classmethod
    def create(cls, experiment: Experiment, spaces: dict[str, RecipeSpace], constraint_names: Sequence[str]) -> Studies:
        """New studies in `search.storage` (else `<output.dir>/study.journal`). Raises StorageError where they exist already."""
        return cls._open(experiment, spaces, constraint_names, restored=False)

    @classmethod
    def restore(
        cls, experiment: Experiment, spaces: dict[str, RecipeSpace], constraint_names: Sequence[str], finished: Finished | None = None
    ) -> Studies:
        """Go on with an interrupted search. `finished`: how the trials ended whose records are in the output folder, by trial id.

        A trial left RUNNING is told its result where it has a record (its driver died between writing and telling); every other one
        without a record is closed as FAIL and asked again first, under the same id. Without `finished`, what the studies were told
        counts. Raises StorageError where there is nothing to go on with.
        """
        path = storage_path(experiment)
        if not path.exists():
            raise StorageError(f"{path} does not exist, so there is no search to go on with; start a new one")
        return cls._open(experiment, spaces, constraint_names, restored=True, finished=finished)

    @classmethod
    def _open(cls, experiment, spaces, constraint_names, *, restored: bool, finished: Finished | None = None) -> Studies:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        search = experiment.search
        storage = open_storage(experiment)
        budget = max(1, search.trials // len(spaces))
        early = bool(experiment.monitor.actions - {"log"})
        make = functools.partial(make_sampler, search.sampler, budget=budget, early_stopping=early)
        recipes = {}
        for position, (name, space) in enumerate(spaces.items()):
            study_name = f"{experiment.name}/{name}"
            seed = (search.sampler_seed * 1009 + position) * 100_003
            try:
                if restored:
                    study = optuna.load_study(study_name=study_name, storage=storage, sampler=make(seed))
                else:
                    study = optuna.create_study(study_name=study_name, storage=storage, sampler=make(seed), direction="maximize")
            except optuna.exceptions.DuplicatedStudyError as error:
                raise StorageError(f"{storage_path(experiment)} holds a study {study_name!r} already; set "
                                   "search.storage or output.dir to another place") from error
            except KeyError as error:
                raise StorageError(f"{storage_path(experiment)} holds no study {study_name!r}, so there is nothing to resume") from error
            recipes[name] = _Recipe(space, study, make, seed, search.trials_per_training if space.after_training else 1)
        studies = cls(recipes, search.trials, constraint_names)
        for recipe in recipes.values():
            studies._rebuild(recipe, finished) if restored else studies._enqueue(recipe)
        return studies

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self) -> Asked | None:
        """The next trial: of the recipe with the fewest so far. None when the budget or every recipe's space is used up."""
        while sum(recipe.count for recipe in self._recipes.values()) < self._trials:
            open_recipes = [name for name, recipe in self._recipes.items() if not recipe.exhausted]
            if not open_recipes:
                return None
            name = min(open_recipes, key=lambda key: self._recipes[key].count)
            trial = self._ask_new(self._recipes[name])
            if trial is not None:
                return self._accept(name, trial)
            self._recipes[name].exhausted = True
        return None

    def _accept(self, name: str, trial: optuna.Trial) -> Asked:
        recipe = self._recipes[name]
        trial_id = trial.user_attrs.get("resumes")
        resumed = trial_id is not None
        if not resumed:
            trial_id = f"t{self._next:04d}"
            self._next += 1
        trial.set_user_attr("trial_id", trial_id)
        recipe.seen[_point(trial.params)] = trial.number
        recipe.count += 1
        self._running[trial_id] = (name, trial)
        return Asked(trial_id, name, {**recipe.space.fixed, **trial.params}, resumed)

    def _ask_new(self, recipe: _Recipe) -> optuna.Trial | None:
        if len(recipe.seen) >= recipe.space.size:
            return None
        for attempt in range(RE_ASKS):
            recipe.study.sampler = self._sampler(recipe, RE_ASKS * recipe.count + attempt)
            trial = recipe.study.ask(recipe.space.distributions)
            if _point(trial.params) not in recipe.seen:
                return trial
            self._tell_duplicate(recipe, trial)
        return self._ask_random(recipe)

    def _ask_random(self, recipe: _Recipe) -> optuna.Trial | None:
        """A random point that is new, with the group's training where that has settings left; the sampler insists on what it knows."""
        random = optuna.samplers.RandomSampler(seed=len(recipe.study.get_trials(deepcopy=False)))
        frozen = recipe.study.get_trials(deepcopy=False)[-1]
        shared = self._shared(recipe)
        for fixed in (shared, {}) if shared else ({},):
            for _ in range(500):
                point = {
                    key: fixed[key] if key in fixed else random.sample_independent(recipe.study, frozen, key, distribution)
                    for key, distribution in recipe.space.distributions.items()
                }
                if _point(point) not in recipe.seen:
                    recipe.study.enqueue_trial(point)
                    return recipe.study.ask(recipe.space.distributions)
        return None

    def _sampler(self, recipe: _Recipe, turn: int) -> optuna.samplers.BaseSampler:
        """A fresh sampler; inside a group of trials that share one training, the training's parameters are those of the group's first."""
        sampler, shared = recipe.sampler(recipe.seed + turn), self._shared(recipe)
        if not shared:
            return sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.PartialFixedSampler(shared, sampler)

    def _shared(self, recipe: _Recipe) -> dict[str, Any]:
        """The training's parameters that the next trial takes over from the first of its group; empty for the first."""
        place = recipe.count % recipe.per_training
        if not place:
            return {}
        by_number = {t.number: t for t in recipe.study.get_trials(deepcopy=False)}
        first = by_number[list(recipe.seen.values())[recipe.count - place]]
        return {key: value for key, value in first.params.items() if key not in recipe.space.after_training}

    def _tell_duplicate(self, recipe: _Recipe, trial: optuna.Trial) -> None:
        """A point that was tried is not run again: the study is told what is known of it, or FAIL while that still runs."""
        number = recipe.seen[_point(trial.params)]
        twin = recipe.study.get_trials(deepcopy=False)[number]
        trial.set_user_attr("duplicate_of", number)
        self._constrain(trial, dict(twin.constraints))
        if twin.state == TrialState.COMPLETE:
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
        finite = score is not None and math.isfinite(score)
        if state == "complete" and finite:
            told = TrialState.COMPLETE
            study.tell(trial, float(score))
        else:
            told = TrialState.PRUNED if state == "stopped" else TrialState.FAIL
            study.tell(trial, state=told)
        del self._running[trial_id]
        return told

    def _constrain(self, trial: optuna.Trial, values: dict[str, float | None]) -> None:
        for name in self._names:
            value = values.get(name)
            trial.set_constraint(name, float(value) if value is not None and math.isfinite(value) else INFEASIBLE)

    # -- keeping -----------------------------------------------------------------------------------------------------

    @property
    def trials(self) -> dict[str, list[FrozenTrial]]:
        """Optuna's record of every recipe's trials, duplicates included."""
        return {name: recipe.study.get_trials(deepcopy=False) for name, recipe in self._recipes.items()}

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of trials asked and not yet told."""
        return tuple(self._running)

    def _enqueue(self, recipe: _Recipe) -> None:
        if recipe.space.defaults:
            recipe.study.enqueue_trial(recipe.space.defaults)

    def _rebuild(self, recipe: _Recipe, finished: Finished | None) -> None:
        """Count what is finished, close what was running, and ask again first for what has no record."""
        trials = recipe.study.get_trials(deepcopy=False)
        waiting = {t.user_attrs.get("resumes") for t in trials if t.state == TrialState.WAITING}
        lost: dict[str, FrozenTrial] = {}
        for frozen in trials:
            trial_id = frozen.user_attrs.get("trial_id")
            known = frozen.state.is_finished() and "interrupted" not in frozen.user_attrs if finished is None else trial_id in finished
            if frozen.state == TrialState.RUNNING:
                self._close(recipe, frozen, (finished or {}).get(trial_id))
            if trial_id is None or frozen.state == TrialState.WAITING:
                continue
            if known:
                recipe.seen[_point(frozen.params)] = frozen.number
                lost.pop(trial_id, None)
            else:
                lost[trial_id] = frozen
        recipe.count = len(recipe.seen)
        for trial_id, frozen in lost.items():
            if trial_id not in waiting and _point(frozen.params) not in recipe.seen:
                recipe.study.enqueue_trial(frozen.params, user_attrs={"resumes": trial_id})

    def _close(self, recipe: _Recipe, frozen: FrozenTrial, outcome: tuple[str, float | None, dict[str, float | None]] | None) -> None:
        """End a trial that a dead driver left RUNNING: with its result where there is one, as FAIL otherwise."""
        trial = optuna.Trial(recipe.study, frozen._trial_id)
        state, score, constraints = outcome or ("interrupted", None, {})
        for name in self._names:
            if name not in frozen.constraints:
                value = constraints.get(name)
                trial.set_constraint(name, float(value) if value is not None and math.isfinite(value) else INFEASIBLE)
        if outcome is None:
            trial.set_user_attr("interrupted", True)
        if state == "complete" and score is not None and math.isfinite(score):
            recipe.study.tell(frozen.number, float(score))
        else:
            recipe.study.tell(frozen.number, state=TrialState.PRUNED if state == "stopped" else TrialState.FAIL)


def open_storage(experiment: Experiment) -> optuna.storages.BaseStorage:
    """The experiment's Optuna journal. Raises StorageError where its folder cannot be written, or something else lies there."""
    path = storage_path(experiment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    except OSError as error:
        raise StorageError(f"cannot write the search's journal {path}: {error}; set search.storage or output.dir") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is no journal of a search, or is damaged; restore it, or set search.storage or output.dir to another place"
        ) from error


def storage_path(experiment: Experiment) -> Path:
    """Where the Optuna journal is."""
    return Path(experiment.search.storage) if experiment.search.storage else experiment.output_dir / "study.journal"


def _point(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)


def _number(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get("trial_id", "t0")[1:])
