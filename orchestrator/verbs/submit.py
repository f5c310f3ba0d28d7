"""Hand an experiment to a Ray cluster as a job: its files uploaded, its logs followed, its exit code returned.

The job runs `safebasin run` with `output.resume=true`: submitted again after a stop, it goes on with what its output folder holds.
Authentication is Ray's own: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN (or ~/.ray/auth_token), on this side and on the cluster.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import config, texts
from orchestrator.config import Experiment
from orchestrator.errors import ConfigError, LaneError
from orchestrator.storage import paths
from orchestrator.terminal import screen

MAX_BYTES = 200 << 20
"""Of uploaded files together; Ray's own limit is near, and a model belongs on a hub or on shared storage."""
FILES = "files"
STOP_SECONDS = "90"
CONNECT_S, ANSWER_S = 10.0, 300.0
"""Seconds a job server may take to accept a connection, and to answer."""


@dataclass(frozen=True)
class Package:
    """A folder ready to be uploaded."""

    folder: Path
    files: tuple[str, ...]
    bytes: int


def stage(experiment: Experiment, folder: Path) -> Package:
    """Write the experiment as `experiment.yaml` into `folder`, with every local file it names beside it.

    Folders (models) are left as they are named and must be on storage that every node sees. Raises ConfigError for too many bytes, and
    for an output folder that would vanish with the job.
    """
    if not Path(experiment.output.dir).is_absolute() and "://" not in experiment.output.dir:
        raise ConfigError(
            f"output.dir={experiment.output.dir!r} is relative: on the cluster it would vanish with the job; "
            "give an absolute path on storage that every node sees, e.g. output.dir=/shared/{name}"
        )
    raw = experiment.model_dump(mode="json")
    raw["output"] |= {"resume": not experiment.output.overwrite}
    raw["ray"]["address"] = None  # a job is told its cluster by RAY_ADDRESS
    names: dict[str, str] = {}
    for holder, key in _places(raw):
        holder[key] = _staged(str(holder[key]), folder, names)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ConfigError(
            f"the files of this experiment are {size >> 20} MiB, at most {MAX_BYTES >> 20} are uploaded; put data on shared storage or a hub"
        )
    (folder / "experiment.yaml").write_text(config.dump_yaml(config.from_dict(raw)), encoding="utf-8")
    return Package(folder, tuple(names.values()), size)


