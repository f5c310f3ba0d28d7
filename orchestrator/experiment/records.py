"""A run's records as they lie in its folder or at its address, read without changing anything: for looking at a run that another process
drives, and for writing its report anew. What is damaged or of another run is named and not counted; going on with a run is `resume`'s."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.decision import limits
from orchestrator.decision.limits import Judgement
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.evaluation import held_out
from orchestrator.experiment import identity as run_identity
from orchestrator.records import TrialResult
from orchestrator.storage import addresses, buckets, lease
from orchestrator.storage.layout import CONFIG, LOCK, RESULT, SPEC
from orchestrator.trial import record_check
from orchestrator.trial.record_check import TRIAL_ID, BadRecord

Row = tuple[TrialResult, Judgement]
T = TypeVar("T")
_TOP = (CONFIG, run_identity.FILE, "baseline.json", "best.json")


@dataclass(frozen=True)
class RunRecords:
    """What a run left so far."""

    shown: str
    """Its folder or address."""
    experiment: Experiment
    baseline: TrialResult | None
    results: tuple[TrialResult, ...]
    """Trials that ended, in the order they did."""
    open: tuple[str, ...]
    """Ids of trials that were asked and have not ended."""
    handed_over: bool
    """Whether the run came to its end, or a stop, and wrote best.json."""
    written: float | None
    """When a record was last written, seconds since 1970; None where none was, or for an address."""
    content: dict[str, str] = field(default_factory=dict)
    """Hashes of what it works with."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages it was begun with; empty where nobody wrote them down."""
    troubles: tuple[str, ...] = ()

    def rows(self, under: config.Limits | None = None) -> list[Row]:
        """Trials with their verdicts under these limits, else the run's own. [] without a record of the untouched model."""
        if self.baseline is None:
            return []
        looks = held_out.looks(self.experiment)  # as the run itself did
        return [(result, limits.judge(result, self.baseline, under or self.experiment.safety.limits, looks)) for result in self.results]


def read(place: str) -> RunRecords:
    """The records in a folder or at an address. Raises ConfigError where there is no run, StorageError where a store is away."""
    if not addresses.is_address(place):
        return _read(Path(os.path.expanduser(place)), str(place))
    with tempfile.TemporaryDirectory(prefix="safebasin-look-") as folder:
        return _read(_fetched(place, Path(folder)), addresses.masked(place))


def _fetched(address: str, folder: Path) -> Path:
    store = buckets.open(addresses.checked(address), patience=5.0)
    for name in store.list():
        parts = name.split("/")
        if name in _TOP or len(parts) == 3 and parts[0] == "trials" and TRIAL_ID.fullmatch(parts[1]) and parts[2] in (RESULT, SPEC):
            store.get(name, folder / name)
    return folder


def _read(folder: Path, shown: str) -> RunRecords:
    troubles: list[str] = []
    begun = _tried(lambda: run_identity.read(folder), troubles)
    if begun is None and not (folder / CONFIG).is_file():
        raise ConfigError(f"{shown} holds no run ({CONFIG} and {run_identity.FILE} are not there); give the output folder or address of one")
    made = config.load(folder / CONFIG) if begun is None else _as_amended(config.from_dict(begun.config), folder / CONFIG)
    baseline = _tried(lambda: record_check.read_result(folder / "baseline.json"), troubles)
    ended, waiting = [], []
    for place in sorted((folder / "trials").glob("t*")):
        if not TRIAL_ID.fullmatch(place.name) or not place.is_dir():
            continue
        result = _tried(lambda place=place: _own(place, begun.run if begun else ""), troubles)
        if result is not None and result.final:
            ended.append(((place / RESULT).stat().st_mtime_ns, result))
        elif (place / SPEC).is_file():
            waiting.append(place.name)
    ended.sort(key=lambda pair: (pair[0], pair[1].trial_id))
    moments = [moment for moment, _ in ended] if not addresses.is_address(shown) else []
    return RunRecords(
        shown, made, baseline, tuple(result for _, result in ended), tuple(waiting), (folder / "best.json").is_file(),
        max(moments) / 1e9 if moments else None, begun.content if begun else {}, begun.versions if begun else {}, tuple(troubles),
    )  # fmt: skip


def _as_amended(begun: Experiment, path: Path) -> Experiment:
    """The resolved config, which says what a resume was given (more trials, other lanes); the one the run was begun with where a hand changed in
    it what figures depend on, or where it cannot be read."""
    try:
        now = config.load(path)
    except (ConfigError, OSError):
        return begun
    return begun if run_identity.changes(begun, now)[0] else now


def _own(place: Path, run: str) -> TrialResult | None:
    """A trial's record; None where it has not ended. Raises BadRecord for one that is another trial's or another run's."""
    result = record_check.read_result(place / RESULT)
    if result is None:
        return None
    asked = record_check.read_json(place / SPEC)
    if result.trial_id != place.name or isinstance(asked, dict) and run and asked.get("run") != run:
        raise BadRecord(f"{place / RESULT} is of another trial or run")
    return result


def _tried(read: Callable[[], T], troubles: list[str]) -> T | None:
    """What `read` returns; None, and a sentence more, where it finds a damaged or foreign record."""
    try:
        return read()
    except BadRecord as error:
        troubles.append(f"{error}; it is not counted")
        return None


def driven(place: str) -> bool:
    """Whether a process drives the run: its folder's lock is held, or the address's lease was renewed within `lease.STALE_S` seconds and not
    given back (by the clock of whoever holds it)."""
    if addresses.is_address(place):
        text = buckets.open(addresses.checked(place), patience=5.0).read(lease.NAME)
        held = json.loads(text) if text else {}
        return bool(held) and not held.get("released") and time.time() - float(held.get("time", 0)) < lease.STALE_S
    return any(_held(Path(os.path.expanduser(place)) / LOCK))


def _held(lock: Path) -> Iterator[bool]:
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield False
        except BlockingIOError:
            yield True
        finally:
            os.close(handle)


def pooled(runs: list[RunRecords]) -> None:
    """Refuse to put runs together whose untouched model or suites differ. Raises SafebasinError naming what does."""
    first = runs[0]
    for other in runs[1:]:
        keys = [key for key in ("model", "template", *(k for k in first.content if k.startswith("safety.suites."))) if key in first.content]
        differ = [key for key in keys if other.content.get(key) != first.content[key]]
        if differ or not first.content:
            what = ", ".join(differ) or "content that no record says"
            raise SafebasinError(f"{other.shown} and {first.shown} were measured with other {what}, so their trials cannot be compared")
