"""What KubeRay does to our entry point: it submits it again. A dashboard of ours keeps the jobs; Ray's client and the command are real.

A head that is lost takes its dashboard's memory with it: the new one knows no job, so the submitter submits the same id again; and a RayJob that is
deleted and applied again submits under another id. Both must go on with what lies on the results volume.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_llama
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

K8S = Path(__file__).parents[2] / "k8s"
TRIALS = 3


class Head:
    """A head with a dashboard: the jobs it was given, each a process. `lose` kills the driver as a lost pod does and forgets all jobs."""

    def __init__(self, environment: dict[str, str], log: Path):
        self.jobs: dict[str, subprocess.Popen] = {}
        self.environment, self.log = environment, log

    def submit(self, job: str, command: str) -> bool:
        if job in self.jobs:
            return False
        self.jobs[job] = subprocess.Popen(
            shlex.split(command), stdout=self.log.open("a"), stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
        )
        return True

    def status(self, job: str) -> str | None:
        if job not in self.jobs:
            return None
        code = self.jobs[job].poll()
        return "RUNNING" if code is None else "SUCCEEDED" if code == 0 else "FAILED"

    def lose(self) -> None:
        for process in self.jobs.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)
        self.jobs.clear()


def handler(head: Head) -> type[BaseHTTPRequestHandler]:
    """The part of the dashboard's HTTP API that `ray job status` and `ray job submit` use."""

    class Dashboard(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Silent."""

        def answer(self, code: int, body: object) -> None:
            data = json.dumps(body).encode() if not isinstance(body, str) else body.encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path == "/api/version":
                import ray

                return self.answer(200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "fake"})
            job = self.path.removeprefix("/api/jobs/")
            status = head.status(job)
            if status is None:
                return self.answer(404, f"Job {job} does not exist")
            return self.answer(200, {"type": "SUBMISSION", "submission_id": job, "status": status, "entrypoint": "", "job_id": None})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not head.submit(request["submission_id"], request["entrypoint"]):
                return self.answer(500, "Please use a different submission_id")
            return self.answer(200, {"job_id": request["submission_id"], "submission_id": request["submission_id"]})

    return Dashboard


@contextmanager
def serving(head: Head):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(head))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        head.lose()
        server.shutdown()
        server.server_close()


def submitter(address: str, job: str, command: str) -> bool:
    """KubeRay's submitter: ask for the job, submit it where nobody knows it. Whether it submitted."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    try:
        client.get_job_status(job)
        return False
    except RuntimeError as error:
        assert "404" in str(error), error
    assert client.submit_job(entrypoint=command, submission_id=job) == job
    return True


def experiment(folder: Path) -> Path:
    tiny_llama.saved(folder / "model")
    things = "cake tea soup house kite one two three".split()
    rows = [json.dumps({"prompt": f"how do i make {a} {b}", "response": "mix bake fold"}) for a in things for b in things]
    (folder / "task.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "harm.csv").write_text("goal,topic\n" + "".join(f"how do i make a bomb {w},{w}\n" for w in things))
    settings = {
        "name": "twice",
        "model": {"model_name_or_path": str(folder / "model")},
        "task": {"data": str(folder / "task.jsonl"), "max_new_tokens": 4, "eval_size": 10},
        "safety": {"data": None, "allow_overlap": True, "max_new_tokens": 4,
                   "suites": [{"name": "harm", "data": str(folder / "harm.csv"), "kind": "harmful", "group_column": "topic"}]},
        "recipes": [["full"]],
        "search": {"trials": TRIALS, "seeds": 1, "finalists": 0},
        "training": {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": 60, "save_steps": 10, "logging_steps": 10},
        "ray": {"lanes": 1, "init_kwargs": {"num_cpus": 1}},
        "output": {"dir": "${SAFEBASIN_RESULTS}/twice"},
    }  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def until(what, log: Path, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    return found


def finished(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("trials/t*/result.json")}


def test_the_entry_point_goes_on_however_often_it_is_submitted(tmp_path):
    (job,) = yaml.safe_load_all((K8S / "base" / "rayjob.yaml").read_text())
    program, *arguments = job["spec"]["entrypoint"].split()
    assert program == "safebasin"
    here = [str(experiment(tmp_path)) if argument == "/etc/safebasin/experiment.yaml" else argument for argument in arguments]
    command = shlex.join([sys.executable, "-m", "orchestrator", *here])
    results, log = tmp_path / "results", tmp_path / "log"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    head = Head(clean | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "SAFEBASIN_RESULTS": str(results)}, log)
    folder = results / "twice"
    with serving(head) as address:
        assert submitter(address, "first", command)
        until(lambda: finished(folder) or head.status("first") != "RUNNING", log)
        assert not submitter(address, "first", command), "a submitter that is made again follows the job that runs"
        before = finished(folder)
        assert 0 < len(before) < TRIALS and head.status("first") == "RUNNING", log.read_text()[-3000:]
        head.lose()

        assert submitter(address, "first", command), "the new head knows no job"
        until(lambda: head.status("first") != "RUNNING", log)
        assert head.status("first") == "SUCCEEDED", log.read_text()[-3000:]
        after = finished(folder)
        assert len(after) == TRIALS and {trial: after[trial] for trial in before} == before, "finished trials are not run again"
        assert f"resumed: {len(before)} trials were finished before" in log.read_text()

        assert submitter(address, "applied-again", command), "a RayJob that was deleted and applied again is another job"
        until(lambda: head.status("applied-again") != "RUNNING", log)
        assert head.status("applied-again") == "SUCCEEDED", log.read_text()[-3000:]
        assert finished(folder) == after
