"""Real MLflow in a sqlite file. Knows no Ray. tests/ray/test_tracking_server.py has the real server."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

import made_up
import pytest
import servers

from orchestrator.decision import selection as decision_selection
from orchestrator.errors import TrackingError
from orchestrator.tracking import connect, mlflow
from orchestrator.tracking.tracker import NullTracker

SECRET = "hunter2hunter2"


@pytest.fixture(autouse=True)
def no_server_of_the_user(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A sqlite file with MLflow's tables, made once: the migrations take seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    experiment = made_up.experiment(folder)
    connect.open_tracker(experiment, folder / "out").close()
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path, template) -> Path:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    return tmp_path


def client_of(folder: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(client, experiment_name: str) -> dict:
    """Runs by safebasin trial id (the parent as "parent")."""
    found = client.get_experiment_by_name(experiment_name)
    return {run.data.tags.get("safebasin.trial_id", "parent"): run for run in client.search_runs([found.experiment_id], max_results=1000)}


def drive(tracker, before, rows) -> None:
    """What the driver does in a run."""
    tracker.start_baseline(made_up.spec(before))
    tracker.finish_baseline(before)
    for trial, judged in rows:
        tracker.start_trial(made_up.spec(trial))
        for event in trial.history:
            tracker.event(trial.trial_id, event)
        tracker.finish_trial(trial, judged)


def test_a_whole_run_in_sqlite(folder):
    experiment = made_up.experiment(folder, tracking={"experiment": "whole"})
    before, rows = made_up.trials(experiment.safety.limits)
    rows[0][0].history.append({"kind": "train", "time": 1.7e9, "step": 120, "loss": float("nan"), "grad_norm": float("inf")})
    out = experiment.output_dir
    tracker = connect.open_tracker(experiment, out, facts={"model_hash": "abc", "judge": {"base_url": f"http://u:{SECRET}@host", "api_key": SECRET}})
    drive(tracker, before, rows)
    selection = decision_selection.best(rows)
    assert selection.best is not None
    (out / "plot.png").write_bytes(b"\x89PNG")
    (out / "config.resolved.yaml").write_text(f"tracking:\n  uri: http://u:{SECRET}@host\nname: x\n")
    tracker.finish(selection, [out / "plot.png", out / "config.resolved.yaml", out / "not-there.csv"])
    assert tracker.close("FINISHED") == 0

    client = client_of(folder)
    runs = runs_of(client, "whole")
    parent = runs.pop("parent")
    assert set(runs) == {"baseline", *(trial.trial_id for trial, _ in rows)}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    for trial, judged in rows:
        run = runs[trial.trial_id]
        assert run.data.params == {"recipe": trial.recipe, "seed": str(trial.seed), **{k: str(v) for k, v in trial.params.items()}}
        assert run.data.tags["safebasin.verdict"] == judged.verdict and run.data.tags["safebasin.model_hash"] == "abc"
        assert run.data.tags["safebasin.baseline_run_id"] == runs["baseline"].info.run_id
        assert run.data.tags["safebasin.config_hash"] == experiment.digest()
        assert run.info.status == {"complete": "FINISHED", "failed": "FAILED"}[trial.state]
        assert run.info.end_time >= run.info.start_time
        losses = client.get_metric_history(run.info.run_id, "train/loss")
        wanted = [(e["step"], e["loss"]) for e in trial.history if e["kind"] == "train" and e["loss"] == e["loss"]]
        assert [(m.step, m.value) for m in sorted(losses, key=lambda m: m.step)] == wanted
        if judged.degradation is not None:
            assert run.data.metrics["safety_delta/degradation"] == pytest.approx(judged.degradation.value)
    assert runs["t0000"].data.tags["safebasin.not_finite"] == "train/grad_norm, train/loss"
    assert "safebasin.error" in runs["t0005"].data.tags and "task/score" not in runs["t0005"].data.metrics
    assert runs["baseline"].data.metrics["task/score"] == before.task.score

    best = selection.best.trials[0][0]
    assert parent.data.tags["safebasin.best_run_id"] == runs[best.trial_id].info.run_id
    assert best.trial_id in parent.data.tags["mlflow.note.content"] and parent.info.status == "FINISHED"
    assert parent.data.metrics["task/score"] == best.task.score
    inputs = parent.inputs.dataset_inputs
    assert {tag.value for i in inputs for tag in i.tags} == {
        "training",
        "safety suite harmful (harmful)",
        "safety suite borderline (benign)",
    }
    files = {f.path for f in client.list_artifacts(parent.info.run_id)} | {
        f.path for f in client.list_artifacts(parent.info.run_id, "plots")
    }
    assert files == {"config.yaml", "config.resolved.yaml", "plots", "plots/plot.png"}
    rejected = [json.loads(line) for line in (out / "tracking.spool.rejected.jsonl").read_text().splitlines()]
    assert ["not-there.csv" in r["reason"] for r in rejected] == [True]
    assert_no_secret(folder)
    view = f"http://127.0.0.1:5000/#/experiments/{parent.info.experiment_id}/runs?viewStateShareKey=safebasin-trials"
    assert tracker.ui_hint() == f"mlflow ui --backend-store-uri sqlite:///{folder / 'mlflow.db'}; then {view}"
    final = {m.key: m.step for m in client.get_metric_history(runs["t0000"].info.run_id, "task/score")}
    assert final == {"task/score": 0}, "one value at step 0 is drawn as a bar"
    assert not {"cost/lane", "cost/attempt", "task/exact_match"} & runs["t0000"].data.metrics.keys()
    assert parent.data.params["limits.max_degradation"] == "0.05" and "recipe" not in parent.data.params
    assert runs["baseline"].data.tags["mlflow.note.content"].startswith("The untouched model") and "**infeasible**" in "".join(
        run.data.tags["mlflow.note.content"] for run in runs.values()
    )


def test_every_filter_of_the_docs_finds_what_it_says_in_a_real_store(folder):
    experiment = made_up.experiment(folder, tracking={"experiment": "filters"}, recipes=[["safegrad"], ["full"]])
    before, rows = made_up.trials(experiment.safety.limits)
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    drive(tracker, before, rows)
    selection = decision_selection.best(rows)
    tracker.finish(selection)
    assert tracker.close() == 0
    client = client_of(folder)
    number = client.get_experiment_by_name("filters").experiment_id
    page = (Path(__file__).parents[2] / "docs" / "mlflow.md").read_text()
    told = dict(re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", page.split("| you want | filter |")[1].split("\n## ")[0], re.MULTILINE))

    def found(what: str) -> set[str]:
        return {run.data.tags.get("safebasin.trial_id", "parent") for run in client.search_runs([number], told.pop(what), max_results=1000)}

    ended = {r.trial_id for r, _ in rows if r.state == "complete"}
    assert found("trials that ended") == ended
    assert found("trials that keep every limit") == {r.trial_id for r, j in rows if j.verdict == "feasible"} != set()
    assert found("the model that was handed over") == {selection.best.trials[0][0].trial_id}
    assert found("one recipe") == {r.trial_id for r, _ in rows if r.recipe == "safegrad"} != set()
    assert found("finalists on further seeds") == {r.trial_id for r, _ in rows if r.phase == "confirm"} != set()
    assert found("trials with a warning that no limit holds") == set(), "both suites are held by a limit"
    rose = {r.trial_id for r, j in rows if r.suites and j.degradation.value > 0.05}
    assert found("a rise on one suite, whether a limit holds it or not") - {"parent"} == rose != set()
    assert found("trials near to their limits, or beyond") >= {r.trial_id for r, j in rows if j.verdict != "feasible"} != set()
    assert found("searches, without their trials") == {"parent"} and not told, f"not tried: {told}"


def test_the_saved_view_asks_for_what_is_there_and_is_made_once(folder):
    experiment = made_up.experiment(folder, tracking={"experiment": "view"})
    before, rows = made_up.trials(experiment.safety.limits)
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    drive(tracker, before, rows)
    tracker.close()
    client = client_of(folder)
    made = client.get_experiment_by_name("view")
    text = made.tags["mlflow.sharedViewState.safebasin-trials"]
    envelope = json.loads(text)
    assert envelope["name"] == "safebasin: trials" and isinstance(envelope["createdAt"], int) and len(text) <= 5000, "MLflow cuts longer tags off"
    state = json.loads(envelope["state"])
    trials = client.search_runs([made.experiment_id], state["searchFilter"], order_by=[f"{state['orderByKey']} DESC"], max_results=1000)
    assert {run.data.tags["safebasin.trial_id"] for run in trials} == {r.trial_id for r, _ in rows}
    scores = [run.data.metrics.get("task/score", -1.0) for run in trials]
    assert scores == sorted(scores, reverse=True)
    there = {"metrics": set(), "params": set(), "tags": set()}
    for run in trials:
        for group, names in there.items():
            names.update(getattr(run.data, group))
    for column in state["selectedColumns"]:
        group, name = re.fullmatch(r"(\w+)\.`(.+)`", column).groups()
        assert name in there[group], column
    charted = set()
    for card in state["compareRunCharts"]:
        axes = [card[axis]["key"] for axis in ("xaxis", "yaxis") if axis in card]
        charted.update(card.get("selectedMetrics", ()), axes, [card[key] for key in ("metricKey",) if key in card])
    assert charted <= there["metrics"] and "mlflow.note.content" in made.tags

    client.set_experiment_tag(made.experiment_id, "mlflow.sharedViewState.safebasin-trials", "mine")
    connect.open_tracker(experiment, experiment.output_dir).close()
    assert client.get_experiment_by_name("view").tags["mlflow.sharedViewState.safebasin-trials"] == "mine", "what somebody changed stays"


def assert_no_secret(folder: Path) -> None:
    """Nothing MLflow or the queue keeps holds the password: neither the database nor artifacts nor our own files."""
    places = [folder / "mlflow.db", *(folder / "mlartifacts").rglob("*"), *(folder / "out").glob("tracking.*")]
    for path in places:
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_resumed_run_continues_its_runs(folder):
    experiment = made_up.experiment(folder, tracking={"experiment": "resumed"})
    before, rows = made_up.trials(experiment.safety.limits, count=3, good=False)
    (first, judged), out = rows[0], experiment.output_dir
    tracker = connect.open_tracker(experiment, out)
    tracker.start_baseline()
    tracker.finish_baseline(before)
    tracker.start_trial(made_up.spec(first))
    tracker.event(first.trial_id, first.history[0])
    tracker.close("KILLED")  # the driver is interrupted in the middle of t0000
    client = client_of(folder)
    assert {key: run.info.status for key, run in runs_of(client, "resumed").items()} == {
        "parent": "KILLED", "t0000": "KILLED", "baseline": "FINISHED",
    }  # fmt: skip
    tracker = connect.open_tracker(experiment, out)
    tracker.start_trial(made_up.spec(first, attempt=1))
    for event in first.history:
        tracker.event(first.trial_id, event)
    tracker.finish_trial(first, judged)
    tracker.start_trial(made_up.spec(rows[1][0]))
    tracker.finish_trial(*rows[1])
    tracker.close("FINISHED")
    runs = runs_of(client, "resumed")
    assert set(runs) == {"parent", "baseline", "t0000", "t0001"} and len(runs) == 4
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["t0000"].data.tags["safebasin.attempt"] == "1"
    losses = client.get_metric_history(runs["t0000"].info.run_id, "train/loss")
    assert len(losses) == 12, "the event that was sent twice is there once"


def test_the_same_records_again_change_nothing(folder):
    """At-least-once delivery: a crash between sending and forgetting sends a window twice."""
    experiment = made_up.experiment(folder, tracking={"experiment": "twice"})
    before, rows = made_up.trials(experiment.safety.limits, count=2, good=False)
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    sent = []
    deliver = tracker._pump.send
    tracker._pump.send = lambda records: (sent.extend(records), deliver(records))
    drive(tracker, before, rows)
    tracker.close()
    client = client_of(folder)

    def picture():
        return {
            key: (run.data.params, run.data.metrics, run.data.tags, run.info.status, run.info.end_time,
                  [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")])
            for key, run in runs_of(client, "twice").items()
        }  # fmt: skip

    once = picture()
    tracker.sink.runs = {"parent": tracker.sink.runs["parent"]}  # as after a crash before tracking.json was written
    deliver(sent)
    assert picture() == once


def test_limits_of_mlflow_are_kept(folder):
    experiment = made_up.experiment(folder, tracking={"experiment": "limits"})
    trial = made_up.result("t0000", "lora", {f"p{i}": "x" * 7000 for i in range(150)})
    trial.error = "e" * 20_000
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    tracker.start_trial(made_up.spec(trial))
    for step in range(3000):
        tracker.event("t0000", {"kind": "train", "step": step, "time": step / 1000, "loss": 1.0})
    tracker.finish_trial(trial, None)
    assert tracker.close() == 0
    assert not (experiment.output_dir / "tracking.spool.rejected.jsonl").exists()
    client = client_of(folder)
    run = runs_of(client, "limits")["t0000"]
    assert len(run.data.params) == 152 and len(run.data.params["p7"]) == 6000
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 3000


def test_a_deleted_experiment_is_explained(folder):
    experiment = made_up.experiment(folder, tracking={"experiment": "deleted"})
    connect.open_tracker(experiment, experiment.output_dir).close()
    client = client_of(folder)
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        connect.open_tracker(experiment, experiment.output_dir)


def test_a_server_that_is_not_there_is_an_error_at_the_start(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://u:{SECRET}@127.0.0.1:{servers.free_port()}")
    experiment = made_up.experiment(folder)
    begin = time.monotonic()
    with pytest.raises(TrackingError, match=r"MLFLOW_TRACKING_URI") as caught:
        connect.open_tracker(experiment, experiment.output_dir)
    assert time.monotonic() - begin < 20
    assert SECRET not in str(caught.value) and "tracking.enabled=false" in str(caught.value)
    with pytest.raises(mlflow.Trouble) as outage:  # what the sending thread would say of it in the log
        mlflow.Sink(os.environ["MLFLOW_TRACKING_URI"], folder).alive()
    assert SECRET not in str(outage.value)


def test_a_server_that_never_answers_is_an_error_at_the_start(folder, monkeypatch):
    """A port that takes the connection and says nothing, as a wrong address behind a load balancer does."""
    assert int(mlflow._CLIENT_SETTINGS["MLFLOW_HTTP_REQUEST_TIMEOUT"]) < 20, "no retry, within the promise"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # the user's own setting wins
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        experiment = made_up.experiment(folder, tracking={"uri": f"http://127.0.0.1:{listener.getsockname()[1]}"})
        begin = time.monotonic()
        with pytest.raises(TrackingError, match=r"tracking\.uri"):
            connect.open_tracker(experiment, experiment.output_dir)
        assert time.monotonic() - begin < 12


def test_tracking_off_writes_nothing(tmp_path):
    experiment = made_up.experiment(tmp_path, tracking={"enabled": False})
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    assert isinstance(tracker, NullTracker)
    before, rows = made_up.trials(experiment.safety.limits, count=2, good=False)
    drive(tracker, before, rows)
    tracker.finish(decision_selection.best(rows), [])
    assert tracker.close("FINISHED") == 0 and not experiment.output_dir.exists() and not (tmp_path / "mlflow.db").exists()


def test_both_trackers_take_the_same_calls():
    import inspect

    from orchestrator.tracking.tracker import Tracker

    for name, method in inspect.getmembers(NullTracker, inspect.isfunction):
        assert inspect.signature(method) == inspect.signature(getattr(Tracker, name)), name


def test_a_run_that_a_slow_server_makes_twice_is_there_once(folder, monkeypatch):
    """The answer to `create` is lost and the first run only seen after the second was made, as behind a proxy that gives up early."""
    experiment = made_up.experiment(folder, tracking={"experiment": "slow"})
    _, rows = made_up.trials(experiment.safety.limits, count=1, good=False)
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    make, see, lost = tracker.sink._make, tracker.sink._made, []

    def lose_the_answer(record, tags):
        run = make(record, tags)
        if not lost:
            lost.append(run)
            raise ConnectionError("read timed out")
        return run

    monkeypatch.setattr(tracker.sink, "_make", lose_the_answer)
    monkeypatch.setattr(tracker.sink, "_made", lambda key: [run for run in see(key) if run not in lost or tracker.sink.runs.get(key)])
    drive(tracker, made_up.baseline(), rows)
    assert tracker.close() == 0 and len(lost) == 1
    client = client_of(folder)
    found = client.get_experiment_by_name("slow")
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 3 and lost[0] not in {run.info.run_id for run in runs} and {run.info.status for run in runs} == {"FINISHED"}


def test_a_driver_that_died_before_it_knew_its_run_finds_it_again(folder):
    experiment = made_up.experiment(folder, tracking={"experiment": "died"})
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    tracker.close("KILLED")
    state = experiment.output_dir / "tracking.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps(known | {"runs": {}}))  # as written just before the run was made
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    tracker.close("FINISHED")
    assert json.loads(state.read_text())["runs"] == known["runs"]
    assert {run.info.run_id for run in client_of(folder).search_runs([known["experiment_id"]])} == set(known["runs"].values())


def test_a_release_is_registered_once_and_the_alias_points_to_it(folder):
    from orchestrator.models import contents
    from orchestrator.tracking.connect import Release

    experiment = made_up.experiment(folder, tracking={"experiment": "releases"})
    client = client_of(folder)

    def model(name: str, weights: bytes) -> Path:
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(weights)
        return folder / name

    def release(where: Path) -> str:
        evidence = folder / "evidence.json"
        evidence.write_text(json.dumps({"of": where.name}))
        return connect.release(experiment, folder / "out", Release("bot", where, evidence, contents.digest(contents.of(where))))

    def at() -> int:
        return int(client.get_model_version_by_alias("bot", connect.SAFE_BEST).version)

    one, other = model("one", b"1"), model("two", b"2")
    assert "version 1 of bot registered" in release(one)
    found = client.get_model_version_by_alias("bot", connect.SAFE_BEST)
    assert (Path(found.source.removeprefix("file://")) / "model.safetensors").read_bytes() == b"1"
    assert {f.path for f in client.list_artifacts(found.run_id)} == {"model", "evidence.json"}
    assert "version 2 of bot registered" in release(other) and at() == 2
    assert "version 1 of bot was registered before" in release(one), "the same files are the same version"
    assert at() == 1 and len(client.search_model_versions("name='bot'")) == 2
    changed = Release("bot", other, folder / "evidence.json", "0" * 64)
    with pytest.raises(TrackingError, match="was changed since it was checked"):
        connect.release(experiment, folder / "out", changed)
    assert at() == 1
