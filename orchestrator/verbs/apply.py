"""`safebasin apply`: one method that acts after training, run on a checkpoint that was made elsewhere.

The tuned model is a whole model or a PEFT adapter folder; the aligned model it started from is read weight by weight. What a method needs
beside that (the unaligned model, safety rows, harmful answers, task rows) is given by options, and refused by name where it is missing.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import __version__, config
from orchestrator.config import overrides
from orchestrator.errors import ConfigError, StorageError, UnknownNameError
from orchestrator.experiment import places
from orchestrator.models import adapters, identity, loading, saving, subjects, weights
from orchestrator.storage import paths
from orchestrator.terminal import screen
from orchestrator.trial import reach

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from strategies.base import Tensors, TrainingData
    from strategies.blocks import Blocks
    from strategies.recipe import Recipe

OPTIONS = {"unaligned_base": "--unaligned BASE0 (the aligned model before its alignment)", "safety": "--safety FILE (prompts and refusals)",
           "harmful": "--harmful FILE (harmful prompts and answers), or a column `rejected` in --safety FILE"}  # fmt: skip
CHANGED = 1e-6
"""Change of an update, relative to the update or to what it became, from which on it counts as changed."""


@dataclass(frozen=True)
class Request:
    """What to do with which model. Models: folder, hub id or `pocket...`; data: as `safety.data` and `task.data` of a config."""

    strategy: str
    model: str
    aligned: str
    output: Path
    knobs: Sequence[str] = ()
    """`knob=value`, as many as wanted."""
    unaligned: str | None = None
    safety: str | None = None
    harmful: str | None = None
    task: str | None = None
    device: str = "cpu"
    seed: int = 0


@dataclass
class Applied:
    """What came of it."""

    facts: dict[str, Any]
    """What the method says it did."""
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Weight name -> norms of its update (against the aligned model) before and after, and whether it changed."""

    blocks: Blocks | None = None
    """Where the decoder blocks lie, for the table by layer."""
    untouched: reach.Untouched = reach.Untouched(0.0, ())
    """The part of the update that lies in tensors the method does not act on."""
    asked: dict[str, Any] = field(default_factory=dict)
    """Whose tokenizer and template the output has (`adapters.Voice`)."""
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> int:
        return sum(m["changed"] for m in self.modules.values())


def run(request: Request, console: Console) -> Applied:
    """Apply, save, print. Raises ConfigError (or a subclass) for whatever cannot work, before anything is written."""
    from strategies.base import StrategyError

    try:
        recipe = _recipe(request)
        _check(request, recipe)
        applied, model, tokenizer = _apply(request, recipe)
    except StrategyError as error:
        raise ConfigError(f"apply {request.strategy}: {error}") from error
    if request.output.is_dir() and any(request.output.iterdir()):
        raise StorageError(f"--output {str(request.output)!r} was filled by somebody else meanwhile; nothing is written, give another folder")
    saving.save(model, tokenizer, request.output, _record(request, applied))
    _show(request, applied, console)
    return applied


def _recipe(request: Request) -> Recipe:
    """The method as a recipe of its own. Raises ConfigError for one that does not change a finished model."""
    import strategies
    import strategies.recipe
    from strategies.base import Strategy

    if request.strategy not in strategies.STRATEGIES:
        raise UnknownNameError("strategy", request.strategy, strategies.STRATEGIES)
    cls = strategies.get(request.strategy)
    if cls.changes_training or cls.finish is Strategy.finish:
        able = [n for n in strategies.STRATEGIES if not (c := strategies.get(n)).changes_training and c.finish is not Strategy.finish]
        when = "in training" if cls.changes_training else "at inference"
        raise ConfigError(f"{request.strategy} acts {when}, so it cannot be applied to a finished model; these can: {', '.join(sorted(able))}")
    return strategies.recipe.build([(request.strategy, _knobs(request))])


def _knobs(request: Request) -> dict[str, Any]:
    import strategies

    found: dict[str, Any] = {}
    hints = typing.get_type_hints(strategies.get(request.strategy).Config)
    for text in request.knobs:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is no setting; write knob=value, e.g. {request.strategy}: threshold=0.3")
        knob = key.strip().removeprefix(f"{request.strategy}.")
        if knob in found:
            raise ConfigError(f"apply {request.strategy}: the knob {knob} is given twice; give it once")
        found[knob] = overrides.value_of(hints.get(knob, overrides.FREE), value, knob)
    return found


