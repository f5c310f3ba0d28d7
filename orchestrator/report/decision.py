"""What someone decides from: trade-offs that no other trial beats, what protects at which depth, which knob matters, what a recipe costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.decision.limits import Judgement
from orchestrator.decision.selection import Selection
from orchestrator.evaluation.attacks import depth_of
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.report import figures as summary
from orchestrator.report.numbers import MISSING, figure, number
from orchestrator.report.shown import param

Row = tuple[TrialResult, Judgement]
Table = dict[str, Any]


def measured(rows: Sequence[Row]) -> list[Row]:
    """Trials with both a task score and a measured degradation."""
    return [(r, j) for r, j in rows if j.task_score is not None and j.degradation is not None and j.degradation.n]


def front(rows: Sequence[Row]) -> list[Row]:
    """The Pareto front: measured trials that no other beats in task score and in degradation at once, from safest to best score. Of equals all."""
    known = measured(rows)

    def beaten(one: Row) -> bool:
        score, rise = one[1].task_score, one[1].degradation.value
        return any(
            j.task_score >= score and j.degradation.value <= rise and (j.task_score > score or j.degradation.value < rise) for _, j in known
        )

    return sorted((row for row in known if not beaten(row)), key=lambda row: (row[1].degradation.value, row[1].task_score))


@dataclass(frozen=True)
class Importance:
    """How much each knob matters for score and for degradation, within one recipe or over all."""

    where: str
    trials: int
    score: Mapping[str, float]
    degradation: Mapping[str, float]

    @property
    def knobs(self) -> list[str]:
        """The knobs, those that matter most for degradation first."""
        return sorted({*self.score, *self.degradation}, key=lambda name: (-self.degradation.get(name, 0.0), name))


def importance(rows: Sequence[Row]) -> list[Importance]:
    """Of all recipes together (the recipe being one of the knobs) and of each with trials enough; [] where none has."""
    from orchestrator.search import importance as searched

    known = [(r, j) for r, j in measured(rows) if r.phase == "search"]
    groups = [("all recipes", known, True), *((name, [row for row in known if row[0].recipe == name], False) for name in _recipes(known))]
    found = []
    for where, own, with_recipe in groups:
        points = [({"recipe": r.recipe} if with_recipe else {}) | r.params for r, _ in own]
        score = searched.importances(points, [j.task_score for _, j in own], higher=True)
        rise = searched.importances(points, [j.degradation.value for _, j in own], higher=False)
        if score or rise:
            found.append(Importance(where, len(own), score, rise))
    return found


def _recipes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(result.recipe for result, _ in rows))


@dataclass(frozen=True)
class Depth:
    """One set of prompts with answers begun `depth` tokens deep; 0 is the prompt as it is."""

    data: str
    depth: int
    before: SuiteResult | None
    after: SuiteResult | None


def depths(baseline: TrialResult, result: TrialResult | None) -> list[Depth]:
    """Attack success over depth, of every set of prompts that was asked at one depth or more; [] where none was."""
    found: list[Depth] = []
    for name, suite in baseline.suites.items():
        data, deep = str(suite.source.get("data") or name), 0 if suite.attack == "direct" else depth_of(suite.attack)
        if suite.kind == "harmful" and deep is not None and not suite.source.get("samples"):
            found.append(Depth(data, deep, suite, result.suites.get(name) if result is not None else None))
    begun = {one.data for one in found if one.depth}
    return sorted((one for one in found if one.data in begun), key=lambda one: (one.data, one.depth))


def tables(baseline: TrialResult, rows: Sequence[Row], selection: Selection, level: float) -> list[Table]:
    """All tables to decide from; those without rows are left out."""
    shown = selection.best or selection.nearest_miss
    made = [_front(rows, selection, level), _depths(depths(baseline, shown.shown if shown else None), level), _importance(rows), _cost(rows)]
    return [table for table in made if table["rows"]]


def _front(rows: Sequence[Row], selection: Selection, level: float) -> Table:
    best = selection.best_trial.trial_id if selection.best_trial is not None else None
    lines = [
        [r.trial_id + (" (best)" if r.trial_id == best else ""), r.recipe, j.verdict, figure(summary.task_score(r, level)),
         figure(j.degradation, signed=True), ", ".join(f"{name}={param(value)}" for name, value in r.params.items())]
        for r, j in front(rows)
    ]  # fmt: skip
    return {
        "title": "Pareto front", "note": "Trials that no other beats in task score and in degradation at once, by their point estimates; only "
        "feasible ones may win.",
        "head": ["trial", "recipe", "verdict", "task score", "degradation", "settings"], "rows": lines,
    }  # fmt: skip


def _depths(found: Sequence[Depth], level: float) -> Table:
    rows = [[one.data, str(one.depth), *(figure(summary.suite_rate(suite, level)) for suite in (one.before, one.after))] for one in found]
    return {
        "title": "Attack success over depth", "note": "The answer is begun for the model with the first tokens of a harmful one; depth 0 is the "
        "prompt as it is.",
        "head": ["prompts", "tokens begun", "untouched model", "this model"], "rows": rows,
    }  # fmt: skip


def _importance(rows: Sequence[Row]) -> Table:
    lines = [
        [one.where, str(one.trials), knob, number(one.score.get(knob), 2), number(one.degradation.get(knob), 2)]
        for one in importance(rows) for knob in one.knobs
    ]  # fmt: skip
    return {
        "title": "Which knob matters", "note": "Optuna's PED-ANOVA: the share of what sets the best tenth of the searched trials apart from all, "
        "among knobs that every trial of the group has. Of few trials it is a hint, no more.",
        "head": ["recipe", "trials", "knob", "for task score", "for degradation"], "rows": lines,
    }  # fmt: skip


def costs(rows: Sequence[Row]) -> list[tuple[str, list[float], list[TrialResult]]]:
    """(recipe, seconds of its trials that were timed, all its trials), in the order the recipes are met."""
    found = []
    for name in _recipes(rows):
        own = [r for r, _ in rows if r.recipe == name]
        found.append((name, [r.seconds["total"] for r in own if "total" in r.seconds], own))
    return found


def _cost(rows: Sequence[Row]) -> Table:
    feasible = {r.trial_id for r, j in rows if j.verdict == "feasible"}
    lines = []
    for name, seconds, own in costs(rows):
        kept = sum(r.trial_id in feasible for r in own)
        memory = [r.facts["peak_memory_mb"] for r in own if isinstance(r.facts.get("peak_memory_mb"), (int, float))]
        training = [r.seconds["train"] for r in own if "train" in r.seconds]
        lines.append([
            name, str(len(own)), f"{sum(seconds):.0f}" if seconds else MISSING, f"{statistics.median(seconds):.1f}" if seconds else MISSING,
            f"{statistics.median(training):.1f}" if training else MISSING, f"{max(memory):.0f}" if memory else MISSING, str(kept),
            f"{sum(seconds) / kept:.0f}" if seconds and kept else "none feasible",
        ])  # fmt: skip
    return {
        "title": "Cost by recipe", "note": "Seconds of a trial on its lane, confirmations included; memory is the highest of any trial.",
        "head": ["recipe", "trials", "seconds, all", "seconds, median", "of it training, median", "peak memory, MB", "feasible",
                 "seconds a feasible trial"],
        "rows": lines,
    }  # fmt: skip
