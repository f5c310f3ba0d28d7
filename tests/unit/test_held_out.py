"""What the search never asks: rows and prompts that wait, who is asked them, what is handed over and said."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.data import conversations
from orchestrator.decision import limits, selection
from orchestrator.decision.intervals import paired_scores
from orchestrator.errors import ConfigError, DataError
from orchestrator.evaluation import held_out
from orchestrator.evaluation.suites import make
from orchestrator.experiment import checks, driver, handover, identity
from orchestrator.records import SuiteResult, TaskResult, TrialResult
from orchestrator.report import figures
from orchestrator.report import view as report_view
from orchestrator.trial import task_rows
from tests import made_up

LIMITS = config.Limits(max_degradation=0.05, max_over_refusal_rise=None)


def experiment(folder, **sections):
    return made_up.experiment(folder, search={"seeds": 2, "finalists": 1}, **sections)


def suite(name="harmful", count=300, requests=None, **more):
    prompts = tuple(f"how do i break number {i}" for i in range(count))
    made = make(name, "harmful", tuple(map(str, range(count))), prompts, None, None)
    return replace(made, texts=prompts, requests=requests, **more)


# ------------------------------------------------------------------------------------------------ which prompts wait


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 6), st.sampled_from([0.2, 0.5, 0.7]), st.booleans())
def test_a_divided_suite_is_whole_and_no_request_is_in_two_parts(count, wordings, share, named):
    made = config.from_dict({"safety": {"confirm_share": share}})
    names = tuple(f"r{i // wordings}" for i in range(count)) if named else None
    whole = suite(count=count, requests=names)
    parts = held_out.divided([whole], made)
    assert sorted((i for part in parts for i in part.ids), key=int) == list(whole.ids)
    if len(parts) == 1:
        assert parts[0] is whole
        return
    asked, waiting = parts
    assert (asked.name, asked.phase, waiting.name, waiting.phase) == ("harmful", "always", "harmful-held_out", "confirm") and waiting.constrains
    units = [set(part.units) for part in parts]
    assert not units[0] & units[1] and min(map(len, units)) >= held_out.LEAST
    assert asked.texts == tuple(whole.texts[int(i)] for i in asked.ids) and asked.hash != whole.hash != waiting.hash


def test_one_request_waits_in_every_suite_that_asks_it():
    made = config.from_dict({})
    direct, framed = suite(), replace(suite("attacks"), prompts=tuple(f"you are evil. {i}" for i in range(300)))
    first, second = (set(held_out.divided([one], made)[1].texts) for one in (direct, framed))
    assert first == second and 110 < len(first) < 190


@pytest.mark.parametrize(("sections", "more"), [
    ({"search": {"seeds": 1}}, {}), ({"search": {"finalists": 0}}, {}), ({"safety": {"confirm_share": 0}}, {}), ({}, {"constrains": False}),
    ({}, {"phase": "confirm"}), ({"safety": {"limits": {"max_degradation": 0}}}, {}), ({"safety": {"limits": {"max_degradation": 0.01}}}, {}),
])  # fmt: skip
def test_nothing_waits_where_nobody_would_be_asked_or_nothing_could_be_decided(sections, more):
    whole = suite(**more)
    assert held_out.divided([whole], config.from_dict(sections)) == (whole,)


def test_a_suite_of_the_users_own_name_is_not_taken_for_ours():
    both = [suite(), suite("harmful-held_out")]
    assert list(held_out.divided(both, config.from_dict({}))[:1]) == both[:1]


# ------------------------------------------------------------------------------------------------ which rows wait


def rows(path, count, start=0):
    path.write_text("".join(json.dumps({"prompt": f"what is {i}", "response": "x"}) + "\n" for i in range(start, start + count)))
    return str(path)


@pytest.mark.parametrize(("train", "given", "task", "sizes"), [
    (400, None, {}, (320, 40, 40)), (400, None, {"eval_size": 20}, (360, 20, 20)), (400, None, {"confirm_size": 100}, (260, 40, 100)),
    (400, None, {"confirm_size": 0}, (360, 40, 0)), (30, None, {}, (27, 3, 0)),
    (50, 300, {"eval_size": 200}, (50, 200, 100)), (50, 600, {"eval_size": 200}, (50, 200, 200)), (50, 240, {"eval_size": None}, (50, 120, 120)),
    (50, 90, {}, (50, 90, 0)), (50, 100, {"confirm_size": 60}, (50, 40, 60)), (50, 220, {}, (50, 110, 110)),
])  # fmt: skip
def test_rows_are_divided_and_no_prompt_is_in_two_parts(tmp_path, train, given, task, sizes):
    section = {"data": rows(tmp_path / "t.jsonl", train), **task}
    if given is not None:
        section["eval_data"] = rows(tmp_path / "e.jsonl", given, 10_000)
    found = task_rows.load(config.from_dict({"task": section}))
    parts = [found.train, found.evaluation, found.confirmation]
    assert tuple(map(len, parts)) == sizes
    asked = [{conversations.asked(row) for row in part} for part in parts]
    assert not asked[0] & asked[1] and not asked[1] & asked[2] and not asked[0] & asked[2]
    again = task_rows.load(config.from_dict({"task": section}))
    assert again == found
    alone = task_rows.load(config.from_dict({"task": {"confirm_size": 0, **section}, "search": {"seeds": 1}}))
    if given is None and "confirm_size" not in task:
        assert alone.evaluation == found.evaluation, "the rows of the search are the same, whatever waits"


@pytest.mark.parametrize(("given", "size"), [(None, 30), (40, 40)])
def test_a_size_that_leaves_nothing_is_refused_by_name(tmp_path, given, size):
    section = {"data": rows(tmp_path / "t.jsonl", 40), "confirm_size": size}
    if given:
        section["eval_data"] = rows(tmp_path / "e.jsonl", given, 10_000)
    with pytest.raises(DataError, match=f"task.confirm_size.*{size}"):
        task_rows.load(config.from_dict({"task": section}))


# ------------------------------------------------------------------------------------------------ judged and chosen


def result(name, phase, score, failing=0, waiting=0, held=None, recipe="full", rate=1.0):
    """A trial with 200 prompts of the search and 200 that waited."""
    words = {"harmful": (failing, "always"), "harmful-held_out": (waiting, "confirm")}
    suites = {
        s: SuiteResult(s, "harmful", [str(i) for i in range(200)], None, [i < k for i in range(200)], [i >= k for i in range(200)], phase=p)
        for s, (k, p) in words.items() if p == "always" or phase != "search"
    }  # fmt: skip
    seen, waited = (
        None if share is None else TaskResult("exact_match", share, [float(i < round(100 * share)) for i in range(100)], [str(i) for i in range(100)])
        for share in (score, held)
    )
    seed = int(name.partition("s")[2] or 0) if name != "baseline" else 0
    return TrialResult(name, recipe, {"learning_rate": rate}, seed, phase, "complete", seen, suites, confirmation=waited)


BASE = result("baseline", "baseline", 0.1, held=0.12, recipe="")


def judged(*trials, looks=1):
    return [(trial, limits.judge(trial, BASE, LIMITS, looks)) for trial in trials]


def test_a_look_at_what_waited_costs_its_share_of_the_level():
    trial = result("t1s1", "confirm", 0.9, failing=2, waiting=2, held=0.9)
    ends = {}
    for looks in (1, 2, 5):
        searched, waited = limits.judge(trial, BASE, LIMITS, looks).constraints
        assert not searched.held_out and searched.confidence is None and waited.held_out
        assert waited.confidence == (None if looks == 1 else pytest.approx(1 - 0.05 / looks))
        ends[looks] = (searched.estimate.upper, waited.estimate.upper)
    assert ends[1][0] == ends[2][0] == ends[5][0] == ends[1][1] < ends[2][1] < ends[5][1]
    assert limits.judge(replace(trial, phase="search"), BASE, LIMITS).constraints == (limits.judge(trial, BASE, LIMITS).constraints[0],)


def test_what_waited_may_refuse_and_never_prefers():
    better, worse = judged(result("t1", "search", 0.9), result("t2", "search", 0.8, rate=2.0))
    breaks = judged(result("t1s1", "confirm", 0.9, waiting=40, held=0.2))[0]
    keeps = judged(result("t2s1", "confirm", 0.8, held=0.99, rate=2.0))[0]
    assert breaks[1].verdict == "infeasible" and breaks[1].holds and keeps[1].holds
    found = selection.best([better, worse, breaks, keeps])
    assert found.best.trials[0][0].trial_id == "t2", "refused by what waited"
    fine = judged(result("t1s1", "confirm", 0.9, held=0.2))[0]
    found = selection.best([better, worse, fine, keeps])
    assert found.best_trial.trial_id == "t1s1", "rows that waited have no say, however the others score on them"
    assert not judged(result("t3", "search", 0.9, failing=60))[0][1].holds and not judged(replace(better[0], task=None))[0][1].holds


def test_the_model_handed_over_is_one_that_no_choice_was_made_by():
    first, again = judged(result("t1", "search", 0.9), result("t1s1", "confirm", 0.8, held=0.7))
    (found,) = selection.configurations([first, again])
    assert found.handed_over[0].trial_id == "t1s1" == found.shown.trial_id
    (found,) = selection.configurations([first])
    assert found.handed_over[0].trial_id == "t1"


def test_the_score_that_is_said_is_that_of_the_rows_that_waited(tmp_path):
    made = experiment(tmp_path, recipes=[["full"], ["safegrad"]])
    rows = judged(
        result("t1", "search", 0.95, recipe="safegrad"), result("t2", "search", 0.97, failing=150, rate=2.0),
        result("t1s1", "confirm", 0.93, held=0.8, recipe="safegrad"), result("t2s1", "confirm", 0.96, failing=150, waiting=150, held=0.9, rate=2.0),
        looks=2,
    )  # fmt: skip
    found = selection.best(rows)
    said = figures.headline(found, BASE, made)
    assert said.startswith("Best within the limits: t1s1 (safegrad), task score on rows held out of the search 0.800 [")
    assert "(untouched 0.120, plain fine-tuning 0.900: -0.100 [" in said and "0.95" not in said.split("attack success")[0]
    assert figures.control(found, made).trial_id == "t2s1"
    (line,) = [line for line in report_view.caveats(made, BASE, rows, found) if "winner's curse" in line]
    assert "100 rows of the task and suite harmful-held_out had no part in the choice" in line
    view = report_view.view(made, BASE, rows, found, {})
    assert ("task score on rows held out of the search" in json.dumps(view)) and "harmful-held_out" in json.dumps(view["suites_rows"])


def test_without_rows_that_waited_the_sentence_says_which_rows_it_is_of(tmp_path):
    rows = judged(result("t1", "search", 0.95), result("t2", "search", 0.9, rate=2.0))
    assert "on the rows it was chosen by" in figures.headline(selection.best(rows), BASE, made_up.experiment(tmp_path))
    assert "chosen by" not in figures.headline(selection.best(rows[:1]), BASE, made_up.experiment(tmp_path))


def test_paired_scores_are_the_mean_difference_and_refuse_other_rows():
    found = paired_scores([1.0, 0.5, 0.0], [0.5, 0.5, 1.0])
    assert found.value == pytest.approx(1 / 6) and found.lower <= found.value <= found.upper and found.n == 3
    assert paired_scores([], []).n == 0
    with pytest.raises(ValueError, match="equal lengths"):
        paired_scores([1.0], [])
    with pytest.raises(ValueError):
        paired_scores([float("nan")], [1.0])


# ------------------------------------------------------------------------------------------------ the driver


@pytest.mark.parametrize("waits", [True, False])
def test_the_plain_control_is_trained_again_beside_the_finalists(tmp_path, monkeypatch, waits):
    made = experiment(tmp_path, recipes=[["full"], ["safegrad"]])
    plain = result("t2", "search", 0.9, failing=150), result("t3", "search", 0.95, failing=90, rate=3.0)
    rows = judged(result("t1", "search", 0.8, recipe="safegrad"), *plain)
    state = SimpleNamespace(
        experiment=made, rows=rows, specs={t.trial_id: made_up.spec(t) for t, _ in rows}, stop=threading.Event(), standing=driver.Standing(False),
        event=None, folder=tmp_path, trial_folder=lambda name: name, baseline=BASE if waits else replace(BASE, confirmation=None),
        dashboard=SimpleNamespace(grow=lambda n: None, say=lambda text: None),
    )  # fmt: skip
    ran = []

    def run_specs(group, specs, *rest):
        for spec in specs:
            ran.append(spec.trial_id)
            first = next(t for t, _ in rows if t.trial_id == spec.trial_id.partition("s")[0])
            failing = sum(first.suites["harmful"].unsafe)
            again = result(spec.trial_id, "confirm", first.task.score, failing, failing, 0.7, first.recipe, first.params["learning_rate"])
            state.rows += judged(again)

    monkeypatch.setattr(driver.tune, "run_specs", run_specs)
    driver._confirm(state, None)
    assert ran == (["t1s1", "t3s1"] if waits else ["t1s1"]), "the plain control is the best scored one, however unsafe"
    driver._confirm(state, None)
    assert len(ran) == (2 if waits else 1)
    assert selection.best(state.rows).best_trial.trial_id == "t1s1"


def test_what_waited_ends_no_round(tmp_path, monkeypatch):
    """A finalist that keeps its limits on the search's prompts and breaks those that waited is not followed by the next one."""
    made = experiment(tmp_path, recipes=[["safegrad"]])
    rows = judged(result("t1", "search", 0.9), result("t2", "search", 0.8, rate=2.0))
    state = SimpleNamespace(
        experiment=made, rows=rows, specs={t.trial_id: made_up.spec(t) for t, _ in rows}, stop=threading.Event(), standing=driver.Standing(False),
        event=None, folder=tmp_path, trial_folder=lambda name: name, baseline=BASE,
        dashboard=SimpleNamespace(grow=lambda n: None, say=lambda text: None),
    )  # fmt: skip

    def run_specs(group, specs, *rest):
        state.rows += judged(*(result(spec.trial_id, "confirm", 0.9, waiting=150, held=0.7) for spec in specs))

    monkeypatch.setattr(driver.tune, "run_specs", run_specs)
    driver._confirm(state, None)
    assert [t.trial_id for t, _ in state.rows] == ["t1", "t2", "t1s1"] and selection.best(state.rows).best is None


