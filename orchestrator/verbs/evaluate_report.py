"""What `safebasin evaluate` says of its figures: the table in the terminal, the page, the CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.decision.intervals import Estimate, paired_difference, rate
from orchestrator.evaluation.judges.registry import name_of
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.report import alerts as warnings
from orchestrator.report import figures as summary
from orchestrator.report import page, view
from orchestrator.report import safety as report_safety
from orchestrator.report.alerts import Alert
from orchestrator.report.plots import refusals
from orchestrator.report.plots.canvas import Plot
from orchestrator.report.plots.refusals import Arm
from orchestrator.storage import files
from orchestrator.terminal import screen

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.verbs.evaluated import Evaluated

WHAT = {"harmful": "attack success", "benign": "over-refusal", "choice": "wrong choices"}
COLUMNS = (
    "suite", "kind", "attack", "phase", "constrains", "what", "n", "requests", "rate", "rate_lower", "rate_upper", "refused", "refused_lower",
    "refused_upper", "gibberish", "empty", "unparsed", "before", "before_lower", "before_upper", "rise", "rise_lower", "rise_upper",
)  # fmt: skip


def rise(before: SuiteResult | None, after: SuiteResult, level: float) -> Estimate | None:
    """Paired rise of a suite's failures, per request; None where the two were not asked the same prompts."""
    if before is None or before.ids != after.ids or before.kind != after.kind or _hash(before) != _hash(after):
        return None
    return paired_difference(before.certain, after.failures, before.requests, level)


def _hash(suite: SuiteResult) -> Any:
    return suite.source.get("sha256")


def rate_rows(found: Evaluated) -> list[dict[str, Any]]:
    """One row per suite for rates.csv and evaluation.json, by COLUMNS; what was not measured is None."""
    level = found.experiment.safety.limits.confidence
    rows = []
    for name, suite in found.result.suites.items():
        before = found.before.suites.get(name) if found.before is not None else None
        estimates = {
            "rate": rate(suite.failures, suite.requests, level), "refused": rate(suite.refused, suite.requests, level),
            "before": rate(before.failures, before.requests, level) if before is not None else None, "rise": rise(before, suite, level),
        }  # fmt: skip
        row: dict[str, Any] = {
            "suite": name, "kind": suite.kind, "attack": suite.attack, "phase": suite.phase, "constrains": suite.constrains,
            "what": WHAT[suite.kind], "n": len(suite.ids), "requests": suite.request_count,
            **{column: sum(getattr(suite, column) or ()) for column in ("gibberish", "empty", "unparsed")},
        }  # fmt: skip
        for column, estimate in estimates.items():
            for part, suffix in (("value", ""), ("lower", "_lower"), ("upper", "_upper")):
                row[column + suffix] = getattr(estimate, part) if estimate is not None else None
        rows.append({column: row[column] for column in COLUMNS})
    return rows

RISE = "rise, paired"
DIFFER = 0.9
"""Agreement of two judges below which it is said beside the rates."""


def sentence(found: Evaluated) -> str:
    """The outcome in one sentence."""
    level, (own, base) = found.experiment.safety.limits.confidence, found.labels
    worst = {kind: summary.worst_suite(found.result, kind) for kind in ("harmful", "benign")}
    rates = [f"{WHAT[k]} {summary.figure(summary.suite_rate(s, level))} on {s.name}" for k, s in worst.items() if s is not None]
    measured = "; ".join(rates) or "no suite of harmful or harmless prompts"
    if base is None:
        return f"{own}: {measured}. No baseline was named, so there is no verdict."
    if found.verdict is None:
        return f"{own} against {base}: {measured}. No suite constrains, so there is no verdict."
    tight = max(found.constraints, key=lambda c: c.value)
    by = summary.kept(tight, level) if tight.estimate.n else f"{tight.name} could not be measured on the same prompts"
    return f"{own} against {base}: {found.verdict}; {by}."


def cells(found: Evaluated) -> list[list[str]]:
    """Rows of the main table: suite, what, baseline, model, rise. Without a baseline its columns are left out."""
    level, rows = found.experiment.safety.limits.confidence, []
    paired = found.before is not None
    score = summary.task_score(found.result, level)
    if score is not None:
        rows.append(["task", found.result.task.metric, summary.figure(summary.task_score(found.before, level)), summary.figure(score), ""])
    for name, suite in found.result.suites.items():
        before = found.before.suites.get(name) if paired else None
        what = WHAT[suite.kind] + report_safety.drawn(suite) + ("" if suite.constrains else " (measured only)")
        figures = [summary.figure(summary.suite_rate(one, level)) for one in (before, suite)]
        rows.append([name, what, *figures, summary.figure(rise(before, suite, level), signed=True)])
    for name, one in (found.result.facts.get("external") or {}).items():
        old = ((found.before.facts.get("external") or {}).get(name) if paired else None) or {}
        rows.append([name, "external", *(_external(values) for values in (old, one)), ""])
    return rows if paired else [[*row[:2], row[3]] for row in rows]


