"""Project the updates that point away from alignment onto what alignment did to the same weight.

Stage: after training.
Paper: Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models", NeurIPS 2024,
    arXiv 2405.16833.
Reference: IBM/SafeLoRA (model.py at d81fda1), read and run.
Idea: V = W_aligned - W_unaligned spans what alignment changed in a weight, C = V V^T / ||V||_F. Where the update dW and C dW point in
    different directions (small cosine), dW is replaced by C dW; for an adapter B becomes C B.
Knobs: select - number: the `number` updates of smallest cosine are projected (official default); threshold: all of cosine <= threshold.
    number - how many (10). threshold - of the cosine (0.5; useful 0.2 to 0.8).
Cost: no training and no data; per weight two products with V. Memory beyond the model: three matrices at a time. Trials that differ in
    these knobs alone share one training.
Needs: unaligned_base (model.unaligned_name_or_path).
Limits: of a mixture every expert is a weight of its own, so `number` counts experts. Projecting out takes task skill as fast as harm in
    Ponkshe et al. (arXiv 2505.14185): compare with random_subspace. C rescales: an update that is projected is also shrunk or grown by
    about the size of V.
Interacts: adapters stay adapters of the same rank; whole models are projected weight by weight. Every ZeRO stage, since it acts on the
    gathered model. With another merging method the order of the recipe counts.
Deviations: weights are matched by name (official code: by order); all linear layers of the decoder blocks that were trained, also of whole
    models (paper: adapters); scale alpha / r included; where several cosines tie, exactly `number` updates are projected. Weights that
    alignment left alone are not projected. The cosine is not rounded (official: 5 places). Compared with the official class on a random
    adapter of rank 2 on q_proj and up_proj of a 3-layer Llama: the same modules chosen by number=3 and by two thresholds, B within 4e-7 of
    its largest entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from strategies import linear, updates
from strategies.base import Strategy, StrategyError


def project(delta: Tensor, aligned: Tensor, unaligned: Tensor) -> Tensor:
    """C delta, with V = aligned - unaligned (d_out, d_in) and C = V V^T / ||V||_F (d_out, d_out).

    `delta` (d_out, n): an update (n = d_in), or its left factor B (n = r), since C (B A) = (C B) A. Where V is (near) zero alignment did
    nothing to the weight and `delta` is returned as it is.
    """
    direction = aligned.float() - unaligned.float()
    if float(direction.norm()) <= linear.TINY:
        return delta
    return linear.onto(direction, delta.float())


def chosen(cosines: dict[str, float], select: str, number: int, threshold: float) -> frozenset[str]:
    """Names of the updates to project: the `number` of smallest cosine (ties by name), or those of cosine <= threshold."""
    if select == "threshold":
        return frozenset(name for name, cosine in cosines.items() if cosine <= threshold)
    return frozenset(sorted(cosines, key=lambda name: (cosines[name], name))[:number])


class SafeLora(Strategy):
    """Updates are read twice: once for their cosines, once to project the chosen ones."""

    name = "safe_lora"
    needs = frozenset({"unaligned_base"})
    changes_training = False
    merges = True

    @dataclass(frozen=True)
    class Config:
        select: Literal["number", "threshold"] = field(default="number", metadata={"help": "How projected updates are chosen."})
        number: int = field(default=10, metadata={"help": "With select=number: how many updates, those of smallest cosine; 0 for none."})
        threshold: float = field(default=0.5, metadata={"help": "With select=threshold: largest cosine that is projected."})

        def __post_init__(self):
            if self.number < 0:
                raise StrategyError(f"safe_lora.number={self.number} is negative; give how many weights are projected")
            if not -1 <= self.threshold <= 1:
                raise StrategyError(f"safe_lora.threshold={self.threshold} is no cosine; it lies in [-1, 1], usually 0.2 to 0.8")

    def reaches(self, update: updates.Update) -> bool:
        return self._direction(update) is not None

    def finish(self, model: nn.Module) -> nn.Module:
        knobs, aligned = self.config, self.data.weights["aligned"]
        if knobs.select == "number" and not knobs.number:
            return model
        cosines = {}
        for update in linear.updates(model, aligned):
            if (direction := self._direction(update)) is not None:
                cosines[update.name] = linear.similarity(linear.projected(update, direction), update)
        names = chosen(cosines, knobs.select, knobs.number, knobs.threshold)
        before = after = 0.0

        def change(update: updates.Update) -> updates.Update | None:
            nonlocal before, after
            if update.name not in names:
                return None
            new = linear.projected(update, self._direction(update))
            before, after = before + linear.norm(update) ** 2, after + linear.norm(new) ** 2
            return new

        model = linear.edit(model, aligned, change)
        self._facts = {
            "projected": len(names), "updates": len(cosines), "norm_before": before**0.5, "norm_after": after**0.5,
            "smallest_cosine": min(cosines.values(), default=0.0), "largest_cosine": max(cosines.values(), default=0.0),
        }  # fmt: skip
        return model

    def _direction(self, update: updates.Update) -> Tensor | None:
        """V of an update's weight; None where it is no matrix or alignment left it alone."""
        if not update.is_matrix:
            return None
        return linear.alignment(update, self.data.weights["aligned"], self.data.weights["unaligned"])
