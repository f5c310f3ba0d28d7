"""The cache that machines and runs share: files below the address (or folder) in `SAFEBASIN_CACHE_URI`, behind each machine's own cache folder.

What is missing in the folder (`cachedir`) is looked for at the address; what was made is left there for the next machine. The folder
works without the address: a store that is away costs the time to make a thing again, and callers say so.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from orchestrator.storage import addresses, buckets, cachedir, paths

VARIABLE = "SAFEBASIN_CACHE_URI"
CURRENT = "current"
"""The object that names a folder's version; written after it."""
PATIENCE = 5.0
"""Seconds a store that does not answer is asked again: what it holds can be made here."""


def opened() -> buckets.Store | None:
    """The store, or None where the variable is not set; it may also name a folder. Raises ConfigError for an address that cannot be used."""
    address = os.environ.get(VARIABLE)
    if not address:
        return None
    if not addresses.is_address(address):
        address = f"file://{paths.expanded(address).absolute()}"
    return buckets.open(address, patience=PATIENCE, field=VARIABLE)


def fetch_file(path: Path) -> bool:
    """Bring a file of the cache folder here where it is missing and the address has it; whether it is here now. Raises StorageError."""
    if path.is_file():
        return True
    store = opened()
    return store is not None and store.get(_name(path), path)


def send_file(path: Path) -> None:
    """Leave a file of the cache folder at the address, if there is one. Raises StorageError."""
    store = opened()
    if store is not None:
        store.put(path, _name(path))


def fetch_folder(folder: Path, complete: Callable[[Path], bool]) -> bool:
    """Bring a folder here, whole or not at all; whether it came. `complete` looks at what arrived. Raises StorageError, OSError.

    The caller holds a lock: two processes of a machine must not fetch one folder. What is damaged there is forgotten, so that the next
    `send_folder` replaces it.
    """
    store = opened()
    version = None if store is None else store.read(f"{_name(folder)}/{CURRENT}")
    if version is None:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        ours = re.fullmatch(rb"[0-9a-f]{32}", version) is not None
        if not (ours and store.get_folder(f"{_name(folder)}/{version.decode()}", temporary) and complete(temporary)):
            store.delete(f"{_name(folder)}/{CURRENT}")
            return False
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when the rename succeeded
    return True


def send_folder(folder: Path) -> None:
    """Leave a folder at the address, if there is one and it holds none. Raises StorageError.

    Machines that send at once send each a version of its own; one of them becomes the current one, never a mixture.
    """
    store = opened()
    if store is None or store.exists(f"{_name(folder)}/{CURRENT}"):
        return
    version = uuid.uuid4().hex
    store.put_folder(folder, f"{_name(folder)}/{version}")
    store.write(f"{_name(folder)}/{CURRENT}", version.encode())


def _name(path: Path) -> str:
    return path.relative_to(cachedir.root()).as_posix()


def staging(address: str) -> Path:
    """The folder on this machine that holds the copy of an address; the same for the same address. Not made here."""
    tail = re.sub(r"[^A-Za-z0-9._-]+", "-", address.partition("?")[0].rstrip("/").rpartition("/")[2])[-40:]
    return cachedir.root() / "staging" / f"{tail}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
