"""The pictures: real PNG files of a readable size, and a sentence where there is nothing to draw."""

from __future__ import annotations

import dataclasses
import random
import struct
import sys

import made_up
import pytest

from orchestrator.config import Limits
from orchestrator.decision import limits, selection
from orchestrator.decision.intervals import Estimate
from orchestrator.records import Screening
from orchestrator.report.plots import canvas
from orchestrator.report.plots import trials as plots


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return made_up.experiment(tmp_path_factory.mktemp("plots"))


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("good", [True, False])
def test_every_plot_is_a_readable_png(experiment, good):
    before, rows = made_up.trials(Limits(), good=good)
    made = plots.all_plots(experiment, before, rows, selection.best(rows))
    names = ["score_against_degradation", "asr_by_recipe", "degradation_over_steps", "learning_rate_against_degradation"]
    assert [plot.name for plot in made] == names
    for plot in made:
        width, height = size(plot.png)
        assert 1000 <= width <= 2000 and 300 <= height <= 1200
        assert plot.text and len(plot.png) < 300_000


def test_the_same_figures_give_the_same_file(experiment):
    before, rows = made_up.trials(Limits(), count=5)
    look = plots.Look.of(experiment, rows)
    once, again = (plots.score_against_degradation(look, before, rows, selection.best(rows)) for _ in range(2))
    assert once.png == again.png


def test_without_trials_there_are_sentences(experiment):
    for plot in plots.all_plots(experiment, made_up.baseline(), [], selection.best([])):
        assert plot.png is None and plot.text.endswith(".")


def test_without_probes_the_remedy_is_named(experiment):
    before, rows = made_up.trials(Limits(), count=3)
    for trial, _ in rows:
        trial.history = [event for event in trial.history if event["kind"] != "probe"]
    plot = plots.degradation_over_steps(plots.Look.of(experiment, rows), rows, 0.05)
    assert plot.png is None and "monitor.every_steps" in plot.text


def test_only_failed_trials(experiment):
    before = made_up.baseline()
    trial = made_up.result("t0000", "lora", {"learning_rate": 1.0}, state="failed")
    rows = [(trial, limits.judge(trial, before, Limits()))]
    made = {plot.name: plot.png for plot in plots.all_plots(experiment, before, rows, selection.best(rows))}
    assert made["score_against_degradation"] is None and made["asr_by_recipe"] is None


def test_one_trial_and_recipes_beyond_the_palette(experiment):
    before = made_up.baseline()
    trials = [made_up.result(f"t{i}", f"recipe {i}", {"learning_rate": 1e-3}) for i in range(12)]
    rows = [(trial, limits.judge(trial, before, Limits())) for trial in trials]
    look = plots.Look.of(experiment, rows)
    styles = [tuple(look.style(trial.recipe).values()) for trial in trials]
    assert len(set(styles)) == 12, "no two recipes look alike"
    for some in (rows[:1], rows):
        assert size(plots.score_against_degradation(look, before, some, selection.best(some)).png)


def test_error_bars_end_where_the_interval_ends():
    (below,), (above,) = canvas.bar(Estimate(0.1, 0.04, 0.3, 50))
    assert below == pytest.approx(0.06) and above == pytest.approx(0.2)


def test_pyplot_stays_out(experiment):
    """The pictures are drawn in a driver with threads, where pyplot's global figures would leak and want a display."""
    before, rows = made_up.trials(Limits(), count=3)
    sys.modules.pop("matplotlib.pyplot", None)
    plots.score_against_degradation(plots.Look.of(experiment, rows), before, rows, selection.best(rows))
    assert "matplotlib.pyplot" not in sys.modules


def test_breaches_and_rollbacks_are_drawn(experiment):
    trial = made_up.result("t0", "lora", {"learning_rate": 1e-3})
    probe = {"kind": "probe", "n": 50, "quick": False}
    trial.history = [
        probe | {"step": 10, "degradation": 0.0, "breach": False}, probe | {"step": 20, "degradation": 0.4, "breach": True},
        {"kind": "rollback", "step": 20, "to_step": 10, "rollbacks": 1, "rate_factor": 1.0, "peak_rate": 1e-3, "added": "safegrad"},
        probe | {"step": 20, "degradation": 0.2, "breach": True},
        {"kind": "rollback", "step": 20, "to_step": 10, "rollbacks": 2, "rate_factor": 0.5, "peak_rate": 5e-4},
        probe | {"step": 20, "degradation": 0.02, "breach": False}, probe | {"step": 30, "degradation": 0.3, "breach": True},
        {"kind": "last_safe", "step": 30, "to_step": 20, "rollbacks": 2, "rate_factor": 0.5},
    ]  # fmt: skip
    rows = [(trial, limits.judge(trial, made_up.baseline(), Limits()))]
    marked = plots.degradation_over_steps(plots.Look.of(experiment, rows), rows, 0.05)
    calm = [event for event in trial.history if event["kind"] == "probe" and not event["breach"]]
    trial.history = calm
    assert size(marked.png) and marked.png != plots.degradation_over_steps(plots.Look.of(experiment, rows), rows, 0.05).png
    assert plots.monitor.probes([probe | {"quick": True, "step": 5}]) and len(plots.monitor.probes([*calm, probe | {"quick": True}])) == 2


def test_a_label_says_why_sizes_differ_and_only_what_is_so():
    rng = random.Random(0)
    whole, other = made_up.suite("a", "harmful", 0.1, 40, rng), made_up.suite("b", "harmful", 0.1, 60, rng)
    screening = Screening("infeasible", 0.2, 0.1, 0.3, 20, 40, 0.1, 0.95, "request", 20)
    stopped = dataclasses.replace(made_up.suite("a", "harmful", 0.1, 20, rng), screening=screening)
    assert plots.asked([whole, whole]) == "n=40"
    assert plots.asked([whole, other]) == "n=40 to 60, not the same of all"
    assert plots.asked([whole, stopped]) == "n=20 to 40, some stopped early"
    assert plots.asked([whole, other, stopped]) == "n=20 to 60, not the same of all, some stopped early"
