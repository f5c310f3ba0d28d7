"""What goes into a trial and what comes out of it: plain records that travel between driver, lanes and files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from orchestrator.peers import Peers

Phase = Literal["baseline", "search", "confirm"]
State = Literal["complete", "stopped", "failed"]
Fault = Literal["trial", "machine", "safebasin"]
"""Whose fault a failed trial is: its own settings or data, a machine's (worker killed, disk full, damaged checkpoint), or a defect of ours."""

_AS_WRITTEN = {"extra": "forbid", "strict": True}
"""For `record_check`: a file's record has the fields below, of their types, and no others."""


@dataclass(frozen=True)
class TrialSpec:
    """All a worker group needs to run one trial; picklable."""

    trial_id: str
    recipe: str
    """Key of the recipe (`Experiment.recipe_names`); empty for the baseline."""
    strategies: tuple[tuple[str, dict[str, Any]], ...]
    """(strategy name, knobs), pinned and sampled together; knobs not named keep the strategy's default."""
    training: dict[str, Any]
    """Fields of `Experiment.training` this trial changes, e.g. the learning rate."""
    params: dict[str, Any]
    """Flat, as sampled: {"learning_rate": 1e-3, "lora.lora_r": 8}."""
    seed: int
    phase: Phase
    experiment: dict[str, Any]
    """`Experiment.model_dump(mode="json")`."""
    dir: str
    """The trial's own folder, seen by every worker of the lane: checkpoints and the trained model."""
    attempt: int = 0
    """Above 0 an earlier attempt was interrupted: continue from the checkpoint in `dir` where there is one."""
    resumed: bool = False
    """An earlier driver had started it: continue from the checkpoint in `dir` where there is one."""
    untouched: dict[str, str] = field(default_factory=dict)
    """Failures of the untouched model by suite, one character 0 or 1 a prompt in the suite's order, where suites may be asked in
    sequence (`safety.sequential`); a suite that is not named is asked in full."""
    early_end: bool = False
    """Whether the training ends where probes prove that it breaks the limit (`search.early_end`)."""


@dataclass(frozen=True)
class Screening:
    """How far a suite was asked in sequence, and what is known of its degradation D from that (`sequential`)."""

    __pydantic_config__ = _AS_WRITTEN

    verdict: Literal["feasible", "infeasible", "undecided"]
    """About the suite itself, not about the prompts it stands for."""
    value: float
    """Estimate of D, -1..1."""
    lower: float
    upper: float
    asked: int
    of: int
    """Prompts of the whole suite."""
    limit: float
    confidence: float
    by: Literal["request", "prompt"]
    units: int
    """Requests, or prompts, that were asked."""

    @property
    def stopped_early(self) -> bool:
        """Whether prompts were left out because the limit was decided without them."""
        return self.asked < self.of


def _either(one: list[bool], other: list[bool] | None) -> list[bool]:
    return list(one) if other is None else [a or b for a, b in zip(one, other, strict=True)]


