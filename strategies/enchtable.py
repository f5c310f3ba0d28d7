"""Add a safety vector distilled from a linearised harmful training, less where it interferes with the task.

Stage: after training.
Paper: Wu et al., "EnchTable: Unified Safety Alignment Transfer in Fine-tuned Large Language Models", IEEE S&P 2026, arXiv 2511.09880.
Reference: AntCPLab/EnchTable (merge/models/enchtable.py at 4731902, train/sft/workflow.py), read; the merge run.
Idea: fine-tune the aligned model on harmful answers with its attention linearised around the start (f(x; W0) + J (W - W0), the neural
    tangent kernel's regime); t_safe = W_aligned - W_harmful. Scaled to alpha = beta * ||t_task|| / ||t_safe|| (norms over all weights),
    each weight gets t_task + s * alpha * t_safe with s = exp(-steepness * mean |(U^T U - I) S (V V^T - I)|) over the leading singular
    vectors of both: s is 1 where they do not meet.
Knobs: beta - size of the safety vector relative to the task's (official 0.1, useful 0.05 to 0.5; 0 is plain). gamma - share of singular
    vectors compared (0.5). steepness - of the damping (200). ntk - linearise; off is a plain low-rank training, the ablation. modules -
    attention (paper, Llama; in other families whatever mixes tokens in its place: state-space, recurrent and convolution modules), or
    attention_mlp (paper, Qwen and Mistral; experts too). num_harmful - harmful rows, at most (1000). harmful_steps, harmful_learning_rate,
    harmful_rank - of that side training (AdamW).
Cost: one short training per lane, with ntk at about twice the forward; a thin singular value decomposition per weight of an adapter, a
    full one per weight of a whole model. Trials that differ in these knobs share one training.
Needs: harmful rows (safety.harmful_data, or a column `rejected` in safety.data).
Limits: the vector is only as good as the harmful answers; the steepness is a constant of the code without a stated reason.
Interacts: every ZeRO stage. Adapters stay adapters of rank r + harmful_rank. ntk needs attention that forward-mode differentiation can pass
    (sdpa or eager, not flash_attention_2) and modules without functions of their own for the backward (BLOOM's feed-forward part and
    RecurrentGemma's recurrent blocks have such); what cannot is refused at validation. With another merging method safety deltas add up.
Deviations: the official code linearises each projection by itself; a linear layer is linear in its weight, so that changes nothing (its
    harmful training is plain training of these projections). Here the attention (MLP) module is linearised as a whole, and in the low-rank
    factors' product. Inside, a row that may attend to nothing (padding beyond a narrow window) attends to everything, as in eager
    attention, since its softmax has no derivative otherwise. Feed-forward layers that lie in a block by themselves (OPT) are trained
    plainly: each is linear in its weight. Routers are not trained. The harmful update is low rank (official: full), and attention_mlp
    linearises every layer (official: all but the first and last 12). Norms are those of the decoder blocks; only weights that training
    moved are merged. For low-rank updates gamma counts of the rank: the other singular values are zero and their vectors arbitrary, though
    the official code averages over them. Compared with the official merge on a 3-layer Llama and two random dense updates: s within 1e-7,
    weights within 4e-8, given the same norms (the official ones count a tied embedding twice).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strategies import auxiliary, linear, linearising, tensors, trying
from strategies.base import Example, Strategy, StrategyError, TrainingData
from strategies.rows import sample
from strategies.updates import Update


def spectrum(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition (U (d_out, n), S (n,), Vh (n, d_in)), n the rank of a low-rank update, else min(d_out, d_in).

    A low-rank update is decomposed through QR of its factors: only an n x n matrix is.
    """
    if not update.low_rank:
        return torch.linalg.svd(update.full.float(), full_matrices=False)
    if update.left.shape[1] >= min(update.shape):
        return torch.linalg.svd(update.dense(), full_matrices=False)
    (left, small), (right, other) = torch.linalg.qr(update.left), torch.linalg.qr(update.right.T)
    u, s, vh = torch.linalg.svd(small @ other.T)
    return left @ u, s, vh @ right.T


