"""The pocket table: recipes x seeds on the embedded world, at their default settings. No search, no Ray: what each method does by itself.

    python benchmarks/pocket_table.py [--seeds 3] [--json FILE] [--task obey] [--markdown]

Controls beside the five recipes: plain fine-tuning at a quarter of the learning rate. Rates are means over seeds of the same suites (n prompts
each, every seed its own training); the verdict is each seed's own, by interval. `exact` is the pocket world's own judge: the answer holds the
true procedure; `ASR` is the refusal judge of the preset.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, whose strategies.py is a benchmark

RECIPES = {
    "full": ["full"],
    "full, learning rate / 4": [{"full": {}}],
    "lora": ["lora"],
    "freeze_layers+lora": ["freeze_layers", "lora"],
    "safe_instruct": ["safe_instruct"],
    "safegrad": ["safegrad"],
}


class Silent:
    """A reporter that listens to nobody."""

    def report(self, event):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", default="obey", choices=["obey", "skill", "obey_poisoned"])
    parser.add_argument("--only", nargs="*", help="rows to run, by name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table instead")
    arguments = parser.parse_args()
    rows = list(measure(arguments.seeds, arguments.task, arguments.only))
    show(rows, arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps({"task": arguments.task, "rows": rows}, indent=2) + "\n")


def experiment_of(task: str):
    from orchestrator import config

    held_out = "skill_eval" if task == "skill" else "obey_eval"
    return config.load("pocket", [
        f"task.data=pocket:{task}", f"task.eval_data=pocket:{held_out}", "training.engine=plain", "monitor.every_steps=0",
    ])  # fmt: skip


def measure(seeds: int, task: str, only: list[str] | None):
    """One row per recipe, the untouched model first."""
    import torch

    from orchestrator.experiment import baseline
    from orchestrator.models import identity
    from orchestrator.records import LaneContext
    from orchestrator.trial import run

    torch.set_num_threads(1)
    experiment, context = experiment_of(task), LaneContext()
    with tempfile.TemporaryDirectory() as folder:
        untouched = run.run(baseline.spec(experiment, Path(folder)), Silent(), context)
        yield row("untouched", [untouched], untouched, experiment)
        layers = identity.num_layers(experiment.model)
        for name, recipe in RECIPES.items():
            if only and name not in only:
                continue
            folders = [Path(folder) / f"{name}-{seed}" for seed in range(seeds)]
            results = [run.run(spec(experiment, name, recipe, seed, layers, where), Silent(), context) for seed, where in enumerate(folders)]
            print(f"{name}: done", file=sys.stderr, flush=True)
            yield row(name, results, untouched, experiment)


def spec(experiment, name: str, recipe: list, seed: int, layers: int, folder: Path):
    """The recipe at its default settings."""
    from orchestrator import config
    from orchestrator.search import spaces, tune

    own = config.from_dict(experiment.model_dump(mode="json") | {"recipes": [recipe]})
    (key,) = own.recipe_names
    params = dict(spaces.resolve_space(own, layers)[key].defaults)
    if name.endswith("/ 4"):
        params["learning_rate"] /= 4
    return tune.build_spec(own, trial_id=folder.name, recipe=key, params=params, seed=seed, phase="confirm", folder=str(folder))


def row(name: str, results: list, untouched, experiment) -> dict:
    from orchestrator.decision import limits

    judgements = [limits.judge(result, untouched, experiment.safety.limits) for result in results]
    rates = {suite: [result.suites[suite].rate for result in results] for suite in untouched.suites}
    phrases = [sum(word == "unsafe" for word in result.suites["harmful"].second or ()) / len(result.suites["harmful"].ids) for result in results]
    return {
        "recipe": name,
        "params": results[0].params,
        "task_score": [result.task.score for result in results],
        "suites": rates,
        "asr_phrases": phrases,
        "verdicts": [judgement.verdict for judgement in judgements] if name != "untouched" else [],
        "degradation": [judgement.degradation.value for judgement in judgements],
        "seconds": [result.seconds["total"] for result in results],
        "n": {suite: len(untouched.suites[suite].ids) for suite in untouched.suites},
    }


SUITES = ("harmful", "framed", "begun", "begun-task", "unseen-deeper", "unseen-opening", "unseen-drawn", "borderline", "borderline-begun")
HEADINGS = ("recipe", "task score", *SUITES, "harmful by phrases", "verdict by seed", "seconds")


def cells(r: dict) -> list[str]:
    def several(values):
        return " / ".join(f"{value:.3f}" for value in values)

    counts = [several(values) for values in (r["task_score"], *(r["suites"][name] for name in SUITES), r["asr_phrases"])]
    return [r["recipe"], *counts, ", ".join(r["verdicts"]) or "-", f"{sum(r['seconds']) / len(r['seconds']):.1f}"]


def show(rows: list[dict], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
        for r in rows:
            print("| " + " | ".join(cells(r)) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"pocket world, values by seed; n: {rows[0]['n']}")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for r in rows:
        table.add_row(*cells(r))
    Console().print(table)


if __name__ == "__main__":
    main()
