"""Trained weights that several trials share: methods that act after training need not train again for every setting of their knobs.

`<output>/trained/<key>/weights.safetensors` holds the trainable tensors as they were before `finish`, with what the methods remember.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.storage import files
from strategies import markers

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.config import Experiment
    from orchestrator.records import TrialSpec
    from strategies.recipe import Recipe


WEIGHTS, FACTS = "weights.safetensors", "facts.json"


def folder(spec: TrialSpec, experiment: Experiment, recipe: Recipe, fingerprint: str, world_size: int) -> Path | None:
    """Where the training of this trial is kept, by everything that decides it; None where every method of the recipe trains."""
    own = recipe.training_key
    if own is None:
        return None
    parts = [own, spec.seed, fingerprint, world_size, experiment.digest_of("model", "task", "safety", "training", "deepspeed", "monitor")]
    return Path(spec.dir).parent.parent / "trained" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write(where: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Keep the trainable tensors of a finished training and its facts. A write that is killed leaves nothing that looks whole."""
    from safetensors.torch import save_file

    where.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous().clone() for name, p in model.named_parameters() if p.requires_grad}
    temporary = where / f".weights.{os.getpid()}"
    try:
        save_file(tensors, str(temporary))
        files.write_text(where / FACTS, json.dumps(_sealed(facts, markers.file_hash(temporary))))
        os.replace(temporary, where / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)


def kept(where: Path) -> bool:
    """Whether a finished training lies there, whole or not (see `damage`)."""
    return (where / WEIGHTS).is_file()


def damage(where: Path) -> str | None:
    """What is wrong with a training that is kept there, None where it is what was written: then `read` takes it."""
    from safetensors import SafetensorError, safe_open

    try:
        _, written = _facts(where)
        if written is not None and markers.file_hash(where / WEIGHTS) != written:
            return f"{where.name}/{WEIGHTS} is not what was written: its SHA-256 differs"
        with safe_open(where / WEIGHTS, framework="pt"):
            return None
    except (OSError, ValueError, SafetensorError) as error:
        return f"{where.name} holds no whole training ({' '.join(str(error).split())[:200]})"


def read(where: Path, model: nn.Module) -> dict[str, Any]:
    """Put kept tensors into a model that is set up the same way; returns the training's facts. Raises ValueError for another model."""
    import torch
    from safetensors import SafetensorError, safe_open

    path, (facts, _) = where / WEIGHTS, _facts(where)
    targets = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with safe_open(path, framework="pt") as tensors, torch.no_grad():
            if set(tensors.keys()) != set(targets):
                raise ValueError(f"{path} holds other tensors than the model that is set up; remove {where}")
            for name, target in targets.items():
                target.copy_(tensors.get_tensor(name))
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({error}); remove {where}") from error
    return facts


def _sealed(facts: dict[str, Any], weights: str) -> dict[str, Any]:
    return {"facts": facts, "sha256": weights, "check": hashlib.sha256(json.dumps([facts, weights], sort_keys=True).encode()).hexdigest()}


def _facts(where: Path) -> tuple[dict[str, Any], str | None]:
    """(facts, hash of the weights; None where they were written before weights were hashed). Raises ValueError, OSError."""
    try:
        found = json.loads((where / FACTS).read_bytes())
    except RecursionError as error:
        raise ValueError(f"{FACTS} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{FACTS} holds no mapping")
    if set(found) == {"facts", "sha256", "check"}:
        if found != _sealed(found["facts"], found["sha256"]):
            raise ValueError(f"{FACTS} is not what was written")
        return found["facts"], found["sha256"]
    if not set(found) >= {"steps", "trial_id", "strategies", "monitor"}:
        raise ValueError(f"{FACTS} says nothing of a training")
    return found, None
