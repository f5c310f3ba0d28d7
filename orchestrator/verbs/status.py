"""`safebasin status`: how far a run is, from its records alone; the run is not touched."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from orchestrator.decision import selection as decision_selection
from orchestrator.experiment import records
from orchestrator.experiment.progress import duration
from orchestrator.experiment.records import RunRecords
from orchestrator.report import figures


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    place: str
    state: str
    """`running`, `ended`, or `interrupted`: not driven by anybody, with work left."""
    trials: int
    done: int
    failed: int
    confirmations: int
    feasible: int
    open: tuple[str, ...]
    outcome: str
    """The best so far, or why there is none."""
    written: float | None
    """Seconds since a trial last ended; None where none did, or where nobody can tell."""
    troubles: tuple[str, ...] = ()


def look(place: str) -> Status:
    """The status of a run in a folder or at an address. Raises ConfigError where there is no run."""
    return status(records.read(place), records.driven(place))


def status(found: RunRecords, running: bool, now: float | None = None) -> Status:
    """What the records say; `running`: whether a process drives the run."""
    search = [one for one in found.results if one.phase == "search"]
    rows = found.rows()
    budget = found.experiment.search
    over = found.handed_over and not found.open and (len(search) >= budget.trials or budget.time_budget_s is not None)
    ago = None if found.written is None else max(0.0, (time.time() if now is None else now) - found.written)
    state = "running" if running else "ended" if over else "interrupted"
    outcome = "the untouched model was not measured yet"
    if found.baseline is not None:
        outcome = figures.headline(decision_selection.best(rows), found.baseline, found.experiment, stopped=state != "ended")
    return Status(
        found.shown, state, found.experiment.search.trials, len(search), sum(one.state == "failed" for one in search),
        len(found.results) - len(search), sum(judged.verdict == "feasible" for one, judged in rows if one.phase == "search"), found.open, outcome,
        ago, found.troubles,
    )  # fmt: skip


def lines(what: Status) -> list[str]:
    """The status in sentences."""
    when = "" if what.written is None else f", the last trial ended {duration(what.written)} ago"
    told = [f"{what.place}: {what.state}{when}"]
    confirmed = f"; {what.confirmations} confirmation{'s' * (what.confirmations != 1)}" if what.confirmations else ""
    told.append(f"{what.done} of {what.trials} trials done, {what.feasible} feasible, {what.failed} failed{confirmed}")
    if what.open:
        told.append(f"asked and not ended: {', '.join(what.open[:8])}" + (f" and {len(what.open) - 8} more" if len(what.open) > 8 else ""))
    told += [what.outcome, *(f"warning: {line}" for line in what.troubles)]
    return told + ([f"go on with: safebasin resume {what.place}"] if what.state == "interrupted" else [])


def plain(what: Status) -> dict[str, object]:
    return asdict(what)
