"""Gradient surgery: take out of the task's gradient what works against safety, and add a step towards the aligned model.

Stage: during training, at every optimiser step.
Paper: Yi et al., "Gradient Surgery for Safe LLM Fine-Tuning" (SafeGrad), arXiv 2508.07172.
Reference: anonymous archive of the authors, which could not be read; described after the ports min-seong-kim/Safety-WaRP-LLM and
    Lexsi-Labs/SafeTune, both read.
Idea: with the task's gradient g_u and the alignment gradient g_a: where <g_u, g_a> < 0, remove from g_u its part along g_a; then
    g = g_u + rho * g_a. g_a is that of KL(aligned model || model) on the answers of a few safety rows.
Knobs: rho - weight of the alignment gradient (paper 1, useful 0.1 to 5). loss - kl, or sft (cross-entropy on the safe answer).
    temperature - of the KL. mask - response tokens, or all tokens. num_safety - safety rows in the alignment set (kl works from 10 to 20,
    sft needs 100). safety_batch_size - of them per step (as many as task rows without it). interval - steps between surgeries.
    projection - off leaves the weighted sum, the paper's ablation. (interval and safety_batch_size are ours: the paper operates at every
    step with as many safety rows as task rows.)
Cost: a second forward and backward per step, about 2 times the time, less with a larger interval or a smaller safety_batch_size; up to 3
    gradients held at a time, each sharded as the ZeRO stage shards it. Reference log-probabilities: rows x answer tokens x vocabulary x
    4 bytes of host memory, once per lane and shared by its trials, up to 1 GiB of them on the device too. No second model, with lora or
    without.
Needs: safety rows (safety.data).
Limits: made for clean or mildly poisoned data; weak on small models under heavy attack in other groups' re-runs. Over-refusal rises.
Interacts: every ZeRO stage; with lora the alignment gradient is zero at the first step and nothing is removed there. Clipping
    comes after. Gradients are summed over micro-batches and workers first, then operated on once.
Deviations: the reference is not a second model in memory but log-probabilities taken once from the untouched model. The KL is a mean over
    answer tokens (mask=all: over every token that is not padding), softmax in float32; the reference code sums over all positions, padding
    too. Only the global inner product of the paper, no per-layer variant. Compared with the surgery of the first port on 50 random pairs of
    gradients, 27 of them in conflict: within 5e-7 (float32 sums there, float64 here). Its KL takes the logits at the answer's own
    positions, so the one that predicts the first answer token is left out; ours are shifted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strategies import gradients, rows
from strategies.base import IGNORE, Batch, Engine, Example, Forward, Strategy, StrategyError, TrainingData, lm_loss

SMALLEST = 1e-9
"""Squared norm of the alignment gradient from which on it has a direction (paper)."""
RESIDENT = 1 << 30
"""Bytes of reference up to which it stays on the model's device; a larger one stays on the host and is copied row by row."""


def surgery_coefficients(dot: float, safety_sq_norm: float, rho: float, projection: bool = True) -> tuple[float, float]:
    """(c_task, c_safety) such that the surgery's result is c_task * g_u + c_safety * g_a (Eq. 4 and 5).

    `dot` is <g_u, g_a>, `safety_sq_norm` is <g_a, g_a>. The removed part may carry a large coefficient where g_a is small; its
    length never exceeds that of g_u, so it is not clamped.
    """
    conflict = projection and dot < 0 and safety_sq_norm > SMALLEST
    return 1.0, rho + (-dot / safety_sq_norm if conflict else 0.0)


def combine(task: gradients.Gradients, safety: gradients.Gradients, rho: float, projection: bool = True) -> dict[str, Tensor]:
    """The surgery on {parameter name: gradient}: one inner product over all parameters. Raises ValueError for different names."""
    _, dot, safety_sq_norm = gradients.gram(task, safety)
    c_task, c_safety = surgery_coefficients(dot, safety_sq_norm, rho, projection)
    return gradients.linear([(c_task, task), (c_safety, safety)])


def positions(batch: Batch, mask: str) -> Tensor:
    """(R, L-1) bool: where the next token counts. `response`: it is labelled; `all`: it is no padding. Rows without labels: nowhere."""
    labels, attention = batch["labels"][:, 1:], batch["attention_mask"][:, 1:]
    labelled = labels != IGNORE
    return labelled if mask == "response" else (attention > 0) & labelled.any(dim=1, keepdim=True)


def kl_sum(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """Sum over N tokens of KL(reference || model), in float32.

    logits (N, V) of the model; reference (N, V) log-probabilities of the aligned model at temperature 1. Both are softened by
    `temperature` (log-probabilities divided by T and normalised again are those of logits divided by T).
    """
    ours = torch.log_softmax(logits.float() / temperature, dim=-1)
    theirs = reference.float() if temperature == 1 else torch.log_softmax(reference.float() / temperature, dim=-1)
    return nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)


