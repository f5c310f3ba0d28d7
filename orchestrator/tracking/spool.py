"""A queue that outlives its process, and the thread that empties it into something that may be away.

Every record is appended to a file before it is sent (so a killed driver loses none), kept in order, and dropped once it arrived.
Delivery is at least once: a crash between "arrived" and "dropped" sends a record twice, so the receiver must not mind. Ours does
not: MLflow keys a metric by (name, step, timestamp, value) and both travel with the record; params, tags and artifacts overwrite
themselves; runs are looked up by our own tag before they are made.
"""

from __future__ import annotations

import collections
import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.errors import StorageError
from orchestrator.storage import files, nofollow, ownership
from orchestrator.trial import record_check

log = logging.getLogger(__name__)

Record = dict[str, Any]
WINDOW = 500
"""Records handed to the receiver at a time."""
COMPACT = 5000
"""The file is rewritten when it holds this many records that already arrived."""
MOST = 1 << 36
"""Bytes of a queue that are read."""
POISON_TRIES = 5
"""A record that fails this often while the receiver answers otherwise is set aside."""


class Rejected(Exception):
    """The receiver will never take this record (unlike: it is away)."""


class Later(Exception):
    """The receiver does not take this record now, and what follows need not wait for it: a file, while the receiver's file store is away."""


class Away(Exception):
    """The receiver takes nothing now, whatever it answers when asked how it is: its database is locked, its disk is full."""


REMIND = 30.0
"""Seconds between two warnings of one kind."""


