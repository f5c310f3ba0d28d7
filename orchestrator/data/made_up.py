"""What of an experiment is of the made-up world: named wherever figures are, and refused where it would silently measure somebody's own model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator import redaction
from orchestrator.config import Experiment
from orchestrator.errors import ConfigError
from orchestrator.pocket import likeness
from orchestrator.storage import paths

KEYS = ("task.data", "task.eval_data", "safety.data", "safety.harmful_data", "safety.suites")
"""Keys that hold data."""
_WORDS = {
    "task.data": "task.data={}", "task.eval_data": "task.eval_data={}", "safety.data": "safety.data={} (null for none)",
    "safety.harmful_data": "safety.harmful_data={}", "safety.suites": "safety.suites=[...]",
}  # fmt: skip


def _held(experiment: Experiment, key: str) -> list[str]:
    """What of the made-up world a key holds."""
    section, _, name = key.partition(".")
    value = getattr(getattr(experiment, section), name)
    texts = [suite.data for suite in value] if key == "safety.suites" else [value]
    return [text for text in dict.fromkeys(texts) if likeness.is_pocket(text)]


def _written(experiment: Experiment, key: str) -> bool:
    """Whether the user gave the value: it is no default, and no preset brought it."""
    section, _, name = key.partition(".")
    return section in experiment.model_fields_set and name in getattr(experiment, section).model_fields_set and key not in experiment.lent


def strayed(experiment: Experiment, models: Iterable[str] = (), keys: Sequence[str] = KEYS) -> dict[str, list[str]]:
    """What is made up, by key, that nobody wrote out and that would meet a model of another kind; {} where all models are the made-up
    world's. `models`: those that are asked; without it the experiment's."""
    asked = tuple(models) or (experiment.model.model_name_or_path,)
    if all(likeness.speaks(name) for name in asked):
        return {}
    found = {key: _held(experiment, key) for key in keys if not _written(experiment, key)}
    return {key: held for key, held in found.items() if held}


def refuse(experiment: Experiment, models: Iterable[str] = (), keys: Sequence[str] = KEYS, *, elsewhere: bool = False) -> None:
    """Raises ConfigError where `strayed` finds something, naming the model, the keys and what to write.

    A path with nothing in its place is left to whoever looks for the model, unless it may lie `elsewhere`.
    """
    asked = tuple(models) or (experiment.model.model_name_or_path,)
    if not elsewhere:
        asked = tuple(name for name in asked if paths.is_folder(name) or not _is_path(name))
    found = strayed(experiment, asked, keys) if asked else {}
    if not found:
        return
    name = next(name for name in asked if not likeness.speaks(name))
    held = "; ".join(f"{key} is {', '.join(values)}" for key, values in found.items())
    remedy = ", ".join(_WORDS[key].format("FILE") for key in found)
    raise ConfigError(
        f"{redaction.redact_uri(name)!r:.200} is no model of the made-up world (pocket), and would be trained or asked with that world's data, "
        f"which nobody wrote out: {held}. Give data of your own: {remedy}; or write these values out if you mean them"
    )


def _is_path(name: str) -> bool:
    """Whether a name can only be a path, not a hub id."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def sources(experiment: Experiment) -> list[str]:
    """What is made up, in words, e.g. [`the model`, `the task`]; [] where nothing is."""
    known = [("the model", [experiment.model.model_name_or_path] if likeness.speaks(experiment.model.model_name_or_path) else [])]
    known += [("the task", _held(experiment, "task.data") + _held(experiment, "task.eval_data"))]
    known += [("the safety rows", _held(experiment, "safety.data") + _held(experiment, "safety.harmful_data"))]
    suites = [suite.name for suite in experiment.safety.suites if likeness.is_pocket(suite.data)]
    every = "every suite" if len(suites) == len(experiment.safety.suites) else f"the suites {', '.join(suites)}"
    return [what for what, held in known if held] + ([every] if suites else [])


def sentence(experiment: Experiment) -> str:
    """What stands above every figure of an experiment with something made up in it; empty where nothing is."""
    found = sources(experiment)
    if not found:
        return ""
    return (
        f"MADE UP (the pocket world): {', '.join(found)}. Invented words and a small model trained on one machine: these figures show the "
        "mechanism and say nothing about the harm of a real model"
    )


def facts(experiment: Experiment) -> list[str]:
    """The model, the data and the suites of an experiment, each by its name, a line each; what is made up says so."""
    model, task, safety = experiment.model, experiment.task, experiment.safety
    kind = " (made up)" if likeness.speaks(model.model_name_or_path) else ""
    lines = [f"model: {redaction.redact_uri(model.model_name_or_path)}{kind}"]
    named = [("task.data", task.data), ("task.eval_data", task.eval_data), ("safety.data", safety.data), ("safety.harmful_data", safety.harmful_data)]
    lines += [f"{key}: {_said(value)}" for key, value in named if value is not None]
    return lines + [f"safety.suites: {', '.join(f'{suite.name} from {_said(suite.data)}' for suite in safety.suites)}"]


def _said(source: str) -> str:
    return redaction.redact_uri(source) + (" (made up)" if likeness.is_pocket(source) else "")
