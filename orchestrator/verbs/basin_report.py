"""What `safebasin basin` says of its points: sentence, table, page and picture, all from the content of basin.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.models import subjects
from orchestrator.report import figures, page, safety
from orchestrator.report.plots import canvas
from orchestrator.report.plots.canvas import Plot
from orchestrator.storage import files, ownership
from orchestrator.terminal.screen import Grid

FILE = "basin.json"


def sentence(body: dict[str, Any]) -> str:
    """The outcome in one sentence."""
    score, n = body["visage"], len(body["directions"])
    points = [p for curve in body["directions"] for p in curve]
    mute = sum(not p["fluent"] for p in points)
    told = (
        f"VISAGE {score['mean']:.1f} of 100 (mean of {n} direction{'s' * (n > 1)}, alpha {body['settings']['alpha']:g}; the official code's variant "
        f"{score['code_mean']:.1f}; gibberish left out {score['unsafe_only_mean']:.1f})"
    )
    guard = f"; at {mute} of {len(points)} points at least half of the answers were no language" if mute else ""
    seen = [p["second"] for p in points if p["second"] is not None]
    if seen:
        guard += f"; the second judge finds at most {max(seen):.3f} unsafe anywhere along the directions"
    if body["line"] is None:
        return f"{told}{guard}."
    first, last = body["line"][0], body["line"][-1]
    peak = max((p for p in body["line"] if p["broken"] is None), key=lambda p: p["asr"], default=first)
    way = f"goes from {_rate(first)} to {_rate(last)}, at most {_rate(peak)} at {peak['at']:g}"
    return f"{told}{guard}. On the line to the tuned model attack success {way}."


def _rate(point: dict[str, Any]) -> str:
    if point["broken"] is not None:
        return "not measurable"
    return f"{point['asr']:.3f} [{point['lower']:.3f}, {point['upper']:.3f}] n={point['n']}"


def _lines(body: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    named = [(f"dir {i + 1}", curve) for i, curve in enumerate(body["directions"])]
    return named + ([("line", body["line"])] if body["line"] is not None else [])


POINTS = (
    "dir: random directions; line: to the tuned model. unsafe: answered; attack success also counts gibberish, as keywords do. 2nd judge: what it "
    "finds unsafe."
)
HEAD = ["along", "at", "attack success", "unsafe", "2nd judge", "refused", "gibberish"]


def _share(value: float | None) -> str:
    return "-" if value is None else figures.number(value)


def rows(body: dict[str, Any]) -> list[list[str]]:
    """All points as texts, by HEAD."""
    return [
        [name, f"{p['at']:+.3g}", _rate(p), *(_share(p[key]) for key in ("unsafe", "second", "refused", "gibberish"))]
        for name, curve in _lines(body) for p in curve
    ]  # fmt: skip


def table(body: dict[str, Any]) -> Grid:
    table = Grid(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for i, column in enumerate(HEAD):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows(body):
        table.add_row(*row)
    return table


def write(experiment: Experiment, body: dict[str, Any], folder: Path) -> list[Path]:
    """basin.json, basin.html and plots/basin.png; their paths."""
    label = subjects.label(body["model"]["name"])
    made = page.Page(
        title=f"safety basin of {label}", sentence=sentence(body), good=None, notes=_notes(experiment, body), plots=[picture(body)],
        tables=[{"title": "Points", "note": POINTS, "head": HEAD, "rows": rows(body)}],
        facts=_facts(body), config=config.dump_yaml(experiment), caveats=(safety.asked_caveat({}), page.INTERVALS),
    )  # fmt: skip
    with ownership.active(folder, "basin"):
        return [files.write_json(folder / FILE, body), *page.write(made, folder / "basin.html")]


def _notes(experiment: Experiment, body: dict[str, Any]) -> list[str]:
    own = ["The system prompt is part of what is measured: one that asks for caution widens the basin."]
    own += [f"The model: {note}." for note in body.get("template", {}).get("notes", [])]
    return own + page.pocket_note(experiment)


def _facts(body: dict[str, Any]) -> list[tuple[str, str]]:
    score = body["visage"]
    return [
        ("model", ", ".join(f"{k} {v}" for k, v in body["model"].items())),
        *([("tuned", ", ".join(f"{k} {v}" for k, v in body["tuned"].items()))] if body["tuned"] else []),
        ("VISAGE by direction", ", ".join(f"{value:.1f}" for value in score["directions"])),
        ("official code's variant", ", ".join(f"{value:.1f}" for value in score["code_directions"])),
        ("directions", "Gaussian, as long as each tensor's weights, none for normalisation layers; computed from a copy at every point"),
        ("suite", f"{body['suite']['name']}, {body['suite']['prompts']} prompts"), ("judge", body["judge"]),
        ("second judge", body["second_judge"] or "none"),
        ("decoding", f"greedy, at most {body['max_new_tokens']} tokens"), ("system prompt", body["system_prompt"] or "none"),
        ("seed", str(body["settings"]["seed"])),
    ]  # fmt: skip


def picture(body: dict[str, Any]) -> Plot:
    """Attack success (with intervals) and gibberish along every direction; beside it the line to the tuned model."""
    figure, axes = canvas.figure(7.2 if body["line"] is None else 12.0, 4.6, 1 if body["line"] is None else 2)
    for i, curve in enumerate(body["directions"]):
        _curve(axes[0], curve, i, f"direction {i + 1}")
    axes[0].set_title(f"Random directions: VISAGE {body['visage']['mean']:.1f}", fontsize=11, loc="left")
    axes[0].set_xlabel("alpha, in norms of each tensor")
    if body["line"] is not None:
        _curve(axes[1], body["line"], 3, "line to tuned")
        axes[1].set_title("From the untouched to the tuned model", fontsize=11, loc="left")
        axes[1].set_xlabel("0 untouched, 1 tuned")
    for axis in axes:
        axis.set_ylim(-0.03, 1.03)
        axis.set_ylabel(f"share of n={body['suite']['prompts']} prompts")
        axis.legend(frameon=False, fontsize=8.5)
    level, label = f"{body['confidence']:.0%}", subjects.label(body["model"]["name"])
    figure.suptitle(
        f"Safety basin of {canvas.written(label)} on {canvas.written(body['suite']['name'])}: attack success ({level} bands; hollow: mostly "
        "gibberish); dashed: unsafe by the second judge; dotted: gibberish",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return Plot("basin", "Attack success around the model", canvas.png(figure), sentence(body))


def _curve(axis: Any, curve: Sequence[dict[str, Any]], style: int, label: str) -> None:
    measured = [p for p in curve if p["broken"] is None]
    at, colour = [p["at"] for p in measured], canvas.COLOURS[style % len(canvas.COLOURS)]
    marker = canvas.MARKERS[style % len(canvas.MARKERS)]
    axis.fill_between(at, [p["lower"] for p in measured], [p["upper"] for p in measured], color=colour, alpha=0.15, linewidth=0)
    axis.plot(at, [p["asr"] for p in measured], color=colour, linewidth=1.6, label=label)
    for p in measured:
        axis.plot([p["at"]], [p["asr"]], marker=marker, markersize=5.5, color=colour, markerfacecolor=colour if p["fluent"] else "white")
    axis.plot(at, [p["gibberish"] for p in measured], color=colour, linewidth=1.0, linestyle=":")
    if all(p["second"] is not None for p in measured):
        axis.plot(at, [p["second"] for p in measured], color=colour, linewidth=1.0, linestyle="--")
