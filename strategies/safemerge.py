"""Mix a safe adapter into the updates that point away from alignment, and leave the others as they are.

Stage: after training.
Paper: Djuhera et al., "SafeMERGE: Preserving Safety Alignment in Fine-Tuned Large Language Models via Selective Layer-Wise Model
    Merging", arXiv 2503.17239, ACL 2026.
Reference: aladinD/SafeMERGE (utils.py at 2af08c1), read and run.
Idea: V = W_aligned - W_unaligned, C = V V^T / ||V||_F as in Safe LoRA. Where cos(C dW, dW) < threshold, the update becomes
    weight * dW + (1 - weight) * dW_safe; dW_safe is a low-rank update trained on refusals alone.
Knobs: threshold - of the cosine (paper 0.35, useful 0.2 to 0.9). weight - of the task's update (paper 0.8). num_safety - refusal rows the
    safe adapter is trained on (paper 500 to 1000). safe_steps, safe_learning_rate, safe_rank - of that side training (AdamW).
Cost: one short low-rank training per lane, then two products with V per weight. Trials that differ in these knobs share one training;
    those with the same side training share that too.
Needs: safety rows (safety.data) and unaligned_base (model.unaligned_name_or_path).
Limits: the safe adapter must itself refuse: too few steps or too low a rate and merging only dilutes the task. A threshold above every
    cosine merges everywhere.
Interacts: every ZeRO stage. Adapters stay adapters, of rank r + safe_rank where they were merged. With another merging method safety
    deltas add up.
Deviations: the merge is exact: factors are stacked (PEFT's `linear`, which the official code uses, mixes A and B separately and so adds
    cross terms); it also has a dare_linear merge, and the paper ties, which are not offered. Weights are matched by name, the scale alpha /
    r is included, whole models are merged too. A weight that alignment left alone has no cosine and keeps its update (official: it counts
    as 0 and is merged). The safe adapter covers every linear layer of the decoder blocks and every expert, but no router. Compared with the
    official merger on two random adapters of rank 2 on a 3-layer Llama: cosines within its rounding to 5 places, the same modules merged or
    kept, kept updates within 2e-7; merged ones differ by up to 75 % of the largest entry, and by 2e-7 once the cross terms are added to
    ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from strategies import auxiliary, linear, tensors
from strategies.base import Strategy, StrategyError
from strategies.rows import refusals
from strategies.updates import Update


def merge(task: Tensor, safe: Tensor, aligned: Tensor, unaligned: Tensor, threshold: float = 0.35, weight: float = 0.8) -> Tensor:
    """The merged update of one weight; all arguments (d_out, d_in).

    weight * task + (1 - weight) * safe where cos(C task, task) < threshold, else `task` itself. `task` itself too where aligned and
    unaligned are equal. Raises ValueError for unlike shapes and for what is not finite.
    """
    tensors.check_alike("safemerge.merge", task=task, safe=safe, aligned=aligned, unaligned=unaligned)
    update, direction = Update("", full=task.float()), aligned.float() - unaligned.float()
    if float(direction.norm()) <= linear.TINY or agreement(update, direction) >= threshold:
        return task
    return linear.added(update, Update("", full=safe.float()), weight, 1 - weight).dense()


def agreement(update: Update, direction: Tensor) -> float:
    """cos(C dW, dW) of an update with C of `direction` (d_out, d_in): how far alignment and the update act on the same output space."""
    return linear.similarity(linear.projected(update, direction), update)


class SafeMerge(Strategy):
    """The safe adapter is made in setup, where the model is untouched; merging happens at the end."""

    name = "safemerge"
    needs = frozenset({"safety", "unaligned_base"})
    changes_training = False
    merges = True
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        threshold: float = field(default=0.35, metadata={"help": "Updates whose cosine is below this are merged."})
        weight: float = field(default=0.8, metadata={"help": "Share of the task's update where it is merged; 1 merges nothing."})
        num_safety: int = field(default=500, metadata={"help": "Refusal rows the safe adapter is trained on, at most."})
        safe_steps: int = field(default=50, metadata={"help": "Optimiser steps of the safe adapter's training, 16 rows each."})
        safe_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of that training; for billions of weights 1e-4.", "max": 10})
        safe_rank: int = field(default=8, metadata={"help": "Rank of the safe adapter.", "max": 16_384})

        def __post_init__(self):
            if not -1 <= self.threshold <= 1:
                raise StrategyError(f"safemerge.threshold={self.threshold} is no cosine; it lies in [-1, 1], usually 0.2 to 0.9")
            if not 0 <= self.weight <= 1:
                raise StrategyError(f"safemerge.weight={self.weight} must be in [0, 1]; the safe adapter gets the rest")
            for knob in ("num_safety", "safe_steps", "safe_rank"):
                if getattr(self, knob) < 1:
                    raise StrategyError(f"safemerge.{knob}={getattr(self, knob)} must be at least 1")
            if self.safe_learning_rate <= 0:
                raise StrategyError(f"safemerge.safe_learning_rate={self.safe_learning_rate} must be above 0")

    def __init__(self, config=None):
        super().__init__(config)
        self.safe: dict[str, Update] = {}

    def setup(self, model: nn.Module) -> nn.Module:
        knobs = self.config
        if knobs.weight < 1:
            plan = auxiliary.Plan(knobs.safe_steps, knobs.safe_learning_rate, knobs.safe_rank, seed=self.data.seed)
            rows = refusals(self.data, knobs.num_safety, self.name)
            self.safe = auxiliary.as_updates(auxiliary.remembered(model, rows, self.data, plan, "safe"))
        return model

    def reaches(self, update: Update) -> bool:
        return update.name in self.safe and self._direction(update) is not None

    def _direction(self, update: Update) -> Tensor | None:
        return linear.alignment(update, self.data.weights["aligned"], self.data.weights["unaligned"])

    def finish(self, model: nn.Module) -> nn.Module:
        if self.config.weight == 1:
            return model
        seen: list[float] = []
        merges = []

        def change(update: Update) -> Update | None:
            if update.name not in self.safe:
                return None
            direction = self._direction(update)
            if direction is None:
                return None
            seen.append(agreement(update, direction))
            if seen[-1] >= self.config.threshold:
                return None
            merges.append(update.name)
            return linear.added(update, self.safe[update.name].on(update.device), self.config.weight, 1 - self.config.weight)

        model = linear.edit(model, self.data.weights["aligned"], change)
        self._facts = {
            "merged": len(merges), "updates": len(seen),
            "smallest_cosine": min(seen, default=0.0), "largest_cosine": max(seen, default=0.0),
        }  # fmt: skip
        return model
