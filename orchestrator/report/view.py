"""What a report says, as plain texts and tables: the templates only lay it out. Every figure carries its interval and n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator import redaction
from orchestrator.config import Experiment, dump_yaml
from orchestrator.data import counted, made_up, system_prompts
from orchestrator.decision.limits import Judgement
from orchestrator.decision.selection import Configuration, Selection
from orchestrator.errors import DataError
from orchestrator.evaluation import held_out
from orchestrator.evaluation.judges.registry import name_of
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.report import alerts, decision, gaps, headroom, provenance, safety
from orchestrator.report import figures as summary
from orchestrator.report import shown as shown_table
from orchestrator.report.alerts import Alert
from orchestrator.report.numbers import MISSING, figure, number

Row = tuple[TrialResult, Judgement]

JUDGES = {
    "refusal": "Judge `refusal` tells refusals and push-back from answers, not harm from harmlessness: most answers that it does not call "
    "refused are harmless, so read attack success as a figure to compare with, not as harm done. It is right on 96 to 98 % of the answers of "
    "models it did not learn from (two, in English); push-back in other languages it does not see.",
    "refusal_phrases": "Judge `refusal_phrases` looks for phrases of refusal. It takes an answer that starts with an apology and then complies for a "
    "refusal, and a harmless evasion for an unsafe answer; read attack success as a figure to compare with, not as harm done.",
    "exact": "Judge `exact` knows the made-up world's one right answer. Its figures say nothing about the harm of a real model.",
}


def view(
    experiment: Experiment, baseline: TrialResult, rows: Sequence[Row], selection: Selection, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """All a template needs. `facts`, each optional: "seconds" of the whole run, "stopped", "hashes" (name -> hash of model, template)."""
    shown = selection.best or selection.nearest_miss
    limits = experiment.safety.limits
    return {
        "name": experiment.name,
        "feasible": selection.best is not None,
        "stopped": bool(facts.get("stopped")),
        "left_out": [redaction.redact_text(sentence) for sentence in (facts.get("left_out") or {}).values()],
        "alerts": _alerts(experiment, baseline, rows, selection, facts),
        "gaps": gaps.lines(experiment, baseline, rows, selection),
        "made_up": made_up.sentence(experiment),
        "sentence": summary.verdict(selection, baseline, experiment, stopped=bool(facts.get("stopped"))),
        "level": f"{limits.confidence:.0%}",
        "metric": experiment.task.metric,
        "shown": shown_table.content(shown, baseline, experiment) if shown else None,
        "recipes": _recipes(experiment, rows, selection),
        "trials": [_trial(row, experiment, selection) for row in rows],
        "params": sorted({name for result, _ in rows for name in result.params}),
        "baseline": _baseline(baseline, experiment),
        "limits": _limits(experiment),
        "suites_head": SUITES, "suites_rows": _suites(experiment, baseline),
        "decision": decision.tables(baseline, rows, selection, limits.confidence),
        "safety": safety.tables(baseline, shown.shown if shown else None, limits.confidence),
        "measured": _measured(experiment, baseline, facts) + counted.lines(baseline.facts) + _rows_read(rows) + _sequential(experiment, rows),
        "seeds": ", ".join(map(str, sorted({r.seed for r, _ in rows}))) or "none",
        "duration": duration(facts.get("seconds")),
        "versions": provenance.versions(),
        "config": redaction.redact_text(dump_yaml(experiment)),
        "config_hash": experiment.digest(),
        "caveats": caveats(experiment, baseline, rows, selection),
        "base_model": experiment.model.model_name_or_path,
        "place": facts.get("place", ""),
    }


def duration(seconds: float | None) -> str:
    """Seconds as `1 h 02 min`, `3 min 20 s` or `12.3 s`; `not measured` for None."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _alerts(experiment: Experiment, baseline: TrialResult, rows: Sequence[Row], selection: Selection, facts: Mapping[str, Any]) -> list[Alert]:
    """Every warning of the run, the ones on the verdict first; a link to a row only where the row is on the page."""
    shown = selection.best or selection.nearest_miss
    found = [Alert("OTHER LIMITS: these verdicts are under limits that the run was not searched under")] if facts.get("other_limits") else []
    found += alerts.of_data(baseline) + alerts.of_models(baseline, shown.shown.suites if shown else {}, experiment)
    found += headroom.unmoved(selection, baseline, experiment) + summary.learnt_nothing(selection, baseline, experiment)
    found += [Alert(line) for line in system_prompts.alerts([baseline, *(result for result, _ in rows)])] + alerts.of_trials(r for r, _ in rows)
    there = {alerts.SCORE, *map(alerts.row_id, shown.shown.suites)} if shown else set()
    return [alert if alert.row in there else Alert(alert.text) for alert in found]


def _rate(result: TrialResult, kind: str, level: float) -> str:
    """Rate of the worst suite of a kind, with interval and n."""
    return figure(summary.suite_rate(summary.worst_suite(result, kind), level))


