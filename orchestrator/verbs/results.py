"""What the Python API gives back: typed results with tables as DataFrames and the report's own pictures as figures."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.decision import selection as decision_selection
from orchestrator.decision.intervals import Estimate
from orchestrator.decision.limits import Verdict
from orchestrator.decision.selection import Configuration, Selection
from orchestrator.errors import SafebasinError, UnknownNameError
from orchestrator.experiment.records import Row, RunRecords
from orchestrator.report import run as report
from orchestrator.report import table
from orchestrator.report.plots import canvas
from orchestrator.report.plots.canvas import Plot

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from orchestrator.config import Experiment
    from orchestrator.records import TrialResult


FIGURES = [name for name in table.TRIAL_COLUMNS if name.endswith(("_score", "_lower", "_upper", "_rise")) or name in (
    "asr", "over_refusal", "degradation", "seconds"
)]  # fmt: skip
"""Columns of a trial's figures: numbers, also where none was measured."""


@dataclass(frozen=True)
class Chosen:
    """A configuration of a run: the best, or the nearest miss."""

    trial_id: str
    """The trial whose model is handed over."""
    recipe: str
    params: dict[str, Any]
    seeds: tuple[int, ...]
    verdict: Verdict
    score: float
    """Mean task score over the seeds, 0..1."""
    degradation: Estimate | None
    """Rise of attack success over the untouched model on the worst suite, with its interval; None where it was not measured."""
    over_refusal_rise: Estimate | None
    model: Path | None
    """Folder of the model handed over; None where none is (a nearest miss, an address that was not fetched)."""


def chosen(found: Configuration, model: Path | None) -> Chosen:
    """A configuration's figures, those of the trial that is handed over."""
    result, judged = found.handed_over
    figures = (found.score, judged.degradation, judged.over_refusal_rise)
    whole = model if model is not None and model.is_dir() else None
    return Chosen(result.trial_id, found.recipe, dict(found.params), found.seeds, found.verdict, *figures, whole)


class Pictured:
    """Something with pictures."""

    @property
    def plots(self) -> dict[str, Plot]:
        """Pictures by name; one without data is a sentence."""
        raise NotImplementedError

    def plot(self, name: str) -> Figure:
        """A picture as matplotlib figure, as the report draws it; one without data says why. Raises UnknownNameError."""
        if name not in self.plots:
            raise UnknownNameError("plot", name, list(self.plots))
        made = self.plots[name]
        return made.png.figure if isinstance(made.png, canvas.Png) else canvas.sentence(made.title, made.text)


@dataclass(frozen=True)
class RunResult(Pictured):
    """A run: its outcome, its trials, its pictures. What the folder's records say; nothing is kept beside them."""

    records: RunRecords
    verdict: str
    """`feasible`, `nothing feasible`, `nothing measured`, or `stopped`: it was ended, or still goes on."""
    sentence: str
    """The outcome in one sentence."""
    exit_code: int
    """As the command line ends: 0 feasible, 3 nothing feasible, 1 stopped or nothing measured."""

    @property
    def folder(self) -> str:
        """The run's folder or address."""
        return self.records.shown

    @property
    def experiment(self) -> Experiment:
        return self.records.experiment

    @property
    def baseline(self) -> TrialResult | None:
        """The untouched model's record; None where it was not measured."""
        return self.records.baseline

    @cached_property
    def rows(self) -> list[Row]:
        """(record, judgement) of each trial, in the order they ended."""
        return self.records.rows()

    @cached_property
    def selection(self) -> Selection:
        return decision_selection.best(self.rows)

    @property
    def best(self) -> Chosen | None:
        """The configuration handed over; None where none keeps every limit."""
        found = self.selection.best
        return None if found is None else chosen(found, Path(self.folder) / "model")

    @property
    def nearest_miss(self) -> Chosen | None:
        """The configuration that came nearest to its limits without keeping them all; None where every measured one kept them."""
        found = self.selection.nearest_miss
        return None if found is None else chosen(found, None)

    @cached_property
    def trials(self) -> pandas.DataFrame:
        """One row a trial with the columns of trials.csv (`task_score`, `degradation` with both ends, `verdict`, ..., `params.*`); what was not
        measured is missing (NaN, None). A run without trials yields the columns."""
        import pandas

        rows = [table.trial_row(result, judged) for result, judged in self.rows]
        extra = sorted({name for row in rows for name in row} - set(table.TRIAL_COLUMNS))
        made = pandas.DataFrame(rows, columns=[*table.TRIAL_COLUMNS, *extra])
        return made.astype(dict.fromkeys(FIGURES, float))

    @cached_property
    def plots(self) -> dict[str, Plot]:
        """The report's pictures by name. Raises SafebasinError for a run whose untouched model was not measured."""
        if self.baseline is None:
            raise SafebasinError(f"{self.folder}: the untouched model was not measured, so there is nothing to draw; go on with orchestrator.resume")
        return {one.name: one for one in report.pictures(self.experiment, self.baseline, self.rows, self.selection)}

    def plot_score(self) -> Figure:
        """Task score against degradation, with the limit."""
        return self.plot("score_against_degradation")

    def plot_rates(self) -> Figure:
        """Attack success and over-refusal by recipe, against the untouched model."""
        return self.plot("asr_by_recipe")

    def plot_monitor(self) -> Figure:
        """Unsafe answers during training."""
        return self.plot("degradation_over_steps")

    def plot_learning_rate(self) -> Figure:
        """Degradation against the learning rate."""
        return self.plot("learning_rate_against_degradation")

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.sentence)}</b></p>{self.trials.to_html(max_rows=20, escape=True)}"
