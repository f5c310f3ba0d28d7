"""Sentences and figures that the report, the tracking server and the command line share, so that they never disagree."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.config import Experiment
from orchestrator.data import counted
from orchestrator.decision import selection as decision_selection
from orchestrator.decision.intervals import Estimate, level_of, mean, paired_difference, paired_scores, rate
from orchestrator.decision.limits import Constraint, Judgement, is_blind
from orchestrator.decision.rises import least_requests
from orchestrator.decision.selection import Configuration, Selection
from orchestrator.evaluation.held_out import plain_recipes
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.redaction import redact_text
from orchestrator.report import headroom
from orchestrator.texts import markdown, one_line
from orchestrator.trial import reach

MISSING = "not measured"
FEW_FAIL = 0.5
"""Rate of failures of an untouched model below which a suite that can show no rise is short of prompts, not of a model that passes them."""


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A rate or score with fixed digits; `not measured` for None and NaN."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-0." + "0" * digits, "0." + "0" * digits) if float(text) == 0 else text


def size(estimate: Estimate) -> str:
    """`n=120 in 40 requests`, or `n=120`; `n=96 of 360 (stopped early)` where a suite was not asked to its end."""
    requests = f" in {estimate.requests} requests" if estimate.requests else ""
    return f"n={estimate.n}" + (f" of {estimate.of}" if estimate.of else "") + requests + (" (stopped early)" if estimate.of else "")


def figure(estimate: Estimate | None, signed: bool = False) -> str:
    """Value, interval and size: `+0.020 [-0.004, +0.049] n=120 in 40 requests`; `not measured` where there is nothing."""
    if estimate is None or not estimate.n:
        return MISSING
    lower, upper = number(estimate.lower, signed=signed), number(estimate.upper, signed=signed)
    return f"{number(estimate.value, signed=signed)} [{lower}, {upper}] {size(estimate)}"


def suite_rate(suite: SuiteResult | None, confidence: float) -> Estimate | None:
    """A suite's failure rate with its interval, per request; None without a suite."""
    if suite is None:
        return None
    found = rate(suite.failures, suite.requests, confidence)
    return replace(found, of=suite.screening.of) if suite.stopped_early else found


def worst_suite(result: TrialResult | None, kind: str) -> SuiteResult | None:
    """The suite of this kind with the highest rate, among those that constrain (else among all); None without one."""
    suites = [s for s in result.suites.values() if s.kind == kind and s.ids] if result is not None else []
    return max([s for s in suites if s.constrains] or suites, key=lambda s: s.rate, default=None)


def task_score(result: TrialResult | None, confidence: float) -> Estimate | None:
    """The task score with its interval over evaluation rows; None where it was not measured."""
    return mean(result.task.scores, confidence) if result is not None and result.task is not None else None


def held_out_score(result: TrialResult | None, confidence: float) -> Estimate | None:
    """The score on rows that the search never asked, with its interval; None where it was not measured."""
    return mean(result.confirmation.scores, confidence) if result is not None and result.confirmation is not None else None


def control(selection: Selection, experiment: Experiment) -> TrialResult | None:
    """The plain fine-tuning that was scored on the rows held out of the search; None without one."""
    rows = [row for found in selection.configurations for row in found.trials if row[0].confirmation is not None]
    found = decision_selection.control(rows, plain_recipes(experiment))
    return found.trials[0][0] if found is not None else None


def _scored(selection: Selection, baseline: TrialResult | None, experiment: Experiment) -> str:
    """The best configuration's task score: on the rows held out of the search, beside the untouched model and plain fine-tuning; else on those
    it was chosen by, which is said."""
    confidence = experiment.safety.limits.confidence
    result = selection.best_trial
    score, before = held_out_score(result, confidence), held_out_score(baseline, confidence)
    if result is None or score is None or result.confirmation is None:
        score, before = task_score(result, confidence), task_score(baseline, confidence)
        chosen = " on the rows it was chosen by" if sum(len(c.trials) for c in selection.configurations) > 1 else ""
        return f"task score {figure(score)}{chosen} (untouched {number(before.value) if before else MISSING})"
    beside, plain = "", control(selection, experiment)
    if plain is not None and plain.confirmation is not None and plain.trial_id != result.trial_id:
        much = figure(paired_scores(plain.confirmation.scores, result.confirmation.scores, confidence), signed=True)
        beside = f", plain fine-tuning {number(plain.confirmation.score)}: {much}"
    return f"task score on rows held out of the search {figure(score)} (untouched {number(before.value) if before else MISSING}{beside})"


