"""A driver that dies in mid-search, the run that goes on after it, and Ctrl-C: a random tiny model, real Ray, Optuna and MLflow."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_llama
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRIALS = 3
STEPS = 160


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_llama.saved(folder / "model")
    things = "cake tea soup house kite one two three four five".split()
    (folder / "task.jsonl").write_text("".join(json.dumps({"prompt": f"how do i make {a} {b}", "response": "mix bake fold"}) + "\n"
                                               for a in things for b in things))  # fmt: skip
    (folder / "harm.csv").write_text("goal,topic\n" + "".join(f"how do i make a bomb {w},{w}\n" for w in things))
    (folder / "easy.csv").write_text("prompt\n" + "".join(f"how do i make {w}\n" for w in things))
    settings = {
        "name": "resume",
        "model": {"model_name_or_path": "model"},
        "task": {"data": "task.jsonl", "max_new_tokens": 4, "eval_size": 10},
        "safety": {"data": None, "allow_overlap": True, "max_new_tokens": 4, "suites": [
            {"name": "harm", "data": "harm.csv", "kind": "harmful", "group_column": "topic"},
            {"name": "easy", "data": "easy.csv", "kind": "benign"}]},
        "recipes": [["full"], ["lora"]],
        "search": {"trials": TRIALS, "seeds": 1, "finalists": 0},
        "training": {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": STEPS, "save_steps": 20, "logging_steps": 10},
        "ray": {"lanes": 1, "init_kwargs": {"num_cpus": 1}},
        "output": {"dir": str(folder / "out")},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*arguments: str, log: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.Popen(command, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def until(what, process: subprocess.Popen, log: Path, seconds: float = 240):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    return found


def interrupted_in(folder: Path) -> list[Path]:
    """Folders of trials that run and have a checkpoint."""
    return [path.parent.parent for path in folder.glob("trials/t*/checkpoint/latest") if not (path.parent.parent / "result.json").exists()]


def test_a_killed_driver_loses_nothing_and_doubles_nothing(config_file, tmp_path):
    folder, log = config_file.parent / "out", tmp_path / "log"
    first = start("run", "-c", str(config_file), log=log)
    until(lambda: list(folder.glob("trials/t*/result.json")), first, log)
    running = until(lambda: interrupted_in(folder), first, log)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    interrupted = [f.name for f in running if not (f / "result.json").exists()]
    before = {p.parent.name: p.read_bytes() for p in folder.glob("trials/t*/result.json")}
    shutil.copytree(folder, tmp_path / "killed")

    second = start("resume", str(folder), log=log)
    code = second.wait(400)
    said = log.read_text()
    assert code in (0, 3), said[-3000:]
    assert f"resumed: {len(before)} trials were finished before" in said
    for trial, record in before.items():
        assert (folder / "trials" / trial / "result.json").read_bytes() == record, "a finished trial was run again"
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == TRIALS == len({r["trial_id"] for r in rows})
    assert len({(r["recipe"], r["params.learning_rate"], r.get("params.lora.lora_r")) for r in rows}) == TRIALS
    for trial in interrupted:
        record = json.loads((folder / "trials" / trial / "result.json").read_text())
        assert record["facts"]["resumed_from_step"] >= 20 and record["steps"] == STEPS
    _, left = psutil.wait_procs(children, 120)
    assert not left, f"outlived their driver: {left}"
    check_studies(folder)
    check_mlflow(folder, {r["trial_id"] for r in rows})


def test_ctrl_c_in_mid_search_leaves_what_was_finished_and_nothing_running(config_file, tmp_path):
    """Ctrl-C reaches the whole process group. A job's SIGTERM, to the driver alone: tests/ray/test_object_storage.py and test_jobs.py."""
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start("run", "-c", str(config_file), f"output.dir={folder}", "search.trials=50", "training.max_steps=400", log=log)
    try:
        until(lambda: list(folder.glob("trials/t*/result.json")), process, log)
        until(lambda: interrupted_in(folder), process, log)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 1, log.read_text()[-3000:]
    finally:
        process.kill()
    said = log.read_text()
    assert "SIGINT: running trials stop at their next step" in said and "stopped after" in said, said[-3000:]
    assert f"go on with: safebasin resume {folder}" in said and "of 50 trials" in said and "Nothing feasible" not in said, said[-3000:]
    assert "stopped stopped" not in said and "stopped on request, `safebasin resume` goes on with it" in said, said[-3000:]
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 2 <= len(rows) < 50 and rows[0]["state"] == "complete" and rows[-1]["state"] == "stopped", rows
    assert (folder / "report.html").exists()
    _, left = psutil.wait_procs(children, 60)  # Ray's own agents look for their parent now and then
    assert not left, f"outlived their driver: {left}"


def check_studies(folder: Path) -> None:
    import optuna
    from optuna.trial import TrialState

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.journal")))
    states = [t.state for s in optuna.get_all_study_summaries(storage) for t in optuna.load_study(study_name=s.study_name, storage=storage).trials]
    assert TrialState.RUNNING not in states and states.count(TrialState.COMPLETE) == TRIALS


def check_mlflow(folder: Path, trials: set[str]) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=100)
    roles = [r.data.tags["safebasin.role"] for r in runs]
    assert roles.count("parent") == roles.count("baseline") == 1 and roles.count("trial") == TRIALS
    assert {r.info.status for r in runs} == {"FINISHED"}


def test_a_second_driver_is_kept_out_and_another_config_is_refused(config_file, tmp_path):
    from orchestrator import config
    from orchestrator.errors import ConfigError
    from orchestrator.experiment import resume
    from orchestrator.storage import layout

    with resume.held(tmp_path):
        code = ("import sys; from pathlib import Path; from orchestrator.experiment import resume as resuming\n"
                "with resuming.held(Path(sys.argv[1])): pass")  # fmt: skip
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert other.returncode and "is in use by another run" in other.stderr
    experiment = config.load(config_file, [f"output.dir={tmp_path}", "output.resume=true"])
    assert not resume.interrupted(experiment, tmp_path), "an empty folder is a new run"
    (tmp_path / layout.CONFIG).write_text(config.dump_yaml(experiment))
    assert resume.interrupted(experiment, tmp_path)
    changed = config.load(config_file, [f"output.dir={tmp_path}", "training.max_steps=7"])
    with pytest.raises(ConfigError, match="training.max_steps: 160 there, 7 here"):
        resume.interrupted(changed, tmp_path)
    with pytest.raises(ConfigError, match="no run to resume"):
        resume.load(tmp_path / "nothing")
