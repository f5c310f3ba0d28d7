"""Sentences and figures that the report, the tracking server and the command line share, so that they never disagree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.config import Experiment
from orchestrator.decision import selection as decision_selection
from orchestrator.decision.intervals import Estimate, mean, paired_scores, rate
from orchestrator.decision.limits import Constraint, Judgement
from orchestrator.decision.selection import Configuration, Selection
from orchestrator.evaluation.held_out import plain_recipes
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.redaction import redact_text
from orchestrator.report import alerts, headroom
from orchestrator.report.alerts import Alert
from orchestrator.report.numbers import MISSING, figure, moved, number, percent
from orchestrator.texts import markdown, one_line


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


def kept(constraint: Constraint, confidence: float) -> str:
    """Whether a limit is kept, in words: what moved by how much, at which confidence, within or over which limit."""
    kind = constraint.name.partition("/")[0]
    what = {"external": "the loss", "over_refusal_rise": "over-refusal"}.get(kind, "attack success")
    relation = {"feasible": "within", "infeasible": "over", "undecided": "not clearly within"}[constraint.verdict]
    level = percent(constraint.confidence or confidence)
    how = f"is {figure(constraint.estimate)}" if kind == "asr" else moved(constraint.estimate)
    return (
        f"{what} on {constraint.suite} {how} at {level} confidence, "
        f"{relation} the limit of {constraint.limit:g}" + ("; this suite cannot show a rise" if constraint.blind else "")
    )


MANY = 3
"""More suites than this are not all named in one sentence: the page's first table has each."""


def _rates(result: TrialResult, baseline: TrialResult | None, kind: str) -> str:
    """Rates before and after, by suite; of more than MANY the one of the worst change and, where it is another, the one with the highest rate."""
    found = []
    for name, suite in result.suites.items():
        if suite.kind == kind and suite.constrains:
            before = baseline.suites.get(name) if baseline is not None else None
            text = f"from {number(before.rate) if before else MISSING} to {number(suite.rate)} on {name}"
            found.append((suite.rate - before.rate if before else suite.rate, suite.rate, text))
    if len(found) <= MANY:
        return ", ".join(text for *_, text in found) or MISSING
    rose, high = max(found, key=lambda one: one[:2]), max(found, key=lambda one: one[1])
    told = f"{rose[2]} (the worst change of {len(found)} suites)"
    return told if high[1] == rose[1] else f"{told}, highest {high[2]}"


def headline(selection: Selection, baseline: TrialResult | None, experiment: Experiment, *, stopped: bool = False) -> str:
    """The outcome as one line for the terminal and MLflow: the `verdict`, then every one of its `warnings`."""
    told = "".join(f" {line}." for line in warnings(selection, baseline, experiment))
    return verdict(selection, baseline, experiment, stopped=stopped) + told


def warnings(selection: Selection, baseline: TrialResult | None, experiment: Experiment) -> list[str]:
    """What qualifies the verdict, each with its mark (NOTE, WARNING, CONTAMINATED); of a search without a winner only what was trained on."""
    best = selection.best
    if best is None:
        return [alert.text for alert in alerts.of_data(baseline)] if selection.nearest_miss is not None and selection.measured else []
    told = [*alerts.of_models(baseline, best.shown.suites, experiment), *headroom.unmoved(selection, baseline, experiment)]
    told += alerts.of_trials(r for r, _ in best.trials)
    note = [f"NOTE: {alert}" for alert in learnt_nothing(selection, baseline, experiment)]
    return [*note, *(f"WARNING: {alert}" for alert in told), *(alert.text for alert in alerts.of_data(baseline))]


def learnt_nothing(selection: Selection, baseline: TrialResult | None, experiment: Experiment) -> list[Alert]:
    """Said of a best model whose score is not clearly above the untouched one's; [] otherwise."""
    if selection.best is None:
        return []
    confidence, result = experiment.safety.limits.confidence, selection.best.handed_over[0]
    score = held_out_score(result, confidence) or task_score(result, confidence)
    before = held_out_score(baseline, confidence) or task_score(baseline, confidence)
    low = score is not None and before is not None and score.lower <= before.value
    return [Alert("its task score is not clearly above the untouched model's", alerts.SCORE)] if low else []


def verdict(selection: Selection, baseline: TrialResult | None, experiment: Experiment, *, stopped: bool = False) -> str:
    """The outcome in one sentence: the best trial with score, attack success before and after and the limit, or the nearest miss.

    `stopped`: the search was cut short, so what is said holds so far.
    """
    confidence = experiment.safety.limits.confidence
    if selection.best is not None:
        result, judgement = selection.best.handed_over
        bound, seeds = tightest(judgement), len(selection.best.seeds)
        return (
            f"{'Best so far' if stopped else 'Best'} within the limits: {result.trial_id} ({result.recipe}), "
            f"{_scored(selection, baseline, experiment)}, attack success {_rates(result, baseline, 'harmful')}; "
            + (f"{kept(bound, confidence)}: feasible" if bound else "feasible")
            + (f", as on each of {seeds} seeds." if seeds > 1 else ", on one seed.")
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
