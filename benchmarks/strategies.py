"""What each strategy costs: time of a step, how near that is to the passes it cannot do without, memory, and what comes before and after.

    python benchmarks/strategies.py [--only NAME ...] [--base lora] [--zero-stage N] [--steps N] [--hidden N --layers N] [--markdown] [--json FILE]

On the embedded model and its rows (or `--config`; `--hidden` and `--layers` put a fresh model of that size in its place), one row per
registered strategy at its default knobs. Times are this process's CPU seconds on one thread, which other work on the machine does not
lengthen as it does wall time (`--json` holds both):

- step ratio: time of an optimiser step over that of plain fine-tuning (`--base lora`: of plain LoRA training). The two trainings live
  side by side in one process and take turns, step by step, so that whatever slows one slows both; the median over turns.
- passes: forwards / backwards of a step (a backward to leaf vectors alone, no parameter gradients, counts as "leaf").
- floor: time of just those passes, replayed on the very batches of the method's steps with a bare model (cross-entropy, backward, no
  engine, no optimiser), in the same turns; in plain steps. `step / floor` is what the method adds to its passes, the optimiser's step
  and clipping included. The bar for safegrad is 1.15.
- memory ratio: peak of live tensors (allocator events) of set-up and three steps over plain's; needs no turn-taking, it is exact.
- set-up and finish: seconds once per training, of a lane's first trial (later trials share what depends on the untouched model alone).
- finish / step: what comes after training, in plain steps. finish memory: peak of live tensors in it, beyond the trained model, in
  sizes of that model (weights that are read from files beside it are counted from when they are tensors); not of a finish over 3 s.

Strategies that act only after training or at inference take plain steps, which are not timed: their cost is `finish`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BAR = 1.15
HEADINGS = (
    "strategy", "step ratio", "passes", "floor", "step / floor", "memory ratio", "set-up s", "finish s", "finish / step", "finish memory",
)  # fmt: skip
PROFILED = 3.0
"""Seconds of a finish up to which its memory is measured: the profiler keeps every operation of it."""
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="strategies, by name")
    parser.add_argument("--base", choices=("full", "lora"), default="full", help="what every method is put on, and compared with")
    parser.add_argument("--zero-stage", type=int, help="time DeepSpeed at this stage instead of the plain engine")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a method")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model that --layers asks for")
    parser.add_argument("--layers", type=int, help="time a fresh model of this depth instead of the configured one")
    parser.add_argument("--config", default="pocket", help="preset or YAML file")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    import strategies

    torch.set_num_threads(1)
    world = World(args)
    rows = []
    for name in args.only or strategies.STRATEGIES:
        if name not in strategies.STRATEGIES:
            raise SystemExit(f"unknown strategy {name!r}; known: {', '.join(strategies.STRATEGIES)}")
        rows.append(world.row(name))
        print(" | ".join(cells(rows[-1])), file=sys.stderr, flush=True)
        if args.json:  # after every row: what was measured is kept where the rest is not waited for
            said = {"rows": rows, "base": args.base, "model": world.size(), "load": os.getloadavg(), "cpus": os.cpu_count()}
            args.json.write_text(json.dumps(said, indent=1) + "\n")
    show(rows, args)


def recorder(engine_class):
    """The engine, with a record of the passes of a step: [kind, inputs], kind one of forward, backward, leaf."""

    class Recorder(engine_class):
        passes: list = []

        def _call(self, **inputs):
            self.passes.append(["forward", inputs])
            return super()._call(**inputs)

        def _aside(self, **inputs):
            before = len(self.passes)
            output = super()._aside(**inputs)
            self.passes[before:] = [["leaf", inputs]]
            return output

        def _backward(self, loss, last):
            self.passes[-1][0] = "backward"
            super()._backward(loss, last)

    return Recorder


class World:
    """Model, rows and engine of the comparison."""

    def __init__(self, args):
        from orchestrator import config
        from orchestrator.records import LaneContext
        from orchestrator.trial import materials

        self.args, self.context = args, LaneContext()
        self.base_peak: int | None = None
        self.experiment = config.load(args.config, ["recipes=[[full]]"])
        self.found = materials.load(self.experiment, self.context.cache)

    def row(self, name: str) -> dict:
        recipe = [name] if self.args.base == "full" or name in ("lora", "full") else ["lora", name]
        try:
            return {"strategy": name, "recipe": recipe, **self.measure(recipe)}
        except Exception as error:  # one method's refusal is a row of the table, not the end of it
            return {"strategy": name, "recipe": recipe, "error": f"{type(error).__name__}: {error}"}

    def measure(self, recipe: list[str]) -> dict:
        plain, method = Training(self, self.base), Training(self, recipe, replays=True)
        for step in range(2):  # the first steps allocate
            plain.step(step), method.step(step)
        times: dict[str, list[dict[str, float]]] = {"plain": [], "method": [], "floor": []}
        for step in range(2, 2 + self.args.steps):
            times["plain"].append(plain.step(step))
            if method.differs:
                times["method"].append(method.step(step))
                times["floor"].append(method.replay())
        plain_step = median(times["plain"])
        found = {"plain_step_s": plain_step, "setup_s": method.setup_seconds, "steps": self.args.steps}
        if method.differs:
            found["passes"] = method.counted()
            for clock in CLOCKS:
                found[clock] = {
                    "step_ratio": ratio(times["method"], times["plain"], clock), "floor": ratio(times["floor"], times["plain"], clock),
                    "step_over_floor": ratio(times["method"], times["floor"], clock),
                }  # fmt: skip
        found["finish_s"] = method.finish()
        found["finish_steps"] = found["finish_s"]["cpu"] / plain_step["cpu"]
        plain.finish()
        del plain, method
        if "passes" in found:
            if self.base_peak is None:
                self.base_peak = peak_of(lambda: three_steps(Training(self, self.base)))
            found["memory_ratio"] = peak_of(lambda: three_steps(Training(self, recipe))) / self.base_peak
        if found["finish_s"]["cpu"] < PROFILED:
            found["finish_memory"] = self.finish_memory(recipe)
        return found

    def finish_memory(self, recipe: list[str]) -> float:
        """Peak of live tensors after the last step, beyond the model, in sizes of the model."""
        training = three_steps(Training(self, recipe), close=False)
        training.recipe.end(training.engine)
        model = training.engine.export()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return peak_of(lambda: training.recipe.finish(model)) / size

    def size(self) -> dict[str, int]:
        model = self.rows_and_model()[1]
        return {"parameters": sum(p.numel() for p in model.parameters()), "layers": model.config.num_hidden_layers}

    @property
    def base(self) -> list[str]:
        return [] if self.args.base == "full" else ["lora"]

    def rows_and_model(self):
        """(fresh training rows with a cache of their own, fresh model)."""
        from orchestrator.models import copies
        from orchestrator.trial import training_data

        model, tokenizer = copies.base(self.context.cache, self.experiment.model)
        if self.args.layers:
            model = resized(model, self.args.hidden, self.args.layers)
        rows, _ = training_data.training_data(self.experiment, tokenizer, self.found, self.context, 0)
        # what methods remember per lane is made anew: set-up is that of a lane's first trial
        rows.cache = dict(self.context.cache)
        if self.args.layers:
            rows.weights = {role: dict(model.state_dict()) for role in rows.weights}
            rows.fingerprint += f" {self.args.hidden} {self.args.layers}"
        return rows, model


class Training:
    """One training that takes a step when asked, and a bare model beside it that replays the step's passes."""

    def __init__(self, world: World, recipe: list[str], replays: bool = False):
        import copy

        import torch

        import strategies.recipe
        from strategies.plain import PlainEngine

        self.recipe = strategies.recipe.build([(name, {}) for name in recipe])
        rows, model = world.rows_and_model()
        self.rows = self.recipe.prepare_data(rows)
        clock = Clock()
        torch.manual_seed(0)
        model = self.recipe.setup(model)
        self.setup_seconds = clock.read()
        self.differs = any(part.changes_training for part in self.recipe.strategies)
        self._bare = copy.deepcopy(model).train() if replays else None
        settings = {"training": world.experiment.training, "max_steps": 2 + world.args.steps}
        if world.args.zero_stage is None:
            self.engine = recorder(PlainEngine)(model, **settings)
        else:
            from orchestrator.trial.engine.deepspeed import DeepSpeedEngine

            stage = world.args.zero_stage
            strategies.recipe.check([(name, {}) for name in recipe], stage, 1, None, set(strategies.recipe.NEEDS))
            self.engine = recorder(DeepSpeedEngine)(model, deepspeed={"zero_optimization": {"stage": stage}}, **settings)

    def step(self, step: int) -> dict[str, float]:
        self.engine.passes = []
        batches = self.rows.batches(self.rows.task, step)
        clock = Clock()
        self.recipe.step(self.engine, batches, step)
        self.engine.step()
        self.recipe.after_step(self.engine, step)
        return clock.read()

    def counted(self) -> dict[str, int]:
        """Passes of the last step by kind: every one is a forward, `backward` and `leaf` are how many of them went back, and how."""
        kinds = [kind for kind, _ in self.engine.passes]
        return {"forward": len(kinds), "backward": kinds.count("backward"), "leaf": kinds.count("leaf")}

    def replay(self) -> dict[str, float]:
        """Seconds of the last step's passes on a bare copy of the model."""
        clock = Clock()
        for kind, inputs in self.engine.passes:
            self._pass(kind, inputs)
        return clock.read()

    def _pass(self, kind: str, inputs: dict) -> None:
        import torch

        from strategies.base import lm_loss

        batch = inputs | {"labels": inputs["input_ids"]}
        batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        if kind == "backward":
            total, units = lm_loss(lambda **given: self._bare(use_cache=False, **given), batch)
            (total / units).backward()
            for parameter in self._bare.parameters():
                parameter.grad = None
        elif kind == "forward":
            with torch.no_grad():
                lm_loss(lambda **given: self._bare(use_cache=False, **given), batch)
        else:  # to the input's embeddings: all of the backward but the parameters' own gradients
            hidden = self._bare.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            ask = {"inputs_embeds": hidden, "attention_mask": batch["attention_mask"], "use_cache": False}
            total, units = lm_loss(lambda **given: self._bare(**ask), batch)
            torch.autograd.grad(total / units, hidden)

    def finish(self) -> dict[str, float]:
        """Seconds of everything after the last step; the engine is gone."""
        clock = Clock()
        self.recipe.end(self.engine)
        self.recipe.finish(self.engine.export())
        seconds = clock.read()
        self.engine.close()
        self._bare = None
        return seconds


