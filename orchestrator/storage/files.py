"""Files of a run, written so that a reader never sees half of one: temporary file, fsync, `os.replace`.

A disk that is full or a folder that may not be written becomes a StorageError that names the path and the remedy.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.storage import atomic, cells, disk_space, ownership

TRIES = 3
"""How often a file is written where each time the disk was full and had room afterwards."""
_REMEDY = {
    errno.ENOSPC: "the disk is full; free space there or set output.dir to another disk",
    errno.EDQUOT: "your disk quota is used up; free space there or set output.dir to another disk",
    errno.EACCES: "this user may not write there; change its permissions or set output.dir to a folder of yours",
    errno.EPERM: "this user may not write there; change its permissions or set output.dir to a folder of yours",
    errno.EROFS: "the file system is read-only; set output.dir to a writable one",
    errno.ENOTDIR: "a part of the path is a file, not a folder; set output.dir to another path",
    errno.EISDIR: "there is a folder of this name; move it away or set output.dir to another path",
    errno.EIO: "the disk reports an error; check it, or set output.dir to another disk",
}


def storage_error(path: Path, error: OSError) -> StorageError:
    """The StorageError of an OSError met at `path`: path, system's reason, remedy."""
    remedy = _REMEDY.get(error.errno or 0, "check the folder, or set output.dir to another one")
    return StorageError(f"cannot write {path}: {error.strerror or error}; {remedy}")


def write_bytes(path: str | Path, data: bytes, *, mode: int | None = None) -> Path:
    """Replace `path` by `data` in one step, making its folder; `mode` e.g. 0o600 (the umask's mode without it).

    A run waits for room where the disk is full (`disk_space`). Raises StorageError; an earlier file at `path` is then left as it was.
    So it is where the folder is `ownership.active` and the file not ours.
    """
    path = Path(path)
    ownership.claim(path)
    for _ in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace(path, data, mode if mode is not None else file_mode())
            break
        except OSError as error:
            trouble = error
            if not disk_space.again(path, error):
                raise storage_error(path, error) from error
    else:
        raise storage_error(path, trouble) from trouble
    return path


def file_mode() -> int:
    """The mode of files that this process makes, by its umask, e.g. 0o644."""
    return 0o666 & ~_umask()


def _umask() -> int:
    """The process's umask: mkstemp makes 0600 files, which a colleague on a shared disk could not read."""
    status = Path("/proc/self/status")
    if status.exists():  # reading it there does not change it, unlike os.umask in a process with threads
        for line in status.read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: str | Path, text: str, *, mode: int | None = None) -> Path:
    """Replace `path` by UTF-8 `text` in one step; halves of characters become `\\udXXX`, as JSON writes them. Raises StorageError."""
    return write_bytes(path, text.encode(errors="backslashreplace"), mode=mode)


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses and tuples unfolded, NaN and infinities as None, paths as text.

    Raises TypeError for anything else, naming its type.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r:.80}")


def write_json(path: str | Path, data: Any, *, mode: int | None = None) -> Path:
    """Replace `path` by `data` as indented JSON, never with a NaN in it (null instead); raises StorageError."""
    return write_text(path, json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode=mode)


def read_json(path: str | Path) -> Any | None:
    """What `write_json` wrote, or None where there is no such file; raises StorageError where it cannot be read."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}; restore the file or start the run in a new output.dir") from error


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Path:
    """Replace `path` by a table of these columns that no spreadsheet runs (`cells`); lists and dicts are JSON, None and NaN empty cells.

    Raises StorageError, or ValueError for a row with another key.
    """
    return write_text(path, cells.to_csv([{name: _cell(value) for name, value in row.items()} for row in rows], columns))


def _cell(value: Any) -> Any:
    value = plain(value)
    return json.dumps(value) if isinstance(value, (list, dict)) else value
