"""Records that someone else wrote, or half of which is left: refused by name, kept, never counted, never a path; no seed counts twice."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import made_up
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator import config
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.errors import SafebasinError, StorageError
from orchestrator.experiment import baseline, trial_records
from orchestrator.records import Screening, SuiteResult, TaskResult, TrialResult
from orchestrator.report import figures, table
from orchestrator.search.spaces import RecipeSpace
from orchestrator.storage import files
from orchestrator.trial import record_check

RUN = "run-1"
SPACES = {
    "full": RecipeSpace("full", {"learning_rate": FloatDistribution(1e-4, 1e-2)}, {}, {}),
    "lora": RecipeSpace("lora", {"lora.lora_r": CategoricalDistribution([4, 8]), "x.k": IntDistribution(1, 3)}, {"learning_rate": 1e-3}, {}),
}
FUZZ = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def experiment(folder):
    return config.from_dict({"recipes": [["full"], ["lora"]], "output": {"dir": str(folder)}})


def record(trial_id="t0001", **changes):
    made = made_up.result(trial_id, "full", {"learning_rate": 1e-3}, n=12)
    return {**json.loads(json.dumps(files.plain(made.to_dict()))), **changes}


def put(folder, raw, name="t0001", spec=True):
    place = folder / "trials" / name
    place.mkdir(parents=True, exist_ok=True)
    if spec:
        asked = {"format": 1, "run": RUN, "trial_id": name, "recipe": "full", "params": {"learning_rate": 1e-3}, "seed": 0, "phase": "search",
                 "passed_over": [], "sampler": {}}  # fmt: skip
        files.write_json(place / "spec.json", asked | (spec if isinstance(spec, dict) else {}))
    if raw is not None:
        data = raw if isinstance(raw, (bytes, str)) else json.dumps(raw)
        (place / "result.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    return place


def read(folder):
    return trial_records.read(folder, experiment(folder), SPACES, RUN)


def test_a_record_comes_back_as_it_was_written():
    screening = Screening("feasible", 0.0, -0.1, 0.04, 32, 100, 0.05, 0.95, "request", 8)
    suite = SuiteResult("s", "harmful", ["a", "b"], ["g", "g"], [True, False], [False, True], screening=screening, second=["unsafe", "safe"])
    made = TrialResult("t0001", "full", {"a": 1, "b": 0.5, "c": "x", "d": [1, 2]}, 3, "confirm", "complete", suites={"s": suite}, fault=None)
    made.task = TaskResult("custom", math.nan, [0.5, math.nan], ["1", "2"])
    made.facts = {"external": {"x": {"value": math.nan, "stderr": 0.1, "n": 5, "max_drop": 0.1, "phase": "always"}}, "rows": {"cut": 1}}
    back = record_check.result_of(json.loads(json.dumps(files.plain(made.to_dict()))), "result.json")
    assert repr(back) == repr(made)


UNREADABLE = {
    "empty": b"", "torn": json.dumps(record()).encode()[:-40], "an object of nothing": {}, "a list": [], "null": b"null", "a number": 5,
    "NUL bytes": b"\0" * 4096, "no UTF-8": b'{"trial_id": "\xff"}', "NaN": json.dumps(record(steps=math.nan)), "deep": b"[" * 100_000,
    "many digits": b'{"steps": ' + b"9" * 5000 + b"}", "half a pair": json.dumps(record(error="\ud800")),
    "an unknown field": record(tomorrow=1), "an unknown field within": record(task={**record()["task"], "tomorrow": 1}),
    "a missing field": {k: v for k, v in record().items() if k != "phase"}, "steps as text": record(steps="120"), "steps true": record(steps=True),
    "a state that is none": record(state="fine"), "params a list": record(params=[1]), "suites a list": record(suites=[]),
    "history of numbers": record(history=[1]), "facts a text": record(facts="x"), "storage of numbers": record(facts={"storage": [1]}),
    "external of nothing": record(facts={"external": {"x": {}}}), "fewer scores": record(task={**record()["task"], "scores": [1.0]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_record_that_cannot_be_read_is_kept_aside_and_its_trial_tried_again(tmp_path, kind):
    place = put(tmp_path, UNREADABLE[kind])
    before = (place / "result.json").read_bytes()
    found = read(tmp_path)
    (line,) = found.sentences
    assert str(place / "result.json") in line and "moved to result.json.damaged-1" in line and "\n" not in line and len(line) < 600, line
    assert (place / "result.json.damaged-1").read_bytes() == before and not (place / "result.json").exists()
    assert found.results == [] and [(one.trial_id, one.outcome) for one in found.open] == [("t0001", None)] and found.next_id == 2


def unequal(name):
    raw = copy.deepcopy(record())
    suite = next(iter(raw["suites"].values()))
    suite[name] = suite["unsafe"][:-1] if name != "groups" else ["g"]
    return raw


@pytest.mark.parametrize("name", ["groups", "unsafe", "refused", "partial", "gibberish", "empty", "unparsed"])
def test_lists_of_different_length_are_refused(tmp_path, name):
    put(tmp_path, unequal(name))
    assert read(tmp_path).results == []


FOREIGN = {
    "another id": record("t0009"), "a path for an id": record("../../x"), "an absolute path": record("/etc/passwd"),
    "another recipe": record(recipe="safegrad"),
    "outside the space": record(params={"learning_rate": 0.5}), "a whole number for a choice": record(params={"learning_rate": "0.001"}),
    "a stray parameter": record(params={"learning_rate": 1e-3, "lora.lora_r": 4}), "no parameters": record(params={}),
    "another seed": record(seed=7), "another phase": record(phase="confirm"), "the baseline": record(phase="baseline"),
    "true for a number": record(params={"learning_rate": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("spec", [True, False])
def test_a_record_of_something_else_is_named_and_not_counted(tmp_path, kind, spec):
    place = put(tmp_path, FOREIGN[kind], spec=spec)
    found = read(tmp_path)
    (line,) = [line for line in found.sentences if "result.json is not counted" in line]
    assert str(place / "result.json") in line and found.results == [] and found.next_id >= 2
    assert (place / "result.json").exists() != spec, "left where it is, unless its trial is tried again"
    assert [one.trial_id for one in found.open] == (["t0001"] if spec else [])


@pytest.mark.parametrize("name", ["..t0001", "t1", "t00001", "t00001x", "x", "t0001s", "t0001 ", "T0001"])
def test_a_folder_that_no_trial_has_is_left_alone(tmp_path, name):
    put(tmp_path, record(name), name, spec=False)
    found = read(tmp_path)
    assert found.results == found.open == [] and "is no trial id" in found.sentences[0] and (tmp_path / "trials" / name / "result.json").exists()


def test_a_trial_of_another_run_is_not_counted_and_its_id_not_used(tmp_path):
    put(tmp_path, record("t0007"), "t0007", spec={"run": "another"})
    found = read(tmp_path)
    assert found.results == found.open == [] and "of another run" in found.sentences[0] and found.next_id == 8


def test_a_trial_folder_that_was_moved_and_linked_is_counted_and_nothing_is_written_there(tmp_path):
    place = put(tmp_path / "elsewhere", record())
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "t0001").symlink_to(place)
    found = read(tmp_path)
    assert [r.trial_id for r in found.results] == ["t0001"] and f"is a link to {place}; its records are counted" in found.sentences[0]
    assert found.next_id == 2 and found.results[0].model_dir in (None, str(tmp_path / "trials" / "t0001" / "model"))


@pytest.mark.parametrize("damage", ["torn", "of another run", "failed by a machine", "no spec", "gone", "loop"])
def test_a_linked_trial_that_is_not_whole_is_named_left_as_it_is_and_its_id_kept(tmp_path, damage):
    raw = record(state="failed", fault="machine", task=None, error="x") if damage == "failed by a machine" else record()
    spec = {"run": "another"} if damage == "of another run" else damage != "no spec"
    place = put(tmp_path / "elsewhere", b"{" if damage == "torn" else raw, spec=spec)
    (tmp_path / "trials").mkdir()
    link = tmp_path / "trials" / "t0001"
    link.symlink_to({"gone": tmp_path / "nowhere", "loop": link}.get(damage, place))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    found = read(tmp_path)
    assert found.results == found.open == [] and found.next_id == 2
    assert any(str(link) in line and "not counted" in line and "not used again" in line for line in found.sentences), found.sentences
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before and link.is_symlink()


TASK = record()["task"]
INCONSISTENT = {
    "a score that is not the mean": {**TASK, "score": TASK["score"] + 0.01}, "a score of none": {**TASK, "score": None},
    "a mean of none": {**TASK, "scores": [None, *TASK["scores"][1:]]}, "above 1": {**TASK, "scores": [2.0] * 200, "score": 2.0},
    "a huge one": {**TASK, "score": 1e308}, "below 0": {**TASK, "scores": [-0.5] * 200, "score": -0.5},
    "a score of no rows": {**TASK, "scores": [], "ids": []},
}  # fmt: skip


@pytest.mark.parametrize("kind", INCONSISTENT)
def test_a_score_that_its_rows_do_not_give_is_damage(tmp_path, kind):
    place = put(tmp_path, record(task=INCONSISTENT[kind]))
    found = read(tmp_path)
    assert found.results == [] and "task: " in found.sentences[0] and (place / "result.json.damaged-1").exists()


def test_a_score_by_another_metric_is_of_something_else(tmp_path):
    place = put(tmp_path, record(task={**TASK, "metric": "contains"}))
    found = read(tmp_path)
    assert found.results == [] and "its metric is 'contains', and the run's is 'exact_match'" in found.sentences[0]
    assert (place / "result.json.foreign-1").exists() and [one.trial_id for one in found.open] == ["t0001"]


@pytest.mark.parametrize("change", [{"parse_failed": 99}, {"parse_failed": -1}, {"unparsed": [True] * 12, "parse_failed": 3}])
def test_counts_that_the_verdicts_do_not_give_are_damage(tmp_path, change):
    raw = copy.deepcopy(record())
    next(iter(raw["suites"].values())).update(change)
    put(tmp_path, raw)
    found = read(tmp_path)
    assert found.results == [] and "parse_failed" in found.sentences[0]


def test_the_model_of_a_record_is_never_a_path_to_elsewhere(tmp_path):
    put(tmp_path, record(model_dir=str(tmp_path / "precious")))
    (result,) = read(tmp_path).results
    assert result.model_dir == str(tmp_path / "trials" / "t0001" / "model")


@pytest.mark.parametrize(
    "change", [{"params": {"learning_rate": 0.7}}, {"trial_id": "../x"}, {"seed": "0"}, {"passed_over": [1]}, {"extra": 1}, {"format": 2}]
)
def test_a_spec_that_is_none_does_not_hide_a_good_result(tmp_path, change):
    put(tmp_path, record(), spec=change)
    found = read(tmp_path)
    assert [r.trial_id for r in found.results] == ["t0001"] and "spec.json" in found.sentences[0]


def test_with_neither_record_nothing_is_counted_and_the_id_is_gone(tmp_path):
    place = put(tmp_path, b"{", "t0003")
    (place / "spec.json").write_bytes(b"\0\0")
    found = read(tmp_path)
    assert found.results == found.open == [] and found.next_id == 4 and any("holds no record that can be read" in line for line in found.sentences)


leaves = st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats(allow_nan=True) | st.text(max_size=8) | st.sampled_from(["../../x", "t0001"])
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8)


@FUZZ
@given(data=st.data())
def test_no_content_of_a_record_crashes(tmp_path_factory, data):
    """Any JSON, and a real record with any value in any field, at two levels."""
    folder = tmp_path_factory.mktemp("fuzz")
    raw = record()
    kind = data.draw(st.sampled_from(["whole", "field", "suite", "task", "facts", "bytes", "spec"]))
    value = data.draw(anything)
    if kind == "whole":
        raw = value
    elif kind == "field":
        raw[data.draw(st.sampled_from(sorted(raw)))] = value
    elif kind in ("suite", "task"):
        part = raw["task"] if kind == "task" else next(iter(raw["suites"].values()))
        part[data.draw(st.sampled_from(sorted(part)))] = value
    elif kind == "facts":
        raw["facts"][data.draw(st.sampled_from(["external", "template", "storage", "monitor", "cancelled", "rows"]))] = value
    text = json.dumps(raw).encode()
    if kind == "bytes":
        text = text[: data.draw(st.integers(0, len(text)))] + data.draw(st.binary(max_size=5))
    place = put(folder, text)
    if kind == "spec":
        asked = json.loads((place / "spec.json").read_text())
        (place / "spec.json").write_text(json.dumps({**asked, data.draw(st.sampled_from(sorted(asked))): value}))
    found = read(folder)
    assert [path.name for path in folder.iterdir()] == ["trials"] and len(found.results) + len(found.open) <= 1
    for result in found.results:
        assert result.trial_id == "t0001" and result.recipe == "full" and 1e-4 <= result.params["learning_rate"] <= 1e-2
        judged = limits.judge(result, made_up.result("baseline", "", {}, phase="baseline"), config.Limits())
        table.write_trials_csv(folder / "trials.csv", [table.trial_row(result, judged)])
        decision_selection.best([(result, judged)])


# ------------------------------------------------------------------------------------------------ the untouched model's record


def untouched(made):
    result = made_up.result("baseline", "", {}, phase="baseline")
    return replace(result, task=replace(result.task, metric=made.task.metric))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"trial_id": "baseline"}', b"\0" * 9, json.dumps(record()).encode()])
def test_a_damaged_or_foreign_baseline_is_kept_aside_and_measured_anew(tmp_path, raw):
    made = made_up.experiment(tmp_path)
    path = files.write_bytes(tmp_path / "b.json", raw)
    said = []
    assert baseline.recall(path, made, said.append) is None
    assert len(said) == 1 and "b.json.unreadable-1" in said[0] and (tmp_path / "b.json.unreadable-1").read_bytes() == raw


def test_a_baseline_of_other_suites_or_another_metric_is_refused(tmp_path):
    made = made_up.experiment(tmp_path, search={"seeds": 1})
    good = untouched(made)
    path = tmp_path / "b.json"
    files.write_json(path, good.to_dict())
    assert baseline.recall(path, made).suites.keys() == good.suites.keys()
    other = replace(good, task=replace(good.task, metric="other"))
    for bad in (replace(good, suites={}), replace(good, task=None), other, replace(good, state="failed")):
        files.write_json(path, bad.to_dict())
        said = []
        assert baseline.recall(path, made, said.append) is None and "is no record of this untouched model" in said[0]


# ------------------------------------------------------------------------------------------------ no seed counts twice


def rows(*trials):
    before = made_up.result("baseline", "", {}, phase="baseline")
    return [(trial, limits.judge(trial, before, config.Limits())) for trial in trials]


def test_a_seed_counts_once_however_many_records_hold_it(tmp_path):
    one = made_up.result("t0001", "safe_instruct", {"learning_rate": 1e-3}, asr=0.0, over=0.0)
    again = replace(one, trial_id="t0007")
    selection = decision_selection.best(rows(one, again, one))
    (found,) = selection.configurations
    assert found.seeds == (0,) and len(found.trials) == 1
    text = figures.headline(selection, made_up.result("baseline", "", {}, phase="baseline"), made_up.experiment(tmp_path))
    assert "on one seed" in text and "seeds" not in text.split("feasible", 1)[1]
    more = decision_selection.best(rows(one, again, replace(one, trial_id="t0001s1", seed=1, phase="confirm")))
    assert more.configurations[0].seeds == (0, 1)


def test_of_two_records_of_a_seed_the_worse_verdict_stays_and_a_failure_yields(tmp_path):
    good = made_up.result("t0001", "safe_instruct", {"learning_rate": 1e-3}, asr=0.0, over=0.0)
    bad = made_up.result("t0002", "safe_instruct", {"learning_rate": 1e-3}, asr=0.9)
    broken = TrialResult("t0003", "safe_instruct", {"learning_rate": 1e-3}, 0, "search", "failed", error="x")
    for order in ((good, bad, broken), (broken, bad, good), (bad, broken, good)):
        (found,) = decision_selection.configurations(rows(*order))
        assert [r.trial_id for r, _ in found.trials] == ["t0002"]
    (found,) = decision_selection.configurations(rows(broken, good))
    assert [r.trial_id for r, _ in found.trials] == ["t0001"]


def test_only_errors_of_ours_come_out_of_a_file():
    assert issubclass(record_check.BadRecord, StorageError) and issubclass(StorageError, SafebasinError)