def tightest(judgement: Judgement) -> Constraint | None:
    """The constraint nearest to, or furthest over, its limit; None where there are none."""
    return max(judgement.constraints, key=lambda c: c.value, default=None)


def percent(share: float) -> str:
    """A share as `95%` or `97.5%`."""
    return f"{100 * share:.4g}%"


def kept(constraint: Constraint, confidence: float) -> str:
    kind = constraint.name.partition("/")[0]
    what = {"external": "the loss", "over_refusal_rise": "over-refusal"}.get(kind, "attack success")
    relation = {"feasible": "within", "infeasible": "over", "undecided": "not clearly within"}[constraint.verdict]
    level = percent(constraint.confidence or confidence)
    moved = f"is {figure(constraint.estimate)}" if kind == "asr" else f"rose by {figure(constraint.estimate, signed=True)}"
    return (
        f"{what} on {constraint.suite} {moved} at {level} confidence, "
        f"{relation} the limit of {constraint.limit:g}" + ("; this suite cannot show a rise" if constraint.blind else "")
    )


def _rates(result: TrialResult, baseline: TrialResult | None, kind: str) -> str:
    parts = []
    for name, suite in result.suites.items():
        if suite.kind == kind and suite.constrains:
            before = baseline.suites.get(name) if baseline is not None else None
            parts.append(f"from {number(before.rate) if before else MISSING} to {number(suite.rate)} on {name}")
    return ", ".join(parts) or MISSING


def headline(selection: Selection, baseline: TrialResult | None, experiment: Experiment, *, stopped: bool = False) -> str:
    """The outcome in one sentence: the best trial with score, attack success before and after and the limit, or the nearest miss.

    `stopped`: the search was cut short, so what is said holds so far.
    """
    confidence = experiment.safety.limits.confidence
    if selection.best is not None:
        result, judgement = selection.best.handed_over
        score = held_out_score(result, confidence) or task_score(result, confidence)
        before = held_out_score(baseline, confidence) or task_score(baseline, confidence)
        bound = tightest(judgement)
        seeds = len(selection.best.seeds)
        warnings = [*unbound(baseline, experiment), *unseen(selection.best.shown.suites, baseline, experiment)]
        warnings += headroom.unmoved(selection, baseline, experiment)
        warnings += reach.alerts(r for r, _ in selection.best.trials)
        return (
            f"{'Best so far' if stopped else 'Best'} within the limits: {result.trial_id} ({result.recipe}), "
            f"{_scored(selection, baseline, experiment)}, attack success {_rates(result, baseline, 'harmful')}; "
            + (f"{kept(bound, confidence)}: feasible" if bound else "feasible")
            + (f", as on each of {seeds} seeds." if seeds > 1 else ", on one seed.")
            + (" NOTE: its task score is not clearly above the untouched model's." if score and before and score.lower <= before.value else "")
            + "".join(f" WARNING: {line}." for line in warnings)
            + contaminated(baseline)
        )
    miss = selection.nearest_miss
    if not selection.measured:
        return unmeasured(selection) if not stopped or selection.configurations else "Nothing was measured yet."
    nothing = "No model to hand over so far" if stopped else "Nothing feasible"
    if miss is None:
        return f"{nothing}: none of {_count(selection.configurations)} could be measured on the safety suites."
    result, judgement = _worst_seed(miss)
    bound = tightest(judgement)
    by = (
        f"; {kept(bound, confidence)}" + (f", the upper end of its interval {number(bound.value)} beyond it" if bound.value > 0 else "")
        if bound and bound.estimate.n
        else ""
    )
    standing = "within the limits as far as it was asked, but never asked in full" if miss.promising else judgement.verdict
    return (
        f"{nothing}: none of {_count(selection.configurations)} keeps every limit at {confidence:.0%} confidence. Nearest miss: "
        f"{result.trial_id} ({result.recipe}), task score {figure(task_score(result, confidence))}, {standing}{by}."
        + contaminated(baseline)
    )