class SafeGrad(Strategy):
    """Two gradients per step, one surgery."""

    name = "safegrad"
    needs = frozenset({"safety"})
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        rho: float = field(default=1.0, metadata={"help": "Weight of the alignment gradient."})
        loss: Literal["kl", "sft"] = field(default="kl", metadata={"help": "`kl` to the untouched model, or `sft` on the safe answer."})
        temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL."})
        mask: Literal["response", "all"] = field(default="response", metadata={"help": "Tokens the KL is taken on."})
        num_safety: int = field(default=100, metadata={"help": "Safety rows in the alignment set."})
        safety_batch_size: int | None = field(default=None, metadata={"help": "Safety rows per step; as many as task rows without it."})
        interval: int = field(default=1, metadata={"help": "Steps between surgeries; the steps between are plain."})
        projection: bool = field(default=True, metadata={"help": "Remove the conflicting part; false leaves the weighted sum."})

        def __post_init__(self):
            if self.rho < 0:
                raise StrategyError(f"safegrad.rho={self.rho} is negative, which would train away from safety; use 0.1 to 5")
            if self.temperature <= 0:
                raise StrategyError(f"safegrad.temperature={self.temperature} must be above 0")
            for knob in ("num_safety", "interval", "safety_batch_size"):
                value = getattr(self, knob)
                if value is not None and value < 1:
                    raise StrategyError(f"safegrad.{knob}={value} must be at least 1")

    def __init__(self, config=None):
        super().__init__(config)
        self.rows: tuple[Example, ...] = ()
        self._reference: list[Tensor] = []
        self.surgeries = self.conflicts = 0

    @property
    def idle(self) -> bool:
        """Strength zero: plain fine-tuning, without the second gradient."""
        return self.config.rho == 0 and not self.config.projection

    def take_rows(self, data: TrainingData) -> None:
        self.data, self.rows = data, rows.refusals(data, self.config.num_safety, self.name)

    def setup(self, model: nn.Module) -> nn.Module:
        if self.config.loss == "kl" and not self.idle:
            self._remember(model)
        return model

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        loss = engine.gradient(batches)
        if self.idle or step % self.config.interval:
            return {"loss": loss}
        task = engine.gradients()
        safety_batches = self.data.batches(self.rows, step, "safegrad", self.config.safety_batch_size)
        safety_loss = engine.gradient(safety_batches, self._kl if self.config.loss == "kl" else lm_loss)
        safety = engine.gradients()
        task_sq, dot, safety_sq = task.gram(safety)
        c_task, c_safety = surgery_coefficients(dot, safety_sq, self.config.rho, self.config.projection)
        engine.combine([(c_task, task), (c_safety, safety)])
        return {"loss": loss, "safety_loss": safety_loss, **self._log(dot, task_sq, safety_sq, c_safety)}

    def _log(self, dot: float, task_sq: float, safety_sq: float, c_safety: float) -> dict[str, float]:
        directed = safety_sq > SMALLEST  # at the first step the KL's gradient is round-off
        conflict = dot < 0 and directed
        self.surgeries += 1
        self.conflicts += conflict
        norms = math.sqrt(task_sq) * math.sqrt(safety_sq) if directed else 0.0
        removed = (c_safety - self.config.rho) * math.sqrt(safety_sq) / math.sqrt(task_sq) if task_sq > 0 else 0.0
        return {
            "conflict": float(conflict), "conflict_rate": self.conflicts / self.surgeries, "cosine": dot / norms if norms > 0 else 0.0,
            "task_grad_norm": math.sqrt(task_sq), "safety_grad_norm": math.sqrt(safety_sq), "removed_ratio": removed,
        }  # fmt: skip

    def _kl(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        where = positions(batch, self.config.mask)
        logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        # a row that only keeps workers in step has no position, hence no reference
        drawn = [row for row, any_ in zip(batch["rows"].tolist(), where.any(dim=1).tolist(), strict=True) if any_]
        if not drawn:
            return logits.float().sum() * 0.0, where.sum()
        reference = torch.cat([self._reference[row] for row in drawn]).to(logits.device)
        return kl_sum(logits[where], reference, self.config.temperature), where.sum()

    @torch.no_grad()
    def _remember(self, model: nn.Module) -> None:
        """The untouched model's log-probabilities of the alignment rows, (tokens, V) float32 each, those not yet in the lane's cache."""
        keys = [("safegrad reference", self.data.fingerprint, self.config.mask, rows.content([row])) for row in self.rows]
        missing = [i for i, key in enumerate(keys) if key not in self.data.cache]

        def look(output: Any, batch: Batch) -> list[Tensor]:
            where = positions(batch, self.config.mask)
            return [torch.log_softmax(one[kept].float(), dim=-1) for one, kept in zip(output.logits[:, :-1], where, strict=True)]

        found = rows.read(model, [self.rows[i] for i in missing], self.data, look)
        self.data.cache.update(zip([keys[i] for i in missing], found, strict=True))
        self._reference = [self.data.cache[key] for key in keys]
        if sum(t.numel() * t.element_size() for t in self._reference) <= RESIDENT:
            self._reference = [t.to(self.data.device) for t in self._reference]

    def facts(self):
        return {"alignment_rows": len(self.rows), "surgeries": self.surgeries, "conflicts": self.conflicts}

    def state_dict(self) -> dict[str, Any]:
        return {"surgeries": self.surgeries, "conflicts": self.conflicts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.surgeries, self.conflicts = int(state["surgeries"]), int(state["conflicts"])
