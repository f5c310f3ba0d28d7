"""The untouched model's record: measured once, kept by what it depends on in the user's cache folder and the cache that machines share."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.config import Experiment
from orchestrator.errors import StorageError
from orchestrator.models import identity as models_identity
from orchestrator.models import loading
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.storage import cache, cachedir, files
from orchestrator.trial import materials, record_check
from orchestrator.trial.record_check import BadRecord

TRIAL_ID = "baseline"

log = logging.getLogger(__name__)


def spec(experiment: Experiment, folder: Path) -> TrialSpec:
    """The trial that measures the untouched model."""
    return TrialSpec(TRIAL_ID, "", (), {}, {}, 0, "baseline", experiment.model_dump(mode="json"), str(folder / "trials" / TRIAL_ID))


def identity(experiment: Experiment) -> dict[str, str]:
    """Content hashes of the untouched model and its chat template."""
    template = models_identity.template_hash(loading.tokenizer(experiment.model))
    return {"model": models_identity.model_hash(experiment.model), "template": template}


def _drawn(experiment: Experiment) -> dict[str, Any]:
    """How answers are drawn, where any suite's are."""
    settings = experiment.safety.generation
    if not settings.samples and not any(suite.samples for suite in experiment.safety.suites):
        return {}
    return {"samples": settings.samples, "temperature": settings.temperature, "top_p": settings.top_p}


def key(experiment: Experiment) -> str:
    """Hash of model, data, suites, judge, decoding and template: what the baseline's figures depend on."""
    from orchestrator.evaluation import generate_vllm
    from orchestrator.evaluation.judges import registry

    device = "cuda" if experiment.ray.use_gpu else "cpu"
    writer = {"backend": "vllm"} if generate_vllm.chosen(experiment.safety.generation, device) else {}
    found = materials.load(experiment)
    parts = {
        **identity(experiment),
        "system_prompt": experiment.model.system_prompt,
        "dtype": experiment.model.dtype,
        "data": found.fingerprint,
        # the requests with them: a record's requests are the unit of every interval that is compared with it
        "suites": [(s.name, s.kind, s.constrains, s.phase, s.attack, s.hash, s.groups, s.requests, s.samples) for s in found.suites],
        "judge": [registry.from_setting(experiment.safety.judge).describe(), experiment.safety.second_judge],
        "external": [one.model_dump(mode="json") for one in experiment.safety.external],
        "decoding": {"safety": experiment.safety.max_new_tokens, "task": experiment.task.max_new_tokens, "greedy": True}
        | _drawn(experiment)
        | writer,
        "metric": experiment.task.metric,
        "max_length": experiment.task.max_length,
        "format": 4,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def path(experiment: Experiment) -> Path:
    """Where the cached record of this experiment's baseline lies."""
    return cachedir.root() / "baselines" / f"{key(experiment)}.json"


def recall(where: Path, experiment: Experiment | None = None, say: Callable[[str], None] = log.warning) -> TrialResult | None:
    """The cached record, or None where there is none. One that is damaged, or not of this experiment's untouched model, is moved aside
    and said, and measured anew."""
    try:
        result = record_check.read_result(where)
        trouble = None if result is None else _foreign(result, experiment)
        if trouble is None:
            return result
        reason = f"{where} is no record of this untouched model: {trouble}"
    except BadRecord as error:
        reason = str(error)
    try:
        aside = f"it was moved to {record_check.move_aside(where, 'unreadable').name}"
    except StorageError as error:
        aside = str(error)
    say(f"warning: {reason}; {aside}, and the untouched model is measured again")
    return None


def _foreign(result: TrialResult, experiment: Experiment | None) -> str | None:
    """Why a record is not the untouched model's of this experiment, in words; None where it is."""
    if (result.trial_id, result.phase, result.recipe, result.state) != (TRIAL_ID, "baseline", "", "complete"):
        return f"it is of {result.trial_id!r:.60}, {result.phase}, {result.state}"
    if result.task is None:
        return "it has no task score"
    if experiment is None:
        return None
    wanted, waits = {suite.name: suite.kind for suite in experiment.safety.suites}, False
    if experiment.confirms or experiment.task.confirm_size:
        found = materials.load(experiment)
        wanted, waits = {suite.name: suite.kind for suite in found.suites}, bool(found.confirmation)
    if {name: suite.kind for name, suite in result.suites.items()} != wanted:
        return f"its suites are {', '.join(result.suites) or 'none'}, not {', '.join(wanted)}"
    if (result.confirmation is not None) != waits:
        return f"it has {'no' if result.confirmation is None else 'a'} score on rows held out of the search"
    if result.task.metric != experiment.task.metric:
        return f"its metric is {result.task.metric!r:.60}, not {experiment.task.metric!r}"
    return None


def look_up(
    where: Path, experiment: Experiment | None = None, say: Callable[[str], None] = log.warning
) -> tuple[TrialResult | None, str | None]:
    """The record in the cache folder, else in the shared cache; and a sentence where that could not be asked."""
    trouble = None
    try:
        cache.fetch_file(where)
    except StorageError as error:
        trouble = str(error)
    return recall(where, experiment, say), trouble


def remember(where: Path, result: TrialResult) -> str | None:
    """Keep a complete record, in the shared cache too; a sentence where that could not take it."""
    where.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(where, result.to_dict())
    try:
        cache.send_file(where)
    except StorageError as error:
        return str(error)
    return None
