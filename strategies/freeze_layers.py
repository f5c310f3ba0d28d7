"""Freeze a contiguous range of decoder layers, the "safety layers", and train the rest.

Stage: before training (what is trained is decided once).
Paper: Li et al., "Safety Layers in Aligned Large Language Models: The Key to LLM Security" (SPPFT), ICLR 2025, arXiv 2408.17003.
Reference: listen0425/Safety-Layers (code not read); described after the reproduction silu101/safety-layers-repo.
Idea: a few layers in the middle tell malicious from normal prompts. Keep their weights as they are, and fine-tuning forgets less of its
    safety.
Knobs: range - given: as start, end and width say; auto: located in the untouched model, once per lane. start, end - first and last frozen
    layer, both inclusive, 0 is the first after the embedding; without them 0.28 and 0.45 of the depth. width - number of layers from start
    on, in place of end (the search uses it: any start goes with any width). modules - what is frozen inside a block: all
    (every parameter and saved buffer), attention_mlp (paper, norms stay trainable), attention (what mixes tokens: attention, state-space and
    convolution parts), mlp (the rest without norms, routers and experts too). For range=auto: onset - gap of
    cosines from which on a layer tells malicious from normal prompts (0.05). alpha - factor on the
    weights of a range when over-rejection is counted (paper 1.1). prompts - of each class.
Cost: less than full fine-tuning: no gradient and no AdamW state for what is frozen. range=auto: a forward per prompt and about 6 to 12
    times `prompts` short answers, once per lane.
Needs: nothing; range=auto needs safety rows (safety.data) of both kinds, refusal and harmless.
Limits: the range is not one constant; the paper's are [9, 14] of 32 (Llama-2-7b-chat), [7, 12] of 32 (Llama-3-8B-Instruct), [11, 15]
    of 32 (Phi-3-mini), [8, 11] of 18 (gemma-2b-it). Search it, or locate it first. Weak against attacks on the rows themselves.
Interacts: with lora in any order, adapters are put on the other layers only, so the merged model keeps the frozen ones bit for bit. Every
    ZeRO stage. Where layers share tensors (Zamba2), a frozen one is frozen in all of them: warned of, and in the record. Proof: hashes of
    the frozen tensors before and after; a trial that touched one fails.
Deviations: a frozen layer is the whole block, norms too (the paper: attention and MLP; modules=attention_mlp). start and end may also be given
    or searched, and the fallback is the middle of the paper's ranges. Both ends are inclusive (the official code's are exclusive).
    range=auto compares cosines of block outputs over bootstrap draws; its over-rejection prompts are the
    harmless safety rows, and where scaling changes no verdict the range of the activations stands (see strategies/locate.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from strategies import blocks, locate
from strategies.base import Strategy, StrategyError
from strategies.block_parts import part_of
from strategies.blocks import original_name


def fallback_range(layers: int) -> tuple[int, int]:
    """First and last layer frozen where no range is given: 0.28 and 0.45 of the depth, the middle of the paper's ranges.

    At least one layer of two or more stays trainable.
    """
    start = round(0.28 * layers) if layers > 2 else 0
    return start, max(start, min(round(0.45 * layers), layers - 2))


def frozen_tensors(model: nn.Module, start: int, end: int, modules: str) -> dict[str, Tensor]:
    """Parameters, and buffers that are saved, of the decoder blocks start..end by their name in the bare model: those of the parts that `modules`
    names (`all`, `attention_mlp`, `attention`, `mlp`; see `block_parts`)."""
    wanted = {"all": {"attention", "mlp", "norm"}, "attention_mlp": {"attention", "mlp"}}.get(modules, {modules})
    found, inside = {}, blocks.of(model)
    for index in range(start, end + 1):
        block = inside.modules[index]
        saved = set(block.state_dict())
        for name, tensor in [*block.named_parameters(), *((n, b) for n, b in block.named_buffers() if n in saved)]:
            if "lora_" not in name and part_of(block, name) in wanted:
                found[original_name(f"{inside.name(index)}.{name}")] = tensor
    return found


def layers_sharing(model: nn.Module, start: int, end: int, tensors: Iterable[Tensor]) -> list[int]:
    """Decoder layers outside start..end that use some of `tensors` themselves (Zamba2's shared blocks); empty where none does."""
    wanted = {id(tensor) for tensor in tensors}
    return [
        index for index, block in enumerate(blocks.of(model).modules)
        if not start <= index <= end and any(id(tensor) in wanted for tensor in (*block.parameters(), *block.buffers()))
    ]  # fmt: skip


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, type and shape."""
    body = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + body.tobytes()).hexdigest()


class FreezeLayers(Strategy):
    """Layers start..end keep their weights."""

    name = "freeze_layers"
    setup_rank = 10

    @dataclass(frozen=True)
    class Config:
        range: Literal["given", "auto"] = field(
            default="given", metadata={"help": "`given`: by start, end, width; `auto`: located in the untouched model."}
        )
        start: int | None = field(default=None, metadata={"help": "First frozen decoder layer, 0-based; without it 0.28 of the depth."})
        end: int | None = field(default=None, metadata={"help": "Last frozen decoder layer, inclusive; without it 0.45 of the depth."})
        width: int | None = field(
            default=None, metadata={"help": "Frozen layers from `start` on, as far as the model goes; ignored where `end` is given."}
        )
        modules: Literal["all", "attention_mlp", "attention", "mlp"] = field(
            default="all", metadata={"help": "What is frozen inside a block; `attention_mlp` leaves the norms trainable (paper)."}
        )
        onset: float = field(default=0.05, metadata={"help": "range=auto: gap of cosines from which on a layer counts."})
        alpha: float = field(default=1.1, metadata={"help": "range=auto: factor on a range's weights when over-rejection is counted."})
        prompts: int = field(default=100, metadata={"help": "range=auto: prompts of each class."})

        def __post_init__(self):
            if self.range == "auto" and (self.start, self.end, self.width) != (None, None, None):
                raise StrategyError("freeze_layers.range=auto locates the layers; leave start, end and width out, or use range=given")
            if self.alpha <= 0 or self.onset < 0 or self.prompts < 2:
                raise StrategyError(
                    f"freeze_layers.alpha={self.alpha} must be above 0, onset={self.onset} not negative, prompts={self.prompts} at least 2"
                )
            if (self.start is None) != (self.end is None and self.width is None):
                raise StrategyError(
                    f"freeze_layers.start={self.start}, end={self.end}, width={self.width}: give start with end or width, or none of them"
                )
            if self.start is None:
                return
            if self.start < 0 or (self.end is not None and self.end < self.start):
                raise StrategyError(f"freeze_layers.start={self.start}, end={self.end} is no range; need 0 <= start <= end (inclusive)")
            if self.width is not None and self.width < 1:
                raise StrategyError(f"freeze_layers.width={self.width} must be at least 1; to freeze nothing leave the strategy out")

    def __init__(self, config=None):
        super().__init__(config)
        self._hashes: dict[str, str] = {}
        if self.config.range == "auto":
            self.needs = frozenset({"safety"})

    def range(self, layers: int) -> tuple[int, int]:
        """(start, end) for a model of `layers` layers. Raises StrategyError where it lies outside."""
        start, end = self.config.start, self.config.end
        if start is None:
            return fallback_range(layers)
        if end is None:
            end = max(start, min(start + self.config.width, layers) - 1)
        if end >= layers:
            raise StrategyError(
                f"freeze_layers: layers {start} to {end} are outside the model, which has {layers}: 0 to {layers - 1} (end is inclusive)"
            )
        return start, end

    def located(self, model: nn.Module) -> tuple[int, int]:
        """(start, end) measured in `model`, once per lane and the same on every worker. Raises StrategyError where nothing is found."""
        knobs = self.config
        weights = [float(p.detach().double().square().sum()) for p in model.parameters()]  # an earlier method may have changed the model
        key = ("located layers", self.data.fingerprint, tuple(weights), knobs.onset, knobs.alpha, knobs.prompts)
        if key not in self.data.cache:
            found = locate.locate(model, self.data, onset=knobs.onset, alpha=knobs.alpha, prompts=knobs.prompts)
            self.data.cache[key] = locate.agreed(found, self.data.world_size)
        found = self.data.cache[key]
        if isinstance(found, locate.Curves):
            raise StrategyError(
                f"freeze_layers.range=auto: no layer tells malicious from normal prompts by more than onset={knobs.onset} (largest gap "
                f"{float(found.gap.mean(dim=0).max()):.3f}); lower freeze_layers.onset, or give start and end"
            )
        start, end = found.range
        self._facts = {"located_start": start, "located_end": end, "over_rejections": found.counts.get(found.range, 0)}
        self._facts["over_rejections_untouched"] = found.untouched
        return start, end

    def check(self, *, num_layers: int | None, num_workers: int) -> list[str]:
        if num_layers is None or self.config.range == "auto":
            return []
        start, end = self.range(num_layers)
        if self.config.start is None:
            return [f"freeze_layers: no range given, layers {start} to {end} of {num_layers} are frozen unless the search finds better"]
        return []

    def leaves(self, layers: frozenset[int], num_layers: int) -> frozenset[int]:
        if self.config.modules not in ("all", "attention_mlp") or self.config.range == "auto":
            return layers
        start, end = self.range(num_layers)
        return layers - frozenset(range(start, end + 1))

    def check_model(self, model: nn.Module) -> list[str]:
        """Raises StrategyError where no layer can be frozen alone, or where layers cannot be located; warns of layers that share tensors."""
        if self.config.range == "auto":
            locate.alike(model)
        count = blocks.of(model).count
        sharing = [i for i in range(count) if layers_sharing(model, i, i, frozen_tensors(model, i, i, self.config.modules).values())]
        if not sharing:
            return []
        if all(self._holds_all(model, i) for i in range(count)):
            raise StrategyError("freeze_layers: all layers of this kind of model are the same tensors, so freezing one freezes all; leave it out")
        return [
            "freeze_layers: layers of this kind of model share tensors, so what is frozen in one layer is frozen in every layer that shares it; the "
            "record names them (layers_sharing_frozen_tensors)"
        ]

    def _holds_all(self, model: nn.Module, index: int) -> bool:
        """Whether freezing this one layer leaves no parameter of the blocks to train."""
        frozen = {id(tensor) for tensor in frozen_tensors(model, index, index, self.config.modules).values()}
        return all(id(parameter) in frozen for block in blocks.of(model).modules for parameter in block.parameters())

    def setup(self, model: nn.Module) -> nn.Module:
        start, end = self.located(model) if self.config.range == "auto" else self.range(blocks.of(model).count)
        frozen = frozen_tensors(model, start, end, self.config.modules)
        if not frozen:
            raise StrategyError(
                f"freeze_layers.modules={self.config.modules}: no such parameter in layers {start} to {end}; use modules=all"
            )
        for tensor in frozen.values():
            tensor.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise StrategyError(f"freeze_layers: layers {start} to {end} are all there is, nothing is left to train; narrow the range")
        self._hashes = {name: tensor_hash(tensor) for name, tensor in frozen.items()}
        if sharing := layers_sharing(model, start, end, frozen.values()):
            self._facts["layers_sharing_frozen_tensors"] = sharing
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Proves that nothing frozen was touched. Raises StrategyError naming the tensor where one was."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]  # shared ones under every name
        now = {original_name(name): tensor for name, tensor in named}
        for name, before in self._hashes.items():
            if name not in now or tensor_hash(now[name]) != before:
                raise StrategyError(f"freeze_layers: the frozen tensor {name} was changed by training; the model is not what was asked for")
            module = name.rpartition(".")[0]
            if any(other.startswith(f"{module}.lora_") for other in now):
                raise StrategyError(f"freeze_layers: {module} is frozen but carries an adapter; let lora.layers spare it")
        return model

    def facts(self):
        return {"frozen_tensors_proved": len(self._hashes), **self._facts}
