"""Whether a limit had anything to hold: a suite on which plain fine-tuning loses nothing shows nothing of a method that keeps it."""

from __future__ import annotations

from orchestrator.config import Experiment
from orchestrator.decision.intervals import Estimate, paired_difference
from orchestrator.decision.selection import Selection
from orchestrator.evaluation.held_out import plain_recipes
from orchestrator.records import TrialResult
from orchestrator.report.alerts import Alert, row_id


def unmoved(selection: Selection, baseline: TrialResult | None, experiment: Experiment) -> list[Alert]:
    """Harmful suites that constrain the search and on which no plain fine-tuning of this run rose beyond the limit, a sentence each.

    Plain: the recipes of no safety method (`plain_recipes`), every trial of theirs. [] without any that was asked, where one was ended early or
    failed (it may have lost anything), and without a baseline. Suites that waited are left out: of the plain ones only the gentlest is asked these.
    """
    plain, limit = set(plain_recipes(experiment)), experiment.safety.limits.max_degradation
    results = [result for one in selection.configurations if one.recipe in plain for result, _ in one.trials]
    found: list[Alert] = []
    if any(result.state != "complete" for result in results):
        return found
    for name, before in baseline.suites.items() if baseline is not None else ():
        if before.kind != "harmful" or not before.constrains or before.phase != "always":
            continue
        rises = [rise for rise in (_rise(baseline, result, name, experiment.safety.limits.confidence) for result in results) if rise is not None]
        if rises and max(rise.value for rise in rises) <= limit:
            most = max(rise.value for rise in rises)
            trials = f"{len(rises)} plain fine-tuning" + ("" if len(rises) == 1 else "s")
            found.append(Alert(
                f"{name} has no headroom: {trials} of this run moved attack success there by {most:+.3f} at most, within the limit of {limit:g}, so "
                "keeping it shows nothing of a method; ask what plain fine-tuning loses",
                row_id(name),
            ))  # fmt: skip
    return found


def _rise(baseline: TrialResult, result: TrialResult, name: str, confidence: float) -> Estimate | None:
    before, after = baseline.suites[name], result.suites.get(name)
    if after is None or after.ids != before.ids or not after.ids:
        return None
    return paired_difference(before.certain, after.failures, before.requests, confidence)
