"""What a release is decided by, read from the folder of a run or of an evaluation: records of the model, of its further seeds and of the untouched
model, hashes of the files they stand in, and which model's files they speak of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import config
from orchestrator.config import Experiment, yaml_text
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.experiment import identity as run_identity
from orchestrator.models import contents, folders, subjects
from orchestrator.records import TrialResult
from orchestrator.storage import addresses, nofollow, paths
from orchestrator.trial import record_check
from orchestrator.verbs import evaluated


@dataclass(frozen=True)
class Evidence:
    """Records, and what they are of."""

    folder: Path
    kind: str
    """`run` or `evaluation`."""
    experiment: Experiment
    own: TrialResult
    """Of the model that would be released."""
    others: tuple[TrialResult, ...]
    """The same configuration on further seeds; other models than the one released."""
    before: TrialResult | None
    """Of the untouched model."""
    model: str
    """The model's folder, or how it is named where its files do not lie here."""
    untouched: dict[str, str]
    """Name and hash of the untouched model; {} where none was measured."""
    base: dict[str, str]
    """Name and hash of what an adapter was measured on; {} for a whole model."""
    itself: bool = False
    """Whether the model was compared with the same weights."""
    records: dict[str, str] = field(default_factory=dict)
    """sha256 of every file that was read, by its name below `folder`."""

    @property
    def measured(self) -> tuple[TrialResult, ...]:
        """The model's record first, then those of further seeds."""
        return (self.own, *self.others)


def find(target: str, evidence: str | None = None) -> tuple[Evidence, str]:
    """(the evidence, the model that would be released) for a folder of a run or an evaluation, or for a model in one or beside `evidence`.

    Raises ConfigError for what is neither, SafebasinError where a run handed over no model or a record cannot be read.
    """
    for name in (target, evidence or ""):
        if addresses.is_address(name):
            raise ConfigError(f"{addresses.masked(name)} is an address; copy the folder to this machine and give its path")
    path = paths.expanded(target)
    if evidence is not None:
        if not is_evidence(paths.expanded(evidence)):
            raise ConfigError(f"--evidence {evidence!r} holds neither a finished run (best.json, trials/) nor an evaluation.json; give such a folder")
        return read(paths.expanded(evidence)), target
    if is_evidence(path):
        found = read(path)
        return found, found.model
    if is_evidence(path.parent) and paths.is_folder(path):
        return read(path.parent), str(path)
    if paths.is_folder(path / "trials"):
        raise ConfigError(f"{target} is a run that has not ended; finish it with: safebasin resume {target}")
    if paths.is_folder(path):
        raise ConfigError(
            f"{target} holds neither a finished run nor an evaluation.json, nor does the folder it lies in; name the evidence of this model with "
            f"--evidence DIR, or make some: safebasin evaluate {target} --baseline BASE -c FILE -o DIR"
        )
    raise ConfigError(f"{target} is no folder; give the folder of a run, of an evaluation, or of a model beside its evidence")


def is_evidence(path: Path) -> bool:
    """Whether a folder holds an evaluation or a run that has ended."""
    return paths.is_file(path / evaluated.FILE) or (paths.is_file(path / "best.json") and paths.is_folder(path / "trials"))


def read(folder: Path) -> Evidence:
    """The evidence in a folder. Raises as `find`."""
    return _evaluation(folder) if paths.is_file(folder / evaluated.FILE) else _run(folder)


def _evaluation(folder: Path) -> Evidence:
    body, own = evaluated.read(folder / evaluated.FILE)
    before = None if body.get("before") is None else record_check.result_of(body["before"], "its `before`")
    made = config.from_dict(yaml_text.parse(str(body.get("config", "")), f"the config in {folder / evaluated.FILE}") or {})
    base = {"name": body["model"]["base"], "hash": body["model"]["base_hash"]} if {"base", "base_hash"} <= set(body["model"]) else {}
    known = {"name": str(body["baseline"]["name"]), "hash": str(body["baseline"]["hash"])} if body.get("baseline") else {}
    name = body["model"]["name"]
    itself = bool(known) and known["hash"] == body["model"].get("hash")
    return Evidence(folder, "evaluation", made, own, (), before, name, known, base, itself, _hashes(folder, [evaluated.FILE]))