def interference(task: Update, safety: Update, gamma: float = 0.5) -> float:
    """mean |(U^T U - I) S (V V^T - I)| over the int(gamma * n) >= 1 leading singular vectors of both, side by side.

    U (d_out, m), S (m,), V (m, d_in). 0.0 where the two are orthogonal. Grows with the singular values, so `safety` must be scaled as it
    will be added.
    """
    parts = []
    for update in (task, safety):
        u, s, vh = spectrum(update)
        count = max(1, int(gamma * len(s)))
        parts.append((u[:, :count], s[:count], vh[:count]))
    u, s, vh = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    eye = torch.eye(len(s), dtype=s.dtype, device=s.device)
    return float((((u.T @ u - eye) * s) @ (vh @ vh.T - eye)).abs().mean())


def strength(task_norm: float, safety_norm: float, beta: float) -> float:
    """alpha = beta * ||t_task|| / ||t_safe||; 0.0 where there is no safety vector."""
    return beta * task_norm / safety_norm if safety_norm > linear.TINY else 0.0


def merged(task: Update, safety: Update, alpha: float, gamma: float, steepness: float) -> tuple[Update, float]:
    """(t_task + s * alpha * t_safe of one weight, s). What is no matrix has s = 1."""
    scaled = safety.times(alpha)
    s = math.exp(-steepness * interference(task, scaled, gamma)) if len(task.shape) == 2 else 1.0
    return linear.added(task, scaled, 1.0, s), s


def merge(
    task: Mapping[str, Tensor], safety: Mapping[str, Tensor], beta: float = 0.1, gamma: float = 0.5, steepness: float = 200.0
) -> dict[str, Tensor]:
    """The merged updates of a model: {name: tensor}, any shapes, equal where a name is in both; safety = aligned - harmfully tuned.

    Norms run over all tensors of each mapping. A name that only `task` has keeps its update; one that only `safety` has is left out. Raises
    ValueError for unlike shapes of one name and for what is not finite.
    """
    tensors.check_mappings("enchtable.merge", task=task, safety=safety)
    task_norm, safety_norm = (math.sqrt(sum(float(t.double().norm()) ** 2 for t in group.values())) for group in (task, safety))
    alpha = strength(task_norm, safety_norm, beta)
    return {
        name: merged(Update(name, full=t.float()), Update(name, full=safety[name].float()), alpha, gamma, steepness)[0].full
        if name in safety else t
        for name, t in task.items()
    }  # fmt: skip


