"""Safety bottleneck regularisation: a few harmful prompts keep the last hidden state that the untouched model gives them.

Stage: during training, at every optimiser step.
Paper: "Safety Anchor" (SBR), ICML 2026, arXiv 2605.05995.
Reference: soyoaaa/SBR (HFT_SBR.py at 188990b, read).
Idea: whether a model refuses is decided in the last layer's hidden state of the prompt's last token, from which the answer starts. Add
    weight * MSE(that state, the untouched model's) of a few harmful prompts to the task loss.
Knobs: weight - of the penalty (paper 50, useful 5 to 200). num_anchors - harmful prompts (paper 8, one is enough).
Cost: a forward and backward of num_anchors prompts without answers per step. One vector per prompt is kept per lane.
Needs: safety rows, of which only the prompts are used (safety.data).
Limits: holds the first token of an answer; an attack that opens the answer itself goes round it. Few anchors stand for all prompts.
Interacts: every ZeRO stage. Owns the step, so not with another method that does. The anchors are in the training's template.
Deviations: anchors are drawn from safety.data with the trial's seed, not a fixed list of prompts; the formula is the official code's,
    mean over prompts and dimensions, once per optimiser step whatever the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from strategies import rows
from strategies.base import IGNORE, Batch, Engine, Example, Forward, Strategy, StrategyError, TrainingData

ROUND_OFF = 1e-11
"""Mean square of a difference, as a share of the states' own, that float32 makes by itself."""


def penalty(states: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of hidden states (K, d) from the untouched model's (K, d): a scalar, in float32. Raises ValueError for
    unequal shapes or no state."""
    if states.shape != reference.shape or not len(states):
        raise ValueError(f"states {tuple(states.shape)} and reference {tuple(reference.shape)}; both must be (K, d) with K at least 1")
    return (states.float() - reference.float()).square().mean()


def last_states(hidden: Tensor, labels: Tensor) -> Tensor:
    """(K, d): hidden (R, L, d) at the labelled position of each row that has one; anchors are labelled at their last token alone."""
    return hidden[labels != IGNORE]


def anchor(row: Example) -> Example:
    """The row's prompt alone, labelled at its last token: where the state is read."""
    prompt = row.prompt
    return Example(prompt, (IGNORE,) * (len(prompt) - 1) + prompt[-1:], row.id, row.kind)


class Sbr(Strategy):
    """Task loss and a penalty on hidden states, in one gradient."""

    name = "sbr"
    needs = frozenset({"safety"})
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        weight: float = field(default=50.0, metadata={"help": "Weight of the penalty; 0 is plain fine-tuning."})
        num_anchors: int = field(default=8, metadata={"help": "Harmful prompts whose state is held."})

        def __post_init__(self):
            if self.weight < 0:
                raise StrategyError(f"sbr.weight={self.weight} is negative, which would push the states away; use 5 to 200")
            if self.num_anchors < 1:
                raise StrategyError(f"sbr.num_anchors={self.num_anchors} must be at least 1")

    def __init__(self, config=None):
        super().__init__(config)
        self.anchors: tuple[Example, ...] = ()
        self._reference: Tensor | None = None
        self._head: nn.Module | None = None
        self._seen: list[Tensor] = []
        self._last = 0.0

    def take_rows(self, data: TrainingData) -> None:
        self.data = data
        self.anchors = tuple(anchor(row) for row in rows.refusals(data, self.config.num_anchors, self.name) if row.prompt)

    def check_model(self, model: nn.Module) -> list[str]:
        """The small copy's output layer is given hidden states. Raises StrategyError."""
        if self.config.weight > 0:
            rows.output_layer(model, self.name)
        return []

    def setup(self, model: nn.Module) -> nn.Module:
        if self.config.weight == 0:
            return model
        self._head = rows.output_layer(model, self.name)

        def make() -> Tensor:
            with rows.last_hidden(self._head) as seen:
                found = rows.read(model, self.anchors, self.data, lambda output, batch: last_states(seen[0].float(), batch["labels"]))
            return torch.stack(found)

        self._reference = rows.remembered(self.data, "sbr reference", self.anchors, make).to(self.data.device)
        return model

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        loss = engine.gradient(batches)
        if self.config.weight == 0:
            return {"loss": loss}
        held = self.data.batches(self.anchors, step, "sbr", len(self.anchors))
        with rows.last_hidden(self._head) as self._seen:
            self._last = engine.gradient(held, self._penalty) / self.config.weight
        return {"loss": loss, "state_drift": self._last}

    def _penalty(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """weight * mean over dimensions, summed over anchors, and their number: the mean over anchors is the engine's."""
        output = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        # popped, since it holds the whole graph; joined to the logits, since ZeRO-3 follows a backward from the model's own output
        hidden = self._seen.pop() + output.logits[..., :1] * 0.0
        real = (batch["labels"] != IGNORE).any(dim=1)
        count = real.sum()
        if not count:  # a row that only keeps workers in step
            return hidden.float().sum() * 0.0, count
        states = last_states(hidden, batch["labels"])
        reference = self._reference[batch["rows"][real]]
        value = penalty(states, reference)
        # before anything has moved the difference is round-off, of which Adam would make whole steps
        return self.config.weight * count * value * (value > ROUND_OFF * reference.square().mean()), count

    def facts(self):
        return {"anchors": len(self.anchors), "state_drift": self._last}

    def state_dict(self):
        return {"state_drift": self._last}

    def load_state_dict(self, state) -> None:
        self._last = float(state["state_drift"])
