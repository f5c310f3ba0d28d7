"""What a run was begun with, so that going on with something else is noticed: `run.json` holds its id, config and content hashes.

Trials of one run are compared with each other. What decides a trial's figures may not change between run and resume: recipes, limits,
suites, model, data, judge, metric, decoding, training, search space. What does not may: budgets, places, names, machines, tracking.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.data import conversations
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.report import provenance
from orchestrator.storage import files
from orchestrator.storage.layout import CONFIG
from orchestrator.trial import materials, record_check
from orchestrator.trial.record_check import BadRecord

FILE = "run.json"
FREE = (
    "variables", "name", "ray", "tracking", "output", "search.trials", "search.time_budget_s", "search.max_concurrent_trials", "search.finalists",
    "search.storage", "search.sampler", "search.allocation", "search.early_end",
    "search.sampler_seed", "search.trials_per_training", "training.logging_steps", "training.save_steps",
    "training.torch_threads", "training.gradient_checkpointing", "safety.keep_generations", "safety.generation.gpu_memory_utilization",
)  # fmt: skip
"""Keys (and what is below them) that a resumed run may change."""
BOUND = ("ray.num_workers",)
"""Below a free key, and yet part of what a trial is: rows per step."""
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Ids of runs; ours are 32 hexadecimal digits."""
_SECTIONS = ("recipes", "model", "task", "safety", "training", "search")
"""Sections that every version wrote down: a config without one of them is not the whole one."""


@dataclass(frozen=True)
class Identity:
    """What `run.json` says."""

    run: str
    config: dict[str, Any]
    content: dict[str, str]
    """Hash by what it is of: model, template, task.data, safety.suites.<name>, ..."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that decide what a run gives; empty in a run of before these were kept."""


def new(experiment: Experiment, content: Mapping[str, str], run: str | None = None) -> Identity:
    """The identity of a run that begins, or whose file was lost."""
    return Identity(run or uuid.uuid4().hex, experiment.model_dump(mode="json"), dict(content), provenance.versions())


def write(folder: Path, identity: Identity) -> None:
    """Write `run.json`. Raises StorageError."""
    body = {"format": 1, "run": identity.run, "content": identity.content, "versions": identity.versions, "config": identity.config}
    files.write_json(folder / FILE, body)


def read(folder: Path) -> Identity | None:
    """What the folder's run was begun with; None where nothing says so (a run of an older version). Raises BadRecord where it is damaged."""
    raw = record_check.guarded(folder / FILE, _wrong)
    return None if raw is None else Identity(raw["run"], raw["config"], raw["content"], raw.get("versions", {}))


def _wrong(raw: Any) -> str | None:
    if not isinstance(raw, dict) or raw.get("format") != 1 or set(raw) - {"versions"} != {"format", "run", "content", "config"}:
        return "it does not say what a run was begun with"
    if not isinstance(raw["run"], str) or not isinstance(raw["config"], dict) or not isinstance(raw["content"], dict):
        return "run, config or content is of the wrong type"
    if not RUN_ID.fullmatch(raw["run"]):
        return f"{raw['run']!r:.60} is no id of a run"
    versions = raw.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
        return "versions holds what is no version"
    if not all(isinstance(value, str) for value in raw["content"].values()):
        return "content holds what is no hash"
    missing = [name for name in _SECTIONS if name not in raw["config"]]
    return f"its config lacks {', '.join(missing)}" if missing else None


def content(experiment: Experiment, facts: Mapping[str, str]) -> dict[str, str]:
    """Hashes of what the run works with; `facts` are those of model and template (`baseline.identity`)."""
    found = materials.load(experiment)
    rows = {
        "task.data": found.train, "evaluation rows": found.evaluation, "confirmation rows": found.confirmation,
        "safety.data": found.safety, "safety.harmful_data": found.harmful,
    }  # fmt: skip
    suites = {f"safety.suites.{suite.name}": suite.hash for suite in found.suites}
    return {**facts, **{name: conversations.fingerprint(part) for name, part in rows.items()}, **suites}