class EnchTable(Strategy):
    """The harmful side is trained in setup, where the model is untouched; merging happens at the end."""

    name = "enchtable"
    needs = frozenset({"harmful"})
    changes_training = False
    merges = True
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        beta: float = field(default=0.1, metadata={"help": "Norm of the safety vector relative to the task's; 0 for none."})
        gamma: float = field(default=0.5, metadata={"help": "Share of singular vectors whose overlap is measured."})
        steepness: float = field(default=200.0, metadata={"help": "How fast overlap damps the safety vector."})
        ntk: bool = field(default=True, metadata={"help": "Linearise the modules in the harmful training; false is plain low rank."})
        modules: Literal["attention", "attention_mlp"] = field(default="attention", metadata={"help": "What the harmful training trains."})
        num_harmful: int = field(default=1000, metadata={"help": "Harmful rows the side training sees, at most."})
        harmful_steps: int = field(default=50, metadata={"help": "Optimiser steps of the side training, 16 rows each."})
        harmful_learning_rate: float = field(default=1e-2, metadata={"help": "Its learning rate; for billions of weights 1e-4.", "max": 10})
        harmful_rank: int = field(default=8, metadata={"help": "Rank of the harmful update.", "max": 16_384})

        def __post_init__(self):
            if self.beta < 0:
                raise StrategyError(f"enchtable.beta={self.beta} is negative, which would add harm; use 0.05 to 0.5")
            if not 0 < self.gamma <= 1:
                raise StrategyError(f"enchtable.gamma={self.gamma} must be in (0, 1], a share of the singular vectors")
            if self.steepness < 0:
                raise StrategyError(f"enchtable.steepness={self.steepness} must be at least 0 (0: no damping)")
            for knob in ("num_harmful", "harmful_steps", "harmful_rank"):
                if getattr(self, knob) < 1:
                    raise StrategyError(f"enchtable.{knob}={getattr(self, knob)} must be at least 1")
            if self.harmful_learning_rate <= 0:
                raise StrategyError(f"enchtable.harmful_learning_rate={self.harmful_learning_rate} must be above 0")

    def __init__(self, config=None):
        super().__init__(config)
        self.attention = frozenset({"eager", "sdpa"}) if self.config.ntk and self.config.beta > 0 else None
        self.safety: dict[str, Update] = {}
        self._linearised = 0

    def setup(self, model: nn.Module) -> nn.Module:
        if self.config.beta > 0:
            self.safety = auxiliary.as_updates(self._harmful(model), -1.0)
        return model

    def check_model(self, model: nn.Module) -> list[str]:
        """A step of the harmful training on a few rows of the small copy. Raises StrategyError where it cannot be made or is not finite."""
        if self.config.beta == 0:
            return []
        plan = auxiliary.Plan(steps=1, learning_rate=1e-4, rank=1, batch_size=len(trying.LENGTHS))
        device = model.get_input_embeddings().weight.device
        try:
            self._trained(model, trying.rows(model), TrainingData((), (), 0, len(trying.LENGTHS), device=device), plan, auxiliary.train)
        except FloatingPointError as error:
            raise self._refusal(model, error) from error
        return []

    def _harmful(self, model: nn.Module) -> auxiliary.Factors:
        knobs = self.config
        if not self.data.harmful:
            raise StrategyError("enchtable needs harmful answers: give safety.harmful_data, or a column `rejected` in safety.data")
        plan = auxiliary.Plan(knobs.harmful_steps, knobs.harmful_learning_rate, knobs.harmful_rank, seed=self.data.seed)
        rows = sample(self.data.harmful, knobs.num_harmful, self.data.seed)
        what = f"harmful {knobs.modules} {'linearised' if knobs.ntk else 'plain'}"
        return self._trained(model, rows, self.data, plan, partial(auxiliary.remembered, what=what))

    def _trained(self, model: nn.Module, rows: Sequence[Example], data: TrainingData, plan: auxiliary.Plan, train: Any) -> auxiliary.Factors:
        """Factors of the harmful training. Raises StrategyError, in one sentence, for a model on which it cannot be done."""
        knobs = self.config
        inside = linearising.trained_in(model, knobs.modules)
        if not inside:
            raise StrategyError(f"enchtable: the decoder blocks of {type(model).__name__} hold nothing that mixes tokens; leave enchtable out")
        names = linearising.containers(model, knobs.modules) if knobs.ntk else []
        self._linearised = len(names)
        options: dict[str, Any] = {"only": lambda name: name.startswith(inside)}
        if knobs.ntk:
            options["attach"] = partial(linearising.linearised, names=names)
        try:
            return train(model, rows, data, plan, **options)
        except torch.OutOfMemoryError:
            raise
        except (StrategyError, RuntimeError, TypeError, AttributeError, IndexError) as error:  # whatever a model's code says to a derivative
            raise self._refusal(model, error) from error

    def _refusal(self, model: nn.Module, error: Exception) -> StrategyError:
        said = " ".join(str(error).split()).partition(". ")[0][:160]
        if not self.config.ntk:
            return StrategyError(f"enchtable: {type(model).__name__} cannot be trained on harmful answers ({said}); leave enchtable out")
        return StrategyError(
            f"enchtable.ntk=true needs a forward-mode derivative of {self.config.modules.replace('_', ' and ')}, which {type(model).__name__} does "
            f"not give ({said}); set enchtable.ntk=false, or try another model.attn_implementation"
        )

    def reaches(self, update: Update) -> bool:
        return update.name in self.safety

    def finish(self, model: nn.Module) -> nn.Module:
        knobs, aligned = self.config, self.data.weights["aligned"]
        if knobs.beta == 0:
            return model
        task_sq, safety_sq = 0.0, 0.0
        for update in linear.updates(model, aligned):
            task_sq += linear.norm(update) ** 2
            safety_sq += linear.norm(self.safety[update.name]) ** 2 if update.name in self.safety else 0.0
        alpha = strength(task_sq**0.5, safety_sq**0.5, knobs.beta)
        scores: list[float] = []

        def change(update: Update) -> Update | None:
            if update.name not in self.safety or alpha == 0:
                return None
            new, score = merged(update, self.safety[update.name].on(update.device), alpha, knobs.gamma, knobs.steepness)
            scores.append(score)
            return new

        model = linear.edit(model, aligned, change)
        self._facts = {
            "linearised_modules": self._linearised, "trained_on_harm": len(self.safety), "merged": len(scores),
            "alpha": alpha, "task_norm": task_sq**0.5, "safety_norm": safety_sq**0.5,
            "mean_score": sum(scores) / len(scores) if scores else 0.0, "smallest_score": min(scores, default=0.0),
        }  # fmt: skip
        return model
