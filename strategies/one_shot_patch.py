"""A few steps on a handful of refusals, after training: the cheapest repair, and the one to beat.

Stage: after training.
Paper: "Safety at One Shot: Patching Fine-Tuned LLMs with a Single Instance", arXiv 2601.01887 (abstract read, numbers not).
Reference: no code was found.
Idea: the gradient of refusing is of low rank, so that one harmful prompt with its refusal, trained on for a few steps, brings much of the
    lost safety back.
Knobs: examples - refusal rows, 1 to 10, drawn with the trial's seed. steps - of AdamW on all of them at once; 0 leaves the model. rate -
    their learning rate as a share of the training's peak rate.
Cost: steps forward and backward passes of `examples` rows, and two AdamW moments of what was trained; seconds.
Needs: safety rows (safety.data).
Limits: what one example teaches may be to refuse everything: watch over-refusal and the task score. It depends on the example drawn, so use
    several seeds.
Interacts: moves what training moved (adapters, or the weights that are not frozen), so it goes with lora and freeze_layers. Trials that
    differ in its knobs alone share a training. Any ZeRO stage, since it acts on the gathered model.
Deviations: the paper chooses its instance by a search, here it is drawn. A constant rate, gradients clipped to norm 1, no weight decay, no
    dropout; the default steps and rate are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from strategies import after, gradients, rows
from strategies.base import Example, Strategy, StrategyError, TrainingData


def clipped(gradient: Mapping[str, Tensor], limit: float = 1.0) -> dict[str, Tensor]:
    """{name: tensor} scaled to a norm over all of them of at most `limit`. Raises FloatingPointError where it is not finite."""
    norm = gradients.norm(gradient)
    if not norm < float("inf"):
        raise FloatingPointError(f"one_shot_patch: the gradient's norm became {norm}; lower one_shot_patch.rate")
    return {name: part * min(1.0, limit / (norm + 1e-6)) for name, part in gradient.items()}


def patch(model: nn.Module, examples: Sequence[Example], data: TrainingData, steps: int, learning_rate: float) -> tuple[float, float]:
    """`steps` of AdamW on all `examples` at once, in place; (mean loss before, mean loss after), per answer token.

    Deterministic. Weights are held in float32 while they move, whatever type they are stored in. With 0 steps nothing is touched.
    """
    parameters = after.movable(model)
    with after.moving(model, parameters):
        before = after.mean_loss(model, examples, data)
        masters = {name: p.detach().float().clone() for name, p in parameters.items()}
        optimizer = torch.optim.AdamW(list(masters.values()), lr=learning_rate, weight_decay=0.0)
        for _ in range(steps):
            _, found = after.gradient(model, parameters, examples, data)
            for name, part in clipped(found).items():
                masters[name].grad = part
            optimizer.step()
            after.restore(parameters, masters)
        return before, after.mean_loss(model, examples, data)


class OneShotPatch(Strategy):
    """SFT steps on 1 to 10 refusals."""

    name = "one_shot_patch"
    needs = frozenset({"safety"})
    changes_training = False
    merges = True
    moves_outside = True

    @dataclass(frozen=True)
    class Config:
        examples: int = field(default=1, metadata={"help": "Refusal rows trained on, 1 to 10."})
        steps: int = field(default=10, metadata={"help": "Optimiser steps; 0 leaves the model as training left it."})
        rate: float = field(default=0.5, metadata={"help": "Learning rate as a share of the training's peak rate."})

        def __post_init__(self):
            if not 1 <= self.examples <= 10:
                raise StrategyError(f"one_shot_patch.examples={self.examples} must be 1 to 10; for more rows use safe_instruct")
            if self.steps < 0 or self.rate <= 0:
                raise StrategyError(f"one_shot_patch.steps={self.steps} must not be negative and rate={self.rate} must be above 0")

    def __init__(self, config=None):
        super().__init__(config)
        self.rows: tuple[Example, ...] = ()

    def prepare_data(self, data: TrainingData) -> TrainingData:
        self.data, self.rows = data, rows.refusals(data, self.config.examples, self.name)
        return data

    def finish(self, model: nn.Module) -> nn.Module:
        if self.config.steps:
            rate = self.config.rate * self.data.learning_rate
            before, now = patch(model, self.rows, self.data, self.config.steps, rate)
            self._facts = {"patched_rows": len(self.rows), "refusal_loss_before": before, "refusal_loss_after": now}
        return model
