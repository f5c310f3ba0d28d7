"""What must hold before a device is taken: names, knobs, combinations, data, model, folders. Every refusal is one sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config import Experiment, deepspeed, recipe_items
from orchestrator.data import made_up
from orchestrator.errors import ConfigError, StorageError, UnknownNameError
from orchestrator.evaluation import held_out
from orchestrator.experiment import checks_settings, places
from orchestrator.lanes import capacity
from orchestrator.storage import cache, ownership, ownership_checks
from orchestrator.trial.materials import Materials

MIN_FREE_BYTES = 200 * 2**20


@dataclass
class Checked:
    """What the checks found out on the way."""

    num_layers: int | None = None
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    """What a run's record keeps: `overlaps` and `fits`, as plain values."""


def check(experiment: Experiment, *, build_pocket: bool = True, resumed: bool = False) -> Checked:
    """Check everything that can be known without a cluster. Raises ConfigError (or a subclass), StorageError.

    With `build_pocket` false and an embedded world that was never built, the model and data of the pocket world are taken on trust. A run
    that is `resumed` is not refused for contaminated suites: its verdicts on them stay undecided.
    """
    from orchestrator.experiment import checks_suites
    from orchestrator.trial import materials

    found = Checked()
    check_names(experiment)
    made_up.refuse(experiment)
    check_combinations(experiment)
    found.facts += made_up.facts(experiment)
    if experiment.training.engine == "deepspeed":
        found.warnings += deepspeed.warnings(experiment.deepspeed) + _slow_host(experiment)
    if not (experiment.ray.address or os.environ.get("RAY_ADDRESS")):
        found.facts.append(capacity.plan(experiment, [capacity.this_machine()], experiment.search.trials).sentence)
    trusted = uses_pocket(experiment) and not build_pocket and not pocket_built()
    if trusted:
        found.facts.append("the pocket world is built on the first run; its model and data were not looked at")
        checks_settings.check_before_building(experiment)
    else:
        found.num_layers, slower = check_model(experiment)
        found.warnings += slower
        found.facts += check_data(experiment)
        able, unable = checks_suites.decidable(experiment)
        found.facts += able
        found.warnings += materials.warnings(materials.load(experiment)) + check_templates(experiment)
        facts, doubts = check_texts(experiment)
        found.facts += facts
        found.warnings += doubts + unable + check_sequential(experiment)
    if experiment.search.trials < len(experiment.recipes):
        found.warnings.append(
            f"search.trials={experiment.search.trials} is less than the {len(experiment.recipes)} recipes, so the last ones get no trial; raise it"
        )
    found.warnings += check_held_out(experiment)
    found.warnings += check_recipes(experiment, found.num_layers)
    if not trusted:
        check_evidence(experiment, found, resumed=resumed)
    return found


def _slow_host(experiment: Experiment) -> list[str]:
    """A warning where the optimizer's step on the host would be left to one thread while GPUs wait."""
    threads, cpus = experiment.training.torch_threads, experiment.ray.cpus_per_worker
    if not (experiment.ray.use_gpu and threads == 1 and deepspeed.offloaded(experiment.deepspeed, "offload_optimizer")):
        return []
    wanted = f"training.torch_threads={int(cpus)}" if cpus >= 2 else "ray.cpus_per_worker and training.torch_threads to 4 or more"
    return [f"with offload_optimizer AdamW runs on the CPU, and training.torch_threads=1 leaves it one thread; set {wanted}"]


def uses_pocket(experiment: Experiment) -> bool:
    """Whether any source of the experiment is the embedded world."""
    sources = [experiment.model.model_name_or_path, experiment.task.data, experiment.task.eval_data, experiment.safety.data]
    sources += [experiment.model.unaligned_name_or_path, experiment.safety.harmful_data]
    sources += [suite.data for suite in experiment.safety.suites]
    return any(source is not None and (source == "pocket" or source.startswith("pocket:")) for source in sources)


def pocket_built() -> bool:
    """Whether the embedded world is in the cache."""
    from orchestrator import pocket

    return pocket.is_built()


