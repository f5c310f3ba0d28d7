"""What a run did not measure or try, and what of its data it did not use: said in the report, because a table shows only what is there."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.config import Experiment
from orchestrator.data import counted
from orchestrator.decision.limits import Judgement
from orchestrator.decision.selection import Selection
from orchestrator.evaluation import held_out
from orchestrator.records import TrialResult
from orchestrator.texts import one_line

Row = tuple[TrialResult, Judgement]


def lines(experiment: Experiment, baseline: TrialResult, rows: Sequence[Row], selection: Selection) -> list[str]:
    """A sentence each; [] where everything asked for was tried, measured, limited and used."""
    return [*_untried(experiment, rows), *_unlimited(experiment), *_unasked(experiment, baseline, selection), *_unused(baseline, rows)]


def _untried(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Recipes without a trial, and trials without figures."""
    tried = {result.recipe for result, _ in rows}
    missing = [name for name in experiment.recipe_names if name not in tried]
    few = f"search.trials={experiment.search.trials} for {len(experiment.recipes)} recipes"
    found = [f"Not tried: {', '.join(missing)} had no trial before the search ended ({few}); nothing is known of them here"] if missing else []
    unmeasured = [result for result, _ in rows if not result.suites]
    for state in dict.fromkeys(result.state for result in unmeasured):
        names = [result.trial_id for result in unmeasured if result.state == state]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        found.append(f"Not measured: {len(names)} of {len(rows)} trials ({state}) were asked no suite: {shown}")
    return found


def _unlimited(experiment: Experiment) -> list[str]:
    """What is measured and no limit holds."""
    limits, suites = experiment.safety.limits, experiment.safety.suites
    only = [suite.name for suite in suites if not suite.constrains]
    found = [f"Measured only, no limit holds {', '.join(only)}"] if only else []
    if limits.max_over_refusal_rise is None and any(suite.kind == "benign" for suite in suites):
        found.append("No limit on over-refusal: safety.limits.max_over_refusal_rise is null")
    kinds = {suite.kind for suite in suites}
    return found + [f"No suite of {what} prompts: {unknown}" for kind, what, unknown in (
        ("harmful", "harmful", "nothing is known of attack success"), ("benign", "harmless", "nothing is known of over-refusal"),
    ) if kind not in kinds]  # fmt: skip


def _unasked(experiment: Experiment, baseline: TrialResult, selection: Selection) -> list[str]:
    """Suites of the experiment that the untouched model or the model shown was not asked."""
    names = [name for suite in experiment.safety.suites for name in (suite.name, suite.name + held_out.SUFFIX)]
    asked = [name for name in names if name in baseline.suites]
    found = []
    gone = [suite.name for suite in experiment.safety.suites if suite.name not in baseline.suites]
    if gone:
        found.append(f"Not measured: the untouched model was not asked {', '.join(gone)}, so no rise is known there")
    shown = selection.best or selection.nearest_miss
    missing = [name for name in asked if name not in shown.shown.suites] if shown is not None and shown.shown.suites else []
    if missing:
        found.append(f"Not measured: {shown.shown.trial_id}, the trial shown, was not asked {', '.join(missing)} (only finalists are asked those)")
    return found


def _unused(baseline: TrialResult, rows: Sequence[Row]) -> list[str]:
    """Rows that were cut, dropped or changed where they were read."""
    found = [f"Rows cut or dropped: {fit.sentence}" for fit in counted.fits_of(baseline.facts) if fit.cut or fit.dropped]
    read = next((result.facts["rows_read"] for result, _ in rows if result.facts.get("rows_read")), [])
    fields = [one_line(one["field"]) for one in read if one.get("dropped") or one.get("changed")]
    told = f"Rows left out or changed where they were read: of {', '.join(fields)}; which, is under How it was measured"
    return found + ([told] if fields else [])
