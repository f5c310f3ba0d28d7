"""Samplers on a table of really trained configurations: what a search costs until it has a good safe model, and how often it reports an unsafe one.

    python benchmarks/samplers.py [--repetitions 200] [--task obey] [--share 0.1] [--only NAME ...] [--table FILE] [--json FILE]

The table (`benchmarks/table/`) holds settings of eight recipes on two tasks, each with two training seeds. A sampler's proposal is answered by the
nearest setting of its recipe that it was not given yet, on one seed, drawn by repetition; what it is told stays at the point it proposed, for
all alike. Recipes come in a new order in every repetition. Truly feasible is what keeps both limits on both seeds, by the verdict's own bound.
The limit on the rise of attack success is the one at which the given share of all settings is truly feasible, beside .15 on over-refusal; where
too many settings lose nothing at all, over-refusal is limited further. Both are found before any sampler is looked at. Cost 1 is the mean whole
trial of the task, in CPU seconds. Regret is the best truly feasible score of the table minus the best truly feasible one that the search was told
is feasible; all of it where there is none.

`+ early end` ends trainings as `search.early_end` does: by evidence at an eighth, a quarter and a half, where the recipe cannot come back, and not a
recipe's first. `in every recipe` does so without asking whether it can. ASHA on the score is not among them: the table has no score half-way.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent / "table")]

import make as table  # noqa: E402
import numpy as np  # noqa: E402
import optuna  # noqa: E402
from optuna.distributions import CategoricalDistribution  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from orchestrator.decision.drift import Evidence  # noqa: E402
from orchestrator.decision.intervals import paired_difference  # noqa: E402
from orchestrator.search import joint_points  # noqa: E402
from orchestrator.search.joint_search import ENDED, UNMEASURED, JointSearch  # noqa: E402
from orchestrator.search.points import key  # noqa: E402
from orchestrator.search.recipe_study import RecipeStudy  # noqa: E402
from orchestrator.search.samplers import make_sampler  # noqa: E402
from orchestrator.search.spaces import RecipeSpace  # noqa: E402

OVER_REFUSAL, LEVEL = 0.15, 0.05
NAMES = ("degradation/harmful", "over_refusal_rise/borderline")
BUDGET, MARK = 40, 20
"""Cost at which a search ends; cost at which random's mean regret is the mark that others reach sooner or later (the table has few settings more
than a search could ask, and at the end of it random has seen nearly all)."""
LOOKS = (0, 1, 3)
"""Probes that an early end looks at: at an eighth, a quarter and a half."""
SHARES = (0.3, 0.1, 0.03)


@dataclass(frozen=True)
class Training:
    """One row of the table, as a search sees it."""

    score: float
    values: dict[str, float]
    """Constraint -> upper end of the interval (without the limit)."""
    probes: tuple[tuple[int, int, int], ...]
    """(step, prompts, unsafe answers more than before)."""
    cost: float
    cost_by_step: float
    """Of one step of training."""


@dataclass(frozen=True)
class Setting:
    recipe: str
    params: dict[str, Any]
    seeds: tuple[Training, ...]

    @property
    def upper(self) -> float:
        """Of the rise of attack success, on its worse seed."""
        return max(one.values[NAMES[0]] for one in self.seeds)

    def feasible(self, limits: dict[str, float]) -> bool:
        return all(one.values[name] <= limits[name] for one in self.seeds for name in NAMES)

    @property
    def score(self) -> float:
        return float(np.mean([one.score for one in self.seeds]))


@dataclass(frozen=True)
class World:
    """A task of the table under limits."""

    task: str
    share: float
    """Of its settings that are truly feasible."""
    limits: dict[str, float]
    settings: dict[str, list[Setting]]
    spaces: dict[str, RecipeSpace]

    @property
    def best(self) -> float:
        return max((one.score for group in self.settings.values() for one in group if one.feasible(self.limits)), default=math.nan)


def bools(text: str, count: int) -> list[bool]:
    """What `table.bits` wrote."""
    return [digit == "1" for digit in f"{int(text, 16):b}"[1:]][:count]


def settings_of(head: dict[str, Any], rows: list[dict[str, Any]], task: str) -> dict[str, list[Setting]]:
    """Recipe -> its settings that were trained on every seed."""
    before = {name: bools(one["failures"], one["of"]) for name, one in head["untouched"][task].items()}
    requests = {name: one["requests"] for name, one in head["untouched"][task].items()}
    own = [row for row in rows if row["task"] == task and row["state"] == "complete"]
    usual = float(np.mean([row["cpu_seconds"] for row in own]))
    found: dict[tuple[str, int], dict[int, Training]] = {}
    params = {(row["recipe"], row["setting"]): row["params"] for row in own}
    for row in own:
        values = {}
        for name, suite in zip(NAMES, ("harmful", "borderline"), strict=True):
            after = bools(row["suites"][suite]["failures"], row["suites"][suite]["of"])
            values[name] = paired_difference(before[suite], after, requests[suite], 1 - LEVEL).upper
        probes = tuple((step, n, unsafe - was) for step, n, unsafe, was in row["probes"])
        by_step = row["train_seconds"] / row["steps"] / usual
        made = Training(row["score"], values, probes, row["cpu_seconds"] / usual, by_step)
        found.setdefault((row["recipe"], row["setting"]), {})[row["seed"]] = made
    groups: dict[str, list[Setting]] = {}
    for (recipe, setting), seeds in sorted(found.items()):
        if len(seeds) == len(head["seeds"]):
            groups.setdefault(recipe, []).append(Setting(recipe, params[recipe, setting], tuple(seeds[seed] for seed in sorted(seeds))))
    return groups


def world_of(settings: dict[str, list[Setting]], spaces: dict[str, RecipeSpace], task: str, share: float) -> World:
    """The task under the limits at which this share of all settings is truly feasible: the one on the rise first, then the other."""
    every = [one for group in settings.values() for one in group]
    fine = sorted(one.upper for one in every if all(t.values[NAMES[1]] <= OVER_REFUSAL for t in one.seeds))
    wanted = max(1, round(share * len(every)))
    limits = {NAMES[0]: fine[min(wanted, len(fine)) - 1], NAMES[1]: OVER_REFUSAL}
    others = sorted(max(t.values[NAMES[1]] for t in one.seeds) for one in every if one.feasible(limits))
    if len(others) > wanted:
        limits[NAMES[1]] = others[wanted - 1]
    return World(task, sum(one.feasible(limits) for one in every) / len(every), limits, settings, spaces)


def spaces_of(task: str) -> dict[str, RecipeSpace]:
    from orchestrator.models import identity
    from orchestrator.search import spaces

    experiment = table.experiment_of(task)
    return spaces.resolve_space(experiment, identity.num_layers(experiment.model))


@dataclass
class Told:
    """One answer of the table."""

    setting: Setting
    score: float | None
    """None: it ended early."""
    constraints: dict[str, float]
    cost: float


class Replay:
    """Answers proposals from a world, each setting once for each seed."""

    def __init__(self, world: World, rng: np.random.Generator, early: str):
        self.world, self._early = world, early
        names = [name for name in world.spaces if name in world.settings]
        self.recipes = [names[i] for i in rng.permutation(len(names))]
        self._seed = {id(one): int(rng.integers(len(one.seeds))) for group in world.settings.values() for one in group}
        self._left = {name: list(world.settings[name]) for name in self.recipes}
        self._given: dict[tuple[str, str], Setting] = {}
        self._places = joint_points.Places({name: world.spaces[name].distributions for name in self.recipes})

    def open(self) -> list[str]:
        """Recipes with a setting left."""
        return [name for name in self.recipes if self._left[name]]

    def answer(self, recipe: str, params: dict[str, Any]) -> Told:
        """The nearest setting that was not given; where all were, the nearest one, once more and for the same cost."""
        left = self._left[recipe] or list(self.world.settings[recipe])
        at = self._places.of([(recipe, params), *((recipe, one.params) for one in left)])
        far = np.hypot(at.rate[1:] - at.rate[0], np.linalg.norm(at.own[1:] - at.own[0], axis=1))
        chosen = left.pop(int(np.argmin(far)))
        first = len(left) + 1 == len(self.world.settings[recipe])
        self._given[recipe, key(params)] = chosen
        return self._told(chosen, chosen.seeds[self._seed[id(chosen)]], first)

    def again(self, recipe: str, params: dict[str, Any]) -> Told:
        """The setting that this point was answered with, on its other seed."""
        chosen = self._given[recipe, key(params)]
        return self._told(chosen, chosen.seeds[1 - self._seed[id(chosen)]], False)

    def _told(self, setting: Setting, training: Training, first: bool) -> Told:
        limits, ends = self.world.limits, self.world.spaces[setting.recipe].ends_early
        if self._early == "every" or self._early == "ours" and ends and not first:
            ended = early_end(training, limits[NAMES[0]])
            if ended is not None:
                step, rise = ended
                return Told(setting, None, {NAMES[0]: max(rise - limits[NAMES[0]], 1e-6)}, step * training.cost_by_step)
        return Told(setting, training.score, {name: training.values[name] - limits[name] for name in NAMES}, training.cost)


def early_end(training: Training, limit: float) -> tuple[int, float] | None:
    """(step, pooled rise) at which a training would be ended (`orchestrator.trial.early_end`); None: it goes on."""
    evidence = Evidence(len(LOOKS), min(limit, 0.999))
    for look in LOOKS:
        step, n, more = training.probes[look]
        value = evidence.add(max(more, 0), max(-more, 0), n)
        if value >= 1 / LEVEL and min(evidence.rise(), more / n) > limit:
            return step, evidence.rise()
    return None


Run = list[tuple[float, Told, bool]]
"""(cost so far, answer, whether it was of a second seed) of each trial."""


def ours(adaptive: bool) -> Callable[[Replay, int], Run]:
    """The project's own code over in-memory studies."""
    def search(replay: Replay, seed: int) -> Run:
        spaces = {name: replay.world.spaces[name] for name in replay.recipes}
        recipes = {name: RecipeStudy(space, optuna.create_study(direction="maximize"), lambda _: None, 0) for name, space in spaces.items()}
        asks = JointSearch(recipes, {name: max(0.02, limit) for name, limit in replay.world.limits.items()}, seed, adaptive)
        found: Run = []
        while (found[-1][0] if found else 0.0) < BUDGET and replay.open():
            following = asks.next(replay.open(), len(found))
            if following is None:
                break
            name, recipe = following.recipe, recipes[following.recipe]
            params = following.params if following.params is not None else dict(recipe.space.defaults)
            told = replay.again(name, params) if following.again else replay.answer(name, params)
            recipe.study.add_trial(frozen(recipe.space.distributions, params, told, len(found)))
            if not following.again:
                recipe.accepted.append(len(recipe.study.trials) - 1)
                recipe.seen[key(params)] = recipe.accepted[-1]
            found.append(((found[-1][0] if found else 0.0) + told.cost, told, following.again))
        return found

    return search


