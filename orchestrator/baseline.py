"""The untouched model's record: measured once, kept by what it depends on in the user's cache folder and the cache that machines share."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from orchestrator import cachedir, materials, models, outputs, shared_cache
from orchestrator.config import Experiment
from orchestrator.errors import StorageError
from orchestrator.records import TrialResult, TrialSpec

TRIAL_ID = "baseline"


def spec(experiment: Experiment, folder: Path) -> TrialSpec:
    """The trial that measures the untouched model."""
    return TrialSpec(TRIAL_ID, "", (), {}, {}, 0, "baseline", experiment.model_dump(mode="json"), str(folder / "trials" / TRIAL_ID))


def identity(experiment: Experiment) -> dict[str, str]:
    """Content hashes of the untouched model and its chat template."""
    template = models.template_hash(models.tokenizer(experiment.model))
    return {"model": models.model_hash(experiment.model), "template": template}


def key(experiment: Experiment) -> str:
    """Hash of model, data, suites, judge, decoding and template: what the baseline's figures depend on."""
    from orchestrator.evaluation import judges, vllm_backend

    device = "cuda" if experiment.ray.use_gpu else "cpu"
    writer = {"backend": "vllm"} if vllm_backend.chosen(experiment.safety.generation, device) else {}
    found = materials.load(experiment)
    parts = {
        **identity(experiment),
        "system_prompt": experiment.model.system_prompt,
        "dtype": experiment.model.dtype,
        "data": found.fingerprint,
        "suites": [(s.name, s.kind, s.constrains, s.phase, s.attack, s.hash) for s in found.suites],
        "judge": [judges.from_setting(experiment.safety.judge).describe(), experiment.safety.second_judge],
        "external": [one.model_dump(mode="json") for one in experiment.safety.external],
        "decoding": {"safety": experiment.safety.max_new_tokens, "task": experiment.task.max_new_tokens, "greedy": True} | writer,
        "metric": experiment.task.metric,
        "max_length": experiment.task.max_length,
        "format": 2,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def path(experiment: Experiment) -> Path:
    """Where the cached record of this experiment's baseline lies."""
    return cachedir.root() / "baselines" / f"{key(experiment)}.json"


def recall(where: Path) -> TrialResult | None:
    """The cached record, or None where there is none. A file that cannot be read as a record is measured anew and replaced."""
    try:
        return TrialResult.from_dict(json.loads(where.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        os.replace(where, where.with_suffix(".unreadable"))
        return None


def look_up(where: Path) -> tuple[TrialResult | None, str | None]:
    """The record in the cache folder, else in the shared cache; and a sentence where that could not be asked."""
    trouble = None
    try:
        shared_cache.fetch_file(where)
    except StorageError as error:
        trouble = str(error)
    return recall(where), trouble


def remember(where: Path, result: TrialResult) -> str | None:
    """Keep a complete record, in the shared cache too; a sentence where that could not take it."""
    where.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_json(where, result.to_dict())
    try:
        shared_cache.send_file(where)
    except StorageError as error:
        return str(error)
    return None
