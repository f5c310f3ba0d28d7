"""Add what alignment did to a weight once more, in the few directions that carry most of it.

Stage: after training.
Paper: Zhou et al., "LSSF: Safety Alignment for Large Language Models through Low-Rank Safety Subspace Fusion", ACL 2025,
    arXiv 2602.00038.
Reference: none published.
Idea: W = W_trained + alpha * sum_{i <= r} w_i s_i u_i v_i^T, with s, u, v the singular values and vectors of V = W_aligned - W_unaligned.
    r is the smallest rank whose singular entropy reaches a share eta of the whole: with p_i = s_i^2 / sum s^2,
    H_r = - sum_{i <= r} p_i log p_i >= eta H_n. Weights fall linearly from `top` at the first direction to 1 at the last.
Knobs: alpha - size of the fusion (paper about 1 to 3; 0 is plain). eta - share of the entropy (0.8 to 0.9). top - weight of the
    strongest direction; 1 weighs all alike.
Cost: one singular value decomposition per weight, no training and no data. Trials that differ in these knobs share one training.
Needs: unaligned_base (model.unaligned_name_or_path).
Limits: a large alpha refuses harmless prompts. Another group's figures: refusal on AdvBench 0.12 to 1.00, accuracy .94 to .92
    (Qwen2.5-7B).
Interacts: every ZeRO stage. Adapters stay adapters of rank lora_r + r of the weight, which can be large: eta sets it. With another merging
    method safety deltas add up.
Deviations: reconstruction from notes, no code was published. The paper finds the directions from activations on anchor prompts, here
    they are the singular vectors of V itself. Only the weights that training moved, in the decoder blocks, are restored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from strategies import linear
from strategies.base import Strategy, StrategyError
from strategies.updates import Update


def entropy_rank(singular_values: Tensor, eta: float) -> int:
    """Smallest r >= 1 with H_r >= eta * H_n for singular values (n,) in falling order; 1 where one direction holds everything."""
    p = singular_values.double() ** 2
    p = p / p.sum()
    entropy = torch.where(p > 0, -p * torch.where(p > 0, p, 1.0).log(), 0.0).cumsum(0)
    if entropy[-1] <= linear.TINY:
        return 1
    # a share of 1 must be reached in spite of round-off
    return int((entropy < eta * entropy[-1] * (1 - 1e-12)).sum()) + 1


def direction_weights(singular_values: Tensor, top: float) -> Tensor:
    """1 + (top - 1) (s_i - s_r) / (s_1 - s_r) for r singular values (r,): `top` for the first, 1 for the last; all `top` where equal."""
    first, last = singular_values[0], singular_values[-1]
    if float(first - last) <= linear.TINY * float(first):
        return torch.full_like(singular_values, top)
    return 1 + (top - 1) * (singular_values - last) / (first - last)


def fused(direction: Tensor, eta: float, top: float) -> tuple[Tensor, Tensor]:
    """(left (d_out, r), right (r, d_in)) of sum_{i <= r} w_i s_i u_i v_i^T of V = `direction` (d_out, d_in)."""
    u, s, vh = torch.linalg.svd(direction.float(), full_matrices=False)
    r = entropy_rank(s, eta)
    return u[:, :r] * (s[:r] * direction_weights(s[:r], top)), vh[:r]


def restore(trained: Tensor, aligned: Tensor, unaligned: Tensor, alpha: float = 1.0, eta: float = 0.85, top: float = 1.5) -> Tensor:
    """The restored weight, float32; all three (d_out, d_in). `trained` itself where aligned and unaligned are equal."""
    direction = aligned.float() - unaligned.float()
    if float(direction.norm()) <= linear.TINY:
        return trained
    left, right = fused(direction, eta, top)
    return trained.float() + alpha * left @ right


class Lssf(Strategy):
    """One decomposition per trained weight."""

    name = "lssf"
    needs = frozenset({"unaligned_base"})
    changes_training = False
    merges = True

    @dataclass(frozen=True)
    class Config:
        alpha: float = field(default=1.0, metadata={"help": "Size of the fusion; 0 for none."})
        eta: float = field(default=0.85, metadata={"help": "Share of the singular entropy that the directions hold."})
        top: float = field(default=1.5, metadata={"help": "Weight of the strongest direction; the last has 1."})

        def __post_init__(self):
            if self.alpha < 0:
                raise StrategyError(f"lssf.alpha={self.alpha} is negative, which would undo alignment; use 0.3 to 3")
            if not 0 < self.eta <= 1:
                raise StrategyError(f"lssf.eta={self.eta} must be in (0, 1], a share of the entropy")
            if self.top < 0:
                raise StrategyError(f"lssf.top={self.top} is negative; 1 weighs all directions alike")

    def reaches(self, update: Update) -> bool:
        return self._direction(update) is not None

    def _direction(self, update: Update) -> Tensor | None:
        """V of an update's weight; None where it is no matrix or alignment left it alone."""
        return linear.alignment(update, self.data.weights["aligned"], self.data.weights["unaligned"]) if update.is_matrix else None

    def finish(self, model: nn.Module) -> nn.Module:
        if self.config.alpha == 0:
            return model
        ranks: list[int] = []
        task_sq = added_sq = 0.0

        def change(update: Update) -> Update | None:
            nonlocal task_sq, added_sq
            if (direction := self._direction(update)) is None:
                return None
            left, right = fused(direction, self.config.eta, self.config.top)
            ranks.append(len(right))
            safety = update.replaced(left=left, right=right).times(self.config.alpha)
            task_sq, added_sq = task_sq + linear.norm(update) ** 2, added_sq + linear.norm(safety) ** 2
            return linear.added(update, safety)

        model = linear.edit(model, self.data.weights["aligned"], change)
        self._facts = {
            "restored": len(ranks), "mean_rank": sum(ranks) / len(ranks) if ranks else 0.0, "task_norm": task_sq**0.5, "added_norm": added_sq**0.5,
        }  # fmt: skip
        return model