_FAULT = {
    "trial": "by its own settings or data: correct what it names, see docs/troubleshooting.md, and run again",
    "machine": "by a machine: see to that, then go on with `safebasin resume`",
    "safebasin": "by a defect of safebasin: report it",
}


def unmeasured(selection: Selection) -> str:
    """Why nothing is known of any trial's safety: how many failed, the commonest reason, whose fault it was, what to do."""
    trials = [result for found in selection.configurations for result, _ in found.trials]
    if not trials:
        return "Nothing was measured: the search ended before a trial did; give it more time (search.time_budget_s) or trials (search.trials)."
    reasons = Counter(_alike(result) for result in trials)
    alike, count = reasons.most_common(1)[0]
    first = next(result for result in trials if _alike(result) == alike)
    failed = sum(result.state == "failed" for result in trials)
    what = f"all {failed} trials failed" if failed == len(trials) > 1 else f"{failed} of {len(trials)} trials failed, none was asked its suites"
    what = "the one trial failed" if failed == len(trials) == 1 else what
    often = f" ({count} of {len(trials)})" if len(trials) > 1 else ""
    why = one_line(redact_text(first.error or "it was stopped before its evaluation"), 400).rstrip(".")
    whose = _FAULT.get(first.fault or "", "see docs/troubleshooting.md for the common reasons")
    return f"Nothing was measured: {what}. The commonest reason{often}, first of {first.trial_id} ({first.recipe}): {why}; {whose}."


def _alike(result: TrialResult) -> str:
    """A trial's error without its numbers, so that the same reason at other steps counts as one."""
    return re.sub(r"\d+", "#", f"{result.fault} {result.error}")


def contaminated(baseline: TrialResult | None) -> str:
    """What is measured and was trained on, as sentences with a blank before them; empty where nothing is."""
    return "".join(f" {line}." for line in counted.alerts(baseline.facts)) if baseline is not None else ""


def unbound(baseline: TrialResult | None, experiment: Experiment) -> list[str]:
    """Suites that can show no rise because the untouched model fails there that often already, a sentence each; [] where all can."""
    limits = experiment.safety.limits
    found = []
    for suite in baseline.suites.values() if baseline is not None else ():
        limit, what = (limits.max_degradation, "attack success") if suite.kind == "harmful" else (limits.max_over_refusal_rise, "over-refusal")
        if suite.constrains and limit is not None and is_blind(suite, limit, limits.confidence):
            few = f", or its {len(suite.ids)} prompts are too few" if suite.rate < FEW_FAIL else ""
            found.append(
                f"{suite.name} cannot show a rise: the untouched model's {what} is {number(suite.rate)} already{few}, so a model that lost half of "
                f"what is left would not be seen under the limit of {limit:g}, and no verdict there is `feasible`; start from a model that "
                "keeps more, or ask more prompts that it passes"
            )
    return found


def too_few(baseline: TrialResult | None, experiment: Experiment) -> list[str]:
    """Suites that constrain and have too few requests for any model to be feasible there, a sentence each."""
    limits, found = experiment.safety.limits, []
    for suite in baseline.suites.values() if baseline is not None else ():
        limit = limits.max_degradation if suite.kind == "harmful" else limits.max_over_refusal_rise
        if not suite.constrains or limit is None or not suite.ids:
            continue
        needed = least_requests(limit, level_of(limits.confidence))
        if needed is None or suite.request_count < needed:
            least = f"{needed} are needed" if needed is not None else "no number suffices"
            found.append(
                f"{suite.name} asks {suite.request_count} requests, too few to show that the limit of {limit:g} is kept ({least}), so no verdict "
                "there is `feasible`, not even on an unchanged model; ask more"
            )
    return found


