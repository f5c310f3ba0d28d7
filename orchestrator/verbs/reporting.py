"""`safebasin report`: a run's report written anew from its records, under its own limits or others; several runs in one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.config import overrides as settings
from orchestrator.data import made_up
from orchestrator.decision import selection as decision_selection
from orchestrator.decision.selection import Selection
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.experiment import places, records
from orchestrator.experiment.records import RunRecords
from orchestrator.report import figures, page
from orchestrator.report import run as report
from orchestrator.report.alerts import Alert
from orchestrator.storage import addresses, ownership
from orchestrator.storage.paths import folder_name

LIMITS = "safety.limits."
FILE = "report.html"


@dataclass(frozen=True)
class Read:
    """A run and what is chosen of it under the limits asked for."""

    found: RunRecords
    experiment: Experiment
    """The run's, with those limits."""
    selection: Selection

    @property
    def name(self) -> str:
        return Path(self.found.shown.rstrip("/")).name

    @property
    def sentence(self) -> str:
        return figures.headline(self.selection, self.found.baseline, self.experiment, stopped=not self.found.handed_over)


def write(names: Sequence[str], overrides: Sequence[str], output: Path | None, overwrite: bool = False) -> tuple[list[Read], list[Path]]:
    """Write the report of one run, or one page of several, into a folder of its own; (what was read, paths, the page first).

    `overrides`: other limits, `safety.limits.KEY=VALUE`. Raises ConfigError where there is no run, or for an override of anything else,
    SafebasinError for a run without a record of the untouched model, and for runs that cannot be put together.
    """
    odd = next((one for one in overrides if not one.startswith(LIMITS)), None)
    if odd is not None:
        raise ConfigError(f"{odd!r:.200}: a report is of what was measured, so only its limits can be others; write {LIMITS}max_degradation=0.02")
    if not names or len(set(names)) < len(names):
        raise ConfigError("report needs the folder of a run, or several, each once: safebasin report DIR ...")
    folder = output or Path("outputs") / f"report-{Path(names[0].rstrip('/')).name}"
    folder_name(folder, "--output")
    local = [("the run", Path(name)) for name in names if not addresses.is_address(name) and Path(name).exists()]
    try:
        places.check_output(folder, "report", local, field="--output", result=FILE, overwrite=overwrite)
    except SafebasinError as error:
        raise type(error)(str(error).replace("output.overwrite=true", "--overwrite")) from None
    read = [_read(name, overrides) for name in names]
    if len(read) == 1:
        return read, _one(read[0], folder, bool(overrides))
    records.pooled([one.found for one in read])
    with ownership.active(folder, "report"):
        return read, page.write(_page(read, bool(overrides)), folder / FILE)


def _read(name: str, overrides: Sequence[str]) -> Read:
    found = records.read(name)
    if found.baseline is None:
        raise SafebasinError(f"{name} holds no record of the untouched model, so nothing can be compared; go on with: safebasin resume {name}")
    under = _limits(found.experiment, overrides)
    made = found.experiment.model_copy(update={"safety": found.experiment.safety.model_copy(update={"limits": under})})
    return Read(found, made, decision_selection.best(found.rows(under)))


def _limits(experiment: Experiment, overrides: Sequence[str]) -> config.Limits:
    """The experiment's limits with what was asked for, checked as a config's are."""
    if not overrides:
        return experiment.safety.limits
    raw = {"safety": {"limits": experiment.safety.limits.model_dump(mode="json")}}
    for text in overrides:
        settings.apply(raw, text, Experiment)
    return config.from_dict(raw).safety.limits


def _one(read: Read, folder: Path, other: bool) -> list[Path]:
    rows = read.found.rows(read.experiment.safety.limits)
    facts = {"stopped": not read.found.handed_over, "hashes": read.found.content, "other_limits": other, "place": f"{read.found.shown}/"}
    return report.write_report(folder, read.experiment, read.found.baseline, rows, read.selection, facts, kind="report")


def _page(read: Sequence[Read], other: bool) -> page.Page:
    level = read[0].experiment.safety.limits.confidence
    runs = [[one.name, str(len(one.found.results)), _best(one, level), one.sentence] for one in read]
    best = [one for one in read if one.selection.best is not None]
    winner = max(best, key=lambda one: one.selection.best.score, default=None)
    told = f"{len(read)} runs, {sum(len(one.found.results) for one in read)} trials: " + (
        f"the best is of {winner.name}. {winner.sentence}" if winner is not None else "none has a configuration that keeps every limit."
    )
    notes = ["The runs worked with the same untouched model and asked the same suites."]
    alerts = [Alert("the limits are not those the runs were searched under")] if other else []
    notes += [line for line in dict.fromkeys(made_up.sentence(one.experiment) for one in read) if line]
    tables = [
        {"title": "Runs", "note": "", "head": ["run", "trials", "best", "outcome"], "rows": runs},
        {"title": "Recipes over all runs", "note": "A run's choice is its own: nothing here was searched together.",
         "head": ["recipe", "run", "feasible of tried", "verdict", "task score", "attack success"], "rows": _recipes(read, level)},
    ]  # fmt: skip
    facts = [(one.name, one.found.shown) for one in read]
    return page.Page(f"report of {len(read)} runs", told, winner is not None, alerts, notes, tables, facts=facts)


def _best(one: Read, level: float) -> str:
    found = one.selection.best
    return "none" if found is None else f"{found.trials[0][0].trial_id} ({found.recipe}), {figures.figure(figures.task_score(found.shown, level))}"


def _recipes(read: Sequence[Read], level: float) -> list[list[str]]:
    """A line for each recipe and run: its best feasible configuration, else its nearest miss."""
    rows = []
    for one in read:
        for name, found in figures.by_recipe(one.selection, one.experiment.recipe_names).items():
            tried = [c for c in one.selection.configurations if c.recipe == name]
            asr = figures.figure(figures.suite_rate(figures.worst_suite(found.shown, "harmful"), level))
            feasible = f"{sum(c.verdict == 'feasible' for c in tried)} of {len(tried)}"
            rows.append([name, one.name, feasible, found.verdict, figures.figure(figures.task_score(found.shown, level)), asr])
    return sorted(rows, key=lambda row: (row[0], row[1]))
