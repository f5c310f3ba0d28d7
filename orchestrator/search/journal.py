"""The Optuna journal of a search: a cache of what the trial records say, for `optuna-dashboard` and the like, never the truth.

The studies live in memory and every change is also appended to the file. Where the file cannot be written or read any more (disk full,
folder read-only, line torn, file gone) one warning is logged and the search goes on in memory: the records alone decide a resume.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from orchestrator.config import Experiment
from orchestrator.errors import StorageError
from orchestrator.storage import nofollow
from orchestrator.trial.record_check import move_aside

log = logging.getLogger(__name__)

Say = Callable[[str], None]


def storage_path(experiment: Experiment) -> Path:
    """Where the Optuna journal is."""
    return Path(experiment.search.storage) if experiment.search.storage else experiment.output_dir / "study.journal"


class Kept(BaseJournalBackend):
    """A journal file with everything in memory as well: `detached` (a reason) once the file failed. Used by one process at a time for its
    studies; other processes' studies in the same file are followed until then."""

    def __init__(self, path: Path | None):
        self.path = path
        self.detached: str | None = None if path is not None else "memory only"
        self.opening = True
        """While it is opened, trouble is the caller's to deal with."""
        self._file = None if path is None else JournalFileBackend(str(path))
        self._known: list[dict[str, Any]] = []
        self._sent: list[dict[str, Any]] = []  # in the file, and not read back yet

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if self.detached is None:
            try:
                self._still_a_file()
                fresh = list(self._file.read_logs(len(self._known)))
                others = iter(fresh)  # of other studies in the file, between ours
                if not all(any(one == sent for one in others) for sent in self._sent):
                    raise ValueError("what was written to it is not there")
                self._known += fresh
                self._sent = []
            except (OSError, ValueError, KeyError) as error:
                self._detach(error)
        yield from self._known[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        logs = json.loads(json.dumps(logs))
        if self.detached is None:
            try:
                self._still_a_file()
                self._file.append_logs(logs)
            except (OSError, RuntimeError) as error:  # Optuna's lock ends in RuntimeError where its folder cannot be written
                self._detach(error)
            else:
                self._sent += logs
                return
        self._known += logs

    def _still_a_file(self) -> None:
        """Whatever was put in its place in the meantime is not waited for. Raises OSError."""
        if os.path.lexists(self.path):
            nofollow.check_regular(self.path, nofollow.MOST_JOURNAL)

    def _detach(self, error: Exception) -> None:
        if self.opening:
            raise error
        self._known += self._sent
        self._sent = []
        self.detached = str(error)
        log.warning("%s cannot be written or read any more (%s); the search goes on, its records are in trials/", self.path, _reason(error))


def open_storage(experiment: Experiment) -> optuna.storages.BaseStorage:
    """The experiment's Optuna journal. Raises StorageError where its folder cannot be written, or something else lies there."""
    path = storage_path(experiment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _opened(path)
    except OSError as error:
        raise StorageError(f"cannot write the search's journal {path}: {error}; set search.storage or output.dir") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise StorageError(
            f"{path} is no journal of a search, or is damaged; restore it, or set search.storage or output.dir to another place"
        ) from error


def reopen(experiment: Experiment, names: list[str], say: Say) -> optuna.storages.BaseStorage:
    """A journal without our studies, to build them anew in: the one of before where it is whole, else a new one, else memory.

    A damaged one is moved aside, never deleted, and `say` is told in a sentence. What is no journal at all stays where it is if
    `search.storage` named it. Never raises for what lies there.
    """
    path = storage_path(experiment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _free_lock(experiment, path, say)
        if not os.path.lexists(path) or path.is_file() and not path.stat().st_size:
            say(f"{path} is gone or empty; the search is rebuilt from the trial records")
            return _opened(path)
        storage = _emptied(path, names)
    except Exception as error:  # whatever a damaged log makes Optuna raise, the records hold the search
        trouble = _reason(error)
    else:
        return storage
    try:
        if experiment.search.storage and not _is_journal(path):
            raise OSError("it is no journal and is left alone")
        aside = move_aside(path)
        say(f"{path} is damaged ({trouble}) and was moved to {aside.name}; the search is rebuilt from the trial records")
        return _opened(path)
    except (OSError, StorageError) as error:
        say(f"warning: {path} cannot be used ({_reason(error)}); the search is rebuilt from the trial records and goes on without a journal")
        return optuna.storages.JournalStorage(Kept(None))  # append_logs and read_logs then touch memory alone


def _free_lock(experiment: Experiment, path: Path, say: Say) -> None:
    """Take away Optuna's lock of a driver that died, and what is no lock: both would be waited for, half a minute and without a word.

    In the output folder nobody else holds one, since that folder's own lock is held. Elsewhere it may be a living program's. Raises OSError,
    StorageError.
    """
    lock = path.with_name(f"{path.name}.lock")
    if not os.path.lexists(lock):
        return
    if path.parent.absolute() != experiment.output_dir.absolute():
        if lock.is_dir() and not lock.is_symlink():
            raise OSError(f"{lock.name} is a folder, no lock; move it away")
        say(f"warning: {lock} is there; if no program uses this journal, remove it (it is waited for up to 30 seconds)")
    elif lock.is_symlink() and os.readlink(lock) == str(path):
        lock.unlink()
    else:
        aside = move_aside(lock)
        say(f"warning: {lock} was no lock of this search's journal and was moved to {aside.name}")


def _opened(path: Path) -> optuna.storages.BaseStorage:
    """The journal at `path`, which is made where there is none. Raises what Optuna raises for one that is damaged."""
    if os.path.lexists(path):
        nofollow.check_regular(path, nofollow.MOST_JOURNAL)
    backend = Kept(path)
    with nofollow.regular(path, nofollow.MOST_JOURNAL) as file:
        for number, line in enumerate(file, 1):  # Optuna skips a last line that it cannot read, and goes on writing on it
            if not line.endswith(b"\n"):
                raise ValueError("its last line is torn")
            found = json.loads(line)
            if not isinstance(found, dict) or not isinstance(found.get("op_code"), int):
                raise ValueError(f"line {number} is no entry of a journal")
    storage = optuna.storages.JournalStorage(backend)
    backend.opening = False
    return storage


def _emptied(path: Path, names: list[str]) -> optuna.storages.BaseStorage:
    """The journal at `path` with our studies taken out of it."""
    storage = _opened(path)
    storage._backend.opening = True
    there = {study.study_name for study in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    missing = [name for name in names if name not in there]
    if missing and not there - set(names):  # beside others' studies ours may never have been there
        raise ValueError(f"it holds no study {missing[0]!r}")
    for name in there & set(names):
        optuna.delete_study(study_name=name, storage=storage)
    storage._backend.opening = False
    return storage


def _is_journal(path: Path) -> bool:
    """Whether a file begins like a journal of Optuna's, or is empty."""
    if not path.is_file():
        return False
    with nofollow.regular(path, nofollow.MOST_JOURNAL) as file:
        start = file.read(64)
    return not start.strip(b"\0") or start.startswith(b'{"op_code"') or b'"op_code":' in start


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return (text.split("\n")[0] or type(error).__name__)[:200]
