"""Train low-rank adapters beside the weights instead of the weights.

Stage: before training (adapters are attached once).
Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
Reference: huggingface/peft.
Idea: the update of a weight matrix is (lora_alpha / lora_r) * B A with A random, B zero at the start and rank lora_r; the weights stay.
Knobs: lora_r - rank. lora_alpha - scale. lora_dropout - on the adapter's input. target_modules - `all-linear` (every linear layer of the
    decoder blocks, and of a mixture every expert; routers keep their weights) or names such as q_proj,v_proj. layers - decoder layers that
    get adapters, e.g. 2-5 or [0, 1]; all without it.
Cost: about a full backward in time, a few per cent of its optimiser memory.
Needs: nothing.
Limits: not a defence by itself: at rank 8 and an honest learning rate it erodes safety as full fine-tuning does. Experts that lie in
    one tensor have adapters in peft's form (`target_parameters`), without dropout; each forward adds them to a copy of the layer's experts.
    In state-space models some layers cannot be adapted, since kernels read their weight alone: `all-linear` leaves them out and the record
    says so (`not_adapted`), naming them is refused.
Interacts: the learning rate is on another scale, about 5 times that of full fine-tuning, and its searched range is centred there.
    Modules frozen by freeze_layers get no adapter. safegrad's KL gradient is exactly zero at the first step, since B is zero.
Deviations: default targets are QLoRA's (every linear layer), not the paper's query and value; rank and scale are those of the safety papers
    (8, 16). What peft adapts is read back and compared with what was asked for. Adapters are saved unmerged. Where a method after training
    needs whole weights they are merged, and the merged model must give the unmerged one's logits (float32 within 1e-4 of the largest,
    float16 1e-2, bfloat16 6e-2), or the trial fails.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from strategies import blocks, lora_effect, lora_targets
from strategies.base import Strategy, StrategyError


def parse_layers(value: str | tuple[int, ...] | None, layers: int | None = None) -> tuple[int, ...] | None:
    """Layers meant by "2-5", "0,3-4", a sequence of numbers, or None (all). Raises StrategyError for anything else."""
    if value is None:
        return None
    found: list[int] = []
    try:
        for item in value.split(",") if isinstance(value, str) else value:
            first, _, last = (part.strip() for part in str(item).strip().partition("-"))
            if not all(part.isascii() and part.isdecimal() and len(part) <= 5 for part in (first, last or first)):
                raise ValueError
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise StrategyError(f"lora.layers={str(value)[:100]!r} is not a list of layers; write 2-5, or 0,3-4, or [0, 1]") from None
    if not found:
        raise StrategyError(f"lora.layers={value!r} names no layer; leave it out for all")
    if layers is not None and max(found) >= layers:
        raise StrategyError(f"lora.layers={value!r} is outside the model: it has {layers} layers, 0 to {layers - 1}")
    return tuple(sorted(set(found)))


class Lora(Strategy):
    """Adapters from peft."""

    name = "lora"
    setup_rank = 20

    @dataclass(frozen=True)
    class Config:
        lora_r: int = field(default=8, metadata={"help": "Rank of the adapters.", "max": 16_384})
        lora_alpha: float = field(default=16, metadata={"help": "Scale: the update is lora_alpha / lora_r times B A.", "max": 100_000})
        lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
        target_modules: str | tuple[str, ...] = field(
            default="all-linear", metadata={"help": "`all-linear`, or names of modules such as q_proj,v_proj."}
        )
        layers: str | tuple[int, ...] | None = field(
            default=None, metadata={"help": "Decoder layers that get adapters, e.g. 2-5 or [0, 1]; all without it."}
        )

        def __post_init__(self):
            if self.lora_r < 1:
                raise StrategyError(f"lora.lora_r={self.lora_r} must be at least 1; for no adapters leave lora out of the recipe")
            if self.lora_alpha <= 0:
                raise StrategyError(f"lora.lora_alpha={self.lora_alpha} must be above 0: it is the scale of the update; usual is twice lora_r")
            if not 0 <= self.lora_dropout < 1:
                raise StrategyError(f"lora.lora_dropout={self.lora_dropout} must be in [0, 1)")
            if not self.target_modules:
                raise StrategyError(f"lora.target_modules={self.target_modules!r} names no module; write all-linear, or names such as [q_proj]")
            parse_layers(self.layers)

    def check(self, *, num_layers: int | None, num_workers: int) -> list[str]:
        parse_layers(self.config.layers, num_layers)
        return []

    def leaves(self, layers: frozenset[int], num_layers: int) -> frozenset[int]:
        named = parse_layers(self.config.layers)
        adapted = layers if named is None else layers & frozenset(named)
        if not adapted:
            raise StrategyError(f"lora.layers={self.config.layers!r}: every layer it may adapt is frozen; narrow freeze_layers or widen lora.layers")
        return adapted

    def check_model(self, model: nn.Module) -> list[str]:
        """Which adapters peft would make on a model of this architecture, and that they are the same once saved and loaded. Raises StrategyError."""
        targets = self._targets(model)
        lora_effect.check_reload(model, targets.config(self.config))
        return targets.notes

    def setup(self, model: nn.Module) -> nn.Module:
        from peft import get_peft_model

        knobs, targets = self.config, self._targets(model)
        self._facts = targets.facts
        # the same A on every worker and in a resumed trial, whatever drew from torch's generator before
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of was looked at: its choice is what was asked for
            torch.manual_seed(self.data.seed if self.data is not None else 0)
            made = get_peft_model(model, targets.config(knobs))
        lora_targets.check_same(made, targets)
        return made

    def _targets(self, model: nn.Module) -> lora_targets.Targets:
        knobs = self.config
        return lora_targets.of(model, knobs, parse_layers(knobs.layers, blocks.of(model).count))

    def finish(self, model: nn.Module) -> nn.Module:
        """Raises StrategyError where no adapter has moved: the model would be the untouched one under another name."""
        if not any(p.count_nonzero() for name, p in model.named_parameters() if "lora_B" in name):
            raise StrategyError("lora: no adapter moved during training; raise training.learning_rate or training.max_steps")
        return model
