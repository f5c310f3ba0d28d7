"""Add a safety vector distilled from a linearised harmful training, less where it interferes with the task.

Stage: after training.
Paper: Wu et al., "EnchTable: Unified Safety Alignment Transfer in Fine-tuned Large Language Models", IEEE S&P 2026, arXiv 2511.09880.
Reference: AntCPLab/EnchTable (merge/models/enchtable.py at 4731902, train/sft/workflow.py), read; the merge run.
Idea: fine-tune the aligned model on harmful answers with its attention linearised around the start (f(x; W0) + J (W - W0), the neural
    tangent kernel's regime); t_safe = W_aligned - W_harmful. Scaled to alpha = beta * ||t_task|| / ||t_safe|| (norms over all weights),
    each weight gets t_task + s * alpha * t_safe with s = exp(-steepness * mean |(U^T U - I) S (V V^T - I)|) over the leading singular
    vectors of both: s is 1 where they do not meet.
Knobs: beta - size of the safety vector relative to the task's (official 0.1, useful 0.05 to 0.5; 0 is plain). gamma - share of singular
    vectors compared (0.5). steepness - of the damping (200). ntk - linearise; off is a plain low-rank training, the ablation.
    modules - attention (paper, Llama), or attention_mlp (paper, Qwen and Mistral). num_harmful - harmful rows, at most (1000).
    harmful_steps, harmful_learning_rate, harmful_rank - of that side training (AdamW).
Cost: one short training per lane, with ntk at about twice the forward; a thin singular value decomposition per weight of an adapter, a
    full one per weight of a whole model. Trials that differ in these knobs share one training.
Needs: harmful rows (safety.harmful_data, or a column `rejected` in safety.data).
Limits: the vector is only as good as the harmful answers; the steepness is a constant of the code without a stated reason.
Interacts: every ZeRO stage. Adapters stay adapters of rank r + harmful_rank. ntk needs attention that forward-mode differentiation can
    pass (sdpa or eager, not flash_attention_2). With another merging method safety deltas add up.
Deviations: the official code linearises each projection by itself; a linear layer is linear in its weight, so that changes nothing (its
    harmful training is plain training of these projections). Here the attention (MLP) module is linearised as a whole, and in the low-rank
    factors' product. The harmful update is low rank (official: full), and attention_mlp linearises every layer (official: all but the first
    and last 12). Norms are those of the decoder blocks; only weights that training moved are merged. For low-rank updates gamma counts of
    the rank: the other singular values are zero and their vectors arbitrary, though the official code averages over them. Compared with the
    official merge on a 3-layer Llama and two random dense updates: s within 1e-7, weights within 4e-8, given the same norms (the official
    ones count a tied embedding twice).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from strategies import auxiliary, blocks, linear
from strategies.base import Strategy, StrategyError
from strategies.linear import Update
from strategies.rows import sample

CONTAINERS = {
    "attention": re.compile(r"\.(self_attn|attn|attention|self_attention)$"),
    "attention_mlp": re.compile(r"\.(self_attn|attn|attention|self_attention|mlp|feed_forward|ffn)$"),
}
"""Modules that are linearised as a whole."""


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

    Norms run over all tensors of each mapping. A name that only `task` has keeps its update; one that only `safety` has is left out.
    """
    task_norm, safety_norm = (math.sqrt(sum(float(t.double().norm()) ** 2 for t in group.values())) for group in (task, safety))
    alpha = strength(task_norm, safety_norm, beta)
    return {
        name: merged(Update(name, full=t.float()), Update(name, full=safety[name].float()), alpha, gamma, steepness)[0].full
        if name in safety else t
        for name, t in task.items()
    }  # fmt: skip


def containers(model: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Names of the modules in decoder blocks that match, the outermost where they are nested."""
    found: list[str] = []
    inside = blocks.of(model)
    for name, _ in model.named_modules():
        if pattern.search(name) and inside.holds(name) and not name.startswith(tuple(f"{n}." for n in found)):
            found.append(name)
    return found


@contextmanager
def linearised(model: nn.Module, modules: dict[str, nn.Module], factors: auxiliary.Factors, pattern: re.Pattern[str]) -> Iterator[None]:
    """Inside, modules whose names match give f(x; W0) + d/de f(x; W0 + e * left @ right) at e = 0: first order in their weights.

    The derivative is forward-mode through a module as a whole (the outermost where they are nested). Hooks and patches are gone
    afterwards, also after an exception.
    """
    shift: list[Tensor | None] = [None]

    def hook(left: Tensor, right: Tensor):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + (shift[0] * (inputs[0].to(right.dtype) @ right.T @ left.T)).to(output.dtype)

        return add

    def around(forward):
        def first_order(*args, **kwargs):
            if "past_key_values" in kwargs:  # nothing is generated, and a cache would keep tensors of the derivative
                kwargs["past_key_values"] = None
            several: list[int] = []

            def moved(amount: Tensor) -> Tensor:
                shift[0] = amount
                try:
                    output = forward(*args, **kwargs)
                finally:
                    shift[0] = None
                if isinstance(output, tuple):
                    several.append(len(output))
                    return output[0]
                return output

            start = torch.zeros((), device=next(iter(factors.values()))[0].device)
            value, slope = torch.func.jvp(moved, (start,), (torch.ones_like(start),))
            return (value + slope, *[None] * (several[0] - 1)) if several else value + slope

        return first_order

    with ExitStack() as stack:
        for name in containers(model, pattern):
            module = model.get_submodule(name)
            stack.enter_context(_patched(module, around(module.forward)))
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(*factors[name])).remove)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no forward-mode derivative
        yield


@contextmanager
def _patched(module: nn.Module, forward) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


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

    def setup(self, model: nn.Module) -> nn.Module:
        if self.config.beta > 0:
            self.safety = auxiliary.as_updates(self._harmful(model), -1.0)
        return model

    def _harmful(self, model: nn.Module) -> auxiliary.Factors:
        knobs = self.config
        if not self.data.harmful:
            raise StrategyError("enchtable needs harmful answers: give safety.harmful_data, or a column `rejected` in safety.data")
        pattern = CONTAINERS[knobs.modules]
        inside = [f"{name}." for name in containers(model, pattern)]
        if not inside:
            raise StrategyError("enchtable: no attention module found in the decoder blocks (names end in self_attn, attn or attention)")
        plan = auxiliary.Plan(knobs.harmful_steps, knobs.harmful_learning_rate, knobs.harmful_rank, seed=self.data.seed)
        rows = sample(self.data.harmful, knobs.num_harmful, self.data.seed)
        options = {"only": lambda name: name.startswith(tuple(inside))}
        if knobs.ntk:
            options["attach"] = lambda model, modules, factors: linearised(model, modules, factors, pattern)
        what = f"harmful {knobs.modules} {'linearised' if knobs.ntk else 'plain'}"
        try:
            return auxiliary.remembered(model, rows, self.data, plan, what, **options)
        except NotImplementedError as error:
            raise StrategyError(
                f"enchtable.ntk: this model's attention has no forward-mode derivative ({' '.join(str(error).split())[:120]}); set "
                "model.attn_implementation=eager, or enchtable.ntk=false"
            ) from error

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
            "merged": len(scores), "alpha": alpha, "task_norm": task_sq**0.5, "safety_norm": safety_sq**0.5,
            "mean_score": sum(scores) / len(scores) if scores else 0.0, "smallest_score": min(scores, default=0.0),
        }  # fmt: skip
        return model
