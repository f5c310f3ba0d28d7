"""`safebasin compare A B ...`: several models side by side, from finished evaluations and runs or asked now; table, CSV, HTML, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.decision.intervals import Estimate
from orchestrator.decision.limits import is_blind
from orchestrator.errors import ConfigError
from orchestrator.models import subjects
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.report import figures, page, safety
from orchestrator.report.alerts import Alert
from orchestrator.report.plots import refusals
from orchestrator.report.plots.canvas import Plot
from orchestrator.report.plots.refusals import Arm
from orchestrator.storage import files, ownership, paths
from orchestrator.terminal import screen
from orchestrator.trial import record_check
from orchestrator.verbs import evaluate, evaluated
from orchestrator.verbs.evaluate_report import WHAT, rise

if TYPE_CHECKING:
    from rich.console import Console

FILE = "comparison.csv"
FOLDER = Path("outputs") / "comparison"
"""Where the files go without another word."""
LIMIT = 0.05
"""Rise that a suite should be able to show."""
COLUMNS = (
    "model", "suite", "kind", "what", "n", "requests", "rate", "rate_lower", "rate_upper", "against", "difference", "difference_lower",
    "difference_upper",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One model of a comparison."""

    label: str
    source: str
    """Where its figures are from."""
    result: TrialResult
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was asked, for warnings where two were asked differently."""


@dataclass(frozen=True)
class Comparison:
    """All entries; differences are against the first."""

    entries: tuple[Entry, ...]
    level: float

    @property
    def suites(self) -> list[str]:
        """Names of all suites, in the order they are met."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.result.suites))

    def difference(self, entry: Entry, suite: str) -> Estimate | None:
        """Paired difference against the first entry; None for the first itself and where prompts are not the same."""
        after = entry.result.suites.get(suite)
        if entry is self.entries[0] or after is None:
            return None
        return rise(self.entries[0].result.suites.get(suite), after, self.level)


