"""Rates, means and paired differences with intervals, per request.

Prompts that ask the same request (wordings, framings, samples) are one unit; categories are fixed and enter no interval. The bounds are those
of `rises`: Gaffke's on the requests, for single prompts Clopper and Pearson's. They are monotone: a further failure never improves a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.decision import rises


@dataclass(frozen=True)
class Estimate:
    """A rate or a difference of rates with its interval. NaN throughout where there was nothing to measure."""

    value: float
    lower: float
    upper: float
    n: int
    requests: int | None = None
    """Units that the interval rests on, where prompts share requests."""
    of: int | None = None
    """Prompts of the whole suite, where it was stopped early after `n` of them."""


def quantile(confidence: float) -> float:
    """Two-sided normal quantile."""
    from scipy import stats

    return float(stats.norm.ppf(0.5 + confidence / 2))


def level_of(confidence: float) -> float:
    """Probability of error of one end of a two-sided interval."""
    return (1 - confidence) / 2


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], requests: Sequence[str] | None = None, confidence: float = 0.95
) -> Estimate:
    """Rise of failures per request, after - before over the same N prompts (`rises.paired_difference`).

    requests: a name per prompt, empty for a request of its own; None: every prompt is. No prompts yield NaN. Raises ValueError where the
    lengths differ.
    """
    if len(before) != len(after) or (requests is not None and len(requests) != len(after)):
        named = None if requests is None else len(requests)
        raise ValueError(f"paired rates need equal lengths, got {len(before)}, {len(after)}, {named} requests")
    if not after:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return _estimate(rises.paired_difference(before, after, requests, level_of(confidence)), len(after))


def paired_scores(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of after - before over the same N rows, scores in 0..1, by Gaffke's bound. No rows yield NaN. Raises ValueError for unequal lengths,
    NaN and scores outside 0..1."""
    if len(before) != len(after):
        raise ValueError(f"paired scores need equal lengths, got {len(before)} and {len(after)}")
    if not after:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return _estimate(rises.paired_difference(before, after, None, level_of(confidence)), len(after))


def among_passing(
    before: Sequence[bool], after: Sequence[bool], requests: Sequence[str] | None = None, confidence: float = 0.95
) -> Estimate | None:
    """Of the prompts that passed before, the share that fails now (`rises.rise_among_passing`); None where none passed."""
    passing = before.count(False)
    found = rises.rise_among_passing(before, after, requests, level_of(confidence)) if passing else None
    return None if found is None else _estimate(found, passing)


def rate(failures: Sequence[bool], requests: Sequence[str] | None = None, confidence: float = 0.95) -> Estimate:
    """A rate per request with its interval (`rises.rate`); for single prompts Clopper and Pearson's. No prompts yield NaN."""
    if not failures:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return _estimate(rises.rate(failures, requests, level_of(confidence)), len(failures))


def _estimate(found: rises.Rise, n: int) -> Estimate:
    return Estimate(found.value, found.low, found.high, n, found.requests if found.requests != n else None)


def mean(scores: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of scores in 0..1: Clopper and Pearson's interval where all are 0 or 1, Student's (clipped to 0..1) otherwise. No scores yield NaN."""
    n = len(scores)
    if n and all(s in (0.0, 1.0) for s in scores):
        return rate([bool(s) for s in scores], None, confidence)
    if n < 2:
        return Estimate(scores[0] if n else math.nan, 0.0 if n else math.nan, 1.0 if n else math.nan, n)
    from scipy import stats

    value = math.fsum(scores) / n
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(math.fsum((s - value) ** 2 for s in scores) / (n - 1) / n)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), n)
