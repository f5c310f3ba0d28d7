"""Rows out of files, `datasets` names and the pocket world: `load_rows` is the only door; every complaint names the config field."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def load_rows(source: str, *, split: str = "train", limit: int | None = None, field: str = "task.data") -> list[Row]:
    """Rows of `source` in their own order, the first `limit` of them.

    source: JSONL/JSON/CSV/TSV/text file (a text file gives one row {"text": line} per non-empty line), `pocket:<name>`, or a name
    known to the `datasets` library, `owner/name`, `owner/name:configuration` or `owner/name::folder`; `split` is only read for these.
    Raises DataError, naming `field`, for a missing, unreadable or empty source.
    """
    path = _path(source, field)
    rows = _from_datasets(source, split, field) if path is None else _from_file(path, field)
    if not rows:
        raise DataError(f"{field}: {source!r} holds no rows; give a file with at least one")
    return rows[:limit]


def describe(source: str, *, field: str = "task.data") -> dict[str, str]:
    """What a tracker should know of a source: `name`, `source`, and `sha256` of the file's bytes where it is a file."""
    path = _path(source, field)
    if path is None:
        return {"name": source.replace("/", "_").replace(":", "_"), "source": source}
    return {"name": path.stem, "source": source, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _path(source: str, field: str) -> Path | None:
    """The file behind `source`, None where it must be a name of the `datasets` library."""
    if source == "pocket" or source.startswith("pocket:"):
        from orchestrator import pocket

        found = Path(pocket.resolve(source))
        if found.is_dir():
            raise DataError(f"{field}: {source!r} names a model; name rows of the pocket world, such as pocket:safety or pocket:obey")
        return found
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{field}: {source!r} is a folder; name the file in it (one of {', '.join(SUFFIXES)})")
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise DataError(
            f"{field}: file {source!r} does not exist; paths start from the folder of the config file or from here ({Path.cwd()})"
        )
    return None


def _from_file(path: Path, field: str) -> list[Row]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table, ".txt": _lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{field}: cannot read {path.name!r} by its ending; use one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{field}: {path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except OSError as error:
        raise DataError(f"{field}: {path} cannot be read: {error.strerror}") from error
    return reader(text, path, field)


def _jsonl(text: str, path: Path, field: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{field}: {path} line {number} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise DataError(f"{field}: {path} line {number} is a JSON {type(row).__name__}; every line must be an object {{column: value}}")
        rows.append(row)
    return rows


def _json(text: str, path: Path, field: str) -> list[Row]:
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if every line is an object of its own" if error.msg == "Extra data" else ""
        raise DataError(f"{field}: {path} is not JSON: {error.msg} at line {error.lineno}{hint}") from error
    if isinstance(body, dict) and isinstance(body.get("data"), list):
        body = body["data"]
    elif isinstance(body, dict) and body and all(isinstance(rows, list) for rows in body.values()):  # rows by category, as SafetyBench has them
        body = [{"category": name, **row} if isinstance(row, dict) else row for name, rows in body.items() for row in rows]
    if not isinstance(body, list) or not all(isinstance(row, dict) for row in body):
        raise DataError(f'{field}: {path} must hold a list of objects (or {{"data": [...]}}, or {{category: [...]}}), not {type(body).__name__}')
    return body


def _table(text: str, path: Path, field: str) -> list[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # TSV has no agreed quoting: a quotation mark in the middle of a sentence must not swallow lines
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    rows: list[Row] = []
    try:
        header = next(lines, None)
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{field}: {path} line {lines.line_num} has {len(cells)} cells, the header has {len(header)} ({', '.join(header)})"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{field}: {path} line {lines.line_num} cannot be read: {error}") from error
    return rows


def _lines(text: str, path: Path, field: str) -> list[Row]:
    return [{"text": line.strip()} for line in text.split("\n") if line.strip()]


def _from_datasets(source: str, split: str, field: str) -> list[Row]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    folder = {"data_dir": configuration[1:]} if configuration.startswith(":") else {}
    try:
        table = load_dataset(name, None if folder else configuration or None, split=split, **folder)
    except Exception as error:  # the library raises a dozen unrelated types; each ends as one sentence for the user
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"{field}: {source!r} is no file here, and as a data set name (split {split!r}) it could not be loaded: "
            f"{type(error).__name__}: {said}. A local {'/'.join(SUFFIXES)} file works without a network"
        ) from error
    return [dict(row) for row in table]


def pick_column(rows: Sequence[Row], candidates: Sequence[str]) -> str | None:
    """The first of `candidates` that is a column of the first row, compared without case; None where there is none."""
    by_lower = {column.lower(): column for column in reversed(list(rows[0]))}
    return next((by_lower[name.lower()] for name in candidates if name.lower() in by_lower), None)


def need_column(rows: Sequence[Row], column: str, field: str) -> str:
    """`column` where every row has it; else DataError with the columns found and the nearest name."""
    import difflib

    for number, row in enumerate(rows, start=1):
        if column not in row:
            own = [str(name) for name in row if not str(name).startswith("__")]  # without what a loader noted in the row
            close = difflib.get_close_matches(column, own, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(f"{field}: row {number} has no column {column!r}; columns found: {', '.join(own) or 'none'}{hint}")
    return column
