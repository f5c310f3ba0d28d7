"""The user's wish to stop: the first Ctrl-C or SIGTERM asks for a clean end, the second interrupts."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from orchestrator.terminal import streams

__all__ = ["StopFlag"]


class StopFlag(threading.Event):
    """Set when the user wants to stop. Call `listen` in the main thread once there is something to end cleanly; before that
    Ctrl-C interrupts as always."""

    signum: int | None = None
    """The signal that set it; None when it was set by hand or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on the first SIGINT or SIGTERM sets the flag; a second one raises KeyboardInterrupt.

        Raises ValueError outside the main thread, where Python takes no signal handlers.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)

    def forget(self) -> None:
        """Give the signals back to who had them; nothing where nobody listened."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, signum: int, _frame: object) -> None:
        if self.is_set():
            raise KeyboardInterrupt
        self.signum = signum
        self.set()
        streams.tell(f"{signal.Signals(signum).name}: running trials stop at their next step, then the report is written; again to abort", sys.stderr)
