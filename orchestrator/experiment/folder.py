"""A run's output folder before the run writes into it: emptied of what an earlier run made, and what others will make there listed."""

from __future__ import annotations

from pathlib import Path

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.storage import files, layout, ownership, ownership_checks

MADE_BY_OTHERS = ("ray", "trials", "trials/baseline", "trained")
"""Folders that workers and Ray make; on the run's list before they can."""


def claim_others(experiment: Experiment, folder: Path) -> None:
    """Put on the list what this process does not write itself. Raises StorageError where something of that name is somebody else's."""
    for name in MADE_BY_OTHERS:
        ownership.claim(folder / name, folder=True)
    if not experiment.search.storage:
        for name in ("study.journal", "study.journal.lock"):  # Optuna's
            ownership.claim(folder / name)


def prepare_folder(experiment: Experiment, folder: Path) -> None:
    """Remove what an earlier run made (its list, nothing else) where `output.overwrite` says so; write the resolved config."""
    with ownership.active(folder, "run" if experiment.output_address is None else "mirror") as owned:
        if experiment.output.overwrite:
            ownership_checks.refuse(owned, overwrite=True)  # again: the checks before may have taken minutes
            owned.empty(keep=[layout.LOCK])
        files.write_text(folder / "config.resolved.yaml", config.dump_yaml(experiment))
