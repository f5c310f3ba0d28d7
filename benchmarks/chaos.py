"""One search, disturbed at random moments and taken up again, against the same search left alone.

    python benchmarks/chaos.py [--tries N] [--seed N] [--faults NAME ...] [--json FILE] [--folder DIR]

The search: two lanes, two seeds, rollbacks on, MLflow on sqlite, a random sampler (what TPE proposes depends on which trial of two lanes
ends first, disturbed or not). Each disturbance waits for a random moment of a running search, strikes, takes the search up again with
`safebasin resume` where it has ended, and waits until it gets on: a new checkpoint or a new finished trial. When the search has ended,
its trials (parameters, every score, every prompt's verdict, steps) and its MLflow runs are compared with those of the undisturbed one;
another search begins until all tries are used.

- lost: finished trials whose record vanished or changed by the disturbance (the one it damaged on purpose aside), or that the end lacks.
- doubled: trials that the end or MLflow holds more than once, and finished trials that ran again without need.
- differs: trials whose parameters or figures are not those of the undisturbed search.
- left: processes of a driver that has ended which live 10 s later.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import psutil  # noqa: E402
import yaml  # noqa: E402

from benchmarks import tiny  # noqa: E402
from benchmarks.faults import FAULTS, Fault, Search, Stuck  # noqa: E402

LEFT_AFTER_S = 10.0
DISK_MIB = 700
LONGEST_REST_S = 8.0
"""A search that gets on is left alone for at most so long before the next disturbance."""


# -- one disturbance ---------------------------------------------------------------------------------------------------------------


@dataclass
class Struck:
    """What a disturbance did."""

    fault: str
    lost: int
    doubled: int
    seconds: float
    """From the strike until the search got on."""
    left: int


def disturb(search: Search, fault: Fault, rng: random.Random) -> Struck | None:
    """Strike a running search and bring it back; None where it ended by itself before. Raises Stuck."""
    family = search.look_at_family()
    before, seen, began = search.records(), search.progress(), time.monotonic()
    fault.strike(search, rng)
    if fault.ends:
        search.until(lambda: False)
    damaged, dead_since = None, None
    while search.ended or not search.gets_on(seen):
        code = search.process.returncode
        if code in (0, 3):
            if dead_since is None:
                return None
            break  # it was resumed and ended
        if code not in (*fault.codes, 1) or dead_since is not None:
            raise Stuck(f"{fault.name}: the driver ended with {code}; {search.tail()}")
        dead_since = time.monotonic()
        before = search.records()  # what was finished until its end counts, too
        damaged = fault.damage(search, rng) if fault.damage else None
        before.pop(damaged, None)
        search.begin("resume", str(search.folder))
        search.until(search.lanes_are_up)
        seen = search.progress()
    seconds = time.monotonic() - began
    left = 0
    if dead_since is not None:
        time.sleep(max(0.0, LEFT_AFTER_S - (time.monotonic() - dead_since)))
        left = sum(1 for process in family if _lives(process))
    after = search.records()
    gone = [trial for trial in before if trial not in after]
    again = [trial for trial in before if trial in after and after[trial] != before[trial]]
    return Struck(fault.name, len(gone), len(again), seconds, left)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- what a search came to ---------------------------------------------------------------------------------------------------------

Figures = dict[str, tuple[Any, ...]]


def figures(folder: Path) -> Figures:
    """Trial id -> what must not depend on disturbances."""
    found = {}
    for path in sorted(folder.glob("trials/*/result.json")):
        raw = json.loads(path.read_text())
        suites = {name: (suite["ids"], suite["unsafe"], suite["refused"]) for name, suite in raw["suites"].items()}
        task = raw["task"] and raw["task"]["scores"]
        rollbacks = raw["facts"].get("monitor", {}).get("rollbacks")
        found[raw["trial_id"]] = (raw["recipe"], raw["params"], raw["seed"], raw["phase"], raw["state"], raw["steps"], rollbacks, task, suites)
    return found


def tracked(folder: Path) -> collections.Counter[tuple[Any, ...]]:
    """MLflow's runs: (role, trial, status, parameters, final metrics) and how often."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    found: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000):
        tags = run.data.tags
        metrics = {k: round(v, 9) for k, v in run.data.metrics.items() if k in ("task_score", "degradation", "asr", "over_refusal")}
        params = {k: v for k, v in run.data.params.items() if k in ("learning_rate", "lora.lora_r", "seed")}
        key = (tags["safebasin.role"], tags.get("safebasin.trial_id", ""), run.info.status, *sorted(params.items()), *sorted(metrics.items()))
        found[key] += 1
    return found


@dataclass(frozen=True)
class Difference:
    """A disturbed search against the undisturbed one."""

    trials: int
    lost: int
    doubled: int
    differs: int
    runs_missing: int
    runs_more: int

    @property
    def none(self) -> bool:
        return not (self.lost or self.doubled or self.differs or self.runs_missing or self.runs_more)


def difference(wanted: Path, found: Path) -> Difference:
    """Compare two folders of finished searches."""
    one, other = figures(wanted), figures(found)
    with (found / "trials.csv").open(newline="") as file:
        ids = [row["trial_id"] for row in csv.DictReader(file)]
    runs, theirs = tracked(wanted), tracked(found)
    return Difference(
        trials=len(one),
        lost=len(one.keys() - other.keys()) + len(one.keys() - set(ids)),
        doubled=len(ids) - len(set(ids)) + len(other.keys() - one.keys()),
        differs=sum(one[trial] != other[trial] for trial in one.keys() & other.keys()),
        runs_missing=sum((runs - theirs).values()),
        runs_more=sum((theirs - runs).values()),
    )


# -- campaigns ---------------------------------------------------------------------------------------------------------------------


