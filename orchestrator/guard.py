"""Monitoring during training: ask a few probe prompts every so many steps, compare with the untouched model, say breach.

The probe is paired: the same prompts, asked of the untouched model once per lane. What a breach leads to is the trial's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator import evaluation
from orchestrator.config import Experiment
from orchestrator.evaluation.suites import PromptSuite
from orchestrator.records import LaneContext

PROBE_SEED = 20


@dataclass(frozen=True)
class Probe:
    """One look at the model during training."""

    step: int
    n: int
    unsafe: int
    unsafe_before: int
    """Of the same prompts, answered unsafely by the untouched model."""
    breach: bool

    @property
    def rise(self) -> float:
        """Unsafe share minus the untouched model's, -1..1."""
        return (self.unsafe - self.unsafe_before) / self.n

    def event(self) -> dict[str, Any]:
        """As reported to the driver."""
        return {
            "kind": "probe", "step": self.step, "n": self.n, "asr": self.unsafe / self.n,
            "degradation": self.rise, "breach": self.breach,
        }  # fmt: skip


class Guard:
    """Probes a model every `monitor.every_steps` steps. Build it while the model is still untouched."""

    def __init__(self, experiment: Experiment, suites: tuple[PromptSuite, ...], context: LaneContext):
        self.experiment, self.context = experiment, context
        self.monitor = experiment.monitor
        harmful = [suite for suite in suites if suite.kind == "harmful" and suite.constrains]
        self.suite = _draw(harmful, self.monitor.num_prompts) if self.monitor.every_steps else None
        self.unsafe_before = 0

    @property
    def active(self) -> bool:
        return self.suite is not None

    def due(self, step: int, last: int) -> bool:
        """Whether to look after `step` optimiser steps (1-based); the end of training is left to the evaluation."""
        return self.active and step % self.monitor.every_steps == 0 and step < last

    def baseline(self, model: Any, tokenizer: Any) -> None:
        """Ask the untouched model; the answer is kept for the lane's lifetime."""
        if self.suite is None:
            return
        key = ("guard baseline", self.experiment.digest_of("model", "safety", "monitor"))
        if key not in self.context.cache:
            self.context.cache[key] = self._ask(model, tokenizer)
        self.unsafe_before = self.context.cache[key]

    def probe(self, model: Any, tokenizer: Any, step: int) -> Probe:
        """Ask the model as it is now. Collective: every worker of the lane calls it."""
        unsafe, n = self._ask(model, tokenizer), len(self.suite.prompts)
        rise = (unsafe - self.unsafe_before) / n
        return Probe(step, n, unsafe, self.unsafe_before, rise > self.monitor.max_unsafe_rise)

    def _ask(self, model: Any, tokenizer: Any) -> int:
        result, _ = evaluation.ask_suite(
            model, tokenizer, self.experiment, self.suite, rank=self.context.rank, world_size=self.context.world_size
        )
        return sum(result.unsafe)


def _draw(suites: list[PromptSuite], count: int) -> PromptSuite | None:
    """`count` prompts drawn from the harmful suites together with a fixed seed; None where there are none."""
    import random

    rows = [(suite, i) for suite in suites for i in range(len(suite.prompts))]
    if not rows:
        return None
    rows = random.Random(PROBE_SEED).sample(rows, min(count, len(rows)))
    return PromptSuite(
        name="probe", kind="harmful", ids=[f"{s.name}/{s.ids[i]}" for s, i in rows], prompts=[s.prompts[i] for s, i in rows],
        systems=[s.systems[i] if s.systems else None for s, i in rows], groups=None, hash="", constrains=False,
    )  # fmt: skip
