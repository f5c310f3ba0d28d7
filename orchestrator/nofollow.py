"""Folders opened step by step, so that no link on the way is followed."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def opened(folder: Path, stack: contextlib.ExitStack) -> int:
    """A folder's handle, closed with the stack. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, handle)
    return handle


def entered(name: str, where: int, stack: contextlib.ExitStack) -> int:
    """A folder in an open folder, which is no link. Raises NotADirectoryError where it is one."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=where)
    except OSError as error:
        if stat.S_ISLNK(os.stat(name, dir_fd=where, follow_symlinks=False).st_mode):
            raise NotADirectoryError(error.errno, "is a link", name) from error
        raise
    stack.callback(os.close, handle)
    return handle
