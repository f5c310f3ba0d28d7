"""Puts the driver's records into MLflow: what is sent twice is there once, what is refused for good is told from a server that is away."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import redaction
from orchestrator.errors import StorageError, TrackingError
from orchestrator.models import contents
from orchestrator.storage import files
from orchestrator.tracking.records import PARENT
from orchestrator.tracking.spool import Away, Later, Record, Rejected
from orchestrator.trial import record_check
from orchestrator.trial.record_check import BadRecord

log = logging.getLogger(__name__)

CHUNK = {"metrics": 900, "params": 40, "tags": 40}
"""Entries per `log_batch`: MLflow takes 1000 metrics, 100 params, 100 tags and 1 MB at a time."""
_REFUSALS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "NOT_IMPLEMENTED", "ALREADY_EXISTS",
}  # fmt: skip
"""What no second try changes. Not BAD_REQUEST and NOT_FOUND: MLflow says the first of a database that is restarting, and proxies say both."""
_REFUSED_FILE = {400, 405, 411, 413, 414, 415, 422}
"""HTTP answers to an upload that no second try changes. Not 401 and 403: MLflow's basic auth says them while its database is away."""
_AWAY = re.compile(
    r"database (table |schema )?is locked|database or disk is full|disk I/O error|readonly database|unable to open database file|"
    r"No space left on device|Disk quota exceeded|Read-only file system|QueuePool limit|the database system is",
    re.IGNORECASE,
)  # fmt: skip
"""What a database says that can take nothing now, though it may still be read."""
_NOISY = ("mlflow.store", "sqlalchemy", "alembic")
"""Loggers that print tracebacks of what is raised as well, and said by us."""
_TEXT_SUFFIXES = {".yaml", ".yml", ".json", ".md", ".txt", ".csv", ".jsonl", ".html", ".log"}
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens its view of training runs, not of traces
_CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for each trial, with the password of an address that has one
    # MLflow's own defaults wait minutes for a server that is away: 7 retries of 120 s. No retry inside the client: it repeats POSTs, and a run
    # that a slow server makes twice is there twice. The spool tries again, and looks first.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


class Trouble(Exception):
    """An error of MLflow whose own text holds a secret."""

    def __init__(self, text: str, error_code: str | None):
        super().__init__(text)
        self.error_code = error_code