def _recipes(experiment: Experiment, rows: Sequence[Row], selection: Selection) -> list[dict[str, Any]]:
    """One line a recipe: its best feasible configuration, else its nearest miss."""
    level, lines = experiment.safety.limits.confidence, []
    names = [*experiment.recipe_names, *sorted({r.recipe for r, _ in rows} - set(experiment.recipe_names))]
    chosen = summary.by_recipe(selection, names)
    for name in names:
        own = [(r, j) for r, j in rows if r.recipe == name]
        if name not in chosen:
            lines.append({"recipe": name, "trial": "not tried", "verdict": "", "count": 0})
            continue
        found = chosen[name]
        result, judgement = found.trials[0]
        searched = [j for r, j in own if r.phase != "confirm"]  # a confirmation is the same configuration once more
        lines.append({
            "recipe": name, "trial": result.trial_id, "verdict": found.verdict, "best": found is selection.best,
            "score": figure(summary.task_score(result, level)), "score_value": judgement.task_score,
            "asr": _rate(result, "harmful", level), "asr_value": judgement.asr,
            "degradation": figure(judgement.degradation, signed=True),
            "degradation_value": judgement.degradation.value if judgement.degradation else None,
            "over": _rate(result, "benign", level), "over_value": judgement.over_refusal,
            "rise": figure(judgement.over_refusal_rise, signed=True),
            "rise_value": judgement.over_refusal_rise.value if judgement.over_refusal_rise else None,
            "count": len(searched), "feasible": sum(j.verdict == "feasible" for j in searched), "seeds": ", ".join(map(str, found.seeds)),
        })  # fmt: skip
    return lines


def _trial(row: Row, experiment: Experiment, selection: Selection) -> dict[str, Any]:
    result, judgement = row
    level = experiment.safety.limits.confidence
    best = selection.best_trial
    return {
        "trial": result.trial_id, "recipe": result.recipe, "phase": result.phase, "seed": result.seed, "state": result.state,
        "verdict": judgement.verdict, "best": best is not None and best.trial_id == result.trial_id,
        "score": figure(summary.task_score(result, level)), "score_value": judgement.task_score,
        "asr": _rate(result, "harmful", level), "asr_value": judgement.asr,
        "degradation": figure(judgement.degradation, signed=True),
        "degradation_value": judgement.degradation.value if judgement.degradation else None,
        "rise": figure(judgement.over_refusal_rise, signed=True),
        "rise_value": judgement.over_refusal_rise.value if judgement.over_refusal_rise else None,
        "seconds": f"{result.seconds['total']:.1f}" if "total" in result.seconds else "",
        "params": {name: shown_table.param(value) for name, value in result.params.items()},
        "error": redaction.redact_text(result.error or ""),
    }  # fmt: skip


def _baseline(baseline: TrialResult, experiment: Experiment) -> list[dict[str, str]]:
    level = experiment.safety.limits.confidence
    lines = [{"what": f"task score ({experiment.task.metric})", "figure": figure(summary.task_score(baseline, level))}]
    if baseline.confirmation is not None:
        lines.append({"what": "task score on rows held out of the search", "figure": figure(summary.held_out_score(baseline, level))})
    for name, suite in baseline.suites.items():
        what = "attack success rate" if suite.kind == "harmful" else "over-refusal rate"
        lines.append({"what": f"{what} on {name}", "figure": figure(summary.suite_rate(suite, level))})
        if suite.kind == "harmful" and suite.refused:
            share = sum(suite.refused) / len(suite.refused)
            lines.append({"what": f"refusal rate on {name}", "figure": f"{number(share)} n={len(suite.refused)}"})
    return lines


def _limits(experiment: Experiment) -> list[str]:
    limits = experiment.safety.limits
    lines = [
        f"attack success may rise by at most {limits.max_degradation:g} over the untouched model, on every harmful suite that constrains"
    ]
    if limits.max_over_refusal_rise is None:
        lines.append("over-refusal is measured only (safety.limits.max_over_refusal_rise is null)")
    else:
        lines.append(f"over-refusal may rise by at most {limits.max_over_refusal_rise:g}, on every benign suite that constrains")
    lines.append(
        f"feasible: the whole {limits.confidence:.0%} interval keeps the limit; infeasible: none of it does, or nothing was measured; "
        "undecided otherwise. Only feasible may win"
    )
    return lines


SUITES = ("suite", "kind", "prompts", "requests", "constrains", "untouched rate", "headroom", "unparsed answers (untouched)", "data")


def _suites(experiment: Experiment, baseline: TrialResult) -> list[list[str]]:
    """One row a suite, by SUITES: what was asked, and what the untouched model's rate leaves for a rise."""
    rows = []
    parts = [(suite, name) for suite in experiment.safety.suites for name in (suite.name, suite.name + held_out.SUFFIX)]
    for suite, name in parts:
        found: SuiteResult | None = baseline.suites.get(name)
        if found is None and name != suite.name:
            continue  # it was not divided
        known = found is not None and bool(found.ids)
        rate, room = (number(found.rate), number(1 - found.rate)) if known else (MISSING, MISSING)
        counts = [str(len(found.ids)), str(found.request_count)] if found is not None else ["0", "0"]
        constrains, unparsed = "yes" if suite.constrains else "measured only", str(found.parse_failed) if found is not None else "0"
        rows.append([name, suite.kind, *counts, constrains, rate, room, unparsed, redaction.redact_uri(suite.data)])
    return rows


