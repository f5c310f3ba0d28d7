"""The best of K trials: what its score and its `feasible` are worth, on the rows of the search and on rows held out of it.

    python benchmarks/winners.py [--searches 1000] [--json FILE]

Simulated searches through the project's own judge and selection (`decision.limits.judge`, `decision.selection.best`); truth is known.

  score   K configurations of one true score (or scattered ones), rows that all trials find hard alike (correlation `rows`), a training
          seed of its own. For the score reported: bias, how often its 95 % interval holds the truth, its width. Reported on the rows the
          winner was chosen by; and on as many rows that waited, of the model trained again on a further seed.
  safety  K configurations that all stand exactly at the limit: a `feasible` is false. How often a search ends with a model handed over
          as feasible: by the searched prompts alone, with a further seed on the same prompts, and with prompts that waited.
          `luck`: new failures are drawn anew by every training; `own`: a configuration fails on prompts of its own whatever the seed, which
          further seeds on the same prompts cannot tell. `finalists`: models that may be held against the prompts that waited.

Bars: coverage at least .93 on rows that waited; false feasible at most .03 after prompts that waited. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

from orchestrator.config import Limits  # noqa: E402
from orchestrator.decision import intervals, limits, selection  # noqa: E402
from orchestrator.records import SuiteResult, TaskResult, TrialResult  # noqa: E402

LIMIT, TRUE_SCORE = 0.05, 0.7
Row = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """A world of task scores."""

    trials: int
    rows: int
    hard: float
    """Correlation between trials of whether a row is right (on the latent scale)."""
    spread: float = 0.0
    """Standard deviation of configurations' true scores."""
    seeds: float = 0.0
    """Standard deviation of a training seed's."""


@dataclass(frozen=True)
class Limited:
    """A world of configurations at the limit."""

    trials: int
    prompts: int
    finalists: int
    own: bool
    """Whether a configuration fails on prompts of its own, whatever the seed."""


def answers(rng: np.random.Generator, scores: np.ndarray, rows: int, hard: float) -> np.ndarray:
    """(trials, rows) of right answers with these true shares (trials,), rows that are hard alike for all."""
    common = rng.standard_normal(rows) * np.sqrt(hard)
    own = rng.standard_normal((len(scores), rows)) * np.sqrt(1 - hard)
    return (common + own) < stats.norm.ppf(np.clip(scores, 1e-6, 1 - 1e-6))[:, None]


def score_search(world: Scores, rng: np.random.Generator) -> dict[str, tuple[float, bool, float]]:
    """One search: (error, whether the interval holds the truth, width) by how the winner's score is reported."""
    true = TRUE_SCORE + world.spread * rng.standard_normal(world.trials)
    trained = true + world.seeds * rng.standard_normal(world.trials)
    seen = answers(rng, trained, world.rows, world.hard)
    winner = int(np.argmax(seen.mean(axis=1)))
    again = true[winner] + world.seeds * rng.standard_normal()
    waited = answers(rng, np.array([again]), world.rows, world.hard)[0]
    found = {}
    for how, right, truth in (("rows of the search", seen[winner], trained[winner]), ("rows that waited", waited, again)):
        estimate = intervals.mean([float(one) for one in right])
        found[how] = (estimate.value - truth, estimate.lower <= truth <= estimate.upper, estimate.upper - estimate.lower)
    return found


def score_table(searches: int) -> Iterator[Row]:
    worlds = [
        Scores(15, 200, 0.5), Scores(60, 200, 0.5), Scores(60, 200, 0.5, 0.03, 0.02), Scores(60, 200, 0.8, 0.03, 0.01), Scores(30, 40, 0.5),
    ]  # fmt: skip
    for number, world in enumerate(worlds):
        rng = np.random.default_rng([16, number])
        runs = [score_search(world, rng) for _ in range(searches)]
        for how in runs[0]:
            errors, held, widths = (np.array(part) for part in zip(*(run[how] for run in runs), strict=True))
            yield {
                "trials": world.trials, "rows": world.rows, "correlation": world.hard, "sd": world.spread, "seed sd": world.seeds, "reported on": how,
                "bias": float(errors.mean()), "coverage": float(held.mean()), "width": float(widths.mean()), "searches": searches,
            }  # fmt: skip


