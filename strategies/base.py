"""The interface of a strategy, and of the engine it is given. Knows torch; knows nothing of Ray, DeepSpeed or of where data come from.

A strategy is plain fine-tuning unless it overrides a phase:

    prepare_data   data phase: mix, relabel
    setup          before sharding: freeze, attach adapters, compute what needs the untouched model
    step           one optimiser step's gradient (at most one strategy of a recipe overrides it)
    after_step     right after the optimiser's step: correct or average weights
    end            after the last step, the engine still alive: put averaged weights in place
    finish         on the gathered model: project, merge, restore
    wrap           inference time: around `generate`

The mathematics of a method is a pure module-level function on tensors; the class only says when it is applied.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from strategies.updates import Update

Batch = dict[str, Tensor]
"""One micro-batch of R rows padded on the right to L tokens: `input_ids`, `attention_mask`, `labels` (R, L), labels -100 where no
loss is taken, and `rows` (R,), the index of each row in the tuple of examples it was drawn from."""

Forward = Callable[..., Any]
"""The model as strategies may call it: `forward(input_ids=, attention_mask=)` -> object with `.logits` (R, L, V)."""

Loss = Callable[[Forward, Batch], tuple[Tensor, Tensor]]
"""(forward, micro-batch) -> (sum of the loss over its units, number of units), both scalars. Sums, so that the mean over
micro-batches and workers does not depend on how rows were divided among them."""

IGNORE = -100


class StrategyError(ValueError):
    """A strategy cannot do what it was asked; the message names the knob, the value and the remedy."""


def unknown(kind: str, name: str, known: Iterable[str]) -> StrategyError:
    """The error for a name that is not known, with the nearest ones."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"known: {', '.join(known)}"
    return StrategyError(f"unknown {kind} {name!r}; {hint}")


