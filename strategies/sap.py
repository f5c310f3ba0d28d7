"""Safety-aware probing: train the task under probes that make the harmful direction of the weights useless for it.

Stage: during training, at every optimiser step.
Paper: Wu et al., "Secure LLM Fine-Tuning via Safety-Aware Probing" (SAP), arXiv 2505.16737.
Reference: ChengcanWu/SAP (487edc3, read); rebuilt from Algorithm 1, see Deviations.
Idea: the contrastive loss of (safe, harmful) answers to the same prompts gives a harmful direction of the weights, the gradient that
    raises it. How much the task gains along that direction depends on vectors added to hidden states, the probes; one ascent step from
    zero makes them, and the task's gradient is then taken with the probes in place.
Knobs: beta - size of the probes (paper 0.05). epsilon - shift along the harmful direction, as a share of the trained weights' norm (the
    code: 2e-5 of the adapters' norm; ours larger, so that the two task gradients differ by more than round-off). probe - `unit`, every
    layer's probe has a root mean square of beta (the size that the official code's AdamW step gives it), or `gradient`, beta times the
    gradient (the paper's formula). loss - `log_sigmoid`, -log sigmoid of the difference (code), or `difference`, the plain difference of
    losses (first version of the paper). temperature - divides the difference. start, end - first and last probed layer, 0 is the first
    after the embedding; without them 0.34 and 0.6 of the depth (the paper's 11 to 19 of 32). num_pairs - pairs in the contrastive set
    (code 48; ours, the number). pairs_per_step - of them per step (code 8).
Cost: a forward and backward on the pairs (two rows each) and two forwards and short backwards (down to the first probed layer, no
    parameter gradients) on the task's rows beyond plain fine-tuning; about 3 times the time. One copy of the weights while shifted.
Needs: safety rows with harmful answers to the same prompts (safety.data with a column `rejected`: safety, harmful).
Limits: made and measured with LoRA on 7B models; on the embedded model (full fine-tuning, clean task) it did not slow the loss of safety at
    beta 0.05 to 5. Where every pair is told apart already, the contrastive gradient vanishes and a step is
    plain (`steps_without_direction` counts them); raise temperature then.
Interacts: not with models whose blocks give no hidden states of (rows, tokens, width), which validation refuses. Not under ZeRO-3. lora is
    its natural partner: a shift of adapters is a small copy. Gradient checkpointing works.
Deviations: log-probabilities are sums over the answer's tokens with shifted labels, of two full sequences (the official data path feeds
    prompts without answers and compares unshifted logits: 0.839 where the shifted loss is 0.301 on 2 random rows of 8 tokens; given labels
    shifted by hand its formula agrees with ours within 1e-7). The probe of a step is made in that step at probe zero (the code's is one
    step old), lives in hooks for that step alone, and is gone from saved models. Weights are restored from a copy. The probes of official
    layers 3 and 9 are a knob, not the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strategies import block_outputs, blocks, rows
from strategies.base import Batch, Engine, Example, Forward, Strategy, StrategyError, TrainingData

SMALLEST = 1e-12
"""Norms from which on a gradient has a direction."""


def contrastive(logp_chosen: Tensor, logp_rejected: Tensor, temperature: float = 1.0, form: str = "log_sigmoid") -> Tensor:
    """Loss of each pair, (N,), of log-probabilities (N,) of the safe and of the harmful answer: -log sigmoid((chosen - rejected) / T), or
    with form `difference` (rejected - chosen) / T. Low where the safe answer is the likelier one. Empty input gives an empty tensor."""
    margin = (logp_chosen - logp_rejected) / temperature
    return -nn.functional.logsigmoid(margin) if form == "log_sigmoid" else -margin


def probes(shifted: Sequence[Tensor], here: Sequence[Tensor], beta: float, form: str = "unit") -> list[Tensor]:
    """The probes of each layer, from the task loss's gradients (d,) with respect to them at the shifted weights and at the weights.

    `gradient`: beta * (shifted - here). `unit`: the same direction with root mean square beta; zero where there is no direction.
    """
    made = []
    for there, plain in zip(shifted, here, strict=True):
        ascent = there - plain
        length = float(ascent.norm())
        scale = 1.0 if form == "gradient" else (math.sqrt(ascent.numel()) / length if length > SMALLEST else 0.0)
        made.append(ascent * (beta * scale))
    return made


def default_range(num_layers: int) -> tuple[int, int]:
    """First and last probed layer where none is given: 0.34 and 0.6 of the depth (11 and 19 of 32)."""
    start = min(round(0.34 * num_layers), num_layers - 1)
    return start, min(max(start, round(0.6 * num_layers)), num_layers - 1)


class Sap(Strategy):
    """Probes as forward hooks with leaf vectors."""

    name = "sap"
    needs = frozenset({"safety", "harmful"})
    max_zero_stage = 2
    zero_reason = "probes need gradients of hidden states alone, at shifted weights, and stage 3 holds weights only while a whole backward runs"
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        beta: float = field(default=0.05, metadata={"help": "Size of the probes; 0 is plain fine-tuning."})
        epsilon: float = field(default=1e-2, metadata={"help": "Shift along the harmful direction, as a share of the trained weights' norm."})
        probe: Literal["unit", "gradient"] = field(default="unit", metadata={"help": "`unit` (root mean square beta) or `gradient` (beta times it)."})
        loss: Literal["log_sigmoid", "difference"] = field(default="log_sigmoid", metadata={"help": "Form of the contrastive loss."})
        temperature: float = field(default=1.0, metadata={"help": "Divides the difference of log-probabilities."})
        start: int | None = field(default=None, metadata={"help": "First probed layer, from 0; 0.34 of the depth without it."})
        end: int | None = field(default=None, metadata={"help": "Last probed layer, inclusive; 0.6 of the depth without it."})
        num_pairs: int = field(default=48, metadata={"help": "Pairs of answers in the contrastive set."})
        pairs_per_step: int = field(default=8, metadata={"help": "Pairs per step."})

        def __post_init__(self):
            for knob in ("beta", "epsilon"):
                if getattr(self, knob) < 0:
                    raise StrategyError(f"sap.{knob}={getattr(self, knob)} is negative, which would turn the method round; use 0 or more")
            if self.temperature <= 0:
                raise StrategyError(f"sap.temperature={self.temperature} must be above 0")
            for knob in ("num_pairs", "pairs_per_step"):
                if getattr(self, knob) < 1:
                    raise StrategyError(f"sap.{knob}={getattr(self, knob)} must be at least 1")
            if self.start is not None and self.end is not None and not 0 <= self.start <= self.end:
                raise StrategyError(f"sap.start={self.start}, sap.end={self.end} is no range of layers; start must be 0 to end")

    def __init__(self, config=None):
        super().__init__(config)
        self.rows: tuple[Example, ...] = ()
        self.layers: list[nn.Module] = []
        self._places: tuple[block_outputs.Place, ...] = ()
        self.range = (0, 0)
        self.probed = self.without = 0

    @property
    def idle(self) -> bool:
        """Strength zero: plain fine-tuning, without the other passes."""
        return self.config.beta == 0 or self.config.epsilon == 0

    def check(self, *, num_layers: int | None, num_workers: int) -> list[str]:
        if num_layers is not None:
            self._range(num_layers)
        return []

    def _range(self, layers: int) -> tuple[int, int]:
        start, end = default_range(layers)
        start = self.config.start if self.config.start is not None else start
        end = self.config.end if self.config.end is not None else max(end, start)
        if not 0 <= start <= end < layers:
            raise StrategyError(f"sap.start={start}, sap.end={end} is outside the model: it has {layers} layers, 0 to {layers - 1}")
        return start, end

    def take_rows(self, data: TrainingData) -> None:
        self.data = data
        chosen, rejected = rows.pairs(data, self.config.num_pairs, self.name)
        self.rows = chosen + rejected

    def check_model(self, model: nn.Module) -> list[str]:
        """Every layer of the small copy gives hidden states that carry a probe. Raises StrategyError."""
        if not self.idle:
            places = block_outputs.places(model, self.name)
            block_outputs.check_carries(model, range(len(places)), places, self.name)
        return []

    def setup(self, model: nn.Module) -> nn.Module:
        found = blocks.of(model)
        self.range = self._range(found.count)
        if self.idle:
            return model
        self.layers = list(found.modules[self.range[0] : self.range[1] + 1])
        places = block_outputs.places(model, self.name)
        block_outputs.check_carries(model, range(self.range[0], self.range[1] + 1), places, self.name)
        self._places = places[self.range[0] : self.range[1] + 1]
        return model

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        if self.idle:
            return {"loss": engine.gradient(batches)}
        pair_loss = engine.gradient(self._pair_batches(step), self._contrastive)
        harmful = engine.gradients()
        length = harmful.norm()
        metrics = {"safety_loss": pair_loss, "safety_grad_norm": length}
        if length <= SMALLEST:
            self.without += 1
            return {"loss": engine.gradient(batches), "probe_norm": 0.0, **metrics}
        leaves = [torch.zeros(place.width, device=self.data.device, requires_grad=True) for place in self._places]
        with block_outputs.added(self.layers, self._places, leaves):
            here = engine.sensitivity(leaves, batches)
            with engine.shifted(harmful, self.config.epsilon * engine.weights().norm() / length):
                shifted = engine.sensitivity(leaves, batches)
            made = probes(shifted, here, self.config.beta, self.config.probe)
            with torch.no_grad():
                for leaf, probe in zip(leaves, made, strict=True):
                    leaf.copy_(probe)
                    leaf.requires_grad_(False)
            loss = engine.gradient(batches)
        self.probed += 1
        entangled = math.sqrt(sum(float((a - b).norm()) ** 2 for a, b in zip(shifted, here, strict=True)))
        return {"loss": loss, "probe_norm": math.sqrt(sum(float(p.norm()) ** 2 for p in made)), "entanglement": entangled, **metrics}

    def _pair_batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches: the safe answers, then the harmful ones to the same prompts in the same order."""
        data, count = self.data, len(self.rows) // 2
        mine = data.draw(self.rows[:count], step, "sap", self.config.pairs_per_step)[data.rank :: data.world_size]
        share = -(-self.config.pairs_per_step // data.world_size)
        size = max(1, min(data.per_device_batch_size // 2, share))  # two rows a pair
        drawn = [mine[i * size : (i + 1) * size] for i in range(-(-share // size))]
        return [data.collate(self.rows, [*indices, *(count + i for i in indices)]) for indices in drawn]

    def _contrastive(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logp = rows.answer_log_probabilities(logits, batch["labels"])
        if len(logp) % 2:  # one row without labels, which only keeps workers in step
            return logp.sum() * 0.0, torch.zeros_like(logp[0])
        chosen, rejected = logp.chunk(2)
        return contrastive(chosen, rejected, self.config.temperature, self.config.loss).sum(), torch.ones_like(chosen).sum()

    def facts(self):
        return {"probed_layers": list(self.range), "steps_probed": self.probed, "steps_without_direction": self.without, "pairs": len(self.rows) // 2}

    def state_dict(self) -> dict[str, Any]:
        return {"probed": self.probed, "without": self.without}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.probed, self.without = int(state["probed"]), int(state["without"])
