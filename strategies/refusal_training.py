"""Train on harmful prompts with their refusals, and on some harmless rows so that not everything is refused.

Stage: data before training; with loss=dpo during training, at every optimiser step.
Paper: common practice; the data layout is that of Sheshadri et al., "Latent Adversarial Training Improves Robustness to Persistent
    Harmful Behaviors in LLMs", arXiv 2407.15549. DPO: Rafailov et al., NeurIPS 2023, arXiv 2305.18290.
Reference: aengusl/latent-adversarial-training (data), huggingface/trl (DPO); neither's code was used.
Idea: the rows trained on are the refusals of the safety data and, per refusal, benign_share rows that are answered. sft: cross-entropy on
    the answers. dpo: for the refusals -log sigmoid(beta * ((log p(refusal) - log p0(refusal)) - (log p(harm) - log p0(harm)))), p0 the
    untouched model, plus cross-entropy on the benign rows.
Knobs: benign_share - benign rows per refusal row; 1 to 4 in practice, 0 teaches to refuse everything. benign - where they are from:
    harmless (safety rows of that kind), task (the task's rows), both (half and half), auto (harmless where there are any, else task).
    num_refusals - refusal rows used, all without it. loss - sft or dpo. beta - of dpo.
Cost: sft as plain training on these rows. dpo: pairs are twice as many rows, and a second backward for the benign rows; two numbers per
    pair of the untouched model, computed once per lane.
Needs: safety rows (safety.data); loss=dpo also harmful answers beside the refusals (column rejected, or safety.harmful_data with
    the same ids).
Limits: the task's own rows are left out unless benign=task or both, so this aligns a model rather than tuning it for a task; for a few refusals
    among many task rows use safe_instruct. Refusals alone raise over-refusal quickly.
Interacts: usual with lora. safe_instruct and others see the rows made here as the task's. loss=dpo replaces a step's gradient, so it goes
    with no other method that does (sft neither, for one rule). Every ZeRO stage.
Deviations: log-probabilities of dpo are sums over answer tokens in float32, chosen and rejected in one forward. The two losses of a
    step are means over pairs and over tokens, added with weight 1; the step's rows are shared out as the two kinds are in the whole.
    Rows are drawn with the trial's seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from strategies import rows
from strategies.base import IGNORE, Batch, Engine, Example, Forward, Strategy, StrategyError, TrainingData


def dpo_losses(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float) -> Tensor:
    """(P,) losses of P pairs from log-probabilities of whole answers, (P,) each, of the model and of the reference."""
    return -logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def benign_rows(data: TrainingData, source: str, count: int) -> tuple[Example, ...]:
    """`count` rows that are answered, in seeded shuffled passes over those of `source` (auto, harmless, task, both). () for count 0.

    Raises StrategyError where there are none of them.
    """
    harmless = [row for row in data.safety if row.kind == "harmless"]
    if source == "both":
        return benign_rows(data, "harmless", count // 2) + benign_rows(data, "task", count - count // 2)
    found = data.task if source == "task" or (source == "auto" and not harmless) else harmless
    if count and not found:
        raise StrategyError(f"refusal_training.benign={source}: there are no such rows; use benign=task, or give safety rows of kind harmless")
    return _repeated(found, count, torch.Generator().manual_seed(data.seed))


def _repeated(found: Sequence[Example], count: int, generator: torch.Generator) -> tuple[Example, ...]:
    drawn: list[Example] = []
    while len(drawn) < count:
        drawn += [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
    return tuple(drawn[:count])


def share_out(size: int, refusals: int, benign: int) -> int:
    """Of a step's `size` rows, how many are refusals: their part of the whole, at least one of each kind there is.

    Raises StrategyError where one row would have to be both.
    """
    if not benign:
        return size
    if size < 2:
        raise StrategyError("refusal_training.loss=dpo with benign rows needs 2 rows per step; raise training.per_device_train_batch_size")
    return min(size - 1, max(1, round(size * refusals / (refusals + benign))))


class RefusalTraining(Strategy):
    """Refusals and benign rows in place of the task's rows."""

    name = "refusal_training"
    needs = frozenset({"safety"})
    setup_rank = 0
    data_rank = 10

    @dataclass(frozen=True)
    class Config:
        benign_share: float = field(default=1.0, metadata={"help": "Benign rows per refusal row; 0 for refusals alone."})
        benign: Literal["auto", "harmless", "task", "both"] = field(
            default="auto", metadata={"help": "Where benign rows are from; `auto`: harmless safety rows if any, else the task's."}
        )
        num_refusals: int | None = field(default=None, metadata={"help": "Refusal rows trained on; all without it."})
        loss: Literal["sft", "dpo"] = field(default="sft", metadata={"help": "`sft` on refusals, or `dpo` of refusals over harmful answers."})
        beta: float = field(default=0.1, metadata={"help": "Strength of the preference in dpo."})

        def __post_init__(self):
            if self.benign_share < 0:
                raise StrategyError(f"refusal_training.benign_share={self.benign_share} must not be negative; use 1 to 4, or 0 for none")
            if self.num_refusals is not None and self.num_refusals < 1:
                raise StrategyError(f"refusal_training.num_refusals={self.num_refusals} must be at least 1")
            if self.beta <= 0:
                raise StrategyError(f"refusal_training.beta={self.beta} must be above 0; the usual value is 0.1")

    def __init__(self, config=None):
        super().__init__(config)
        if self.config.loss == "dpo":
            self.needs = frozenset({"safety", "harmful", "reference"})
        self.refusals: tuple[Example, ...] = ()
        self.benign: tuple[Example, ...] = ()
        self.harmful: tuple[Example, ...] = ()
        self.reference = torch.zeros(0, 2)

    def prepare_data(self, data: TrainingData) -> TrainingData:
        knobs = self.config
        if knobs.loss == "dpo":
            self.refusals, self.harmful = rows.pairs(data, knobs.num_refusals, self.name)
        else:
            self.refusals = rows.refusals(data, knobs.num_refusals, self.name)
        self.benign = benign_rows(data, knobs.benign, round(knobs.benign_share * len(self.refusals)))
        self.data = dataclasses.replace(data, task=self.refusals + self.benign)
        return self.data

    def setup(self, model: nn.Module) -> nn.Module:
        if self.config.loss == "dpo":
            self.reference = rows.remembered(self.data, "refusal_training reference", self.refusals + self.harmful, lambda: self._ask(model))
        return model

    def _ask(self, model: nn.Module) -> Tensor:
        """Log-probabilities of both answers of every pair, (pairs, 2) float32."""

        def look(output, batch: Batch) -> Tensor:
            return rows.answer_log_probabilities(output.logits, batch["labels"])

        return torch.stack([torch.stack(rows.read(model, group, self.data, look)) for group in (self.refusals, self.harmful)], dim=1)

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        if self.config.loss == "sft":
            return {"loss": engine.gradient(batches)}
        size = self.data.batch_size
        pairs = share_out(size, len(self.refusals), len(self.benign))
        loss = preference = engine.gradient(self.data.batches(self.refusals, step, "refusal_training", pairs), self._dpo)
        if self.benign:
            loss += engine.gradient(self.data.batches(self.benign, step, "refusal_training benign", size - pairs))
        return {"loss": loss, "preference_loss": preference}

    def _dpo(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over pairs, and their number. `batch` holds the refusals; one without labels only keeps workers in step."""
        numbers = batch["rows"].tolist()
        both = self.data.collate(self.refusals + self.harmful, numbers + [len(self.refusals) + number for number in numbers])
        logits = forward(input_ids=both["input_ids"], attention_mask=both["attention_mask"]).logits
        if not (batch["labels"] != IGNORE).any():
            return logits.float().sum() * 0.0, torch.zeros((), device=logits.device)
        chosen, rejected = rows.answer_log_probabilities(logits, both["labels"]).chunk(2)
        reference = self.reference[numbers].to(logits.device)
        losses = dpo_losses(chosen, rejected, reference[:, 0], reference[:, 1], self.config.beta)
        return losses.sum(), torch.tensor(float(len(numbers)), device=logits.device)

    def facts(self):
        return {"refusal_rows": len(self.refusals), "benign_rows": len(self.benign), "pairs": len(self.harmful)}
