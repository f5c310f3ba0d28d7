"""What a model's folder holds, byte for byte: a hash of every file, and one of all, taken when it is measured and when it is released."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import ModelError

FACT = "measured"
"""Key, among a record's facts, of what `fact` returns."""
CARD = "README.md"
"""Written anew when a model is handed over; nothing loads it."""


def of(folder: Path) -> dict[str, str]:
    """sha256 by name (with slashes) of every file below a model's folder, sorted; its card and hidden files (lists of ours, caches) left out.

    Files that are links are read where they lead. Raises ModelError for a folder that is none, holds no file or a linked folder, or cannot
    be read.
    """
    found: dict[str, str] = {}
    try:
        for place, folders, names in os.walk(folder, onerror=_raised):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            linked = next((name for name in folders if os.path.islink(os.path.join(place, name))), None)
            if linked is not None:
                raise ModelError(f"{os.path.join(place, linked)} is a link to a folder, and a model is checked by its own files; put a copy there")
            for name in names:
                path = Path(place, name)
                known = path.relative_to(folder).as_posix()
                if not name.startswith(".") and known != CARD:
                    found[known] = _hash(path)
    except OSError as error:
        raise ModelError(f"the model {folder} cannot be read: {error.strerror or error}; give a model's folder that you may read") from error
    if not found:
        raise ModelError(f"{folder} holds no file, so there is no model; give a model's folder")
    return dict(sorted(found.items()))


def _raised(error: OSError) -> None:
    raise error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(files: Mapping[str, str]) -> str:
    """sha256 over names and hashes of files, as `of` gives them."""
    return hashlib.sha256(json.dumps(sorted(files.items()), ensure_ascii=True).encode()).hexdigest()


def fact(folder: Path | None) -> dict[str, Any]:
    """For a record: `folder_sha256` of the model that was measured (None where its files do not lie here) and `at`, now, in UTC."""
    return {"folder_sha256": None if folder is None else digest(of(folder)), "at": datetime.now(UTC).isoformat(timespec="seconds")}


def differences(known: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files that are gone, changed or new, each named with what became of it; [] where both are the same."""
    lines = [f"{name} is gone" for name in known if name not in now]
    lines += [f"{name} was changed" for name in known if name in now and known[name] != now[name]]
    return lines + [f"{name} is new" for name in now if name not in known]
