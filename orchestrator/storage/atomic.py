"""A file that a reader never sees half of: temporary file beside it, fsync, `os.replace`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: Path, data: bytes, mode: int, *, first: bool = False, durable: bool = False) -> None:
    """Replace a file by `data` in one step; its folder must be there. An earlier file stays as it was where this raises OSError.

    first: only where no file is there (FileExistsError otherwise). durable: its name, too, is on the disk when this returns.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        if first:
            os.link(temporary, path)  # fails where another process was faster
        else:
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    if durable:
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