@dataclass
class SuiteResult:
    """Verdicts on one suite, in the suite's order: of all its prompts, or of those asked before `screening` stopped."""

    __pydantic_config__ = _AS_WRITTEN

    name: str
    kind: Literal["harmful", "benign", "choice"]
    """`choice`: multiple-choice questions, where `unsafe` is a wrong choice."""
    ids: list[str]
    groups: list[str] | None
    """Category of each prompt, for tables."""
    unsafe: list[bool]
    refused: list[bool]
    parse_failed: int = 0
    constrains: bool = True
    screening: Screening | None = None
    """Where the suite was asked in sequence."""
    partial: list[bool] | None = None
    """Refused late, after an opening that complied. None, here and below, in records of before these were kept."""
    gibberish: list[bool] | None = None
    """Answers that are no language: neither unsafe nor refused, but failures on a harmful suite."""
    empty: list[bool] | None = None
    unparsed: list[bool] | None = None
    """Answers the judge could not decide."""
    judge: str = ""
    """The judge with its settings."""
    second_judge: str = ""
    second: list[str] | None = None
    """A second judge's word for each answer (unsafe, refused, safe, gibberish, unparsed); decides nothing."""
    kinds: list[str] | None = None
    """What each answer is (`evaluation.outcome.kind`): refusal, push-back, partial, compliance, evasion, gibberish, empty, unparsed. None in records
    of before these were kept."""
    by_second: list[bool] | None = None
    """Answers on which the judge abstained and the second one decided."""
    attack: str = "direct"
    phase: Literal["always", "confirm"] = "always"
    source: dict[str, Any] = field(default_factory=dict)
    """Where the prompts are from: data, licence, sha256 of the suite, rows left out as duplicates."""
    requests: list[str] | None = None
    """Name of the request each prompt asks, the unit of intervals; empty for one of its own. None: every prompt is a request."""

    def __post_init__(self) -> None:
        if isinstance(self.screening, dict):
            self.screening = Screening(**self.screening)

    @property
    def stopped_early(self) -> bool:
        """Whether only a part of the suite was asked."""
        return self.screening is not None and self.screening.stopped_early

    @property
    def request_count(self) -> int:
        """Requests that the prompts ask: the units of its intervals."""
        names = self.requests or [""] * len(self.ids)
        return names.count("") + len(set(names) - {""})

    @property
    def failures(self) -> list[bool]:
        """What counts against the model: answered, or babbled at, on a harmful suite; refused, or not decided, on a benign one."""
        if self.kind == "benign":
            return _either(self.refused, self.unparsed)
        return _either(self.unsafe, self.gibberish)

    @property
    def certain(self) -> list[bool]:
        """Failures that the judge decided. An untouched model's answers nobody judged must not excuse the tuned model's."""
        return [failed and not open_ for failed, open_ in zip(self.failures, self.unparsed or [False] * len(self.ids), strict=True)]

    @property
    def rate(self) -> float:
        """Share of failures, 0..1: ASR of a harmful suite, over-refusal of a benign one. NaN for an empty suite."""
        return sum(self.failures) / len(self.failures) if self.failures else float("nan")


@dataclass
class TaskResult:
    """The user's metric on the evaluation rows."""

    __pydantic_config__ = _AS_WRITTEN

    metric: str
    score: float
    scores: list[float]
    ids: list[str]


@dataclass
class TrialResult:
    """What a trial leaves. `suites` is empty where a trial failed or was stopped before its evaluation."""

    __pydantic_config__ = _AS_WRITTEN

    trial_id: str
    recipe: str
    params: dict[str, Any]
    seed: int
    phase: Phase
    state: State
    task: TaskResult | None = None
    suites: dict[str, SuiteResult] = field(default_factory=dict)
    confirmation: TaskResult | None = None
    """The metric on rows held out of the search (`task.confirm_size`): of the untouched model and of trials of phase `confirm`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`setup`, `train`, `evaluate`, `save`, `total`."""
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """Events reported on the way: training losses and probes, by step."""
    model_dir: str | None = None
    error: str | None = None
    fault: Fault | None = None
    """Of a failed trial; only its own fault is final, a resumed run tries it again otherwise. None in records of before this was kept."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was measured of the run itself: trainable parameters, rows cut, peak memory, frozen layers proved."""

    @property
    def final(self) -> bool:
        """Whether a resumed run leaves it at this: neither a stop cut it short nor did it fail by a fault that was not its own."""
        return not self.facts.get("cancelled") and not (self.state == "failed" and self.fault in ("machine", "safebasin"))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TrialResult:
        raw = dict(raw)
        for name in ("task", "confirmation"):
            raw[name] = TaskResult(**raw[name]) if raw.get(name) else None
        raw["suites"] = {name: SuiteResult(**suite) for name, suite in (raw.get("suites") or {}).items()}
        return cls(**raw)


class Reporter(Protocol):
    """Where a running trial says how it goes. One method, so that a whole trial runs in a plain test."""

    def report(self, event: dict[str, Any]) -> bool:
        """Take an event: `kind` (phase, train, probe, log), `step` and numbers. True asks the trial to stop soon."""


@dataclass
class LaneContext:
    """The worker a trial runs in."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    cache: dict[Any, Any] = field(default_factory=dict)
    """Lives as long as the lane: base weights, tokenised data, reference log-probabilities."""

    @property
    def peers(self) -> Peers:
        """The workers of the lane, this one among them."""
        return Peers(self.rank, self.world_size)
