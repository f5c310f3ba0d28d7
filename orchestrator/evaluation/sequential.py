"""Sequential verdicts: ask a suite in random order and stop as soon as it is known whether the limit is kept.

**What is decided.** The suite's own degradation D = mean of x over its N prompts, x = tuned failure - untouched failure in {-1, 0, +1}. The
suite is finite, its prompts are drawn without replacement, and the only randomness used is the order of asking, which is ours: no
assumption about prompts is made, also not that they are independent. When every prompt was asked D is known exactly.
The verdict of a *full* suite (`orchestrator.constraint`) says more: it takes the prompts, by topic, for a sample of all such prompts
and may stay undecided where D itself is known. So a suite that is asked to its end is judged there, and one that was stopped early is a
screening: its `infeasible` stands (D over the limit is never feasible there either), its `feasible` must be confirmed on the full suite.

**How.** Two bettors, one against "D <= limit" and one against "D > limit" (`evaluation.betting`); whose capital reaches 1/alpha has refuted
that claim, however often one looks.

**Groups.** Whole groups (topics) in random order; a draw is a group's sum of x, bounded by its size. A rise over the limit needs a certain
number of groups that got worse at all, so a bettor also plays on how many did (`TOUCHED`); where changes fill whole groups that is sharper.
With few groups little can be decided early: a rise of 0.05 fits into 2.5 of 50 topics and whoever has not asked most of them cannot exclude
it (`floor`, for any method; `least_share`, for this one).

**What is asked first.** Where few prompts failed before (`CENSUS`) those are asked first, all of them: only they can get better, so
their sum, which would otherwise hide as much rise elsewhere, is then known, and the random order begins after them. Looks are laid where
`feasible` could next be known (`batch`).

The level is that of `safety.limits.confidence`, two-sided as everywhere: each wrong verdict has probability at most (1 - confidence) / 2.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from orchestrator.config import Experiment
from orchestrator.errors import DataError
from orchestrator.evaluation.betting import ROUNDING, fewest, log_capital
from orchestrator.records import Screening, SuiteResult, TrialResult

if TYPE_CHECKING:
    from orchestrator.evaluation.suites import PromptSuite

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
            confidence=self.confidence, by="group" if self.grouped else "prompt", units=len(self.sums),
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


def untouched(experiment: Experiment, baseline: TrialResult) -> dict[str, str]:
    """What a trial must know of the untouched model to be asked in sequence (`TrialSpec.untouched`); empty where that is switched off."""
    if not experiment.safety.sequential.enabled:
        return {}
    found = {name: suite for name, suite in baseline.suites.items() if suite.constrains and _limit(experiment, suite.kind) is not None}
    return {name: "".join("01"[failed] for failed in suite.certain) for name, suite in found.items()}


def _limit(experiment: Experiment, kind: str) -> float | None:
    """The limit that a suite of this kind is held to, None for none."""
    limits = experiment.safety.limits
    return {"harmful": limits.max_degradation, "benign": limits.max_over_refusal_rise}.get(kind)


def tests_of(experiment: Experiment, suites: Iterable[PromptSuite], failures: Mapping[str, str], seed: str) -> dict[str, SequentialTest]:
    """A sequential test for each suite that `failures` (as from `untouched`) names.

    `seed` is to differ between trials: a search that met one order again and again would learn to be good at its beginning, and the
    order must know nothing of the model. Raises DataError where a suite has other prompts than the untouched model was asked.
    """
    found = {}
    for suite in suites:
        if suite.name not in failures:
            continue
        if len(failures[suite.name]) != len(suite.prompts):
            raise DataError(
                f"safety.suites.{suite.name}: the untouched model was asked {len(failures[suite.name])} prompts and there are "
                f"{len(suite.prompts)} now; the data changed during the run, so start it again"
            )
        found[suite.name] = SequentialTest(
            [bit == "1" for bit in failures[suite.name]],
            suite.groups if experiment.safety.sequential.by == "group" else None,
            limit=_limit(experiment, suite.kind), confidence=experiment.safety.limits.confidence, seed=f"{seed} {suite.name}",
        )  # fmt: skip
    return found


def ask(
    suite: PromptSuite, test: SequentialTest, least: int, part: Callable[[PromptSuite], tuple[SuiteResult, list[dict[str, Any]]]]
) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Ask `suite` part by part until `test` is done: (result of the prompts asked, in the suite's order, with its screening; their rows).

    `part` asks a suite in full; about `least` prompts go between two looks. With several workers all of them take the same decisions.
    """
    asked: list[int] = []
    results, rows = [], []
    while not test.done:
        indices = sorted(test.upcoming(test.batch(least)))
        result, texts = part(suite.subset(indices))
        test.add(dict(zip(indices, result.failures, strict=True)))
        asked += indices
        results.append(result)
        rows += texts
    order = sorted(range(len(asked)), key=asked.__getitem__)
    return _joined(results, order, test.record()), [rows[i] for i in order] if rows else []


def _joined(parts: list[SuiteResult], order: list[int], screening: Screening) -> SuiteResult:
    """One result of several parts: lists one after the other and then in `order`, counts added up, the rest as in the first part."""
    values: dict[str, Any] = {"screening": screening}
    for field in dataclasses.fields(SuiteResult):
        found = [getattr(part, field.name) for part in parts]
        if isinstance(found[0], list):
            whole = [item for one in found for item in one]
            values[field.name] = [whole[i] for i in order]
        elif isinstance(found[0], int) and not isinstance(found[0], bool):
            values[field.name] = sum(found)
    return dataclasses.replace(parts[0], **values)


def late_suites(experiment: Experiment, suites: Iterable[PromptSuite]) -> list[str]:
    """Warnings about suites that can hardly be stopped early as feasible, with the remedy; none where nothing is asked in sequence."""
    warnings = []
    for suite in suites if experiment.safety.sequential.enabled else ():
        limit, by_group = _limit(experiment, suite.kind), experiment.safety.sequential.by == "group"
        if not suite.constrains or limit is None:
            continue
        groups = suite.groups if by_group else None
        share = least_share([False] * len(suite.prompts), groups, limit, experiment.safety.limits.confidence)
        if share > 1 - LEAST_SAVED:
            what = f"{len(set(groups))} groups" if groups else f"{len(suite.prompts)} prompts"
            remedy = "; safety.sequential.by=prompt needs fewer" if groups else ""
            warnings.append(
                f"suite {suite.name}: with {what} and a limit of {limit:g} no trial can be known to be feasible before {share:.0%} of it "
                f"are asked, so only infeasible ones are stopped early{remedy}"
            )
    return warnings
