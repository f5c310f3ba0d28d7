"""One HTML page (nothing loaded from elsewhere) and its pictures, for measurements that are no search: evaluate, compare, basin."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import redaction
from orchestrator.config import Experiment
from orchestrator.pocket import likeness
from orchestrator.report import fill, provenance
from orchestrator.report.alerts import Alert
from orchestrator.report.plots.canvas import Plot
from orchestrator.storage import files

Table = dict[str, Any]
"""{"title", "note", "head": column names, "rows": lists of texts}, and may have "ids", one a row, for links to it."""

POCKET_NOTE = (
    "The prompts are those of the made-up world (pocket): their figures say nothing about the harm of a real model. Name suites with -c FILE or "
    "safety.suites=[...]."
)

INTERVALS = "Intervals hold for each figure by itself; nothing is corrected for looking at many."
CAVEATS = (
    "Attack success covers these suites' prompts, as they were asked and decoded. An attacker who tries often or adapts gets more.",
    INTERVALS,
)
"""For pages of figures that are asked in several ways; where a page has its suites, `safety.asked_caveat` says how."""


@dataclass(frozen=True)
class Page:
    """What a page says, as plain texts."""

    title: str
    sentence: str
    good: bool | None = None
    """Whether the sentence is good news (green), bad news (red) or neither (None, grey)."""
    alerts: Sequence[Alert] = ()
    """Warnings, each a line of its own with a link to its row."""
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    facts: Sequence[tuple[str, str]] = ()
    caveats: Sequence[str] = CAVEATS
    config: str = ""
    """YAML of the experiment; secrets are taken out."""


def pocket_note(experiment: Experiment) -> list[str]:
    """POCKET_NOTE where a suite asks prompts of the made-up world, else nothing."""
    return [POCKET_NOTE] if any(likeness.is_pocket(suite.data) for suite in experiment.safety.suites) else []


def write(page: Page, path: Path) -> list[Path]:
    """Write the page and, beside it, `plots/*.png`; their paths, the page first. Raises StorageError."""
    shown, paths = [], []
    for plot in page.plots:
        if plot.png is not None:
            paths.append(files.write_bytes(path.parent / "plots" / f"{plot.name}.png", plot.png))
        data = base64.b64encode(plot.png).decode() if plot.png is not None else None
        shown.append({"name": plot.name, "title": plot.title, "text": plot.text, "data": data})
    content = {
        "title": page.title, "sentence": page.sentence,
        "tone": {True: "feasible", False: "", None: "neutral"}[page.good], "notes": page.notes, "alerts": page.alerts,
        "plots": shown,
        "tables": [{"ids": None} | t for t in page.tables if t["rows"]], "facts": page.facts, "caveats": page.caveats,
        "config": redaction.redact_text(page.config), "versions": provenance.versions(),
    }  # fmt: skip
    return [files.write_text(path, fill.filled("page.html.j2", content)), *paths]
