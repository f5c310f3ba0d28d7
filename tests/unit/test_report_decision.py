"""What someone decides from: the Pareto front, importances, depth, cost, frozen range by rank; tables as CSV and LaTeX."""

from __future__ import annotations

import csv
import random
import re

import made_up
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.report import decision, exports, run
from orchestrator.report.plots import decision as plots
from orchestrator.search.importance import LEAST, importances


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decision")
    experiment = made_up.experiment(folder)
    before, rows = made_up.trials(experiment.safety.limits)
    return folder, experiment, before, rows, decision_selection.best(rows)


def judged(points):
    """Rows with the given (score, degradation) as nothing but their figures."""
    from types import SimpleNamespace as Made

    return [(Made(trial_id=f"t{i}"), Made(task_score=score, degradation=Made(value=rise, n=10))) for i, (score, rise) in enumerate(points)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_holds_exactly_what_nothing_beats(points):
    found = [(j.task_score, j.degradation.value) for _, j in decision.front(judged(points))]
    wanted = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)]
    assert sorted(found) == sorted(wanted)
    assert found == sorted(found, key=lambda one: (one[1], one[0])), "from the safest to the best score"


def test_the_knob_that_decides_has_the_importance():
    rng = random.Random(0)
    points = [{"rate": 10 ** rng.uniform(-5, -1), "idle": rng.random(), "kind": rng.choice("ab")} for _ in range(60)]
    values = [point["rate"] for point in points]
    for higher in (True, False):
        found = importances(points, values, higher=higher)
        assert next(iter(found)) == "rate" and found["rate"] > 0.5 and sum(found.values()) == pytest.approx(1)


def test_importance_is_not_made_up_of_too_few_trials_or_knobs():
    points = [{"a": i, "b": i % 3} for i in range(LEAST)]
    assert set(importances(points, range(LEAST), higher=True)) == {"a", "b"}
    assert importances(points[:-1], range(LEAST - 1), higher=True) == {} and importances([], [], higher=True) == {}
    assert importances([{"a": i, "b": 1} for i in range(LEAST)], range(LEAST), higher=True) == {}, "one knob that varies decides alone"
    assert importances(points, [0.5] * LEAST, higher=True) == {}, "nothing to tell apart"
    with pytest.raises(ValueError, match="a value for each point"):
        importances(points, [1.0], higher=True)


def test_depth_is_of_suites_that_begin_answers(made):
    _, _, before, rows, _ = made
    assert decision.depths(before, None) == []
    deep = made_up.baseline()
    for name, attack in (("at3", "prefill_3"), ("at9", "prefill_9"), ("other", "many_shot")):
        deep.suites[name] = made_up.suite(name, "harmful", 0.5, 40, random.Random(1))
        deep.suites[name].attack, deep.suites[name].source = attack, {"data": "x"}
    deep.suites["harmful"].source = {"data": "x"}
    found = decision.depths(deep, rows[0][0])
    assert [(one.data, one.depth) for one in found] == [("x", 0), ("x", 3), ("x", 9)] and found[0].after is not None and found[1].after is None
    assert plots.depth(deep, rows[0][0], 0.95).png is not None and plots.depth(before, None, 0.95).png is None


def test_costs_add_up(made):
    _, _, before, rows, selection = made
    table = next(t for t in decision.tables(before, rows, selection, 0.95) if t["title"] == "Cost by recipe")
    for name, count, total, *_ in table["rows"]:
        own = [r for r, _ in rows if r.recipe == name]
        assert int(count) == len(own) and int(total) == round(sum(r.seconds["total"] for r in own))


def test_frozen_range_by_rank_is_drawn_where_it_was_searched(made):
    _, experiment, before, rows, _ = made
    assert plots.freeze_and_rank(rows) is None, "the made-up runs pin no width"
    searched = []
    for i, (start, width, rank) in enumerate([(1, 1, 8), (1, 2, 8), (1, 1, 2)]):
        trial = made_up.result(f"t{i}", "freeze_layers+lora", {"freeze_layers.start": start, "freeze_layers.width": width, "lora.lora_r": rank})
        searched.append((trial, limits.judge(trial, before, experiment.safety.limits)))
    drawn = plots.freeze_and_rank(searched)
    assert drawn.png.startswith(b"\x89PNG") and "3 of 4 cells" in drawn.png.figure.axes[0].get_title(loc="left")
    assert plots.freeze_and_rank(searched[:1]).png is None


def test_every_picture_says_why_where_there_is_none(made):
    _, _, before, _, _ = made
    for plot in plots.pictures(before, [], decision_selection.best([]), 0.95):
        assert plot.png is None and plot.text.endswith(".")


def test_a_line_of_the_parallel_coordinates_for_each_trial_in_the_colour_of_its_verdict(made):
    *_, rows, _ = made
    axis = plots.parallel(rows).png.figure.axes[0]
    lines = [line for line in axis.get_lines() if line.get_marker() == "o"]
    known = decision.measured(rows)
    assert len(lines) == len(known)
    assert sorted(line.get_color() for line in lines) == sorted(plots.VERDICTS[j.verdict][0] for _, j in known)


def test_every_table_of_the_page_lies_beside_it(made):
    folder, experiment, before, rows, selection = made
    paths = run.write_report(folder / "out", experiment, before, rows, selection, {})
    html = paths[0].read_text()
    stems = {path.stem for path in (folder / "out" / "tables").iterdir()}
    assert {"figures", "every_limit", "recipes_compared", "all_trials", "suites", "pareto_front", "cost_by_recipe", "which_knob_matters"} <= stems
    assert len(stems) == html.count("<table") + 1, "and the untouched model's list"
    for stem in stems:
        with (folder / "out" / "tables" / f"{stem}.csv").open() as file:
            head, *body = csv.reader(file)
        assert len(set(head)) == len(head) and body and all(len(row) == len(head) for row in body)
        tex = (folder / "out" / "tables" / f"{stem}.tex").read_text()
        assert tex.count(r"\\") == len(body) + 1 and len(re.search(r"\{(l+)\}", tex)[1]) <= len(head)


def test_csv_holds_numbers_not_figures_as_text():
    table = {"head": ["a", "rate", "room", "rate"], "rows": [["x", "+0.020 [-0.004, +0.049] n=120 in 40 requests", "+0.070", "not measured"],
                                                          ["y", "not measured", "-0.1", "0.1 or so"]]}  # fmt: skip
    names, rows = exports.apart(table)
    assert names == ["a", "rate", "rate lower", "rate upper", "rate n", "room", "rate 2"]
    assert rows == [["x", 0.02, -0.004, 0.049, "120 in 40 requests", 0.07, "not measured"], ["y", None, None, None, None, -0.1, "0.1 or so"]]


def test_latex_takes_every_text_as_text():
    tex = exports.latex({"title": "T\n\\x", "head": ["a_b"], "rows": [[r"\input{x} 50% $y$ #1 & ~^<>"]]})
    wanted = r"\textbackslash{}input\{x\} 50\% \$y\$ \#1 \& \textasciitilde{}\textasciicircum{}\textless{}\textgreater{} \\"
    assert wanted in tex.splitlines() and r"a\_b \\" in tex.splitlines() and tex.startswith("% T ")
