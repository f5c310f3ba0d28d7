"""Starting a Ray cluster on this machine: in a folder of ours, on loopback, with patience, and quietly.

Ray waits 30 s for its own processes and then raises; on a busy machine that is too short. While it starts, what is waited for is said every
few seconds; what Ray's processes print meanwhile goes to a file, whose last line is quoted where the start fails.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from orchestrator.errors import SafebasinError
from orchestrator.lanes import cluster_watch
from orchestrator.lanes.cluster_folder import Folder

START_S = 180
"""For each step of Ray's start."""
TRIES = 2
TELL_S = 10.0


def start(ray: Any, options: dict[str, Any], say: Callable[[str], None]) -> Folder:
    """Start the cluster; its folder. Raises SafebasinError in one sentence, and leaves nothing then."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(START_S))
    folder = Folder()
    try:
        for attempt in range(1, TRIES + 1):
            try:
                _start_once(ray, options | {"_temp_dir": folder.fresh()}, folder, say)
                return folder
            except (TypeError, ValueError):
                raise  # ray.init_kwargs: no second try would mend them
            except Exception as error:  # Ray raises plain Exceptions, RuntimeErrors and its own here; each means that it did not come up
                _clear(ray, folder)
                if attempt == TRIES:
                    raise SafebasinError(
                        f"Ray did not come up on this machine in {TRIES} tries: {_reason(error)}; is it very busy or short of memory? Run again "
                        "when it is quieter, or with less at once (ray.init_kwargs.num_cpus)"
                    ) from error
                say(f"Ray did not come up ({_reason(error)}); trying again")
        raise AssertionError("unreachable: the last try returns or raises")
    except BaseException:
        _clear(ray, folder)
        folder.remove()
        raise


def _start_once(ray: Any, options: dict[str, Any], folder: Folder, say: Callable[[str], None]) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    os.environ[cluster_watch.VARIABLE] = str(folder.path)
    try:
        with _quiet(folder) as out, _telling(lambda line: say(line) if out is None else _print(out, line)), _patient(ray), _loopback(ray):
            ray.init(**options)
    finally:
        os.environ.pop(cluster_watch.VARIABLE, None)
        folder.know([child.pid for child in psutil.Process().children(recursive=True) if child.pid not in before])


def _clear(ray: Any, folder: Folder) -> None:
    """End what a failed start left: Ray does not, and its processes would live as long as this one."""
    with contextlib.suppress(Exception):  # half a cluster may raise anything while it is shut down
        ray.shutdown()
    folder.end_processes(0.0)


@contextlib.contextmanager
def _loopback(ray: Any) -> Iterator[None]:
    """Ray takes this machine's address in its network unless it believes that clusters are off here; then it takes 127.0.0.1, and its
    processes listen there alone."""
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _patient(ray: Any) -> Iterator[None]:
    """Ray asks for its node again and again for 30 s; here each question is as patient as START_S."""
    services = ray._private.services
    ask = services.get_node

    def get_node(gcs_address: str, node_id: str) -> Any:
        until = time.monotonic() + START_S
        while True:
            try:
                return ask(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = ask


@contextlib.contextmanager
def _telling(say: Callable[[str], None]) -> Iterator[None]:
    done = threading.Event()

    def tell() -> None:
        start = time.monotonic()
        while not done.wait(TELL_S):
            say(f"waiting for Ray to start on this machine ({time.monotonic() - start:.0f} s)")

    thread = threading.Thread(target=tell, name="safebasin-start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def _quiet(folder: Folder) -> Iterator[int | None]:
    """Standard error of this process and of what it starts goes to a file for a moment; yields where it went before, None without one."""
    try:
        out = os.dup(2)
    except OSError:
        yield None
        return
    sys.stderr.flush()
    file = os.open(folder.path / "start.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield out
    finally:
        sys.stderr.flush()
        os.dup2(out, 2)
        os.close(out)


def _print(out: int, line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(out, f"{line}\n".encode())


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")
