"""What a run was begun with, so that going on with something else is noticed: `run.json` holds its id, config and content hashes.

Trials of one run are compared with each other. What decides a trial's figures may not change between run and resume: recipes, limits,
suites, model, data, judge, metric, decoding, training, search space. What does not may: budgets, places, names, machines, tracking.
"""

from __future__ import annotations

import collections
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import config, data, materials, outputs, record_check
from orchestrator.config import Experiment
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.record_check import BadRecord

FILE = "run.json"
CONFIG = "config.resolved.yaml"
FREE = (
    "variables", "name", "ray", "tracking", "output", "search.trials", "search.time_budget_s", "search.max_concurrent_trials", "search.finalists",
    "search.storage", "search.sampler", "search.sampler_seed", "search.trials_per_training", "training.logging_steps", "training.save_steps",
    "training.torch_threads", "training.gradient_checkpointing", "safety.keep_generations", "safety.generation.gpu_memory_utilization",
)  # fmt: skip
"""Keys (and what is below them) that a resumed run may change."""
BOUND = ("ray.num_workers",)
"""Below a free key, and yet part of what a trial is: rows per step."""


@dataclass(frozen=True)
class Identity:
    """What `run.json` says."""

    run: str
    config: dict[str, Any]
    content: dict[str, str]
    """Hash by what it is of: model, template, task.data, safety.suites.<name>, ..."""


def new(experiment: Experiment, content: Mapping[str, str], run: str | None = None) -> Identity:
    """The identity of a run that begins, or whose file was lost."""
    return Identity(run or uuid.uuid4().hex, experiment.model_dump(mode="json"), dict(content))


def write(folder: Path, identity: Identity) -> None:
    """Write `run.json`. Raises StorageError."""
    outputs.write_json(folder / FILE, {"format": 1, "run": identity.run, "content": identity.content, "config": identity.config})


def read(folder: Path) -> Identity | None:
    """What the folder's run was begun with; None where nothing says so (a run of an older version). Raises BadRecord where it is damaged."""
    raw = record_check.guarded(folder / FILE, _wrong)
    return None if raw is None else Identity(raw["run"], raw["config"], raw["content"])


def _wrong(raw: Any) -> str | None:
    if not isinstance(raw, dict) or raw.get("format") != 1 or set(raw) != {"format", "run", "content", "config"}:
        return "it does not say what a run was begun with"
    if not isinstance(raw["run"], str) or not isinstance(raw["config"], dict) or not isinstance(raw["content"], dict):
        return "run, config or content is of the wrong type"
    return None


def content(experiment: Experiment, facts: Mapping[str, str]) -> dict[str, str]:
    """Hashes of what the run works with; `facts` are those of model and template (`baseline.identity`)."""
    found = materials.load(experiment)
    rows = {"task.data": found.train, "evaluation rows": found.evaluation, "safety.data": found.safety, "safety.harmful_data": found.harmful}
    suites = {f"safety.suites.{suite.name}": suite.hash for suite in found.suites}
    return {**facts, **{name: data.fingerprint(part) for name, part in rows.items()}, **suites}


def check_content(before: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Raises ConfigError that names what has another content than when the run began."""
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: the content changed since the run in {str(folder)!r} began, so its finished trials cannot be compared with new "
            "ones; restore what it began with, or start a run in another output.dir"
        )


def begun_with(folder: Path) -> Experiment | None:
    """The config that the folder's run was begun with; None where neither `run.json` nor the resolved config can tell."""
    try:
        identity = read(folder)
        if identity is not None:
            return config.from_dict(identity.config)
    except SafebasinError:  # damaged, or of another version: the resolved config is the next best
        identity = None
    path = folder / CONFIG
    return config.load(path) if path.is_file() else None


def changes(before: Experiment, now: Experiment) -> tuple[list[str], list[str]]:
    """What differs, "key: a there, b here": (what decides a trial's figures, what does not)."""
    one, other = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    one["search.seeds"], other["search.seeds"] = before.search.seeds[0], now.search.seeds[0]  # the others only confirm
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    bound = [key for key in keys if key in BOUND or not any(key == free or key.startswith(f"{free}.") for free in FREE)]
    said = {key: f"{key}: {_short(one.get(key))} there, {_short(other.get(key))} here" for key in keys}
    return [said[key] for key in bound], [said[key] for key in keys if key not in bound]


def check_config(folder: Path, experiment: Experiment) -> list[str]:
    """What of the config changed without harm since the run in `folder` began. Raises ConfigError for what decides a trial's figures."""
    before = begun_with(folder)
    if before is None:
        return []
    bound, free = changes(before, experiment)
    if bound:
        more = f", and {len(bound) - 5} more" if len(bound) > 5 else ""
        raise ConfigError(
            f"output.dir {experiment.output_place!r} holds a run of another config ({', '.join(bound[:5])}{more}), so its finished trials cannot be "
            f"compared with new ones; undo the change (in {CONFIG}, if it was edited there), give another output.dir, or output.overwrite=true"
        )
    return [line for line in free if line.split(".")[0] not in ("output", "variables")]


def lost(folder: Path) -> str:
    """The id of a run whose `run.json` is gone: the one that most of its trials name, "" where none does."""
    named = collections.Counter()
    for path in (folder / "trials").glob("*/spec.json"):
        try:
            raw = record_check.read_json(path)
        except BadRecord:
            continue
        if isinstance(raw, dict) and isinstance(raw.get("run"), str):
            named[raw["run"]] += 1
    return named.most_common(1)[0][0] if named else ""


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys; lists of named things by their names."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
        value = {item["name"]: item for item in value}
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
