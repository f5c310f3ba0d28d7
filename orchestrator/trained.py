"""Trained weights that several trials share: methods that act after training need not train again for every setting of their knobs.

`<output>/trained/<key>/weights.safetensors` holds the trainable tensors as they were before `finish`, with what the methods remember.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.config import Experiment
    from orchestrator.records import TrialSpec
    from strategies.recipe import Recipe


WEIGHTS = "weights.safetensors"


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
    save_file(tensors, str(temporary))
    (where / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    os.replace(temporary, where / WEIGHTS)


def kept(where: Path) -> bool:
    """Whether a finished training lies there."""
    return (where / WEIGHTS).is_file()


def read(where: Path, model: nn.Module) -> dict[str, Any]:
    """Put kept tensors into a model that is set up the same way; returns the training's facts. Raises ValueError for another model."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = where / WEIGHTS
    targets = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with safe_open(path, framework="pt") as tensors, torch.no_grad():
            if set(tensors.keys()) != set(targets):
                raise ValueError(f"{path} holds other tensors than the model that is set up; remove {where}")
            for name, target in targets.items():
                target.copy_(tensors.get_tensor(name))
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({error}); remove {where}") from error
    return json.loads((where / "facts.json").read_text(encoding="utf-8"))
