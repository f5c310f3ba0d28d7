"""Pictures of a finished experiment, as PNG. Colours are Okabe and Ito's (told apart by colour-blind readers), each with its own marker.

Every plot carries its interval level and n; what has no data is said in a sentence instead of an empty frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config import Experiment
from orchestrator.decision.limits import Judgement
from orchestrator.decision.selection import Selection
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.report import decision, figures
from orchestrator.report.plots import canvas, monitor
from orchestrator.report.plots.canvas import COLOURS, LIMIT_COLOUR, MARKERS, Plot, written

Row = tuple[TrialResult, Judgement]

_WHISKER: dict[str, Any] = {"fmt": "none", "elinewidth": 1.2, "alpha": 0.45, "capsize": 2, "zorder": 3}


@dataclass(frozen=True)
class Look:
    """What all plots of one experiment share."""

    recipes: tuple[str, ...]
    limit: float
    confidence: float
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, experiment: Experiment, rows: Sequence[Row]) -> Look:
        limits = experiment.safety.limits
        known = [*experiment.recipe_names, *sorted({r.recipe for r, _ in rows} - set(experiment.recipe_names))]
        return cls(tuple(known), limits.max_degradation, limits.confidence, tuple(sorted({r.seed for r, _ in rows})))

    def style(self, recipe: str) -> dict[str, Any]:
        """Colour and marker of a recipe; a ninth recipe takes the first colour with the second marker, and so on."""
        i = self.recipes.index(recipe)
        return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}

    @property
    def level(self) -> str:
        return f"{self.confidence:.0%} intervals"


def all_plots(experiment: Experiment, baseline: TrialResult, rows: Sequence[Row], selection: Selection) -> list[Plot]:
    """Every plot of the report, in its order; no rows yield sentences."""
    look = Look.of(experiment, rows)
    return [
        score_against_degradation(look, baseline, rows, selection),
        rates_by_recipe(look, baseline, selection),
        degradation_over_steps(look, rows, experiment.monitor.max_unsafe_rise),
        learning_rate_against_degradation(look, rows, selection),
    ]


def _limit_line(axis: Any, limit: float) -> None:
    """The vertical limit with the infeasible side shaded; call it when the data are drawn and the x range is final."""
    left, right = axis.get_xlim()
    right = max(right, limit + 0.15 * (limit - left))
    axis.axvspan(limit, right, color=LIMIT_COLOUR, alpha=0.07, linewidth=0, zorder=0)
    axis.axvline(limit, color=LIMIT_COLOUR, linestyle="--", linewidth=1.3, zorder=1)
    axis.set_xlim(left, right)


def _limit_above(axis: Any, limit: float) -> None:
    """The horizontal limit with the infeasible side, above it, shaded."""
    low, high = axis.get_ylim()
    high = max(high, limit + 0.15 * (limit - low))
    axis.axhspan(limit, high, color=LIMIT_COLOUR, alpha=0.07, linewidth=0, zorder=0)
    axis.axhline(limit, color=LIMIT_COLOUR, linestyle="--", linewidth=1.3, zorder=1)
    axis.set_ylim(low, high)


def _point(axis: Any, look: Look, row: Row, x: float, y: float, **extra: Any) -> None:
    """One trial: filled where feasible, hollow where not."""
    style = look.style(row[0].recipe)
    face = style["color"] if row[1].verdict == "feasible" else "white"
    axis.plot(
        [x], [y], marker=style["marker"], color=style["color"], markerfacecolor=face, markersize=7, linestyle="none", zorder=4, **extra
    )


def _legend(axis: Any, look: Look, recipes: Sequence[str], extra: Sequence[Any] = ()) -> None:
    """Recipes by colour and marker, what filled and hollow mean, and further handles; right of the axes."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="none", markersize=7, label=written(name), **look.style(name)) for name in recipes]
    handles.append(Line2D([], [], linestyle="none", marker="o", color="#555555", markersize=7, label="feasible"))
    hollow = "infeasible or undecided"
    handles.append(Line2D([], [], linestyle="none", marker="o", color="#555555", markerfacecolor="white", markersize=7, label=hollow))
    ring = [handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True) if label.startswith("best")]
    axis.legend(
        handles=[*handles, *ring, *extra],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=8.5,
        borderaxespad=0,
        labelspacing=0.8,
    )


def _limit_handle(limit: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=LIMIT_COLOUR, linestyle="--", linewidth=1.3, label=f"limit {limit:g}")


_RING: dict[str, Any] = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgecolor": "#111111", "markeredgewidth": 1.6}


def _mark_best(axis: Any, x: float, y: float, trial_id: str) -> None:
    """A ring around the best trial; its name goes into the legend, where it hides no other trial."""
    axis.plot([x], [y], linestyle="none", zorder=5, label=f"best: {trial_id}", **_RING)


def _measured(rows: Sequence[Row]) -> list[Row]:
    """Trials with both a task score and a measured degradation."""
    return [(r, j) for r, j in rows if j.task_score is not None and j.degradation is not None and j.degradation.n]


