"""Extrapolate alignment before fine-tuning: go further in the direction alignment took, so that more of it is left afterwards.

Stage: before training (the weights training starts from are changed once).
Paper: Perin et al., "LoX: Low-Rank Extrapolation Robustifies LLM Safety Against Fine-tuning", COLM 2025, arXiv 2506.15606.
Reference: VITA-Group/LoX (safety/LoX.py at 9213ce6), read and run.
Idea: W = W_aligned + coef * SVD_rank(W_aligned - W_unaligned), then train as usual.
Knobs: coef - length of the extrapolation (1; useful 0.25 to 2; 0 is plain). rank - singular directions taken of each weight (4 to 16;
    0 takes all, the code's default).
Cost: one singular value decomposition per weight and lane (none with rank=0). Nothing in training.
Needs: unaligned_base (model.unaligned_name_or_path).
Limits: too large a coef gives incoherent text and refusals of harmless prompts: keep an over-refusal limit. Abstract's claim: attack
    success down by 11 to 54 points.
Interacts: name it before lora, which adapts what it leaves; adapters are merged at the end, since they do not fit the model one started
    from, and the result is a whole model. Every ZeRO stage. Methods that remember the untouched model (safegrad's reference) remember
    it before the extrapolation; merging methods after it see the extrapolated weights as the start of training.
Deviations: differences and decompositions in float32 (code: difference in bfloat16). Every matrix of the model is extrapolated, as in the
    code, embeddings too, each expert of a mixture by itself; matrices that alignment left alone are not touched. Compared with the official
    script on two random 3-layer Llamas, rank 0 with coef 1 and rank 3 with coef 0.7: within 0.9 % of a matrix's largest entry, all of it
    the script's bfloat16; the same formula in float32 agrees to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from strategies import blocks, linear, matrices, merging, tensors
from strategies.base import Strategy, StrategyError, Tensors, TrainingData


def extrapolate(aligned: Tensor, unaligned: Tensor, coef: float = 1.0, rank: int = 0) -> Tensor:
    """aligned + coef * SVD_rank(aligned - unaligned), float32; both (d_out, d_in). rank 0 takes the whole difference.

    Raises ValueError for unlike shapes and for what is not finite.
    """
    tensors.check_alike("lox.extrapolate", aligned=aligned, unaligned=unaligned)
    difference = aligned.float() - unaligned.float()
    if rank:
        left, right = linear.leading(difference, rank)
        difference = left @ right
    return aligned.float() + coef * difference


class Extrapolated(Mapping):
    """The weights training starts from, one at a time when they are asked for: what merging methods after this one compare with."""

    def __init__(self, method: Lox):
        self._method, self._aligned = method, method.aligned

    def __getitem__(self, name: str) -> Tensor:
        weight = self._aligned[name]
        step = self._method.step_of(name, weight)
        return weight if step is None else (weight.float() + step.to(weight.device)).to(weight.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._aligned

    def __iter__(self) -> Iterator[str]:
        return iter(self._aligned)

    def __len__(self) -> int:
        return len(self._aligned)


class Lox(Strategy):
    """Weights are extrapolated in setup, after methods that read the untouched model and before anything is frozen or adapted."""

    name = "lox"
    needs = frozenset({"unaligned_base"})
    changes_start = True
    setup_rank = 5

    @dataclass(frozen=True)
    class Config:
        coef: float = field(default=1.0, metadata={"help": "Length of the extrapolation, in lengths of what alignment did; 0 for none."})
        rank: int = field(default=8, metadata={"help": "Singular directions taken of each weight; 0 for all."})

        def __post_init__(self):
            if self.coef < 0:
                raise StrategyError(f"lox.coef={self.coef} is negative, which would undo alignment; use 0.25 to 2")
            if self.rank < 0:
                raise StrategyError(f"lox.rank={self.rank} is negative; give how many singular directions are taken, 0 for all")

    def __init__(self, config=None):
        super().__init__(config)
        self.aligned: Tensors = {}
        self._matrices: frozenset[str] = frozenset()
        self._others: frozenset[str] = frozenset()

    def prepare_data(self, data: TrainingData) -> TrainingData:
        self.data, self.aligned = data, data.weights["aligned"]
        if self.config.coef == 0:
            return data
        return dataclasses.replace(data, weights={**data.weights, "aligned": Extrapolated(self)})

    def step_of(self, name: str, weight: Tensor) -> Tensor | None:
        """coef * SVD_rank(aligned - unaligned) of one weight, as stored, float32 on the CPU, of a batch of matrices (experts) one by one; None
        where it is no matrix or did not move."""
        if (name not in self._matrices and weight.ndim != 2) or name in self._others or self.config.coef == 0:
            return None
        unaligned = self.data.weights["unaligned"]
        if name not in unaligned:
            raise StrategyError(f"lox: the unaligned model has no parameter {name}; it must be the same architecture as the aligned one")
        if not self.config.rank:
            difference = self._difference(name, weight)
            return self.config.coef * difference if difference.count_nonzero() else None
        key = ("lox", self.data.fingerprint, name, self.config.rank)
        if key not in self.data.cache:
            difference = self._difference(name, weight)
            known = linear.leading(difference.to(self.data.device), self.config.rank) if difference.count_nonzero() else None
            self.data.cache[key] = None if known is None else tuple(part.cpu() for part in known)
        factors = self.data.cache[key]
        return None if factors is None else self.config.coef * factors[0] @ factors[1]

    def _difference(self, name: str, weight: Tensor) -> Tensor:
        before = linear.pick(self.data.weights["unaligned"], name, tuple(weight.shape), "unaligned")
        return weight.cpu().float() - before.cpu().float()

    @torch.no_grad()
    def setup(self, model: nn.Module) -> nn.Module:
        """Raises StrategyError where the model given is not the aligned one."""
        if self.config.coef == 0:
            return model
        known, inside = matrices.stored(model), blocks.of(model)
        self._matrices = frozenset(known)
        self._others = frozenset(name for name, _ in model.named_parameters() if inside.holds(name) and name not in known)
        before = moved = 0.0
        changed = 0
        for name, parameter in model.named_parameters():
            start = linear.pick(self.aligned, name, tuple(parameter.shape))
            step = self.step_of(name, start)
            if step is None:
                continue
            before, moved, changed = before + float(start.double().norm()) ** 2, moved + float(step.double().norm()) ** 2, changed + 1
            parameter.copy_((start.float() + step.to(start.device)).to(start.dtype))
        self._facts = {"extrapolated": changed, "relative_step": (moved / before) ** 0.5 if before else 0.0}
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """A whole model: adapters alone would be put on the model without its extrapolation."""
        return merging.merged(model, "lox: the adapter") if self.config.coef and linear.adapters(model) else model
