"""The trial records of an output folder: what was asked (`spec.json`), how it ended (`result.json`). They are the truth of a search.

`trials/<id>/spec.json` is written when a trial is asked, before a lane gets it; `result.json` when it has ended. Whatever else a crash,
a full disk or a hand leaves there is named, moved aside or left alone, and never counted:

- a record that cannot be read is moved to `<name>.damaged-<n>`, and its trial is tried again where the other record says what it was;
- a record of something else (another recipe, another id, parameters outside the space) is left where it is and not counted;
- a failure by a machine's or safebasin's fault is kept as `result.failed-<n>.json`, and its trial is tried again.

Ids are never used twice: the next one is above every id that any file of the folder names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.config import Experiment
from orchestrator.errors import StorageError
from orchestrator.experiment import identity
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.points import outside, sampled
from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.studies import Asked, Outcome, Past, past_of_journal, storage_path
from orchestrator.storage import files, nofollow
from orchestrator.storage.layout import RESULT, SPEC
from orchestrator.trial import record_check
from orchestrator.trial.record_check import TRIAL_ID, BadRecord, next_number, number_of

_NAMED = re.compile(rb"""(?:^|["'])t([0-9]{4,9})(?:s-?[0-9]{1,20})?["',]""")
_WITNESSES = ("trials.csv", "study.journal*", "tracking.json", "tracking.spool.jsonl")
"""Files that name trials, beside the trials' folders."""


_FAULTS = {"machine": " by a machine's fault", "safebasin": " by safebasin's own fault"}


@dataclass
class Found:
    """What an earlier driver left."""

    results: list[TrialResult] = field(default_factory=list)
    """Of trials that are over for good, in the order they ended."""
    open: list[Past] = field(default_factory=list)
    """Trials of the search to be tried again."""
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Content of spec.json by trial id."""
    next_id: int = 1
    sentences: list[str] = field(default_factory=list)
    """What was found wrong, and what became of it."""

    def past(self, outcomes: Mapping[str, Outcome], spaces: Mapping[str, RecipeSpace]) -> list[Past]:
        """Every trial of the search, for `Studies.restore`; `outcomes` says how those in `results` are judged."""
        over = [r for r in self.results if r.phase == "search"]
        past = [_past(r.recipe, r.trial_id, r.params, outcomes[r.trial_id], self.asked.get(r.trial_id), spaces) for r in over]
        return [replace(one, seed=r.seed) for one, r in zip(past, over, strict=True)] + self.open


def write_spec(folder: Path, spec: TrialSpec, run: str, asked: Asked | None = None) -> None:
    """Record that a trial was asked, before anything runs. Raises StorageError."""
    body = {
        "format": 1, "run": run, "trial_id": spec.trial_id, "recipe": spec.recipe, "params": spec.params, "seed": spec.seed, "phase": spec.phase,
        "passed_over": list(asked.passed_over) if asked else [], "sampler": dict(asked.sampler) if asked else {},
        "config": identity.marks(spec.experiment),
    }  # fmt: skip
    files.write_json(folder / "trials" / spec.trial_id / SPEC, body)


def read(folder: Path, experiment: Experiment, spaces: Mapping[str, RecipeSpace], run: str, *, retry_failed: bool = False) -> Found:
    """Read every trial's records. What is damaged is moved aside, what is foreign left alone; both are said in `sentences`.

    Raises StorageError where a file that has to be moved cannot be, and where `trials` is no folder.
    """
    found = Found()
    home = folder / "trials"
    if os.path.lexists(home) and not home.is_dir():
        what = "a link that leads to no folder" if home.is_symlink() else "no folder"
        raise StorageError(f"{home} is {what}, so the run's trials are not there; move it away and put the folder trials/ back in its place")
    paths = sorted(home.iterdir()) if home.is_dir() else []
    places = {path.name: path for path in paths if path.is_dir()}
    ended: list[tuple[int, TrialResult]] = []
    for name, place in sorted(places.items()):
        if name == "baseline":
            continue
        if not TRIAL_ID.fullmatch(name):
            if (place / RESULT).exists() or (place / SPEC).exists():
                found.sentences.append(f"{place} is no trial of this run ({name!r} is no trial id) and is not counted")
            continue
        if place.is_symlink():
            _read_linked(place, experiment, spaces, run, found, ended)
        else:
            _read_one(place, experiment, spaces, run, retry_failed, found, ended)
    for path in paths:
        if TRIAL_ID.fullmatch(path.name) and path.name not in places:
            what = "a link that leads to no folder" if path.is_symlink() else "no folder"
            found.sentences.append(f"{path} is {what}, so {path.name} is not counted; its id is not used again")
    found.results = [result for _, result in sorted(ended, key=lambda pair: (pair[0], pair[1].trial_id))]
    found.next_id = _next_id(folder, [path.name for path in paths])
    if found.next_id > 1 and not places.keys() - {"baseline"}:
        found.sentences.append(
            f"{home} holds no trial, and files beside it name trials up to t{found.next_id - 1:04d}; they are not counted. If the folder was moved "
            "away, stop and put it back"
        )
    return found


def _read_linked(place: Path, experiment: Experiment, spaces: Mapping[str, RecipeSpace], run: str, found: Found, ended: list) -> None:
    """A trial whose folder lies elsewhere and is linked: counted where its records are whole, and only read, since what lies there is not ours."""
    trouble, asked, result = None, None, None
    try:
        asked = record_check.guarded(place / SPEC, lambda raw: _wrong_spec(raw, spaces))
        result = record_check.read_result(place / RESULT)
        if asked is None or result is None:
            trouble = f"it holds no {SPEC if asked is None else RESULT}"
        elif run and asked["run"] != run:
            trouble = "it is of another run"
        elif not result.final:
            trouble = "it is to be tried again"
        else:
            trouble = _foreign_result(place.name, result, asked, experiment, spaces)
    except BadRecord as error:
        trouble = str(error)
    if trouble:
        found.sentences.append(f"{place} is a link to {os.readlink(place)} and is not counted ({trouble}); {place.name} is not used again")
        return
    result.model_dir = str(place / "model") if result.model_dir else None
    found.asked[place.name] = asked
    ended.append(((place / RESULT).stat().st_mtime_ns, result))
    found.sentences.append(f"{place} is a link to {os.readlink(place)}; its records are counted, and nothing is written there")


def _read_one(
    place: Path, experiment: Experiment, spaces: Mapping[str, RecipeSpace], run: str, retry_failed: bool, found: Found, ended: list
) -> None:
    asked = _spec(place, experiment, spaces, found)
    if asked is not None and run and asked["run"] != run:
        found.sentences.append(f"{place} is of another run ({SPEC} says so) and is not counted; {place.name} is not used again")
        return
    result = _result(place, asked, experiment, spaces, found)
    if asked is not None:
        found.asked[place.name] = asked
    if result is not None:
        final = result.final and not (retry_failed and result.state == "failed")
        if final:
            ended.append(((place / RESULT).stat().st_mtime_ns, result))
            return
        if result.state == "failed":
            kept, by = _kept_failure(place), _FAULTS.get(result.fault or "", "")
            found.sentences.append(f"{place.name} had failed{by} ({_line(result.error)}); it is tried again, and {kept.name} keeps that record")
    source = asked or (result and {"recipe": result.recipe, "params": result.params, "phase": result.phase, "seed": result.seed})
    if source is None:
        if any(place.iterdir()):
            found.sentences.append(f"{place} holds no record that can be read, so {place.name} is not counted; its id is not used again")
    elif source["phase"] == "search":
        found.open.append(replace(_past(source["recipe"], place.name, source["params"], None, asked, spaces), seed=source["seed"]))


def _past(
    recipe: str, trial_id: str, params: dict[str, Any], outcome: Outcome | None, asked: dict[str, Any] | None, spaces: Mapping[str, RecipeSpace]
) -> Past:
    space = spaces[recipe]
    over = tuple({**known, "params": sampled(space, known["params"])} for known in (asked or {}).get("passed_over", ()))
    return Past(trial_id, recipe, sampled(space, params), outcome, over, (asked or {}).get("sampler", {}))


def _spec(place: Path, experiment: Experiment, spaces: Mapping[str, RecipeSpace], found: Found) -> dict[str, Any] | None:
    """What was asked; None where it is not there, was damaged (moved aside), or is of something else."""
    path = place / SPEC
    try:
        raw = record_check.guarded(path, lambda raw: _wrong_spec(raw, spaces))
        if raw is None:
            return None
    except BadRecord as error:
        found.sentences.append(_aside(path, error))
        return None
    trouble = foreign(place.name, raw["trial_id"], raw["recipe"], raw["params"], raw["seed"], raw["phase"], experiment, spaces)
    if trouble:
        found.sentences.append(f"{path} is not counted: {trouble}")
        return None
    return raw


def _result(
    place: Path, asked: dict[str, Any] | None, experiment: Experiment, spaces: Mapping[str, RecipeSpace], found: Found
) -> TrialResult | None:
    """How it ended; None where it has not, the record was damaged (moved aside), or is of something else."""
    path = place / RESULT
    try:
        result = record_check.read_result(path)
    except BadRecord as error:
        found.sentences.append(_aside(path, error))
        return None
    if result is None:
        return None
    trouble = _foreign_result(place.name, result, asked, experiment, spaces)
    if not trouble:
        result.model_dir = str(place / "model") if result.model_dir else None  # a record is no guide to other places
        return result
    if asked is None:
        found.sentences.append(f"{path} is not counted: {trouble}; it is left where it is, and {place.name} is not used again")
    else:
        aside = record_check.move_aside(path, "foreign")
        found.sentences.append(f"{path} is not counted: {trouble}; it was moved to {aside.name} and {place.name} is tried again")
    return None


def _foreign_result(
    name: str, result: TrialResult, asked: dict[str, Any] | None, experiment: Experiment, spaces: Mapping[str, RecipeSpace]
) -> str | None:
    """Why a result is not of this search's trial, or not of what was asked, in words; None where it is."""
    trouble = foreign(name, result.trial_id, result.recipe, result.params, result.seed, result.phase, experiment, spaces)
    if not trouble and result.task is not None and result.task.metric != experiment.task.metric:
        trouble = f"its metric is {result.task.metric!r:.60}, and the run's is {experiment.task.metric!r:.60}"
    if not trouble and asked is not None:
        told = {"params": files.plain(result.params), "seed": result.seed, "phase": result.phase, "recipe": result.recipe}
        differing = [key for key, value in told.items() if asked[key] != value]
        trouble = f"its {differing[0]} is not what was asked ({SPEC})" if differing else None
    return trouble


def foreign(
    name: str, trial_id: str, recipe: str, params: dict[str, Any], seed: int, phase: str, experiment: Experiment, spaces: Mapping[str, RecipeSpace]
) -> str | None:
    """Why a record is not one of this search's trials, in words; None where it is."""
    if trial_id != name:
        return f"it says it is of the trial {trial_id!r:.60}"
    if recipe not in spaces:
        return f"its recipe {recipe!r:.60} is none of {', '.join(spaces)}"
    if phase == "baseline" or (phase == "confirm") != ("s" in name):
        return f"its phase {phase!r} does not go with the id {name}"
    if phase == "search" and seed not in (experiment.search.seeds[0], experiment.search.second_seed):
        return f"its seed {seed} is not the search's ({experiment.search.seeds[0]}, and {experiment.search.second_seed} for a new best)"
    if phase == "confirm" and str(seed) != name.partition("s")[2]:
        return f"its seed {seed} does not go with the id {name}"
    return outside(spaces[recipe], params)


def _wrong_spec(raw: Any, spaces: Mapping[str, RecipeSpace]) -> str | None:
    types = {
        "format": int, "run": str, "trial_id": str, "recipe": str, "params": dict, "seed": int, "phase": str, "passed_over": list, "sampler": dict,
    }  # fmt: skip
    if not isinstance(raw, dict) or set(raw) - {"config"} != set(types):  # before the config's hashes were kept there was none
        return f"its fields are not {', '.join(types)}"
    for key, kind in types.items():
        if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
            return f"{key} is of the wrong type"
    if raw["format"] != 1:
        return f"it is of format {raw['format']}, written by another version of safebasin"
    if raw["phase"] not in ("search", "confirm"):
        return f"phase is {raw['phase']!r:.60}"
    space = spaces.get(raw["recipe"])
    for known in raw["passed_over"]:
        fine = isinstance(known, dict) and set(known) == {"params", "of", "complete", "sampler"} and isinstance(known["params"], dict)
        if not fine or not isinstance(known["of"], str) or not isinstance(known["complete"], bool) or not _notes(known["sampler"]):
            return "passed_over holds what is no point"
        if space is not None and outside(space, {**space.fixed, **known["params"]}):
            return "passed_over holds a point outside the space"
    return None if _notes(raw["sampler"]) else "sampler holds what is no note of a sampler"


def _notes(raw: Any) -> bool:
    return isinstance(raw, dict) and all(key.endswith(":generation") and type(value) is int for key, value in raw.items())


def unrecorded(folder: Path, experiment: Experiment, spaces: Mapping[str, RecipeSpace], known: set[str]) -> list[Past]:
    """Trials of which only the journal knows (asked before the records said so), to be tried again; [] where it cannot be read."""
    if not storage_path(experiment).is_file():
        return []
    try:
        past = past_of_journal(experiment, dict(spaces))
    except StorageError:  # it is a cache, and `Studies.restore` says what is wrong with it
        return []
    found = []
    for one in past:
        if TRIAL_ID.fullmatch(one.trial_id) and one.trial_id not in known:
            space, place = spaces[one.recipe], folder / "trials" / one.trial_id
            there = any(os.path.lexists(path) for path in (place / RESULT, place / SPEC)) or os.path.lexists(place) and not place.is_dir()
            if not there and not place.is_symlink() and not outside(space, {**space.fixed, **one.params}):
                found.append(replace(one, outcome=None))
    return found


def _next_id(folder: Path, names: list[str]) -> int:
    """A number that no id has which the folder's names and files name, whatever state these are in, nor any after it."""
    numbers = [number_of(name) for name in names if TRIAL_ID.fullmatch(name)]
    for pattern in _WITNESSES:
        for path in folder.glob(pattern):
            if path.is_file():
                try:
                    numbers += _named(path)
                except OSError as error:
                    raise StorageError(f"cannot read {path}: {error.strerror or error}; make it readable, or move it out of the folder") from error
    return next_number(numbers)


def _named(path: Path) -> set[int]:
    """Numbers of the trials that a file names. Raises OSError."""
    found, before = set(), b""
    with nofollow.regular(path, nofollow.MOST_JOURNAL) as file:
        while part := file.readline(1 << 20):  # a damaged file may be one line
            found |= {int(number) for number in _NAMED.findall(before + part)}
            before = b"" if part.endswith(b"\n") else part[-40:]
    return found


def _aside(path: Path, error: BadRecord) -> str:
    return f"{error}; it was moved to {record_check.move_aside(path).name}"


def _kept_failure(place: Path) -> Path:
    """Keep the record of a failure beside the one that comes."""
    number = 1
    while (kept := place / f"result.failed-{number}.json").exists():
        number += 1
    try:
        return (place / RESULT).rename(kept)
    except OSError as error:
        raise files.storage_error(kept, error) from error


def _line(error: str | None) -> str:
    return (error or "without a reason").strip().split("\n")[0][:160]
