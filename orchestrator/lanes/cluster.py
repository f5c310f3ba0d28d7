"""The Ray cluster a run stands on: joined or started here, and what its machines have, now and free.

A process joins one cluster in its life; `lanes` puts worker groups on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.lanes import cluster_reach, cluster_start
from orchestrator.lanes.cluster_folder import Folder
from orchestrator.terminal import streams

OBJECT_STORE_BYTES = 200 * 1024**2
"""Only specs and results pass through it; models never do."""


log = logging.getLogger(__name__)

GONE_S = 30.0
"""A head that takes no connection for so long is gone; Ray would end this process after a minute."""

_folder: Folder | None = None
"""Of the cluster that this process started."""


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


def _print(line: str) -> None:
    streams.tell(line, sys.stderr)


def connect(settings: config.Ray, say: Callable[[str], None] = _print) -> ClusterInfo:
    """Join the cluster at `ray.address` (else RAY_ADDRESS), or start one on this machine that nobody else can reach.

    A process that is connected already stays so. Raises ConfigError where the address cannot be joined, within about 30 s, and
    SafebasinError where no cluster comes up here. `say` hears what is waited for.
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
        _init(ray, address, settings.init_kwargs, say)
    nodes = tuple(dict(node["Resources"]) for node in ray.nodes() if node["Alive"])
    context = ray.get_runtime_context()
    session = ray._private.worker.global_worker.node.get_session_dir_path()
    dashboard = ray._private.worker.get_dashboard_url() or None
    return ClusterInfo(context.gcs_address, nodes, started, str(Path(session) / "logs"), dashboard)


def _init(ray, address: str, extra: dict[str, Any], say: Callable[[str], None]) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    root = str(Path(__file__).resolve().parents[2])
    installed = Path(root).name in ("site-packages", "dist-packages")
    if address == "local":
        # Preemption is a matter of clusters that come and go; here its watcher would be one more process per lane.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray would answer its driver only when a first idle worker has come up, and never where that one dies (a machine out of memory).
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        # Ray gives its workers the lowest priority but four; here they are the work, and any other process would starve them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        if not installed:
            # Workers started by this cluster inherit the environment, so a checkout works from any folder.
            paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    elif not installed and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        options["runtime_env"] = {"py_modules": [str(Path(root) / name) for name in ("orchestrator", "strategies", "search_spaces")]}
    _shorten_errors(ray)
    # Any call of Ray's without a cluster would start one: a thread of Tune's that outlives ours, in /tmp/ray and for everyone to reach.
    ray._private.auto_init_hook.enable_auto_connect = False
    try:
        with _own_signals():
            if address == "local":
                global _folder
                _folder = cluster_start.start(ray, options | extra, say)
                keep_token_private()
            else:
                cluster_reach.check(_resolved(ray, address), say)
                ray.init(**(options | extra))
    except (ConnectionError, TypeError, ValueError, RuntimeError) as error:
        where = "start a cluster on this machine" if address == "local" else f"join the Ray cluster at {address!r}"
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"could not {where}: {said}; see ray.address and ray.init_kwargs (RAY_ADDRESS is read too)") from error


def _shorten_errors(ray) -> None:
    """Ray prints what its machines report, with pages of their logs. The first line of a report is shown; that something died we say ourselves."""
    worker = ray._private.worker
    show = worker.print_to_stdstream
    if show.__name__ == "brief":
        return

    def brief(data: dict[str, Any], ignore_prefix: bool) -> None:
        text = "\n".join(str(line) for line in data.get("lines", []))
        if data.get("pid") != "raylet":
            show(data, ignore_prefix)
        elif text.startswith(("Raylet is terminated", "A worker died")):
            log.debug("%s", text)
        else:
            show(data | {"lines": [text.strip().partition("\n")[0][:300]]}, ignore_prefix)

    worker.print_to_stdstream = brief


def _resolved(ray, address: str) -> str:
    """`host:port` of the cluster that an address means. Raises ConnectionError where `auto` finds none."""
    return ray._private.services.canonicalize_bootstrap_address_or_die(address) if address == "auto" else address


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
    """End a cluster that `connect` started, with every process, port and file of it; leave a joined one as it is."""
    import ray

    global _folder
    if not cluster.started:
        return
    if ray.is_initialized():
        ray.shutdown()
    if _folder is not None:
        folder, _folder = _folder, None
        folder.remove()


def lost() -> str | None:
    """Why the cluster this process is connected to can do no more work, in words; None while it lives. Answers within seconds."""
    import ray

    node = ray._private.worker._global_node
    if node is None:
        return None
    if _folder is not None:
        dead = sorted({str(kind) for kind, _ in node.dead_processes()} & {"raylet", "gcs_server"})
        return f"its {' and '.join(dead)} ended: killed, or out of memory?" if dead else None
    until = time.monotonic() + GONE_S
    while not cluster_reach.listening(node.gcs_address):
        if time.monotonic() > until:
            return f"nothing answers at {node.gcs_address} any more"
        time.sleep(1.0)
    return None


def machines() -> dict[str, Machine]:
    """The machines that are alive, by Ray's id."""
    import ray

    return {node["NodeID"]: Machine(node["NodeManagerHostname"], dict(node["Resources"])) for node in ray.nodes() if node["Alive"]}


def free() -> list[dict[str, float]]:
    """What nobody holds on each machine at this moment. Ray's own view of it may be a moment old."""
    import ray

    return list(ray._private.state.available_resources_per_node().values())


def free_orphans() -> int:
    """Remove placement groups of this job whose maker, an actor of Train, is dead: where the start of a group fails, Train leaves its own
    behind, and it would hold CPUs and GPUs for as long as this process lives. Returns how many there were."""
    import ray
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    accessor = ray._private.state.state._connect_and_get_accessor()
    job, data, removed = ray.get_runtime_context().get_job_id(), gcs_pb2.PlacementGroupTableData, 0
    for found in map(data.FromString, accessor.get_placement_group_table()):
        maker = ray.ActorID(found.creator_actor_id) if found.creator_actor_id else ray.ActorID.nil()
        if found.state == data.REMOVED or found.creator_job_id.hex() != job or maker.is_nil():  # nil: this process made it
            continue
        info = accessor.get_actor_info(maker)
        if info is None or gcs_pb2.ActorTableData.FromString(info).state == gcs_pb2.ActorTableData.DEAD:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))
            removed += 1
    return removed
