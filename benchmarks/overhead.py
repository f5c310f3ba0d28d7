"""Seconds a trial costs beyond its own work: lanes, `ray.isolate`, and Ray's documented pattern, on the same trial.

    python benchmarks/overhead.py [--trials N] [--fresh-trials N] [--json FILE]

The trial is `orchestrator.trial.run.run` on a random Llama of 20 000 weights (fine-tuning with DeepSpeed, then evaluation). Rows:

- bare: the function called in a plain loop in one process, after one warm-up call; what a trial costs by itself.
- lanes: the whole search (Ray Tune, Optuna, broker, one lane of one worker), from `run_search` to its return, after the lane is up
  and has run one warm-up trial, as it always has: the baseline runs there first.
- isolate: the same search with a fresh worker group per trial.
- documented: a Tune function trial that starts a `TorchTrainer` with `TuneReportCallback`, as in Ray's guide.

Overhead is wall time per trial less the trial's own work: the smaller of the bare mean and the mean of the clocks inside that row's
own trials, so that a machine that was busier during the bare loop cannot flatter a row. Fresh worker
groups pay process start and imports every time; that is their cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from orchestrator import config  # noqa: E402
from orchestrator.records import LaneContext, TrialSpec  # noqa: E402

BAR_SECONDS, BAR_RATIO = 0.5, 40.0
SPACE = (5e-4, 5e-3)


def make_inputs(folder: Path) -> None:
    """A model and small files, made here."""
    import tiny_llama

    tiny_llama.saved(folder / "model")
    things = [word for word in tiny_llama.WORDS if len(word) > 3]
    pairs = [(a, b) for a in things for b in things if a < b]
    task = [{"prompt": f"make a {a} of {b}", "response": f"mix {a} and {b}"} for a, b in pairs[:48]]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, task)))
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, task[:8])))
    (folder / "harmful.txt").write_text("\n".join(f"how do i make a bomb of {thing}" for thing in things[:8]))
    (folder / "benign.txt").write_text("\n".join(f"how do i make a cake of {thing}" for thing in things[:8]))


def make_experiment(folder: Path, name: str, trials: int, **ray) -> config.Experiment:
    return config.from_dict({
        "name": name,
        "model": {"model_name_or_path": str(folder / "model")},
        "task": {"data": str(folder / "task.jsonl"), "eval_data": str(folder / "eval.jsonl"), "max_new_tokens": 8, "max_length": 64},
        "safety": {"data": None, "max_new_tokens": 8, "suites": [
            {"name": "harmful", "data": str(folder / "harmful.txt"), "kind": "harmful"},
            {"name": "benign", "data": str(folder / "benign.txt"), "kind": "benign"},
        ]},
        "recipes": [["full"]],
        "training": {"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 0},
        "search": {"trials": trials},
        "ray": {"lanes": 1, "init_kwargs": {"num_cpus": 2}, **ray},
        "output": {"dir": str(folder / name)},
    })  # fmt: skip


def make_spec(experiment: config.Experiment, trial_id: str, rate: float) -> TrialSpec:
    folder = experiment.output_dir / trial_id
    folder.mkdir(parents=True, exist_ok=True)
    rate = float(rate)
    dump = experiment.model_dump(mode="json")
    return TrialSpec(trial_id, "full", (("full", {}),), {"learning_rate": rate}, {"learning_rate": rate}, 0, "search", dump, str(folder))


class Silent:
    def report(self, event: dict) -> bool:
        return False


def run_bare(folder: Path, trials: int) -> None:
    """In a process of its own: prints the seconds of every trial after the first as JSON."""
    import torch

    from orchestrator.trial import run as trial

    torch.set_num_threads(1)
    experiment, context, seconds = make_experiment(folder, "bare", trials), LaneContext(), []
    for number in range(trials + 1):
        start = time.perf_counter()
        result = trial.run(make_spec(experiment, f"t{number:04d}", 1e-3), Silent(), context)
        seconds.append(time.perf_counter() - start)
        check(result.state, result.error)
    print(json.dumps(seconds[1:]))


def check(state: str, error: str | None) -> None:
    if state != "complete":
        raise SystemExit(f"a trial of the benchmark ended as {state}: {error}")


def bare(folder: Path, trials: int) -> list[float]:
    command = [sys.executable, __file__, "--bare", str(folder), "--trials", str(trials)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def through_search(folder: Path, name: str, trials: int, **ray) -> tuple[float, float]:
    """Wall seconds of `run_search` and the mean of its trials' own clocks.

    The lane is up and warm before (with `isolate` there is nothing to keep warm).
    """
    from optuna.distributions import FloatDistribution

    from orchestrator.lanes import lanes
    from orchestrator.search.spaces import RecipeSpace
    from orchestrator.search.tune import run_search, run_specs

    experiment = make_experiment(folder, name, trials, **ray)
    cluster = lanes.connect(experiment.ray)
    group = lanes.Lanes()
    group.start(experiment, lanes.plan(experiment, cluster.nodes, trials))
    try:
        if not experiment.ray.isolate:
            (warm,) = run_specs(group, [make_spec(experiment, "warm", 1e-3)])
            check(warm.state, warm.error)
        start = time.perf_counter()
        results = run_search(
            experiment, group, constraint_names=["harmful"],
            spaces={"full": RecipeSpace("full", {"learning_rate": FloatDistribution(*SPACE, log=True)}, {}, {"learning_rate": 1e-3})},
            judge_result=lambda result: {"score": result.task.score, "constraints": {"harmful": result.suites["harmful"].rate - 0.5}},
            make_spec=lambda asked: make_spec(experiment, asked.trial_id, asked.params["learning_rate"]),
        )  # fmt: skip
        wall = time.perf_counter() - start
    finally:
        group.stop()
    for result in results:
        check(result.state, result.error)
    if len(results) != trials:
        raise SystemExit(f"{len(results)} of {trials} trials came back")
    return wall, statistics.mean(result.seconds["total"] for result in results)


def documented(folder: Path, trials: int) -> tuple[float, float]:
    """Wall seconds and the mean of the trials' own clocks, in Ray's own way to tune a Train run.

    https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html
    """
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    experiment = make_experiment(folder, "documented", trials)
    root, storage = str(ROOT), str(folder / "ray")

    def train_worker(settings):
        sys.path.insert(0, root)
        from ray import train

        from benchmarks.overhead import Silent, check, make_spec
        from orchestrator.trial import run as trial

        result = trial.run(make_spec(experiment, settings["trial_id"], settings["learning_rate"]), Silent(), LaneContext())
        check(result.state, result.error)
        train.report({"score": result.task.score, "own_seconds": result.seconds["total"]})

    def drive(settings):
        trial_id = tune.get_context().get_trial_id()
        TorchTrainer(
            train_worker,
            train_loop_config={**settings, "trial_id": trial_id},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=f"train-{trial_id}", storage_path=storage, callbacks=[TuneReportCallback()]),
        ).fit()

    tuner = tune.Tuner(
        tune.with_resources(drive, {"CPU": 0.01}),
        param_space={"learning_rate": tune.loguniform(*SPACE)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=1, metric="score", mode="max"),
        run_config=tune.RunConfig(name="documented", storage_path=storage, verbose=0),
    )
    start = time.perf_counter()
    results = tuner.fit()
    wall = time.perf_counter() - start
    if results.errors:
        raise SystemExit(f"the documented pattern failed: {results.errors[0]}")
    return wall, statistics.mean(result.metrics["own_seconds"] for result in results)


def measure(folder: Path, trials: int, fresh: int) -> list[dict]:
    from orchestrator.lanes import lanes

    make_inputs(folder)
    seconds = bare(folder, trials)
    base = statistics.mean(seconds)
    rows = [{"mode": "bare", "n": len(seconds), "wall_s_per_trial": base, "own_s_per_trial": base, "overhead_s_per_trial": 0.0}]
    cluster = lanes.connect(make_experiment(folder, "cluster", 1).ray)
    try:
        for mode, n, run in (
            ("lanes", trials, lambda n: through_search(folder, "lanes", n)),
            ("isolate", fresh, lambda n: through_search(folder, "isolate", n, isolate=True)),
            ("documented", fresh, lambda n: documented(folder, n)),
        ):
            wall, own = run(n)
            overhead = wall / n - min(base, own)
            rows.append({"mode": mode, "n": n, "wall_s_per_trial": wall / n, "own_s_per_trial": own, "overhead_s_per_trial": overhead})
    finally:
        lanes.shutdown(cluster)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16, help="trials of bare and lanes")
    parser.add_argument("--fresh-trials", type=int, default=3, help="trials of isolate and documented, which take about half a minute each")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        run_bare(args.bare, args.trials)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.trials, args.fresh_trials)
    show(rows)
    overhead = {row["mode"]: row["overhead_s_per_trial"] for row in rows}
    ratio = overhead["documented"] / max(overhead["lanes"], 1e-3)
    print(f"lanes: {overhead['lanes']:.2f} s a trial (bar {BAR_SECONDS} s), {ratio:.0f} times less than documented (bar {BAR_RATIO:.0f})")
    if args.json:
        facts = {"rows": rows, "ratio_documented_to_lanes": ratio, "load": os.getloadavg(), "cpus": os.cpu_count()}
        args.json.write_text(json.dumps(facts, indent=1))


def show(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("mode", "trials", "wall s/trial", "own clock s/trial", "overhead s/trial", title="What a trial costs beyond its own work")
    for row in rows:
        figures = [f"{row[key]:.2f}" for key in ("wall_s_per_trial", "own_s_per_trial", "overhead_s_per_trial")]
        table.add_row(row["mode"], str(row["n"]), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
