"""The Ray cluster a run stands on: joined or started here, and what its machines have, now and free.

A process joins one cluster in its life; `lanes` puts worker groups on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import config
from orchestrator.errors import ConfigError

OBJECT_STORE_BYTES = 200 * 1024**2
"""Only specs and results pass through it; models never do."""


@dataclass(frozen=True)
class ClusterInfo:
    """The Ray cluster in use."""

    address: str
    nodes: tuple[dict[str, float], ...]
    """Total resources of each machine."""
    started: bool
    """Whether `connect` started it; only then does `shutdown` end it."""
    log_dir: str
    """Where workers write what they print, on their machine."""
    dashboard: str | None


@dataclass(frozen=True)
class Machine:
    """One machine of the cluster."""

    host: str
    resources: dict[str, float]
    """All it has, as Ray names it."""


def connect(settings: config.Ray) -> ClusterInfo:
    """Join the cluster at `ray.address` (else RAY_ADDRESS), or start one on this machine that nobody else can reach.

    A process that is connected already stays so. Raises ConfigError where the address cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray.address={address}: lanes cannot be driven through the Ray Client, because trials report to this process; "
            "run on the cluster itself (`ray job submit`, or ray.address=auto on one of its machines)"
        )
    started = False
    if not ray.is_initialized():
        started = address == "local"
        _init(ray, address, settings.init_kwargs)
    nodes = tuple(dict(node["Resources"]) for node in ray.nodes() if node["Alive"])
    context = ray.get_runtime_context()
    session = ray._private.worker.global_worker.node.get_session_dir_path()
    dashboard = ray._private.worker.get_dashboard_url() or None
    return ClusterInfo(context.gcs_address, nodes, started, str(Path(session) / "logs"), dashboard)


def _init(ray, address: str, extra: dict[str, Any]) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    root = str(Path(__file__).resolve().parent.parent)
    installed = Path(root).name in ("site-packages", "dist-packages")
    if address == "local":
        # Preemption is a matter of clusters that come and go; here its watcher would be one more process per lane.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray gives its workers the lowest priority but four; here they are the work, and any other process would starve them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # A short path: Ray puts sockets below it, whose names may have 107 characters at most.
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": f"/tmp/safebasin-{os.getuid()}"}
        if not installed:
            # Workers started by this cluster inherit the environment, so a checkout works from any folder.
            paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    elif not installed and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        options["runtime_env"] = {"py_modules": [str(Path(root) / name) for name in ("orchestrator", "strategies", "search_spaces")]}
    try:
        with _own_signals():
            ray.init(**(options | extra))
        if address == "local":
            keep_token_private()
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "start a cluster on this machine" if address == "local" else f"join the Ray cluster at {address!r}"
        raise ConfigError(f"could not {where}: {error}; see ray.address and ray.init_kwargs (RAY_ADDRESS is read too)") from error


def keep_token_private(path: Path | None = None) -> None:
    """Take the token that Ray made for local clusters (`~/.ray/auth_token`) out of other users' sight: whoever has it runs code as this user."""
    path = path or Path.home() / ".ray" / "auth_token"
    if path.is_file() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Put SIGINT and SIGTERM back to what they were: `ray.init` installs a handler in C that prints a stack and aborts on SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: installed by something other than Python, which cannot be put back
                signal.signal(number, handler)


def shutdown(cluster: ClusterInfo) -> None:
    """End a cluster that `connect` started; leave a joined one as it is (our actors end with this process)."""
    import ray

    if cluster.started and ray.is_initialized():
        ray.shutdown()


def machines() -> dict[str, Machine]:
    """The machines that are alive, by Ray's id."""
    import ray

    return {node["NodeID"]: Machine(node["NodeManagerHostname"], dict(node["Resources"])) for node in ray.nodes() if node["Alive"]}


def free() -> list[dict[str, float]]:
    """What nobody holds on each machine at this moment. Ray's own view of it may be a moment old."""
    import ray

    return list(ray._private.state.available_resources_per_node().values())
