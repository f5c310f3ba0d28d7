"""The folder of a Ray cluster that safebasin starts: its own, of mode 0700, unpredictable, held by a lock, and gone at the end.

Ray gives everything below its folder mode 0777, again and again; inside a folder that nobody else can enter that opens nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.lanes import cluster_watch

PREFIX, LOCK, INNER = "sb-ray-", "lock", "r"
LONGEST = 22
"""Characters of the folder above ours: Ray puts sockets 64 characters further down, whose names may have 107 at most."""


class Folder:
    """A fresh folder with its lock and the process that removes it when this one is killed. Raises StorageError where it cannot be made."""

    def __init__(self) -> None:
        base = place()
        remove_leftovers(base)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # 0700
            self._lock = _locked(self.path)
        except OSError as error:
            raise StorageError(f"cannot make a folder for Ray in {base}: {error.strerror or error}; free space there, or set TMPDIR") from error
        command = [sys.executable, "-I", "-S", cluster_watch.__file__]
        self._watch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/")
        self._watch.stdout.readline()  # from here on it takes no signal for its own
        self._watch.stdout.close()
        self._processes: dict[int, str] = {}
        self._say(f"folder {self.path}")

    def fresh(self) -> str:
        """A folder inside for one try to start Ray; an earlier one's is removed."""
        inner = self.path / INNER
        shutil.rmtree(inner, ignore_errors=True)
        inner.mkdir(mode=0o700)
        return str(inner)

    def know(self, pids: list[int]) -> None:
        """These processes belong to the cluster."""
        for pid in pids:
            start = cluster_watch.started(pid)
            if start is not None:
                self._processes[pid] = start
                self._say(f"process {pid} {start}")

    def end_processes(self, patience: float = cluster_watch.PATIENCE_S) -> None:
        """Kill what is left of the cluster after `patience` seconds."""
        cluster_watch.end(self._processes, str(self.path), patience)
        self._processes.clear()

    def remove(self) -> None:
        """End what is left, remove the folder, dismiss the process that watches."""
        self.end_processes()
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        self._say("done")
        with contextlib.suppress(BrokenPipeError):
            self._watch.stdin.close()
        self._watch.wait(10)

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # killed by somebody; then nothing but this process removes the folder
            self._watch.stdin.write(f"{line}\n".encode())
            self._watch.stdin.flush()


def place() -> Path:
    """Where temporary files go, if a socket's name below it is short enough and nobody can move our folder there; else /tmp."""
    wanted = Path(tempfile.gettempdir())
    try:
        mode = wanted.stat().st_mode
    except OSError:
        return Path("/tmp")
    return wanted if len(str(wanted)) <= LONGEST and (mode & stat.S_ISVTX or not mode & 0o022) else Path("/tmp")


def remove_leftovers(base: Path) -> list[Path]:
    """Remove folders of earlier runs of this user whose driver is dead; what they were. Never another's, nor one that is held."""
    removed = []
    for path in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another run removes it at the same time, or it is none of ours
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                continue
            with _locked(path, make=False):
                shutil.rmtree(path)
            removed.append(path)
    return removed


def _locked(folder: Path, *, make: bool = True):
    """The folder's lock, held while the file is open. Raises OSError where another process holds it, or there is none.

    A new one gets its name when it is held already, so that no other run ever finds it free.
    """
    path = folder / LOCK
    opened = os.open(folder / f".{LOCK}" if make else path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if make else 0), 0o600)
    file = os.fdopen(opened, "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if make:
            (folder / f".{LOCK}").rename(path)
    except BaseException:
        file.close()
        raise
    return file
