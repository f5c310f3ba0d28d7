"""Chances of verdicts under known truths, by exact sums and by simulation: the cells that `verdict_power.py` prints.

Simulated suites take their verdict from a saddle-point approximation of the p-value where that is far from the level,
and from `rises.p_value` where it is not; five of the far ones a cell are compared, and a difference ends the program.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402
from scipy.special import gammaln  # noqa: E402

from orchestrator.decision import rises  # noqa: E402

LEVEL = rises.LEVEL
BAND = (0.019, 0.033)
"""Approximate p-values in here are computed anew by `rises.p_value`."""
REQUESTS = (10, 20, 36, 50, 72, 100, 120, 180, 250)
STRATA: dict[str, tuple[list[float], list[float]]] = {
    "6 equal, rates 0 to twice the mean": ([1 / 6] * 6, [0, 0.4, 0.8, 1.2, 1.6, 2]),
    "6 equal, all of it in one": ([1 / 6] * 6, [6, 0, 0, 0, 0, 0]),
    ".4 .2 .1 .1 .1 .1, all in the largest": ([0.4, 0.2, 0.1, 0.1, 0.1, 0.1], [2.5, 0, 0, 0, 0, 0]),
    ".4 .2 .1 .1 .1 .1, all in the small": ([0.4, 0.2, 0.1, 0.1, 0.1, 0.1], [0, 0, 2.5, 2.5, 2.5, 2.5]),
    ".9 .1, half in the small": ([0.9, 0.1], [5 / 9, 5]),
    "2 equal, one got better": ([0.5, 0.5], [-1, 3]),
}
"""Shares of the strata, and their rises in units of the mean rise."""

Part = tuple[int, np.ndarray]
"""(requests of one kind, a fixed number; chance of each rise -1..1 on an even grid)."""
Cell = tuple[dict[str, Any], list[Part]]


def law(prompts: int, up: float, down: float, icc: float, grid: int) -> np.ndarray:
    """Chances of a request's rise on -1..1 in steps of 1 / grid, (2 grid + 1,), grid a multiple of `prompts`.

    Each prompt newly fails with chance `up` and newly passes with `down`; two prompts of a request agree with
    correlation `icc` (Dirichlet-multinomial; 0: independent, 1: all alike).
    """
    found = np.zeros(2 * grid + 1)
    if icc == 1:
        found[[0, grid, 2 * grid]] = down, 1 - up - down, up
        return found
    chances = np.array([up, down, 1 - up - down])
    possible = chances > 0
    for new, gained in itertools.product(range(prompts + 1), repeat=2):
        counts = np.array([new, gained, prompts - new - gained])
        if counts[2] < 0 or counts[~possible].any():
            continue
        some, log = counts[possible], gammaln(prompts + 1) - gammaln(counts + 1).sum()
        if icc == 0:
            log += some @ np.log(chances[possible])
        else:
            alpha = chances[possible] * (1 - icc) / icc
            log += gammaln(alpha.sum()) - gammaln(alpha.sum() + prompts)
            log += (gammaln(alpha + some) - gammaln(alpha)).sum()
        found[grid + (new - gained) * grid // prompts] += math.exp(log)
    return found


def approximate(counts: np.ndarray, values: np.ndarray, limit: float) -> np.ndarray:
    """P-values as of `rises.p_value` by Lugannani and Rice's formula, right within a few percent; 1 for clearly large.

    counts: (R, K), how often each of values (K,) occurs in each of R suites. Returns (R,).
    """
    slopes = np.append(values - limit, 1 - limit)
    tables = np.column_stack([counts, np.ones(len(counts))])
    found, rows = np.ones(len(counts)), np.flatnonzero(tables @ slopes < 0)
    tables = tables[rows]
    low, high = np.full(len(rows), -25.0), np.zeros(len(rows))
    point = np.zeros((len(rows), 1))
    for _ in range(36):
        middle = (low + high) / 2
        point = -np.expm1(middle)[:, None] / (1 - limit)
        over = (tables * (slopes / (1 - slopes * point))).sum(1) > 0
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    rooms = 1 - slopes * point
    root = np.sqrt(np.maximum(2 * (tables * np.log(rooms)).sum(1), 1e-12))
    width = point[:, 0] * np.sqrt((tables * (slopes / rooms) ** 2).sum(1))
    found[rows] = stats.norm.sf(root) + stats.norm.pdf(root) * (1 / width - 1 / root)
    return found


def feasible(counts: np.ndarray, values: np.ndarray, limit: float, rng: np.random.Generator) -> np.ndarray:
    """Whether the upper end is at most the limit, (R,), for tables of counts as in `approximate`."""

    def exactly(row: int) -> bool:
        table = np.repeat(values, counts[row])
        return bool(rises.p_value(table, limit) <= LEVEL and table.mean() <= limit)

    guess = approximate(counts, values, limit)
    found, near = guess <= LEVEL, np.flatnonzero((guess > BAND[0]) & (guess < BAND[1]))
    found[near] = [exactly(row) for row in near]
    for row in rng.choice(len(counts), min(5, len(counts)), replace=False):
        if found[row] != exactly(row):
            raise SystemExit(f"a p-value of about {guess[row]:.4f} misjudged {counts[row]} of {values}: widen BAND")
    return found


def simulated(parts: Sequence[Part], limit: float, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Shares of (feasible, infeasible) verdicts over `draws` suites made of the parts."""
    grid = (len(parts[0][1]) - 1) // 2
    values = np.arange(-grid, grid + 1) / grid
    tables = sum(rng.multinomial(requests, chances / chances.sum(), size=draws) for requests, chances in parts)
    used = tables.any(0)
    rows, times = np.unique(tables[:, used], axis=0, return_counts=True)
    kept = feasible(rows, values[used], limit, rng)
    broken = feasible(rows, -values[used], -limit, rng)
    return float(times @ kept) / draws, float(times @ broken) / draws


