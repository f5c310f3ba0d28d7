"""The control for projecting and merging methods: the same operations along random directions of equal rank and norm.

Stage: after training.
Paper: the control asked for by Ponkshe et al., "Safety Subspaces are Not Linearly Distinct: A Fine-Tuning Case Study", ICLR 2026,
    arXiv 2505.14185.
Reference: CERT-Lab/safety-subspaces (not read).
Idea: a method that projects or adds along a "safety direction" must beat one that does the same along a random direction of the same
    singular values. A matrix M is given a random output space: M = Q R becomes Q' R with Q' random orthonormal columns.
Knobs: operation - project: the updates dW of smallest cosine become C dW as in safe_lora, C from a random V; merge: every update becomes
    (1 - strength) dW + strength * (dW with a random output space), the control of safemerge; add: strength times V with a random
    output space is added, the control of lssf, resta and enchtable. strength - project: share of the updates projected; merge and
    add: as said (0 is plain). rank - with add: singular directions of V taken, 0 for all.
Cost: two QR decompositions per weight, no training and no data. Trials that differ in these knobs share one training.
Needs: unaligned_base (model.unaligned_name_or_path): the sizes of V are the real ones.
Limits: it is a control. What it reaches in safety, the method compared with it does not owe to its direction.
Interacts: every ZeRO stage. Adapters stay adapters (with add: of rank lora_r + rank; with rank=0 the result is a whole model).
Deviations: only the output space is random, the input side and all singular values are those of the original (reconstruction). Directions
    are a function of the trial's seed and the weight's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from strategies import linear
from strategies.base import Strategy, StrategyError, stable_seed
from strategies.updates import Update


def rotated(matrix: Tensor, seed: int) -> Tensor:
    """`matrix` (d_out, n) with its column space replaced by a uniformly random one of the same dimension; float32, on its device.

    All singular values, the right singular vectors and hence rank and norm are kept. Drawn on the CPU: the same on every device.
    """
    noise = torch.randn(matrix.shape[0], min(matrix.shape), generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(noise)
    q = q * torch.sign(torch.diagonal(r))  # makes the draw uniform
    return q.to(matrix.device) @ torch.linalg.qr(matrix.float())[1]


class RandomSubspace(Strategy):
    """One of three operations, each with a random output space."""

    name = "random_subspace"
    needs = frozenset({"unaligned_base"})
    changes_training = False
    merges = True

    @dataclass(frozen=True)
    class Config:
        operation: Literal["project", "merge", "add"] = field(default="project", metadata={"help": "The operation controlled for."})
        strength: float = field(
            default=0.5, metadata={"help": "Share of updates projected, weight of the random update, or length of the random step."}
        )
        rank: int = field(default=8, metadata={"help": "With operation=add: singular directions taken; 0 for all."})

        def __post_init__(self):
            if self.strength < 0 or (self.operation != "add" and self.strength > 1):
                raise StrategyError(
                    f"random_subspace.strength={self.strength} must be in [0, 1] for operation={self.operation}, at least 0 for add"
                )
            if self.rank < 0:
                raise StrategyError(f"random_subspace.rank={self.rank} is negative; give how many singular directions are taken, 0 for all")

    def reaches(self, update: Update) -> bool:
        return self._direction(update) is not None

    def finish(self, model: nn.Module) -> nn.Module:
        if self.config.strength == 0:
            return model
        operation = {"project": self._project, "merge": self._merge, "add": self._add}[self.config.operation]
        names = self._smallest(model) if self.config.operation == "project" else None
        changed = 0
        before = after = 0.0

        def change(update: Update) -> Update | None:
            nonlocal changed, before, after
            new = None if names is not None and update.name not in names else operation(update)
            if new is not None:
                changed, before, after = changed + 1, before + linear.norm(update) ** 2, after + linear.norm(new) ** 2
            return new

        model = linear.edit(model, self.data.weights["aligned"], change)
        self._facts = {"operation": self.config.operation, "changed": changed, "norm_before": before**0.5, "norm_after": after**0.5}
        return model

    def _smallest(self, model: nn.Module) -> set[str]:
        """Names of the share `strength` of updates whose cosine with their random projection is smallest."""
        cosines = {}
        for update in linear.updates(model, self.data.weights["aligned"]):
            if (new := self._project(update)) is not None:
                cosines[update.name] = linear.similarity(new, update)
        return set(sorted(cosines, key=lambda name: (cosines[name], name))[: round(self.config.strength * len(cosines))])

    def _direction(self, update: Update) -> Tensor | None:
        """V of the update's weight; None where it is no matrix or alignment left it alone."""
        weights = self.data.weights
        return linear.alignment(update, weights["aligned"], weights["unaligned"]) if update.is_matrix else None

    def _project(self, update: Update) -> Update | None:
        direction = self._direction(update)
        return None if direction is None else linear.projected(update, rotated(direction, self._seed(update)))

    def _merge(self, update: Update) -> Update | None:
        if self._direction(update) is None:
            return None
        own = update.left if update.low_rank else update.full
        new = (1 - self.config.strength) * own + self.config.strength * rotated(own, self._seed(update))
        return update.replaced(left=new) if update.low_rank else update.replaced(full=new)

    def _add(self, update: Update) -> Update | None:
        if (direction := self._direction(update)) is None:
            return None
        if self.config.rank:
            left, right = linear.leading(direction, self.config.rank)
            step = Update(update.name, left=rotated(left, self._seed(update)), right=right)
        else:
            step = Update(update.name, full=rotated(direction, self._seed(update)))
        return linear.added(update, step, 1.0, self.config.strength)

    def _seed(self, update: Update) -> int:
        return stable_seed((self.data.seed, update.name))
