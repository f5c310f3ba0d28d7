"""How a command and the Python API come to their experiment: a file, a preset, a mapping or a made one, with overrides on top."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.config import Experiment
from orchestrator.data import made_up

Given = str | Path | Mapping[str, Any] | Experiment | None
"""Path of a YAML file, name of a preset, sections as a mapping, a finished Experiment; None is the pocket preset."""


def load(given: Given, overrides: Sequence[str] = (), *sources: str) -> Experiment:
    """The experiment to work with; libraries that would look for a GPU are told when none is wanted, so that they do not warn.

    `sources`: keys of the data that is used, all without it; none of them may be made up unless somebody wrote that. Raises ConfigError.
    """
    settings = Experiment.load(given, *overrides)
    made_up.refuse(settings, keys=sources or made_up.KEYS)
    return without_gpu_warnings(settings)


def without_gpu_warnings(settings: Experiment) -> Experiment:
    """The same experiment; libraries that would look for a GPU are told where none is wanted."""
    if not settings.ray.use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return settings


def around(given: Given, overrides: Sequence[str], model: str, baseline: str | None) -> Experiment:
    """The experiment around a model that is measured: what its `model` section says beside the name (template, dtype, system prompt) holds for
    all. Raises ConfigError."""
    settings = without_gpu_warnings(Experiment.load(given, *overrides))
    named = baseline if baseline is not None else model
    kept = settings.model.revision if named == settings.model.model_name_or_path else None
    if given is not None:  # a preset that was named is meant
        settings = settings.with_lent(())
    about = settings.model.model_copy(update={"model_name_or_path": named, "unaligned_name_or_path": None, "revision": kept})
    return settings.model_copy(update={"model": about})
