"""One trial inside a worker group: build, train, guard, evaluate, save. Knows torch.distributed at most, and no Ray.

Every worker of the lane calls `run` with the same spec; the verbs of engine, guard and evaluation are collective.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import config, faults
from orchestrator.config import Experiment, seeds
from orchestrator.data import counts, system_prompts, tokens
from orchestrator.errors import JudgeError, NonFiniteLossError, TrialError
from orchestrator.evaluation import ask, external, generate_vllm, sequential
from orchestrator.models import copies, identity, saving
from orchestrator.records import LaneContext, Reporter, TrialResult, TrialSpec
from orchestrator.trial import files as trial_files
from orchestrator.trial import materials, reach, shared_training
from orchestrator.trial.monitor import Guard
from orchestrator.trial.training_data import training_data

STOPPED = "stopped on request"


class Stopped(Exception):
    """The trial ends before its last step, and why."""


class Clock:
    """Seconds by part of the trial."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self._start}


def run(spec: TrialSpec, reporter: Reporter, context: LaneContext) -> TrialResult:
    """Run one trial and return its record; the same record on every worker.

    A training that becomes non-finite, a monitor's stop or a user's stop give a record with state `failed` or `stopped`. What is
    wrong with the request itself (ConfigError) or the machine (out of memory, disk full) is raised.
    """
    experiment = experiment_of(spec)
    result = TrialResult(spec.trial_id, spec.recipe, dict(spec.params), spec.seed, spec.phase, "complete")
    files = trial_files.of(spec, experiment, context)
    spec = replace(spec, dir=str(files.dir))
    clock, teller = Clock(), _Teller(reporter, context, result)
    _forget_peak(context)
    teller.tell({"kind": "phase", "phase": "setup", "step": 0})
    with clock.part("setup"):
        found = materials.load(experiment, context.cache)
        model, tokenizer = copies.base(context.cache, experiment.model, context.device)
    trained, recipe = model, None
    try:
        if spec.phase != "baseline":
            trained, recipe = _train(spec, experiment, model, tokenizer, found, teller, context, clock, files)
        with clock.part("evaluate"):
            _evaluate(experiment, trained, tokenizer, found, recipe, teller, context, spec)
        if spec.phase != "baseline":
            with clock.part("save"):
                _save(spec, trained, tokenizer, result, context)
        with clock.part("save"):
            files.send_results()
    except Stopped as stop:
        result.state, result.error = "stopped", str(stop)
    except (NonFiniteLossError, JudgeError, FloatingPointError) as error:
        if faults.of(error) == "machine":  # a judge that cannot be reached: the lane says whether it is tried again
            raise
        result.state, result.error, result.fault = "failed", f"{type(error).__name__}: {error}", "trial"
    if result.error != STOPPED:
        files.end()
    if files.troubles:
        result.facts["storage"] = files.troubles
    result.seconds = clock.total()
    result.facts["peak_memory_mb"] = _peak_memory_mb(context)
    return result


def experiment_of(spec: TrialSpec) -> Experiment:
    """The experiment with this trial's own training fields in place."""
    raw = json.loads(json.dumps(spec.experiment))
    raw["training"] = {**raw["training"], **spec.training}
    return config.from_dict(raw)


class _Teller:
    """Reports on worker 0, keeps the history, and agrees with the other workers on whether to stop."""

    def __init__(self, reporter: Reporter, context: LaneContext, result: TrialResult):
        self.reporter, self.context, self.result = reporter, context, result
        self.training_prompt: str | None = None
        """System prompt of the rows trained on."""

    def tell(self, event: dict[str, Any]) -> None:
        """Raises Stopped on every worker where the reporter asks for it. Collective."""
        event = {"time": time.time(), **event}
        if event["kind"] != "phase":
            self.result.history.append(event)
        stop = bool(self.reporter.report(event)) if self.context.rank == 0 else False
        if self.context.world_size > 1:
            import torch.distributed as dist

            flag = [stop]
            dist.broadcast_object_list(flag, src=0)
            stop = flag[0]
        if stop:
            raise Stopped(STOPPED)


