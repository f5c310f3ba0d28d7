"""One trial inside a worker group: build, train, monitor, evaluate, save. Knows torch.distributed at most, and no Ray.

Every worker of the lane calls `run` with the same spec; the verbs of engine, monitor and evaluation are collective.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator import config, faults
from orchestrator.config import Experiment
from orchestrator.data import system_prompts, tokens
from orchestrator.errors import JudgeError, NonFiniteLossError
from orchestrator.evaluation import ask, external, generate_vllm, sequential
from orchestrator.models import contents, copies, identity, saving
from orchestrator.records import LaneContext, Reporter, TrialResult, TrialSpec
from orchestrator.trial import files as trial_files
from orchestrator.trial import materials
from orchestrator.trial.train import train
from orchestrator.trial.trial_run import STOPPED, Clock, Stopped, TrialRun

if TYPE_CHECKING:
    from torch import nn

    from strategies.recipe import Recipe


def run(spec: TrialSpec, reporter: Reporter, context: LaneContext) -> TrialResult:
    """Run one trial and return its record; the same record on every worker.

    A training that becomes non-finite, a monitor's stop or a user's stop give a record with state `failed` or `stopped`. What is
    wrong with the request itself (ConfigError) or the machine (out of memory, disk full) is raised.
    """
    trial = _begun(spec, reporter, context)
    result = trial.result
    trial.tell({"kind": "phase", "phase": "setup", "step": 0})
    with trial.clock.part("setup"):
        trial.materials = materials.load(trial.experiment, context.cache)
        model, trial.tokenizer = copies.base(context.cache, trial.experiment.model, context.device)
    try:
        _run(trial, model)
    except Stopped as stop:
        result.state, result.error = "stopped", str(stop)
    except (NonFiniteLossError, JudgeError, FloatingPointError) as error:
        if faults.of(error) == "machine":  # a judge that cannot be reached: the lane says whether it is tried again
            raise
        result.state, result.error, result.fault = "failed", f"{type(error).__name__}: {error}", "trial"
    if result.error != STOPPED:
        trial.files.end()
    if trial.files.troubles:
        trial.facts["storage"] = trial.files.troubles
    result.seconds = trial.clock.total()
    trial.facts["peak_memory_mb"] = _peak_memory_mb(context)
    return result


def _begun(spec: TrialSpec, reporter: Reporter, context: LaneContext) -> TrialRun:
    experiment = experiment_of(spec)
    result = TrialResult(spec.trial_id, spec.recipe, dict(spec.params), spec.seed, spec.phase, "complete")
    files = trial_files.of(spec, experiment, context)
    _forget_peak(context)
    return TrialRun(replace(spec, dir=str(files.dir)), experiment, context, reporter, files, result, clock=Clock())


def _run(trial: TrialRun, model: nn.Module) -> None:
    """Train, evaluate, save."""
    baseline, recipe = trial.spec.phase == "baseline", None
    if not baseline:
        model, recipe = train(trial, model)
    with trial.clock.part("evaluate"):
        _evaluate(trial, model, recipe)
    if not baseline:
        with trial.clock.part("save"):
            _save(trial, model)
    with trial.clock.part("save"):
        trial.files.send_results()


def experiment_of(spec: TrialSpec) -> Experiment:
    """The experiment with this trial's own training fields in place."""
    raw = json.loads(json.dumps(spec.experiment))
    raw["training"] = {**raw["training"], **spec.training}
    return config.from_dict(raw)


def _evaluate(trial: TrialRun, model: nn.Module, recipe: Recipe | None) -> None:
    """Ask the model what this phase asks; everything goes into the record. `recipe`: None for the untouched model."""
    trial.tell({"kind": "phase", "phase": "evaluate", "step": trial.result.steps})
    experiment, spec, context = trial.experiment, trial.spec, trial.context
    own = experiment.model.system_prompt
    system_prompt = own if recipe is None else recipe.system_prompt(own)
    suites = trial.materials.asked_in(spec.phase)
    weights = generate_vllm.untouched(experiment) if recipe is None else None
    with generate_vllm.generator(model, trial.tokenizer, experiment, context.device, context.cache, weights) as generator:
        trial.facts.update(generate_vllm.facts(generator, model))
        how = ask.Asking(
            context.peers, wrap=recipe.wrap if recipe is not None and recipe.wraps else None, system_prompt=system_prompt,
            tests=sequential.tests_of(experiment, suites, spec.untouched, spec.trial_id), generator=generator,
        )  # fmt: skip
        task, results, answers = ask.evaluate(model, trial.tokenizer, experiment, suites, trial.materials.evaluation, how)
        if spec.phase != "search":
            trial.result.confirmation = ask.score_rows(model, trial.tokenizer, experiment, trial.materials.confirmation, how)
    trial.result.task, trial.result.suites = task, results
    outside = tuple(one for one in experiment.safety.external if spec.phase != "search" or one.phase == "always")
    measured = external.measure(model, trial.tokenizer, outside, context.peers)
    if measured:
        trial.facts["external"] = measured
    template = system_prompts.facts(trial.materials.train, own, own if recipe is None else trial.training_prompt, system_prompt)
    implicit = tokens.implicit_system_prompt(trial.tokenizer)
    trial.facts["template"] = {"hash": identity.template_hash(trial.tokenizer), "implicit_system_prompt": implicit, **template}
    if recipe is not None and recipe.wraps:
        trial.facts["strategies"] |= _added(recipe.inference_facts(), context)
    if answers is not None and context.rank == 0:
        ask.write_generations(trial.folder / "generations.jsonl", answers)


def _added(facts: dict[str, Any], context: LaneContext) -> dict[str, Any]:
    """Counts of defences at inference, {strategy: {fact: value}}, added up over the workers, each of which asks its share."""
    if context.world_size == 1:
        return facts
    shares = context.peers.gather(facts)
    return {name: {fact: sum(share[name][fact] for share in shares) for fact in values} for name, values in facts.items()}


def _save(trial: TrialRun, model: nn.Module) -> None:
    folder = trial.folder / "model"
    if trial.context.rank == 0:
        saving.save(model, trial.tokenizer, folder)
        trial.facts[contents.FACT] = contents.fact(folder)
    trial.result.model_dir = str(folder)


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