def check_names(experiment: Experiment) -> None:
    """Strategies, judge and metric are registered."""
    import strategies
    from orchestrator.evaluation import external, metrics
    from orchestrator.evaluation.judges import registry

    for recipe in experiment.recipes:
        for name, _ in recipe_items(recipe):
            if name not in strategies.STRATEGIES:
                raise UnknownNameError("strategy", name, strategies.STRATEGIES)
    checks_settings.check_escalation(experiment)
    checks_settings.check_attention(experiment)
    for setting in (experiment.safety.judge, experiment.safety.second_judge):
        if setting not in (None, "auto", "none"):
            registry.from_setting(setting)
    external.check(experiment.safety.external)
    metrics.check_metric(experiment.task.metric)


def check_combinations(experiment: Experiment) -> None:
    """Sections that contradict each other."""
    training = experiment.training
    cache.opened()  # an address that cannot be used is refused now
    _check_suites(experiment)
    if experiment.output_address is not None and experiment.search.storage:
        raise ConfigError(
            f"search.storage={experiment.search.storage} lies on this machine, but output.dir={experiment.output_place} is meant to outlive it; "
            "leave search.storage out: the study then lies with the results"
        )
    check_generation(experiment)
    checks_settings.check_database(experiment)
    if training.engine == "plain" and experiment.ray.num_workers > 1:
        raise ConfigError(f"training.engine=plain trains on one worker, but ray.num_workers={experiment.ray.num_workers}; use deepspeed")
    if experiment.search.sampler == "nsga2" and experiment.monitor.actions - {"log"}:
        raise ConfigError(
            "search.sampler=nsga2 cannot be used with a monitor that may stop a trial: its population is built from finished trials only and "
            "would never learn from stopped ones; use tpe or gp, or monitor.on_breach=log (and that of monitor.quick)"
        )
    if training.engine == "deepspeed":
        from orchestrator.trial.engine import deepspeed as engine

        engine.validate(experiment.deepspeed, training, experiment.ray.num_workers)
    settings = experiment.ray
    if settings.use_gpu and settings.gpus_per_worker < 1 and settings.num_workers > 1:
        raise ConfigError(
            f"ray.gpus_per_worker={settings.gpus_per_worker:g} may put two of a lane's {settings.num_workers} workers onto one GPU, where NCCL"
            " refuses to talk; set ray.gpus_per_worker=1, or ray.num_workers=1 to share a GPU between lanes"
        )


def check_generation(experiment: Experiment) -> None:
    """What is to write the answers can be had. Raises ConfigError."""
    from orchestrator.evaluation import generate_vllm

    generate_vllm.chosen(experiment.safety.generation, "cuda" if experiment.ray.use_gpu else "cpu")


def _check_suites(experiment: Experiment) -> None:
    suites, search = experiment.safety.suites, experiment.search
    if not any(s.kind == "harmful" and s.constrains and s.phase == "always" for s in suites):
        raise ConfigError("safety.suites holds no suite of kind harmful that constrains, so degradation cannot be limited; add one")
    held_out = [s.name for s in suites if s.phase == "confirm" and s.constrains]
    held_out += [one.name for one in experiment.safety.external if one.phase == "confirm" and one.max_drop is not None]
    if held_out and not _confirms(experiment):
        raise ConfigError(
            f"safety.suites {', '.join(held_out)} wait for confirmation (phase: confirm), but nothing is confirmed with search.seeds="
            f"{len(search.seeds)} and search.finalists={search.finalists}; set search.seeds=2 and search.finalists=1 or more, or "
            "their phase: always, or constrains: false"
        )


def _confirms(experiment: Experiment) -> bool:
    search = experiment.search
    return bool(search.finalists) and (len(search.seeds) > 1 or experiment.safety.sequential.enabled)


def check_held_out(experiment: Experiment) -> list[str]:
    """Warnings where what is held out, and no limit, will be asked of the untouched model only."""
    names = [one.name for one in (*experiment.safety.suites, *experiment.safety.external) if one.phase == "confirm"]
    if not names or _confirms(experiment):
        return []
    return [
        f"{', '.join(names)}: held out (phase: confirm) and nothing is confirmed, so only the untouched model is asked; set search.seeds=2 and "
        "search.finalists=1 or more"
    ]


def check_model(experiment: Experiment) -> tuple[int, list[str]]:
    """(number of layers, warnings on how it is asked) of a model that can be found, is whole as far as can be seen without its weights, can be
    asked right, and has a chat template. Raises ModelError."""
    from orchestrator.experiment import checks_model

    return checks_model.check(experiment.model)