@functools.cache
def boundaries(requests: int, limit: float, most_gained: int) -> list[tuple[int, int]]:
    """(most feasible, least infeasible) new failures of single prompts for 0, 1, ... gains; -1: none is feasible."""

    def table(new: int, gained: int) -> np.ndarray:
        return np.repeat([1.0, -1.0, 0.0], [new, gained, requests - new - gained])

    found, new, broken = [], -1, 0
    for gained in range(most_gained + 1):
        room = requests - gained
        while new < room and rises.p_value(table(new + 1, gained), limit) <= LEVEL:
            new += 1
        while broken <= room and rises.p_value(-table(broken, gained), -limit) >= LEVEL:
            broken += 1
        found.append((min(new, room), broken))
    return found


def exact(requests: int, up: float, down: float, edges: list[tuple[int, int]]) -> tuple[float, float]:
    """Chances of (feasible, infeasible) for single prompts: the sum over all numbers of gains and new failures."""
    gained = np.arange(len(edges))
    weights = stats.binom.pmf(gained, requests, down)
    kept = stats.binom.cdf([edge[0] for edge in edges], requests - gained, up / (1 - down))
    broken = stats.binom.sf([edge[1] - 1 for edge in edges], requests - gained, up / (1 - down))
    return float(weights @ kept), float(weights @ broken)


