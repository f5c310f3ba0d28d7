"""Safety-projected alternating gradient: after each task step, step back into the region where a few safety rows keep their loss low.

Stage: after every optimiser step.
Paper: Chen et al., "SPARD: Defending Harmful Fine-Tuning Attack via Safety Projection with Relevance-Diversity Data Selection", ICML 2026,
    arXiv 2605.28030.
Reference: shuhao02/SPARD (c70f8c1), read; its selection run.
Idea: after the task's step, measure the loss l on safety rows; where l > threshold, move the weights by -c g with g its gradient and
    c = min((l - threshold) / |g|^2, radius): the shortest step that brings the linearised loss down to the threshold, within a trust
    region. The few safety rows are picked to be relevant to the task and diverse (determinantal point process, greedy).
Knobs: threshold - safety loss that is left alone (paper 0.2; take the untouched model's own as a guide). tolerance - added to it before
    anything is done (code 0 to 0.1). radius - largest coefficient c (script 1). share - safety rows as a share of the task's rows (paper
    0.03). selection - `dpp` (paper) or `random`. power - exponent of relevance in dpp (paper 4). safety_batch_size - safety rows per
    correction (script 1). interval - steps between corrections (ours; paper 1).
Cost: a forward and backward of safety_batch_size rows per step. Selection: one forward of at most 1000 task prompts and of all refusal
    prompts, once per lane.
Needs: safety rows (safety.data).
Limits: one safety loss stands for all safety; with few rows per step it is noisy. Rows whose wording the untouched model would not use
    keep the correction busy at any threshold.
Interacts: does not replace the task's gradient, so it runs with safegrad and with any other step. Every ZeRO stage. Adam's moments and
    weight decay do not see the correction.
Deviations: the correction moves the weights directly, with one global norm squared as in the paper; the official code divides by each
    tensor's own norm, not squared, and sends the result through AdamW, which forgets its length (compared on small tensors: for one tensor
    of norm 1 the two coefficients agree, otherwise they do not). The paper's trust radius is the learning rate of that AdamW step; for a
    direct step it bounds the coefficient. The selection, run on 10 draws of 40 safety and 60 task embeddings, picks the same 8 rows in the
    same order as the official one. Embeddings for the selection are means of last hidden states over the prompt by the untouched model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strategies import gradients, rows, tensors
from strategies.base import IGNORE, Engine, Example, Strategy, StrategyError, TrainingData

SMALLEST = 1e-12
"""Squared norm from which on a gradient has a direction."""
TASK_PROMPTS = 1000
"""Task prompts that relevance is measured against at most."""
JITTER = 1e-6
"""On the kernel's diagonal, as in the official code."""


def coefficient(loss: float, sq_norm: float, threshold: float, radius: float, tolerance: float = 0.0) -> float:
    """c = min((loss - threshold) / |g|^2, radius) where loss > threshold + tolerance, else 0; 0 where the gradient has no direction."""
    if loss <= threshold + tolerance or sq_norm <= SMALLEST:
        return 0.0
    return min((loss - threshold) / sq_norm, radius)


def correct(weights: gradients.Gradients, gradient: gradients.Gradients, loss: float, threshold: float, radius: float = math.inf,
            tolerance: float = 0.0) -> dict[str, Tensor]:  # fmt: skip
    """Weights after the correction, {name: tensor}: weights - c * gradient with `coefficient`'s c, one norm over all tensors.

    `gradient` is that of the safety loss at `weights`. Without a correction the weights come back bit for bit (copies). Raises
    ValueError for different names or shapes, and for what is not finite, the loss included.
    """
    tensors.check_mappings("spard.correct", weights=weights, gradient=gradient)
    if not math.isfinite(loss):
        raise ValueError(f"spard.correct: the safety loss is {loss}; the training has diverged")
    return gradients.axpy(-coefficient(loss, gradients.dot(gradient, gradient), threshold, radius, tolerance), gradient, weights)


def select(safety: Tensor, task: Tensor, count: int, power: float = 4.0) -> list[int]:
    """Indices of `count` of the N safety rows, relevant to the task and unlike each other, in the order picked.

    safety (N, d), task (M, d): embeddings. Kernel L_ij = q_i cos(i, j) q_j + 1e-6 [i = j] with q_i = (max over task rows of cosine)^power;
    greedy maximisation of det L_S. All rows where `count` is N or more. Negative cosines to the task count as 0. float64 on the CPU.
    """
    safety, task = (nn.functional.normalize(t.double().cpu(), dim=1) for t in (safety, task))
    quality = (safety @ task.T).amax(dim=1).clamp(min=0.0) ** power
    kernel = (safety @ safety.T) * quality[:, None] * quality[None, :]
    gains = kernel.diagonal().clone() + JITTER
    factors = torch.zeros(len(safety), 0, dtype=torch.float64)  # rows of the Cholesky factor, one column per pick
    picked: list[int] = []
    for _ in range(min(count, len(safety))):
        best = int(gains.argmax())
        column = kernel[:, best] - factors @ factors[best]
        column[best] += JITTER
        column = column / gains[best].sqrt()
        factors = torch.cat([factors, column[:, None]], dim=1)
        gains = (gains - column**2).clamp(min=JITTER)
        picked.append(best)
        gains[picked] = -torch.inf
    return picked