def _train(spec, experiment, model, tokenizer, found, teller, context, clock, files):
    """Train, or take up a training that another trial made, and return (whole trained model, recipe)."""
    import strategies.recipe

    facts = teller.result.facts
    with clock.part("setup"):
        guard = Guard(experiment, found.asked_in("search"), context, spec.dir, spec.seed)
        guard.baseline(model, tokenizer)
        recipe = strategies.recipe.build(spec.strategies, experiment.monitor.added)
        rows, facts["rows"] = training_data(experiment, tokenizer, found, context, spec.seed)
        facts["rows_read"] = counts.record(found.reports)
        rows = recipe.prepare_data(rows)
        teller.training_prompt = rows.system_prompt
        seed_everything(spec.seed)
        _leave_towers(model, facts)
        model = recipe.setup(model)
        facts.update(_counts(model))  # before ZeRO-3 leaves empty tensors in the model
        shared = shared_training.folder(spec, experiment, recipe, rows.fingerprint, context.world_size) if recipe.trains else None
        shared = files.home / "trained" / shared.name if shared is not None else None
        reuse = shared is not None and _all_of(files.kept(shared), context)
    if reuse:
        with clock.part("setup"):
            known = shared_training.read(shared, model)
        teller.result.steps, facts["training_of"] = known["steps"], known["trial_id"]
        facts["monitor"] = known["monitor"]
        if known["monitor"].get("escalated"):
            recipe.wake()
    else:
        if recipe.trains:
            model = _trained(spec, experiment, recipe, model, rows, guard, tokenizer, teller, context, clock, files)
        facts.setdefault("monitor", {})
        known = {"steps": teller.result.steps, "trial_id": spec.trial_id, "strategies": recipe.facts(training=True)}
        known["monitor"] = facts["monitor"]
        if shared is not None and context.rank == 0:
            shared_training.write(shared, model, known)
            files.send_trained(shared)
    with clock.part("save"):
        if context.rank == 0 and (left := reach.before_finish(model, recipe)):
            facts["untouched"] = left
        model = recipe.finish(model)
        facts["strategies"] = recipe.facts() | (known["strategies"] if reuse else {})
    return model, recipe


def _all_of(found: bool, context) -> bool:
    """Whether every worker found it: files may reach the others' view of a shared folder late, and all must train or none."""
    if context.world_size == 1:
        return found
    import torch.distributed as dist

    seen = [False] * context.world_size
    dist.all_gather_object(seen, found)
    return all(seen)


def _trained(spec, experiment, recipe, model, rows, guard, tokenizer, teller, context, clock, files):
    """The whole model after the last step, free of its engine."""
    with clock.part("setup"):
        if experiment.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        last = max_steps(experiment, len(rows.task), rows.batch_size)
        engine = make_engine(experiment, model, last, context)
    try:
        with clock.part("train"):
            _loop(spec, experiment, recipe, engine, rows, guard, tokenizer, teller, last, context, files)
            recipe.end(engine)
        with clock.part("save"):
            return engine.export()
    finally:
        teller.result.facts["monitor"] = guard.facts()
        engine.close()


def _loop(spec, experiment, recipe, engine, rows, guard, tokenizer, teller, last, context, files) -> None:
    settings, checkpoint = experiment.training, Path(spec.dir) / "checkpoint"
    again = bool(spec.attempt or spec.resumed)
    files.begin(again)
    step = _resume(spec, engine, recipe, guard, checkpoint, teller) if again else None
    if step is None:
        guard.start(engine, recipe, last)
        step = 0
    teller.result.steps = step  # a training whose monitor had ended it takes no further step
    teller.tell({"kind": "phase", "phase": "train", "step": step, "steps": last})
    started, done = time.perf_counter(), 0
    while step < last and not guard.ended:
        # seeded by step, so that dropout after a resume is what it would have been
        seed_everything(spec.seed, step, context.rank)
        metrics = recipe.step(engine, rows.batches(rows.task, step), step)
        metrics |= engine.step()
        metrics |= recipe.after_step(engine, step)
        step, done = step + 1, done + 1
        teller.result.steps = step
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLossError(f"the loss became {metrics['loss']} at step {step}; lower training.learning_rate or set training.max_grad_norm")
        if step % settings.logging_steps == 0 or step == last:
            seconds = (time.perf_counter() - started) / done
            teller.tell({"kind": "train", "step": step, "steps": last, "seconds_per_step": seconds, **metrics})
        after = guard.look(engine, recipe, tokenizer, step, last, teller.tell)
        if after.stop:
            raise Stopped(after.stop)
        step = teller.result.steps = after.step
        if settings.save_steps and (step % settings.save_steps == 0 or after.moved) and step < last:
            _checkpoint(engine, recipe, guard, checkpoint, step, teller, files)


def _checkpoint(engine, recipe, guard, folder: Path, step: int, teller, files) -> None:
    """What an interrupted trial continues from: engine shards, strategies' and monitor's state, history."""
    engine.save(folder, {"step": step, "strategies": recipe.state_dict(), "monitor": guard.state_dict(), "history": teller.result.history})
    trouble = files.send_checkpoint()
    if trouble is not None:
        teller.tell({"kind": "log", "step": step, "storage": trouble})


def _resume(spec, engine, recipe, guard, folder: Path, teller) -> int | None:
    """Step to continue from; None where the interrupted attempt left no checkpoint."""
    extra = engine.load(folder)
    if engine.load_trouble is not None:
        teller.result.facts["checkpoint"] = engine.load_trouble
        teller.tell({"kind": "log", "step": 0 if extra is None else extra["step"], "storage": engine.load_trouble})
    if extra is None:
        return None
    guard.load_state_dict(extra["monitor"], recipe)
    recipe.load_state_dict(extra["strategies"])
    teller.result.history[:0] = extra["history"]
    teller.result.facts["resumed_from_step"] = extra["step"]
    return int(extra["step"])


