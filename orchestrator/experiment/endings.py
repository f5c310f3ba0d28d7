"""What the command line says last of a run: where the model, its config and the report are."""

from __future__ import annotations

from orchestrator.config import Experiment
from orchestrator.experiment.driver import Outcome


def lines(experiment: Experiment, outcome: Outcome) -> list[str]:
    """Lines to print after an outcome's sentence; files that are not there are not named."""
    told = []
    if outcome.selection is not None and outcome.selection.best is not None:
        known = [("model", "model", "the model handed over"), ("best.yaml", "best.yaml", "trains it again")]
        told += [f"{name}: {experiment.place_of(file)} ({what})" for name, file, what in known if (outcome.folder / file).exists()]
    if (outcome.folder / "report.html").exists():
        told.append(f"report: {experiment.place_of('report.html')}")
    return told