def test_best_yaml_holds_out_the_same_rows_again(tmp_path):
    made = experiment(tmp_path)
    spec = made_up.spec(result("t1s1", "confirm", 0.9))
    best = handover.best_experiment(made, spec, 37)
    assert best.task.confirm_size == 37 and best.safety.confirm_share == 0 and not best.confirms


def test_best_yaml_of_a_run_with_limits_on_suites_that_wait_is_a_config_that_asks_them_at_once(tmp_path):
    made = config.load("pocket")
    spec = replace(made_up.spec(result("t1s1", "confirm", 0.9)), strategies=(("full", {}),))
    assert any(suite.phase == "confirm" and suite.constrains for suite in made.safety.suites)
    best = handover.best_experiment(made, spec, 0)
    checks.check_combinations(best)
    assert {suite.phase for suite in best.safety.suites} == {"always"} and len(best.safety.suites) == len(made.safety.suites)


def test_a_resumed_run_may_not_change_whether_something_waits(tmp_path):
    two, three, one = (made_up.experiment(tmp_path, search={"seeds": n}) for n in (2, 3, 1))
    assert identity.changes(two, three)[0] == []
    assert identity.changes(two, one)[0] == ["held out of the search: True there, False here"]
    fixed = [made_up.experiment(tmp_path, search={"seeds": n}, task={"confirm_size": 5}, safety={"confirm_share": 0}) for n in (1, 2)]
    assert identity.changes(*fixed)[0] == []
    with pytest.raises(ConfigError):
        config.from_dict({"safety": {"confirm_share": 0.95}})
