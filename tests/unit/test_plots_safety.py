"""Pictures of refusals and transitions: counts add up, recipes are told apart, nothing is drawn of nothing."""

from __future__ import annotations

import random
import struct

import made_up

from orchestrator import config
from orchestrator.config import Limits
from orchestrator.decision import selection as decision_selection
from orchestrator.evaluation.transitions import all_transitions
from orchestrator.report.plots import refusals
from orchestrator.report.plots.refusals import Arm


def test_every_prompt_is_counted_once():
    before, after = ({n: made_up.suite(n, k, share, 200, random.Random(seed)) for n, k in (("h", "harmful"), ("b", "benign"))}
                     for share, seed in ((0.1, 1), (0.6, 2)))  # fmt: skip
    moved = all_transitions(before, after)
    counts = refusals.grouped(moved)
    assert sum(counts) == 400
    h, g = before["h"], after["h"]
    pairs = list(zip(h.refused, g.refused, strict=True))
    harmful = refusals.grouped([t for t in moved if t.kind == "harmful"])
    assert harmful[0] == pairs.count((True, True)) and harmful[2] == pairs.count((True, False)) and harmful[1] == pairs.count((False, True))


def test_recipes_of_the_same_strategies_are_told_apart_by_what_differs():
    made = config.load("refusal_study")
    labels = refusals.recipe_labels(made)
    assert list(labels) == list(made.recipe_names) and len(set(labels.values())) == 4
    assert labels["perturbation"] == "perturbation\nform=smoothllm, copies=10, rate=0.1"
    assert labels["refusal_training+lora#2"] == "refusal_training+lora\nbenign_share=1"
    assert refusals.recipe_labels(config.load("high")) == {"safegrad+freeze_layers": "safegrad+freeze_layers"}


def test_pictures_of_an_experiment(tmp_path):
    before, rows = made_up.trials(Limits())
    selection = decision_selection.best(rows)
    experiment = made_up.experiment(tmp_path)
    arms = refusals.arms_of(experiment, before, selection)
    assert [arm.label for arm in arms] == ["original", *made_up.RECIPES]
    made = refusals.report_plots(experiment, before, selection)
    assert [plot.name for plot in made] == ["refusal_frequencies", "transitions"]
    for plot in made:
        width, height = struct.unpack(">II", plot.png[16:24])
        assert 1000 <= width <= 2000 and 300 <= height <= 2000 and plot.text


def test_bars_stand_for_the_same_suites(monkeypatch):
    """A held-out suite that only the finalist was asked is in no bar."""
    suites = {n: made_up.suite(n, "harmful", 0.5, 20, random.Random(n)) for n in ("h", "held")}
    seen = []
    monkeypatch.setattr(refusals, "_stack", lambda axis, y, moved: seen.append([t.suite for t in moved]) or axis.barh(y, 1) and 20)
    assert refusals.changes([Arm("original", suites), Arm("searched", {"h": suites["h"]}), Arm("finalist", suites)]).png
    assert seen == [["h"], ["h"]]
    seen.clear()
    refusals.changes([Arm("original", suites), Arm("finalist", suites)])
    assert seen == [["h", "held"]]


def test_one_model_has_no_transitions_and_none_has_no_picture():
    alone = [Arm("one", {"h": made_up.suite("h", "harmful", 0.5, 20, random.Random(0))})]
    assert refusals.refusals(alone, 0.95).png and refusals.changes(alone).png is None
    for plot in (*refusals.pictures([], 0.95), refusals.failures([], 0.95)):
        assert plot.png is None and plot.text.endswith(".")