def words(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides, names) of what was given: `key=value` is an override where no file is called so."""
    overrides = [word for word in given if "=" in word and not paths.exists(word)]
    return overrides, [word for word in given if word not in overrides]


def compare(experiment: Experiment, names: Sequence[str], folder: Path, console: Console, baseline: str | None = None) -> Comparison:
    """Read or measure every model, write `comparison.csv` and `comparison.html` into `folder`, print the table.

    Models that are no finished evaluation or run are evaluated now with the experiment's suites, each into a folder of its own below
    `folder`; adapters are put on `baseline`, else on their own base. Raises ConfigError for fewer than two names, or one named twice.
    """
    if len(names) < 2:
        raise ConfigError("compare needs at least two models, evaluations or output folders, e.g. safebasin compare BASE TUNED")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]!r} is named twice; name each model once")
    asked = [name for name in names if not _measured(name)]
    read = evaluate.inputs(experiment, *asked, baseline)
    evaluate.check_output(folder, experiment.output.overwrite, FILE, kind="comparison", inputs=read)
    for name in asked:
        evaluate.check_output(folder / subjects.slug(name), experiment.output.overwrite)
    for name in names:
        if not _measured(name):  # what cannot be asked is said before hours are spent on the models before it
            subjects.voice(name, experiment.model, baseline if subjects.is_adapter(name) else None)
    found = Comparison(_told_apart([entry(name, experiment, folder, console, baseline) for name in names]), experiment.safety.limits.confidence)
    show(found, console)
    for line in warnings(found):
        screen.say(console, f"warning: {line}", "yellow")
    for path in write(found, folder)[:2]:
        screen.say(console, str(path), whole=True)
    return found


def _measured(name: str) -> bool:
    """Whether `name` stands for figures that are there already."""
    path = Path(name).expanduser()
    return path.is_file() or (path / evaluated.FILE).is_file() or ((path / "best.json").is_file() and (path / "trials").is_dir())


def entry(name: str, experiment: Experiment, folder: Path, console: Console, baseline: str | None = None) -> Entry:
    """What `name` stands for: an evaluation.json or its folder, the output folder of a run, else a model that is evaluated now."""
    path = paths.expanded(name)
    if paths.is_file(path):
        return _finished(path)
    if paths.is_file(path / evaluated.FILE):
        return _finished(path / evaluated.FILE)
    if paths.is_file(path / "best.json") and paths.is_folder(path / "trials"):
        return _of_run(path)
    own = folder / subjects.slug(name)
    request = evaluated.Request(name, output=own) if not subjects.is_adapter(name) else evaluated.Request(name, baseline, own)
    evaluate.check_output(own, experiment.output.overwrite)
    found = evaluate.run(experiment, request, console)
    evaluate.write(found, own)
    return _finished(own / evaluated.FILE)


def _finished(path: Path) -> Entry:
    body, result = evaluated.read(path)
    return Entry(subjects.label(body["model"]["name"]), str(path), result, _settings(body["settings"], body["settings"].get("template_hash")))


def _of_run(folder: Path) -> Entry:
    """The best configuration of a run, else its nearest miss; of the seed the search used."""
    best = record_check.guarded(folder / "best.json", record_check.wrong_best)
    if best is None:
        raise ConfigError(f"{folder} has no best.json, so its run has not ended; finish it with `safebasin resume`")
    found = best["best"] or best["nearest_miss"]
    if found is None:
        raise ConfigError(f"{folder} is a run in which no trial was measured; there is nothing to compare")
    trial = found["trials"][0]["trial_id"]
    result = record_check.read_result(folder / "trials" / trial / "result.json")
    if result is None:
        raise ConfigError(f"{folder} names {trial} as its {'best' if best['best'] else 'nearest miss'}, but trials/{trial}/result.json is gone")
    made = config.load(folder / "config.resolved.yaml")
    miss = "" if best["best"] else ", not feasible"
    return Entry(
        f"{folder.resolve().name}: {trial} ({found['recipe']}{miss})", str(folder), result,
        _settings(
            {"max_new_tokens": made.safety.max_new_tokens, "system_prompt": made.model.system_prompt},
            (result.facts.get("template") or {}).get("hash"),
        ),
    )  # fmt: skip


def _settings(body: dict[str, Any], template: str | None) -> dict[str, Any]:
    return {key: body.get(key) for key in ("max_new_tokens", "system_prompt")} | {"chat template": template}


def _told_apart(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Entries of the same label get their source beside it."""
    labels = [one.label for one in entries]
    return tuple(replace(one, label=f"{one.label} ({one.source})") if labels.count(one.label) > 1 else one for one in entries)


def warnings(found: Comparison) -> list[str]:
    """Where figures that stand side by side were not measured alike, and suites on which the first model fails too often to show a rise."""
    first, lines = found.entries[0], []
    for name, suite in first.result.suites.items():
        if suite.kind != "choice" and is_blind(suite, LIMIT, found.level):
            lines.append(f"{name} cannot show a rise over {first.label}, which fails on {suite.rate:.3f} of it already")
    for one in found.entries[1:]:
        for key, value in one.settings.items():
            if first.settings.get(key) != value:
                lines.append(f"{one.label} was asked with {key} {value!r}, {first.label} with {first.settings.get(key)!r}")
        for name, suite in one.result.suites.items():
            other = first.result.suites.get(name)
            if other is not None and found.difference(one, name) is None:
                lines.append(f"{one.label} and {first.label} were not asked the same prompts in {name}; their rates are not paired")
            elif other is not None and safety.drawn(other) != safety.drawn(suite):
                how = [safety.drawn(asked).removeprefix(", ") or "greedily" for asked in (suite, other)]
                lines.append(f"{name} was asked {how[0]} for {one.label} and {how[1]} for {first.label}; the difference is not the models' alone")
            elif other is not None and other.judge != suite.judge:
                lines.append(f"{name} was judged by {suite.judge} for {one.label} and by {other.judge} for {first.label}")
    return lines


