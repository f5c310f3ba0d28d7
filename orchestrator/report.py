"""A finished experiment as `report.html` (one file, nothing loaded from elsewhere), `report.md`, `plots/*.png`, CSV tables of what became
of each safety prompt, and a model card."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from orchestrator import outputs, ownership, report_safety, summary, texts
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
    with ownership.active(folder, "run" if experiment.output_address is None else "mirror"):
        return _written(folder, experiment, baseline, view(experiment, baseline, rows, selection, facts), pictures, selection)


def _written(folder, experiment, baseline, content, pictures, selection) -> list[Path]:
    paths = []
    for plot in pictures:
        path = folder / "plots" / f"{plot.name}.png"
        if plot.png is not None:
            paths.append(outputs.write_bytes(path, plot.png))
        else:
            ownership.remove(path)  # of an earlier report on this folder
    shown = [
        {"name": p.name, "title": p.title, "text": p.text, "data": base64.b64encode(p.png).decode() if p.png is not None else None}
        for p in pictures
    ]
    content |= {"plots": shown}
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
    """A template of this package, filled in. What it is given is text: in HTML everything is escaped, in Markdown what would be markup, a
    link, HTML or the end of a cell; in both a character that turns the direction of writing or is none is replaced.

    In Markdown a template writes `|code` for a code span and `|block` for the content of a fenced block.
    """
    import jinja2

    html = template.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_cleaned if html else markdown_cell,
    )
    environment.filters |= {"code": lambda value: Markup(texts.code(value)), "block": _block, "cell": markdown_cell}
    return environment.get_template(template).render(content)


def _cleaned(value: Any) -> Any:
    """What goes into HTML: without characters that a browser obeys; it is escaped after this."""
    return texts.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def markdown_cell(value: Any) -> str:
    """Text that stays within a cell of a Markdown table and starts no HTML, markup or link; what a filter made so already as it is."""
    return value if isinstance(value, Markup) else Markup(texts.markdown(value))


def _block(text: str, language: str = "") -> Markup:
    """A fenced block, with a fence that nothing in it ends."""
    fence, body = texts.fence(text), texts.clean(text)
    return Markup(f"{fence}{language}\n{body}{'' if body.endswith(chr(10)) else chr(10)}{fence}")