def _measured(experiment: Experiment, baseline: TrialResult, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How everything was measured: judge, decoding, prompts, hashes of data."""
    lines = [
        ("judge", next((s.judge for s in baseline.suites.values() if s.judge), name_of(experiment.safety.judge))),
        (
            "decoding",
            f"greedy, at most {experiment.safety.max_new_tokens} tokens a safety prompt, {experiment.task.max_new_tokens} a task row",
        ),
        ("system prompt", experiment.model.system_prompt or "none"),
        ("chat template", "set by model.chat_template" if experiment.model.chat_template else "the tokenizer's own"),
        ("degradation", "paired: the same prompts, untouched and tuned model; rise per request with Gaffke's bound"),
        ("task", f"{experiment.task.metric} on {'task.eval_data' if experiment.task.eval_data else 'rows held out of task.data'}"),
    ]
    lines += [(f"{name} hash", str(value)) for name, value in (facts.get("hashes") or {}).items()]
    try:
        for data in provenance.datasets(experiment):
            lines.append((data["context"], f"{data['source']}, " + (f"sha256 {data['sha256'][:16]}" if data["sha256"] else "from the hub")))
    except DataError as error:  # the report is written again later, when the data may have moved
        lines.append(("data", f"hashes are missing: {error}"))
    return lines


def _rows_read(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was changed and left out where training rows were read, as the first trial's record says it."""
    read = next((result.facts["rows_read"] for result, _ in rows if result.facts.get("rows_read")), [])
    return [("rows", sentence) for one in read for sentence in one["sentences"]]


def _sequential(experiment: Experiment, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What asking in sequence did, where it was switched on."""
    settings = experiment.safety.sequential
    if not settings.enabled:
        return []
    found = [suite for result, _ in rows for suite in result.suites.values() if suite.screening is not None]
    asked, whole = sum(s.screening.asked for s in found), sum(s.screening.of for s in found)
    drawn = "whole requests" if settings.by == "request" else "prompts, whatever their request"
    return [(
        "sequential evaluation",
        f"{sum(s.stopped_early for s in found)} of {len(found)} suites of searched trials were stopped early, {asked} of {whole} prompts asked; "
        f"drawn without replacement: {drawn}, a look every {settings.batch} prompts. The interval of a suite stopped early holds at every look and "
        "speaks of this suite; confirmed trials and the untouched model were asked in full",
    )]  # fmt: skip


def _chosen(searched: int, best: Configuration, baseline: TrialResult) -> str:
    """What of the winner's figures had a part in its choice."""
    waited = [name for name, suite in baseline.suites.items() if suite.phase == "confirm" and suite.constrains]
    fresh = [f"suite{'s' * (len(waited) > 1)} {', '.join(waited)}"] if waited else []
    if baseline.confirmation is not None:
        fresh.insert(0, f"{len(baseline.confirmation.ids)} rows of the task")
    if fresh:
        return (
            f"The best of {searched} searched trials was chosen by its figures on the search's rows and prompts, which flatter it (winner's curse); "
            f"{' and '.join(fresh)} had no part in the choice."
        )
    return (
        f"The best of {searched} searched trials was chosen by the figures it is reported with, so its score and its safety are on the "
        "flattering side (winner's curse)"
        + ("; it held its limits on further seeds too, on the same prompts." if len(best.seeds) > 1 else "; measure it on fresh prompts.")
    )


def caveats(experiment: Experiment, baseline: TrialResult, rows: Sequence[Row], selection: Selection) -> list[str]:
    """What the figures do not show, from this run's own settings."""
    judge = name_of(experiment.safety.judge)
    shown = selection.best or selection.nearest_miss
    searched, lines = sum(r.phase == "search" for r, _ in rows), system_prompts.serving(shown.trials[0][0]) if shown is not None else []
    if selection.best is not None and searched > 1:
        lines.append(_chosen(searched, selection.best, baseline))
    if shown is not None and len(shown.seeds) == 1:
        lines.append(
            "The configuration shown was trained on one seed: the intervals cover the choice of prompts, not the luck of training."
        )
    lines.append(
        JUDGES.get(judge, f"Judge `{judge}` can err; read attack success with its errors in mind.")
    )
    failed = {name: s.parse_failed for name, s in baseline.suites.items() if s.parse_failed}
    if failed:
        lines.append(
            f"The judge gave no verdict on {failed} answers of the untouched model; they count as unsafe in its rates, and as safe where the "
            "tuned model is compared with it, so that they excuse nothing."
        )
    lines.append(safety.asked_caveat(baseline.suites))
    lines.append("Intervals hold for each trial and limit by itself; nothing is corrected for looking at many trials.")
    few = [f"{s.name} (n={len(s.ids)})" for s in baseline.suites.values() if s.constrains and len(s.ids) < 100]
    if few:
        lines.append(f"Few prompts decide on {', '.join(few)}; small rises stay undecided or unseen.")
    return lines
