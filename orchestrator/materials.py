"""What a trial works with: training rows, evaluation rows, safety rows and suites of one experiment, loaded once per lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator import data
from orchestrator.config import Experiment
from orchestrator.data import Conversation
from orchestrator.evaluation.suites import PromptSuite, load_suite

HOLDOUT_SEED = 0
"""Which rows are held out is part of the question asked, so it is the same for every trial and every training seed."""


@dataclass(frozen=True)
class Materials:
    """Rows of one experiment, not yet tokenised."""

    train: tuple[Conversation, ...]
    evaluation: tuple[Conversation, ...]
    safety: tuple[Conversation, ...]
    suites: tuple[PromptSuite, ...]
    fingerprint: str
    """Content hash of all rows and prompts."""


def load(experiment: Experiment, cache: dict[Any, Any] | None = None) -> Materials:
    """Load and check everything the experiment names; with a `cache`, once per experiment. Raises DataError."""
    key = ("materials", experiment.digest_of("model", "task", "safety"))
    if cache is not None and key in cache:
        return cache[key]
    train, evaluation = _task(experiment)
    safety: list[Conversation] = []
    if experiment.safety.data is not None:
        rows = data.load_rows(experiment.safety.data, split=experiment.task.split, field="safety.data")
        safety = data.normalise(rows, "auto", experiment.safety.columns, experiment.safety.data, field="safety.data", kind="safety")
    suites = tuple(load_suite(suite) for suite in experiment.safety.suites)
    fingerprint = data.fingerprint(train, evaluation, safety, [suite.hash for suite in suites])
    found = Materials(tuple(train), tuple(evaluation), tuple(safety), suites, fingerprint)
    if cache is not None:
        cache[key] = found
    return found


def _task(experiment: Experiment) -> tuple[list[Conversation], list[Conversation]]:
    task = experiment.task
    rows = data.load_rows(task.data, split=task.split, limit=task.limit, field="task.data")
    train = data.normalise(rows, task.format, task.columns, task.data, field="task.data")
    if task.eval_data is None:
        train, evaluation = data.split_holdout(train, task.eval_fraction, HOLDOUT_SEED)
    else:
        rows = data.load_rows(task.eval_data, split=task.split, field="task.eval_data")
        evaluation = data.normalise(rows, task.format, task.columns, task.eval_data, field="task.eval_data")
    if task.eval_size is not None and len(evaluation) > task.eval_size:
        evaluation = data.sample(evaluation, task.eval_size, HOLDOUT_SEED)
    return train, evaluation