def check_content(before: Mapping[str, str], now: Mapping[str, str], folder: Path) -> list[str]:
    """Names of what `before` holds no hash of, so that nothing can be said of it. Raises ConfigError that names what has another content than
    when the run began."""
    changed = [name for name in sorted(before) if before[name] != now.get(name)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: the content changed since the run in {str(folder)!r} began, so its finished trials cannot be compared with new "
            "ones; restore what it began with, or start a run in another output.dir"
        )
    return sorted(now.keys() - before.keys())


def marks(dump: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what decides a trial's figures in a config (`model_dump(mode="json")`), by section; those of `safety` by what is below it.

    Kept beside every trial, so that a changed config is noticed where `run.json` is lost. {} for an empty config.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, value in sorted(_flat(dump).items()):
        if key and _bound(key):
            section = ".".join(key.split(".")[: 2 if key.startswith("safety.") else 1])
            parts.setdefault(section, {})[key] = value[0] if key == "search.seeds" and value else value
    return {name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()[:16] for name, part in parts.items()}


def begun_with(folder: Path) -> tuple[Experiment | None, bool]:
    """The config that the folder's run was begun with, and whether `run.json` says so; else it is the resolved one, which a hand may have
    changed. (None, False) where neither can tell."""
    try:
        identity = read(folder)
        if identity is not None:
            return config.from_dict(identity.config), True
    except SafebasinError:  # damaged, or of another version: the resolved config is the next best
        identity = None
    path = folder / CONFIG
    return (config.load(path) if path.is_file() else None), False


def check_marks(folder: Path, experiment: Experiment) -> bool:
    """Whether the trials' specs say what config they were asked with; it is this one then. Raises ConfigError where it is another one."""
    kept = _specs(folder)
    if not kept:
        return False
    now = marks(experiment.model_dump(mode="json"))
    for name, asked in kept:
        differing = sorted(key for key in {*asked, *now} if asked.get(key) != now.get(key))
        if differing:
            raise ConfigError(
                f"output.dir {experiment.output_place!r}: the config is not the one that the trial {name} was asked with "
                f"({', '.join(differing)} changed), and {FILE}, which held that one, cannot be read; undo the change (in {CONFIG}, if it was "
                f"edited there), restore {FILE}, give another output.dir, or output.overwrite=true"
            )
    return True


def _specs(folder: Path) -> list[tuple[str, dict[str, str]]]:
    """(trial, hashes of its config) of every trial of the folder's run whose spec holds them."""
    run, found = lost(folder), []
    for path, raw in _read_specs(folder):
        kept = raw.get("config")
        if raw.get("run") == run and isinstance(kept, dict) and kept:
            found.append((path.parent.name, kept))
    return found


def changes(before: Experiment, now: Experiment) -> tuple[list[str], list[str]]:
    """What differs, "key: a there, b here": (what decides a trial's figures, what does not)."""
    one, other = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    one["search.seeds"], other["search.seeds"] = before.search.seeds[0], now.search.seeds[0]  # the others only confirm
    one["held out of the search"], other["held out of the search"] = _holds_out(before), _holds_out(now)
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    bound = [key for key in keys if _bound(key)]
    said = {key: f"{key}: {_short(one.get(key))} there, {_short(other.get(key))} here" for key in keys}
    return [said[key] for key in bound], [said[key] for key in keys if key not in bound]


def _holds_out(experiment: Experiment) -> bool:
    """Whether rows or prompts wait because finalists are trained on a further seed (search.seeds, search.finalists)."""
    return experiment.confirms and (experiment.task.confirm_size is None or experiment.safety.confirm_share > 0)


def _bound(key: str) -> bool:
    return key in BOUND or not any(key == free or key.startswith(f"{free}.") for free in FREE)


def check_config(folder: Path, experiment: Experiment) -> list[str]:
    """What of the config changed without harm since the run in `folder` began. Raises ConfigError for what decides a trial's figures."""
    before, sure = begun_with(folder)
    if not sure:
        check_marks(folder, experiment)
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
    named = collections.Counter(raw["run"] for _, raw in _read_specs(folder))
    return named.most_common(1)[0][0] if named else ""


def _read_specs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every trial's spec that can be read and names a run."""
    for path in sorted((folder / "trials").glob("*/spec.json")):
        try:
            raw = record_check.read_json(path)
        except BadRecord:
            continue
        if isinstance(raw, dict) and isinstance(raw.get("run"), str) and RUN_ID.fullmatch(raw["run"]):
            yield path, raw


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