def mean_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """(R, d) float32: mean of hidden states (R, L, d) over the tokens that `mask` (R, L) marks; zeros for a row without any."""
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class Spard(Strategy):
    """A correction of the weights after each step."""

    name = "spard"
    needs = frozenset({"safety"})
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        threshold: float = field(default=0.2, metadata={"help": "Safety loss that is left alone."})
        tolerance: float = field(default=0.0, metadata={"help": "Added to the threshold before anything is done."})
        radius: float = field(default=1.0, metadata={"help": "Largest coefficient of the correction; 0 is plain fine-tuning."})
        share: float = field(default=0.03, metadata={"help": "Safety rows as a share of the task's rows."})
        selection: Literal["dpp", "random"] = field(default="dpp", metadata={"help": "How the safety rows are picked."})
        power: float = field(default=4.0, metadata={"help": "Exponent of relevance in dpp."})
        safety_batch_size: int | None = field(default=4, metadata={"help": "Safety rows per correction; as many as task rows for null."})
        interval: int = field(default=1, metadata={"help": "Steps between corrections."})

        def __post_init__(self):
            for knob in ("threshold", "tolerance", "radius", "power"):
                if getattr(self, knob) < 0:
                    raise StrategyError(f"spard.{knob}={getattr(self, knob)} must not be negative")
            if not 0 < self.share <= 1:
                raise StrategyError(f"spard.share={self.share} must be above 0 and at most 1")
            for knob in ("interval", "safety_batch_size"):
                if getattr(self, knob) is not None and getattr(self, knob) < 1:
                    raise StrategyError(f"spard.{knob}={getattr(self, knob)} must be at least 1")

    def __init__(self, config=None):
        super().__init__(config)
        self.rows: tuple[Example, ...] = ()
        self.corrections = self.looks = 0

    def take_rows(self, data: TrainingData) -> None:
        self.data, self.rows = data, rows.refusals(data, None, self.name)

    def check_model(self, model: nn.Module) -> list[str]:
        """The small copy's output layer is given hidden states. Raises StrategyError."""
        if self.config.radius > 0 and self.config.selection == "dpp":
            rows.output_layer(model, self.name)
        return []

    def setup(self, model: nn.Module) -> nn.Module:
        if self.config.radius == 0:
            return model
        count = math.ceil(self.config.share * len(self.data.task))
        if self.config.selection == "dpp" and count < len(self.rows):
            task = rows.sample(self.data.task, TASK_PROMPTS, self.data.seed)
            embedded = [self._embeddings(model, group) for group in (self.rows, task)]
            self.rows = tuple(self.rows[i] for i in select(*embedded, count, self.config.power))
        self.rows = self.rows[:count]
        return model

    def _embeddings(self, model: nn.Module, group: Sequence[Example]) -> Tensor:
        """(rows, d): mean of the untouched model's last hidden states over the prompt, once per lane."""
        prompts = [Example(row.prompt, (IGNORE,) * len(row.prompt), row.id) for row in group]

        def make() -> Tensor:
            with rows.last_hidden(rows.output_layer(model, self.name)) as seen:
                return torch.stack(rows.read(model, prompts, self.data, lambda output, batch: mean_states(seen[0], batch["attention_mask"])))

        return rows.remembered(self.data, "prompt embeddings", prompts, make)

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        if self.config.radius == 0 or step % self.config.interval:
            return {}
        loss = engine.gradient(self.data.batches(self.rows, step, "spard", self.config.safety_batch_size))
        gradient = engine.gradients()
        sq_norm = gradient.dot(gradient)
        c = coefficient(loss, sq_norm, self.config.threshold, self.config.radius, self.config.tolerance)
        engine.move([(-c, gradient)])
        self.looks += 1
        self.corrections += c > 0
        return {"safety_loss": loss, "correction": c, "correction_norm": c * math.sqrt(sq_norm), "correction_rate": self.corrections / self.looks}

    def facts(self):
        return {"safety_rows": len(self.rows), "corrections": self.corrections, "looks": self.looks}

    def state_dict(self) -> dict[str, Any]:
        return {"corrections": self.corrections, "looks": self.looks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.corrections, self.looks = int(state["corrections"]), int(state["looks"])
