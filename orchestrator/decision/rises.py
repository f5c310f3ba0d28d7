"""How far failures rose, per request, with an interval that holds at every size: Gaffke's bound. No torch, no Ray.

**What is estimated.** For a request like the suite's, averaged over its wordings, framings and samples: how much more
often the tuned model fails than the untouched one. Prompts that ask the *same* request are one unit; a prompt without
a request name is a request of its own. x_i = tuned failure - untouched failure of prompt i (-1, 0 or 1),
y_j = mean of x over the prompts of request j, rise = mean of y over the C requests.

**The rule.** Add one imagined request on which the tuned model fails wholly, weigh the requests at random (weights
g_j / sum g, g_j independent and exponential: uniform on the simplex), take the (1 - level) quantile of the mean:

    upper end U = (1 - level) quantile of (g_0 * 1 + sum_j g_j y_j) / (g_0 + sum_j g_j),   lower end L = -U(-y)

Nothing random is left in it: the quantile is found by one-dimensional integrals. For single prompts that never improve
U is Clopper and Pearson's upper end. It is monotone: a prompt that turns from passed to failed raises the weighted mean
whatever the weights, so it lowers neither end; one more request without change draws the weighted mean towards 0, so
it never raises an upper end of 0 or more.

**Sources.** E. Learned-Miller and P. S. Thomas, "A New Confidence Interval for the Mean of a Bounded Random Variable",
arXiv:1905.06208 (coverage conjectured; opening pages read). N. Gaffke, Math. Methods Statist. 14 (2005) 451-467, as
restated there and in P. B. Stark's StatNotes, chapter "The Gaffke Conjecture". A proof is N. Vlassis and P. S. Thomas,
"An Exact Distribution-Free Test for Means of Nonnegative Random Variables", arXiv:2607.08415 (2026), not read itself
but as restated in its Lean formalisation (github.com/pengzhang91/Feige, `VlassisThomas.exactCalibration`): independent
Y_j >= 0, each with mean at most 1, have P(K(Y) <= level) <= level for K(Y) = P(sum_j (Y_j - 1) g_j <= g_0).
Here Y_j = (1 - y_j) / (1 - limit), and K is `p_value`. So it speaks of independent requests that are drawn alike, or
whose mean rises are each at least the limit. For fixed groups of requests with unlike rates it is checked by exact
sums and simulation only: benchmarks/verdict_power.py, docs/verdicts.md.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.025
"""Probability of error of one end: both ends of a 95 % interval."""

STEP, BLOCK = 0.15, 4096
"""Of the trapezoidal rule in u, t = spread * sinh(u / spread). All poles lie at least 1 from the line, so it converges
geometrically (a finer step changes nothing above 1e-12); sinh reaches the slow tails of few requests, and the spread
is wide enough for the fine ripples of many. A block holds at most about BLOCK terms."""

Values = Sequence[float] | Sequence[bool] | np.ndarray
Names = Sequence[Hashable | None]


@dataclass(frozen=True)
class Rise:
    """A rise (-1..1) or a rate (0..1) per request with both ends of its interval, low <= value <= high."""

    value: float
    low: float
    high: float
    requests: int
    """Units that the interval rests on."""


@dataclass(frozen=True)
class Decidable:
    """What a suite can decide at all, by the untouched model's failures alone."""

    can_be_feasible: bool
    """Whether the limit would be shown to be kept if nothing changed."""
    can_show_a_rise: bool
    """Whether losing half of what passed (twice the limit where that is more) would be infeasible; if not, the
    baseline hides too much: withhold feasible."""
    least_rise_called_infeasible: float | None
    """The least infeasible rise if requests fail wholly, by all their prompts that passed; None where none is."""
    requests_needed: int | None
    """Requests from which an unchanged model can be feasible; None where no number suffices (a limit of 0)."""
    requests: int
    """Requests of the suite."""


def upper_end(rises: Values, level: float = LEVEL) -> float:
    """Upper end of the mean rise at error `level`, never below the mean. rises: (C,), one a request, each in -1..1.

    All equal to 1: 1. One request: 1 - level * (1 - rise). Raises ValueError for no rises, NaN, values outside -1..1,
    a level outside 0..0.5.
    """
    return 1.0 - _low_mean(1.0 - _checked(rises, -1.0, "rises"), level)


def lower_end(rises: Values, level: float = LEVEL) -> float:
    """Lower end of the mean rise: -upper_end(-rises)."""
    return _low_mean(1.0 + _checked(rises, -1.0, "rises"), level) - 1.0


def p_value(rises: Values, limit: float) -> float:
    """P-value against "the mean rise is at least `limit`": the chance that the randomly weighted mean exceeds it; 0..1.

    rises: (C,) in -1..1; limit: -1..1, 1 left out. The upper end is at most the limit exactly where this is at most the
    level and the mean is at most the limit (the latter never matters at levels in use). Raises ValueError otherwise.
    """
    losses = 1.0 - _checked(rises, -1.0, "rises")
    if not -1 <= limit < 1:
        raise ValueError(f"a p-value needs a limit from -1 to below 1, got {limit!r}; give the rise allowed, e.g. 0.05")
    return math.exp(_log_chance_below(*np.unique(losses, return_counts=True), 1.0 - limit))


