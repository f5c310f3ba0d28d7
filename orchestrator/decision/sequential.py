"""The sequential test of one suite: when enough prompts were asked to know whether the limit is kept."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from orchestrator.decision.betting import ROUNDING, fewest, log_capital
from orchestrator.records import Screening

Verdict = Literal["feasible", "infeasible", "undecided"]
CENSUS = 0.1
"""Share of the suite that may be asked first for having failed before; above it the order is random throughout."""


LEAST_SAVED = 0.2
"""A `feasible` that would save less than this share of the suite is not worth the second training that confirms it: the rest is asked."""


class SequentialTest:
    """A suite's confidence sequence: which prompts to ask next, and what is known from those that were asked.

    `before`: the untouched model's failures, in the suite's order. `groups`: a name per prompt, or None for prompts on their own.
    Raises ValueError for an empty suite, lengths that differ, a limit outside -1..1 or a confidence outside 0.5..1.
    """

    def __init__(
        self, before: Sequence[bool], groups: Sequence[str] | None, *, limit: float, confidence: float, seed: int | str,
    ):  # fmt: skip
        if not before or (groups is not None and len(groups) != len(before)):
            raise ValueError(f"a suite of {len(before)} prompts and {None if groups is None else len(groups)} groups cannot be asked in sequence")
        if not -1 <= limit <= 1 or not 0.5 < confidence < 1:
            raise ValueError(f"limit {limit} must lie in -1..1 and confidence {confidence} in 0.5..1")
        self.before, self.grouped = [int(b) for b in before], groups is not None
        self.limit, self.confidence = limit, confidence
        self.units, self.census = _units(self.before, groups, seed)
        """What is drawn at once, in the order of asking; the first `census` of them for having failed before."""
        self.low = np.array([-sum(self.before[i] for i in unit) for unit in self.units], dtype=float)
        self.high = np.array([len(unit) for unit in self.units]) + self.low
        self.sums: list[int] = []
        """Of x, one for each unit asked so far."""
        self.allowed = math.floor(limit * len(before) + ROUNDING)
        """The largest sum of x over the suite that keeps the limit."""

    @property
    def size(self) -> int:
        """Prompts of the suite."""
        return len(self.before)

    @property
    def asked(self) -> list[int]:
        """Indices of the prompts that were asked, in the order of asking."""
        return [i for unit in self.units[: len(self.sums)] for i in unit]

    def upcoming(self, least: int) -> list[int]:
        """Indices to ask next: whole units until there are `least` prompts, or what is left; empty at the end of the suite."""
        found: list[int] = []
        for unit in self.units[len(self.sums) :]:
            found += unit
            if len(found) >= least:
                break
        return found

    def batch(self, least: int) -> int:
        """How many prompts are to be asked before the next look: about `least`, so that the look falls where `feasible` may be known first."""
        asked = len(self.asked)
        if len(self.sums) < self.census:
            return max(least, sum(len(unit) for unit in self.units[: self.census]) - asked)
        more = self.earliest() - asked
        return more if least <= 2 * more and more < 2 * least else least

    def earliest(self) -> int:
        """Prompts after which `feasible` is known if nothing changes any more; all of them where it is never known before."""
        done = len(self.sums)
        sums = np.concatenate([self.sums, np.zeros(len(self.units) - done)])
        refuted = self.capital(sums, self.allowed + 1, "less") >= self.threshold
        last = self.census + int(np.argmax(refuted)) if refuted.any() else len(self.units) - 1
        return sum(len(unit) for unit in self.units[: last + 1])

    def add(self, failures: Mapping[int, bool]) -> None:
        """Take the tuned model's failures on what `upcoming` named (prompt's index -> failed). Raises ValueError for other prompts."""
        left = dict(failures)
        while left:
            unit = self.units[len(self.sums)] if len(self.sums) < len(self.units) else []
            if not unit or any(i not in left for i in unit):
                raise ValueError(f"prompts {sorted(left)[:5]} are not the next ones to ask; add what `upcoming` names")
            self.sums.append(sum(int(left.pop(i)) - self.before[i] for i in unit))

    def rejected(self, total: int, side: Literal["more", "less"]) -> bool:
        """Whether "the suite's sum of x is at most `total`" (side more) or "at least" (less) was refuted at any draw so far."""
        found = self.capital(self.sums, total, side)
        return bool(found.size) and float(found.max()) >= self.threshold

    def capital(self, sums: Sequence[float] | np.ndarray, total: int, side: Literal["more", "less"]) -> np.ndarray:
        """`log_capital` of the draws in random order: what was asked before them is a number, and no draw."""
        first = self.census
        return log_capital(sums[first:], self.low[first:], self.high[first:], total - sum(sums[:first]), side)

    @property
    def threshold(self) -> float:
        """Log capital at which a claim is refuted: one over the level of a side."""
        return math.log(2 / (1 - self.confidence))

    @property
    def verdict(self) -> Verdict:
        """Of the suite itself: feasible where "D > limit" is refuted, infeasible where "D <= limit" is, undecided before that; exact at the end."""
        if len(self.sums) == len(self.units):
            return "feasible" if sum(self.sums) <= self.allowed else "infeasible"
        over, within = self.rejected(self.allowed, "more"), self.rejected(self.allowed + 1, "less")
        if over == within:  # both at once happens only where one of them is an error
            return "undecided"
        lower, upper = self._refuted_up_to()
        if lower > upper:  # the same, seen at other totals
            return "undecided"
        return "infeasible" if over else "feasible"

    @property
    def done(self) -> bool:
        """Whether asking may end: the limit is decided (for `feasible`: early enough to be worth it), or nothing is left."""
        left = 1 - len(self.asked) / self.size
        verdict = self.verdict
        return left <= 0 or verdict == "infeasible" or (verdict == "feasible" and left >= LEAST_SAVED)

    def interval(self) -> tuple[float, float]:
        """Confidence interval of D from all draws so far; (D, D) at the end of the suite."""
        if len(self.sums) == len(self.units):
            return sum(self.sums) / self.size, sum(self.sums) / self.size
        lower, upper = self._refuted_up_to()
        if lower > upper:  # an error has happened for certain; nothing is claimed
            lower, upper = int(self.low.sum()), int(self.high.sum())
        return lower / self.size, upper / self.size

    def _refuted_up_to(self) -> tuple[int, int]:
        """The smallest and the largest sum of x that were never refuted; the first above the second where every one was, which is an error."""
        least, most = int(self.low.sum()), int(self.high.sum())
        lower = _first(least, most, lambda s: not self.rejected(s, "more"))
        return lower, -_first(-most, -least, lambda s: not self.rejected(-s, "less"))

    def record(self) -> Screening:
        """What is kept of it. Raises ValueError where nothing was asked."""
        asked = self.asked
        if not asked:
            raise ValueError("nothing was asked yet, so there is nothing to record")
        lower, upper = self.interval()
        verdict = self.verdict
        if verdict == "feasible":  # k / N may be a rounding above the limit that it is equal to
            lower, upper = min(lower, self.limit), min(upper, self.limit)
        known = sum(len(unit) for unit in self.units[: self.census])
        drawn = len(asked) - known  # a sample of what is not known; the rest of it is taken to be alike
        rest = sum(self.sums[self.census :]) / drawn * (self.size - known) if drawn > 0 else 0.0
        value = min(max((sum(self.sums[: self.census]) + rest) / self.size, lower), upper)
        return Screening(
            verdict=verdict, value=value, lower=lower, upper=upper, asked=len(asked), of=self.size, limit=self.limit,
            confidence=self.confidence, by="request" if self.grouped else "prompt", units=len(self.sums),
        )  # fmt: skip


def _units(before: Sequence[int], groups: Sequence[str] | None, seed: int | str) -> tuple[list[list[int]], int]:
    """(prompts to be drawn together, in the order of asking; how many of these come first for having failed before)."""
    found: dict[object, list[int]] = {}
    for i in range(len(before)):
        found.setdefault(i if groups is None else groups[i], []).append(i)
    units = list(found.values())
    random.Random(f"sequential {seed}").shuffle(units)
    failed = [unit for unit in units if any(before[i] for i in unit)]
    prompts, known = sum(map(len, failed)), sum(before)
    if not failed or prompts > CENSUS * len(before) or 2 * known <= prompts or len(failed) == len(units):
        return units, 0
    return failed + [unit for unit in units if not any(before[i] for i in unit)], len(failed)


def _first(start: int, end: int, holds) -> int:
    """The smallest whole number in start..end that holds, where all above it do too; end + 1 where none does."""
    end += 1
    while start < end:
        middle = (start + end) // 2
        if holds(middle):
            end = middle
        else:
            start = middle + 1
    return start


def least_share(before: Sequence[bool], groups: Sequence[str] | None, limit: float, confidence: float) -> float:
    """Share of the suite after which `feasible` can be known at the earliest: nothing changed at all; 0..1."""
    sequence = SequentialTest(before, groups, limit=limit, confidence=confidence, seed=0)
    return sequence.earliest() / sequence.size


def floor(before: Sequence[bool], groups: Sequence[str] | None, limit: float, confidence: float) -> float:
    """Share of the units that any valid method must draw, whatever it computes, before it may say `feasible` where nothing changed; 0..1.

    A rise just over the limit may fill k units wholly and leave the others as they were. Who stops after n of K units without having met
    one says `feasible` of such a suite with the probability C(K - k, n) / C(K, n) of meeting none, which must not exceed the level.
    """
    test = SequentialTest(before, groups, limit=limit, confidence=confidence, seed=0)
    units, bad = len(test.units), fewest(test.high, test.allowed + 1)
    missed = np.concatenate([[0.0], np.cumsum([math.log(max(units - bad - n, 0) / (units - n) or 1e-300) for n in range(units)])])
    return int(np.argmax(missed <= -test.threshold)) / units