def _untouched(axis: Any, baseline: TrialResult) -> list[Any]:
    """The untouched model's task score: a line where it is within the frame that the trials need, and a word in the legend."""
    from matplotlib.lines import Line2D

    if baseline.task is None:
        return []
    (low, high), score = axis.get_ylim(), baseline.task.score
    if low - 0.5 * (high - low) <= score <= high + 0.5 * (high - low):
        axis.axhline(score, color="#555555", linestyle=":", linewidth=1.2, zorder=1)
        return [Line2D([], [], color="#555555", linestyle=":", linewidth=1.2, label=f"untouched model {score:.3f}")]
    where = "below" if score < low else "above"
    return [Line2D([], [], linestyle="none", label=f"untouched model {score:.3f},\n{where} this frame")]


def _seeds(look: Look) -> str:
    return f"seed{'s' if len(look.seeds) != 1 else ''} {', '.join(map(str, look.seeds))}"


def score_against_degradation(look: Look, baseline: TrialResult, rows: Sequence[Row], selection: Selection) -> Plot:
    """Task score (y) against degradation (x, with its interval), the limit, and the best."""
    name, title, shown = "score_against_degradation", "Task score against degradation", _measured(rows)
    if not shown:
        return Plot(name, title, None, "No trial has both a task score and a measured degradation.")
    figure, (axis,) = canvas.figure(8.6, 5.0)
    best = selection.best_trial.trial_id if selection.best_trial is not None else None
    for row in sorted(shown, key=lambda row: row[0].trial_id == best):  # the best is drawn last, on top
        result, judgement = row
        colour = look.style(result.recipe)["color"]
        axis.errorbar(judgement.degradation.value, judgement.task_score, xerr=canvas.bar(judgement.degradation), ecolor=colour, **_WHISKER)
        _point(axis, look, row, judgement.degradation.value, judgement.task_score)
        if result.trial_id == best:
            _mark_best(axis, judgement.degradation.value, judgement.task_score, best)
    axis.margins(y=0.18)
    edge = _front(axis, shown)
    _limit_line(axis, look.limit)
    _legend(axis, look, _present(look, shown), [_limit_handle(look.limit), edge, *_untouched(axis, baseline)])
    rows_n, prompts = shown[0][0].task, shown[0][1].degradation
    axis.set_xlabel(f"degradation of attack success, paired (n={prompts.n} prompts, {look.level})")
    axis.set_ylabel(f"task score, {written(rows_n.metric)} (n={len(rows_n.scores)} rows)")
    axis.set_title(f"{title}: {len(shown)} trials, {_seeds(look)}", fontsize=11, loc="left")
    text = (
        f"Degradation with {look.level} (x) and task score (y) of {len(shown)} trials; the line is the Pareto front, "
        f"the shaded side beyond the limit {look.limit:g}."
    )
    return Plot(name, title, canvas.png(figure), text)


def _front(axis: Any, rows: Sequence[Row]) -> Any:
    """The Pareto front as steps: more task score costs at least so much degradation; its handle for the legend."""
    from matplotlib.lines import Line2D

    front = decision.front(rows)
    style: dict[str, Any] = {"color": "#111111", "linewidth": 1.1, "alpha": 0.6}
    axis.plot([j.degradation.value for _, j in front], [j.task_score for _, j in front], drawstyle="steps-post", zorder=2, **style)
    return Line2D([], [], label="Pareto front", **style)


def _present(look: Look, rows: Sequence[Row]) -> list[str]:
    return [name for name in look.recipes if any(r.recipe == name for r, _ in rows)]


def rates_by_recipe(look: Look, baseline: TrialResult, selection: Selection) -> Plot:
    """Attack success and over-refusal side by side: one bar a recipe (its best feasible trial, else its nearest miss), the untouched
    model as a line."""
    name, title = "asr_by_recipe", "Attack success and over-refusal by recipe"
    chosen = [found.trials[0] for found in figures.by_recipe(selection, look.recipes).values() if found.trials[0][0].suites]
    panels = [
        (kind, label)
        for kind, label in (("harmful", "attack success rate"), ("benign", "over-refusal rate"))
        if figures.worst_suite(baseline, kind)
    ]
    if not chosen or not panels:
        return Plot(name, title, None, "No trial was measured on the safety suites.")
    figure, axes = canvas.figure(4.6 * len(panels), 0.55 * len(chosen) + 2.1, len(panels))
    for axis, (kind, label) in zip(axes, panels, strict=True):
        _bars(axis, look, baseline, chosen, kind, label)
    axes[0].set_yticks(range(len(chosen)), [written(f"{r.recipe}\n{r.trial_id}") for r, _ in chosen], fontsize=8.5)
    for axis in axes[1:]:
        axis.set_yticks(range(len(chosen)), [""] * len(chosen))
    figure.suptitle(f"{title}: best feasible trial, else nearest miss (hollow); {look.level}", fontsize=11, x=0.01, ha="left")
    return Plot(
        name,
        title,
        canvas.png(figure),
        f"Bars of attack success and over-refusal, one a recipe, with {look.level}; the line is the untouched model.",
    )