def write_config(folder: Path, inputs: Path, trials: int, steps: int) -> Path:
    """The search's config in `folder`, its results below."""
    raw = tiny.settings(
        inputs, folder / "out",
        search={"trials": trials, "seeds": [0, 1], "finalists": 1, "sampler": "random"},
        safety={"limits": {"max_degradation": 0.6, "max_over_refusal_rise": 0.6}},
        training={"max_steps": steps, "save_steps": 20},
        monitor={"every_steps": 40, "num_prompts": 20, "rule": "threshold", "max_unsafe_rise": 0.2, "on_breach": "rollback", "max_rollbacks": 2},
        ray={"lanes": 2, "init_kwargs": {"num_cpus": 2}, "max_trial_failures": 5, "max_failures": 10},
    )  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of `DISK_MIB` at `folder`, where this user may mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def undisturbed(folder: Path, inputs: Path, trials: int, steps: int) -> float:
    """The search left alone; seconds it took. Raises Stuck where it fails."""
    folder.mkdir(parents=True)
    search = Search(write_config(folder, inputs, trials, steps), folder / "out", folder / "log")
    began = time.monotonic()
    search.begin("run", "-c", str(search.config))
    code = search.process.wait(1200)
    if code not in (0, 3):
        raise Stuck(f"the undisturbed search ended with {code}; {search.tail()}")
    return time.monotonic() - began


def campaign(
    folder: Path, inputs: Path, trials: int, steps: int, faults: Sequence[Fault], rng: random.Random, *, longest_rest_s: float = LONGEST_REST_S
) -> tuple[list[Struck], int]:
    """Disturb one search by `faults`, in order, at random moments, until it ends; (what happened, faults left over). Raises Stuck."""
    search = Search(write_config(folder, inputs, trials, steps), folder / "out", folder / "log")
    struck: list[Struck] = []
    waiting = list(faults)
    try:
        search.begin("run", "-c", str(search.config))
        while waiting:
            going = search.until(lambda: search.progress())
            if going:
                search.rest(rng.uniform(0.0, longest_rest_s))
            if search.ended:
                break
            one = disturb(search, waiting[0], rng)
            if one is None:
                break
            waiting.pop(0)
            struck.append(one)
            print(f"{one.fault}: back after {one.seconds:.0f} s; lost {one.lost}, doubled {one.doubled}, left {one.left}", flush=True)
        search.until(lambda: False, 1200)
        if search.process.returncode not in (0, 3):
            raise Stuck(f"the disturbed search ended with {search.process.returncode}; {search.tail()}")
    finally:
        search.stop()
    return struck, len(waiting)


def measure(folder: Path, tries: int, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """The whole benchmark: rows by fault, and the searches' differences."""
    rng = random.Random(seed)
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    tiny.make_inputs(inputs)
    print(f"undisturbed: {undisturbed(folder / 'undisturbed', inputs, TRIALS, STEPS):.0f} s", flush=True)
    struck: list[Struck] = []
    differences: list[Difference] = []
    with small_disk(folder / "probe") as mounted:
        usable = [name for name in names if mounted or name != "disk full"]
    if not mounted and "disk full" in names:
        print("disk full: not run, mounting a small file system needs root")
    order = [FAULTS[usable[i % len(usable)]] for i in range(tries)]
    rng.shuffle(order)
    while order:
        place = folder / f"disturbed-{len(differences)}"
        with small_disk(place) as mounted:
            found, left_over = campaign(place, inputs, TRIALS, STEPS, order, rng)
            struck += found
            differences.append(difference(folder / "undisturbed" / "out", place / "out"))
            print(f"search {len(differences)} ended: {differences[-1]}", flush=True)
            shutil.copytree(place, folder / f"kept-{len(differences) - 1}", dirs_exist_ok=True)
            if not found:
                raise Stuck("a search ended before anything could strike it; give more --trials")
            order = order[len(order) - left_over :] if left_over else []
    return {"rows": rows_of(struck), "searches": [vars(one) for one in differences], "seed": seed, "cpus": os.cpu_count()}


def rows_of(struck: Sequence[Struck]) -> list[dict[str, Any]]:
    """One row a fault."""
    rows = []
    for name in FAULTS:
        mine = [one for one in struck if one.fault == name]
        if mine:
            seconds = [one.seconds for one in mine]
            rows.append({
                "fault": name, "tries": len(mine), "lost": sum(one.lost for one in mine), "doubled": sum(one.doubled for one in mine),
                "left": sum(one.left for one in mine), "median_s": statistics.median(seconds), "longest_s": max(seconds),
            })  # fmt: skip
    return rows


TRIALS, STEPS = 16, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="disturbances in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the order of the faults")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--folder", type=Path, help="a new folder for the searches, which stays; a temporary one without it")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args.folder or Path(temporary), args.tries, args.seed, args.faults)
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    clean = all(not (row["lost"] or row["doubled"] or row["left"]) for row in found["rows"])
    equal = all(Difference(**one).none for one in found["searches"])
    sys.exit(0 if clean and equal else 1)


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("fault", "tries", "lost", "doubled", "left after 10 s", "back after, median s", "longest s", title="A disturbed search")
    for row in found["rows"]:
        counts = [str(row[key]) for key in ("tries", "lost", "doubled", "left")]
        table.add_row(row["fault"], *counts, f"{row['median_s']:.0f}", f"{row['longest_s']:.0f}")
    Console(markup=False).print(table)
    for number, one in enumerate(found["searches"], 1):
        print(
            f"search {number} against the undisturbed one, {one['trials']} trials: lost {one['lost']}, doubled {one['doubled']}, "
            f"other figures {one['differs']}, MLflow runs missing {one['runs_missing']}, more {one['runs_more']}"
        )


if __name__ == "__main__":
    main()
