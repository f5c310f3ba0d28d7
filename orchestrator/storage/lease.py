"""A driver's hold on an address: an object that names it and is written anew every few seconds.

Object stores have no locks. A second driver watches the object: while its content changes the first one lives, and the second is refused;
when nothing changes for `STALE_S` seconds the first is taken for dead. So no clocks are compared. Two drivers that start within the same
moment may both believe themselves alone until the next renewal, at which one of them finds the other's name and ends.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from orchestrator.errors import ConfigError, StorageError
from orchestrator.storage.buckets import Store

NAME = ".lease.json"
RENEW_S = 10.0
STALE_S = 45.0


class Lease:
    """Take it, keep it with `start`, give it back with `release`. `lost` is set where another driver took it over."""

    def __init__(self, store: Store, *, renew_s: float = RENEW_S, stale_s: float = STALE_S):
        self.store, self.renew_s, self.stale_s = store, renew_s, stale_s
        self.owner = uuid.uuid4().hex
        self.lost = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, say: Callable[[str], None]) -> None:
        """Become the owner. Raises ConfigError where another driver lives; `say` gets a sentence where one is waited for or taken over."""
        held = self._read()
        if held is not None and not held.get("released") and not _dead_here(held):
            say(f"warning: {self.store.shown} was in use by {_named(held)}; looking for up to {self.stale_s:.0f} s whether that run still goes on")
            self._watch(held)
            say(f"warning: no sign of life from {_named(held)}; this run takes over")
        self._write()
        now = self._read()
        if now is None or now["owner"] != self.owner:
            raise ConfigError(f"output.dir {self.store.shown} was taken by {_named(now or {})} at the same moment; give another output.dir")

    def _watch(self, held: dict[str, Any]) -> None:
        deadline = time.monotonic() + self.stale_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.stale_s / 10))
            now = self._read()
            if now is None or now.get("released"):
                return
            if now != held:
                raise ConfigError(
                    f"output.dir {self.store.shown} is in use by another run that is still going ({_named(now)}); wait for it or give another "
                    "output.dir"
                )

    def start(self, on_lost: Callable[[], None] = lambda: None) -> None:
        """Renew it from now on, in a thread; `on_lost` is called once where another driver has it."""
        self._thread = threading.Thread(target=self._renew, args=(on_lost,), name="safebasin-lease", daemon=True)
        self._thread.start()

    def _renew(self, on_lost: Callable[[], None]) -> None:
        while not self._ended.wait(self.renew_s):
            try:
                now = self._read()
                if now is not None and now["owner"] != self.owner:
                    self.lost.set()
                    on_lost()
                    return
                self._write()
            except StorageError:  # the mirror says that the store is away; whoever takes over meanwhile is seen when it is back
                continue

    def release(self) -> None:
        """Let the next driver in at once. Raises StorageError where the store is away."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(30.0)
        if not self.lost.is_set():
            self._write(released=True)

    def _read(self) -> dict[str, Any] | None:
        text = self.store.read(NAME)
        if not text:
            return None
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("owner"), str):
            raise StorageError(f"{self.store.shown}/{NAME} is no lease of ours; move that object away, or give another output.dir")
        return found

    def _write(self, **more: Any) -> None:
        body = {"owner": self.owner, "host": _host(), "pid": os.getpid(), "time": time.time(), **more}
        self.store.write(NAME, json.dumps(body).encode())


def _host() -> str:
    return f"{socket.gethostname()}/{uuid.getnode():x}"


def _dead_here(held: dict[str, Any]) -> bool:
    """Whether the owner ran on this very machine and its process is gone, or has another's number."""
    import psutil

    if held.get("host") != _host():
        return False
    try:
        return psutil.Process(held["pid"]).create_time() > held["time"]
    except psutil.NoSuchProcess:
        return True


def _named(held: dict[str, Any]) -> str:
    host = str(held.get("host", "?")).partition("/")[0]
    return f"process {held.get('pid', '?')} on {host}, last seen {time.strftime('%H:%M:%S', time.localtime(held.get('time', 0)))}"
