"""The training of a trial: set up by the recipe, stepped under the monitor, checkpointed, resumed, finished; or taken
from a trial that trained alike."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment, seeds
from orchestrator.data import counts
from orchestrator.errors import NonFiniteLossError, TrialError
from orchestrator.records import LaneContext
from orchestrator.trial import reach, shared_training
from orchestrator.trial.early_end import EarlyEnd
from orchestrator.trial.monitor import Guard
from orchestrator.trial.training_data import training_data
from orchestrator.trial.trial_run import Stopped, TrialRun

if TYPE_CHECKING:
    from torch import nn

    from strategies.base import TrainingData
    from strategies.plain import PlainEngine
    from strategies.recipe import Recipe


@dataclass
class Training:
    """What a training is made of."""

    recipe: Recipe
    guard: Guard
    early: EarlyEnd
    rows: TrainingData
    last: int = 0
    """Its last step."""


def train(run: TrialRun, model: nn.Module) -> tuple[nn.Module, Recipe]:
    """Train, or take up a training that another trial made, and return (whole trained model, recipe). Collective."""
    with run.clock.part("setup"):
        made, model = _set_up(run, model)
        shared = _shared(run, made)
        reuse = shared is not None and run.context.peers.agree(run.files.kept(shared))
    known = _taken_up(run, made, model, shared) if reuse and shared is not None else None
    if known is None:
        if made.recipe.trains:
            model = _trained(run, made, model)
        run.facts.setdefault("monitor", {})
        mine = {"steps": run.result.steps, "trial_id": run.spec.trial_id, "strategies": made.recipe.facts(training=True)}
        mine["monitor"] = run.facts["monitor"]
        if shared is not None and run.context.rank == 0:
            shared_training.write(shared, model, mine)
            run.files.send_trained(shared)
    with run.clock.part("save"):
        if run.context.rank == 0 and (left := reach.before_finish(model, made.recipe)):
            run.facts["untouched"] = left
        model = made.recipe.finish(model)
        run.facts["strategies"] = made.recipe.facts() | (known["strategies"] if known is not None else {})
    return model, made.recipe


def _set_up(run: TrialRun, model: nn.Module) -> tuple[Training, nn.Module]:
    """(what is to be trained with, the model as the recipe makes it)."""
    import strategies.recipe

    guard = Guard(run.experiment, run.materials.asked_in("search"), run.context, run.folder, run.spec.seed)
    guard.baseline(model, run.tokenizer)
    early = EarlyEnd(run.experiment, run.materials.asked_in("search"), run.context, run.spec)
    early.baseline(model, run.tokenizer)
    recipe = strategies.recipe.build(run.spec.strategies, run.experiment.monitor.added)
    rows, run.facts["rows"] = training_data(run.experiment, run.tokenizer, run.materials, run.context, run.spec.seed)
    run.facts["rows_read"] = counts.record(run.materials.reports)
    rows = recipe.prepare_data(rows)
    run.training_prompt = rows.system_prompt
    seed_everything(run.spec.seed)
    _leave_towers(model, run.facts)
    model = recipe.setup(model)
    run.facts.update(_counts(model))  # before ZeRO-3 leaves empty tensors in the model
    return Training(recipe, guard, early, rows), model


def _shared(run: TrialRun, made: Training) -> Path | None:
    """Where the training of this trial is kept for others with the same one; None for a recipe that does not train."""
    if not made.recipe.trains:
        return None
    found = shared_training.folder(run.spec, run.experiment, made.recipe, made.rows.fingerprint, run.context.world_size)
    return run.files.home / "trained" / found.name if found is not None else None


def _taken_up(run: TrialRun, made: Training, model: nn.Module, shared: Path) -> dict[str, Any]:
    """Put the weights of another trial's training into the model; what that trial said of it."""
    with run.clock.part("setup"):
        known = shared_training.read(shared, model)
    run.result.steps, run.facts["training_of"] = known["steps"], known["trial_id"]
    run.facts["monitor"] = known["monitor"]
    if known["monitor"].get("escalated"):
        made.recipe.wake()
    return known


def _trained(run: TrialRun, made: Training, model: nn.Module) -> nn.Module:
    """The whole model after the last step, free of its engine."""
    with run.clock.part("setup"):
        if run.experiment.training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        made.last = max_steps(run.experiment, len(made.rows.task), made.rows.batch_size)
        made.early.start(made.last)
        engine = make_engine(run.experiment, model, made.last, run.context)
    try:
        with run.clock.part("train"):
            _loop(run, made, engine)
            made.recipe.end(engine)
        with run.clock.part("save"):
            return engine.export()
    finally:
        run.facts["monitor"] = made.guard.facts()
        engine.close()


