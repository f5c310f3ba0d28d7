"""Really trained configurations of the embedded world, as a table that samplers are measured on (`benchmarks/samplers.py`).

    python benchmarks/table/make.py [--rows 640] [--minutes 60] [--records FILE] [--pack FILE]

Eight recipes (two of them controls) on two tasks: `skill`, which leaves safety alone at many settings, and `obey`, which loses it. Settings are
the recipes' defaults first, then a scrambled Sobol sequence over each recipe's own space (`SEED`), each with two training seeds. Every line of
`--records` is one training, written as it ends: an interrupted table goes on where it was. Settings come in rounds over all recipes, so that a
table that was cut short is balanced. One process, one thread, no Ray.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SEED = 16
"""Of the settings."""
SEEDS = (0, 1)
TASKS = ("skill", "obey")
RECIPES: tuple[list[str], ...] = (
    ["full"], ["lora"],  # controls: no safety rows, nothing protected
    ["safe_instruct", "lora"], ["freeze_layers", "lora"], ["safe_instruct"], ["safegrad"], ["lisa"], ["curvature_restore"],
)  # fmt: skip
STEPS, EIGHTH, PROBED = 64, 8, 60
PACKED = Path(__file__).with_name("pocket.jsonl.xz")


class Silent:
    """A reporter that listens to nobody."""

    def report(self, event: dict[str, Any]) -> bool:
        return False


@dataclass(frozen=True)
class Wanted:
    """One training of the table."""

    task: str
    recipe: str
    setting: int
    """0: the recipe's defaults."""
    params: dict[str, Any]
    seed: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.task, self.recipe, self.setting, self.seed


def experiment_of(task: str) -> Any:
    from orchestrator import config

    raw = config.load("pocket", [
        f"task.data=pocket:{task}", f"task.eval_data=pocket:{task}_eval", "training.engine=plain", f"training.max_steps={STEPS}",
        f"monitor.every_steps={EIGHTH}", f"monitor.num_prompts={PROBED}", "training.save_steps=0", "tracking.enabled=false",
    ]).model_dump(mode="json")  # fmt: skip
    suites = [suite for suite in raw["safety"]["suites"] if suite["name"] in ("harmful", "borderline")]
    return config.from_dict(raw | {"recipes": RECIPES, "safety": raw["safety"] | {"suites": suites}})