def _check(request: Request, recipe: Recipe) -> None:
    """Everything that can be known without loading weights."""
    (method,) = recipe.strategies
    given = {"reference"} | {need for need, value in (("unaligned_base", request.unaligned), ("safety", request.safety)) if value}
    if request.harmful or request.safety:
        given.add("harmful")  # whether the safety file has harmful answers is seen when it is read
    for need in sorted(method.needs - given):
        raise ConfigError(f"{request.strategy} needs {OPTIONS[need]}")
    output = Path(paths.folder_name(request.output, "--output"))
    if paths.exists(output) and (not paths.is_folder(output) or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r} exists already; give a folder that does not")
    named = {key: getattr(request, key) for key in ("model", "aligned", "unaligned", "safety", "harmful", "task")}
    places.check(output, [(f"--{key}", path) for key, text in named.items() if text and (path := places.local(text))], field="--output")
    aligned = config.Model(model_name_or_path=request.aligned, dtype="auto")
    method.check(num_layers=identity.num_layers(aligned), num_workers=1)
    subjects.voice(request.model, aligned, request.aligned)
    if not subjects.is_adapter(request.model):
        weights.check_form(request.model, aligned, "--model (its start is --aligned)")
    if request.unaligned:
        weights.check_form(request.unaligned, aligned, "--unaligned")


def _apply(request: Request, recipe: Recipe) -> tuple[Applied, nn.Module, Any]:
    """(what was done, the changed model, its tokenizer). One whole model is in memory at a time."""
    from strategies import blocks
    from strategies.base import Strategy

    aligned = config.Model(model_name_or_path=request.aligned, dtype="auto")
    sources: dict[str, Tensors] = {"aligned": weights.of_name(request.aligned, aligned, "--aligned")}
    if request.unaligned:
        sources["unaligned"] = weights.of_name(request.unaligned, aligned, "--unaligned")
    asked = subjects.voice(request.model, aligned, request.aligned)
    recipe.prepare_data(_data(request, subjects.for_base(request.aligned, aligned, asked), sources))
    if type(recipe.strategies[0]).setup is not Strategy.setup:  # a side training wants the untouched model
        recipe.setup(loading.network(aligned).to(request.device))
    model, tokenizer, notes = _tuned(request, aligned)
    left = reach.of(model, sources["aligned"], recipe.strategies[0])
    before = _measure(model, sources["aligned"])
    if not before:
        raise ConfigError(f"--model {request.model!r} has the weights of --aligned in every decoder block, so there is nothing to change")
    model = recipe.finish(model)
    after = _measure(model, sources["aligned"])
    modules = _compared(before, after)
    return Applied(recipe.facts().get(request.strategy, {}), modules, blocks.of(model), left, asked.facts, (*asked.notes, *notes)), model, tokenizer


def _tuned(request: Request, aligned: config.Model) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """(the tuned model, its tokenizer, what was done to it). An adapter whose update is no low-rank matrix (DoRA, IA3, ...) is merged first."""
    from strategies import linear, merging
    from strategies.base import StrategyError

    if not subjects.is_adapter(request.model):
        return *loading.load(config.Model(model_name_or_path=request.model, dtype="auto"), device=request.device), ()
    model, asked = adapters.attach(paths.expanded(request.model), aligned, device=request.device)
    kind = model.peft_config["default"].peft_type.value
    try:
        low_rank = kind == "LORA" and bool(linear.adapters(model))
    except StrategyError:  # a variant such as DoRA
        low_rank = False
    if not low_rank:
        model, seen = merging.measured(model, f"the adapter in {request.model}")
        said = f"the adapter ({kind}) is no plain LoRA and was merged first (logits within {seen.difference:.2g}); the output is a whole model"
        return model, asked.tokenizer, (said,)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # what training moved: methods that take steps of their own move that
    return model, asked.tokenizer, ()


