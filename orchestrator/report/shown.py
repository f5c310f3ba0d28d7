"""The configuration a report is about, the best or the nearest miss: its figures before and after with both judges, and its limits."""

from __future__ import annotations

from typing import Any

from orchestrator.config import Experiment
from orchestrator.decision.intervals import Estimate, paired_difference, paired_scores
from orchestrator.decision.selection import Configuration
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.report import alerts, safety
from orchestrator.report import figures as summary
from orchestrator.report.numbers import MISSING, figure, number

WHAT = {"harmful": "attack success", "benign": "over-refusal", "choice": "wrong choices"}


def content(found: Configuration, baseline: TrialResult, experiment: Experiment) -> dict[str, Any]:
    """What the templates show of a configuration: "head", "rows" and "ids" of the table of figures, "constraints" of every seed, settings."""
    result, judgement = found.shown, found.trials[0][1]
    level = experiment.safety.limits.confidence
    constraints = [
        {"trial": r.trial_id, "seed": r.seed, "name": c.name, "estimate": figure(c.estimate, signed=True),
         "passing": figure(c.among_passing), "limit": f"{c.limit:g}",
         "room": number(-c.value, signed=True) if c.estimate.n else MISSING, "verdict": c.verdict}
        for r, j in found.trials for c in j.constraints
    ]  # fmt: skip
    head, ids, rows = figures(result, baseline, level)
    return {
        "trial": result.trial_id, "recipe": found.recipe, "verdict": found.verdict,
        "seeds": f"seed{'s' if len(found.seeds) > 1 else ''} {', '.join(map(str, found.seeds))}",
        "head": head, "rows": rows, "ids": ids, "constraints": constraints,
        "params": {name: param(value) for name, value in found.params.items()}, "mean_score": number(found.score), "state": result.state,
        "facts": {k: param(v) for k, v in result.facts.items() if isinstance(v, (int, float)) and not isinstance(v, bool)},
        "steps": result.steps, "judged": judgement.verdict,
    }  # fmt: skip


def figures(result: TrialResult, baseline: TrialResult, level: float) -> tuple[list[str], list[str], list[list[str]]]:
    """(column names, ids of the rows, rows) of score and rates before and after with the paired change; the second judge's too where one looked."""
    both = any(suite.second is not None for one in (baseline, result) for suite in one.suites.values())
    head = ["figure", "untouched model", "this model", "change, paired"]
    head += ["second judge: untouched", "second judge: this model", "second judge: change"] if both else []
    blank, ids = [""] * (3 * both), [alerts.SCORE]
    scores = [figure(summary.task_score(one, level)) for one in (baseline, result)]
    rows = [["task score", *scores, _scores("task", baseline, result, level), *blank]]
    waited = [summary.held_out_score(one, level) for one in (baseline, result)]
    if any(waited):
        change = _scores("confirmation", baseline, result, level)
        ids.append("")
        rows.append(["task score on rows held out of the search", figure(waited[0]), figure(waited[1]), change, *blank])
    for name, suite in result.suites.items():
        before = baseline.suites.get(name)
        rates = [figure(summary.suite_rate(one, level)) for one in (before, suite)]
        row = [f"{WHAT[suite.kind]} on {name}{safety.asked_of(suite)}", *rates]
        row.append(figure(_rise(before, suite, level), signed=True))
        if both:
            row += [figure(alerts.second_rate(one, level)) for one in (before, suite)]
            row.append(figure(alerts.second_rise(before, suite, level), signed=True))
        ids.append(alerts.row_id(name))
        rows.append(row)
    return head, ids, rows


def _rise(before: SuiteResult | None, after: SuiteResult, level: float) -> Estimate | None:
    """Paired rise of a suite's failures; None where the two were not asked the same prompts (one stopped early, or drawn differently)."""
    if before is None or before.ids != after.ids or not after.ids:
        return None
    return paired_difference(before.certain, after.failures, after.requests, level)


def _scores(of: str, baseline: TrialResult, result: TrialResult, level: float) -> str:
    """Paired change of the task's score on the same rows."""
    before, after = getattr(baseline, of), getattr(result, of)
    if before is None or after is None or before.ids != after.ids:
        return MISSING
    return figure(paired_scores(before.scores, after.scores, level), signed=True)


def param(value: Any) -> str:
    """A sampled value, short: four significant digits for a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
