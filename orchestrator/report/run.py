"""A finished experiment as `report.html` (one file, nothing loaded from elsewhere), `report.md`, `plots/*.png`, CSV tables of what became
of each safety prompt, and a model card."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.config import Experiment
from orchestrator.decision.limits import Judgement
from orchestrator.decision.selection import Selection
from orchestrator.records import TrialResult
from orchestrator.report import exports, figures, safety
from orchestrator.report.fill import filled
from orchestrator.report.plots.canvas import Plot
from orchestrator.report.view import view
from orchestrator.storage import files, ownership

Row = tuple[TrialResult, Judgement]


def write_report(
    folder: str | Path,
    experiment: Experiment,
    baseline: TrialResult,
    rows: Sequence[Row],
    selection: Selection,
    facts: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> list[Path]:
    """Write report.html, report.md, the plots and every table (`tables/`, CSV and LaTeX) into `folder`; returns their paths, the HTML first.

    `facts` (each optional): "seconds" the run took, "stopped" whether it was ended early, "hashes" {"model": ..., "template": ...},
    "place" of the run, with a slash, where the report lies elsewhere, "other_limits" whether the experiment's are not those it was searched
    under. `kind` of the folder; a run's own without it.
    No rows are no error: the report then says that nothing was tried. Raises StorageError.
    """
    folder, facts = Path(folder), facts or {}
    drawn = pictures(experiment, baseline, rows, selection)
    with ownership.active(folder, kind or ("run" if experiment.output_address is None else "mirror")):
        return _written(folder, experiment, baseline, view(experiment, baseline, rows, selection, facts), drawn, selection)


def pictures(experiment: Experiment, baseline: TrialResult, rows: Sequence[Row], selection: Selection) -> list[Plot]:
    """Every picture of the report, in its order; what has no data is a sentence."""
    from orchestrator.report.plots import decision, refusals, trials

    made = trials.all_plots(experiment, baseline, rows, selection) + refusals.report_plots(experiment, baseline, selection)
    return [*made, *decision.pictures(baseline, rows, selection, experiment.safety.limits.confidence)]


def _written(folder, experiment, baseline, content, pictures, selection) -> list[Path]:
    paths = []
    for plot in pictures:
        path = folder / "plots" / f"{plot.name}.png"
        if plot.png is not None:
            paths.append(files.write_bytes(path, plot.png))
        else:
            ownership.remove(path)  # of an earlier report on this folder
    shown = [
        {"name": p.name, "title": p.title, "text": p.text, "data": base64.b64encode(p.png).decode() if p.png is not None else None}
        for p in pictures
    ]
    content |= {"plots": shown}
    configuration = selection.best or selection.nearest_miss
    if configuration is not None:
        paths += safety.write_csv(folder, baseline, configuration.shown)
    paths += exports.write(folder, exports.of_page(content))
    html = files.write_text(folder / "report.html", filled("report.html.j2", content))
    return [html, files.write_text(folder / "report.md", filled("report.md.j2", content)), *paths]


def sentence(experiment: Experiment, baseline: TrialResult, selection: Selection, *, stopped: bool = False) -> str:
    """The outcome in one sentence, for the terminal and for MLflow."""
    return figures.headline(selection, baseline, experiment, stopped=stopped)


def model_card(experiment: Experiment, baseline: TrialResult, selection: Selection) -> str:
    """README.md for the handed-over model: base, recipe, knobs, figures with intervals. Empty text where nothing is feasible."""
    if selection.best is None:
        return ""
    content = view(experiment, baseline, [row for c in selection.configurations for row in c.trials], selection, {})
    return filled("model_card.md.j2", content)


