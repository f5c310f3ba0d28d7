"""Which checkpoints a folder holds, and whether their files are what was written; without torch. `checkpoint` writes and reads them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

LATEST = "latest"
MARKER = "whole.json"
NAME = re.compile(r"step-\d{1,18}(-again\d{0,9})?")
"""Of a checkpoint's folder. Nothing else is read, whatever a marker says."""
_PLAIN = {"step", "world_size", "signature"}
"""Fields of a marker of before shards were hashed; it may name its `folder`, too."""
_SEALED = _PLAIN | {"folder", "serial", "sha256", "check"}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(marker: dict[str, Any]) -> dict[str, Any]:
    """The marker with a hash of itself, by which `parse` knows that nothing of it was lost or changed."""
    body = {name: value for name, value in marker.items() if name != "check"}
    return body | {"check": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def parse(text: bytes | str | None) -> dict[str, Any] | None:
    """A marker that was written whole, None for anything else. One of before shards were hashed has serial 0 and no `sha256`."""
    try:
        found = json.loads(text or b"")
        if not isinstance(found, dict):
            return None
        if set(found) == _SEALED:
            return found if seal(found) == found and _sound(found) else None
        if set(found) - {"folder"} == _PLAIN:
            found = {"folder": f"step-{int(found['step']):08d}", **found, "serial": 0}
            return found if _sound(found) else None
    except (ValueError, TypeError, RecursionError, OverflowError):  # torn, or no marker at all
        return None
    return None


def _sound(marker: dict[str, Any]) -> bool:
    numbers = [marker[name] for name in ("step", "world_size", "serial")]
    plain = all(type(number) is int and 0 <= number < 10**18 for number in numbers)
    named = isinstance(marker["folder"], str) and NAME.fullmatch(marker["folder"]) is not None
    return plain and named and isinstance(marker["signature"], dict) and isinstance(marker.get("sha256", {}), dict)


def markers(folder: str | Path) -> list[dict[str, Any]]:
    """Markers of the finished checkpoints in a folder, newest first. Shards are not looked at. Raises OSError."""
    folder = Path(folder)
    found = [marker_at(path) for path in (folder / LATEST, *folder.glob(f"step-*/{MARKER}"))]
    distinct = {(one["folder"], one["serial"]): one for one in found if one is not None}
    return sorted(distinct.values(), key=age, reverse=True)


def latest(folder: str | Path) -> dict[str, Any] | None:
    """Marker of the newest finished checkpoint, None where there is none."""
    return next(iter(markers(folder)), None)


def age(marker: dict[str, Any]) -> tuple[int, int]:
    """Sorts markers from the oldest on."""
    return marker["serial"], marker["step"]


def marker_at(path: Path) -> dict[str, Any] | None:
    """The marker in a file, None where there is none that is whole. Raises OSError."""
    try:
        return parse(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def verify(path: Path, marker: dict[str, Any]) -> str | None:
    """What is wrong with a shard, None where it is what was written. Without a hash in the marker only whether it is there."""
    wanted = marker["sha256"].get(path.name) if "sha256" in marker else None
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if "sha256" in marker and file_hash(path) != wanted:
            return f"{path.name} is not what was written: its SHA-256 differs"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    return None