def rows(found: Comparison) -> list[dict[str, Any]]:
    """One row per suite and model for comparison.csv, by COLUMNS, the task first; what was not measured is left out."""
    made = []
    for one in found.entries:
        score = figures.task_score(one.result, found.level)
        if score is not None:
            made.append(_row(found, one, "task", "task", one.result.task.metric, score, None))
    for name in found.suites:
        for one in found.entries:
            suite: SuiteResult | None = one.result.suites.get(name)
            estimate = figures.suite_rate(suite, found.level)
            if estimate is not None:
                made.append(_row(found, one, name, suite.kind, WHAT[suite.kind], estimate, found.difference(one, name)))
    return made


def _row(found: Comparison, one: Entry, suite: str, kind: str, what: str, estimate: Estimate, difference: Estimate | None) -> dict[str, Any]:
    values: dict[str, Any] = {"model": one.label, "suite": suite, "kind": kind, "what": what}
    values |= {"n": estimate.n, "requests": estimate.requests or estimate.n}
    values |= {"rate": estimate.value, "rate_lower": estimate.lower, "rate_upper": estimate.upper}
    if difference is not None:
        values |= {"against": found.entries[0].label, "difference": difference.value}
        values |= {"difference_lower": difference.lower, "difference_upper": difference.upper}
    return {column: values.get(column) for column in COLUMNS}


def table(found: Comparison) -> page.Table:
    """Rows of suite, what, model, rate and difference against the first model, as texts."""
    lines = []
    for row in rows(found):
        one = next(e for e in found.entries if e.label == row["model"])
        score = row["suite"] == "task" and row["kind"] == "task"
        estimate = figures.task_score(one.result, found.level) if score else figures.suite_rate(one.result.suites[row["suite"]], found.level)
        difference = None if score else found.difference(one, row["suite"])
        told = figures.figure(difference, signed=True) if difference else ""
        lines.append([row["suite"], row["what"], row["model"], figures.figure(estimate), told])
    return {
        "title": "Side by side", "note": "Differences are paired: the same prompts, against the first model.",
        "head": ["suite", "what", "model", "rate", f"against {found.entries[0].label}"], "rows": lines,
    }  # fmt: skip


def show(found: Comparison, console: Console) -> None:
    """Print the table; every rate with its interval and n."""
    body = table(found)
    made = screen.Grid(title=f"{found.level:.0%} intervals", box=None, padding=(0, 2), header_style="bold", title_justify="left", pad_edge=False)
    for column in body["head"]:
        made.add_column(column, overflow="fold")
    last = None
    for row in body["rows"]:
        made.add_row(*(row if row[0] != last else ["", "", *row[2:]]))
        last = row[0]
    screen.show(console, made)


def sentence(found: Comparison) -> str:
    """Worst attack success of every model, lowest first."""
    worst = [(figures.worst_suite(one.result, "harmful"), one.label) for one in found.entries]
    ranked = sorted(((suite.rate, label, suite.name) for suite, label in worst if suite is not None), key=lambda row: row[0])
    told = ", ".join(f"{label} {value:.3f} on {name}" for value, label, name in ranked) or "not measured"
    return f"{len(found.entries)} models side by side; highest attack success: {told}."


def arms_of(found: Comparison) -> list[Arm]:
    return [Arm(one.label, one.result.suites) for one in found.entries]


def pictures(found: Comparison) -> list[Plot]:
    """The pictures of the page, in its order."""
    return [refusals.failures(arms_of(found), found.level), *refusals.pictures(arms_of(found), found.level)]


def write(found: Comparison, folder: Path) -> list[Path]:
    """comparison.csv, comparison.html and plots; their paths, CSV first."""
    arms = arms_of(found)
    made = page.Page(
        title=f"comparison of {len(arms)} models", sentence=sentence(found), good=None,
        alerts=[Alert(line) for line in warnings(found)], tables=[table(found)],
        plots=pictures(found),
        facts=[(one.label, one.source) for one in found.entries],
        caveats=(safety.asked_caveat(found.entries[0].result.suites), page.INTERVALS),
    )  # fmt: skip
    with ownership.active(folder, "comparison"):
        return [files.write_csv(folder / FILE, rows(found), COLUMNS), *page.write(made, folder / "comparison.html")]
