"""A finished experiment as `report.html` (one file, nothing loaded from elsewhere), `report.md`, `plots/*.png`, CSV tables of what became
of each safety prompt, and a model card."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import outputs, report_safety, summary
from orchestrator.config import Experiment
from orchestrator.constraint import Judgement, Selection
from orchestrator.records import TrialResult
from orchestrator.report_view import view

Row = tuple[TrialResult, Judgement]


def write_report(
    folder: str | Path,
    experiment: Experiment,
    baseline: TrialResult,
    rows: Sequence[Row],
    selection: Selection,
    facts: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write report.html, report.md and the plots into `folder`; returns their paths, the HTML first.

    `facts` (each optional): "seconds" the run took, "stopped" whether it was ended early, "hashes" {"model": ..., "template": ...}.
    No rows are no error: the report then says that nothing was tried. Raises StorageError.
    """
    from orchestrator import plots, plots_safety

    folder, facts = Path(folder), facts or {}
    pictures = [*plots.all_plots(experiment, baseline, rows, selection), *plots_safety.report_plots(experiment, baseline, selection)]
    paths = []
    for plot in pictures:
        path = folder / "plots" / f"{plot.name}.png"
        if plot.png is not None:
            paths.append(outputs.write_bytes(path, plot.png))
        elif path.exists():
            path.unlink()  # of an earlier report on this folder
    shown = [
        {"name": p.name, "title": p.title, "text": p.text, "data": base64.b64encode(p.png).decode() if p.png is not None else None}
        for p in pictures
    ]
    content = view(experiment, baseline, rows, selection, facts) | {"plots": shown}
    configuration = selection.best or selection.nearest_miss
    if configuration is not None:
        paths += report_safety.write_csv(folder, baseline, configuration.shown)
    html = outputs.write_text(folder / "report.html", _render("report.html.j2", content))
    return [html, outputs.write_text(folder / "report.md", _render("report.md.j2", content)), *paths]


def sentence(experiment: Experiment, baseline: TrialResult, selection: Selection) -> str:
    """The outcome in one sentence, for the terminal and for MLflow."""
    return summary.headline(selection, baseline, experiment)


def model_card(experiment: Experiment, baseline: TrialResult, selection: Selection) -> str:
    """README.md for the handed-over model: base, recipe, knobs, figures with intervals. Empty text where nothing is feasible."""
    if selection.best is None:
        return ""
    content = view(experiment, baseline, [row for c in selection.configurations for row in c.trials], selection, {})
    return _render("model_card.md.j2", content)


def _render(template: str, content: Mapping[str, Any]) -> str:
    """A template of this package, filled in; in HTML everything is escaped, in Markdown what would break out of a cell or be HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name) and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = markdown_cell
    return environment.get_template(template).render(content)


def markdown_cell(value: Any) -> str:
    """Text that stays within a cell of a Markdown table and starts no HTML."""
    text = "" if value is None else str(value)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|").replace("\r", "").replace("\n", " ")
