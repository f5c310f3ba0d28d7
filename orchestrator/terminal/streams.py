"""Standard output and error that may go away or fill up while we write."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Any


def tolerant(stream: Any) -> None:
    """From now on characters that the stream's encoding lacks are written by their number instead of raising."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a stream that a test or a notebook put there
        stream.reconfigure(errors="backslashreplace")


def gone(stream: Any) -> bool:
    """Whether nobody reads a stream any more: the other end of its pipe is closed, or it is closed itself."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return True


def let_go(stream: Any) -> None:
    """Send what a stream still holds and what is written to it later to nowhere, so that nothing, not even the interpreter's end, fails on it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def settle(stream: Any) -> bool:
    """Flush a stream; False where it takes nothing any more, and what it holds is then given up."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        let_go(stream)
        return False
    return True


def tell(line: str, stream: Any) -> None:
    """Write a line; where the stream takes nothing there is nobody to tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # RuntimeError: a signal came while the stream was written
        print(line, file=stream, flush=True)