def suite(name: str, failed: np.ndarray, phase: str) -> SuiteResult:
    ids = [str(i) for i in range(len(failed))]
    return SuiteResult(name, "harmful", ids, None, [bool(one) for one in failed], [not one for one in failed], phase=phase)


def trial(name: str, phase: str, score: float, suites: dict[str, SuiteResult]) -> TrialResult:
    seed = 1 if phase == "confirm" else 0
    return TrialResult(name.partition("s")[0] + ("s1" if seed else ""), "full", {"x": name.partition("s")[0]}, seed, phase, "complete",
                       TaskResult("exact_match", score, [score], ["0"]), suites)  # fmt: skip


def safety_search(world: Limited, rng: np.random.Generator) -> dict[str, bool]:
    """One search of configurations at the limit: whether a model ends as feasible, by what it was held against."""
    settings = Limits(max_degradation=LIMIT, max_over_refusal_rise=None)
    clean = {"s": np.zeros(world.prompts, bool), "s-held_out": np.zeros(world.prompts, bool)}
    known = {name: suite(name, failed, "confirm" if "held" in name else "always") for name, failed in clean.items()}
    base = trial("baseline", "baseline", 0.5, known)
    without = trial("baseline", "baseline", 0.5, {"s": known["s"]})
    own = rng.random((world.trials, 2, world.prompts)) < LIMIT
    scores = rng.random(world.trials)

    def failures(k: int, part: int) -> np.ndarray:
        return own[k, part] if world.own else rng.random(world.prompts) < LIMIT

    searched = [trial(f"t{k:04d}", "search", scores[k], {"s": suite("s", failures(k, 0), "always")}) for k in range(world.trials)]
    rows = [(result, limits.judge(result, base, settings)) for result in searched]
    found = {"searched prompts": selection.best(rows).best is not None, "and a further seed": False, "and prompts that waited": False}
    for chosen in selection.finalists(rows, world.finalists):
        k = int(chosen.trials[0][0].trial_id[1:])
        asked = {"s": suite("s", failures(k, 0), "always"), "s-held_out": suite("s-held_out", failures(k, 1), "confirm")}
        again = trial(f"t{k:04d}s1", "confirm", scores[k], asked)
        first = (chosen.trials[0][0], chosen.trials[0][1])
        same = limits.judge(trial(f"t{k:04d}s1", "confirm", scores[k], {"s": asked["s"]}), without, settings)
        whole = limits.judge(again, base, settings, looks=world.finalists)
        found["and a further seed"] |= selection.best([first, (again, same)]).best is not None
        found["and prompts that waited"] |= selection.best([first, (again, whole)]).best is not None
    return found


def safety_table(searches: int) -> Iterator[Row]:
    worlds = [Limited(k, n, finalists, own) for own, (k, n), finalists in itertools.product(
        (False, True), ((15, 156), (15, 313), (60, 313)), (1, 2))]  # fmt: skip
    for number, world in enumerate(worlds):
        rng = np.random.default_rng([17, number])
        runs = [safety_search(world, rng) for _ in range(searches)]
        for how in runs[0]:
            count = sum(run[how] for run in runs)
            estimate = intervals.rate([True] * count + [False] * (searches - count))
            yield {
                "trials": world.trials, "prompts": world.prompts, "finalists": world.finalists, "new failures": "own" if world.own else "luck",
                "held against": how, "false feasible": estimate.value, "lower": estimate.lower, "upper": estimate.upper, "searches": searches,
            }  # fmt: skip


def printed(rows: list[Row]) -> str:
    """A Markdown table; figures with three digits."""
    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0]), *(" | ".join(map(cell, row.values())) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--searches", type=int, default=1000, help="simulated searches a row")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    found: dict[str, list[Row]] = {}
    for name, table in (("score", score_table), ("safety", safety_table)):
        found[name] = []
        for row in table(options.searches):
            found[name].append(row)
            print(f"\r{name}: {len(found[name])} rows", end="", file=sys.stderr, flush=True)
        print(f"\n## {name}\n{printed(found[name])}", flush=True)
    if options.json:
        rows = [{"table": name, **row} for name, part in found.items() for row in part]
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
