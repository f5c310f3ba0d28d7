"""Lazy safety alignment: alternate steps on safety rows and on the task, each state held near where the other one ended.

Stage: during training, at every optimiser step.
Paper: Huang et al., "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack", NeurIPS 2024,
    arXiv 2405.18641.
Reference: git-disl/Lisa (trainer.py at 68e3659), read and run.
Idea: align_steps steps on safety rows, then task_steps steps on the task, and so on. After the first tenth of the training each step adds
    (rho / 2) |weights - anchor|^2 to its loss, the anchor being the weights at the last switch.
Knobs: rho - of the proximal term (paper 1, range 0 to 10). align_steps, task_steps - length of the two states (paper 100 and 900; ours 2
    and 18, the same proportion for short trainings). start - share of the training before the proximal term acts (code 0.1).
    num_safety - safety rows (paper 10000; all without it).
Cost: none in forwards and backwards; align_steps of every align_steps + task_steps steps do not see the task. One float32 copy of what is
    trained, sharded as the ZeRO stage shards.
Needs: safety rows (safety.data).
Limits: rho 1 cost much accuracy in another group's re-run on GSM8K. The result is better taken at the end of a task state.
Interacts: every ZeRO stage. Owns the step, so not with another method that does. Adam's moments run on through the switches. With
    lora the proximal term is on the adapters' factors, as in the official code.
Deviations: states are counted in optimiser steps, not micro-batches. The proximal gradient rho (weights - anchor) is added to the
    accumulated gradient, once per step, not per micro-batch. Compared with the official training_step on a linear model, 24 steps of SGD,
    states of 2 and 5 steps, rho 0.7: the same states at every step, weights within 1e-8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from strategies import gradients, rows
from strategies.base import Batch, Engine, Example, Strategy, StrategyError, TrainingData


def aligning(step: int, align_steps: int, task_steps: int) -> bool:
    """Whether step `step` (from 0) belongs to the alignment state, which comes first in each round."""
    return step % (align_steps + task_steps) < align_steps


def switches(step: int, align_steps: int, task_steps: int) -> bool:
    """Whether the state at `step` is another than at the step before; the first step counts as a switch."""
    return step == 0 or aligning(step, align_steps, task_steps) != aligning(step - 1, align_steps, task_steps)


def proximal(weights: gradients.Gradients, anchor: gradients.Gradients, rho: float) -> dict[str, Tensor]:
    """Gradient of (rho / 2) |weights - anchor|^2 over all tensors, {name: rho * (weights - anchor)}. Raises ValueError for different
    names."""
    return gradients.linear([(rho, weights), (-rho, anchor)])


class Lisa(Strategy):
    """Two states, one anchor."""

    name = "lisa"
    needs = frozenset({"safety"})

    @dataclass(frozen=True)
    class Config:
        rho: float = field(default=1.0, metadata={"help": "Weight of the proximal term."})
        align_steps: int = field(default=2, metadata={"help": "Steps of the alignment state; 0 is plain fine-tuning."})
        task_steps: int = field(default=18, metadata={"help": "Steps of the task state."})
        start: float = field(default=0.1, metadata={"help": "Share of the training before the proximal term acts."})
        num_safety: int | None = field(default=None, metadata={"help": "Safety rows; all of them without it."})

        def __post_init__(self):
            if self.rho < 0:
                raise StrategyError(f"lisa.rho={self.rho} is negative, which would drive the states apart; use 0 to 10")
            if self.align_steps < 0 or self.task_steps < 1:
                raise StrategyError(f"lisa.align_steps={self.align_steps}, lisa.task_steps={self.task_steps}; at least 0 and 1 are wanted")
            if not 0 <= self.start <= 1:
                raise StrategyError(f"lisa.start={self.start} must be in [0, 1]")
            if self.num_safety is not None and self.num_safety < 1:
                raise StrategyError(f"lisa.num_safety={self.num_safety} must be at least 1")

    def __init__(self, config=None):
        super().__init__(config)
        self.rows: tuple[Example, ...] = ()
        self._anchor: tuple[Tensor, ...] = ()
        self.aligned = self.switched = 0

    def take_rows(self, data: TrainingData) -> None:
        self.data, self.rows = data, rows.refusals(data, self.config.num_safety, self.name)

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        knobs = self.config
        if knobs.align_steps == 0:
            return {"loss": engine.gradient(batches)}
        safe = aligning(step, knobs.align_steps, knobs.task_steps)
        if switches(step, knobs.align_steps, knobs.task_steps):
            self._anchor = engine.weights().parts if knobs.rho > 0 else ()
            self.switched += step > 0
        loss = engine.gradient(self.data.batches(self.rows, step, "lisa") if safe else batches)
        self.aligned += safe
        metrics = {"loss": loss, "aligning": float(safe)}
        if knobs.rho > 0 and step > knobs.start * engine.max_steps:
            now = engine.weights()
            pull = engine.linear([(knobs.rho, now), (-knobs.rho, now.like(self._anchor))])
            metrics["drift"] = pull.norm() / knobs.rho
            engine.combine([(1.0, engine.gradients()), (1.0, pull)])
        return metrics

    def facts(self):
        return {"safety_rows": len(self.rows), "alignment_steps": self.aligned, "switches": self.switched}

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": list(self._anchor), "aligned": self.aligned, "switched": self.switched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._anchor, self.aligned, self.switched = tuple(state["anchor"]), int(state["aligned"]), int(state["switched"])
