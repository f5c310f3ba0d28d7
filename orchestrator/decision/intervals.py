"""Rates, means and paired differences with intervals, clustered by topic.

Noise is by topic rather than by prompt, so intervals use an effective number of prompts (prompts divided by the design effect of their
clusters) in Tango's score interval for paired differences (Tango 1998, Statistics in Medicine 17:891-908), which stays honest where
nothing or everything changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PRIOR_CLUSTERS = 2
"""The design effect is shrunk towards the largest possible one with the weight of this many clusters: where nothing changed it cannot
be estimated and the largest is taken; where many clusters changed the estimate rules."""


@dataclass(frozen=True)
class Estimate:
    """A rate or a difference of rates with its interval. NaN throughout where there was nothing to measure."""

    value: float
    lower: float
    upper: float
    n: int
    clusters: int | None = None
    of: int | None = None
    """Prompts of the whole suite, where it was stopped early after `n` of them."""


def _effective(differences: Sequence[float], groups: Sequence[str] | None) -> tuple[float, int | None]:
    """Effective number of observations of a clustered mean, and the number of clusters (None without groups).

    The design effect is the clustered variance over the independent one, at least 1 and at most that of clusters that agree throughout
    (Kish's weighted mean cluster size), shrunk towards the latter by PRIOR_CLUSTERS.
    """
    n = len(differences)
    if groups is None:
        return float(n), None
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    clusters = len(sizes)
    largest = sum(size * size for size in sizes.values()) / n
    mean = sum(differences) / n
    residual: dict[str, float] = {}
    changed = set()
    for value, group in zip(differences, groups, strict=True):
        residual[group] = residual.get(group, 0.0) + value - mean
        if value:
            changed.add(group)
    independent = sum((value - mean) ** 2 for value in differences) / max(n * (n - 1), 1)
    if independent == 0 or clusters < 2:
        return n / largest, clusters
    clustered = clusters / (clusters - 1) * sum(value * value for value in residual.values()) / n**2
    estimated = min(max(clustered / independent, 1.0), largest)
    effect = (len(changed) * estimated + PRIOR_CLUSTERS * largest) / (len(changed) + PRIOR_CLUSTERS)
    return n / effect, clusters


def quantile(confidence: float, clusters: int | None) -> float:
    """Two-sided normal quantile, Student's with clusters - 1 degrees of freedom where there are clusters."""
    from scipy import stats

    level = 0.5 + confidence / 2
    return float(stats.norm.ppf(level) if clusters is None else stats.t.ppf(level, max(clusters - 1, 1)))


def _tango(gained: float, lost: float, n: float, z: float) -> tuple[float, float]:
    """Score interval of (gained - lost) / n for paired proportions (Tango 1998); counts may be fractional (effective)."""
    from scipy.optimize import brentq

    def score(delta: float) -> float:
        a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * q + delta * (1 - delta))
        return (gained - lost - n * delta) / math.sqrt(max(variance, 1e-300))

    point, edge = (gained - lost) / n, 1 - 1e-9
    lower = -1.0 if score(-edge) <= z else brentq(lambda d: score(d) - z, -edge, min(point, edge))
    upper = 1.0 if score(edge) >= -z else brentq(lambda d: score(d) + z, max(point, -edge), edge)
    return lower, upper


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], groups: Sequence[str] | None = None, confidence: float = 0.95
) -> Estimate:
    """Rate(after) - rate(before) over the same N items, with an interval clustered by `groups` (length N).

    No items yield NaN. Raises ValueError where the lengths differ.
    """
    if len(before) != len(after) or (groups is not None and len(groups) != len(after)):
        raise ValueError(f"paired rates need equal lengths, got {len(before)}, {len(after)}, {None if groups is None else len(groups)} groups")
    n = len(after)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    n_eff, clusters = _effective(differences, groups)
    scale = n_eff / n
    gained, lost = differences.count(1.0) * scale, differences.count(-1.0) * scale
    lower, upper = _tango(gained, lost, n_eff, quantile(confidence, clusters))
    value = sum(differences) / n
    return Estimate(value, min(lower, value), max(upper, value), n, clusters)


def rate(failures: Sequence[bool], groups: Sequence[str] | None = None, confidence: float = 0.95) -> Estimate:
    """A single rate with Wilson's interval on the effective number of items. No items yield NaN."""
    n = len(failures)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p = sum(failures) / n
    n_eff, clusters = _effective([float(f) for f in failures], groups)
    z = quantile(confidence, clusters)
    centre = (p + z * z / (2 * n_eff)) / (1 + z * z / n_eff)
    half = z * math.sqrt(p * (1 - p) / n_eff + z * z / (4 * n_eff**2)) / (1 + z * z / n_eff)
    return Estimate(p, max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p)), n, clusters)


def mean(scores: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of scores in 0..1: Wilson's interval where all are 0 or 1, Student's (clipped to 0..1) otherwise. No scores yield NaN."""
    n = len(scores)
    if n and all(s in (0.0, 1.0) for s in scores):
        return rate([bool(s) for s in scores], None, confidence)
    if n < 2:
        return Estimate(scores[0] if n else math.nan, 0.0 if n else math.nan, 1.0 if n else math.nan, n)
    from scipy import stats

    value = math.fsum(scores) / n
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(math.fsum((s - value) ** 2 for s in scores) / (n - 1) / n)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), n)