def _evaluate(experiment, model, tokenizer, found, recipe, teller, context, spec) -> None:
    teller.tell({"kind": "phase", "phase": "evaluate", "step": teller.result.steps})
    own = experiment.model.system_prompt
    system_prompt = own if recipe is None else recipe.system_prompt(own)
    suites = found.asked_in(spec.phase)
    weights = generate_vllm.untouched(experiment) if recipe is None else None
    with generate_vllm.generator(model, tokenizer, experiment, context.device, context.cache, weights) as generator:
        teller.result.facts |= generate_vllm.facts(generator, model)
        task, results, answers = ask.evaluate(
            model, tokenizer, experiment, suites=suites, task_rows=found.evaluation,
            rank=context.rank, world_size=context.world_size, wrap=recipe.wrap if recipe is not None and recipe.wraps else None,
            system_prompt=system_prompt, tests=sequential.tests_of(experiment, suites, spec.untouched, spec.trial_id), generator=generator,
        )  # fmt: skip
    teller.result.task, teller.result.suites = task, results
    outside = tuple(one for one in experiment.safety.external if spec.phase != "search" or one.phase == "always")
    measured = external.measure(model, tokenizer, outside, rank=context.rank, world_size=context.world_size)
    if measured:
        teller.result.facts["external"] = measured
    template = system_prompts.facts(found.train, own, own if recipe is None else teller.training_prompt, system_prompt)
    implicit = tokens.implicit_system_prompt(tokenizer)
    teller.result.facts["template"] = {"hash": identity.template_hash(tokenizer), "implicit_system_prompt": implicit, **template}
    if recipe is not None and recipe.wraps:
        teller.result.facts["strategies"] |= _added(recipe.inference_facts(), context)
    if answers is not None and context.rank == 0:
        ask.write_generations(Path(spec.dir) / "generations.jsonl", answers)


def _added(facts: dict[str, Any], context) -> dict[str, Any]:
    """Counts of defences at inference, {strategy: {fact: value}}, added up over the workers, each of which asks its share."""
    if context.world_size == 1:
        return facts
    import torch.distributed as dist

    shares: list[Any] = [None] * context.world_size
    dist.all_gather_object(shares, facts)
    return {name: {fact: sum(share[name][fact] for share in shares) for fact in values} for name, values in facts.items()}


def _save(spec, model, tokenizer, result: TrialResult, context) -> None:
    folder = Path(spec.dir) / "model"
    if context.rank == 0:
        saving.save(model, tokenizer, folder)
    result.model_dir = str(folder)


def max_steps(experiment: Experiment, rows: int, batch_size: int) -> int:
    """`training.max_steps`, or the optimiser steps of `num_train_epochs` passes; at least 1."""
    if experiment.training.max_steps is not None:
        return experiment.training.max_steps
    return max(1, math.ceil(rows * experiment.training.num_train_epochs / batch_size))


def make_engine(experiment: Experiment, model, last: int, context: LaneContext):
    """The engine `training.engine` names, around a model that is set up."""
    common = {"rank": context.rank, "world_size": context.world_size, "device": context.device, "max_steps": last}
    if experiment.training.engine == "plain":
        from strategies.plain import PlainEngine

        return PlainEngine(model, training=experiment.training, **common)
    from orchestrator.trial.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, training=experiment.training, deepspeed=experiment.deepspeed, **common)


def seed_everything(seed: int, step: int = 0, rank: int = 0) -> None:
    """Seed torch for (seed, step, worker)."""
    import torch

    torch.manual_seed(seeds.of_64_bits((seed * 1_000_003 + step) * 1009 + rank))


def _leave_towers(model, facts: dict[str, Any]) -> None:
    """Freeze what no text passes, so that weight decay cannot shrink it, and say so."""
    from strategies import blocks

    towers = blocks.unread(model)
    for parameter in towers.values():
        parameter.requires_grad_(False)
    if towers:
        facts["parameters_no_text_passes"] = sum(parameter.numel() for parameter in towers.values())


def _counts(model) -> dict[str, int]:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise TrialError("every parameter is frozen, so nothing can be trained; narrow freeze_layers or add lora")
    return {"trainable_parameters": trainable, "parameters": sum(p.numel() for p in model.parameters())}


def _forget_peak(context: LaneContext) -> None:
    """A GPU's peak is told per trial, not per lane."""
    if context.device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_memory_mb(context: LaneContext) -> float:
    """Peak memory of this worker's device (GPU) or process (CPU), MiB; the process's peak includes earlier trials of the lane."""
    if context.device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
