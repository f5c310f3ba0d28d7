"""Every method on the embedded world: at its default settings and with an equal small tuning budget, on several seeds.

    python benchmarks/methods_table.py [--seeds 3] [--budget 4] [--only NAME ...] [--records FILE] [--json FILE] [--markdown]
    python benchmarks/methods_table.py --config real.yaml ...      the same on another model and data

Default: the strategy's own defaults, the learning rate the configured one (x 5 for lora). Tuned: `--budget` trials of the searcher on
seed 0 (the default point first), the best by `constraint.best`, then trained again on every seed; the row's seed-0 figures are those
of that selection, so they are optimistic, and the other seeds are not. Methods that act after training or at inference stand alone,
which is on full fine-tuning, and where `lora+` is written on adapters. `acted` is the method's own counter.

Every trial is one line of `--records` (kept between runs, so the table can be made in pieces and by several processes). In-process, one
thread, no Ray. CPU s: the mean over seeds of a whole trial with its evaluation, as the process's own time, which other work on the machine
does not lengthen; the first trial that needs a side training or a reference pays for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, whose strategies.py is a benchmark

ON_ADAPTERS = ("safe_lora", "safemerge", "random_subspace", "refusal_training")
CONTROLS = {"full, learning rate / 4": ["full"], "freeze_layers+lora": ["freeze_layers", "lora"]}
HEADINGS = ("method", "settings", "task score", "ASR", "framed", "begun", "drawn", "over-refusal", "verdicts", "CPU s", "acted")
COLUMNS = ("task_score", "asr", "asr_framed", "asr_begun", "asr_drawn", "over_refusal")


class Silent:
    """A reporter that listens to nobody."""

    def report(self, event):
        return False


def recipes(experiment) -> dict[str, list]:
    """Row name -> recipe."""
    import strategies

    rows = {name: [name] for name in strategies.STRATEGIES} | CONTROLS
    return rows | {f"lora+{name}": ["lora", name] for name in ON_ADAPTERS if name in strategies.STRATEGIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=4, help="trials of the tuning; 0 for defaults only")
    parser.add_argument("--only", nargs="*", help="rows to run, by name")
    parser.add_argument("--config", default="pocket", help="preset or YAML file")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    parser.add_argument("--records", type=Path, default=Path("methods_table.jsonl"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    chosen = {name: recipe for name, recipe in recipes(bench.experiment).items() if not arguments.only or name in arguments.only}
    rows = [bench.untouched_row()]
    for name, recipe in chosen.items():
        try:
            rows += bench.rows_of(name, recipe)
        except Exception as error:  # one method's failure is a row of the table, not the end of it
            rows.append({"method": name, "settings": "default", "error": f"{type(error).__name__}: {error}"})
        print(f"{name}: done", file=sys.stderr, flush=True)
    show(rows, arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


class Bench:
    """Trials of one experiment, each run once and remembered."""

    def __init__(self, arguments):
        import torch

        from orchestrator import config
        from orchestrator.experiment import baseline
        from orchestrator.models import identity
        from orchestrator.records import LaneContext

        torch.set_num_threads(1)
        overrides = ["training.engine=plain", "monitor.every_steps=0", *arguments.set]
        self.experiment = config.load(arguments.config, overrides)
        self.seeds, self.budget, self.records = arguments.seeds, arguments.budget, arguments.records
        self.context, self.folder = LaneContext(), Path(tempfile.mkdtemp(prefix="methods-"))
        self.layers = identity.num_layers(self.experiment.model)
        self.known = self._read()
        self.untouched = self._run(baseline.spec(self.experiment, self.folder))

    def _read(self) -> dict:
        lines = self.records.read_text().split("\n") if self.records.exists() else []  # answers may hold other line ends
        return {row["key"]: row["result"] for row in map(json.loads, filter(None, lines))}

    def _run(self, spec):
        from orchestrator.records import TrialResult
        from orchestrator.trial import run

        own = [spec.strategies, spec.training, spec.seed, spec.phase, self.experiment.digest()]
        key = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if key not in self.known:
            Path(spec.dir).mkdir(parents=True, exist_ok=True)
            began = time.process_time()
            result = run.run(spec, Silent(), self.context)
            result.history, result.seconds["cpu"] = [], time.process_time() - began
            self.known[key] = result.to_dict()
            with self.records.open("a") as file:
                file.write(json.dumps({"key": key, "result": self.known[key]}, default=str) + "\n")
        return TrialResult.from_dict(self.known[key])

    def _spec(self, experiment, recipe: str, params: dict, seed: int):
        from orchestrator.search import tune

        name = hashlib.sha256(json.dumps([recipe, params, seed], sort_keys=True, default=str).encode()).hexdigest()[:12]
        return tune.build_spec(experiment, trial_id=name, recipe=recipe, params=params, seed=seed, phase="confirm",
                                 folder=str(self.folder / "trials" / name))  # fmt: skip

    def untouched_row(self) -> dict:
        return self._row("untouched", "-", [self.untouched])

    def rows_of(self, name: str, recipe: list) -> list[dict]:
        """The default row, and the tuned one where there is something to tune."""
        from orchestrator import config
        from orchestrator.search import spaces

        experiment = config.from_dict(self.experiment.model_dump(mode="json") | {"recipes": [recipe]})
        (key,) = experiment.recipe_names
        space = spaces.resolve_space(experiment, self.layers)[key]
        params = {**space.fixed, **space.defaults}
        if name.endswith("/ 4"):
            params["learning_rate"] /= 4
        default = self._row(name, "default", [self._run(self._spec(experiment, key, params, seed)) for seed in range(self.seeds)])
        if not self.budget or name in CONTROLS:
            return [default]
        best = self._tune(experiment, key, space)
        tuned = self._row(name, "tuned", [self._run(self._spec(experiment, key, best, seed)) for seed in range(self.seeds)])
        return [default, tuned | {"params": best}]

    def _tune(self, experiment, recipe: str, space) -> dict:
        """Parameters of the best of `budget` trials on seed 0; the nearest miss where none is feasible."""
        from orchestrator.decision import limits
        from orchestrator.decision import selection as decision_selection
        from orchestrator.search.studies import Studies

        where = Path(tempfile.mkdtemp(dir=self.folder))
        raw = experiment.model_dump(mode="json")
        raw["search"] |= {"trials": self.budget, "storage": str(where / "study.journal")}
        names = limits.constraint_names(experiment)
        from orchestrator import config

        studies = Studies.create(config.from_dict(raw), {recipe: space}, names)
        rows = []
        while (asked := studies.ask()) is not None:
            result = self._run(self._spec(experiment, recipe, asked.params, 0))
            result.params = asked.params
            judgement = limits.judge(result, self.untouched, experiment.safety.limits)
            rows.append((result, judgement))
            studies.tell(asked.trial_id, result.state, judgement.task_score, judgement.values)
        selection = decision_selection.best(rows)
        found = selection.best or selection.nearest_miss
        return dict(found.params) if found else rows[0][0].params

    def _row(self, name: str, settings: str, results: list) -> dict:
        from orchestrator.decision import limits

        judged = [limits.judge(result, self.untouched, self.experiment.safety.limits) for result in results]
        rates = {suite: [r.suites[suite].rate if suite in r.suites else None for r in results] for suite in self.untouched.suites}
        column = {name: [n for n, s in self.untouched.suites.items() if column_of(s) == name] for name in COLUMNS}

        def worst(name: str) -> list[float | None] | None:
            """The highest rate of each seed over the column's suites."""
            return [max((v for v in seed if v is not None), default=None) for seed in zip(*(rates[n] for n in column[name]), strict=True)] or None

        return {
            "method": name, "settings": settings, "task_score": [r.task.score if r.task else None for r in results],
            **{name: worst(name) for name in COLUMNS[1:]}, "suites": rates,
            "verdicts": [j.verdict for j in judged] if name != "untouched" else [],
            "degradation": [[j.degradation.value, j.degradation.lower, j.degradation.upper] if j.degradation else None for j in judged],
            "cpu_seconds": [r.seconds["cpu"] for r in results], "errors": [r.error for r in results if r.error],
            "acted": results[0].facts.get("strategies", {}), "n": {suite: len(s.ids) for suite, s in self.untouched.suites.items()},
        }  # fmt: skip


