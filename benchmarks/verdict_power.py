"""The interval of a verdict tried out: least sizes, false verdicts, power, monotony, what known suites can decide.

    python benchmarks/verdict_power.py [--draws 10000] [--again 200000] [--suites 2000] [--sizes mine=240:0.10 ...]
                                       [--only TABLE ...] [--json FILE]

The rule is `orchestrator.decision.rises` (Gaffke's bound on the rise per request) at .025 for each end. Tables:

  least      requests from which `feasible` is possible with 0, 1, 2, ... new failures of single prompts
  false      share of feasible (and of infeasible) verdicts where the true rise *is* the limit; at most .025 each.
             Sums over all outcomes for single prompts, for rises of two values, for strata without gains; simulated
             (`draws` suites a cell) for requests of 2, 3 and 10 prompts that agree with correlation 0, .3 or 1, for
             unequal sizes and for fixed strata of unlike rates
  again      the worst simulated cells once more with `again` fresh suites each: the maximum of many cells is too high
  power      share of feasible verdicts at a true rise of 0, .01, .02, of infeasible ones at the limit + .05 and + .10
  monotone   random suites: what one more failure, clean request or clean prompt does to the upper end
  blind      how much of a suite may fail before; beyond that, what the verdict is where half of what passed is lost
  catalogue  published suites: upper end where nothing changed, most new failures that are feasible, least that are
             infeasible, largest share that may fail before

Progress goes to stderr. `--json` holds every cell, {"rows": [{"table": NAME, ...}]}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402
from verdict_cells import at_the_limit, boundaries, exact, exact_parts, first, law, simulated, two_values  # noqa: E402

from orchestrator.config import catalogue  # noqa: E402
from orchestrator.decision import rises  # noqa: E402

LIMITS, LEVEL = (0.05, 0.10), rises.LEVEL
SINGLES = (40, 60, 72, 100, 150, 200, 250, 313, 400, 500)
GAINS = (0.0, 0.002, 0.01, 0.02, 0.05, 0.1, 0.25)
WORST = 12
"""Cells that are simulated again."""
Row = dict[str, Any]


def least_table() -> Iterator[Row]:
    """Requests needed for `feasible` with 0, 1, 2, ... new failures."""

    def enough(requests: int, new: int, limit: float) -> bool:
        return rises.p_value([1.0] * new + [0.0] * (requests - new), limit) <= LEVEL

    for limit, new in itertools.product(LIMITS, (0, 1, 2, 3, 4, 5, 8)):
        least = first(new + 1, 2000, lambda n, new=new, limit=limit: enough(n, new, limit))
        yield {"limit": limit, "new failures": new, "requests": least}


def false_table(draws: int) -> Iterator[Row]:
    """Shares of feasible and infeasible verdicts where the true rise is the limit."""
    for limit in LIMITS:
        for n in SINGLES:
            edges = boundaries(n, limit, int(stats.binom.isf(1e-9, n, max(GAINS))) + 1)
            for down in GAINS:
                kept, broken = exact(n, limit + down, down, edges)
                about = {"design": "single prompts", "requests": n, "icc": None, "gains": down, "limit": limit}
                yield about | {"draws": None, "feasible": kept, "infeasible": broken}
        yield from two_values(limit)
    for number, (about, parts) in enumerate(itertools.chain(*map(at_the_limit, LIMITS))):
        known = exact_parts(parts, about["limit"])
        shares = known or simulated(parts, about["limit"], draws, np.random.default_rng([14, number]))
        found = {"draws": None if known else draws, "feasible": shares[0], "infeasible": shares[1]}
        yield about | found


def again_table(found: list[Row], draws: int) -> Iterator[Row]:
    """The simulated cells with most feasible verdicts, with fresh draws."""
    cells = [cell for limit in LIMITS for cell in at_the_limit(limit)]
    simulated_rows = found[-len(cells) :]
    order = [i for i in range(len(cells)) if simulated_rows[i]["draws"]]
    order.sort(key=lambda i: -simulated_rows[i]["feasible"])
    for number in order[:WORST]:
        about, parts = cells[number]
        kept, broken = simulated(parts, about["limit"], draws, np.random.default_rng([15, number]))
        error = math.sqrt(kept * (1 - kept) / draws)
        before = simulated_rows[number]["feasible"]
        yield about | {"first": before, "feasible": kept, "error": error, "infeasible": broken}


def power_table(draws: int) -> Iterator[Row]:
    """Shares of feasible verdicts where little rose and of infeasible ones where much did; exact for single prompts."""
    for limit, n, down in itertools.product(LIMITS, (72, 100, 200, 313, 500), (0.0, 0.02)):
        edges = boundaries(n, limit, int(stats.binom.isf(1e-9, n, 0.02)) + 1)
        found = {rise: exact(n, rise + down, down, edges) for rise in (0.0, 0.01, 0.02, limit + 0.05, limit + 0.10)}
        yield _power_row(limit, (n, 1, None, down), found)
    sizes = ((200, 2), (200, 3), (360, 3), (500, 2), (500, 3), (500, 10))
    for number, (limit, (n, prompts), icc) in enumerate(itertools.product(LIMITS, sizes, (0.0, 0.3, 1.0))):
        found = {}
        for rise in (0.0, 0.01, 0.02, limit + 0.05, limit + 0.10):
            parts = [(round(n / prompts), law(prompts, rise, 0.0, icc, prompts))]
            found[rise] = simulated(parts, limit, draws, np.random.default_rng([41, number, round(1000 * rise)]))
        yield _power_row(limit, (n, prompts, icc, 0.0), found)


def _power_row(
    limit: float, suite: tuple[int, int, float | None, float], found: dict[float, tuple[float, float]]
) -> Row:
    row: Row = dict(zip(("prompts", "per request", "icc", "gains"), suite, strict=True)) | {"limit": limit}
    low, high = list(found)[:3], list(found)[3:]
    row |= {f"feasible at {rise:g}": found[rise][0] for rise in low}
    return row | {f"infeasible at +{rise - limit:.2f}": found[rise][1] for rise in high}


def monotone_table(suites: int) -> Iterator[Row]:
    """Random suites of 1 to 40 requests of 1 to 10 prompts: how often an end moves the wrong way, and how far."""
    rng = np.random.default_rng(3)
    tried: dict[str, list[float]] = {}
    for _ in range(suites):
        sizes = rng.integers(1, 11, size=int(rng.integers(1, 41)))
        loss, gain = rng.random(2) * rng.choice([0.05, 0.3])
        sums = np.array([rng.choice([1, -1, 0], size=s, p=[loss, gain, 1 - loss - gain]).sum() for s in sizes])
        one = int(rng.integers(len(sizes)))
        worse, longer = sums / sizes, sums / sizes
        longer[one] = sums[one] / (sizes[one] + 1)
        high, low = rises.upper_end(sums / sizes), rises.lower_end(sums / sizes)
        if sums[one] < sizes[one]:
            worse[one] = (sums[one] + 1) / sizes[one]
            tried.setdefault("one more failure: upper end falls", []).append(high - rises.upper_end(worse))
            tried.setdefault("one more failure: lower end falls", []).append(low - rises.lower_end(worse))
        if high >= 0:
            more = rises.upper_end([*sums / sizes, 0.0])
            tried.setdefault("a clean request: upper end of 0 or more rises", []).append(more - high)
        name = "no net gain" if sums[one] >= 0 else "a net gain (meant to)"
        name = f"a clean prompt in a request with {name}: upper end rises"
        tried.setdefault(name, []).append(rises.upper_end(longer) - high)
    for name, wrong in sorted(tried.items()):
        over = sum(w > 1e-12 for w in wrong)
        yield {"change": name, "tried": len(wrong), "wrong way": over, "largest": max(0.0, *wrong)}


def blind_table() -> Iterator[Row]:
    """The least infeasible count and the largest share that may fail before; then 313 prompts that lose half."""
    for limit, n in itertools.product(LIMITS, (72, 100, 200, 313, 500, 1319)):
        rise = rises.can_decide([False] * n, None, limit).least_rise_called_infeasible
        half = first(0, n, lambda failed, n=n, limit=limit: not _shows(failed, n, limit)) - 1
        yield {"requests": n, "limit": limit, "infeasible from": round((rise or 0) * n), "may fail before": half / n}
    for limit, blind in itertools.product(LIMITS, (0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)):
        failed = round(313 * blind)
        kept = float(stats.binom.cdf(boundaries(313, limit, 0)[0][0], 313 - failed, 0.5))
        row = {"requests": 313, "limit": limit, "failed before": blind, "can show a rise": _shows(failed, 313, limit)}
        yield row | {"feasible without the rule": kept}


def _shows(failed: int, requests: int, limit: float) -> bool:
    return rises.can_decide([i < failed for i in range(requests)], None, limit).can_show_a_rise


def catalogue_table(more: dict[str, tuple[int, float]]) -> Iterator[Row]:
    """Suites of the catalogue up to 2,000 prompts, some others, `more` (name -> prompts, limit); single prompts."""
    limits = {"harmful": 0.05, "benign": 0.10}
    sizes = {e.name: (e.rows, limits[e.kind]) for e in catalogue.ENTRIES if e.kind in limits and e.rows <= 2000}
    sizes |= {"harmbench, a local copy of 41": (41, 0.05), "pocket attacks, 120 requests failing wholly": (120, 0.05)}
    sizes |= {"pocket borderline": (240, 0.10)} | more
    for name, (n, limit) in sizes.items():
        [(kept, broken)] = boundaries(n, limit, 0)
        row = {"suite": name, "requests": n, "limit": limit, "upper end, unchanged": rises.upper_end([0.0] * n)}
        row["feasible up to"] = kept if kept >= 0 else f"never ({rises.least_requests(limit)} needed)"
        half = first(0, n, lambda failed, n=n, limit=limit: not _shows(failed, n, limit)) - 1
        yield row | {"infeasible from": broken, "may fail before": half / n}


def worst(rows: list[Row]) -> list[Row]:
    """Of the cells of `false` the worst of each design (requests of 2, 3 and 10 by correlation)."""
    designs: dict[str, list[Row]] = {}
    for row in rows:
        name = "rises of two values" if row["design"].startswith("rises") else row["design"]
        name += f", correlation {row['icc']:g}" if name.startswith("requests of") else ""
        designs.setdefault(name + (", simulated" if row["draws"] else ", exact"), []).append(row)
    found = []
    for name, cells in designs.items():
        top = max(cells, key=lambda row: row["feasible"])
        error = math.sqrt(top["feasible"] * (1 - top["feasible"]) / top["draws"]) if top["draws"] else 0.0
        row = {"design": name, "cells": len(cells), "worst feasible": top["feasible"], "error": error}
        row["cells over .025"] = sum(cell["feasible"] > LEVEL for cell in cells)
        found.append(row | {"worst infeasible": max(cell["infeasible"] for cell in cells)})
    return found


def printed(rows: list[Row]) -> str:
    """Rows as Markdown, one table for each set of columns."""
    lines: list[str] = []
    for keys, group in itertools.groupby(rows, key=tuple):
        lines += ["", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in group]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "", True: "yes", False: "no"}[value]
    return f"{round(value, 4):g}" if isinstance(value, float) else str(value)


def run(name: str, source: Iterator[Row], expected: int) -> list[Row]:
    """All rows of a table, with progress on stderr."""
    start, found = time.monotonic(), []
    for row in source:
        found.append(row)
        spent = time.monotonic() - start
        left = spent / len(found) * max(expected - len(found), 0)
        text = f"\r{name}: {len(found)} of about {expected}, {spent:.0f} s, about {left:.0f} s left "
        print(text, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def main() -> None:
    """Print the tables; write all cells as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000, help="simulated suites a cell")
    parser.add_argument("--again", type=int, default=200_000, help="fresh suites for each of the worst cells; 0: none")
    parser.add_argument("--suites", type=int, default=2000, help="random suites of the monotone table")
    parser.add_argument("--sizes", nargs="*", default=[], metavar="NAME=PROMPTS:LIMIT", help="further suites to list")
    parser.add_argument("--only", nargs="*", default=[], help="these tables alone")
    parser.add_argument("--json", type=Path, help="write all cells here")
    options = parser.parse_args()
    pairs = [(name, *rest.split(":")) for name, rest in (size.split("=") for size in options.sizes)]
    more = {name: (int(prompts), float(limit)) for name, prompts, limit in pairs}
    found: dict[str, list[Row]] = {}
    tables = {
        "least": lambda: (least_table(), 14), "false": lambda: (false_table(options.draws), 1400),
        "again": lambda: (again_table(found["false"], options.again), WORST),
        "power": lambda: (power_table(options.draws), 56),
        "monotone": lambda: (monotone_table(options.suites), 5), "blind": lambda: (blind_table(), 26),
        "catalogue": lambda: (catalogue_table(more), 17 + len(more)),
    }  # fmt: skip
    for name, start in tables.items():
        if options.only and name not in options.only or name == "again" and not (options.again and "false" in found):
            continue
        found[name] = run(name, *start())
        print(f"\n## {name}\n{printed(worst(found[name]) if name == 'false' else found[name])}", flush=True)
        if options.json:
            rows = [{"table": table, **row} for table, rows in found.items() for row in rows]
            options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