def settings_of(space: Any, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` settings of a recipe; the same for the same space. Points of a small grid may repeat and are then left out."""
    from scipy.stats import qmc

    yield {**space.fixed, **space.defaults}
    seen = {json.dumps(space.defaults, sort_keys=True)}
    for point in qmc.Sobol(len(space.distributions), seed=SEED).random(1 << (count - 1).bit_length()):
        params = {key: at(distribution, float(u)) for (key, distribution), u in zip(space.distributions.items(), point, strict=True)}
        if (text := json.dumps(params, sort_keys=True)) not in seen and len(seen) < count:
            seen.add(text)
            yield {**space.fixed, **params}


def at(distribution: Any, u: float) -> Any:
    """The value of a distribution at u, 0..1."""
    if hasattr(distribution, "choices"):
        return distribution.choices[min(int(u * len(distribution.choices)), len(distribution.choices) - 1)]
    low, high = distribution.low, distribution.high
    if isinstance(low, int):
        return min(low + int(u * (high - low + 1)), high)
    return low * (high / low) ** u if distribution.log else low + u * (high - low)


def wanted(count: int) -> Iterator[Wanted]:
    """All trainings, in rounds: every recipe's and task's first setting, then every second one."""
    from orchestrator.models import identity
    from orchestrator.search import spaces

    experiments = {task: experiment_of(task) for task in TASKS}
    layers = identity.num_layers(experiments[TASKS[0]].model)
    found = spaces.resolve_space(experiments[TASKS[0]], layers)
    columns = {name: list(settings_of(space, count)) for name, space in found.items()}
    for setting in range(count):
        for name, column in columns.items():
            for task in TASKS:
                for seed in SEEDS:
                    if setting < len(column):
                        yield Wanted(task, name, setting, column[setting], seed)


def row_of(one: Wanted, result: Any, untouched: Any, seconds: float) -> dict[str, Any]:
    """What the table keeps of a training: score, failures of each suite as bits, probes, seconds."""
    suites = {name: {"failures": bits(suite.failures), "of": len(suite.ids)} for name, suite in result.suites.items()}
    probes = [[e["step"], e["n"], round(e["asr"] * e["n"]), round((e["asr"] - e["degradation"]) * e["n"])]
              for e in result.history if e["kind"] == "probe"]  # fmt: skip
    return {
        "task": one.task, "recipe": one.recipe, "setting": one.setting, "params": one.params, "seed": one.seed, "state": result.state,
        "error": result.error, "score": None if result.task is None else result.task.score, "suites": suites, "probes": probes,
        "steps": STEPS, "cpu_seconds": round(seconds, 3), "train_seconds": round(result.seconds.get("train", 0.0), 3),
        "evaluate_seconds": round(result.seconds.get("evaluate", 0.0), 3),
    }  # fmt: skip


def bits(values: list[bool]) -> str:
    """Truth values as hexadecimal digits, the first one highest."""
    return f"{int('1' + ''.join('01'[bool(v)] for v in values), 2):x}"


def head_of(untouched: dict[str, Any]) -> dict[str, Any]:
    """First line of the table: what it was made with, and the untouched model's failures."""
    from orchestrator.experiment import baseline

    suites = {task: {name: {"failures": bits(s.certain), "of": len(s.ids), "requests": s.requests} for name, s in result.suites.items()}
              for task, result in untouched.items()}  # fmt: skip
    scores = {task: result.task.score for task, result in untouched.items()}
    return {"head": True, "seed": SEED, "seeds": SEEDS, "steps": STEPS, "eighth": EIGHTH, "probed": PROBED, "untouched": suites, "scores": scores,
            "identity": baseline.identity(experiment_of(TASKS[0]))}  # fmt: skip


def made(records: Path, rows: int, minutes: float) -> int:
    """Train what is missing until there are so many rows or the time is over; how many there are."""
    import torch

    from orchestrator.experiment import baseline
    from orchestrator.records import LaneContext
    from orchestrator.search import tune
    from orchestrator.trial import run

    torch.set_num_threads(1)
    began, context = time.monotonic(), LaneContext()
    experiments = {task: experiment_of(task) for task in TASKS}
    known = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    done = {(r["task"], r["recipe"], r["setting"], r["seed"]) for r in known if "head" not in r}
    folder = Path(tempfile.mkdtemp(prefix="table-"))
    try:
        untouched = {task: run.run(baseline.spec(experiment, folder / task), Silent(), context) for task, experiment in experiments.items()}
        head = json.loads(json.dumps(head_of(untouched)))
        if known and known[0] != head:
            raise SystemExit(f"{records} was made with another model, suites or seed; move it away or give --records another file")
        with records.open("a") as file:
            if not known:
                file.write(json.dumps(head) + "\n")
            for one in wanted(-(-rows // (len(RECIPES) * len(TASKS) * len(SEEDS)))):
                if one.key in done or len(done) >= rows:
                    continue
                if time.monotonic() - began > 60 * minutes:
                    break
                spec = tune.build_spec(experiments[one.task], trial_id="t0001", recipe=one.recipe, params=one.params, seed=one.seed,
                                       phase="search", folder=str(folder / "trial"))  # fmt: skip
                start = time.process_time()
                result = run.run(spec, Silent(), context)
                file.write(json.dumps(row_of(one, result, untouched[one.task], time.process_time() - start)) + "\n")
                file.flush()
                done.add(one.key)
                shutil.rmtree(folder / "trial", ignore_errors=True)
                if len(done) % 20 == 0:
                    print(f"{len(done)} rows after {(time.monotonic() - began) / 60:.1f} minutes", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return len(done)


def read(path: Path = PACKED) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(head, rows) of a packed table, or of its records."""
    with (lzma.open(path, "rt") if path.suffix == ".xz" else path.open()) as file:
        head, *rows = map(json.loads, file)
    return head, rows


def pack(records: Path, packed: Path) -> None:
    packed.write_bytes(lzma.compress(records.read_bytes(), preset=9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=640, help="trainings of the whole table")
    parser.add_argument("--minutes", type=float, default=60, help="begin no training after so many minutes")
    parser.add_argument("--records", type=Path, default=Path("table.jsonl"))
    parser.add_argument("--pack", type=Path, help="write the compressed table here")
    arguments = parser.parse_args()
    count = made(arguments.records, arguments.rows, arguments.minutes)
    print(f"{count} rows in {arguments.records}")
    if arguments.pack:
        pack(arguments.records, arguments.pack)
        print(f"{arguments.pack}: {arguments.pack.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