class Clock:
    """Seconds since it was made, by every clock."""

    def __init__(self):
        self.started = {name: clock() for name, clock in CLOCKS.items()}

    def read(self) -> dict[str, float]:
        return {name: clock() - self.started[name] for name, clock in CLOCKS.items()}


def median(times: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(time[name] for time in times) for name in CLOCKS}


def ratio(a: list[dict[str, float]], b: list[dict[str, float]], clock: str) -> float:
    """Median over turns of a / b: the two of a turn ran right after one another."""
    return statistics.median(x[clock] / y[clock] for x, y in zip(a, b, strict=True))


def resized(model, hidden: int, layers: int):
    """A fresh model of the same architecture and vocabulary, `hidden` wide with heads of 64 and `layers` deep."""
    import torch

    changes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    return type(model)(type(model.config)(**{**model.config.to_dict(), **changes})).train(model.training)


def three_steps(training: Training, close: bool = True) -> Training:
    for step in range(3):
        training.step(step)
    if close:
        training.engine.close()
    return training


def peak_of(work) -> int:
    """Most bytes of live tensors while `work()` runs, above what there was before."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        work()
    live = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def cells(row: dict) -> list[str]:
    if "error" in row:
        return [row["strategy"], row["error"][:90], *[""] * (len(HEADINGS) - 2)]
    memory = f"{row['finish_memory']:.2f}" if "finish_memory" in row else "-"
    finish = [f"{row['setup_s']['cpu']:.2f}", f"{row['finish_s']['cpu']:.2f}", f"{row['finish_steps']:.1f}", memory]
    if "passes" not in row:
        return [row["strategy"], "plain", *["-"] * 4, *finish]
    passes, ratios = row["passes"], row["cpu"]
    leaf = f", {passes['leaf']} leaf" if passes["leaf"] else ""
    return [
        row["strategy"], f"{ratios['step_ratio']:.2f}", f"{passes['forward']} fwd, {passes['backward']} bwd{leaf}", f"{ratios['floor']:.2f}",
        f"{ratios['step_over_floor']:.2f}", f"{row['memory_ratio']:.2f}", *finish,
    ]  # fmt: skip


def show(rows: list[dict], args) -> None:
    if args.markdown:
        print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
        for row in rows:
            print("| " + " | ".join(cells(row)) + " |")
    else:
        from rich.console import Console
        from rich.table import Table

        engine = "plain engine" if args.zero_stage is None else f"DeepSpeed stage {args.zero_stage}"
        table = Table(*HEADINGS, title=f"What strategies cost on {args.base} training, {args.config}, {engine}")
        for row in rows:
            table.add_row(*cells(row))
        Console(width=140).print(table)
    for row in rows:
        if row["strategy"] == "safegrad" and "error" not in row:
            cpu, wall = (row[clock]["step_over_floor"] for clock in CLOCKS)
            print(f"safegrad: {cpu:.2f} x its forward/backward passes by CPU time, {wall:.2f} x by wall time (bar {BAR})")


if __name__ == "__main__":
    main()