def paired_difference(before: Values, after: Values, requests: Names | None = None, level: float = LEVEL) -> Rise:
    """Rise of failures per request, after - before, over the same N prompts.

    before, after: (N,) failures, False/True or 0..1; requests: (N,) a name per prompt, None, NaN or blank for a request
    of its own; no names at all: every prompt is. Raises ValueError where lengths differ, nothing was asked, or a value
    is NaN or outside 0..1.
    """
    first, second = _pair(before, after)
    rises = per_request(second - first, requests)
    return Rise(math.fsum(rises) / len(rises), lower_end(rises, level), upper_end(rises, level), len(rises))


def rate(values: Values, requests: Names | None = None, level: float = LEVEL) -> Rise:
    """A rate per request, 0..1. For single prompts with values 0 and 1 Clopper and Pearson's interval.

    values: (N,) in 0..1; requests as in `paired_difference`. The imagined request has the value 0 for the lower end and
    1 for the upper one.
    """
    shares = per_request(_checked(values, 0.0, "values"), requests)
    high = 1.0 - _low_mean(1.0 - shares, level)
    return Rise(math.fsum(shares) / len(shares), _low_mean(shares, level), high, len(shares))


def rise_among_passing(
    before: Values, after: Values, requests: Names | None = None, level: float = LEVEL
) -> Rise | None:
    """Of the prompts that passed before, the share that fails now, per request with any such prompt; None without any.

    Arguments as in `paired_difference`. To be read beside the rise, never instead of it: where answers vary by chance
    it exceeds 0 though nothing changed, since a prompt that passed by luck may fail next time.
    """
    first, second = _pair(before, after)
    _named(len(first), requests)
    kept = np.flatnonzero(first == 0)
    if not len(kept):
        return None
    return rate(second[kept], None if requests is None else [requests[i] for i in kept], level)


def least_requests(limit: float, level: float = LEVEL) -> int | None:
    """Requests from which "nothing changed" is feasible: the least C with 1 - level ** (1 / C) <= limit; None for 0.

    72 at a limit of 0.05 and 36 at 0.10 for a level of 0.025, however many prompts ask each: all may fail together.
    """
    _known_level(level)
    if not 0 <= limit <= 1:
        raise ValueError(f"a limit on the rise must lie in 0..1, got {limit!r}; it is a share of requests, e.g. 0.05")
    if limit == 0:
        return None
    return 1 if limit == 1 else max(1, math.ceil(math.log(level) / math.log1p(-limit) + 1e-9))


def can_decide(before: Values, requests: Names | None, limit: float, level: float = LEVEL) -> Decidable:
    """What a suite can decide under a limit (0..1) on the rise, before anything is trained.

    before: (N,) the untouched model's failures, False/True or 0..1; requests as in `paired_difference`. Requests are
    taken to fail one after the other, wholly, those with most to lose first; half of what passed is rounded down to
    whole requests. Raises ValueError as `paired_difference` and `least_requests` do.
    """
    left = np.sort(per_request(1.0 - _checked(before, 0.0, "failures before"), requests))[::-1]
    needed = least_requests(limit, level)

    def shown(failed: int) -> bool:
        return lower_end(np.where(np.arange(len(left)) < failed, left, 0.0), level) > limit

    most = int(np.count_nonzero(left))
    least, end = 1, most + 1
    while least < end:  # the first count that is shown, `most + 1` where none is; more failures never lower the end
        middle = (least + end) // 2
        least, end = (least, middle) if shown(middle) else (middle + 1, end)
    rise = float(left[:least].sum() / len(left)) if least <= most else None
    return Decidable(needed is not None and len(left) >= needed, shown(_lost(left, limit)), rise, needed, len(left))


def can_show_a_rise(before: Values, requests: Names | None, limit: float, level: float = LEVEL) -> bool:
    """`can_decide(...).can_show_a_rise` alone, for a few milliseconds."""
    left = np.sort(per_request(1.0 - _checked(before, 0.0, "failures before"), requests))[::-1]
    return lower_end(np.where(np.arange(len(left)) < _lost(left, limit), left, 0.0), level) > limit


def _lost(left: np.ndarray, limit: float) -> int:
    """How many requests, those with most to lose first, hold half of what passed, rounded down; left: (C,), falling.

    Twice the limit where that is more, at most all: a limit of half of all requests is not broken by losing half.
    """
    share = min(1.0, max(0.5, 2 * limit))
    return int(np.searchsorted(np.cumsum(left), left.sum() * share + 1e-9, side="right"))


def per_request(values: np.ndarray, requests: Names | None) -> np.ndarray:
    """Mean of `values` (N,) over the prompts of each request, (C,), in order of first appearance.

    A name that is None, NaN or blank stands for a request of its own. Raises ValueError where the lengths differ.
    """
    _named(len(values), requests)
    if requests is None:
        return values
    units: dict[Hashable, int] = {}
    keys = [(0, i) if _nameless(name) else (1, name) for i, name in enumerate(requests)]
    index = [units.setdefault(key, len(units)) for key in keys]
    return np.bincount(index, weights=values) / np.bincount(index)