class Teller:
    """Logs warnings of one kind at most every REMIND seconds; those in between are counted, and told with the next one or by `rest`."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}
        self._untold: collections.Counter[str] = collections.Counter()

    def say(self, kind: str, text: str, *arguments: Any) -> None:
        now = time.monotonic()
        if now - self._said.get(kind, -REMIND) < REMIND:
            self._untold[kind] += 1
            return
        more = self._untold.pop(kind, 0)
        self._said[kind] = now
        log.warning(text + (f" ({more} more of this kind since the last time)" if more else ""), *arguments)

    def rest(self, words: dict[str, str]) -> None:
        """Tell what was only counted: `words` has a sentence with one %d for each kind worth it."""
        for kind, text in words.items():
            if more := self._untold.pop(kind, 0):
                log.warning(text, more)


class Spool:
    """Records in order, in memory and in a file. Thread-safe.

    Where the file cannot be written (disk full) one warning is logged and records are kept in memory until it can be again: a tracking
    queue must not stop a search. `wrong` says what keeps a line of the file from being a record, None for one that is; such lines are
    kept in `<name>.skipped`, and one sentence counts them. Lines end in "\\n" and nothing else: text may hold other line ends.
    """

    def __init__(self, path: Path, wrong: Callable[[Record], str | None] = lambda record: None):
        self.path = path
        self._wrong = wrong
        self._retry_at = 0.0
        self._lock = threading.Lock()
        self._records: deque[Record] = deque()
        self._stale = 0  # records in the file that already arrived
        self._on_disk = True
        if path.exists():
            self._read()

    def _read(self) -> None:
        skipped: list[tuple[int, bytes, str]] = []
        try:
            opened = nofollow.regular(self.path, MOST)
        except nofollow.NotPlain as error:
            log.warning("%s cannot be read (%s); it was moved to %s", self.path, error.strerror, record_check.move_aside(self.path).name)
            return
        with opened as file:
            line = b"\n"
            for number, line in enumerate(file, 1):
                try:
                    self._records.append(self._record(line))
                except (ValueError, RecursionError) as error:
                    skipped.append((number, line, str(error)))
        if skipped:
            aside = self.path.with_suffix(".skipped")
            number, _, why = skipped[0]
            log.warning("%s: %d lines are no records and are skipped (the first is line %d: %s); they are kept in %s",
                        self.path, len(skipped), number, why[:200], aside.name)  # fmt: skip
            self._write(lambda: self._keep(aside, b"".join(raw.rstrip(b"\n") + b"\n" for _, raw, _ in skipped)))
            self._write(self._rewrite)  # so that they are skipped, and said, once
        elif not line.endswith(b"\n"):  # the next record would be written onto it
            self._write(lambda: self._append_line("\n"))

    def _record(self, line: bytes) -> Record:
        found = json.loads(line.decode("utf-8"), parse_constant=_no_number)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        trouble = self._wrong(found)
        if trouble:
            raise ValueError(trouble)
        return found

    def _keep(self, path: Path, data: bytes) -> None:
        ownership.claim(path)
        with path.open("ab") as file:
            file.write(data)

    def __len__(self) -> int:
        with self._lock:
            return len(self._records)

    def append(self, record: Record) -> None:
        """Add a JSON-able record at the end."""
        line = json.dumps(record) + "\n"  # ASCII: half a surrogate pair can be written, too
        with self._lock:
            self._records.append(json.loads(line))
            if self._on_disk:
                self._write(lambda: self._append_line(line))
            elif time.monotonic() > self._retry_at:
                self._write(self._rewrite)

    def _append_line(self, line: str) -> None:
        ownership.claim(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _rewrite(self) -> None:
        """The file anew, with what waits."""
        if self._records:
            files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in self._records))
        else:
            self.path.unlink(missing_ok=True)
        self._stale = 0

    def _write(self, action: Callable[[], Any]) -> None:
        """Write, or go on in memory; the whole file is tried again every REMIND seconds, as its last line may be torn."""
        try:
            action()
        except (OSError, StorageError) as error:
            if self._on_disk:
                log.warning("%s cannot be written (%s); records for the tracking server are kept in memory only", self.path, error)
            self._on_disk, self._retry_at = False, time.monotonic() + REMIND
        else:
            if not self._on_disk:
                log.warning("%s can be written again", self.path)
            self._on_disk = True

    def peek(self, count: int = WINDOW) -> list[Record]:
        """The first `count` records, still in the queue."""
        with self._lock:
            return list(itertools.islice(self._records, count))

    def drop(self, count: int) -> None:
        """Forget the first `count` records: they arrived, or were set aside."""
        with self._lock:
            for _ in range(count):
                self._records.popleft()
            self._stale += count
            due = self._on_disk or time.monotonic() > self._retry_at
            if not self._records or self._stale > COMPACT and due:
                self._write(self._rewrite)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


class Pump(threading.Thread):
    """Sends a Spool's records in order on its own thread.

    `send(records)` raises Rejected for what will never be taken, Later for a record whose place in the order does not matter and that is not
    taken now, Away where nothing can be taken now, and anything else while the receiver may be away; `alive()` raises while it is away.
    Rejected records go to `<spool>.rejected.jsonl` with the reason; those for later go to the end of the queue and stay in its file until
    they are taken. What goes wrong is one warning, repeated at most every REMIND seconds with what it came to since.
    """

    def __init__(
        self,
        spool: Spool,
        send: Callable[[list[Record]], None],
        alive: Callable[[], None],
        name: str,
        pause: float = 1.0,
        longest: float = 30.0,
    ):
        super().__init__(name=f"{name} pump", daemon=True)
        self.spool, self.send, self.alive, self.receiver, self.pause = spool, send, alive, name, pause
        self.longest = longest  # seconds between tries while the receiver is away
        self.away_since: float | None = None
        self._reminded = 0.0
        self._teller = Teller()
        self._closing, self._deadline = threading.Event(), float("inf")
        self._tries = 0
        self._given_up: set[tuple[Any, str]] = set()  # (run, reason): further records of a run nobody may write to need no tries

    def run(self) -> None:
        failures = 0
        while not (self._closing.is_set() and (not len(self.spool) or time.monotonic() > self._deadline)):
            records = self.spool.peek()
            failures = failures + 1 if records and not self._deliver(records) else 0
            if self._closing.is_set():
                time.sleep(0.2 if failures else 0.0)
            else:
                self._closing.wait(min(self.pause * 2 ** min(failures, 30), self.longest))

    def _deliver(self, records: list[Record]) -> bool:
        """Send a window, or where one of its records cannot be taken, the others; False: wait before the next try."""
        try:
            self.send(records)
        except Exception as error:
            if not isinstance(error, Rejected):
                if isinstance(error, Away) or not self._answers(error):
                    if isinstance(error, Away):
                        self._tries = 0
                        self._note_away(error)
                    return False
                self._tries += 1
                if not isinstance(error, Later) and self._tries < POISON_TRIES and (records[0].get("run"), str(error)) not in self._given_up:
                    log.debug("%s failed to take a record: %s", self.receiver, error)
                    return False
            waiting = len(self.spool)
            done = self._apart(records, error, str(error))
            self._tries = 0
            return done and len(self.spool) < waiting
        self._arrived(len(records))
        self._tries = 0
        return True

    def _answers(self, error: Exception) -> bool:
        """Whether the receiver answers, so that the trouble is with these records."""
        try:
            self.alive()
        except Exception as outage:
            self._tries = 0
            self._note_away(outage)
            return False
        return True

    def _apart(self, records: list[Record], error: Exception, stubborn: str) -> bool:
        """Find by halves which of `records` (the first of the queue) is not taken and set it aside; False at any trouble that is new."""
        if len(records) == 1:
            self._set_aside(records[0], error)
            return True
        for part in (records[: len(records) // 2], records[len(records) // 2 :]):
            try:
                self.send(part)
            except Exception as trouble:
                if isinstance(trouble, Away):
                    self._note_away(trouble)
                    return False
                known = isinstance(trouble, (Rejected, Later)) or str(trouble) == stubborn
                if not known or not isinstance(trouble, Rejected) and not self._answers(trouble) or not self._apart(part, trouble, stubborn):
                    return False
            else:
                self._arrived(len(part))
        return True

    def _set_aside(self, record: Record, error: Exception) -> None:
        """The first record leaves the queue: for good, with its reason, or to the queue's end."""
        if not isinstance(error, Later):
            self._given_up.add((record.get("run"), str(error)))
            self._reject(record, error)
            self._arrived(1)
            return
        if not record.get("put_off"):
            name = record.get("file") or record.get("path") or f"a record of run {record.get('run')}"
            self._teller.say("later", "%s does not take %s now (%s); it waits in %s", self.receiver, name, str(error)[:200], self.spool.path)
        self.spool.append(record | {"put_off": True})  # before it is dropped: a crash in between leaves it twice, which changes nothing
        self.spool.drop(1)

    def _arrived(self, count: int) -> None:
        self.spool.drop(count)
        if self.away_since is not None:
            seconds, self.away_since = time.monotonic() - self.away_since, None
            log.warning("%s answers again after %.0f s; what waited is being sent", self.receiver, seconds)

    def _note_away(self, error: Exception) -> None:
        """Say that the receiver is away, and every REMIND seconds that it still is."""
        now = time.monotonic()
        reason = str(error).split("\n")[0][:200] if str(error) else type(error).__name__
        if self.away_since is None:
            self.away_since = self._reminded = now
            log.warning("%s does not answer (%s); the search goes on, records wait in %s", self.receiver, reason, self.spool.path)
        elif now - self._reminded >= REMIND:
            self._reminded = now
            log.warning("%s has not answered for %.0f s (%s); %d records wait in %s",
                        self.receiver, now - self.away_since, reason, len(self.spool), self.spool.path)  # fmt: skip

    def _reject(self, record: Record, error: Exception) -> None:
        reason = str(error).split("\n")[0][:300]
        self._teller.say("refused", "%s refused a record of run %s: %s", self.receiver, record.get("run"), reason)
        path = self.spool.path.with_suffix(".rejected.jsonl")
        try:
            ownership.claim(path)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"reason": str(error)[:1000], "record": record}) + "\n")
        except (OSError, StorageError) as trouble:
            self._teller.say("unwritten", "%s cannot be written: %s", path, trouble)

    def close(self, timeout: float) -> int:
        """Send what is left, for at most `timeout` seconds; how many records still wait (in the file)."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        if self.is_alive():
            self.join(timeout + 0.5)
        rejected = self.spool.path.with_suffix(".rejected.jsonl")
        refused, later = f"{self.receiver} refused %d more records; {rejected} says why", f"%d more files wait for {self.receiver}"
        self._teller.rest({"refused": refused, "later": later})
        return len(self.spool)

