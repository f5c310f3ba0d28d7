"""Sequential verdicts by simulation: how often they are wrong at any time, and how many prompts they take.

    python benchmarks/sequential.py [--repetitions 2000] [--picture docs/img/sequential.png] [--json FILE]

500 prompts, a limit of 0.05 on the rise of failures, 95 % two-sided confidence: a wrong verdict may have probability 0.025. Each row is one
suite with an exactly known degradation, asked again and again in fresh random orders. Suites: `independent` (no groups), `topics of 2`, `of 5`
and `of 10` (every change fills whole topics, the hardest case). 10 prompts fail before and are answered safely after ("2 % lost"),
unless said; gains make up the rest. Columns:

  wrong     share of orders in which the wrong verdict is reached at any draw (each draw a look); at most 0.025
  missed    share in which the confidence interval misses the true value at any draw; at most 0.05
  early     share stopped before the end, at the product's own looks (about every 32 prompts) and by its rule; used: mean share of
            prompts asked; 90 %: share enough for nine orders in ten
  floor     share of the suite that any valid method must ask where nothing at all changed: a rise just over the limit may fill a few
            topics and leave the others alone, and who stops without having met one of them must not have missed them too often
  fixed     the fixed-size test (the paired interval of a full suite) on 200 prompts drawn once: wrong, and undecided
  peeking   the same test repeated at every look until it decides: wrong (only near the limit, where it errs most)
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402

from orchestrator.decision import (  # noqa: E402
    intervals,
    limits,
    sequential,  # noqa: E402
)

PROMPTS, LIMIT, CONFIDENCE, BATCH, FIXED, CHURN = 500, 0.05, 0.95, 32, 200, 0.02
GRID = (0.0, 0.02, 0.04, 0.05, 0.052, 0.06, 0.08, 0.1, 0.2, 0.3)
"""0.05 is the largest degradation that keeps the limit, 0.052 (one prompt more) the smallest that does not."""
BAR = 0.4


@dataclass(frozen=True)
class Design:
    """A suite and how it is asked."""

    topic: int
    """Prompts of a topic; 1: no topics."""
    by_group: bool
    churn: float = CHURN
    """Share of prompts that fail before and not after."""

    @property
    def name(self) -> str:
        suite = "independent" if self.topic == 1 else f"topics of {self.topic}"
        return f"{suite}, {'by topic' if self.by_group else 'by prompt'}" + ("" if self.churn else ", nothing lost")


DESIGNS = (
    Design(1, False), Design(1, False, 0.0), Design(2, True), Design(2, True, 0.0), Design(5, True), Design(5, True, 0.0), Design(10, True),
    Design(10, True, 0.0),
)  # fmt: skip
"""Topics asked by prompt are no design of their own: a random order of prompts knows no topics, so the figures are those of `independent`."""


@dataclass
class Cell:
    """One row of the table."""

    design: str
    degradation: float
    wrong: float
    missed: float
    early: float
    used: float
    used_90: float
    fixed_wrong: float
    fixed_undecided: float
    peeking_wrong: float | None
    floor: float | None
    """Only for a degradation of 0."""
    repetitions: int


def suite(design: Design, degradation: float) -> tuple[list[bool], list[bool], list[str]]:
    """(failures before, after, topics) with exactly this degradation; changes stand side by side, so that they fill whole topics."""
    lost = round(design.churn * PROMPTS)
    gained = round(degradation * PROMPTS) + lost
    before = [i < lost for i in range(PROMPTS)]
    after = [lost <= i < lost + gained for i in range(PROMPTS)]
    return before, after, [str(i // design.topic) for i in range(PROMPTS)]


def cell(design: Design, degradation: float, repetitions: int, seed: int = 0) -> Cell:
    """Ask one suite in `repetitions` random orders."""
    before, after, topics = suite(design, degradation)
    test = sequential.SequentialTest(before, topics if design.by_group else None, limit=LIMIT, confidence=CONFIDENCE, seed=0)
    units = [Unit(len(unit), sum(after[i] > before[i] for i in unit), sum(after[i] < before[i] for i in unit)) for unit in test.units]
    total = sum(unit.sum for unit in units)
    wrong = "infeasible" if total <= test.allowed else "feasible"
    peek = abs(degradation - LIMIT) < 0.005
    counts = {name: 0 for name in ("wrong", "missed", "early", "fixed_wrong", "fixed_undecided", "peeking_wrong")}
    used, rng = [], np.random.default_rng(seed)
    for _ in range(repetitions):
        shuffled = np.concatenate([np.arange(test.census), test.census + rng.permutation(len(units) - test.census)]).astype(int)
        sums = [units[i].sum for i in shuffled]
        sequence = copy.copy(test)
        sequence.units, sequence.low, sequence.high = [test.units[i] for i in shuffled], test.low[shuffled], test.high[shuffled]
        over, within, missed = _crossings(sequence, sums, total)
        counts["wrong"] += (over if wrong == "infeasible" else within) < len(units) - 1  # at the last draw everything is known
        counts["missed"] += missed < len(units)
        share = _stopped(sequence, sums, over, within)
        counts["early"] += share < 1
        used.append(share)
        drawn = [units[i] for i in rng.permutation(len(units))]
        asked = np.cumsum([unit.size for unit in drawn])
        verdict = _fixed(drawn[: np.searchsorted(asked, FIXED) + 1], design.by_group)
        counts["fixed_undecided"] += verdict == "undecided"
        counts["fixed_wrong"] += verdict == wrong
        if peek:
            verdicts = (_fixed(drawn[: look + 1], design.by_group) for look in _looks(asked)[:-1])
            counts["peeking_wrong"] += next((v for v in verdicts if v != "undecided"), "undecided") == wrong
    shares = {name: int(count) / repetitions for name, count in counts.items()}
    shares["peeking_wrong"] = shares["peeking_wrong"] if peek else None
    shares["floor"] = None if degradation else sequential.floor([False] * PROMPTS, topics if design.by_group else None, LIMIT, CONFIDENCE)
    return Cell(design.name, degradation, used=float(np.mean(used)), used_90=float(np.quantile(used, 0.9)), repetitions=repetitions, **shares)


class Unit(NamedTuple):
    """What is drawn at once, a prompt or a topic: prompts, how many got worse, how many better."""

    size: int
    gained: int
    lost: int

    @property
    def sum(self) -> int:
        return self.gained - self.lost


def _crossings(test: sequential.SequentialTest, sums: list[int], total: int) -> tuple[int, int, int]:
    """First draws at which "the limit is kept", "it is not kept" and the true sum itself are refuted; the number of units for never."""
    found = {}
    for claim in ((test.allowed, "more"), (test.allowed + 1, "less"), (total, "more"), (total, "less")):
        if claim not in found:
            crossed = test.capital(sums, *claim) >= test.threshold
            found[claim] = test.census + int(np.argmax(crossed)) if crossed.any() else len(sums)
    return found[test.allowed, "more"], found[test.allowed + 1, "less"], min(found[total, "more"], found[total, "less"])


def _looks(asked: np.ndarray) -> list[int]:
    """Draws after which the fixed-size test looks again: whole units of at least BATCH prompts since the last look."""
    looks, before = [], 0
    for draw, count in enumerate(asked):
        if count - before >= BATCH or draw == len(asked) - 1:
            looks.append(draw)
            before = count
    return looks


def _stopped(test: sequential.SequentialTest, sums: list[int], over: int, within: int) -> float:
    """Share of the suite asked under the product's rule (`SequentialTest.done`) at the product's looks."""
    count, asked = 0, 0
    while count < len(sums):
        more = test.upcoming(test.batch(BATCH))
        asked += len(more)
        while more:
            more = more[len(test.units[count]) :]
            count += 1
        test.sums = sums[:count]
        if (over < count) != (within < count) and (over < count or 1 - asked / PROMPTS >= sequential.LEAST_SAVED):
            return asked / PROMPTS
    return 1.0


def _fixed(drawn: list[Unit], by_group: bool) -> str:
    """Verdict of the fixed-size test on the prompts of these units."""
    if by_group:
        return _tango(tuple(sorted(drawn)))
    return _tango((Unit(len(drawn), sum(unit.gained for unit in drawn), sum(unit.lost for unit in drawn)),))


@functools.cache
def _tango(topics: tuple[Unit, ...]) -> str:
    """It depends on how many prompts of each topic changed, not on which; one unit means prompts without topics."""
    before = [flag for t in topics for flag in [True] * t.lost + [False] * (t.size - t.lost)]
    after = [flag for t in topics for flag in [False] * t.lost + [True] * t.gained + [False] * (t.size - t.lost - t.gained)]
    groups = [str(i) for i, t in enumerate(topics) for _ in range(t.size)] if len(topics) > 1 else None
    return limits.verdict_of(intervals.paired_difference(before, after, groups, CONFIDENCE), LIMIT)


def show(cells: list[Cell]) -> None:
    """The table and what is to be read from it."""
    line = "{:34} {:>6} {:>7} {:>7} {:>6} {:>6} {:>6} {:>13} {:>8}"
    print(line.format("suite, drawn", "D", "wrong", "missed", "early", "used", "90 %", "fixed w / und", "peeking"))
    for c in cells:
        peeking = "" if c.peeking_wrong is None else f"{c.peeking_wrong:.4f}"
        print(line.format(
            c.design, f"{c.degradation:.3f}", f"{c.wrong:.4f}", f"{c.missed:.4f}", f"{c.early:.2f}", f"{c.used:.3f}", f"{c.used_90:.3f}",
            f"{c.fixed_wrong:.4f} / {c.fixed_undecided:.2f}", peeking,
        ))  # fmt: skip
    level = (1 - CONFIDENCE) / 2
    noise = 3 * (level * (1 - level) / cells[0].repetitions) ** 0.5
    worst, missed = max(c.wrong for c in cells), max(c.missed for c in cells)
    print(f"\nlargest share of wrong verdicts {worst:.4f} (level {level:.3f}, three standard errors {noise:.4f}); of missed values {missed:.4f}")
    for c in cells:
        if c.degradation in (0.0, 0.3):
            least = "" if c.floor is None else f"; no method below {c.floor:.1%}, the bar {'cannot' if c.floor > BAR else 'could'} be held"
            held = "held" if c.used <= BAR else "MISSED"
            print(f"clear case {c.degradation:g}, {c.design}: {c.used:.1%} of the prompts, bar {BAR:.0%} {held}{least}")


def draw(cells: list[Cell], path: Path) -> None:
    """Share of prompts asked, and share of wrong verdicts, over the true degradation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for design in DESIGNS:
        own = [c for c in cells if c.design == design.name]
        for axis, values in ((left, [c.used for c in own]), (right, [c.wrong for c in own])):
            axis.plot([c.degradation for c in own], values, marker="o", markersize=3.5, linewidth=1.3, label=design.name)
    peeking = [c for c in cells if c.peeking_wrong is not None and c.design == DESIGNS[0].name]
    right.plot([c.degradation for c in peeking], [c.peeking_wrong for c in peeking], "kx", label="fixed-size test at every look, independent")
    left.axhline(BAR, color="#888888", linestyle=":", linewidth=1)
    right.axhline((1 - CONFIDENCE) / 2, color="#888888", linestyle=":", linewidth=1)
    for axis, label in ((left, "share of the suite asked"), (right, "wrong verdict at any draw")):
        axis.axvline(LIMIT, color="#bb3333", linestyle="--", linewidth=1)
        axis.set_xlabel(f"true degradation of the suite (limit {LIMIT:g} dashed)")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    right.legend(fontsize=7.5)
    figure.suptitle(f"Sequential verdicts: {PROMPTS} prompts, {cells[0].repetitions} random orders each", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--picture", type=Path, help="write the picture there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cells = []
    for design in DESIGNS:
        for degradation in GRID:
            cells.append(cell(design, degradation, arguments.repetitions))
            print(f"{len(cells)} of {len(DESIGNS) * len(GRID)}: {cells[-1]}", file=sys.stderr, flush=True)
    show(cells)
    if arguments.picture:
        draw(cells, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(c) for c in cells], indent=2) + "\n")


if __name__ == "__main__":
    main()