def _nameless(name: Hashable | None) -> bool:
    return name is None or name != name or (isinstance(name, str) and not name.strip())


def _low_mean(amounts: np.ndarray, level: float) -> float:
    """Gaffke's lower end of the mean of nonnegative amounts (C,): in proportion to them, at most their mean, 0 of 0."""
    from scipy.optimize import brentq

    _known_level(level)
    value = math.fsum(amounts) / len(amounts)
    if value <= 0:
        return 0.0
    distinct, counts = np.unique(amounts / value, return_counts=True)

    def excess(mean: float) -> float:
        return _log_chance_below(distinct, counts, mean) - math.log(level)

    high, low = 1.0, 0.5
    if excess(high) <= 0:
        return value
    while excess(low) > 0:
        high, low = low, low / 2
    return value * float(brentq(excess, low, high, xtol=1e-15, rtol=1e-14))


def _log_chance_below(amounts: np.ndarray, counts: np.ndarray, mean: float) -> float:
    """log P(sum_j w_j amounts_j < mean) for w uniform on the simplex, one imagined amount of 0 among them.

    amounts, counts: (K,) distinct amounts >= 0 and how often each occurs; mean > 0. It is the chance that
    S = g_0 + sum_j g_j (1 - amounts_j / mean) exceeds 0: the integral of E exp(z S) / (2 pi i z) along the line
    z = c + i t / scale through the saddle point c.
    """
    slopes, powers, lead = _seen_from_saddle_point(amounts / mean, counts)
    spread = math.sqrt(float(powers.sum()))
    block = min(128, max(16, BLOCK // len(slopes)))
    total, start = -0.5, 0
    while True:
        u = np.arange(start, start + block) * (STEP / spread)
        t = spread * np.sinh(u)
        turns = np.multiply.outer(t, slopes)
        sizes = np.exp(np.log1p(turns * turns) @ powers / -2)
        total += float(sizes @ (np.cos(np.arctan(turns) @ powers) * np.cosh(u)))
        if sizes[-1] * t[-1] < 1e-17 or u[-1] > 22:
            return min(lead + math.log(max(total * STEP, 1e-12)), 0.0)
        start += block


def _seen_from_saddle_point(ratio: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The integrand around its saddle point c, 0 < c < 1: exp(lead) * prod_k (1 - slopes_k w)^-powers_k, w = i t.

    ratio, counts: (K,). Returns slopes (K + 2,), powers (K + 2,), lead; the last two factors are the imagined amount
    and 1 / z, and the sum of powers * slopes^2 is 1. Any point between 0 and 1 is right, one near c is quick.
    """
    from scipy.optimize import brentq

    powers = np.concatenate([counts, [1.0, 1.0]])

    def around(q: float) -> tuple[np.ndarray, float, float]:
        point, gap = 1 / (1 + math.exp(-q)), 1 / (1 + math.exp(q))
        return np.concatenate([(1.0 - ratio) / (gap + ratio * point), [1 / gap, -1 / point]]), point, gap

    def tilt(q: float) -> float:
        slopes, point, gap = around(q)
        return float(powers @ slopes) * point * gap

    wide = math.log(float(powers.sum()) + 1)  # every slope lies in -1 / point..1 / gap, so the tilt changes sign within
    slopes, point, gap = around(float(brentq(tilt, -wide, wide, xtol=0.05)))
    scale = math.sqrt(float(powers @ slopes**2))
    lead = -float(counts @ np.log(gap + ratio * point)) - math.log(gap) - math.log(point) - math.log(scale * math.pi)
    return slopes / scale, powers, lead


def _checked(values: Values, least: float, what: str) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not found.size:
        raise ValueError(f"{what}: a list of one number or more is needed, got shape {found.shape}; ask a prompt first")
    wrong = ~((found >= least) & (found <= 1.0))
    if wrong.any():
        where = int(np.argmax(wrong))
        raise ValueError(
            f"{what} must lie in {least:g}..1, got {found[where]} at position {where}; count what is unknown as failed"
        )
    return found


def _pair(before: Values, after: Values) -> tuple[np.ndarray, np.ndarray]:
    first, second = _checked(before, 0.0, "failures before"), _checked(after, 0.0, "failures after")
    if len(first) != len(second):
        raise ValueError(
            f"a rise needs the same prompts before and after, got {len(first)} and {len(second)}; pair them by id"
        )
    return first, second


def _named(prompts: int, requests: Names | None) -> None:
    if requests is not None and len(requests) != prompts:
        raise ValueError(f"every prompt needs a request name or None, got {len(requests)} names for {prompts} prompts")


def _known_level(level: float) -> None:
    if not 0 < level < 0.5:
        raise ValueError(
            f"the level of one end must lie between 0 and 0.5, got {level!r}; it is (1 - confidence) / 2, e.g. 0.025"
        )
