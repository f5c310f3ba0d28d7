"""Which safety rows a method works with, and what the untouched model says of them: shared by the methods that act in a step.

Everything that depends on the untouched model and the rows alone is worked out once per lane (`remembered`) and shared by all trials.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strategies import trying
from strategies.base import IGNORE, Batch, Example, StrategyError, TrainingData


def refusals(data: TrainingData, count: int | None, owner: str) -> tuple[Example, ...]:
    """`count` of the safety rows that answer a harmful prompt with a refusal, drawn with the trial's seed; all where there are fewer.

    Where there are anchors (`safety.anchors`: kinds `begun` and `anchor`), as many of either beside them, in a seeded order.
    Raises StrategyError, naming the strategy `owner`, where there are none.
    """
    learnt = [row for row in data.safety if any(label != IGNORE for label in row.labels[1:])]
    rows = [row for row in learnt if row.kind == "refusal"]
    if not rows:
        raise StrategyError(f"{owner} needs safety rows of kind refusal (harmful prompt, safe answer): give safety.data")
    chosen = sample(rows, count, data.seed)
    begun = [sample([row for row in learnt if row.kind == kind], count, data.seed) for kind in ("begun", "anchor")]
    return chosen if not any(begun) else sample([*chosen, *begun[0], *begun[1]], None, data.seed)


def sample(rows: Sequence[Example], count: int | None, seed: int) -> tuple[Example, ...]:
    """`count` of the rows in a seeded order; all of them (in that order) where there are fewer, or for None."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(rows[i] for i in order[:count])


def pairs(data: TrainingData, count: int | None, owner: str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(refusals, harmful answers to the same prompts): row i of the one and of the other share id and prompt.

    Raises StrategyError, naming the strategy `owner`, where no refusal has a harmful answer.
    """
    others = {row.id: row for row in data.harmful}
    safe = [row for row in refusals(data, None, owner) if row.kind == "refusal" and row.id in others and others[row.id].prompt == row.prompt]
    if not safe:
        raise StrategyError(
            f"{owner} needs refusals with a harmful answer to the same prompt, and none of the {len(data.harmful)} harmful rows has the id and "
            "prompt of a safety row: give a column `rejected` in safety.data"
        )
    chosen = tuple(safe[:count])
    return chosen, tuple(others[row.id] for row in chosen)


def content(rows: Sequence[Example]) -> str:
    """Hash of what the rows hold (tokens and labels), for keys of `TrainingData.cache`."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.input_ids, row.labels)).encode())
    return digest.hexdigest()


def remembered(data: TrainingData, what: str, rows: Sequence[Example], make: Callable[[], Any], *depends_on: Any) -> Any:
    """`make()`, once per lane: kept in `data.cache` under what it depends on (the untouched model, `rows` and `depends_on`)."""
    key = (what, data.fingerprint, content(rows), *depends_on)
    if key not in data.cache:
        data.cache[key] = make()
    return data.cache[key]


def read(model: nn.Module, rows: Sequence[Example], data: TrainingData, look: Callable[[Any, Batch], Iterable[Tensor]]) -> list[Tensor]:
    """What `look(output, batch)` finds in the model's forward over all rows, one tensor per row, on the CPU; in evaluation mode and without
    gradients. The model keeps its training modes."""
    found: list[Tensor] = []
    size, forward = data.per_device_batch_size, trying.forward(model)
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(rows), size):
            batch = data.collate(rows, range(start, min(start + size, len(rows))))
            output = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            found += [one.cpu() for one in look(output, batch)]
    return found


def token_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """(R, L-1) float32: log-probability of the token after each position; 0 where that token is not labelled.

    logits (R, L, V), labels (R, L) with -100 where no loss is taken. They are shifted here: position t predicts token t + 1.
    """
    wanted = labels[:, 1:]
    logp = -nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="none")
    return logp.view(wanted.shape)


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """(R,) float32: log-probability of each row's labelled tokens together. logits (R, L, V), labels (R, L), -100 where nothing counts."""
    return token_log_probabilities(logits, labels).sum(dim=1)


def output_layer(model: nn.Module, owner: str) -> nn.Module:
    """The layer that makes logits of the last hidden states. Raises StrategyError, naming the strategy `owner`, where there is none, or where one
    forward of a few plain tokens does not give it hidden states of (rows, tokens, width)."""
    head = model.get_output_embeddings()
    if head is None:
        raise StrategyError(f"{owner} reads what the output layer is given, and this model names none (get_output_embeddings); leave {owner} out")
    batch = trying.batch(model, (7, 5))
    with torch.no_grad(), evaluating(model), last_hidden(head) as seen:
        trying.forward(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    if not seen or seen[0].ndim != 3 or seen[0].shape[:2] != batch["input_ids"].shape or not bool(torch.isfinite(seen[0]).all()):
        raise StrategyError(
            f"{owner} reads what the output layer is given, and {type(model).__name__} does not give it one finite hidden state per token; leave "
            f"{owner} out for this model"
        )
    return head


@contextmanager
def last_hidden(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list holds the last hidden states (R, L, d), normalised as the output layer `head` gets them, of the latest forward.

    A hook of our own: transformers' `output_hidden_states` leaves hooks in the model for good.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [one for one in inputs[:1] if isinstance(one, Tensor)]

    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