def _places(raw: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """(mapping, key) of every value that may name a local path."""
    found = [(raw["model"], "model_name_or_path"), (raw["model"], "unaligned_name_or_path"), (raw["model"], "chat_template")]
    found += [(raw["task"], "data"), (raw["task"], "eval_data"), (raw["safety"], "data"), (raw["safety"], "harmful_data")]
    found += [(suite, "data") for suite in raw["safety"]["suites"]]
    return [(holder, key) for holder, key in found if holder.get(key)]


def _staged(value: str, folder: Path, names: dict[str, str]) -> str:
    if value == "pocket" or value.startswith("pocket:"):
        return value
    path = Path(value)
    if not paths.is_file(path):  # a hub id or data set name; a model's folder must be on storage that every node sees
        return value
    if value not in names:
        names[value] = f"{FILES}/{len(names):02d}-{path.name}"
        (folder / FILES).mkdir(exist_ok=True)
        shutil.copy2(path, folder / names[value])
    return names[value]


def submit(
    experiment: Experiment, *, address: str | None = None, submission_id: str | None = None, follow: bool = False, console: Any = None,
    shared_paths: bool = False,
) -> int:  # fmt: skip
    """Submit; returns the exit code: 0 when it was accepted, or with `follow` that of the job (1 where it was stopped or lost).

    The same `submission_id` never runs twice: where a job of that name exists it is only followed, or ConfigError says how it ended.
    `shared_paths`: nothing is uploaded and every path is taken to exist on the cluster. Raises LaneError where the cluster does not
    answer or refuses us.
    """
    console = console or screen.console()
    client = _client(address, console)
    known = _known(client, submission_id)
    if known is not None:
        if known.status.is_terminal() or not follow:
            raise ConfigError(f"submission id {submission_id!r} was used before and its job is {known.status}; {_remedy(known)}")
        screen.say(console, f"job {submission_id} is {known.status} already; following it")
    else:
        with _answering(f"the job could not be sent to {address or 'RAY_ADDRESS'}", "look with `ray job list` whether it is there, then try again"):
            submission_id = _send(client, experiment, submission_id, console, shared_paths)
    if not follow:
        screen.say(console, f"ray job logs --follow {submission_id} shows its log, ray job stop {submission_id} ends it cleanly")
        return 0
    return _follow(client, submission_id)


def _remedy(details: Any) -> str:
    if details.status.is_terminal():
        return "give another id: the run goes on from its output folder"
    return "add --follow to see its log"


def _client(address: str | None, console: Any) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Shown(JobSubmissionClient):
        """Shows how far an upload is."""

        def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None, **options: Any):
            options.setdefault("timeout", (CONNECT_S, ANSWER_S))  # Ray itself would wait for ever
            if not data:
                return super()._do_request(method, endpoint, data=data, **options)
            import io

            with screen.upload(console, io.BytesIO(data), len(data), "uploading") as body:
                return super()._do_request(method, endpoint, data=body, **options)

    try:
        return Shown(address)
    except AuthenticationError as error:
        raise LaneError(f"the Ray cluster at {address or 'RAY_ADDRESS'} refused us: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
                        f"(or ~/.ray/auth_token) to its token ({_first_line(error)})") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise LaneError(
            f"no Ray job server answers at {address or 'RAY_ADDRESS'}: {_first_line(error)}; give --address http://HEAD:8265 "
            "(for Kubernetes after `kubectl port-forward svc/<name>-head-svc 8265`)"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _known(client: Any, submission_id: str | None) -> Any | None:
    if submission_id is None:
        return None
    with _answering("the list of jobs could not be read", "try again"):
        return next((job for job in client.list_jobs() if job.submission_id == submission_id), None)


@contextlib.contextmanager
def _answering(what: str, remedy: str) -> Iterator[None]:
    """Errors of the job server as LaneError."""
    from aiohttp import ClientError

    try:
        yield
    except BrokenPipeError:  # of our own stdout
        raise
    except (OSError, RuntimeError, ClientError) as error:
        raise LaneError(f"{what}: {_first_line(error)}; {remedy}") from error


def _send(client: Any, experiment: Experiment, submission_id: str | None, console: Any, shared_paths: bool) -> str:
    with tempfile.TemporaryDirectory(prefix="safebasin-job-") as temporary:
        folder = Path(temporary)
        if shared_paths:
            raw = experiment.model_dump(mode="json")
            raw["output"]["resume"], raw["ray"]["address"] = not experiment.output.overwrite, None
            (folder / "experiment.yaml").write_text(config.dump_yaml(config.from_dict(raw)), encoding="utf-8")
        else:
            package = stage(experiment, folder)
            screen.say(console, f"{len(package.files)} file(s), {package.bytes / 1024:.0f} KiB, go with the job")
        model = Path(experiment.model.model_name_or_path)
        if paths.is_folder(model):
            screen.say(console, f"the model folder {model} is not uploaded: every node must see it", style="yellow")
        job = _accepted(
            client, entrypoint="safebasin run -c experiment.yaml", submission_id=submission_id,
            # Ray kills a stopped job after 3 s; the report and the last records for MLflow take longer
            runtime_env={"working_dir": str(folder), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS}},
            metadata={"safebasin.experiment": experiment.name, "safebasin.config_hash": experiment.digest()},
        )  # fmt: skip
    screen.say(console, f"job {job} was accepted; output: {experiment.output_place}")
    return job


def _accepted(client: Any, **job: Any) -> str:
    """Submit; a head that has just come up has no agent for jobs yet, and is asked again for a minute. Raises LaneError."""
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

    def early(error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and "head node agent" in str(error)

    try:
        for attempt in Retrying(retry=retry_if_exception(early), stop=stop_after_delay(60), wait=wait_fixed(2), reraise=True):
            with attempt:
                return client.submit_job(**job)
    except RuntimeError as error:
        raise LaneError(f"the cluster did not take the job: {_first_line(error)}") from error
    raise AssertionError("unreachable: Retrying ends with a return or an exception")


def _follow(client: Any, job: str) -> int:
    """Print the job's log as it comes; its exit code."""
    import asyncio
    import time

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(texts.clean(lines), end="", flush=True)

    again = f"the job itself goes on: `safebasin submit --submission-id {job} --follow` with the same config shows it again"
    with _answering(f"the log of job {job} broke off", again):
        asyncio.run(tail())
        details = client.get_job_info(job)
        while not details.status.is_terminal():
            time.sleep(0.5)
            details = client.get_job_info(job)
    code = details.driver_exit_code
    if code in (None, -15, 143) or str(details.status) == "STOPPED":
        print(json.dumps({"job": job, "status": str(details.status), "message": details.message}))
        return 1
    return int(code) if code >= 0 else 1
