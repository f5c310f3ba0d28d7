"""Requests of a suite that the search never asks: they stay for what was chosen, since a search that looks at the same prompts
many times finds a model that happens to pass them.

With 15 trials that all stand exactly at the limit, at least one is called feasible on the searched prompts in about a third of
searches; on prompts that had no part in the choice a wrong `feasible` is as rare as one trial's (`benchmarks/winners.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.config import Experiment, recipe_items
from orchestrator.decision.intervals import level_of
from orchestrator.decision.rises import least_requests
from orchestrator.evaluation.suites import PromptSuite

SUFFIX = "-held_out"
"""Of the suite's name, for the part that waits."""
LEAST = 40
"""Requests that each part has at least, whatever the limit."""


def divided(suites: Sequence[PromptSuite], experiment: Experiment) -> tuple[PromptSuite, ...]:
    """The suites, each that is large enough as two: what the search asks, under its own name, and what waits, `<name>-held_out`.

    Large enough: both parts have LEAST requests and as many as an unchanged model needs to be feasible there. Only suites that constrain
    and that the search would ask are divided. Which request waits is decided by its own text (or its name), so that one request waits in
    every suite that asks it, and is the same in every run.
    """
    share = experiment.safety.confirm_share
    if not share or not experiment.confirms:
        return tuple(suites)
    names = {suite.name for suite in suites}
    found = [_divided(suite, share, experiment) if suite.name + SUFFIX not in names else (suite,) for suite in suites]
    return tuple(part for parts in found for part in parts)


def looks(experiment: Experiment) -> int:
    """Models that may be held against what waits before one is handed over: the finalists, and the plain control where it is asked beside
    them. The level of each look is divided by it."""
    return experiment.search.finalists + bool(plain_recipes(experiment)) if experiment.confirms else 1


def plain_recipes(experiment: Experiment) -> tuple[str, ...]:
    """Names of the recipes that are plain fine-tuning, of all weights or of adapters, and no method of safety: what a score is compared with."""
    plain = {"full", "lora"}
    recipes = zip(experiment.recipe_names, experiment.recipes, strict=True)
    return tuple(name for name, recipe in recipes if {strategy for strategy, _ in recipe_items(recipe)} <= plain)


def _divided(suite: PromptSuite, share: float, experiment: Experiment) -> tuple[PromptSuite, ...]:
    limits = experiment.safety.limits
    limit = {"harmful": limits.max_degradation, "benign": limits.max_over_refusal_rise}.get(suite.kind)
    if not suite.constrains or suite.phase != "always" or limit is None:
        return (suite,)
    waits = [_place(key) < share for key in _keys(suite)]
    parts = [[i for i, waiting in enumerate(waits) if waiting is wanted] for wanted in (False, True)]
    level = level_of(limits.confidence)
    needed = [least_requests(limit, level), least_requests(limit, level / looks(experiment))]
    units = suite.units
    if any(least is None or len({units[i] for i in part}) < max(least, LEAST) for part, least in zip(parts, needed, strict=True)):
        return (suite,)
    asked, waiting = (_part(suite, part) for part in parts)
    return asked, replace(waiting, name=suite.name + SUFFIX, phase="confirm")


def _keys(suite: PromptSuite) -> list[str]:
    """What each prompt's request is told by: its name, else its text before any attack framed it."""
    names, texts = suite.requests or ("",) * len(suite.ids), suite.texts or suite.prompts
    return [name or " ".join(str(text).lower().split()) for name, text in zip(names, texts, strict=True)]


def _place(key: str) -> float:
    """A number in 0..1 that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(f"held out {key}".encode()).digest()[:7]) / 2**56


def _part(suite: PromptSuite, indices: list[int]) -> PromptSuite:
    made = suite.subset(indices)
    texts = tuple(suite.texts[i] for i in indices) if suite.texts is not None else None
    return replace(made, texts=texts, source={**suite.source, "sha256": made.hash})
