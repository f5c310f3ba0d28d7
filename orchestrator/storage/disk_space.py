"""A disk that is full, or a quota that is used up: waited for, since somebody will free space, and nothing that is known is given up.

A run's driver waits before it gives up a record (`patient`), a lane before it gives up a trial (`waited`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_S = 600.0
"""How long a full disk is waited for."""
LOOK_EVERY_S = 1.0
ROOM_BYTES = 1 << 20
"""So much must fit for the disk to count as free again."""
_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = re.compile(r"No space left|Disk quota exceeded|os error (28|122)|unexpected pos|file write failed", re.IGNORECASE)
"""What torch and safetensors say, in errors that carry no number."""


def is_full(error: BaseException) -> bool:
    """Whether the error is what a full disk, or a used-up quota, leads to."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _ERRNOS
    return bool(_WORDS.search(str(error)))


def has_room(folder: str | Path) -> bool:
    """Whether `ROOM_BYTES` can be written to the disk of `folder` (or of the nearest folder above it that exists). Leaves no file.

    Tried, not asked: what a disk says is free knows nothing of quotas. A folder that cannot be written for another reason has no room missing.
    """
    place = Path(folder).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:  # without a name, so that nothing is left even by SIGKILL
            file.write(b"\1" * ROOM_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in _ERRNOS
    return True


def waited(folder: str | Path, stopped: Callable[[], bool], seconds: float = PATIENCE_S) -> float:
    """Wait until there is room, `stopped()`, or `seconds` are over; the seconds waited, 0.0 where there was room at once."""
    if has_room(folder):
        return 0.0
    began = time.monotonic()
    while not stopped() and time.monotonic() < began + seconds:
        time.sleep(LOOK_EVERY_S)
        if has_room(folder):
            break
    return time.monotonic() - began


class _Patience:
    """Set by a run while it lasts: what is said, and whether it is to end."""

    say: Callable[[str], None] | None = None
    stopped: Callable[[], bool] = staticmethod(lambda: False)


@contextlib.contextmanager
def patient(say: Callable[[str], None], stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside, `again` waits for room. `say` takes a sentence for the user; `stopped` ends the waiting."""
    before = _Patience.say, _Patience.stopped
    _Patience.say, _Patience.stopped = say, stopped
    try:
        yield
    finally:
        _Patience.say, _Patience.stopped = before


def again(path: Path, error: OSError) -> bool:
    """Whether a write that failed is to be tried again: the disk was full, and has room now. False at once outside `patient`."""
    if _Patience.say is None or error.errno not in _ERRNOS:
        return False
    if has_room(path.parent):  # freed meanwhile, or only this file is too large: the caller tries once more and not for ever
        return True
    _Patience.say(f"warning: {path} cannot be written, the disk is full; waiting up to {PATIENCE_S / 60:.0f} min for room (Ctrl-C ends the run)")
    seconds = waited(path.parent, _Patience.stopped)
    if not has_room(path.parent):
        return False
    _Patience.say(f"there is room on the disk again after {seconds:.0f} s; {path.name} is written")
    return True
