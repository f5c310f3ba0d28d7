"""Pictures of refusals: how often each model refuses and fails on every suite, and what became of its prompts; for reports and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config import Experiment, recipe_items
from orchestrator.decision.intervals import rate
from orchestrator.decision.selection import Selection
from orchestrator.evaluation.transitions import Transitions, all_transitions
from orchestrator.records import SuiteResult, TrialResult
from orchestrator.report import figures
from orchestrator.report.plots import canvas
from orchestrator.report.plots.canvas import Plot

ORIGINAL = "original"
KINDS = (("harmful", "harmful prompts"), ("benign", "harmless prompts"))
FREQUENCIES, TRANSITIONS = "How often each model refuses", "What became of each prompt"
CHANGES = (
    ("refused, as before", "#0072B2"), ("answered, now refused", "#56B4E9"), ("refused, now answered", "#D55E00"),
    ("answered, as before", "#E69F00"), ("other (evaded, gibberish, empty, unparsed)", "#BBBBBB"),
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One model in a picture."""

    label: str
    suites: Mapping[str, SuiteResult] = field(default_factory=dict)


def arms_of(experiment: Experiment, baseline: TrialResult, selection: Selection) -> list[Arm]:
    """The original, and of each recipe the configuration the report shows, where it was measured."""
    labels = recipe_labels(experiment)
    found = figures.by_recipe(selection, experiment.recipe_names)
    arms = [Arm(labels[name], c.shown.suites) for name, c in found.items() if c.trials[0][0].suites]
    return [Arm(ORIGINAL, baseline.suites), *arms]


def recipe_labels(experiment: Experiment) -> dict[str, str]:
    """Recipe name -> how pictures call it: its strategies, with the pinned knobs that tell recipes of the same strategies apart."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, recipe in zip(experiment.recipe_names, experiment.recipes, strict=True):
        pinned = {knob: value for _, knobs in recipe_items(recipe) for knob, value in knobs.items()}
        groups.setdefault(name.partition("#")[0], []).append((name, pinned))
    labels = {}
    for plain, members in groups.items():
        differing = [k for k in dict.fromkeys(k for _, p in members for k in p) if len({repr(p.get(k)) for _, p in members}) > 1]
        for name, pinned in members:
            told = ", ".join(f"{k}={pinned[k]}" for k in differing if k in pinned)
            labels[name] = f"{plain}\n{told}" if told else plain if len(members) == 1 else name
    return labels


def report_plots(experiment: Experiment, baseline: TrialResult, selection: Selection) -> list[Plot]:
    """What a report adds to `trials.all_plots`: refusals and transitions of each recipe's model."""
    arms = arms_of(experiment, baseline, selection)
    if len(arms) == 1:
        why = "No trial was measured on the safety suites, so there is nothing to set beside the original."
        return [Plot("refusal_frequencies", FREQUENCIES, None, why), Plot("transitions", TRANSITIONS, None, why)]
    return pictures(arms, experiment.safety.limits.confidence)


def pictures(arms: Sequence[Arm], level: float) -> list[Plot]:
    """Refusal frequencies of all arms, and transitions of each against the first. No second arm: a sentence instead of transitions."""
    return [refusals(arms, level), changes(arms)]


def refusals(arms: Sequence[Arm], level: float) -> Plot:
    """Share of prompts refused, by suite and model: right on harmful suites, over-refusal on harmless ones."""
    return _bars(
        "refusal_frequencies", FREQUENCIES, arms, level, lambda suite: suite.refused,
        {"harmful": "share refused (refusing is right)", "benign": "share refused (over-refusal)"},
    )  # fmt: skip


def failures(arms: Sequence[Arm], level: float) -> Plot:
    """Attack success and over-refusal, by suite and model."""
    return _bars(
        "rates", "Attack success and over-refusal", arms, level, lambda suite: suite.failures,
        {"harmful": "attack success rate", "benign": "over-refusal rate"},
    )  # fmt: skip


def _names(arms: Sequence[Arm], kind: str) -> list[str]:
    """Suites of a kind that any arm was asked, in the order they are met."""
    return list(dict.fromkeys(name for arm in arms for name, suite in arm.suites.items() if suite.kind == kind and suite.ids))


def _bars(
    name: str, title: str, arms: Sequence[Arm], level: float, flags: Callable[[SuiteResult], Sequence[bool]], labels: Mapping[str, str]
) -> Plot:
    panels = [(kind, names) for kind, _ in KINDS if (names := _names(arms, kind))]
    if not panels:
        return Plot(name, title, None, "No model was asked a suite of harmful or harmless prompts.")
    rows = max(len(names) for _, names in panels)
    figure, axes = canvas.figure(5.0 * len(panels) + 0.6, min(12.0, 0.26 * rows * (len(arms) + 1) + 1.7), len(panels))
    for axis, (kind, names) in zip(axes, panels, strict=True):
        for i, arm in enumerate(arms):
            _arm_bars(axis, arm, i, names, len(arms), level, flags)
        axis.set_yticks(range(len(names)), [_suite_label(arms, n) for n in names], fontsize=8.5)
        axis.set_ylim(len(names) - 0.45, -0.55)
        axis.set_xlim(0, 1.14)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axis.grid(False, axis="y")
        axis.set_xlabel(labels[kind])
    figure.legend(handles=_handles(arms), loc="outside lower center", ncols=min(len(arms), 5), frameon=False, fontsize=8.5)
    figure.suptitle(f"{title}; {level:.0%} intervals", fontsize=11, x=0.01, ha="left")
    what = "; ".join(f"{labels[kind]} on {', '.join(names)}" for kind, names in panels)
    return Plot(name, title, canvas.png(figure), f"Bars with {level:.0%} intervals for {', '.join(_flat(arm.label) for arm in arms)}: {what}.")