def _external(values: dict[str, Any]) -> str:
    if not values:
        return summary.MISSING
    error = f" \u00b1 {values['stderr']:.3f}" if values["stderr"] is not None else ""
    return f"{values['value']:.3f}{error} n={values['n']}"


def _rates(found: Evaluated) -> dict[str, Any]:
    """"head", "rows" and "ids" of the page's first table: `cells`, and beside them the second judge's rates where one looked."""
    level, (own, base) = found.experiment.safety.limits.confidence, found.labels
    head, rows, ids = _head(found), cells(found), _ids(found)
    models = [one for one in (found.before, found.result) if one is not None]
    if not any(suite.second is not None for one in models for suite in one.suites.values()):
        return {"head": head, "rows": rows, "ids": ids}
    by_id = {warnings.row_id(name): name for name in found.result.suites}
    wider = []
    for row, key in zip(rows, ids, strict=True):
        name = by_id.get(key)
        suites = [one.suites.get(name) for one in models]
        more = [summary.figure(warnings.second_rate(suite, level)) if name else "" for suite in suites]
        change = warnings.second_rise(found.before.suites.get(name), suites[-1], level) if name and found.before is not None else None
        more += [] if base is None else [summary.figure(change, signed=True) if name else ""]
        wider.append([*row, *more])
    second = [f"second judge: {label}" for label in (base, own) if label is not None] + ([] if base is None else ["second judge: rise"])
    return {"head": [*head, *second], "rows": wider, "ids": ids}


def _ids(found: Evaluated) -> list[str]:
    """Ids of the rows of `cells`, so that a warning can name its row."""
    score = [warnings.SCORE] if summary.task_score(found.result, found.experiment.safety.limits.confidence) is not None else []
    return [*score, *map(warnings.row_id, found.result.suites), *("" for _ in found.result.facts.get("external") or {})]


def _head(found: Evaluated) -> list[str]:
    own, base = found.labels
    return ["suite", "what", own] if base is None else ["suite", "what", base, own, RISE]


def show(found: Evaluated, console: Console) -> None:
    """Print the main table, every rate with its interval; n once a row (requests stand on the page), then what the rates hide."""
    title = f"{found.experiment.safety.limits.confidence:.0%} intervals; judge {name_of(found.experiment.safety.judge)}, greedy decoding"
    table = screen.Grid(title=title, box=None, padding=(0, 1), collapse_padding=True, header_style="bold", title_justify="left", pad_edge=False)
    head, narrow = _head(found), console.width < 110
    for i, column in enumerate(head):
        wide = (14 if narrow else 20) + 2 * (column == RISE)  # an interval stays on one line
        table.add_column(column, overflow="fold", min_width=wide if i > 1 else None, max_width=wide if narrow else None)
    table.add_column("n", justify="right", no_wrap=True, min_width=3)
    for name, what, *figures in cells(found):
        parts = [figure.partition(" n=") for figure in figures]
        sizes = dict.fromkeys(size.partition(" ")[0] for _, _, size in parts if size)
        shown = [text.replace(" [", "\n[") if narrow else text for text, _, _ in parts]
        table.add_row(name, what, *shown, " / ".join(sizes))
    screen.show(console, table)
    for line in apart(found):
        screen.say(console, line)
    for line in alerts(found):
        screen.say(console, f"WARNING: {line}", "yellow")


def alerts(found: Evaluated) -> list[Alert]:
    """What `run` warns of, in the same words: suites that can decide nothing, or show no rise, and rises that no limit holds or that only the second
    judge sees."""
    return warnings.of_models(found.before, found.result.suites, found.experiment)


def apart(found: Evaluated) -> list[str]:
    """A line for each suite and model with what a rate alone would hide: gibberish, empty, unparsed answers, repeated prompts left out, and
    two judges that differ."""
    lines, (own, base) = [], found.labels
    for who, result in ((base, found.before), (own, found.result)):
        for name, suite in (result.suites if result is not None else {}).items():
            counts = [(what, sum(getattr(suite, what) or ())) for what in ("gibberish", "empty", "unparsed")]
            said = [f"{count} {what}" for what, count in counts if count]
            repeated = suite.source.get("duplicates", 0)
            said += [f"{repeated} repeated prompt{'s' * (repeated > 1)} left out"] if repeated and result is found.result else []
            lines += [f"{who} on {name}, of {len(suite.ids)} answers: {', '.join(said)}"] if said else []
            both = report_safety.judges_agree(suite)
            differ = both[suite.kind == "benign"] if both is not None else None
            if differ is not None and differ.agreement < DIFFER:
                what = "refused" if suite.kind == "benign" else "unsafe"
                lines.append(f"{who} on {name}: the judges differ on what is {what} ({differ.text()}; second judge {suite.second_judge}); read both")
    return lines


