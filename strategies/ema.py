"""Weight averaging: train as usual, keep a running average of the weights from the first step on, and hand over the average.

Stage: after every optimiser step, and at the end.
Paper: Kim et al., "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective", arXiv 2508.12531.
Reference: none read.
Idea: average <- decay * average + (1 - decay) * weights after each step, from the weights after the first on; the average is the result.
    It lags behind the task's noise and keeps decay^(steps - 1) of the start.
Knobs: decay - of the average (range 0.9 to 0.999, ours); the share of the start in the result falls with the number of steps, so the two go
    together.
Cost: two passes over the weights per step, no forward or backward. One float32 copy of what is trained, sharded as the ZeRO stage shards.
Needs: nothing.
Limits: a control, not a defence: it also gives up task score. The monitor's probes see the weights in training, not the average.
Interacts: every ZeRO stage; with lora the average is of the adapters' factors, not of their products. After spard's correction when
    listed after it.
Deviations: reconstructed: the paper's momentum in parameter space is read as an average kept aside, which the training never sees. It starts at
    the weights after the first step, which warm-up keeps close to the untouched ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from strategies import gradients
from strategies.base import Engine, Strategy, StrategyError


def average(kept: gradients.Gradients, weights: gradients.Gradients, decay: float) -> dict[str, Tensor]:
    """decay * kept + (1 - decay) * weights, {name: tensor}; decay 0 gives a copy of the weights bit for bit. Raises ValueError for
    different names."""
    return gradients.linear([(decay, kept), (1.0 - decay, weights)])


class Ema(Strategy):
    """An average beside the weights."""

    name = "ema"
    may_recover = True  # what is handed over is the average, which lags behind what probes see

    @dataclass(frozen=True)
    class Config:
        decay: float = field(default=0.98, metadata={"help": "Share of the old average that each step keeps; 0 is plain fine-tuning."})

        def __post_init__(self):
            if not 0 <= self.decay < 1:
                raise StrategyError(f"ema.decay={self.decay} must be in [0, 1); 0.9 to 0.999 average over 10 to 1000 steps")

    def __init__(self, config=None):
        super().__init__(config)
        self._parts: tuple[Tensor, ...] = ()
        self.updates, self._distance = 0, 0.0

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        decay = self.config.decay
        if decay == 0:
            return {}
        now = engine.weights()
        if self._parts:
            now = engine.linear([(decay, now.like(self._parts)), (1.0 - decay, now)])
        self._parts = now.parts
        self.updates += 1
        return {}

    def end(self, engine: Engine) -> None:
        if not self._parts:
            return
        now = engine.weights()
        difference = engine.linear([(1.0, now.like(self._parts)), (-1.0, now)])
        self._distance = difference.norm() / max(now.norm(), 1e-12)
        engine.move([(1.0, difference)])
        self._parts = ()

    def facts(self):
        return {"updates": self.updates, "relative_distance_to_last": self._distance}

    def state_dict(self) -> dict[str, Any]:
        return {"average": list(self._parts), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._parts, self.updates = tuple(state["average"]), int(state["updates"])
