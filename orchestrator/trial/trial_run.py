"""One trial on one worker as an object: what was asked, what it works with, what it says, and what becomes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config import Experiment
from orchestrator.records import LaneContext, Reporter, TrialResult, TrialSpec
from orchestrator.trial.files import TrialFiles
from orchestrator.trial.materials import Materials

STOPPED = "stopped on request"


class Stopped(Exception):
    """The trial ends before its last step, and why."""


class Clock:
    """Seconds by part of the trial."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self._start}


@dataclass
class TrialRun:
    """A trial under way. Its methods are collective where they say so."""

    spec: TrialSpec
    experiment: Experiment
    context: LaneContext
    reporter: Reporter
    files: TrialFiles
    result: TrialResult
    materials: Materials = field(init=False)
    """Loaded when the trial begins."""
    tokenizer: Any = field(init=False)
    clock: Clock = field(default_factory=Clock)
    training_prompt: str | None = None
    """System prompt of the rows trained on."""

    @property
    def facts(self) -> dict[str, Any]:
        """Of the record."""
        return self.result.facts

    @property
    def folder(self) -> Path:
        """The trial's own folder on this worker."""
        return self.files.dir

    def tell(self, event: dict[str, Any]) -> None:
        """Report on worker 0, keep the history, and agree with the other workers on whether to stop. Collective.

        Raises Stopped on every worker where the reporter asks for it.
        """
        event = {"time": time.time(), **event}
        if event["kind"] != "phase":
            self.result.history.append(event)
        stop = bool(self.reporter.report(event)) if self.context.rank == 0 else False
        if self.context.peers.first(stop):
            raise Stopped(STOPPED)
