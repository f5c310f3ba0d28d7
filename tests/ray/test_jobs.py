"""`safebasin submit` against a real cluster head with token authentication, started and stopped here by pid."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import tiny_llama

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.verbs import submit

pytestmark = pytest.mark.timeout(900)
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """(address, environment of a client) of a cluster head of one CPU."""
    token = secrets.token_hex(32)
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {**client, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "RAY_worker_niceness": "0"}
    names = ("port", "dashboard-port", "node-manager-port", "object-manager-port", "metrics-export-port", "dashboard-agent-listen-port",
             "dashboard-agent-grpc-port", "runtime-env-agent-port")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    log = tmp_path_factory.mktemp("head") / "log"
    command = [str(BIN / "ray"), "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--num-cpus=1", "--disable-usage-stats",
               "--include-dashboard=true", f"--temp-dir=/tmp/sbj-{secrets.token_hex(3)}", *(f"--{k}={v}" for k, v in ports.items())]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        for _ in range(480):
            try:
                with urllib.request.urlopen(f"{address}/api/gcs_healthz", timeout=2):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
        yield address, client
    finally:  # `ray stop` by pid; Ray's own way down takes half a minute
        started = [process, *psutil.Process(process.pid).children(recursive=True)]
        for one in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(60)


class Client:
    """The command line and the job API of a head. Ray itself stays out of this process: it remembers the first token setting it sees."""

    def __init__(self, address: str, secret: dict[str, str]):
        self.address, self.secret = address, secret
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | secret

    def submit(self, config_file: Path, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "orchestrator", "submit", "-c", str(config_file), "--address", self.address, *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=500)

    def ray_submit(self, folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
        """As Ray's own documentation does it."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.address, "--submission-id", name, "--working-dir", str(folder), "--no-wait",
                   "--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}), "--", *arguments]  # fmt: skip
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=500)

    def ask(self, path: str, method: str = "GET") -> dict:
        request = urllib.request.Request(f"{self.address}/api/jobs/{path}", method=method)
        request.add_header("Authorization", f"Bearer {self.secret['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def status(self, job: str) -> str:
        return self.ask(job)["status"]

    def log(self, job: str) -> str:
        return self.ask(f"{job}/logs")["logs"]


@pytest.fixture
def client(head):
    return Client(*head)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    tiny_llama.saved(folder / "model")
    things = "cake tea soup house kite one two three four five".split()
    task = [{"prompt": f"how do i make {a} {b}", "response": "mix bake fold"} for a in things for b in things]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task))
    (folder / "harm.csv").write_text("goal,topic\n" + "".join(f"how do i make a bomb {w},{w}\n" for w in things))
    return config.from_dict({
        "name": "job", "model": {"model_name_or_path": str(folder / "model")},
        "task": {"data": str(folder / "task.jsonl"), "max_new_tokens": 4, "eval_size": 10},
        "safety": {"data": None, "max_new_tokens": 4, "limits": {"max_over_refusal_rise": None}, "suites": [
            {"name": "harm", "data": str(folder / "harm.csv"), "group_column": "topic"}]},
        "recipes": [["full"]], "search": {"trials": 3, "finalists": 0},
        "training": {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": 150, "save_steps": 20},
        "output": {"dir": str(folder / "out")},
    })  # fmt: skip


def table(experiment) -> list[dict[str, str]]:
    path = experiment.output_dir / "trials.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def test_a_job_is_stopped_and_goes_on_under_another_id(client, experiment, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(config.dump_yaml(experiment))
    first = client.submit(file, "--submission-id", "first")
    assert first.returncode == 0 and "job first was accepted" in first.stdout, first.stdout + first.stderr
    assert "uploading" in first.stdout, "how far the upload is; the second time Ray has the package"
    deadline = time.monotonic() + 300
    while not list(experiment.output_dir.glob("trials/t*/result.json")):
        assert time.monotonic() < deadline and client.status("first") in ("PENDING", "RUNNING"), client.log("first")[-3000:]
        time.sleep(0.2)
    client.ask("first/stop", "POST")
    while client.status("first") in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, client.log("first")[-3000:]
        time.sleep(0.2)
    assert "stopped after" in client.log("first"), "a stopped job writes its report:\n" + client.log("first")[-3000:]
    assert (experiment.output_dir / "report.html").exists()
    before = {p.parent.name: p.read_bytes() for p in experiment.output_dir.glob("trials/t*/result.json") if b'"cancelled"' not in p.read_bytes()}
    again = client.submit(file, "--submission-id", "first", "--follow")
    assert again.returncode == 2 and "used before" in again.stderr, again.stdout + again.stderr

    second = client.submit(file, "--submission-id", "second", "--follow")
    said = second.stdout
    assert second.returncode in (0, 3), said + second.stderr
    assert client.ask("second")["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "90", "a stopped job may write its report"
    assert f"resumed: {len(before)} trials were finished before" in said and "report:" in said
    rows = table(experiment)
    assert len(rows) == 3 == len({r["params.learning_rate"] for r in rows}) and {r["state"] for r in rows} == {"complete"}
    for trial, record in before.items():
        assert (experiment.output_dir / "trials" / trial / "result.json").read_bytes() == record


def test_rays_own_command_does_it_too(client, experiment, tmp_path):
    file = tmp_path / "job" / "job.yaml"
    file.parent.mkdir()
    file.write_text(config.dump_yaml(experiment))
    less = ["search.trials=1", "training.max_steps=1", f"output.dir={tmp_path}/out", "output.resume=true"]
    sent = client.ray_submit(file.parent, "plain", "safebasin", "run", "-c", "job.yaml", *less)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    deadline = time.monotonic() + 300
    while client.status("plain") in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, client.log("plain")[-3000:]
        time.sleep(0.2)
    assert "report:" in client.log("plain") and (tmp_path / "out" / "report.html").exists(), client.log("plain")[-3000:]


def test_a_job_server_refuses_strangers(head):
    address, secret = head
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=10)
    # a process of its own: Ray remembers the token it has seen
    stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-m", "orchestrator", "submit", "--address", address, "output.dir=/tmp/never"], env=stranger,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 1 and "RAY_AUTH_MODE=token" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and secret["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_what_goes_with_a_job(experiment, tmp_path):
    package = submit.stage(experiment, tmp_path)
    assert [Path(name).name for name in package.files] == ["00-task.jsonl", "01-harm.csv"]
    there = config.load(tmp_path / "experiment.yaml")
    assert there.task.data == str(tmp_path / package.files[0]) and there.output.resume and there.ray.address is None
    relative = experiment.model_copy(update={"output": experiment.output.model_copy(update={"dir": "outputs/x"})})
    with pytest.raises(ConfigError, match="vanish with the job"):
        submit.stage(relative, tmp_path)


def test_no_cluster_is_one_sentence(tmp_path):
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    (tmp_path / "job.yaml").write_text(f"output: {{dir: {tmp_path / 'out'}}}\n")
    done = Client(address, {}).submit(tmp_path / "job.yaml")
    assert done.returncode == 1 and "no Ray job server answers" in done.stderr and "Traceback" not in done.stderr
