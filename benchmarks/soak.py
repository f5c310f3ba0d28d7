"""Many tiny trials in one search: what grows that must not.

    python benchmarks/soak.py [--trials N] [--json FILE] [--folder DIR]

A search of N trials of a second or less on one lane, with MLflow on sqlite, is looked at from outside every second. Memory is the
process's own (unique set size, which shared libraries do not blur): of the driver, of the lane's worker, of Ray's other processes together.
Beside it: open files, threads, processes, temporary files, and the sizes of the journal, MLflow's database and the tracking queue.
After a warm-up (a fifth of the trials) a figure that must be flat may grow by 5 % at most between the first and the last tenth of what is
left; a file that must grow with the trials may not grow faster in the second half than in the first by more than a fifth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import psutil  # noqa: E402
import yaml  # noqa: E402

from benchmarks import tiny  # noqa: E402
from benchmarks.faults import Search, Stuck, is_worker  # noqa: E402

FLAT = ("driver_mib", "lane_mib", "broker_mib", "ray_mib", "driver_files", "lane_files", "threads", "processes", "temporary_files")
LINEAR = ("journal_kib", "mlflow_kib", "records_kib")
ALLOWED, WARM_UP, FASTER = 0.05, 0.2, 0.2
MIB = 2**20


@dataclass(frozen=True)
class Look:
    """The search at one moment."""

    seconds: float
    trials: int
    """Finished so far."""
    driver_mib: float
    lane_mib: float
    broker_mib: float
    ray_mib: float
    driver_files: int
    lane_files: int
    threads: int
    """Of all processes of the search."""
    processes: int
    temporary_files: int
    """Below the temporary folder, made since the benchmark began."""
    journal_kib: float
    mlflow_kib: float
    records_kib: float
    """trials.csv and every record."""


def look(search: Search, began: float, old: set[str]) -> Look | None:
    """None where the driver has ended."""
    try:
        driver = psutil.Process(search.process.pid)
        family = driver.children(recursive=True)
        own = _memory(driver)
        files = driver.num_fds()
    except psutil.NoSuchProcess:
        return None
    lane = broker = rest = 0.0
    lane_files, threads = 0, driver.num_threads()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            name, memory = " ".join(process.cmdline()[:1]) or process.name(), _memory(process)
            threads += process.num_threads()
            if is_worker(process):
                lane, lane_files = lane + memory, lane_files + process.num_fds()
            elif "Broker" in name:
                broker += memory
            else:
                rest += memory
    folder = search.folder
    records = [path.stat().st_size for path in folder.glob("trials/*/result.json")]
    return Look(
        time.monotonic() - began, len(records), own, lane, broker, rest, files, lane_files, threads, len(family), _temporary(old),
        _kib(folder / "study.journal"), _kib(folder.parent / "mlflow.db"), (sum(records) / 1024) + _kib(folder / "trials.csv"),
    )  # fmt: skip


def _memory(process: psutil.Process) -> float:
    return process.memory_full_info().uss / MIB


def _kib(path: Path) -> float:
    return path.stat().st_size / 1024 if path.exists() else 0.0


def _temporary(old: set[str]) -> int:
    """Files below the temporary folder's new entries."""
    place = Path(tempfile.gettempdir())
    count = 0
    for entry in place.iterdir():
        if entry.name not in old:
            count += sum(len(files) for _, _, files in os.walk(entry)) if entry.is_dir() and not entry.is_symlink() else 1
    return count


def run(folder: Path, trials: int) -> tuple[list[Look], float]:
    """The search, and what was seen of it. Raises Stuck where it fails."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    tiny.make_inputs(inputs)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tiny.settings(
        inputs, folder / "out", recipes=[["full"]], search={"trials": trials, "seeds": 1, "finalists": 0, "sampler": "random"},
        training={"max_steps": 4, "save_steps": 0}, ray={"lanes": 1, "init_kwargs": {"num_cpus": 1}},
    )))  # fmt: skip
    search = Search(config, folder / "out", folder / "log")
    old = set(os.listdir(tempfile.gettempdir()))
    began, looks = time.monotonic(), []
    search.begin("run", "-c", str(config))
    try:
        while not search.ended:
            seen = look(search, began, old)
            if seen is not None:
                looks.append(seen)
                print(f"\r{seen.trials} of {trials} trials, {seen.seconds:.0f} s", end="", file=sys.stderr, flush=True)
            time.sleep(1.0)
    finally:
        search.stop()
    print(file=sys.stderr)
    if search.process.returncode not in (0, 3):
        raise Stuck(f"the search ended with {search.process.returncode}; {search.tail()}")
    return looks, time.monotonic() - began


def judge(looks: Sequence[Look], trials: int) -> list[dict[str, Any]]:
    """One row a figure: first, last, growth, and whether it keeps its bar."""
    seen = [one for one in looks if WARM_UP * trials <= one.trials < trials]
    if len(seen) < 20:
        raise Stuck(f"only {len(seen)} looks after the warm-up; give more --trials")
    tenth = len(seen) // 10
    rows = []
    for name in FLAT:
        first, last = (statistics.median(getattr(one, name) for one in part) for part in (seen[:tenth], seen[-tenth:]))
        growth = (last - first) / first if first else 0.0
        rows.append({"figure": name, "first": first, "last": last, "growth": growth, "bar": ALLOWED, "kept": growth <= ALLOWED})
    middle = seen[len(seen) // 2]
    for name in LINEAR:
        rates = [
            (getattr(b, name) - getattr(a, name)) / max(1, b.trials - a.trials) for a, b in ((seen[0], middle), (middle, seen[-1]))
        ]
        growth = rates[1] / rates[0] - 1 if rates[0] else 0.0
        rows.append({"figure": f"{name} a trial", "first": rates[0], "last": rates[1], "growth": growth, "bar": FASTER, "kept": growth <= FASTER})
    speed = [(b.seconds - a.seconds) / max(1, b.trials - a.trials) for a, b in ((seen[0], middle), (middle, seen[-1]))]
    growth = speed[1] / speed[0] - 1
    rows.append({"figure": "seconds a trial", "first": speed[0], "last": speed[1], "growth": growth, "bar": FASTER, "kept": growth <= FASTER})
    return rows


def show(rows: Sequence[dict[str, Any]], trials: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "first", "last", "growth", "bar", "", title=f"{trials} trials in {seconds:.0f} s")
    for row in rows:
        cells = [f"{row['first']:.2f}", f"{row['last']:.2f}", f"{row['growth']:+.1%}", f"{row['bar']:+.0%}", "kept" if row["kept"] else "MISSED"]
        table.add_row(row["figure"], *cells)
    Console(markup=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="a new folder for the search, which stays; a temporary one without it")
    parser.add_argument("--json", type=Path, help="write the rows here, and every look")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        looks, seconds = run(args.folder or Path(temporary), args.trials)
    rows = judge(looks, args.trials)
    show(rows, args.trials, seconds)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "looks": [asdict(one) for one in looks], "cpus": os.cpu_count()}, indent=1))
    sys.exit(0 if all(row["kept"] for row in rows) else 1)


if __name__ == "__main__":
    main()
