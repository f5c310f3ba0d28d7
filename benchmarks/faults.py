"""What happens to a disturbed search (`chaos`), and the search it happens to: its driver, its processes, its folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import psutil  # noqa: E402

PATIENCE_S = 240.0
"""A search that does not get on for so long is given up: the benchmark fails."""
AWAY_S = 15.0
"""How long the tracking database is locked, or the disk full."""


class Stuck(Exception):
    """The search did not get on, or ended as it must not."""


@dataclass
class Search:
    """A search in its folder, and the driver that runs it now."""

    config: Path
    folder: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    family: list[psutil.Process] = field(default_factory=list)
    """The driver's descendants when last looked at."""

    def begin(self, *arguments: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "orchestrator", *arguments]
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(arguments)}\n")
            log.flush()
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=self.folder.parent
            )

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def look_at_family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family = psutil.Process(self.process.pid).children(recursive=True)
        return self.family

    def lanes_are_up(self) -> bool:
        """Whether this driver's workers run; what an earlier driver's orphans still write is no progress."""
        return any(is_worker(process) for process in self.look_at_family())

    def records(self) -> dict[str, str]:
        """Trial id -> hash of its record, of finished trials."""
        found = {}
        for path in self.folder.glob("trials/*/result.json"):
            with contextlib.suppress(OSError, ValueError):
                text = path.read_bytes()
                if not json.loads(text)["facts"].get("cancelled"):
                    found[path.parent.name] = hashlib.sha256(text).hexdigest()
        return found

    def progress(self) -> dict[str, str]:
        """What changes while the search gets on: newest checkpoints, and records."""
        found = self.records()
        for path in self.folder.glob("trials/*/checkpoint/latest"):
            with contextlib.suppress(OSError):
                found[f"{path.parent.parent.name} checkpoint"] = path.read_text()
        return found

    def until(self, what: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
        """Wait for `what`; None where the driver ended first. Raises Stuck after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            if self.ended:
                return None
            if time.monotonic() > deadline:
                raise Stuck(f"nothing moved for {seconds:.0f} s; {self.tail()}")
            time.sleep(0.1)
        return found

    def rest(self, seconds: float) -> None:
        """Let it run for a while."""
        moment = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > moment)

    def gets_on(self, before: dict[str, str]) -> bool:
        """Wait for something that is neither as `before` nor gone; False where the driver ended first."""
        return bool(self.until(lambda: set(self.progress().items()) - set(before.items())))

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End whatever runs; for the benchmark's own end."""
        for process in [self.process, *self.look_at_family()] if self.process else []:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()


# -- faults ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something that happens to a search."""

    name: str
    strike: Callable[[Search, random.Random], None]
    ends: bool
    """Whether the driver always ends by it. Where it ends, the search is resumed."""
    codes: tuple[int, ...] = (1,)
    """Exit codes that the driver may end with."""
    damage: Callable[[Search, random.Random], str | None] | None = None
    """Done to the folder of a search whose driver has ended; returns the trial whose record it damaged."""


def is_worker(process: psutil.Process) -> bool:
    """Whether it is a worker of a lane."""
    return "TrainWorker" in _name(process)


def is_raylet(process: psutil.Process) -> bool:
    return _name(process).rpartition("/")[2] == "raylet"


def _name(process: psutil.Process) -> str:
    """What the process calls itself; empty once it is gone."""
    try:
        return " ".join(process.cmdline()[:1]) or process.name()
    except psutil.NoSuchProcess:
        return ""


def kill_driver(search: Search, rng: random.Random) -> None:
    search.process.send_signal(signal.SIGKILL)


def terminate_driver(search: Search, rng: random.Random) -> None:
    search.process.send_signal(signal.SIGTERM)


def _kill_one(search: Search, wanted: Callable[[psutil.Process], bool], rng: random.Random) -> None:
    search.until(lambda: any(map(wanted, search.look_at_family())))  # between two groups of a lane there may be none for a moment
    found = [process for process in search.family if wanted(process)]
    if found:
        rng.choice(found).kill()


def kill_worker(search: Search, rng: random.Random) -> None:
    _kill_one(search, is_worker, rng)


def kill_raylet(search: Search, rng: random.Random) -> None:
    _kill_one(search, is_raylet, rng)


def lock_store(search: Search, rng: random.Random) -> None:
    """The tracking database answers nobody for a while."""
    with contextlib.closing(sqlite3.connect(search.folder.parent / "mlflow.db", timeout=30, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(AWAY_S)
        database.execute("ROLLBACK")


def fill_disk(search: Search, rng: random.Random) -> None:
    """The file system of the results has no byte left for a while."""
    ballast = search.folder.parent / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
    deadline = time.monotonic() + AWAY_S
    while time.monotonic() < deadline and not search.ended:
        time.sleep(0.2)
    ballast.unlink()


def flip_checkpoint(search: Search, rng: random.Random) -> None:
    """A byte of the newest checkpoint's weights is another."""
    shards = sorted(search.folder.glob("trials/*/checkpoint/step-*/rank-*.pt"), key=lambda path: path.stat().st_mtime_ns)
    if shards:
        _flip(shards[-1], rng)


def flip_record(search: Search, rng: random.Random) -> str | None:
    """A byte of the newest record is another: no JSON any more."""
    paths = sorted(search.folder.glob("trials/*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        return None
    data = bytearray(paths[-1].read_bytes())
    data[rng.randrange(len(data) // 2)] = 0
    paths[-1].write_bytes(data)
    return paths[-1].parent.name


def tear_journal(search: Search, rng: random.Random) -> None:
    """The study's journal ends in the middle of a line."""
    journal = search.folder / "study.journal"
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) - rng.randrange(2, 40)])


def lose_journal(search: Search, rng: random.Random) -> None:
    (search.folder / "study.journal").unlink()


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


KILLED = (-signal.SIGKILL,)
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("driver killed", kill_driver, True, KILLED),
        Fault("worker killed", kill_worker, False),
        Fault("raylet killed", kill_raylet, True),
        Fault("driver terminated", terminate_driver, True),
        Fault("tracking store locked", lock_store, False),
        Fault("disk full", fill_disk, False),
        Fault("checkpoint flipped", kill_driver, True, KILLED, flip_checkpoint),
        Fault("record flipped", kill_driver, True, KILLED, flip_record),
        Fault("journal torn", kill_driver, True, KILLED, tear_journal),
        Fault("journal lost", kill_driver, True, KILLED, lose_journal),
    )
}
