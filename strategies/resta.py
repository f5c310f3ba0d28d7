"""Add a safety vector, aligned minus harmfully tuned, most of whose entries were dropped at random.

Stage: after training.
Paper: Bhardwaj et al., "Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through Task Arithmetic"
    (RESTA), ACL 2024, arXiv 2402.11746; the dropping is DARE, Yu et al., ICML 2024, arXiv 2311.03099.
Reference: declare-lab/resta (could not be read).
Idea: fine-tune the aligned model on harmful answers; v = W_aligned - W_harmful points back to safety. The result is
    W_trained + gamma * DARE(v): each entry of v is kept with probability 1 - drop and divided by it.
Knobs: gamma - size of the step (0.1 to 1; 0 is plain). drop - share of entries dropped (0.9). num_harmful - harmful rows, at most.
    harmful_steps, harmful_learning_rate, harmful_rank - of that side training (AdamW).
Cost: one short low-rank training per lane; per weight one random mask. Trials that differ in these knobs share one training; those
    with the same side training share that too.
Needs: harmful rows (safety.harmful_data, or a column `rejected` in safety.data).
Limits: adds the same vector everywhere, whether the update was harmful there or not; with a large gamma the model refuses everything.
    Values in other papers only: Llama-3.1-8B on GSM8K, DirectHarm 11.9 against 28.3 for plain fine-tuning (SafeMERGE's table).
Interacts: every ZeRO stage. Dropping makes the vector dense, so adapters are merged and the result is a whole model; with drop=0 they
    stay adapters of rank r + harmful_rank. With another merging method safety deltas add up.
Deviations: formula from the paper's abstract and other groups' tables (reconstruction). v is low rank and trained here, in the linear
    layers and experts of the decoder blocks; weights that training left alone keep their value. The mask is a function of the trial's seed
    and the weight's name. DARE compared with its official code (yule-BUAA/MergeLM at 6d49ad9) on a random 600 x 500 matrix, drop 0.9: other
    random numbers, the same share kept (0.101 and 0.100), what is kept scaled by 10 in both within 1e-6. EnchTable's repository holds a
    RESTA that multiplies v by 0: run here, it changes no weight by a bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from strategies import auxiliary, linear, tensors
from strategies.base import Strategy, StrategyError, stable_seed
from strategies.rows import sample
from strategies.updates import Update


def dare(vector: Tensor, drop: float, seed: int) -> Tensor:
    """Entries kept with probability 1 - drop and divided by it, the others 0: same mean. drop=0 gives the vector itself.

    Same shape; the mask depends on `seed` and the shape alone. Raises ValueError unless 0 <= drop < 1.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop} must be in [0, 1): what is left is divided by 1 - drop")
    if drop == 0:
        return vector
    kept = torch.rand(vector.shape, generator=torch.Generator().manual_seed(seed)) >= drop
    return vector * kept.to(vector.device) / (1 - drop)


def merge(task: Tensor, safety: Tensor, gamma: float, drop: float = 0.9, seed: int = 0) -> Tensor:
    """The update task + gamma * DARE(safety) of one weight; both tensors of one shape, safety = aligned - harmfully tuned.

    Raises ValueError for unlike shapes and for what is not finite.
    """
    tensors.check_alike("resta.merge", task=task, safety=safety)
    return task + gamma * dare(safety, drop, seed)


class Resta(Strategy):
    """The harmful side is trained in setup, where the model is untouched; the vector is added at the end."""

    name = "resta"
    needs = frozenset({"harmful"})
    changes_training = False
    merges = True
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        gamma: float = field(default=0.5, metadata={"help": "Size of the step along the safety vector; 0 for none."})
        drop: float = field(default=0.9, metadata={"help": "Share of the vector's entries dropped; 0 keeps adapters adapters."})
        num_harmful: int = field(default=500, metadata={"help": "Harmful rows the side training sees, at most."})
        harmful_steps: int = field(default=50, metadata={"help": "Optimiser steps of the side training, 16 rows each."})
        harmful_learning_rate: float = field(default=1e-2, metadata={"help": "Its learning rate; for billions of weights 1e-4.", "max": 10})
        harmful_rank: int = field(default=8, metadata={"help": "Rank of the harmful update.", "max": 16_384})

        def __post_init__(self):
            if self.gamma < 0:
                raise StrategyError(f"resta.gamma={self.gamma} is negative, which would add harm; use 0.1 to 1")
            if not 0 <= self.drop < 1:
                raise StrategyError(f"resta.drop={self.drop} must be in [0, 1): what is left is divided by 1 - drop")
            for knob in ("num_harmful", "harmful_steps", "harmful_rank"):
                if getattr(self, knob) < 1:
                    raise StrategyError(f"resta.{knob}={getattr(self, knob)} must be at least 1")
            if self.harmful_learning_rate <= 0:
                raise StrategyError(f"resta.harmful_learning_rate={self.harmful_learning_rate} must be above 0")

    def __init__(self, config=None):
        super().__init__(config)
        self.safety: dict[str, Update] = {}

    def setup(self, model: nn.Module) -> nn.Module:
        knobs = self.config
        if knobs.gamma > 0:
            if not self.data.harmful:
                raise StrategyError("resta needs harmful answers: give safety.harmful_data, or a column `rejected` in safety.data")
            plan = auxiliary.Plan(knobs.harmful_steps, knobs.harmful_learning_rate, knobs.harmful_rank, seed=self.data.seed)
            rows = sample(self.data.harmful, knobs.num_harmful, self.data.seed)
            self.safety = auxiliary.as_updates(auxiliary.remembered(model, rows, self.data, plan, "harmful"), -1.0)
        return model

    def reaches(self, update: Update) -> bool:
        return update.name in self.safety

    def finish(self, model: nn.Module) -> nn.Module:
        knobs = self.config
        if knobs.gamma == 0:
            return model
        task_sq = added_sq = 0.0
        merges = []

        def change(update: Update) -> Update | None:
            nonlocal task_sq, added_sq
            if update.name not in self.safety:
                return None
            safety = self.safety[update.name].on(update.device)
            if knobs.drop > 0:
                safety = safety.replaced(full=dare(safety.dense(), knobs.drop, stable_seed((self.data.seed, update.name))))
            task_sq, added_sq = task_sq + linear.norm(update) ** 2, added_sq + (knobs.gamma * linear.norm(safety)) ** 2
            merges.append(update.name)
            return linear.added(update, safety, 1.0, knobs.gamma)

        model = linear.edit(model, self.data.weights["aligned"], change)
        self._facts = {"merged": len(merges), "task_norm": task_sq**0.5, "added_norm": added_sq**0.5}
        return model