def exact_parts(parts: Sequence[Part], limit: float) -> tuple[float, float] | None:
    """Chances of (feasible, infeasible) where every rise is 0 or 1: the sum over all counts; None for anything else."""
    total = np.ones(1)
    for requests, chances in parts:
        if 1 - chances[len(chances) // 2] - chances[-1] > 1e-12:
            return None
        total = np.convolve(total, stats.binom.pmf(np.arange(requests + 1), requests, chances[-1]))
    [(kept, broken)] = boundaries(len(total) - 1, limit, 0)
    return float(total[: kept + 1].sum()), float(total[broken:].sum())


def two_values(limit: float) -> Iterator[dict[str, Any]]:
    """Requests whose rise takes one of two values, its mean at the limit; exact."""
    lows, highs = (-1.0, -0.5, 0.0, limit / 2), (2 * limit, 0.25, 0.5, 1.0)
    for requests, low, high in itertools.product((40, 72, 100, 200, 500), lows, highs):
        pair = np.array([low, high])

        def small(number: int, pair: np.ndarray, bound: float, requests: int = requests) -> bool:
            return rises.p_value(np.repeat(pair, [requests - number, number]), bound) <= LEVEL

        chance = (limit - low) / (high - low)
        kept = first(0, requests, lambda k, pair=pair: not small(k, pair, limit)) - 1
        broken = first(0, requests, lambda k, pair=pair: small(k, -pair, -limit))
        shares = stats.binom.cdf(kept, requests, chance), stats.binom.sf(broken - 1, requests, chance)
        name = f"rises {low:g} or {high:g}"
        about = {"design": name, "requests": requests, "icc": None, "gains": None, "limit": limit}
        yield about | {"draws": None, "feasible": float(shares[0]), "infeasible": float(shares[1])}


def first(start: int, end: int, holds: Callable[[int], bool]) -> int:
    """The least whole number in start..end that holds, where all above it do too; end + 1 where none does."""
    end += 1
    while start < end:
        middle = (start + end) // 2
        start, end = (start, middle) if holds(middle) else (middle + 1, end)
    return start


def at_the_limit(limit: float) -> Iterator[Cell]:
    """The cells of false verdicts (what it is, its parts): the true rise is the limit."""
    correlations = (0.0, 0.3, 1.0)
    for prompts, requests, icc, down in itertools.product((2, 3, 10), REQUESTS, correlations, (0.0, 0.01, 0.05, 0.25)):
        about = {"design": f"requests of {prompts}", "requests": requests, "icc": icc, "gains": down, "limit": limit}
        yield about, [(requests, law(prompts, limit + down, down, icc, prompts))]
    for requests, icc, down in itertools.product((72, 120, 240), correlations, (0.0, 0.05)):
        for name, rates in (("", (1.0, 1.0, 1.0)), (", more in the large", (0.5, 1.0, 1.5))):
            laws = [law(size, r * limit + down, down, icc, 10) for size, r in zip((1, 2, 5), rates, strict=True)]
            about = {"requests": requests, "icc": icc, "gains": down, "limit": limit}
            yield {"design": f"sizes 1, 2, 5{name}, drawn", **about}, [(requests, sum(laws) / 3)]
            yield {"design": f"sizes 1, 2, 5{name}, fixed", **about}, [(requests // 3, one) for one in laws]
    cases = itertools.product(STRATA.items(), (100, 200, 500), (0.0, 0.02, 0.1))
    for (name, (shares, factors)), requests, down in cases:
        sizes = np.diff(np.round(np.cumsum([0.0, *shares]) * requests)).astype(int)
        unit = limit * requests / float(sizes @ np.array(factors))  # sizes are rounded, the mean rise is not
        laws = [law(1, max(f, 0) * unit + down, max(-f, 0) * unit + down, 1.0, 1) for f in factors]
        about = {"design": f"strata {name}", "requests": requests, "icc": None, "gains": down, "limit": limit}
        yield about, [(int(size), one) for size, one in zip(sizes, laws, strict=True)]
    for number in range(100):
        parts = random_strata(limit, np.random.default_rng([7, number]))
        about = {"requests": sum(requests for requests, _ in parts), "icc": None, "gains": None, "limit": limit}
        yield {"design": "strata at random", **about}, parts


def random_strata(limit: float, rng: np.random.Generator) -> list[Part]:
    """One to four fixed strata of 10 to 80 requests, each of a random law on -1, -.5, ..., 1, together at the limit."""
    sizes = rng.integers(10, 81, size=int(rng.integers(1, 5)))
    laws = rng.dirichlet(rng.choice([0.05, 0.3, 2.0]) * rng.choice([1.0, 5.0], size=5), size=len(sizes))
    mean = float(sizes @ (laws @ np.linspace(-1, 1, 5)) / sizes.sum())
    end = 1.0 if mean < limit else -1.0
    share = (limit - mean) / (end - mean)  # of every request's law moved to one end
    laws = (1 - share) * laws
    laws[:, -1 if end > 0 else 0] += share
    return [(int(size), one) for size, one in zip(sizes, laws, strict=True)]