def _colour(index: int) -> str:
    """Grey for the first arm, the palette for the others."""
    return canvas.COLOURS[(index - 1) % len(canvas.COLOURS)] if index else "#555555"


def _handles(arms: Sequence[Arm]) -> list[Any]:
    """Legend entries of all arms, also of one that was asked nothing in a panel."""
    from matplotlib.patches import Patch

    return [Patch(color=_colour(i), label=canvas.written(arm.label)) for i, arm in enumerate(arms)]


def _arm_bars(axis: Any, arm: Arm, index: int, names: Sequence[str], count: int, level: float, flags: Callable) -> None:
    height, colour = 0.84 / count, _colour(index)
    shown = [(i, arm.suites[name]) for i, name in enumerate(names) if name in arm.suites and arm.suites[name].ids]
    for i, suite in shown:
        estimate, y = rate(flags(suite), suite.requests, level), i + (index - (count - 1) / 2) * height
        axis.barh(y, estimate.value, height=height * 0.9, color=colour, zorder=2)
        axis.errorbar(estimate.value, y, xerr=canvas.bar(estimate), fmt="none", ecolor="#222222", elinewidth=1.0, capsize=2, zorder=3)
        axis.annotate(f"{estimate.value:.2f}", (estimate.upper, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)


def _suite_label(arms: Sequence[Arm], name: str) -> str:
    sizes = {len(arm.suites[name].ids) for arm in arms if name in arm.suites}
    return f"{canvas.written(name)}\nn={min(sizes)}" + (f" to {max(sizes)}" if len(sizes) > 1 else "")


def _flat(label: str) -> str:
    return " ".join(label.split())


def changes(arms: Sequence[Arm]) -> Plot:
    """What became of each prompt between the first arm and every other: stacked shares, harmful and harmless suites apart.

    Only suites that every arm was asked: held-out ones, asked of finalists alone, would make one bar longer than the others.
    """
    name, title = "transitions", TRANSITIONS
    common = [s for s in (arms[0].suites if arms else {}) if all(s in arm.suites for arm in arms)]
    asked = {s: arms[0].suites[s] for s in common or (arms[0].suites if arms else ())}
    found = [(arm, all_transitions(asked, arm.suites)) for arm in arms[1:]] if arms else []
    panels = [(kind, label) for kind, label in KINDS if any(t.kind == kind and t.n for _, moved in found for t in moved)]
    if not panels:
        return Plot(name, title, None, "No two models were asked the same prompts, so nothing can be said of transitions.")
    figure, axes = canvas.figure(5.0 * len(panels) + 0.6, 0.55 * len(found) + 2.1, len(panels))
    for axis, (kind, label) in zip(axes, panels, strict=True):
        totals = [_stack(axis, i, [t for t in moved if t.kind == kind]) for i, (_, moved) in enumerate(found)]
        axis.set_yticks(range(len(found)), [canvas.written(arm.label) for arm, _ in found] if axis is axes[0] else [""] * len(found), fontsize=8.5)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.set_xlim(0, 1)
        axis.grid(False, axis="y")
        axis.set_xlabel(f"share of {label} (n={' or '.join(map(str, sorted(set(totals))))})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.suptitle(f"{title}, from {canvas.written(_flat(arms[0].label))} to each model (counts in the bars)", fontsize=11, x=0.01, ha="left")
    text = f"Stacked shares of prompts by what became of them between {_flat(arms[0].label)} and {', '.join(_flat(a.label) for a, _ in found)}."
    return Plot(name, title, canvas.png(figure), text)


def grouped(moved: Sequence[Transitions]) -> list[int]:
    """Prompts by CHANGES, summed over suites: refused both times, newly refused, newly answered, answered both times, any other pair."""
    known = {("refused", "refused"): 0, ("answered", "refused"): 1, ("refused", "answered"): 2, ("answered", "answered"): 3}
    counts = [0] * len(CHANGES)
    for transition in moved:
        for pair, count in transition.counts.items():
            counts[known.get(pair, 4)] += count
    return counts


def _stack(axis: Any, y: int, moved: Sequence[Transitions]) -> int:
    """One bar; returns the number of prompts it stands for."""
    counts = grouped(moved)
    total, left = sum(counts), 0.0
    for (label, colour), count in zip(CHANGES, counts, strict=True):
        share = count / total if total else 0.0
        axis.barh(y, share, left=left, height=0.66, color=colour, edgecolor="white", linewidth=0.6, zorder=2, label=label if y == 0 else None)
        if share >= 0.06:
            ink = "white" if colour == "#0072B2" else "#111111"
            axis.text(left + share / 2, y, str(count), ha="center", va="center", fontsize=8, zorder=3, color=ink)
        left += share
    return total