def column_of(suite) -> str:
    """The table's column of a suite: what is begun for the model, what is drawn, what frames the request, the request itself; harmless prompts."""
    if suite.kind == "benign":
        return "over_refusal"
    if suite.attack.startswith("prefill"):
        return "asr_begun"
    if suite.source.get("samples"):
        return "asr_drawn"
    return "asr" if suite.attack == "direct" and suite.constrains and suite.name not in ("framed", "attacks") else "asr_framed"


def cells(row: dict) -> list[str]:
    def several(values):
        return "-" if not values else " / ".join("-" if v is None else f"{v:.3f}" for v in values)

    if "error" in row:
        return [row["method"], row["settings"], row["error"], *[""] * 8]
    acted = "; ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for own in row["acted"].values() for k, v in own.items()
                      if isinstance(v, (int, float, str)))  # fmt: skip
    counts = [several(row[key]) for key in COLUMNS]
    verdicts = ", ".join(row["verdicts"]) or "-"
    return [row["method"], row["settings"], *counts, verdicts, f"{sum(row['cpu_seconds']) / len(row['cpu_seconds']):.1f}", acted[:90] or "-"]


def show(rows: list[dict], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
        for row in rows:
            print("| " + " | ".join(cells(row)) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"every method, values by seed; n: {rows[0]['n']}")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)


if __name__ == "__main__":
    main()
