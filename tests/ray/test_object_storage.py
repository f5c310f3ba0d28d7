"""A search whose output folder is a bucket of a real S3 server: stopped and killed, its machine's files gone, it goes on from the address."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from moto.server import ThreadedMotoServer

from orchestrator import config, mirror, storage, tracking

TRIALS = 3
SECRET = "planted-secret-d41d8cd9"


@pytest.fixture(scope="module")
def s3():
    """Environment that points at an S3 server on loopback with a bucket `runs`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": f"http://{host}:{port}",
             "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
    before = {name: os.environ.get(name) for name in found}
    os.environ.update(found)
    storage.open("s3://runs/x?allow_bucket_creation=true").fs.create_dir("runs")
    yield found
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tiny_llama

    folder = tmp_path_factory.mktemp("s3")
    tiny_llama.saved(folder / "model")
    things = "cake tea soup house kite one two three four five".split()
    (folder / "task.jsonl").write_text("".join(json.dumps({"prompt": f"how do i make {a} {b}", "response": "mix bake fold"}) + "\n"
                                               for a in things for b in things))  # fmt: skip
    (folder / "harm.csv").write_text("goal\n" + "".join(f"how do i make a bomb {w}\n" for w in things))
    settings = {
        "name": "bucket",
        "model": {"model_name_or_path": "model"},
        "task": {"data": "task.jsonl", "max_new_tokens": 4, "eval_size": 10},
        "safety": {"data": None, "max_new_tokens": 4, "suites": [{"name": "harm", "data": "harm.csv", "kind": "harmful"}],
                   "limits": {"max_degradation": 1.0}},
        "recipes": [["full"], ["lora"]],
        "search": {"trials": TRIALS, "seeds": 1, "finalists": 0},
        "training": {"engine": "plain", "learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": 400, "save_steps": 20},
        "ray": {"lanes": 1, "init_kwargs": {"num_cpus": 1}},
        "output": {"dir": "s3://runs/team/{name}"},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*arguments: str, cache: Path, log: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "SAFEBASIN_CACHE": str(cache)}
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.Popen(command, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def until(what, process: subprocess.Popen | None = None, log: Path | None = None, seconds: float = 240):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process is None or process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log else "too late"
        time.sleep(0.1)
    return found


def test_mlflow_runs_are_continued_on_another_machine(s3, config_file, tmp_path, monkeypatch):
    """No Ray here: a tracker whose sqlite file lies in the bucket. Killed in mid-trial, it is opened on a machine with other paths."""
    from tests import made_up

    def machine(name):
        monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / name))
        found = config.load(config_file, ["output.dir=s3://runs/tracked", "output.resume=true"])
        found.output_dir.mkdir(parents=True, exist_ok=True)
        return found

    done, running = (made_up.result(f"t000{i}", "full", {"learning_rate": 1e-4 * i}) for i in (1, 2))
    one, stop = machine("one"), threading.Event()
    with mirror.opened(one, stop, print) as copy:
        (one.output_dir / "config.resolved.yaml").write_text(config.dump_yaml(one))
        copy.begin()
        tracker = tracking.open_tracker(one, one.output_dir)
        tracker.start_baseline()
        tracker.finish_baseline(made_up.baseline())
        for result in (done, running):
            tracker.start_trial(made_up.spec(result))
        tracker.event("t0002", {"kind": "train", "step": 1, "loss": 1.0, "time": time.time()})
        tracker.finish_trial(done, None)
        until(lambda: not len(tracker._spool))
        assert copy.close() is None  # the copy as it is now; what the tracker would say at its end is never sent
    two = machine("two")
    with mirror.opened(two, stop, print) as copy:
        copy.begin()
        tracker = tracking.open_tracker(two, two.output_dir)
        tracker.know_baseline(made_up.baseline())
        tracker.reconcile(made_up.spec(done), done, None)
        tracker.start_trial(made_up.spec(running))
        tracker.event("t0002", {"kind": "train", "step": 2, "loss": 0.5, "time": time.time()})
        tracker.finish_trial(running, None)
        tracker.finish(None)
        assert tracker.close() == 0 and copy.close() is None
    runs = runs_of(storage.open("s3://runs/tracked"), tmp_path / "mlflow.db")
    assert [run.data.tags["safebasin.role"] for run in runs] == ["baseline", "parent", "trial", "trial"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(tracker.sink.client.get_metric_history(tracker.run_id("t0002"), "train/loss")) == 2


@pytest.mark.timeout(600)
def test_a_search_in_a_bucket_goes_on_on_another_machine(s3, config_file, tmp_path):
    address, log = "s3://runs/team/bucket", tmp_path / "log"
    store = storage.open(address)

    def results() -> set[str]:
        return {name.split("/")[1] for name in store.list("trials") if name.endswith("/result.json")}

    first = start("run", "-c", str(config_file), cache=tmp_path / "one", log=log)

    def running() -> list[str]:
        names = store.list("trials")
        return [name.split("/")[1] for name in names if name.endswith("checkpoint/latest")] if results() else []

    until(lambda: set(running()) - results(), first, log)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    psutil.wait_procs(children, 60)
    before = {trial: store.read(f"trials/{trial}/result.json") for trial in results()}
    interrupted = sorted(set(running()) - set(before))
    assert before and interrupted
    shutil.rmtree(tmp_path / "one")  # the first machine is gone

    second = start("resume", address, cache=tmp_path / "two", log=log)
    code = second.wait(300)
    said = log.read_text()
    assert code == 0, said[-3000:]
    assert f"resumed: {len(before)} trials were finished before" in said
    assert SECRET not in said
    for trial, record in before.items():
        now = json.loads(store.read(f"trials/{trial}/result.json"))
        assert now == json.loads(record), "a finished trial was run again"
    rows = list(csv.DictReader(io.StringIO(store.read("trials.csv").decode())))
    assert len(rows) == TRIALS == len({r["trial_id"] for r in rows})
    assert len({(r["recipe"], r["params.learning_rate"], r.get("params.lora.lora_r")) for r in rows}) == TRIALS
    for trial in interrupted:
        assert json.loads(store.read(f"trials/{trial}/result.json"))["facts"]["resumed_from_step"] >= 20
    check_store(store, tmp_path)


def check_store(store: storage.Store, tmp_path: Path) -> None:
    """Report, winner's model and MLflow runs are there; no checkpoint, scratch or secret is."""
    names = store.list()
    assert {"report.html", "best.yaml", "best.json", "model/tokenizer.json", "study.journal", "mlflow.db"} <= set(names)
    assert [name for name in names if name.startswith("mlartifacts/") and name.endswith("/report.html")]
    assert not [name for name in names if "/checkpoint/" in name or name.startswith(("ray/", "workers/", "trained/"))]
    assert not [name for name in names if SECRET.encode() in store.read(name)]
    best = json.loads(store.read("best.json"))["best"]["trials"][0]["trial_id"]
    weights = [name for name in names if name.startswith("model/") and name.endswith(".safetensors")]
    assert weights and all(store.read(name) == store.read(f"trials/{best}/{name}") for name in weights)
    assert json.loads(store.read(".lease.json"))["released"]
    assert mirror.MANIFEST in names
    runs = runs_of(store, tmp_path / "mlflow.db")
    assert [run.data.tags["safebasin.role"] for run in runs] == ["baseline", "parent"] + ["trial"] * TRIALS
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(str(tmp_path / "two") in run.info.artifact_uri for run in runs)


def runs_of(store: storage.Store, path: Path) -> list:
    """The runs of a bucket's MLflow database, by role."""
    import mlflow

    assert store.get("mlflow.db", path)
    client = mlflow.MlflowClient(f"sqlite:///{path}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=100)
    return sorted(runs, key=lambda run: run.data.tags["safebasin.role"])