def _data(request: Request, aligned: config.Model, sources: Mapping[str, Tensors]) -> TrainingData:
    """The rows given by options; without any, weights alone."""
    from orchestrator.data import conversations, rows
    from orchestrator.records import LaneContext
    from orchestrator.trial import materials
    from orchestrator.trial.training_data import training_data
    from strategies.base import TrainingData

    if not (request.safety or request.harmful or request.task):
        return TrainingData((), (), 0, 1, seed=request.seed, device=request.device, weights=sources, fingerprint="apply")
    raw = {"model": aligned.model_dump(mode="json"), "safety": {"data": request.safety, "harmful_data": request.harmful}}
    experiment = config.from_dict(raw | ({"task": {"data": request.task}} if request.task else {}))
    safety, harmful = materials.safety_rows(experiment)
    task = []
    if request.task:
        task = conversations.normalise(rows.load_rows(request.task, field="--task"), "auto", experiment.task.columns, request.task, field="--task")
    found = materials.Materials(tuple(task), (), tuple(safety), (), conversations.fingerprint(task, [], safety, harmful, []), tuple(harmful))
    context = LaneContext(device=request.device)
    return training_data(experiment, loading.tokenizer(aligned), found, context, request.seed, sources)[0]


# ------------------------------------------------------------------------------------------------ what was done


def _measure(model: nn.Module, aligned: Tensors) -> dict[str, tuple[float, Tensor]]:
    """Weight name -> (norm of its update, the update times a fixed random vector): enough to see any change without keeping a copy."""
    import torch

    from strategies import linear

    found = {}
    for update in linear.updates(model, aligned):
        width = update.shape[1] if len(update.shape) == 2 else 1
        probe = torch.randn(width, 1, generator=torch.Generator().manual_seed(0)).to(update.device)
        seen = update.left @ (update.right @ probe) if update.low_rank else update.full.reshape(-1, width) @ probe
        found[update.name] = (linear.norm(update), seen.cpu())
    return found


def _compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    modules = {}
    for name in sorted(before.keys() | after.keys()):
        changed = name not in before or name not in after  # an update became zero, or there is a new one
        if not changed:
            old, new = before[name][1], after[name][1]
            changed = float((new - old).abs().max()) > CHANGED * float(max(old.abs().max(), new.abs().max()))
        norms = {key: group[name][0] if name in group else 0.0 for key, group in (("norm_before", before), ("norm_after", after))}
        modules[name] = {**norms, "changed": changed}
    return modules


def _record(request: Request, applied: Applied) -> dict[str, Any]:
    given = {key: getattr(request, key) for key in ("strategy", "model", "aligned", "unaligned", "safety", "harmful", "task", "seed")}
    return {
        "made_by": f"safebasin {__version__} apply", **given, "knobs": list(request.knobs), "facts": applied.facts,
        "changed": applied.changed, "modules": applied.modules, "untouched": asdict(applied.untouched), "template": applied.asked,
        "notes": list(applied.notes),
    }  # fmt: skip


def _show(request: Request, applied: Applied, console: Console) -> None:
    """Updates by decoder layer, then what the method says."""
    table = screen.Grid(title=f"{request.strategy} on {request.model}", box=None, padding=(0, 2), header_style="bold", title_justify="left")
    for column in ("layer", "updates", "changed", "norm before", "norm after"):
        table.add_column(column, justify="right")
    layers: dict[int, list[dict[str, Any]]] = {}
    for name, module in applied.modules.items():
        layers.setdefault(applied.blocks.index(name), []).append(module)
    for label, group in [*((str(n), layers[n]) for n in sorted(layers)), ("all", list(applied.modules.values()))]:
        norms = [sum(m[key] ** 2 for m in group) ** 0.5 for key in ("norm_before", "norm_after")]
        table.add_row(label, str(len(group)), str(sum(m["changed"] for m in group)), *(f"{norm:.4g}" for norm in norms))
    screen.show(console, table)
    facts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {json.dumps(value)}" for key, value in applied.facts.items()]
    screen.say(console, ", ".join(facts))
    for note in applied.notes:
        screen.say(console, f"{request.model}: {note}", "yellow")
    left, warns = applied.untouched.sentence(request.strategy), applied.untouched.warns
    if left:
        screen.say(console, f"{'warning: ' * warns}{left}", "yellow" * warns)
    if not applied.changed:
        screen.say(console, "no weight was changed; the output is the model as it was given", "yellow")
    screen.say(console, f"written to {request.output}", whole=True)
