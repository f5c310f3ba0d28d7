"""The only door to MLflow. The driver alone writes: one parent run per experiment, one child run for the baseline and each trial.

Opening the tracker talks to the server at once, so that a wrong address is an error before anything starts. From then on every call
only appends a record to a queue (`orchestrator.tracking.spool`) and returns; a thread sends them, and waits where the server is away.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator import redaction
from orchestrator.config import Experiment
from orchestrator.errors import TrackingError
from orchestrator.tracking import mlflow
from orchestrator.tracking.mlflow import Release, Sink
from orchestrator.tracking.tracker import NullTracker, Tracker


def resolve_uri(experiment: Experiment, output_dir: Path) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else sqlite beside the output folder (in it where `output.dir` is an address).

    Paths of sqlite are made absolute.
    """
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        folder = Path(output_dir).resolve()
        # beside the output folder, so that runs are compared; what an address holds is one run, and goes with it
        return f"sqlite:///{(folder.parent if experiment.output_address is None else folder) / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and uri != "sqlite:///:memory:":
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().resolve()}"
    return uri


def open_tracker(experiment: Experiment, output_dir: str | Path, *, facts: Mapping[str, Any] | None = None) -> Tracker | NullTracker:
    """Connect, make or find the MLflow experiment, and make the parent run, or continue the one `<output_dir>/tracking.json` names.

    `facts`: further tags of the parent run and of every child, e.g. {"model_hash": ...}; secrets in them are redacted.
    With `tracking.enabled: false` a NullTracker. Raises TrackingError within about 20 s where the server cannot be reached.
    """
    if not experiment.tracking.enabled:
        return NullTracker()
    sink = Sink(resolve_uri(experiment, Path(output_dir)), Path(output_dir))
    tracker = Tracker(experiment, sink, facts or {})
    with _explained(sink.uri, experiment):
        tracker.begin()
    return tracker


SAFE_BEST = "safe-best"
"""Alias, in the registry, of the version that passed its check last."""
REGISTERED = re.compile(r"[^/:.%\x00-\x1f'\"\\]{1,200}")
"""Names that MLflow takes for a registered model, and that need no quoting in its queries."""


def release(experiment: Experiment, output_dir: str | Path, what: Release) -> str:
    """Make a checked model a version in the registry and point SAFE_BEST to it; what was done, in a sentence. Raises TrackingError."""
    sink = Sink(resolve_uri(experiment, Path(output_dir)), Path(output_dir))
    with _explained(sink.uri, experiment):
        sink.find_experiment(experiment.tracking.experiment)
        version, new = mlflow.release(sink, what, SAFE_BEST)
    how = "registered" if new else "was registered before"
    return f"MLflow: version {version} of {what.name} {how}, and {SAFE_BEST} points to it ({redaction.redact_uri(sink.uri)})"


@contextlib.contextmanager
def _explained(uri: str, experiment: Experiment) -> Iterator[None]:
    """MLflow's errors at the start as TrackingError: where, why, what to do."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        source = (
            "tracking.uri" if experiment.tracking.uri else "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "default"
        )
        server = f"the MLflow tracking server {redaction.redact_uri(uri)} ({source})"
        raise TrackingError(f"{server} {_trouble(error, experiment)}") from None


def _trouble(error: Exception, experiment: Experiment) -> str:
    """Reason and remedy of an error at the start, the second half of a sentence."""
    code, user = getattr(error, "error_code", None), os.environ.get("MLFLOW_TRACKING_USERNAME")
    if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        if user or os.environ.get("MLFLOW_TRACKING_TOKEN"):
            who = f"the user {user!r} with this MLFLOW_TRACKING_PASSWORD" if user else "this MLFLOW_TRACKING_TOKEN"
            return f"does not accept {who}; correct it in the environment of the process that runs safebasin"
        return "wants a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment of the process that runs safebasin"
    if code == "PERMISSION_DENIED":
        return (
            f"does not let {f'the user {user!r}' if user else 'this user'} write to the experiment {experiment.tracking.experiment!r}; ask its owner "
            "for the permission EDIT, or set tracking.experiment to a name that nobody has"
        )
    reason = redaction.redact_uri(str(error).strip().splitlines()[0][:300]) if str(error).strip() else type(error).__name__
    return (
        f"cannot be used: {reason}; start it, correct tracking.uri "
        "(e.g. http://host:5000, or null for a sqlite file beside the output folder), or set tracking.enabled=false"
    )
