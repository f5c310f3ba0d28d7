"""The driver's copy of a run whose `output.dir` is an address: a folder of this machine that is kept equal to it.

The run works in the folder as in any other; a thread uploads what changed. Trials' checkpoints, models and shared trainings are the
workers' to upload (`trial.files`); here they are only fetched when wanted and removed when done with. A fresh machine fetches
everything else and goes on. A store that is away loses nothing: what waits stays in the folder and is sent when it answers.

`.mirror.json` in the folder and in the store holds the same `writer`, so that a folder which fell behind another machine's is known.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config import Experiment
from orchestrator.errors import ConfigError, StorageError
from orchestrator.experiment import mirror_files, mirror_objects
from orchestrator.storage import addresses, buckets, cache, cells, ownership
from orchestrator.storage import files as outputs
from orchestrator.storage.layout import CONFIG, LOCK
from orchestrator.storage.lease import Lease
from orchestrator.trial.files import MANIFEST

log = logging.getLogger(__name__)

WINNER = "model/"
TICK_S = 2.0
LAZY_S = 20.0
"""How often a database or queue that changes all the time is sent while no trial ends."""
CLOSE_S = 60.0
"""Seconds that the last upload may take to begin working again; a stopped job is killed some time."""


class Copy(Protocol):
    """What a run asks of its output folder beyond writing into it."""

    def begin(self) -> None:
        """From now on this run writes."""

    def news(self) -> None:
        """Something worth keeping was written."""

    def fetch(self, path: Path) -> None:
        """Bring here what a worker wrote, a folder of the run's, if it is anywhere. Raises StorageError."""

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the run's, wherever it is."""

    def hand_over(self) -> None:
        """The winner's model is written from now on: files of an earlier winner's that are not written again go."""

    def empty(self) -> None:
        """Remove everything of an earlier run that is not here. Raises StorageError."""

    def close(self) -> str | None:
        """Write what is left; a sentence where something could not be."""


class Folder:
    """`output.dir` is a folder: it is the run's only place."""

    def begin(self) -> None: ...

    def news(self) -> None: ...

    def fetch(self, path: Path) -> None: ...

    def hand_over(self) -> None: ...

    def empty(self) -> None: ...

    def remove(self, path: Path) -> None:
        ownership.remove(path)

    def close(self) -> str | None:
        return None


