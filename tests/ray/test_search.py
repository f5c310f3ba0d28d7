"""The whole search with made-up trials: budget, constraints, failures, the clock; and the command where nothing is feasible."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.studies import open_storage
from orchestrator.search.tune import build_spec, run_search, run_specs

SPACE = FloatDistribution(1e-4, 1e-2, log=True)


def judge(result):
    return {"score": result.task.score, "constraints": {"harmful": result.suites["harmful"].rate - 0.05}}


@pytest.fixture
def search(pair, make_experiment, tmp_path):
    """Search over the shared lanes, as one run's phases would."""

    def run(do=lambda asked: {}, recipes=("full", "lora"), **kwargs):
        while pair.next_event(timeout=0.0) is not None:  # of other tests on the same lanes
            continue
        experiment = make_experiment(search={"trials": kwargs.pop("trials", 8), **kwargs.pop("search", {})})
        spaces = {name: RecipeSpace(name, {"learning_rate": SPACE}, {}, {"learning_rate": 1e-3}) for name in recipes}

        def make_spec(asked):
            folder = tmp_path / asked.trial_id
            folder.mkdir()
            told = {"trial_id": asked.trial_id, "recipe": asked.recipe, "params": asked.params}
            spec = build_spec(experiment, **told, seed=0, phase="search", folder=str(folder))
            return dataclasses.replace(spec, params={**asked.params, **do(asked)})

        results = run_search(experiment, pair, spaces=spaces, constraint_names=["harmful"], judge_result=judge, make_spec=make_spec, **kwargs)
        storage = open_storage(experiment)
        studies = {name: optuna.load_study(study_name=f"{experiment.name}/{name}", storage=storage).trials for name in recipes}
        return results, studies

    return run


def test_the_whole_search_tells_score_and_constraints(search):
    events = []
    results, studies = search(on_event=events.append)
    assert [r.trial_id for r in results] == [f"t{n:04d}" for n in range(1, 9)]
    assert [r.recipe for r in results].count("full") == 4
    assert results[0].params["learning_rate"] == results[1].params["learning_rate"] == 1e-3
    told = [trial for trials in studies.values() for trial in trials]
    assert len(told) == 8 and all(trial.state == TrialState.COMPLETE for trial in told)
    assert {trial.constraints["harmful"] > 0 for trial in told if trial.params["learning_rate"] > 1e-3} <= {True}
    kinds = [event["kind"] for event in events if "trial_id" in event]
    assert kinds.count("started") == kinds.count("finished") == kinds.count("train") == 8


def test_a_failed_trial_costs_no_other(search):
    """One whose worker dies every time ends the same way: test_lanes.py."""
    results, studies = search(do=lambda asked: {"do": "raise"} if asked.trial_id == "t0002" else {}, trials=6)
    assert [r.state for r in results] == ["complete", "failed", "complete", "complete", "complete", "complete"]
    (failed,) = [trial for trials in studies.values() for trial in trials if trial.state == TrialState.FAIL]
    assert failed.constraints == {"harmful": 1.0}


def test_no_trial_starts_after_the_time_budget(search):
    results, studies = search(do=lambda asked: {"do": "count"}, trials=40, search={"time_budget_s": 1.0})
    assert 1 <= len(results) < 12 and all(r.state == "complete" for r in results), "what ran was let finish"
    assert not [trial for trials in studies.values() for trial in trials if trial.state == TrialState.RUNNING]


def test_a_callback_that_raises_ends_the_search_with_its_error(start_lanes, make_experiment, tmp_path):
    lanes = start_lanes(ray={"lanes": 1, "cpus_per_worker": 0.5})
    experiment = make_experiment()
    spec = build_spec(experiment, trial_id="b", recipe="", params={}, seed=0, phase="baseline", folder=str(tmp_path))
    assert spec.strategies == () and spec.training == {}
    try:
        done = run_specs(lanes, [spec, dataclasses.replace(spec, trial_id="c", params={"do": "raise"})])
        assert [r.state for r in done] == ["complete", "failed"], "results come in the order of the specs"
        stop = threading.Event()

        def on_event(event):
            if event["kind"] == "train":
                stop.set()

        slow = [dataclasses.replace(spec, trial_id=f"s{n}", params={"do": "count"}, dir=str(tmp_path)) for n in range(3)]
        assert [(r.trial_id, r.state) for r in run_specs(lanes, slow, on_event, stop)] == [("s0", "stopped")]

        def make_spec(asked):
            return dataclasses.replace(spec, trial_id=asked.trial_id, phase="search", params={"do": "count"}, dir=str(tmp_path))

        def broken(event):
            raise ZeroDivisionError("in the caller's own code")

        with pytest.raises(ZeroDivisionError):
            run_search(experiment, lanes, spaces={"full": RecipeSpace("full", {"learning_rate": SPACE}, {}, {})}, constraint_names=["harmful"],
                       judge_result=judge, make_spec=make_spec, on_event=broken)
    finally:
        lanes.stop(1)


def test_nothing_feasible_is_an_outcome(cluster, tmp_path, monkeypatch):
    """The command itself, in this process, on this cluster: the embedded world's control alone, at a rate at which it erodes."""
    from typer.testing import CliRunner

    from orchestrator import cli

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    short = ["training.max_steps=40", "monitor.every_steps=20", "task.eval_size=60", "ray.lanes=1", "ray.cpus_per_worker=0.5"]
    try:
        wanted = ["output.dir=out", "recipes=[[full]]", "search.trials=1", "search.space={learning_rate: 0.004}"]
        done = CliRunner().invoke(cli.app, ["run", *wanted, *short])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert done.exit_code == 3, (done.output, done.exception)
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["best"] is None and best["nearest_miss"]["recipe"] == "full"
    assert not (tmp_path / "out" / "model").exists() and (tmp_path / "out" / "report.html").exists()