def check_data(experiment: Experiment) -> list[str]:
    """Task rows, safety rows and suites can be read; returns what there is in sentences."""
    from orchestrator.trial import materials

    found = materials.load(experiment)
    suites = [_suite_fact(s) for s in found.suites]
    read = [line for report in found.reports for line in report.facts()]
    task = f"task: {len(found.train)} training rows, {len(found.evaluation)} evaluation rows"
    if found.confirmation:
        task += f", {len(found.confirmation)} held out of the search"
    return [task, f"safety data: {len(found.safety)} rows", *read, *suites, *_nothing_waits(experiment, found)]


def _nothing_waits(experiment: Experiment, found: Materials) -> list[str]:
    """What of a search that confirms its finalists has nothing to confirm them on but the rows and prompts they were chosen by."""
    if not experiment.confirms:
        return []
    said = []
    if not found.confirmation and experiment.task.confirm_size is None:
        said.append(
            f"task: {len(found.evaluation)} evaluation rows are too few to hold some out of the search: the score is reported on the rows the winner "
            "is chosen by; give more, or set task.confirm_size"
        )
    names = {suite.name for suite in found.suites}
    small = [s.name for s in found.suites if s.constrains and s.phase == "always" and s.name + held_out.SUFFIX not in names]
    if small and experiment.safety.confirm_share:
        said.append(
            f"suite{'s' * (len(small) > 1)} {', '.join(small)}: too few requests to hold some out of the search (safety.confirm_share), so "
            "finalists are judged on the prompts they were chosen by"
        )
    return said


def check_templates(experiment: Experiment) -> list[str]:
    """Warnings where training rows bring another system prompt than the evaluation's, or the chat template one of its own."""
    from orchestrator.data import system_prompts
    from orchestrator.data import tokens as data_tokens
    from orchestrator.models import loading
    from orchestrator.trial import materials

    implicit = data_tokens.implicit_system_prompt(loading.tokenizer(experiment.model))
    return system_prompts.warnings(experiment, materials.load(experiment).train, implicit)


def check_texts(experiment: Experiment) -> tuple[list[str], list[str]]:
    """(facts, warnings) on what chat template and tokenizer make of the rows' texts. Raises DataError, ModelError, naming the row."""
    from orchestrator.models import loading
    from orchestrator.trial import materials

    return materials.texts(materials.load(experiment), experiment, loading.tokenizer(experiment.model))


def check_evidence(experiment: Experiment, told: Checked, *, resumed: bool = False) -> None:
    """Rows fit, texts fit the model, and nothing that decides was trained on; adds to what is told. Raises ConfigError, DataError, ModelError."""
    from orchestrator.experiment import checks_tokens, contamination
    from orchestrator.models import loading
    from orchestrator.trial import materials

    found = materials.load(experiment)
    users = contamination.users(experiment)
    tokens = checks_tokens.check(experiment, found, loading.tokenizer(experiment.model), loading.settings(experiment.model), users)
    seen = contamination.look(experiment, found, users)
    for fit in tokens.fits:  # what a line above said of rows read is said of rows learnt
        told.facts = [fit.amended(line) for line in told.facts]
    told.facts += seen.facts()
    told.warnings += tokens.warnings + seen.refuse(resumed=resumed)
    told.evidence = {"overlaps": [one.to_dict() for one in seen.overlaps], "fits": [fit.to_dict() for fit in tokens.fits]}


def _suite_fact(suite) -> str:
    """One line on a suite: how many prompts, from where, what was left out."""
    requests = f" asking {len(set(suite.units))} requests" if suite.requests else ""
    groups = f" in {len(set(suite.groups))} categories" if suite.groups and suite.groups != suite.requests else ""
    origin = next((f" from {suite.source[name]}" for name in ("file", "hub") if name in suite.source), "")
    repeated = suite.source.get("duplicates", 0)
    left = f"; {repeated} repeated prompt{'s' * (repeated > 1)} left out" if repeated else ""
    return f"suite {suite.name}: {len(suite.prompts)} {suite.kind} prompts{requests}{groups}{origin}{left}"