def _loop(run: TrialRun, made: Training, engine: PlainEngine) -> None:
    settings, last, guard = run.experiment.training, made.last, made.guard
    step = _begun(run, made, engine)
    run.tell({"kind": "phase", "phase": "train", "step": step, "steps": last})
    started, done = time.perf_counter(), 0
    while step < last and not guard.ended:
        metrics = _stepped(run, made, engine, step)
        step, done = step + 1, done + 1
        run.result.steps = step
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLossError(f"the loss became {metrics['loss']} at step {step}; lower training.learning_rate or set training.max_grad_norm")
        if step % settings.logging_steps == 0 or step == last:
            seconds = (time.perf_counter() - started) / done
            run.tell({"kind": "train", "step": step, "steps": last, "seconds_per_step": seconds, **metrics})
        after = guard.look(engine, made.recipe, run.tokenizer, step, last, run.tell)
        if after.stop:
            raise Stopped(after.stop)
        hopeless = made.early.look(engine, made.recipe, run.tokenizer, step, run.tell)
        if hopeless:
            raise Stopped(hopeless)
        step = run.result.steps = after.step
        if settings.save_steps and (step % settings.save_steps == 0 or after.moved) and step < last:
            _checkpoint(run, made, engine, step)


def _begun(run: TrialRun, made: Training, engine: PlainEngine) -> int:
    """The step to go on from: that of the checkpoint of an interrupted attempt, or 0."""
    again = bool(run.spec.attempt or run.spec.resumed)
    run.files.begin(again)
    step = _resume(run, made, engine) if again else None
    if step is None:
        made.guard.start(engine, made.recipe, made.last)
        step = 0
    run.result.steps = step  # a training whose monitor had ended it takes no further step
    return step


def _stepped(run: TrialRun, made: Training, engine: PlainEngine, step: int) -> dict[str, float]:
    """Take one optimiser step; its metrics. Seeded by step, so that dropout after a resume is what it would have been."""
    seed_everything(run.spec.seed, step, run.context.rank)
    metrics = made.recipe.step(engine, made.rows.batches(made.rows.task, step), step)
    metrics |= engine.step()
    metrics |= made.recipe.after_step(engine, step)
    return metrics


def _checkpoint(run: TrialRun, made: Training, engine: PlainEngine, step: int) -> None:
    """What an interrupted trial continues from: engine shards, strategies' and monitor's state, history."""
    watching = {"monitor": made.guard.state_dict(), "early_end": made.early.state_dict()}
    state = {"step": step, "strategies": made.recipe.state_dict(), **watching, "history": run.result.history}
    engine.save(run.folder / "checkpoint", state)
    trouble = run.files.send_checkpoint()
    if trouble is not None:
        run.tell({"kind": "log", "step": step, "storage": trouble})


def _resume(run: TrialRun, made: Training, engine: PlainEngine) -> int | None:
    """Step to continue from; None where the interrupted attempt left no checkpoint."""
    extra = engine.load(run.folder / "checkpoint")
    if engine.load_trouble is not None:
        run.facts["checkpoint"] = engine.load_trouble
        run.tell({"kind": "log", "step": 0 if extra is None else extra["step"], "storage": engine.load_trouble})
    if extra is None:
        return None
    made.guard.load_state_dict(extra["monitor"], made.recipe)
    made.early.load_state_dict(extra.get("early_end"))
    made.recipe.load_state_dict(extra["strategies"])
    run.result.history[:0] = extra["history"]
    run.facts["resumed_from_step"] = extra["step"]
    return int(extra["step"])


def max_steps(experiment: Experiment, rows: int, batch_size: int) -> int:
    """`training.max_steps`, or the optimiser steps of `num_train_epochs` passes; at least 1."""
    if experiment.training.max_steps is not None:
        return experiment.training.max_steps
    return max(1, math.ceil(rows * experiment.training.num_train_epochs / batch_size))


def make_engine(experiment: Experiment, model: nn.Module, last: int, context: LaneContext) -> PlainEngine:
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


def _leave_towers(model: nn.Module, facts: dict[str, Any]) -> None:
    """Freeze what no text passes, so that weight decay cannot shrink it, and say so."""
    from strategies import blocks

    towers = blocks.unread(model)
    for parameter in towers.values():
        parameter.requires_grad_(False)
    if towers:
        facts["parameters_no_text_passes"] = sum(parameter.numel() for parameter in towers.values())


def _counts(model: nn.Module) -> dict[str, int]:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise TrialError("every parameter is frozen, so nothing can be trained; narrow freeze_layers or add lora")
    return {"trainable_parameters": trainable, "parameters": sum(p.numel() for p in model.parameters())}
