"""Which files of a run's folder the driver uploads, in which order, and what of a file that is being written; and moving a copy to another path."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from orchestrator.storage import files as outputs
from orchestrator.storage.layout import CHECKPOINT, GOOD

_WORKERS_OWN = {CHECKPOINT, GOOD, "model", "generations.jsonl"}
_LOCAL = {"ray", "workers", "trained"}
TRACKING = ("tracking.json", "tracking.spool.jsonl")
"""What the driver knows of its MLflow runs, and what has not arrived there yet. Their copies must be no newer than the database's: they are
read before it and sent after it."""
_SIDE_FILES = (".lock", "-wal", "-shm", "-journal")


def names(folder: Path) -> Iterator[str]:
    """Every file that is the driver's to upload."""
    for where, folders, files in os.walk(folder):
        below = Path(where).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        folders[:] = [name for name in folders if not skipped(f"{prefix}{name}/")]
        yield from (f"{prefix}{name}" for name in files if not skipped(prefix + name) and (Path(where) / name).is_file())


def skipped(name: str) -> bool:
    """Whether a name (a folder's ends in a slash) is a worker's, or of this machine only."""
    parts = name.rstrip("/").split("/")
    if any(part.startswith(".") for part in parts) or parts[0] in _LOCAL or parts[-1].endswith(_SIDE_FILES):
        return True
    return parts[0] == "trials" and len(parts) > 2 and parts[2] in _WORKERS_OWN


def rank(name: str) -> int:
    if name.endswith(".journal"):
        return 0
    return 4 if name == "trials.csv" else 3 if name.endswith("/result.json") else 2 if name in TRACKING else 1


def signature(path: Path) -> tuple[int, int] | None:
    """(modification time in ns, bytes), of a database with its log; None where there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    times = [found.st_mtime_ns]
    if path.suffix == ".db":
        with contextlib.suppress(FileNotFoundError):
            times.append(path.with_name(f"{path.name}-wal").stat().st_mtime_ns)
    return max(times), found.st_size


def lazy(name: str) -> bool:
    """Whether a file changes all the time while trials run."""
    return name.endswith(".db") or name in TRACKING


def content(path: Path) -> bytes | None:
    """What to upload of a file that is being written: a consistent database, whole lines. None: the file as it is."""
    if path.suffix == ".db":
        source = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=30)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(":memory:")) as copy:
            source.backup(copy)
            return copy.serialize()
    if path.suffix in (".journal", ".jsonl"):
        data = path.read_bytes()
        return data[: data.rfind(b"\n") + 1]
    return path.read_bytes() if path.name in TRACKING else None


def relocate(folder: Path, old: str) -> None:
    """Paths of the machine that wrote the copy become this one's, in what MLflow keeps and in what waits for its server."""
    if old == str(folder):
        return
    database = folder / "mlflow.db"
    if database.is_file():
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, str(folder)))
    for path in (folder / name for name in TRACKING):
        if path.is_file():
            outputs.write_text(path, path.read_text(encoding="utf-8").replace(json.dumps(old)[1:-1], json.dumps(str(folder))[1:-1]))
