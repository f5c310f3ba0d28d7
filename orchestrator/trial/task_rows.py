"""The task's rows: those that are trained on, those that the search is scored on, and those that wait until it has chosen.

The best of many trials on the same rows is flattered by them: 15 alike trials on 200 rows report .046 too much, and a 95 % interval
that holds the truth in .76 of searches; on rows that had no part in the choice it holds it in .95 (`benchmarks/winners.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config import Experiment
from orchestrator.data import conversations, overlap
from orchestrator.data import rows as data_rows
from orchestrator.data.conversations import Conversation
from orchestrator.data.counts import RowsReport
from orchestrator.errors import DataError

SEED = 0
"""Which rows are held out is part of the question asked, so it is the same for every trial and every training seed."""
LEAST_LEFT, LEAST_DIVIDED = 50, 100
"""Rows that `eval_size` must leave over to wait by themselves; rows of `eval_data` from which half of them may wait."""
LEAST_TAKEN = 20
"""Rows below which none is taken from the training rows without being asked for: their interval would say nothing."""


@dataclass(frozen=True)
class TaskRows:
    """Rows of the task, no prompt in two of the parts."""

    train: list[Conversation]
    evaluation: list[Conversation]
    confirmation: list[Conversation]
    """Empty where nothing is held out of the search."""


def load(experiment: Experiment, reports: list[RowsReport] | None = None) -> TaskRows:
    """Read and divide them; how they were read is added to `reports`. Raises DataError, also for a `confirm_size` that leaves no row."""
    task = experiment.task
    rows = data_rows.load_rows(task.data, split=task.split, limit=task.limit, field="task.data")
    train = _noted(conversations.read(rows, task.format, task.columns, task.data, field="task.data"), reports)
    if task.eval_data is None:
        train, given = conversations.split_holdout(train, task.eval_fraction, SEED)
    else:
        rows = data_rows.load_rows(task.eval_data, split=task.split, field="task.eval_data")
        given = _noted(conversations.read(rows, task.format, task.columns, task.eval_data, field="task.eval_data"), reports)
    cut = task.eval_size is not None and len(given) > task.eval_size
    evaluation = conversations.sample(given, task.eval_size or 0, SEED) if cut else given
    wanted = task.confirm_size if task.confirm_size is not None else len(evaluation) if experiment.confirms else 0
    if not wanted:
        return TaskRows(train, evaluation, [])
    if task.eval_data is None:
        return _from_training(train, evaluation, given, wanted, exact=task.confirm_size is not None)
    return _from_given(train, evaluation, given, wanted, exact=task.confirm_size is not None)


def _from_training(
    train: list[Conversation], evaluation: list[Conversation], given: list[Conversation], wanted: int, exact: bool
) -> TaskRows:  # fmt: skip
    """`wanted` rows of those held out and left over, the rest from the training rows, of which at least as many stay."""
    waiting = _others(given, evaluation)[:wanted]
    short = wanted - len(waiting)
    if short > 0:
        if not exact and (wanted < LEAST_TAKEN or 2 * short > len(train)):
            return TaskRows(train, evaluation, [])
        if 2 * short > len(train):
            raise DataError(
                f"task.confirm_size: {wanted} rows to hold out of the search and {len(train)} rows left to train on; hold out less, or give more rows"
            )
        train, more = conversations.split_holdout(train, short / len(train), SEED + 1)
        waiting += more
    return TaskRows(train, evaluation, waiting)


def _from_given(train: list[Conversation], evaluation: list[Conversation], given: list[Conversation], wanted: int, exact: bool) -> TaskRows:
    """`wanted` rows of `eval_data` that are not asked in the search; where too few are left over, a part of those that are."""
    left = _others(given, evaluation)
    if len(left) >= (wanted if exact else min(wanted, LEAST_LEFT)):
        return TaskRows(train, evaluation, conversations.sample(left, wanted, SEED + 1))
    if exact and wanted >= len(given):
        raise DataError(
            f"task.confirm_size={wanted} leaves none of the {len(given)} rows of task.eval_data to the search; hold out less, or give more rows"
        )
    if not exact and len(given) < LEAST_DIVIDED:
        return TaskRows(train, evaluation, [])
    share = wanted / len(given) if exact else 0.5
    searched, waiting = conversations.split_holdout(given, share, SEED + 1)
    return TaskRows(train, searched, waiting)


def _others(rows: Sequence[Conversation], asked: Sequence[Conversation]) -> list[Conversation]:
    """The rows whose prompt is none of those asked (case, spacing and punctuation aside)."""
    known = {_key(row) for row in asked}
    return [row for row in rows if _key(row) not in known]


def _key(row: Conversation) -> bytes:
    text = conversations.asked(row)
    return overlap.key(overlap.units(text), text)


def _noted(found: conversations.Read, reports: list[RowsReport] | None) -> list[Conversation]:
    if reports is not None:
        reports.append(found.report)
    return found.conversations
