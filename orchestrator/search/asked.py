"""Trials as the search speaks of them: asked, past, and what an earlier driver left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

Outcome = tuple[str, float | None, dict[str, float | None]]
"""(state, score, constraints) of a finished trial, as `Studies.tell` takes them."""


@dataclass(frozen=True)
class Asked:
    """One trial to run."""

    trial_id: str
    recipe: str
    params: dict[str, Any]
    """Sampled and pinned parameters together."""
    resumed: bool = False
    """Whether an interrupted driver had started it already: it may go on from its checkpoint."""
    passed_over: tuple[dict[str, Any], ...] = ()
    """Points that the sampler proposed before this one and that were known: {params, of: trial id, complete, sampler}."""
    sampler: dict[str, int] = field(default_factory=dict)
    """What the sampler noted of the trial itself (nsga2: its generation)."""
    seed: int | None = None
    """Of its training, where it is another one than the search's: a new best, tried once more."""
    early_end: bool = False
    """Whether its training may end early: not for a recipe's first trial, whose figures every recipe has to have."""


@dataclass(frozen=True)
class Past:
    """One trial that an earlier driver asked, as its records say."""

    trial_id: str
    recipe: str
    params: dict[str, Any]
    """Of every parameter that is sampled; others are left out of account."""
    outcome: Outcome | None
    """None: it was interrupted and is asked again."""
    passed_over: tuple[dict[str, Any], ...] = ()
    sampler: dict[str, int] = field(default_factory=dict)
    seed: int | None = None
    """As in `Asked`."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier driver's search came to."""

    past: Sequence[Past]
    next_id: int = 1
    """Above every id that was ever given."""
    say: Callable[[str], None] = log.warning
    """Told, a sentence each, what was found wrong with the journal."""
