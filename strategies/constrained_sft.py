"""Constrained fine-tuning: the first tokens of an answer, where safety is decided, may move little from the untouched model.

Stage: during training, at every optimiser step.
Paper: Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", ICLR 2025, arXiv 2406.05946.
Reference: Unispac/shallow-vs-deep-alignment (trainer.py at fb1749e), read and run.
Idea: minimise -(2 / b_t) log sigmoid(b_t (log p_t - log p_t of the untouched model)) per answer token t. Its gradient is that of
    cross-entropy times w_t = 2 (1 - sigmoid(b_t (log p_t - log p_ref,t))): a token that has become likelier than the untouched model found
    it weighs less, the more so the larger b_t, which is large for the first tokens.
Knobs: beta - b_t of the later tokens (paper 0.1). first_factor - times beta for the first answer token (paper 5). early_factor - times beta
    for the tokens after it (paper 20). early_tokens - how many tokens are early, the first included (paper 5).
Cost: none beyond plain fine-tuning in a step. One forward of all task rows by the untouched model, once per lane; 4 bytes per token kept.
Needs: nothing: no safety data.
Limits: guards what the first tokens say; a task whose answers must open unlike the untouched model's is learned more slowly. Rows that the
    task itself poisons are learned later, not refused.
Interacts: every ZeRO stage. Owns the step, so not with another method that does.
Deviations: weights are at least 0.001 and carry no gradient, as in the official code; tokens are counted from the first labelled one, and
    the loss is the mean over labelled tokens of all micro-batches and workers. Compared with the official loss (soft_sft_loss) on 20 draws
    of 3 rows with answers of 2 to 9 tokens: the loss within 1e-6, the gradient of the logits within 1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from strategies import rows
from strategies.base import IGNORE, Batch, Engine, Forward, Strategy, StrategyError

SMALLEST_WEIGHT = 1e-3


def betas(labels: Tensor, beta: float, first_factor: float, early_factor: float, early_tokens: int) -> Tensor:
    """b_t (R, T) for labels (R, T) of next tokens, -100 where there is none: beta times `first_factor` at a row's first labelled token,
    times `early_factor` at the labelled tokens 2 to `early_tokens`, beta after them (and where there is no label)."""
    labelled = labels != IGNORE
    number = labelled.cumsum(dim=1) * labelled  # 1 at the first answer token, 0 off the answer
    found = torch.full(labels.shape, float(beta), device=labels.device)
    found[(number >= 1) & (number <= early_tokens)] = beta * early_factor
    if early_tokens >= 1:
        found[number == 1] = beta * first_factor
    return found


def weights(logp: Tensor, reference: Tensor, beta: Tensor | float) -> Tensor:
    """w = max(2 (1 - sigmoid(beta (logp - reference))), 0.001), without gradient, of any shape that the three share.

    logp, reference: log-probabilities of the same tokens by the model and by the untouched model. 1 where they agree or beta is 0.
    """
    return (2 * torch.sigmoid(-beta * (logp.detach() - reference))).clamp(min=SMALLEST_WEIGHT)


class ConstrainedSft(Strategy):
    """Token-wise weights on the task's cross-entropy."""

    name = "constrained_sft"
    setup_rank = 0

    @dataclass(frozen=True)
    class Config:
        beta: float = field(default=0.1, metadata={"help": "Strength at later tokens; 0 is plain fine-tuning."})
        first_factor: float = field(default=5.0, metadata={"help": "Times beta at the first answer token."})
        early_factor: float = field(default=20.0, metadata={"help": "Times beta at the early tokens after the first."})
        early_tokens: int = field(default=5, metadata={"help": "Number of early tokens, the first included."})

        def __post_init__(self):
            for knob in ("beta", "first_factor", "early_factor", "early_tokens"):
                if getattr(self, knob) < 0:
                    raise StrategyError(f"constrained_sft.{knob}={getattr(self, knob)} must not be negative")

    def __init__(self, config=None):
        super().__init__(config)
        self._reference: Tensor | None = None
        self._sums: list[Tensor] = []
        self._last = 1.0

    def setup(self, model: nn.Module) -> nn.Module:
        if self.config.beta == 0:
            return model

        def look(output, batch: Batch) -> Tensor:
            return rows.token_log_probabilities(output.logits, batch["labels"])

        def make() -> Tensor:
            found = rows.read(model, self.data.task, self.data, look)
            # padded: an index picks the rows of a batch without a copy from the host
            return nn.utils.rnn.pad_sequence(found, batch_first=True)

        self._reference = rows.remembered(self.data, "task log-probabilities", self.data.task, make).to(self.data.device)
        return model

    def step(self, engine: Engine, batches: Sequence[Batch], step: int) -> dict[str, float]:
        if self.config.beta == 0:
            return {"loss": engine.gradient(batches)}
        self._sums = []
        weighted = engine.gradient(batches, self._loss)
        early, tokens = torch.stack(self._sums).sum(dim=0).tolist()
        self._sums, self._last = [], early / tokens if tokens else self._last
        return {"loss": weighted}

    def _loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        knobs, labels = self.config, batch["labels"][:, 1:]
        logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logp = rows.token_log_probabilities(logits, batch["labels"])
        b = betas(labels, knobs.beta, knobs.first_factor, knobs.early_factor, knobs.early_tokens)
        w = weights(logp, self._reference[batch["rows"], : logp.shape[1]], b)
        answer = labels != IGNORE
        early = answer & (answer.cumsum(dim=1) <= knobs.early_tokens)
        self._sums.append(torch.stack([(w * early).sum(), early.sum()]))
        return -(w * logp).sum(), answer.sum()

    def facts(self):
        """`early_weight`: mean weight of the early tokens in the last step, of this worker's rows; 1 is plain fine-tuning."""
        return {"reference_rows": 0 if self._reference is None else len(self._reference), "early_weight": self._last}

    def state_dict(self):
        return {"early_weight": self._last}

    def load_state_dict(self, state) -> None:
        self._last = float(state["early_weight"])
