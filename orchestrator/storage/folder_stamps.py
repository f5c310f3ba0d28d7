"""Which folder this is and what time its disk has: what a marker is bound to, and what tells files of a run from later ones."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

SIGNS = (
    "trials.csv", "baseline.json", "run.json", "study.journal", "tracking.json", "tracking.spool.jsonl", "trials/*/spec.json",
    "trials/*/result.json", "trials/*/checkpoint/latest", "trials/*/good/latest", "trials/*/checkpoint/step-*/.complete",
    "ray/*/experiment_state-*.json", "ray/*/searcher-state-*.pkl",
)  # fmt: skip
"""Files that a run writes again and again: the newest says how long a killed one lived."""


def place_of(folder: Path) -> dict[str, int]:
    """{"device", "inode", "filesystem"} of a folder. Raises OSError."""
    found = os.stat(folder)
    return {"device": found.st_dev, "inode": found.st_ino, "filesystem": os.statvfs(folder).f_fsid}


def same_place(place: dict[str, int] | None, folder: Path) -> bool:
    """Whether this is the folder that `place` was taken of, also where it was renamed; None: no. A disk that is mounted again may have another
    device number, so the same file system is enough. Raises OSError."""
    if place is None:
        return False
    here = place_of(folder)
    same_disk = place["device"] == here["device"] or (here["filesystem"] != 0 and place["filesystem"] == here["filesystem"])
    return same_disk and place["inode"] == here["inode"]


def now(folder: Path) -> int:
    """The time that a file written into the folder now has, in ns: a server's clock may be another than ours. Leaves nothing. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()
        return os.fstat(file.fileno()).st_mtime_ns


def last_sign(folder: Path, written: int) -> int:
    """When a run that was killed was last known to live, in ns: the newest of its list (`written`) and of the files it writes again and again."""
    times = [written]
    for pattern in SIGNS:
        times += [path.lstat().st_mtime_ns for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()]
    return max(times)
