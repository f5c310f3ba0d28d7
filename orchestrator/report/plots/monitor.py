"""What the monitor saw of one training, drawn into an axis: probes, breaches, and where the training went back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BREACH_COLOUR = "#B00020"


def probes(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The probes of a trial's history, in their order: the full ones where there are any, else the quick ones."""
    found = [event for event in history if event.get("kind") == "probe"]
    return [event for event in found if not event.get("quick")] or found


def draw(axis: Any, history: Sequence[dict[str, Any]], style: dict[str, Any], face: str) -> None:
    """Rise over steps: solid what led to the model, dotted what was given up; a cross for a breach, with what it led to."""
    seen = probes(history)
    steps, values = [0], [0.0]
    line: dict[str, Any] = {"linewidth": 1.2, "markersize": 4.5, "markerfacecolor": face, "alpha": 0.8, **style}
    for event in history:
        if event in seen:
            steps.append(event["step"])
            values.append(event["degradation"])
            if event["breach"]:
                axis.plot([steps[-1]], [values[-1]], linestyle="none", marker="x", color=BREACH_COLOUR, markersize=8, markeredgewidth=2, zorder=6)
        elif event.get("kind") in ("rollback", "last_safe"):
            kept = max(i for i, step in enumerate(steps) if step <= event["to_step"] or i == 0)
            axis.plot(steps[kept:], values[kept:], **(line | {"linestyle": ":", "alpha": 0.6, "zorder": 2}))
            _label(axis, event, (steps[-1], values[-1]))
            steps, values = steps[: kept + 1], values[: kept + 1]
    axis.plot(steps, values, **line)


def _label(axis: Any, event: dict[str, Any], at: tuple[float, float]) -> None:
    """What a breach led to, beside its cross."""
    change = "end" if event["kind"] == "last_safe" else event["added"] if event.get("added") else f"rate x{event['rate_factor']:g}"
    axis.annotate(f"back to {event['to_step']}, {change}", at, xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=7.5, zorder=7)


def handles(histories: Sequence[Sequence[dict[str, Any]]]) -> list[Any]:
    """Legend entries for what was drawn beyond the probes."""
    from matplotlib.lines import Line2D

    events = [event for history in histories for event in history]
    found = []
    if any(event.get("breach") for event in events if event.get("kind") == "probe"):
        found.append(Line2D([], [], linestyle="none", marker="x", color=BREACH_COLOUR, markersize=7, markeredgewidth=2, label="breach"))
    if any(event.get("kind") in ("rollback", "last_safe") for event in events):
        found.append(Line2D([], [], linestyle=":", color="#555555", linewidth=1.2, label="given up by a rollback"))
    return found
