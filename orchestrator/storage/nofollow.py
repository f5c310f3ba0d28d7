"""Folders opened step by step, so that no link on the way is followed; files opened so that nothing but a plain one is read."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


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


MOST_RECORD = 256 << 20
"""Bytes of a record that are read."""
MOST_JOURNAL = 1 << 30
"""Bytes of a journal or table that are read."""


class NotPlain(OSError):
    """What lies there is no plain file, or too large a one: a pipe, a device, a folder, a link to one."""

    def __init__(self, reason: str):
        super().__init__(errno.EINVAL, reason)


def regular(path: str | Path, most: int = MOST_RECORD) -> BinaryIO:
    """A plain file, or what a link to one leads to, opened for reading; never waits, as a pipe would make it.

    Raises NotPlain for anything else and for more than `most` bytes, OSError (FileNotFoundError where nothing, or a link to nothing, is there).
    """
    check_regular(path, most)  # before it is opened: to open some devices is to work them
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _plain(os.fstat(handle), most)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: str | Path, most: int = MOST_RECORD) -> None:
    """Raises as `regular` does, without reading."""
    _plain(os.stat(path), most)


def _plain(found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise NotPlain(f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, no file")
    if found.st_size > most:
        raise NotPlain(f"it has {found.st_size:,} bytes, at most {most:,} are read")


def data_of(path: str | Path, most: int = MOST_RECORD) -> bytes:
    """Everything in a plain file. Raises as `regular` does, also where it grows past `most` while it is read."""
    with regular(path, most) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise NotPlain(f"it has more than {most:,} bytes, which is the most that is read")
    return data