class Sink:
    """Puts records into MLflow. Used by one thread at a time. Raises Rejected for what the server will never take."""

    def __init__(self, uri: str, output_dir: Path):
        for name, value in _CLIENT_SETTINGS.items():
            os.environ.setdefault(name, value)
        self.uri, self.state_path = uri, output_dir / "tracking.json"
        self.experiment_id = ""
        self.key = ""
        self.runs: dict[str, str] = {}
        self._unwritten = False
        self._unsure: set[str] = set()  # runs whose making was not answered, or answered late: a second one may come to be
        with _quiet():
            from mlflow import MlflowClient

            if uri.startswith("sqlite:///"):
                Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self._new_client = lambda: MlflowClient(tracking_uri=uri)
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The MlflowClient; made at first use, which for sqlite creates the tables (one process at a time)."""
        if self._client is None:
            with _quiet(), self._migration_lock():
                self._client = self._new_client()
                self._client.search_experiments(max_results=1)
        return self._client

    def _migration_lock(self) -> contextlib.AbstractContextManager[Any]:
        if not self.uri.startswith("sqlite:///") or self.uri == "sqlite:///:memory:":
            return contextlib.nullcontext()
        from filelock import FileLock

        return FileLock(self.uri.removeprefix("sqlite:///") + ".lock", timeout=120)

    def alive(self) -> None:
        """Raises where the server does not answer. Asked twice: after an answer of 500 a server closes the connection, and whoever is quick
        still sends the next request on it."""
        from mlflow.exceptions import MlflowException

        with _refusals():
            try:
                self.client.search_experiments(max_results=1)
            except MlflowException:
                self.client.search_experiments(max_results=1)

    def find_experiment(self, name: str) -> None:
        """Make the experiment, or find it. Raises TrackingError where it was deleted."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            place = (
                f"file://{Path(self.uri.removeprefix('sqlite:///')).parent / 'mlartifacts'}" if self.uri.startswith("sqlite:///") else None
            )
            try:
                self.experiment_id = self.client.create_experiment(name, artifact_location=place, tags=_EXPERIMENT_TAGS)
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)  # another driver made it a moment ago
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"the MLflow experiment {name!r} was deleted; restore it with `mlflow experiments restore -x {found.experiment_id}` "
                "or set tracking.experiment to another name"
            )
        self.experiment_id = found.experiment_id

    def describe(self, tags: Mapping[str, str]) -> None:
        """Tags of the experiment, each only where it is not there: what somebody wrote or changed stays."""
        there = self.client.get_experiment(self.experiment_id).tags
        for name in tags.keys() - there.keys():
            self.client.set_experiment_tag(self.experiment_id, name, tags[name])

    def known_runs(self) -> dict[str, str]:
        """Run ids of an earlier process on this folder, where its parent run still exists on this server; otherwise none.

        Also settles the key by which the parent is found where that process died before it had the run's id.
        """
        from mlflow.exceptions import MlflowException

        try:
            state = record_check.guarded(self.state_path, _wrong_state) or {}
        except BadRecord as error:
            log.warning("%s; it was moved to %s, and MLflow gets new runs", error, record_check.move_aside(self.state_path).name)
            state = {}
        if state.get("uri") != redaction.redact_uri(self.uri) or state.get("experiment_id") != self.experiment_id:
            state = {}
        self.key, unanswered = state.get("key", ""), bool(state.get("key")) and PARENT not in state.get("runs", {})
        if unanswered:
            self._unsure.add(PARENT)
        if PARENT not in state.get("runs", {}):
            return {}
        try:
            parent = self.client.get_run(state["runs"][PARENT])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.key = ""
            return {}
        if parent.info.lifecycle_stage == "active":
            return dict(state["runs"])
        self.key = ""
        return {}

    def ended(self, key: str) -> bool:
        """Whether the run of a trial exists and has ended."""
        return key in self.runs and self.client.get_run(self.runs[key]).info.status != "RUNNING"

    def send(self, records: Sequence[Record]) -> None:
        """Deliver records in order; log records of one run are joined into few requests. Sending one twice changes nothing."""
        waiting: dict[str, Record] = {}
        with _refusals():
            for record in records:
                if record["op"] == "log":
                    joined = waiting.setdefault(record["run"], {"metrics": [], "params": {}, "tags": {}})
                    joined["metrics"] += record["metrics"]
                    joined["params"] |= record["params"]
                    joined["tags"] |= record["tags"]
                    continue
                if record["run"] in waiting:
                    self._log(record["run"], waiting.pop(record["run"]))
                getattr(self, f"_{record['op']}")(record)
            for run, joined in waiting.items():
                self._log(run, joined)

    def _run(self, key: str) -> str:
        if key not in self.runs:
            raise Rejected(f"run {key!r} was never made")
        return self.runs[key]

    def _create(self, record: Record) -> None:
        key = record["run"]
        if key in self.runs:  # an interrupted trial is taken up again
            self.client.update_run(self.runs[key], status="RUNNING")
            if self._unwritten:
                self._write_state()
            return
        if not self.key:
            self.key = uuid.uuid4().hex
            self._write_state()
        tags = record["tags"] | {"safebasin.key": f"{self.key}/{key}"}
        if key != PARENT:
            tags["mlflow.parentRunId"] = self._run(PARENT)
        found, begin, first = self._made(key), time.monotonic(), key not in self._unsure
        self._unsure.add(key)  # until it is answered in good time
        run_id = found[0] if found else self._make(record, tags)
        if first and not found and time.monotonic() - begin < 5:
            self._unsure.discard(key)
        self.runs[key] = run_id
        self._write_state()

    def _make(self, record: Record, tags: dict[str, str]) -> str:
        made = self.client.create_run(self.experiment_id, start_time=record["time"], tags=tags, run_name=record["name"])
        return made.info.run_id

    def _made(self, key: str) -> list[str]:
        """Ids of the runs of this key, the oldest first."""
        query = f"tags.`safebasin.key` = '{self.key}/{key}'"
        return [run.info.run_id for run in self.client.search_runs([self.experiment_id], query, order_by=["attributes.start_time"])]

    def _write_state(self) -> None:
        state = {"uri": redaction.redact_uri(self.uri), "experiment_id": self.experiment_id, "key": self.key, "runs": self.runs}
        self._unwritten = True
        files.write_json(self.state_path, state)
        self._unwritten = False

    def _log(self, key: str, joined: Record) -> None:
        from mlflow.entities import Metric, Param, RunTag

        tags = {k: self.runs.get(v["run"], "") if isinstance(v, dict) else v for k, v in joined["tags"].items()}
        parts = {
            "metrics": [Metric(name, value, moment, step) for name, value, moment, step in joined["metrics"]],
            "params": [Param(name, value) for name, value in joined["params"].items()],
            "tags": [RunTag(name, value) for name, value in tags.items()],
        }
        while any(parts.values()):
            self.client.log_batch(self._run(key), **{name: rows[: CHUNK[name]] for name, rows in parts.items()}, synchronous=True)
            parts = {name: rows[CHUNK[name] :] for name, rows in parts.items()}

    def _inputs(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for data in record["datasets"]:
            profile = json.dumps({"num_rows": data.get("rows"), "sha256": data["digest"]})
            dataset = Dataset(
                data["name"][:500], data["digest"][:36], "local", json.dumps({"uri": data.get("source", "")}), profile=profile
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", data.get("context", "evaluation"))]))
        self.client.log_inputs(self._run(record["run"]), inputs)

    def _text(self, record: Record) -> None:
        with _files():
            self.client.log_text(self._run(record["run"]), record["text"], record["file"])

    def _artifact(self, record: Record) -> None:
        """A file or folder; texts go without secrets."""
        path, run = Path(record["path"]), self._run(record["run"])
        if not path.exists():
            raise Rejected(f"{path} is gone")
        if not path.resolve().is_relative_to(self.state_path.parent.resolve()):
            raise Rejected(f"{path} is no file of this run")
        with _files():
            if path.is_file() and path.suffix in _TEXT_SUFFIXES:
                text = path.read_text(encoding="utf-8")
                clean = redaction.redact_text(text)
                if clean != text:
                    self.client.log_text(run, clean, f"{record['to']}/{path.name}" if record["to"] else path.name)
                    return
            self.client.log_artifact(run, str(path), record["to"])

    def _status(self, record: Record) -> None:
        key, run = record["run"], self._run(record["run"])
        if key in self._unsure:  # the server took its time: what it made besides is taken away again
            for other in self._made(key):
                if other != run:
                    self.client.delete_run(other)
            self._unsure.discard(key)
        self.client.set_terminated(run, record["status"], record["time"])


@dataclass(frozen=True)
class Release:
    """A model that passed its check."""

    name: str
    """Of the registered model."""
    folder: Path
    evidence: Path
    """The evidence file."""
    digest: str
    """sha256 of the model's files (`contents.digest`), by which a version that is there already is known."""


def release(sink: Sink, what: Release, alias: str) -> tuple[str, bool]:
    """(version, whether it is new): the model as a version of the registered model, with `alias` pointing to it.

    A version whose tag says the same digest is taken for this model; else the folder is uploaded as artifacts of a run of its own. The
    evidence file goes with it either way. The experiment must be known. Raises TrackingError where the files changed meanwhile, and what
    MLflow raises.
    """
    from mlflow.exceptions import MlflowException

    client, tag, name, digest = sink.client, "safebasin.model_sha256", what.name, what.digest
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    seal = hashlib.sha256(what.evidence.read_bytes()).hexdigest()
    found = [one for one in client.search_model_versions(f"name='{name}'") if one.tags.get(tag) == digest]
    new = not found
    if new:
        run = client.create_run(sink.experiment_id, run_name=f"release {name}", tags={tag: digest, "safebasin.role": "release"}).info
        client.log_artifacts(run.run_id, str(what.folder), "model")
        if contents.digest(contents.of(what.folder)) != digest:
            raise TrackingError(f"{what.folder} was changed since it was checked, so it was not registered; check it again")
        found = [client.create_model_version(name, f"{run.artifact_uri}/model", run.run_id, tags={tag: digest})]
        client.set_terminated(run.run_id)
    version = max(found, key=lambda one: int(one.version))
    client.log_artifact(version.run_id, str(what.evidence))
    client.set_model_version_tag(name, version.version, "safebasin.evidence_sha256", seal)
    client.set_registered_model_alias(name, alias, version.version)
    return str(version.version), new


def _away(text: str) -> str | None:
    """The line of an error that says the database can take nothing now; None where none does. What was to be written is not looked at."""
    return next((line.strip() for line in text.split("[SQL:")[0].split("\n") if _AWAY.search(line)), None)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """MLflow's permanent errors as Rejected; everything else (server away, login expired, database locked) passes through, without secrets."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (Rejected, Later, Away):
        raise
    except Exception as error:
        clean, code = redaction.redact_uri(str(error)), getattr(error, "error_code", None)
        if isinstance(error, MlflowException) and code in _REFUSALS:
            raise Rejected(clean) from None
        away = clean if isinstance(error, StorageError) else _away(clean)
        if away:
            raise Away(away) from None
        if clean != str(error):  # requests names the address it could not reach, with its password
            raise Trouble(clean, code) from None
        raise


@contextlib.contextmanager
def _files() -> Iterator[None]:
    """Errors of an upload as Later: the server's file store may be away while it takes everything else."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = isinstance(error, MlflowException) and error.error_code in _REFUSALS
        if refused or status in _REFUSED_FILE or isinstance(error, Rejected):
            raise Rejected(redaction.redact_uri(str(error))) from None
        away = _away(redaction.redact_uri(str(error)))
        if away and "database" in away:  # not the file store, which nothing but files waits for
            raise Away(away) from None
        raise Later(redaction.redact_uri(str(error))) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow and its migrations log to the terminal when they are imported; warnings and errors still pass."""
    yield
    for name in ("mlflow", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _wrong_state(raw: Any) -> str | None:
    """Why the content of tracking.json is none, in words."""
    if not isinstance(raw, dict) or not isinstance(raw.get("runs", {}), dict):
        return "it holds no runs"
    texts = [raw.get(key, "") for key in ("uri", "experiment_id", "key")] + list(raw.get("runs", {}).values())
    return None if all(isinstance(text, str) for text in texts) else "what should be text is none"