class Mirror(Folder):
    """`output.dir` is an address."""

    def __init__(self, folder: Path, store: buckets.Store, lease: Lease):
        self.folder, self.store, self.lease = folder, store, lease
        self._quick = buckets.Store(store.fs, store.root, store.shown, patience=2.0)
        self._state = _read_manifest(folder)
        self._removed: dict[str, None] = {}
        self._removals: list[str] = []
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._away_since: float | None = None
        self._next_lazy = 0.0
        self._handing_over = False
        self._objects = mirror_objects.Objects(store, self._quick)
        self._own = ownership.opened(folder, "mirror")

    # -- before the run ------------------------------------------------------------------------------------------------

    def take_up(self, say: Callable[[str], None], *, resume: bool) -> None:
        """Make the folder what the store holds (with `resume`), or empty. What only this machine has is set aside, not deleted."""
        theirs = self._theirs(say)
        mine = self._state.get("writer")
        damaged = self._state.get("damaged")
        if damaged:
            say(f"warning: {damaged}; what this machine's copy holds beside {self.store.shown} cannot be told from it")
        newest = theirs is None and (mine or damaged) or theirs is not None and theirs["writer"] == mine
        if resume and newest and (self.folder / CONFIG).is_file():
            if theirs is None:
                say(f"going on with this machine's copy {self.folder}: {self.store.shown} holds none of it yet")
            return
        self._clear(say)
        if resume and theirs is not None:
            names = [name for name in self.store.list() if not mirror_files.skipped(name)]
            self._state["files"] |= {name: (0, 0) for name in names if name.startswith(WINNER)}  # stays there until there is another
            for name in self._in_order([n for n in names if not n.startswith(WINNER) and self._objects.owned.owns(n)]):
                ownership.claim(self.folder / name)
                self.store.get(name, self.folder / name)
                self._state["files"][name] = mirror_files.signature(self.folder / name)
            if theirs["folder"]:
                mirror_files.relocate(self.folder, theirs["folder"])
            self._state["writer"] = theirs["writer"]
            self._save_state()

    def _in_order(self, names: list[str]) -> list[str]:
        """Trials' results in the order of trials.csv, so that their files are as old, one compared to another, as where they were written."""
        table = (self.store.read("trials.csv") or b"").decode(errors="replace")
        ended = {row["trial_id"]: number for number, row in enumerate(cells.from_csv(table)) if row.get("trial_id")}
        return sorted(names, key=lambda name: (ended.get(name.split("/")[1], len(ended)) if name.startswith("trials/") else -1, name))

    def _theirs(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The store's manifest, None where it has none. Of one that is damaged only this is known: that somebody wrote there."""
        text = self.store.read(MANIFEST)
        if text is None:
            return None
        found = _parsed(text, f"{self.store.shown}/{MANIFEST}")
        if "damaged" in found:
            say(f"warning: {found['damaged']}; every file there is fetched, and paths in MLflow stay those of the machine that wrote them")
            return {"writer": "", "folder": ""}
        return {"writer": str(found.get("writer", "")), "folder": str(found.get("folder", ""))}

    def _clear(self, say: Callable[[str], None]) -> None:
        known = self._state.get("writer") or self._state.get("damaged")
        waiting = [name for name in self._changed() if not name.startswith(WINNER)] if known else []
        if waiting:
            aside = self.folder.with_name(f"{self.folder.name}.aside-{int(time.time())}")
            aside.mkdir()
            say(f"warning: {len(waiting)} files of an earlier run on this machine never reached {self.store.shown}; they are kept in {aside}")
            for path in sorted(self.folder.iterdir()):  # what is not ours too: set aside is not removed
                if path.name not in (LOCK, ownership.marker_name("mirror")):
                    path.rename(aside / path.name)
            self._own.prune()
        self._own.empty(keep=[LOCK])
        self._state = {"files": {}}

    # -- the run -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        for name in ("workers", "mlartifacts", "mlflow.db", "mlflow.db.lock"):  # made by workers and MLflow
            self._own.claim(name, folder="." not in name)
        if not self._state.get("writer"):
            self._state["writer"] = self.lease.owner
        self._save_state()
        self._thread = threading.Thread(target=self._keep_up, name="safebasin-mirror", daemon=True)
        self._thread.start()

    def news(self) -> None:
        self._wake.set()

    def fetch(self, path: Path) -> None:
        if path.exists():
            return
        partial = path.with_name(f".{path.name}.partial")
        if self.store.get_folder(path.relative_to(self.folder).as_posix(), partial):
            partial.rename(path)

    def hand_over(self) -> None:
        self._handing_over = True

    def remove(self, path: Path) -> None:
        super().remove(path)
        name = path.relative_to(self.folder).as_posix()
        if name not in self._removed:
            self._removed[name] = None
            self._removals.append(name)

    def empty(self) -> None:
        mirror_objects.empty(self.store)
        self._objects = mirror_objects.Objects(self.store, self._quick)

    def close(self) -> str | None:
        if self._thread is None:
            return None
        self._closing.set()
        self._wake.set()
        self._thread.join()
        if self.lease.lost.is_set():
            return f"another run took {self.store.shown} over; what this one has since written stays in {self.folder}"
        left = self._changed()
        if left:
            return (
                f"{len(left)} files could not be written to {self.store.shown} and wait in {self.folder} (e.g. {left[0]}); "
                "`safebasin resume` with that address on this machine sends them"
            )
        return None

    def _keep_up(self) -> None:
        deadline, urgent = None, True
        while True:
            closing = self._closing.is_set()  # before the round: it then has seen everything
            done = self.lease.lost.is_set() or self._round(urgent or closing)
            if closing:
                deadline = deadline or time.monotonic() + CLOSE_S
                if done or time.monotonic() > deadline:
                    return
            urgent = self._wake.wait(0.5 if closing else TICK_S)
            self._wake.clear()

    def _round(self, urgent: bool) -> bool:
        """Send what changed; False where something is left. A store that is away is said once."""
        try:
            self._send_changes(urgent or self._away_since is not None)
        except StorageError as error:
            if self._away_since is None:
                self._away_since = time.monotonic()
                log.warning("%s; the run goes on, what waits lies in %s", error, self.folder)
            return False
        except (OSError, sqlite3.Error) as error:  # a file that was replaced while it was read: the next round takes the new one
            log.debug("%s changed while it was sent: %s", self.folder, error)
            return False
        if self._away_since is not None:
            log.warning("%s takes files again after %.0f s", self.store.shown, time.monotonic() - self._away_since)
            self._away_since = None
        return True

    def _send_changes(self, urgent: bool) -> None:
        files = self._state["files"]
        changed = self._changed()
        if urgent or time.monotonic() > self._next_lazy:
            self._next_lazy = time.monotonic() + LAZY_S
        else:
            changed = [name for name in changed if not mirror_files.lazy(name)]
        self._objects.claim([MANIFEST, *changed], {name for name in self._own.made if name.endswith("/")})
        changed = [name for name in changed if name not in self._objects.foreign]
        if changed and not self._state.get("told"):
            self._quick.write(MANIFEST, json.dumps({"writer": self._state["writer"], "folder": str(self.folder)}).encode())
            self._state["told"] = True
        early = {name: self._read(name) for name in changed if name in mirror_files.TRACKING}
        try:
            for name in changed:
                path = self.folder / name
                signature, content = early[name] if name in early else self._read(name)
                if signature is None:
                    self._objects.delete(name)
                    files.pop(name, None)
                    continue
                if content is None:
                    self._quick.put(path, name)
                else:
                    self._quick.write(name, content)
                files[name] = signature
            while self._removals:
                self._objects.delete(self._removals[0])
                self._removals.pop(0)
        finally:
            if changed:
                self._save_state()

    def _read(self, name: str) -> tuple[tuple[int, int] | None, bytes | None]:
        """(signature, what to send; None for the file as it is)."""
        path = self.folder / name
        signature = mirror_files.signature(path)
        return signature, None if signature is None else mirror_files.content(path)

    def _changed(self) -> list[str]:
        """Names of what differs from what was sent, what others depend on first: the studies, the files, the trials' results."""
        here = {name: mirror_files.signature(self.folder / name) for name in mirror_files.names(self.folder)}
        known = {name: tuple(value) for name, value in self._state["files"].items()}
        gone = [name for name in known if name not in here and (self._handing_over or not name.startswith(WINNER))]
        names = [name for name, signature in here.items() if known.get(name) != signature] + gone
        return sorted(names, key=lambda name: (mirror_files.rank(name), name))

    def _save_state(self) -> None:
        body = {"writer": self._state["writer"], "files": self._state["files"]}
        outputs.write_text(self.folder / MANIFEST, json.dumps(body))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return _parsed(path.read_bytes(), str(path)) if path.is_file() else {"files": {}}


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    """A manifest; {"files": {}, "damaged": sentence} of what is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {"files": {}, "damaged": f"{where} is damaged ({str(error)[:100]})"}
    files = found.get("files", {}) if isinstance(found, dict) else None
    whole = isinstance(files, dict) and all(isinstance(value, (list, tuple)) for value in files.values())
    if not whole or not isinstance(found.get("writer", ""), str):
        return {"files": {}, "damaged": f"{where} is damaged (it holds no list of files)"}
    return found | {"files": files}


@contextlib.contextmanager
def opened(experiment: Experiment, stop: threading.Event, say: Callable[[str], None]) -> Iterator[Mirror]:
    """The copy of the experiment's address, which this run holds until the end; the folder's own lock must be held.

    Raises ConfigError where another run has the address or an earlier run is in it (without `output.resume` and `output.overwrite`),
    StorageError where it cannot be reached. Where another run takes it over, `stop` is set.
    """
    store = buckets.open(experiment.output_address)
    store.check()
    mirror_objects.check(store, overwrite=experiment.output.overwrite, resume=experiment.output.resume)  # before the lease is an object there
    lease = Lease(store)
    lease.take(say)
    stack = contextlib.ExitStack()
    try:
        output = experiment.output
        mirror_objects.check(store, overwrite=output.overwrite, resume=output.resume)
        folder = experiment.output_dir.absolute()
        stack.enter_context(ownership.active(folder, "mirror"))
        copy = Mirror(folder, store, lease)
        copy.take_up(say, resume=output.resume)

        def lost() -> None:
            log.warning("another run took %s over; this one ends", store.shown)
            stop.set()

        lease.start(lost)
        yield copy
    finally:
        stack.close()
        try:
            lease.release()
        except StorageError as error:
            log.warning("%s; the next run waits until this one's hold has lapsed", error)


def begun(experiment: Experiment) -> bool:
    """Whether there is a run at the experiment's address, or in this machine's copy of it. Raises ConfigError, StorageError."""
    return (experiment.output_dir / CONFIG).is_file() or buckets.open(experiment.output_address, patience=5.0).exists(CONFIG)


def read_config(address: str) -> Path:
    """The resolved config of the run at an address, fetched into this machine's copy. Raises ConfigError where there is no run."""
    store = buckets.open(address, patience=5.0)
    folder = cache.staging(addresses.checked(address)).absolute()
    text = store.read(CONFIG)
    if text is None:
        if (folder / CONFIG).is_file() and _read_manifest(folder).get("writer"):
            return folder / CONFIG  # a run that never reached the store
        raise ConfigError(f"{store.shown} holds no {CONFIG}, so there is no run to resume; give the output.dir of a run")
    with ownership.active(folder, "mirror"):
        return outputs.write_bytes(folder / ".theirs" / CONFIG, text)