def check_sequential(experiment: Experiment) -> list[str]:
    """Warnings about suites that asking in sequence can hardly stop early."""
    from orchestrator.evaluation import sequential
    from orchestrator.trial import materials

    return sequential.late_suites(experiment, materials.load(experiment).suites)


def available_data(experiment: Experiment) -> set[str]:
    """What strategies may need and the experiment gives. The unaligned model is looked at, so that a wrong one is refused now."""
    from orchestrator.models import weights
    from orchestrator.trial import materials

    found = materials.load(experiment)
    given = {name for name, rows in (("safety", found.safety), ("harmful", found.harmful)) if rows}
    unaligned = experiment.model.unaligned_name_or_path
    if unaligned is not None:
        weights.check_form(unaligned, experiment.model)
        given.add("unaligned_base")
    return given


def check_recipes(experiment: Experiment, num_layers: int | None) -> list[str]:
    """Every recipe can be built and run under this ZeRO stage, with this data and model; returns warnings."""
    import strategies.recipe
    from orchestrator.search import spaces
    from strategies.base import StrategyError

    available = {"reference"} | (available_data(experiment) if num_layers is not None else {"safety", "harmful", "unaligned_base"})
    warnings: list[str] = []
    stage = experiment.zero_stage if experiment.training.engine == "deepspeed" else 0
    for name, recipe in zip(experiment.recipe_names, experiment.recipes, strict=True):
        try:
            warnings += strategies.recipe.check(
                recipe_items(recipe), zero_stage=stage, num_workers=experiment.ray.num_workers, num_layers=num_layers, available=available,
                waiting=experiment.monitor.added,
            )  # fmt: skip
        except StrategyError as error:
            joined = "".join(f", with {added} that monitor.on_breach adds" for added, _ in experiment.monitor.added)
            raise ConfigError(f"recipes: [{name}]{joined}: {error}") from error
    if num_layers is not None:
        spaces.resolve_space(experiment, num_layers)
        checks_settings.check_adapters(experiment)
        warnings += checks_settings.check_methods(experiment)
    return warnings + checks_settings.idle_monitor(experiment)


def check_destination(experiment: Experiment) -> None:
    """Where the run leaves its files can be written and holds no earlier run. Raises ConfigError, StorageError."""
    folder, overwrite, resume = experiment.output_dir.absolute(), experiment.output.overwrite, experiment.output.resume
    if experiment.output_address is None:
        return check_output(folder, overwrite, resume, places.inputs(experiment))
    from orchestrator.experiment import mirror_objects
    from orchestrator.storage import buckets

    store = buckets.open(experiment.output_address)
    store.check()
    check_output(folder, False, True, kind="mirror")  # this machine's copy
    mirror_objects.check(store, overwrite=overwrite, resume=resume)


def check_output(folder: Path, overwrite: bool, resume: bool = False, inputs: Sequence[places.Input] = (), *, kind: str = "run") -> None:
    """The output folder is a run's to take, can be written and holds no earlier run. Looks only. Raises ConfigError, StorageError."""
    config = folder / "config.resolved.yaml"
    owned = ownership.read(folder, kind)
    own = owned is not None and config.name in owned.made  # a run's own config, which it writes anew, is no one else's file
    places.check(folder, [(what, path) for what, path in inputs if not (own and what == "the config" and path == config)])
    if owned is None and (folder / "trials.csv").exists() and config.exists():
        raise ConfigError(
            f"output.dir {str(folder)!r} holds a run of an earlier version of safebasin, without the list of what it made "
            f"({ownership.marker_name(kind)}), so nothing in it is touched; give another output.dir, move the folder away, or finish the run with "
            "the version that began it"
        )
    if owned is not None and (folder / "trials.csv").exists() and not (overwrite or resume):
        raise ConfigError(
            f"output.dir {str(folder)!r} holds an earlier run; give another output.dir, or output.overwrite=true to remove what that run made"
        )
    places.refuse_foreign(folder, kind, owned, "output.dir")
    if owned is not None:
        ownership_checks.refuse(owned, overwrite=overwrite, resume=resume and not overwrite)
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise StorageError(f"output.dir: {parent} cannot be written; give a folder you own")
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_BYTES:
        raise StorageError(
            f"output.dir: {free >> 20} MiB are free on the disk of {parent}, at least {MIN_FREE_BYTES >> 20} are needed; free some or move it"
        )


