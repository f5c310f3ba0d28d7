"""Pictures to decide from: knobs and outcomes of every trial, frozen range against rank, what matters, success over depth, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.decision.intervals import rate
from orchestrator.decision.limits import Judgement
from orchestrator.decision.selection import Selection
from orchestrator.records import TrialResult
from orchestrator.report import decision
from orchestrator.report.plots import canvas
from orchestrator.report.plots.canvas import COLOURS, MARKERS, Plot, written

Row = tuple[TrialResult, Judgement]

VERDICTS = {"feasible": ("#009E73", "-"), "undecided": ("#E69F00", "--"), "infeasible": ("#B00020", ":")}
START, WIDTH, RANK = "freeze_layers.start", "freeze_layers.width", "lora.lora_r"
MOST = 6
"""Knobs that parallel coordinates show."""


def pictures(baseline: TrialResult, rows: Sequence[Row], selection: Selection, level: float) -> list[Plot]:
    """All of them, in the report's order. What has nothing to show is a sentence, or left out where a run did not search it at all."""
    shown = selection.best or selection.nearest_miss
    made = [parallel(rows), freeze_and_rank(rows), importance(rows), depth(baseline, shown.shown if shown else None, level), cost(rows)]
    return [plot for plot in made if plot is not None]


def parallel(rows: Sequence[Row]) -> Plot:
    """Parallel coordinates: recipe, the knobs that vary, degradation and score; a line a trial, by its verdict. A knob that a recipe lacks is
    passed over by its line."""
    name, title, shown = "parallel_coordinates", "Every trial: settings and outcome", decision.measured(rows)
    if len(shown) < 2:
        return Plot(name, title, None, "Fewer than two trials have both a task score and a measured degradation.")
    columns = _columns(shown)
    figure, (axis,) = canvas.figure(min(10.0, max(7.0, 1.3 * len(columns) + 1.5)), 4.8)
    for result, judgement in sorted(shown, key=lambda row: row[1].verdict == "feasible"):
        points = [(x, column.place(value)) for x, column in enumerate(columns) if (value := column.of(result, judgement)) is not None]
        colour, line = VERDICTS[judgement.verdict]
        axis.plot([x for x, _ in points], [y for _, y in points], color=colour, linestyle=line, linewidth=1.4, alpha=0.75, marker="o", markersize=3)
    for x, column in enumerate(columns):
        axis.axvline(x, color="#999999", linewidth=0.8, zorder=0)
        for y, label in column.ticks():
            axis.annotate(label, (x, y), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center", zorder=6)
    axis.set_xticks(range(len(columns)), [column.label for column in columns], fontsize=7.5)
    axis.set_yticks([])
    axis.set_xlim(-0.1, len(columns) - 0.3)
    axis.grid(False)
    from matplotlib.lines import Line2D

    there = [verdict for verdict in VERDICTS if any(j.verdict == verdict for _, j in shown)]
    handles = [Line2D([], [], color=VERDICTS[v][0], linestyle=VERDICTS[v][1], label=v) for v in there]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    axis.set_title(f"{title}: {len(shown)} trials", fontsize=11, loc="left")
    return Plot(name, title, canvas.png(figure), f"A line for each of {len(shown)} trials through its settings, degradation and score, by verdict.")


class _Column:
    """One axis of the parallel coordinates."""

    def __init__(self, label: str, read: Any, values: Sequence[Any]):
        self.label, self.of = label, read
        self.numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        self.values = sorted(set(values)) if self.numbers else sorted(set(map(str, values)))
        self.log = self.numbers and self.values[0] > 0 and self.values[-1] / self.values[0] >= 10

    def place(self, value: Any) -> float:
        """0..1 along the axis; 0.5 where it has one value only."""
        import math

        if not self.numbers:
            return self.values.index(str(value)) / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        low, high, at = (math.log(v) if self.log else float(v) for v in (self.values[0], self.values[-1], value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        told = self.values if len(self.values) <= 6 else [self.values[0], self.values[-1]]
        return [(self.place(value), written(f"{value:.3g}" if self.numbers else value)) for value in told]


def _columns(rows: Sequence[Row]) -> list[_Column]:
    knobs: dict[str, list[Any]] = {}
    for result, _ in rows:
        for name, value in result.params.items():
            knobs.setdefault(name, []).append(value)
    varied = sorted((name for name, values in knobs.items() if len(set(map(str, values))) > 1), key=lambda name: -len(knobs[name]))[:MOST]
    made = [_Column("recipe", lambda r, j: r.recipe, [r.recipe for r, _ in rows])]
    for name in varied:
        made.append(_Column(written(name.replace(".", "\n", 1)), lambda r, j, name=name: r.params.get(name), knobs[name]))
    made.append(_Column("degradation", lambda r, j: j.degradation.value, [j.degradation.value for _, j in rows]))
    return [*made, _Column("task score", lambda r, j: j.task_score, [j.task_score for _, j in rows])]


def freeze_and_rank(rows: Sequence[Row]) -> Plot | None:
    """Frozen range (x) by LoRA rank (y): the lowest degradation measured in each cell, with its score. None where no trial has both knobs."""
    name, title = "freeze_range_and_rank", "Frozen layers and LoRA rank"
    cells: dict[tuple[tuple[int, int], int], Row] = {}
    for result, judgement in decision.measured(rows):
        if all(isinstance(result.params.get(key), int) for key in (START, WIDTH, RANK)):
            start = result.params[START]
            key = ((start, start + result.params[WIDTH] - 1), result.params[RANK])
            if key not in cells or judgement.degradation.value < cells[key][1].degradation.value:
                cells[key] = (result, judgement)
    if not cells:
        return None
    ranges, ranks = sorted({key[0] for key in cells}), sorted({key[1] for key in cells})
    if len(cells) < 2:
        return Plot(name, title, None, "Only one pair of frozen range and rank was measured, so there is nothing to compare.")
    figure, (axis,) = canvas.figure(max(5.0, 1.1 * len(ranges) + 2.6), max(2.8, 0.62 * len(ranks) + 1.6))
    grid = [[cells[r, k][1].degradation.value if (r, k) in cells else float("nan") for r in ranges] for k in ranks]
    image = axis.imshow(grid, aspect="auto", cmap="cividis_r", origin="lower", vmin=min(0.0, min(j.degradation.value for _, j in cells.values())))
    for (at, rank), (_, judgement) in cells.items():
        red, green, blue, _ = image.cmap(image.norm(judgement.degradation.value))
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        told = f"{judgement.degradation.value:+.3f}\nscore {judgement.task_score:.2f}\n{judgement.verdict}"
        axis.annotate(told, (ranges.index(at), ranks.index(rank)), ha="center", va="center", fontsize=7, color=ink)
    axis.set_xticks(range(len(ranges)), [f"{first}-{last}" for first, last in ranges], fontsize=8)
    axis.set_yticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=8)
    axis.set_xlabel("layers frozen (first-last, from 0)")
    axis.set_ylabel("LoRA rank")
    axis.grid(False)
    figure.colorbar(image, ax=axis, label="degradation")
    axis.set_title(f"{title}: {len(cells)} of {len(ranges) * len(ranks)} cells measured", fontsize=10, loc="left")
    text = "The lowest degradation by frozen range and LoRA rank, with score and verdict; white cells were not measured."
    return Plot(name, title, canvas.png(figure), text)


def importance(rows: Sequence[Row]) -> Plot:
    """Bars of the knobs' importance for score and for degradation."""
    from orchestrator.search.importance import LEAST

    name, title, found = "knob_importance", "Which knob matters", decision.importance(rows)
    if not found:
        return Plot(name, title, None, f"Importances need {LEAST} searched trials with figures and two knobs that vary among them.")
    labels = [(one, knob) for one in found for knob in one.knobs]
    figure, (axis,) = canvas.figure(8.0, 0.36 * len(labels) + 1.7)
    for y, (one, knob) in enumerate(labels):
        axis.barh(y - 0.18, one.score.get(knob, 0.0), height=0.34, color=COLOURS[0], label="for task score" if y == 0 else None)
        axis.barh(y + 0.18, one.degradation.get(knob, 0.0), height=0.34, color=COLOURS[1], label="for degradation" if y == 0 else None)
    axis.set_yticks(range(len(labels)), [written(f"{one.where}: {knob}") for one, knob in labels], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("importance (PED-ANOVA), a share")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    axis.set_title(f"{title}: {found[0].trials} trials", fontsize=11, loc="left")
    return Plot(name, title, canvas.png(figure), "Importance of each knob for task score and for degradation; a hint where trials are few.")


def depth(baseline: TrialResult, result: TrialResult | None, level: float) -> Plot:
    """Attack success (y, with its interval) over how many tokens of the answer were begun (x)."""
    name, title, found = "attack_success_over_depth", "Attack success over depth", decision.depths(baseline, result)
    if not found:
        return Plot(name, title, None, "No suite begins answers a number of tokens deep (attack prefill_3, say), so nothing is known of depth.")
    figure, (axis,) = canvas.figure(8.0, 4.2)
    for i, data in enumerate(dict.fromkeys(one.data for one in found)):
        for who, colour, shift in (("untouched", "#555555", -0.04), ("this model", COLOURS[1], 0.04)):
            points = [(one.depth, one.before if who == "untouched" else one.after) for one in found if one.data == data]
            known = [(x, rate(s.failures, s.requests, level)) for x, s in points if s is not None and s.ids]
            if not known:
                continue
            line = "--" if who == "untouched" else "-"
            x, y = [x + shift for x, _ in known], [e.value for _, e in known]
            bars = [[max(0.0, e.value - e.lower) for _, e in known], [max(0.0, e.upper - e.value) for _, e in known]]
            label = written(f"{who}, {data}")
            axis.errorbar(x, y, yerr=bars, color=colour, linestyle=line, marker=MARKERS[i % len(MARKERS)], capsize=3, label=label)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks(sorted({one.depth for one in found}))
    axis.set_xlabel("tokens of a harmful answer begun for the model (0: none)")
    axis.set_ylabel("attack success rate")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    axis.set_title(f"{title}; {level:.0%} intervals", fontsize=11, loc="left")
    text = f"Attack success with {level:.0%} intervals by how deep the answer was begun, untouched and this model."
    return Plot(name, title, canvas.png(figure), text)


def cost(rows: Sequence[Row]) -> Plot:
    """Seconds of every trial, by recipe."""
    name, title = "cost_by_recipe", "Cost by recipe"
    found = [(recipe, seconds) for recipe, seconds, _ in decision.costs(rows) if seconds]
    if not found:
        return Plot(name, title, None, "No trial's seconds were recorded.")
    figure, (axis,) = canvas.figure(8.0, 0.45 * len(found) + 1.5)
    for y, (_, seconds) in enumerate(found):
        axis.barh(y, sum(seconds) / len(seconds), height=0.55, color=COLOURS[4])
        axis.plot(seconds, [y] * len(seconds), linestyle="none", marker="o", markersize=4, color="#222222", alpha=0.6)
    axis.set_yticks(range(len(found)), [written(recipe) for recipe, _ in found], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds a trial (bar: mean; dots: trials)")
    axis.set_title(f"{title}: {sum(len(s) for _, s in found)} trials", fontsize=11, loc="left")
    return Plot(name, title, canvas.png(figure), "Mean seconds of a trial by recipe, with every trial as a dot.")