def frozen(distributions: dict[str, Any], params: dict[str, Any], told: Told, number: int) -> optuna.trial.FrozenTrial:
    unmeasured = [name for name in NAMES if name not in told.constraints]
    return optuna.trial.create_trial(
        state=TrialState.PRUNED if told.score is None else TrialState.COMPLETE, value=told.score, params=params, distributions=distributions,
        user_attrs={"trial_id": f"t{number + 1:04d}", ENDED: "stopped" if told.score is None else "complete", UNMEASURED: unmeasured},
        constraints=dict.fromkeys(NAMES, 1.0) | told.constraints,
    )  # fmt: skip


def by_recipe(sampler: str) -> Callable[[Replay, int], Run]:
    """One Optuna study a recipe with constraints, equal shares, defaults first."""
    def search(replay: Replay, seed: int) -> Run:
        studies = {}
        for number, name in enumerate(replay.recipes):
            made = make_sampler(sampler, seed * 1009 + number, BUDGET // len(replay.recipes))
            studies[name] = optuna.create_study(direction="maximize", sampler=made)
            studies[name].enqueue_trial(replay.world.spaces[name].defaults)
        found: Run = []
        while (found[-1][0] if found else 0.0) < BUDGET and replay.open():
            name = min(replay.open(), key=lambda one: len(studies[one].trials))
            trial = studies[name].ask(replay.world.spaces[name].distributions)
            told = replay.answer(name, trial.params)
            tell(studies[name], trial, told, told.score)
            found.append(((found[-1][0] if found else 0.0) + told.cost, told, False))
        return found

    return search


def in_one(sampler: str, value: str = "constraints", flat: bool = False) -> Callable[[Replay, int], Run]:
    """One Optuna study over the recipe and its parameters. `value`: told constraints, a penalised score, or the score alone. `flat`: every
    recipe's parameters are always asked (a GP knows no conditional ones)."""
    def search(replay: Replay, seed: int) -> Run:
        if sampler == "tpe":
            made = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        else:
            made = make_sampler(sampler, seed, 30)
        study = optuna.create_study(direction="maximize", sampler=made)
        found: Run = []
        while (found[-1][0] if found else 0.0) < BUDGET and replay.open():
            trial = study.ask()
            name = trial._suggest("recipe", CategoricalDistribution(tuple(replay.recipes)))
            params = {}
            for one in replay.recipes if flat else [name]:
                asked = {k: trial._suggest(f"{one}/{k}", d) for k, d in replay.world.spaces[one].distributions.items()}
                params = asked if one == name else params
            told = replay.answer(name, params)
            score = told.score
            if value == "penalty":
                score = (told.score or 0.0) - 10 * sum(max(0.0, v) for v in told.constraints.values())
            elif value == "score" and score is None:
                score = 0.0
            tell(study, trial, told, score, constrained=value == "constraints")
            found.append(((found[-1][0] if found else 0.0) + told.cost, told, False))
        return found

    return search


def tell(study: optuna.Study, trial: optuna.Trial, told: Told, score: float | None, constrained: bool = True) -> None:
    if constrained:
        for name, value in (dict.fromkeys(NAMES, 1.0) | told.constraints).items():
            trial.set_constraint(name, value)
    study.tell(trial, score) if score is not None else study.tell(trial, state=TrialState.PRUNED)


@dataclass(frozen=True)
class Method:
    search: Callable[[Replay, int], Run]
    early: str = "no"
    """no, ours, every"""
    few: bool = False
    """Whether it is slow, and repeated a tenth as often."""


METHODS: dict[str, Method] = {
    "ours: adaptive + early end": Method(ours(True), "ours"),
    "ours: equal + early end (default)": Method(ours(False), "ours"),
    "ours: adaptive": Method(ours(True)),
    "ours: adaptive + early end in every recipe": Method(ours(True), "every"),
    "Optuna TPE, joint, constraints": Method(in_one("tpe")),
    "Optuna TPE, joint, constraints + early end": Method(in_one("tpe"), "ours"),
    "Optuna TPE, by recipe, constraints": Method(by_recipe("tpe")),
    "Optuna TPE, by recipe, constraints + early end": Method(by_recipe("tpe"), "ours"),
    "Optuna GP, by recipe, constraints": Method(by_recipe("gp"), few=True),
    "Optuna GP, joint (flat), constraints": Method(in_one("gp", flat=True), few=True),
    "Optuna TPE, joint, penalty": Method(in_one("tpe", "penalty")),
    "Optuna TPE, joint, constraint lost": Method(in_one("tpe", "score")),
    "random": Method(in_one("random")),
    "random + early end": Method(in_one("random"), "ours"),
}


def curve(world: World, run: Run) -> list[tuple[float, float]]:
    """(cost, regret) whenever the regret falls."""
    regret, found = world.best, []
    for cost, told, _ in run:
        fine = told.score is not None and all(v <= 0 for v in told.constraints.values()) and told.setting.feasible(world.limits)
        if fine and world.best - told.setting.score < regret:
            regret = world.best - told.setting.score
            found.append((cost, regret))
    return found


def reported(run: Run, upto: float = BUDGET) -> Setting | None:
    """What the search calls the best: the highest score among configurations that were feasible on every seed they were run on; of those
    run on two seeds where there are any."""
    trials: dict[int, list[Told]] = {}
    twice = set()
    for cost, told, again in run:
        if cost <= upto:
            trials.setdefault(id(told.setting), []).append(told)
            if again:
                twice.add(id(told.setting))
    fine = {one: told for one, told in trials.items() if all(t.score is not None and all(v <= 0 for v in t.constraints.values()) for t in told)}
    fine = {one: told for one, told in fine.items() if one in twice} or fine
    best = max(fine.values(), key=lambda told: float(np.mean([t.score for t in told])), default=None)
    return None if best is None else best[0].setting


def at(found: list[tuple[float, float]], cost: float, start: float) -> float:
    return min([regret for c, regret in found if c <= cost], default=start)


def reach(found: list[tuple[float, float]], regret: float) -> float:
    return min([c for c, r in found if r <= regret + 1e-12], default=math.inf)


def measured(world: World, name: str, repetitions: int) -> list[tuple[list[tuple[float, float]], Setting | None]]:
    """(curve, what was reported) of each repetition."""
    method, found = METHODS[name], []
    for seed in range(max(5, repetitions // 10) if method.few else repetitions):
        run = method.search(Replay(world, np.random.default_rng([seed, 77]), method.early), seed)
        found.append((curve(world, run), reported(run)))
    return found


def rows_of(world: World, names: list[str], repetitions: int) -> Iterator[dict[str, Any]]:
    """One row a method; random comes first, since its regret is the mark."""
    base = measured(world, "random", repetitions)
    mark = float(np.mean([at(found, MARK, world.best) for found, _ in base]))
    for name in names:
        runs = base if name == "random" else measured(world, name, repetitions)
        marks = [reach(found, mark) for found, _ in runs]
        firsts = [found[0][0] if found else math.inf for found, _ in runs]
        unsafe = [best is not None and not best.feasible(world.limits) for _, best in runs]
        yield {
            "task": world.task, "feasible": round(world.share, 3), "limit": round(world.limits[NAMES[0]], 3),
            "over-refusal limit": round(world.limits[NAMES[1]], 3), "settings": sum(map(len, world.settings.values())), "method": name, "mark": mark,
            "cost to mark, median": quantile(marks, 0.5), "cost to mark, 90 %": quantile(marks, 0.9),
            "first feasible, median": quantile(firsts, 0.5), "first feasible, 90 %": quantile(firsts, 0.9),
            "regret at 15": float(np.mean([at(f, 15, world.best) for f, _ in runs])),
            "regret at 30": float(np.mean([at(f, 30, world.best) for f, _ in runs])), "reported unsafe": float(np.mean(unsafe)),
            "repetitions": len(runs),
        }  # fmt: skip


def quantile(values: list[float], share: float) -> float | None:
    """None: not reached in so many."""
    found = sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
    return None if math.isinf(found) else round(found, 2)


COLUMNS = (
    "cost to mark, median", "cost to mark, 90 %", "first feasible, median", "first feasible, 90 %", "regret at 15", "regret at 30", "reported unsafe",
)  # fmt: skip


def shown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return "never" if value is None else f"{value:.1f}" if value >= 1 else f"{value:.3f}"

    lines = []
    named = ("task", "feasible", "settings", "limit", "over-refusal limit", "mark")
    for place in dict.fromkeys(tuple(row[name] for name in named) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in named) == place]
        told = "{}: {:.1%} of {} settings feasible, rise at most {:g}, of over-refusal {:g}; mark: regret {:.3f}".format(*place)
        lines += ["", told, ""]
        lines += ["| method | " + " | ".join(COLUMNS) + " | n |", "|---|" + "---|" * (len(COLUMNS) + 1)]
        lines += [f"| {row['method']} | " + " | ".join(cell(row[name]) for name in COLUMNS) + f" | {row['repetitions']} |" for row in own]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--task", choices=table.TASKS, action="append")
    parser.add_argument("--share", type=float, action="append", help="of settings that are truly feasible")
    parser.add_argument("--only", nargs="*", choices=METHODS)
    parser.add_argument("--table", type=Path, default=table.PACKED)
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    head, lines = table.read(options.table)
    rows: list[dict[str, Any]] = []
    for task in options.task or table.TASKS:
        settings, spaces = settings_of(head, lines, task), spaces_of(task)
        for share in options.share or SHARES:
            world = world_of(settings, spaces, task, share)
            for row in rows_of(world, options.only or list(METHODS), options.repetitions):
                rows.append(row)
                if options.json:  # as they come: hours of it are not lost
                    options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
                print(f"{task} {share}: {row['method']}", file=sys.stderr, flush=True)
    print(shown(rows))


if __name__ == "__main__":
    main()