def unseen(after: Mapping[str, SuiteResult], baseline: TrialResult | None, experiment: Experiment) -> list[str]:
    """Rises of attack success that the limits do not hold and would not allow: on suites that are only measured, and by the second judge
    on any. A sentence each.

    Only clear ones: the whole interval beyond `max_degradation`, on the same prompts.
    """
    limits, found = experiment.safety.limits, []
    for name, tuned in after.items():
        before = baseline.suites.get(name) if baseline is not None else None
        if before is None or tuned.kind != "harmful" or before.ids != tuned.ids or not tuned.ids:
            continue
        looks = [("", before.certain, tuned.failures)] if not tuned.constrains else []
        if before.second is not None and tuned.second is not None:
            worse = [word in ("unsafe", "unparsed") for word in tuned.second]
            looks.append((f" by the second judge ({tuned.second_judge})", [word == "unsafe" for word in before.second], worse))
        for by, first, second in looks:
            rise = paired_difference(first, second, tuned.requests, limits.confidence)
            if rise.lower > limits.max_degradation:
                held = "" if tuned.constrains else ", which no limit holds,"
                much = f"rose by {figure(rise, signed=True)}{by}, more than the limit of {limits.max_degradation:g} would allow"
                found.append(f"attack success on {name}{held} {much}")
    return found


def _count(found: Sequence[Configuration]) -> str:
    return f"{len(found)} configuration" + ("" if len(found) == 1 else "s")


def _worst_seed(configuration: Configuration) -> tuple[TrialResult, Judgement]:
    return max(configuration.trials, key=lambda pair: max((c.value for c in pair[1].constraints), default=1.0))


def by_recipe(selection: Selection, recipes: Sequence[str]) -> dict[str, Configuration]:
    """For each recipe that was tried the configuration to show: its best feasible one, else the one nearest to its limits.

    The overall best is the one shown of its recipe, also where an unconfirmed one of the same recipe scored higher.
    """
    order = {"feasible": 0, "undecided": 1, "infeasible": 2}
    found = {}
    for name in recipes:
        own = [c for c in selection.configurations if c.recipe == name]
        feasible = [c for c in own if c.verdict == "feasible"]
        if selection.best is not None and selection.best.recipe == name:
            found[name] = selection.best
        elif feasible:
            found[name] = max(feasible, key=lambda c: (len(c.seeds) > 1, c.score))
        elif own:
            found[name] = min(own, key=lambda c: (order[c.verdict], c.excess))
    return found


def plan(experiment: Experiment) -> str:
    """What the run is going to do, as Markdown for the description of the parent run."""
    limits, search = experiment.safety.limits, experiment.search
    recipes = markdown(", ".join(experiment.recipe_names))
    over = "" if limits.max_over_refusal_rise is None else f" and over-refusal by at most {limits.max_over_refusal_rise:g}"
    return (
        f"safebasin experiment **{markdown(experiment.name)}**: {search.trials} trials over {recipes}; attack success may "
        f"rise by at most {limits.max_degradation:g}{over} ({limits.confidence:.0%} confidence). Running."
    )


def note(selection: Selection, baseline: TrialResult | None, experiment: Experiment, *, stopped: bool = False) -> str:
    """The outcome as Markdown for the description of the parent run; `stopped` as for `headline`."""
    told = markdown(headline(selection, baseline, experiment, stopped=stopped))
    return (
        f"**{told}**\n\nCompare trials: open the experiment, select the child runs, *Compare*; "
        "`task/score` against `safety_delta/degradation` is the trade-off, `constraint/excess <= 0` keeps every limit. "
        "The report is among this run's artifacts (`report.html`, `report.md`)."
    )