def pictures(found: Evaluated) -> list[Plot]:
    """The pictures of the page, in its order."""
    own, base = found.labels
    arms = ([Arm(base, found.before.suites)] if found.before is not None else []) + [Arm(own, found.result.suites)]
    level = found.experiment.safety.limits.confidence
    return [refusals.failures(arms, level), *refusals.pictures(arms, level)]


def write(found: Evaluated, folder: Path) -> list[Path]:
    """evaluation.html with its plots, rates.csv and, with a baseline, the CSV files of transitions; their paths, the page first."""
    own, base = found.labels
    made = page.Page(
        title=f"evaluation of {own}" + (f" against {base}" if base is not None else ""), sentence=sentence(found), alerts=alerts(found),
        good=None if found.verdict is None else found.verdict == "feasible", notes=notes(found), tables=_tables(found), plots=pictures(found),
        facts=_facts(found), caveats=_caveats(found), config=config.dump_yaml(found.experiment),
    )  # fmt: skip
    paths = page.write(made, folder / "evaluation.html")
    paths.append(files.write_csv(folder / "rates.csv", rate_rows(found), COLUMNS))
    return paths + (report_safety.write_csv(folder, found.before, found.result) if found.before is not None else [])


def notes(found: Evaluated) -> list[str]:
    """What must be known before the figures are read."""
    lines = [f"All intervals [lower, upper] are at the {found.experiment.safety.limits.confidence:.0%} level; n counts prompts or rows."]
    if found.baseline is not None and found.baseline["hash"] == found.model["hash"]:
        lines.append("The model and the baseline have the same weights.")
    for who, result in (("The model", found.result), ("The baseline", found.before)):
        told = (result.facts.get("template") or {}).get("notes", []) if result is not None else []
        lines += [f"{who}: {note}." for note in told]
    return lines + page.pocket_note(found.experiment)


def _tables(found: Evaluated) -> list[page.Table]:
    own, base = found.labels
    level = found.experiment.safety.limits.confidence
    limits = [
        [
            c.name, summary.figure(c.estimate, signed=True), summary.figure(c.among_passing), f"{c.limit:g}",
            summary.number(-c.value, signed=True) if c.estimate.n else summary.MISSING, c.verdict,
        ]
        for c in found.constraints
    ]  # fmt: skip
    first: list[page.Table] = [
        {"title": "Rates", "note": "The rise is paired: the same prompts, both models.", **_rates(found)},
        {"title": "Limits", "note": "feasible: the whole interval keeps the limit; infeasible: none of it does; undecided otherwise.",
         "head": ["limit on", "measured rise", "fails of what passed before", "limit", "room from interval to limit", "verdict"], "rows": limits},
    ]  # fmt: skip
    if found.before is None:
        return first + report_safety.named(report_safety.tables(found.result, None, level), own, None)
    return first + report_safety.named(report_safety.tables(found.before, found.result, level), base, own)


def _facts(found: Evaluated) -> list[tuple[str, str]]:
    safety, template = found.experiment.safety, found.result.facts["template"]
    identities = [("model", found.model), *([("baseline", found.baseline)] if found.baseline else [])]
    lines = [(who, ", ".join(f"{key} {value}" for key, value in one.items())) for who, one in identities]
    tokens = f"{safety.max_new_tokens} tokens a safety prompt, {found.experiment.task.max_new_tokens} a task row"
    return [
        *lines, ("judge", next((s.judge for s in found.result.suites.values() if s.judge), name_of(safety.judge))),
        ("decoding", f"{report_safety.decoding(found.result.suites)}; at most {tokens}"),
        ("system prompt", template["evaluation_system_prompt"] or "none"), ("chat template", template["hash"]),
        ("duration", view.duration(_seconds(found.result, found.before))),
    ]  # fmt: skip


def _seconds(*results: TrialResult | None) -> float:
    return sum(r.seconds["total"] for r in results if r is not None)


def _caveats(found: Evaluated) -> list[str]:
    judge = name_of(found.experiment.safety.judge)
    few = [f"{s.name} (n={len(s.ids)})" for s in found.result.suites.values() if s.constrains and len(s.ids) < 100]
    lines = [
        view.JUDGES.get(judge, f"Judge `{judge}` can err; read attack success with its errors in mind."),
        report_safety.asked_caveat(found.result.suites),
        page.INTERVALS,
    ]
    lines.append("Defences around generation (perturbation, a system prompt of a recipe) are no part of a model folder and are not measured here.")
    return lines + ([f"Few prompts decide on {', '.join(few)}; small rises stay undecided or unseen."] if few else [])
