"""Reading records that someone else may have written: every field known, of its type, lists of one length, or a sentence that says what is not.

`TrialResult.from_dict` is for what this process was just told; files go through here.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.records import SuiteResult, TaskResult, TrialResult
from orchestrator.storage import files, nofollow
from orchestrator.trial import reach

TRIAL_ID = re.compile(r"t([0-9]{4}|[1-9][0-9]{4,8})(s-?[0-9]{1,20})?")
"""Ids of trials: `t0012`, and `t0012s1` for its confirmation on seed 1. They name folders, so nothing else is one."""

_FACTS: dict[str, tuple[type, ...]] = {
    "cancelled": (bool,), "started": (bool,), "storage": (list,), "external": (dict,), "template": (dict,), "monitor": (dict,), "strategies": (dict,),
    "traceback": (str,), "rows": (dict,), "generation": (dict,), "untouched": (dict,), "measured": (dict,), "peak_memory_mb": (int, float),
}  # fmt: skip
"""Types of the facts that others read; None is allowed for each."""

GAP = 10**6
"""More numbers than one search gives out: where so many are free, all of its ids fit in."""
MOST_NUMBER = 10**9 - 1
"""The largest number that TRIAL_ID reads."""


def number_of(trial_id: str) -> int:
    """The number in a trial id: 12 of `t0012` and of `t0012s1`."""
    return int(trial_id[1:].partition("s")[0])


def next_number(taken: Iterable[int], least: int = 1) -> int:
    """The first number, from `least` on, behind which GAP numbers are free of `taken`: no id is given twice, and an id that somebody planted
    far up does not drive the next ones out of what TRIAL_ID reads. Raises StorageError where no such place is left."""
    number = least
    for one in sorted(taken):
        if one >= number + GAP:
            break
        number = max(number, one + 1)
    if number > MOST_NUMBER - GAP:
        raise StorageError(f"no trial id is free below t{MOST_NUMBER - GAP}; move the folders in trials/ with the largest numbers away")
    return number


class BadRecord(StorageError):
    """A file that is no record of ours, or a damaged one."""


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none. Raises BadRecord for anything that `files.write_json` never wrote."""
    try:
        text = nofollow.data_of(path).decode("utf-8")
    except FileNotFoundError:
        if path.is_symlink():
            raise BadRecord(f"{path} cannot be read: it is a link to nothing") from None
        return None
    except UnicodeDecodeError as error:
        raise BadRecord(f"{path} is damaged: it is no UTF-8 text") from error
    except OSError as error:
        raise BadRecord(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        found = json.loads(text, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{path} is damaged: {_short(error)}") from error
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number a record holds")


def result_of(raw: Any, where: str | Path) -> TrialResult:
    """A trial's record from what its file holds. Raises BadRecord that names the file and the first thing that is wrong."""
    import pydantic

    if not isinstance(raw, dict):
        raise BadRecord(f"{where} is no trial's record: it holds {_kind(raw)}, not an object")
    try:
        found = _adapter().validate_json(json.dumps(_with_nan(raw)), strict=True)
    except pydantic.ValidationError as error:
        raise BadRecord(f"{where} is no trial's record of this version: {_first(error)}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where} is no trial's record: {_short(error)}") from error
    trouble = _inner(found)
    if trouble:
        raise BadRecord(f"{where} is no trial's record: {trouble}")
    for one in (found.facts.get("external") or {}).values():
        one |= {key: math.nan for key in ("value", "stderr") if one[key] is None}
    return found


def read_result(path: Path) -> TrialResult | None:
    """The record in a file, None where there is none. Raises BadRecord."""
    raw = read_json(path)
    return None if raw is None and not os.path.lexists(path) else result_of(raw, path)


def guarded(path: Path, check: Callable[[Any], str | None]) -> Any:
    """The content of a JSON file that `check` finds nothing wrong with, None where there is none. Raises BadRecord."""
    raw = read_json(path)
    if raw is None and not os.path.lexists(path):
        return None
    trouble = check(raw)
    if trouble:
        raise BadRecord(f"{path} is damaged: {trouble}")
    return raw


def wrong_best(raw: Any) -> str | None:
    """Why the content of best.json names no trial, in words; its ids name folders."""
    if not isinstance(raw, dict) or not {"best", "nearest_miss"} <= set(raw):
        return "it names neither a best nor a nearest trial"
    for one in (raw["best"], raw["nearest_miss"]):
        trials = one.get("trials") if isinstance(one, dict) and isinstance(one.get("recipe"), str) else None
        first = trials[0] if isinstance(trials, list) and trials and isinstance(trials[0], dict) else {}
        if one is not None and not TRIAL_ID.fullmatch(str(first.get("trial_id"))):
            return f"it names {first.get('trial_id')!r:.60}, which is no trial id"
    return None


@functools.cache
def _adapter():
    import pydantic

    return pydantic.TypeAdapter(TrialResult)


def _with_nan(raw: dict[str, Any]) -> dict[str, Any]:
    """Figures that were no number are written as null; they come back as NaN."""
    for name in ("task", "confirmation"):
        task = raw.get(name)
        if not isinstance(task, dict) or "score" not in task:
            continue
        scores = task.get("scores")
        task = {**task, "score": math.nan if task["score"] is None else task["score"]}
        if isinstance(scores, list):
            task["scores"] = [math.nan if one is None else one for one in scores]
        raw = {**raw, name: task}
    return raw


def _inner(found: TrialResult) -> str | None:
    """What is wrong between fields, in words; None where nothing is."""
    if found.steps < 0:
        return f"steps is {found.steps}"
    for name, task in (("task", found.task), ("confirmation", found.confirmation)):
        if task is not None and len(task.scores) != len(task.ids):
            return f"{name} has {len(task.scores)} scores for {len(task.ids)} rows"
        trouble = _score(task) if task is not None else None
        if trouble:
            return f"{name}: {trouble}"
    for key, suite in found.suites.items():
        if suite.name != key:
            return f"suites.{key} is named {suite.name!r}"
        trouble = _lengths(suite) or _verdicts(suite)
        if trouble:
            return f"suites.{key}: {trouble}"
    for event in found.history:
        if not isinstance(event.get("kind"), str) or not isinstance(event.get("step", 0), int) or isinstance(event.get("step", 0), bool):
            return "history holds what is no event"
    return _facts(found.facts)


def _score(task: TaskResult) -> str | None:
    """Every metric lies within 0..1, and the score is the rows' mean; a figure that was none (NaN) makes the mean none."""
    if not all(math.isnan(one) or 0.0 <= one <= 1.0 for one in [task.score, *task.scores]):
        return "a score lies outside 0..1"
    if not task.scores:
        return "it has a score and no rows" if not math.isnan(task.score) else None
    mean = sum(task.scores) / len(task.scores)
    if math.isnan(mean) != math.isnan(task.score) or abs(mean - task.score) > 1e-6:
        return f"score is {task.score}, and the mean of its scores {mean}"
    return None


def _verdicts(suite: SuiteResult) -> str | None:
    """What the lists say agrees with the counts beside them."""
    undecided = None if suite.unparsed is None else sum(suite.unparsed)
    if not 0 <= suite.parse_failed <= len(suite.ids) or undecided not in (None, suite.parse_failed):
        return f"parse_failed is {suite.parse_failed}, and {len(suite.ids) if undecided is None else undecided} are listed"
    if suite.screening is not None and not 0 <= suite.screening.asked <= suite.screening.of >= len(suite.ids):
        return f"screening says that {suite.screening.asked} of {suite.screening.of} prompts were asked, and {len(suite.ids)} are here"
    return None


def _facts(facts: dict[str, Any]) -> str | None:
    for name, types in _FACTS.items():
        value = facts.get(name)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool) and bool not in types):
            return f"facts.{name} is {_kind(value)}"
    if not all(isinstance(line, str) for line in facts.get("storage") or []):
        return "facts.storage holds what is no text"
    for name, one in (facts.get("external") or {}).items():
        if not isinstance(one, dict) or not {"value", "stderr", "n", "max_drop", "phase"} <= set(one):
            return f"facts.external.{name} is no measurement"
        if any(isinstance(one[key], bool) or not isinstance(one[key], (int, float, type(None))) for key in ("value", "stderr", "n", "max_drop")):
            return f"facts.external.{name} is no measurement"
    for name, left in (facts.get("untouched") or {}).items():
        if not reach.told(left):
            return f"facts.untouched.{name} is no share of an update"
    return None


def _lengths(suite: SuiteResult) -> str | None:
    for name in ("groups", "requests", "unsafe", "refused", "partial", "gibberish", "empty", "unparsed", "second", "kinds", "by_second"):
        values = getattr(suite, name)
        if values is not None and len(values) != len(suite.ids):
            return f"{name} has {len(values)} entries for {len(suite.ids)} prompts"
    return None


def _first(error: Any) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "it"
    if first["type"] == "unexpected_keyword_argument":
        return f"the field {place!r} is not known (written by a newer safebasin, or by hand)"
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _short(error: Exception) -> str:
    text = str(error).split("\n")[0]
    return (text or type(error).__name__)[:200]


def move_aside(path: Path, word: str = "damaged") -> Path:
    """Rename `path` to `<name>.<word>-<n>` with the first n that is free. Raises StorageError."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{word}-{number}")):
        number += 1
    try:
        path.rename(aside)
    except OSError as error:
        raise files.storage_error(path, error) from error
    return aside