def _run(folder: Path) -> Evidence:
    best = record_check.guarded(folder / "best.json", record_check.wrong_best)
    if best["best"] is None:
        raise SafebasinError(f"{folder}: the run found nothing feasible, so it handed over no model; there is nothing to release")
    begun = run_identity.read(folder)
    if begun is None:
        raise SafebasinError(f"{folder} holds no {run_identity.FILE}, which says what its run was begun with; restore it, or evaluate the model anew")
    rows = [_trial(folder, best["best"], one) for one in best["best"]["trials"]]
    named = best["best"].get("handed_over", rows[0].trial_id)  # before rows could wait it was the first seed's
    rows.sort(key=lambda row: row.trial_id != named)
    if rows[0].trial_id != named:
        raise SafebasinError(f"{folder / 'best.json'} says that {named!r:.60} was handed over, which is none of its trials; it was changed")
    before = record_check.read_result(folder / "baseline.json")
    if before is None:
        raise SafebasinError(f"{folder} holds no baseline.json, the record of the untouched model; restore it, or evaluate the model anew")
    made = config.from_dict(begun.config)
    untouched = {"name": made.model.model_name_or_path, "hash": begun.content.get("model", "")}
    model = folder / "model"
    adapter = folders.is_folder(model) and folders.examine(model).adapter
    files = [f"trials/{row.trial_id}/result.json" for row in rows] + ["baseline.json", "best.json", run_identity.FILE]
    return Evidence(
        folder, "run", made, rows[0], tuple(rows[1:]), before, str(model), untouched, untouched if adapter else {}, False, _hashes(folder, files)
    )


def _trial(folder: Path, best: dict[str, Any], one: Any) -> TrialResult:
    """The record of one of the best configuration's trials. Raises SafebasinError where it is not there or of another configuration."""
    name = str(one.get("trial_id")) if isinstance(one, dict) else ""
    if not record_check.TRIAL_ID.fullmatch(name):
        raise SafebasinError(f"{folder / 'best.json'} names {name!r:.60}, which is no trial id; it was changed since the run wrote it")
    path = folder / "trials" / name / "result.json"
    found = record_check.read_result(path)
    if found is None:
        raise SafebasinError(f"{path} is gone, the record of the best configuration's trial {name}; restore it, or evaluate the model anew")
    if (found.trial_id, found.recipe, found.params, found.seed) != (name, best["recipe"], best.get("params"), one.get("seed")):
        raise SafebasinError(f"{path} is of another configuration or seed than best.json says; one of the two was changed since the run wrote it")
    return found


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256(nofollow.data_of(folder / name)).hexdigest() for name in sorted(names)}


@dataclass(frozen=True)
class Weights:
    """A model's files as they are now."""

    name: str
    files: dict[str, str]
    """sha256 by name; {} where they do not lie here."""
    base: dict[str, str]
    """Name and hash now of what an adapter is put on; {} for a whole model."""
    trouble: str = ""
    """Why the base could not be looked at."""

    @property
    def digest(self) -> str | None:
        """sha256 over all of them; None where there is none."""
        return contents.digest(self.files) if self.files else None


def weights(model: str, found: Evidence | None, base: str | None = None) -> Weights:
    """The files of a model's folder, and of an adapter what identifies its base: `base`, else the one the evidence names, else its own.

    Raises ModelError for a folder that cannot be read.
    """
    path = paths.expanded(model)
    if model == "pocket" or model.startswith("pocket:"):
        from orchestrator import pocket

        path = pocket.resolve(model)
    if not paths.is_folder(path):
        return Weights(model, {}, {})
    files = contents.of(path)
    if not folders.examine(path).adapter:
        return Weights(model, files, {})
    named = base or (found.base.get("name") if found else None)
    try:
        under = subjects.base_of(model, named)
        known = subjects.identity(under, found.experiment.model if found else config.Model())
    except SafebasinError as error:
        return Weights(model, files, {}, str(error))
    return Weights(model, files, {"name": known["name"], "hash": known["hash"]})


def taken_at(result: TrialResult) -> datetime | None:
    """When a model was measured; None where its record does not say, or says what is no time."""
    known = result.facts.get(contents.FACT) or {}
    try:
        moment = datetime.fromisoformat(str(known.get("at")))
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.tzinfo is not None else None


def defences(found: Evidence) -> list[str]:
    """Strategies of the model's recipe that act around generation, which no folder holds; [] for an evaluation."""
    import strategies
    from strategies.base import Strategy

    names = dict(zip(found.experiment.recipe_names, found.experiment.recipes, strict=True))
    recipe = names.get(found.own.recipe, ()) if found.kind == "run" else ()
    known = [name for name, _ in config.recipe_items(recipe) if name in strategies.STRATEGIES]
    return [name for name in known if strategies.get(name).wrap is not Strategy.wrap]
