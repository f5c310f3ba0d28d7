"""What a finished search hands over: `best.json`, `best.yaml` (re-runnable), `model/`; and which trial models stay on disk.

`remove` takes a path away wherever the run's files are (`mirror.Copy.remove`); without it, from this disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.config import Experiment
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.decision.intervals import mean
from orchestrator.errors import StorageError
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.storage import files, ownership, sealing

if TYPE_CHECKING:
    from orchestrator.experiment.mirror import Copy


def best_experiment(experiment: Experiment, spec: TrialSpec, waited: int) -> Experiment:
    """The experiment that runs the winning configuration once: every knob pinned, nothing left to search. `waited`: rows that were held out of
    the search, which are held out again, so that it trains on the same ones."""
    raw = json.loads(experiment.model_dump_json())
    raw["name"] = f"{experiment.name}-best"
    raw["recipes"] = [[{name: dict(knobs)} for name, knobs in spec.strategies]]
    raw["training"].update(spec.training)
    pinned = {name: value for name, value in spec.params.items() if "." not in name}
    raw["search"].update(trials=1, seeds=[spec.seed], finalists=0, space=pinned, storage=None, time_budget_s=None)
    raw["safety"]["sequential"]["enabled"] = False  # a single trial is asked in full
    raw["safety"]["confirm_share"] = 0.0
    for one in (*raw["safety"]["suites"], *raw["safety"]["external"]):
        one["phase"] = "always"  # nothing is chosen any more, so nothing has to wait for it
    raw["task"]["confirm_size"] = waited
    raw["output"]["dir"] = "outputs/{name}"
    return config.from_dict(raw)


def write_best(
    folder: Path, experiment: Experiment, selection: decision_selection.Selection, specs: dict[str, TrialSpec], card: str, waited: int = 0
) -> None:  # fmt: skip
    """Write `best.json` in every case; `best.yaml` and `model/` where a configuration is feasible."""
    with ownership.active(folder, "run" if experiment.output_address is None else "mirror"):
        files.write_json(folder / "best.json", _summary(experiment, selection))
        ownership.remove(folder / "best.yaml")
        winner = selection.best_trial
        _remove_model(folder / "model", winner is not None)
        if winner is None:
            return
        files.write_text(folder / "best.yaml", config.dump_yaml(best_experiment(experiment, specs[winner.trial_id], waited)))
        if winner.model_dir and Path(winner.model_dir).is_dir():
            _copy_model(Path(winner.model_dir), folder / "model", card)


def fetch_winner(folder: Path, selection: decision_selection.Selection, copy: Copy) -> str | None:
    """Bring the winner's model here before it is handed over, and leave no earlier winner's in its place; a sentence where it is not to be had."""
    winner = selection.best_trial
    copy.hand_over()
    if winner is None or not winner.model_dir:
        copy.remove(folder / "model")
        return None
    try:
        copy.fetch(Path(winner.model_dir))
        why = "it is not there"
    except StorageError as error:
        why = str(error)
    if Path(winner.model_dir).is_dir():
        return None
    why = "; ".join(winner.facts.get("storage", [])) or why
    return f"the model of {winner.trial_id}, the best one, cannot be handed over: {why}; best.yaml trains it again"


def _copy_model(source: Path, target: Path, card: str) -> None:
    """Copy through a temporary name, so that `model/` is whole or absent. It has a list of its own: a model that somebody puts in its place is
    not taken for it. Raises StorageError."""
    partial = target.with_name(".model.partial")
    ownership.remove(partial)
    ownership.claim(partial, folder=True)
    ownership.claim(target, folder=True)
    try:
        shutil.copytree(source, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        (partial / ownership.marker_name("model")).unlink(missing_ok=True)  # the trial's
        names = sealing.sealed(partial, "model")
        if not target.exists():
            partial.replace(target)
            return
        with ownership.active(target, "model") as owned:  # somebody's own files are in it and stay
            for name in names:
                owned.claim(name)
                (target / name).parent.mkdir(exist_ok=True)
                (partial / name).replace(target / name)
        ownership.remove(partial)
    except OSError as error:
        raise files.storage_error(target, error) from error


def _remove_model(folder: Path, needed: bool) -> None:
    """Remove a model that we handed over; what somebody else put into its folder stays. Raises StorageError where its place is `needed` and the
    folder is not ours."""
    if ownership.remove(folder) or not needed:
        return
    if folder.is_symlink() or not folder.is_dir() or ownership.read(folder, "model") is None:
        raise StorageError(f"cannot replace {folder}: it was not written by this run; move it away, then `safebasin resume` writes the model")


def _summary(experiment: Experiment, selection: decision_selection.Selection) -> dict[str, Any]:
    def describe(found: decision_selection.Configuration | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {
            "recipe": found.recipe, "params": found.params, "seeds": list(found.seeds), "verdict": found.verdict,
            "task_score": found.score, "held_out_score": _held_out(found.handed_over[0]), "handed_over": found.handed_over[0].trial_id,
            "excess": found.excess, "trials": [_trial(r, j) for r, j in found.trials],
        }  # fmt: skip

    feasible = selection.best is not None
    return {
        "experiment": experiment.name,
        "config_hash": experiment.digest(),
        "outcome": selection.outcome,
        "limits": experiment.safety.limits.model_dump(),
        "best": describe(selection.best),
        "nearest_miss": None if feasible else describe(selection.nearest_miss),
    }


def _held_out(result: TrialResult) -> dict[str, Any] | None:
    """Score, interval and rows of the rows that the search never asked; None where none waited."""
    return None if result.confirmation is None else asdict(mean(result.confirmation.scores))


def _trial(result: TrialResult, judgement: limits.Judgement) -> dict[str, Any]:
    return {"trial_id": result.trial_id, "seed": result.seed, "state": result.state, **judgement.to_dict()}


def prune_models(rows: Sequence[tuple[TrialResult, limits.Judgement]], keep: str, remove: Callable[[Path], None] | None = None) -> None:
    """Delete the models no selection can hand over any more.

    With `keep="all"` nothing; with `keep="best"` the feasible configurations of the highest score so far (three of them: a finalist
    may fail its confirmation) and the nearest miss stay.
    """
    if keep == "all":
        return
    found = decision_selection.configurations(rows)
    feasible = sorted((c for c in found if c.promising), key=lambda c: (-c.score, c.excess))
    miss = decision_selection.best(rows).nearest_miss
    kept = {r.trial_id for c in [*feasible[:3], *([miss] if miss else [])] for r, _ in c.trials}
    for result, _ in rows:
        if result.trial_id not in kept and result.model_dir:
            (remove or ownership.remove)(Path(result.model_dir))


def remove_trained(folder: Path, keep: str, remove: Callable[[Path], None] | None = None) -> None:
    """Trainings that trials shared: none is needed once the search has ended, unless all models are kept."""
    if keep != "all":
        (remove or ownership.remove)(folder / "trained")


def remove_checkpoint(result: TrialResult, folder: Path, remove: Callable[[Path], None] | None = None) -> None:
    """A trial that ended needs no checkpoint to continue from, nor one to go back to."""
    for name in ("checkpoint", "good"):
        (remove or ownership.remove)(folder / "trials" / result.trial_id / name)
