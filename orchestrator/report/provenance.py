"""Where a result comes from: data sets with their hashes, versions of what computed it."""

from __future__ import annotations

import hashlib
from typing import Any

from orchestrator.config import Experiment
from orchestrator.redaction import redact_uri

PACKAGES = ("safebasin", "torch", "transformers", "peft", "deepspeed", "ray", "optuna", "mlflow")
"""Packages whose versions decide what a run gives."""


def datasets(experiment: Experiment) -> list[dict[str, Any]]:
    """Data of the experiment as dataset inputs: name, source, context and sha256 of the file's bytes.

    A hub name has no bytes here: its digest is that of its name and split, and `sha256` is None. Raises DataError for a missing file.
    """
    from orchestrator.data import rows

    task, safety = experiment.task, experiment.safety
    wanted = [("training", "task.data", task.data, task.split), ("evaluation", "task.eval_data", task.eval_data, task.split)]
    wanted.append(("safety training", "safety.data", safety.data, task.split))
    wanted += [(f"safety suite {s.name} ({s.kind})", "safety.suites", s.data, s.split) for s in safety.suites]
    found = []
    for context, field, source, split in wanted:
        if source is None:
            continue
        known = rows.describe(source, field=field)
        digest = known.get("sha256") or hashlib.sha256(f"{source}@{split}".encode("utf-8", "backslashreplace")).hexdigest()
        found.append(
            {"name": known["name"], "source": redact_uri(source), "context": context, "digest": digest, "sha256": known.get("sha256")}
        )
    return found


def versions() -> dict[str, str]:
    """Installed versions of PACKAGES, without importing them; `not installed` where one is missing."""
    from importlib import metadata

    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