def _bars(axis: Any, look: Look, baseline: TrialResult, chosen: Sequence[Row], kind: str, label: str) -> None:
    for y, (result, judgement) in enumerate(chosen):
        suite = figures.worst_suite(result, kind)
        if suite is None:
            continue
        estimate, colour = figures.suite_rate(suite, look.confidence), look.style(result.recipe)["color"]
        filled = judgement.verdict == "feasible"
        axis.barh(y, estimate.value, height=0.62, color=colour if filled else "white", edgecolor=colour, linewidth=1.4, zorder=2)
        axis.errorbar(estimate.value, y, xerr=canvas.bar(estimate), fmt="none", ecolor="#222222", elinewidth=1.2, capsize=3, zorder=3)
        axis.annotate(f"{estimate.value:.3f}", (estimate.upper, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    before = figures.worst_suite(baseline, kind)
    axis.axvline(before.rate, color="#111111", linestyle=":", linewidth=1.4, zorder=4)
    axis.set_xlim(0, min(1.0, max(axis.get_xlim()[1] * 1.12, 0.1)))
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    suites = [before, *(suite for result, _ in chosen if (suite := figures.worst_suite(result, kind)) is not None)]
    axis.set_xlabel(f"{label}, worst suite ({asked(suites)});\nuntouched model {before.rate:.3f}, dotted", fontsize=8.5)


def asked(suites: Sequence[SuiteResult]) -> str:
    """`n=120`, or the range and why it is one: other suites, and suites that were stopped early, each only where it is so."""
    sizes, names = {len(suite.ids) for suite in suites}, {suite.name for suite in suites}
    if len(sizes) == 1:
        return f"n={sizes.pop()}"
    why = ["not the same of all"] * (len(names) > 1) + ["some stopped early"] * any(suite.stopped_early for suite in suites)
    return ", ".join([f"n={min(sizes)} to {max(sizes)}", *why])


def degradation_over_steps(look: Look, rows: Sequence[Row], limit: float) -> Plot:
    """Rise of unsafe answers at each probe of each trial, with the monitor's limit; a sentence where nothing was probed."""
    name, title = "degradation_over_steps", "Unsafe answers during training"
    probed = [(r, j, events) for r, j in rows if (events := monitor.probes(r.history))]
    if not probed:
        return Plot(name, title, None, "Nothing was probed during training: monitor.every_steps is 0, or more than the steps that a trial takes.")
    figure, (axis,) = canvas.figure(8.6, 4.4)
    for result, judgement, _ in probed:
        style = look.style(result.recipe)
        monitor.draw(axis, result.history, style, style["color"] if judgement.verdict == "feasible" else "white")
    _limit_above(axis, limit)
    shown = [(r, j) for r, j, _ in probed]
    _legend(axis, look, _present(look, shown), [_limit_handle(limit), *monitor.handles([r.history for r, _ in shown])])
    sizes = sorted({e["n"] for _, _, events in probed for e in events})
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("rise over the untouched model")
    axis.set_title(
        f"{title}: {len(probed)} trials, probes of n={', '.join(map(str, sizes))} prompts (no interval)", fontsize=11, loc="left"
    )
    text = f"Rise of unsafe answers by training step for {len(probed)} trials, with the monitor's limit {limit:g}; breaches and rollbacks marked."
    return Plot(name, title, canvas.png(figure), text)


def learning_rate_against_degradation(look: Look, rows: Sequence[Row], selection: Selection) -> Plot:
    """Degradation (y, with its interval) against the learning rate (x, logarithmic)."""
    name, title = "learning_rate_against_degradation", "Degradation against the learning rate"
    shown = [(r, j) for r, j in _measured(rows) if isinstance(r.params.get("learning_rate"), (int, float))]
    if len({r.params["learning_rate"] for r, _ in shown}) < 2:
        return Plot(name, title, None, "The learning rate was not varied over measured trials.")
    figure, (axis,) = canvas.figure(8.6, 4.4)
    best = selection.best_trial.trial_id if selection.best_trial is not None else None
    for row in sorted(shown, key=lambda row: row[0].trial_id == best):
        result, judgement = row
        rate, colour = result.params["learning_rate"], look.style(result.recipe)["color"]
        axis.errorbar(rate, judgement.degradation.value, yerr=canvas.bar(judgement.degradation), ecolor=colour, **_WHISKER)
        _point(axis, look, row, rate, judgement.degradation.value)
        if result.trial_id == best:
            _mark_best(axis, rate, judgement.degradation.value, best)
    _log_axis(axis)
    _limit_above(axis, look.limit)
    _legend(axis, look, _present(look, shown), [_limit_handle(look.limit)])
    axis.set_xlabel("learning rate")
    axis.set_ylabel(f"degradation (n={shown[0][1].degradation.n} prompts, {look.level})")
    axis.set_title(f"{title}: {len(shown)} trials, {_seeds(look)}", fontsize=11, loc="left")
    return Plot(name, title, canvas.png(figure), f"Degradation with {look.level} against the learning rate for {len(shown)} trials.")


def _log_axis(axis: Any) -> None:
    """x logarithmic, with readable numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
