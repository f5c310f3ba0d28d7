"""What an evaluation asked and found, and its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.decision.limits import Constraint, Verdict
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.models import subjects
from orchestrator.records import TrialResult
from orchestrator.trial import record_check
from orchestrator.trial.record_check import BadRecord

if TYPE_CHECKING:

    pass


FILE = "evaluation.json"


FORMAT = 1


@dataclass(frozen=True)
class Request:
    """Which model is measured, against which, and where the files go."""

    model: str
    """Folder, hub id, `pocket...`, or a PEFT adapter folder."""
    baseline: str | None = None
    """The untouched model; also what an adapter is put on."""
    output: Path | None = None
    """Folder; `outputs/evaluation-<model>` without it."""
    task: bool = True
    """Measure the task's metric too, where the config names a task."""

    @property
    def folder(self) -> Path:
        return self.output if self.output is not None else Path("outputs") / f"evaluation-{subjects.slug(self.model)}"


@dataclass(frozen=True)
class Evaluated:
    """What was measured and decided."""

    experiment: Experiment
    model: dict[str, str]
    """As `subjects.identity`."""
    baseline: dict[str, str] | None
    result: TrialResult
    before: TrialResult | None
    constraints: tuple[Constraint, ...]
    """Empty without a baseline, or where no suite constrains."""

    @property
    def verdict(self) -> Verdict | None:
        """None where there is nothing to decide by; else infeasible, undecided or feasible, the worst of the constraints."""
        found = {c.verdict for c in self.constraints}
        return next((v for v in ("infeasible", "undecided", "feasible") if v in found), None)

    @property
    def exit_code(self) -> int:
        """3 where limits were applied and not all were clearly kept, 1 where no limit had a figure to be held against, else 0."""
        if self.constraints and not any(c.estimate.n for c in self.constraints):
            return 1
        return 3 if self.verdict in ("infeasible", "undecided") else 0

    @property
    def labels(self) -> tuple[str, str | None]:
        """How tables call the model and the baseline: short where that tells them apart."""
        own, base = self.model["name"], self.baseline["name"] if self.baseline else None
        short = subjects.label(own), subjects.label(base) if base is not None else None
        return short if short[0] != short[1] else (own, base)


def read(path: Path) -> tuple[dict[str, Any], TrialResult]:
    """(the whole content, the model's record) of an evaluation.json. Raises ConfigError for any other file, StorageError."""
    body = record_check.read_json(path)
    if not isinstance(body, dict) or "result" not in body or body.get("format") != FORMAT:
        raise ConfigError(f"{path} is no evaluation.json of this version; write one with: safebasin evaluate MODEL -o DIR")
    named = isinstance(body.get("model"), dict) and isinstance(body["model"].get("name"), str)
    try:
        result = record_check.result_of(body["result"], "its result")
        trouble = None if named and isinstance(body.get("settings"), dict) else "it names no model or settings"
    except BadRecord as error:
        trouble = str(error)
    if trouble:
        raise SafebasinError(f"{path} cannot be read as an evaluation: {trouble}; write it anew with safebasin evaluate")
    return body, result