def lm_loss(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy summed over the labelled tokens, and their number. Softmax in float32."""
    logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    total = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total, (labels != IGNORE).sum()


class Gradient(Protocol):
    """A vector over all trainable parameters (a gradient, or weights), held the way the engine shards it. Each worker holds its part."""

    def dot(self, other: Gradient) -> float:
        """Inner product over all trainable parameters of all workers: the same number on every worker, summed in float64."""

    def gram(self, other: Gradient) -> tuple[float, float, float]:
        """(<self, self>, <self, other>, <other, other>) in one pass and one collective call."""

    def norm(self) -> float:
        """Euclidean norm over all trainable parameters of all workers."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """This worker's part, to be kept in `Strategy.state_dict`."""

    def like(self, parts: Sequence[Tensor]) -> Gradient:
        """The vector of saved `parts` of a vector that was sharded as this one; moved to this one's device. Raises ValueError where
        shapes differ."""


class Engine(Protocol):
    """What `Strategy.step` may do. `PlainEngine` is the specification; `DeepSpeedEngine` matches it under ZeRO 0-3.

    The engine has one accumulated gradient. `gradient` adds to it, `gradients` takes it out, `combine` replaces it; what is there
    when `Strategy.step` returns is what the optimiser applies (after clipping). All verbs are collective: every worker calls them
    in the same order.
    """

    rank: int
    world_size: int
    max_steps: int
    """Optimiser steps of the whole training."""

    def gradient(self, batches: Sequence[Batch], loss: Loss = lm_loss) -> float:
        """Add the gradient of the mean loss over this step's micro-batches on all workers; returns that mean."""

    def gradients(self) -> Gradient:
        """Take the accumulated gradient out: the engine's own is zero afterwards."""

    def combine(self, terms: Sequence[tuple[float, Gradient]]) -> None:
        """Set the accumulated gradient to the sum of coefficient * gradient."""

    def shifted(self, direction: Gradient, scale: float) -> AbstractContextManager[None]:
        """Weights plus scale * direction inside the block; restored bit for bit afterwards, also after an exception."""

    def zero(self) -> None:
        """Forget the accumulated gradient."""

    def weights(self) -> Gradient:
        """A copy of the trainable weights (float32), shaped and sharded like a gradient."""

    def linear(self, terms: Sequence[tuple[float, Gradient]]) -> Gradient:
        """The sum of coefficient * vector, a new vector; the accumulated gradient is not touched. Raises ValueError without terms."""

    def move(self, terms: Sequence[tuple[float, Gradient]]) -> None:
        """Add the sum of coefficient * vector to the weights, for good. The optimiser's moments do not see it."""

    def sensitivity(self, leaves: Sequence[Tensor], batches: Sequence[Batch], loss: Loss = lm_loss) -> list[Tensor]:
        """Gradient of the mean loss over all workers' micro-batches with respect to `leaves` (tensors with requires_grad that the
        forward uses, the same on every worker), one tensor each; no gradient of a parameter is computed or kept. ZeRO stages 0-2."""


@dataclass(frozen=True)
class Example:
    """One tokenised row: `labels` as long as `input_ids`, -100 where no loss is taken."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    id: str
    kind: str = "task"
    """`task`; in safety data `refusal` (harmful prompt, refusal) or `harmless` (borderline prompt, helpful answer); `harmful` (harmful
    prompt, harmful answer). A harmful row has the `id` of the refusal it is the other answer to, where there is one."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))
        return self.input_ids[:first]


Tensors = Mapping[str, Tensor]
"""Weights by parameter name. May be lazy: look up a name only when its tensor is needed, and drop the tensor before the next."""


@dataclass
class TrainingData:
    """Rows of a trial and the rule by which a step draws from them.

    Which rows step t sees is a function of (seed, stream, t) alone: a resumed trial needs no saved position, and 1 or 2 workers see
    the same rows in a step.
    """

    task: tuple[Example, ...]
    safety: tuple[Example, ...]
    pad_token_id: int
    per_device_batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    device: torch.device | str = "cpu"
    cache: dict[Any, Any] = field(default_factory=dict)
    """Lives as long as the lane: what depends only on the untouched model and the rows (reference log-probabilities) is kept here,
    keyed by `fingerprint` and what it depends on."""
    fingerprint: str = ""
    """Identifies (model, template, data) for `cache`."""
    harmful: tuple[Example, ...] = ()
    """Harmful prompts with harmful answers, for methods that measure or restore against them; never trained towards in the result."""
    weights: Mapping[str, Tensors] = field(default_factory=dict)
    """`aligned`: the untouched model; `unaligned`: the same before its alignment (only where a config key gives it)."""
    retemplate: Callable[[str | None], TrainingData] | None = None
    """The same rows tokenised under another system prompt (None: without one)."""
    refuses: Callable[[nn.Module, Sequence[Example]], list[bool]] | None = None
    """Asks a model the prompts of rows and judges whether it refused each; generation is greedy."""
    system_prompt: str | None = None
    """The system prompt these rows are tokenised under; None: without one."""
    learning_rate: float = 1e-3
    """Peak rate of the training, for methods that take a few steps of their own after it."""

    @property
    def batch_size(self) -> int:
        """Rows of one optimiser step over all workers."""
        return self.per_device_batch_size * self.accumulation_steps * self.world_size

    def draw(self, rows: Sequence[Example], step: int, stream: str, batch_size: int | None = None) -> list[int]:
        """Indices of the rows that step `step` sees: shuffled passes over `rows`, all workers together."""
        if not rows:
            raise StrategyError(f"no rows to draw for {stream!r}; give data for it (safety.data for safety rows)")
        size = batch_size or self.batch_size
        first, count = step * size, len(rows)
        return [self._permutation(count, position // count, stream)[position % count] for position in range(first, first + size)]

    def _permutation(self, count: int, epoch: int, stream: str) -> list[int]:
        key = ("permutation", self.seed, stream, count, epoch)
        if self.cache.get("permutation key " + stream) != key:
            generator = torch.Generator().manual_seed(stable_seed(key))
            # one permutation per stream is kept: steps walk through epochs in order
            self.cache["permutation key " + stream] = key
            self.cache["permutation " + stream] = torch.randperm(count, generator=generator).tolist()
        return self.cache["permutation " + stream]

    def batches(self, rows: Sequence[Example], step: int, stream: str = "task", batch_size: int | None = None) -> list[Batch]:
        """This worker's micro-batches of step `step`: rows r, r+W, r+2W ... of the step, at most `per_device_batch_size` each.

        A worker whose share is empty (fewer rows than workers) gets one row with no labels, so that collective calls stay in step.
        """
        mine = self.draw(rows, step, stream, batch_size)[self.rank :: self.world_size]
        total = batch_size or self.batch_size
        share = -(-total // self.world_size)
        size = min(self.per_device_batch_size, share)
        count = -(-share // size)
        return [self.collate(rows, mine[i * size : (i + 1) * size]) for i in range(count)]

    def collate(self, rows: Sequence[Example], indices: Sequence[int]) -> Batch:
        """Pad the chosen rows on the right. Without indices: row 0 with all labels ignored."""
        chosen = [rows[i] for i in indices] or [rows[0]]
        width = max(len(e.input_ids) for e in chosen)
        ids = torch.full((len(chosen), width), self.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        labels = torch.full((len(chosen), width), IGNORE, dtype=torch.long)
        for i, example in enumerate(chosen):
            n = len(example.input_ids)
            ids[i, :n] = torch.tensor(example.input_ids)
            mask[i, :n] = 1
            if indices:
                labels[i, :n] = torch.tensor(example.labels)
        row = torch.tensor(list(indices) or [0])
        return {k: v.to(self.device) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels, "rows": row}.items()}


def stable_seed(key: tuple) -> int:
    """A seed of 56 bits for plain values: the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


class Generate(Protocol):
    """Prompts (user texts, template not yet applied) -> answers, greedy."""

    def __call__(self, prompts: Sequence[str], *, max_new_tokens: int | None = None) -> list[str]:
        """`max_new_tokens` None: as many as the evaluation asks for."""


class Strategy:
    """Plain fine-tuning; a method overrides the least it must.

    Class attributes state what the method demands, so that validation refuses before a device is taken.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type]
    """Frozen dataclass of the knobs, constructible without arguments; every field has metadata {"help": ...}."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of {"safety", "harmful", "unaligned_base", "reference"}."""
    max_zero_stage: ClassVar[int] = 3
    zero_reason: ClassVar[str] = ""
    """Why a higher ZeRO stage is refused."""
    attention: frozenset[str] | None = None
    """Of transformers' attention implementations those that this method works with; None: every one."""
    changes_training: ClassVar[bool] = True
    """False for a method that acts only after training (`finish`) or at inference (`wrap`): trials that differ in its knobs alone share
    one training."""
    may_recover: ClassVar[bool] = False
    """Whether a training that is unsafe half-way may still end safe, beside what `needs` and `changes_training` say: methods with safety rows
    and methods after training always may. Others' trainings are ended where probes prove them unsafe."""
    merges: ClassVar[bool] = False
    """Whether `finish` changes weights: two such methods in a recipe are warned about."""
    moves_outside: ClassVar[bool] = False
    """Whether `finish` also moves what lies outside the matrices of the decoder blocks (heads, norms), wherever training moved it."""
    changes_start: ClassVar[bool] = False
    """Whether `setup` changes weights (a method that acts before training)."""
    data_rank: ClassVar[int] = 50
    """Data of a recipe are prepared in rising order of this, then in the list's order: 0 makes the rows anew, 10 replaces the task's rows."""
    setup_rank: ClassVar[int] = 50
    """Setups of a recipe run in rising order of this, whatever the order of the list: 0 reads the untouched model, 10 freezes,
    20 attaches adapters (which then spare what is frozen)."""

    @property
    def trains(self) -> bool:
        """False where this method wants the untouched weights: no step is made, and no method that trains may be in the recipe."""
        return True

    def __init__(self, config: Any = None):
        self.config = config if config is not None else self.Config()
        self.data: TrainingData | None = None
        self._facts: dict[str, Any] = {}

    def check(self, *, num_layers: int | None, num_workers: int) -> list[str]:
        """Refuse knobs that cannot work for a model of `num_layers` decoder layers (None: not known yet); returns warnings.

        Raises StrategyError.
        """
        return []

    def check_model(self, model: nn.Module) -> list[str]:
        """Refuse a kind of model that this method cannot work on, before a weight of it is read; returns warnings.

        `model`: a small random copy of the architecture, in float32 on the CPU in evaluation mode: every kind of layer, but perhaps fewer of them
        and of other widths. It is left as it was, for the methods that look at it next. Raises StrategyError, in one sentence.
        """
        return []

    def leaves(self, layers: frozenset[int], num_layers: int) -> frozenset[int]:
        """Of the decoder layers still trainable before this strategy's setup, those trainable after it. Raises StrategyError for none."""
        return layers

    def prepare_data(self, data: TrainingData) -> TrainingData:
        """Mix or relabel rows; returns the data to train on."""
        return data

    def take_rows(self, data: TrainingData) -> None:
        """The rows as all strategies of the recipe left them, told right after the last `prepare_data`: kept as `self.data`, so that the
        order of the recipe does not matter to a method that only reads rows."""
        self.data = data

    def setup(self, model: nn.Module) -> nn.Module:
        """Freeze, attach adapters, compute what needs the untouched model. The model is whole and on its device, not yet sharded."""
        return model

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """Leave one optimiser step's gradient in the engine; returns metrics, `loss` (mean task loss) among them."""
        return {"loss": engine.gradient(batches)}

    def after_step(self, engine: Engine, step: int) -> dict[str, float]:
        """After the optimiser's step number `step` (from 0): correct or average weights; returns metrics. Collective."""
        return {}

    def end(self, engine: Engine) -> None:
        """After the last step, before the engine is closed. Collective."""

    def reaches(self, update: Update) -> bool:
        """Of a method that merges: whether `finish` could change this update (of a weight in the decoder blocks), whatever its knobs then choose.
        What it cannot is told with every result."""
        return True

    def finish(self, model: nn.Module) -> nn.Module:
        """Project, merge or restore the gathered model after the last step. Runs on every worker, on the whole model, and must be
        deterministic, so that every worker ends with the same one."""
        return model

    def system_prompt(self, system_prompt: str | None) -> str | None:
        """The system prompt of evaluation and serving, given the experiment's own (None: none)."""
        return system_prompt

    def wrap(self, generate: Generate) -> Generate:
        """Inference-time defence around `generate`."""
        return generate

    def facts(self) -> dict[str, Any]:
        """What shows that the method acted (tensors frozen, conflicts met), for the trial's record; plain values. `_facts` unless a method
        counts otherwise."""
        return dict(self._facts)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed trial needs; plain values and tensors only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up `state_dict` again."""

    @classmethod
    def owns_step(cls) -> bool:
        """Whether the method replaces the gradient of a step."""
        return cls.step is not Strategy.step
