"""Rows out of files, `datasets` names and the pocket world: `load_rows` is the only door; every complaint names the config field."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.data import hub_rows, json_rows
from orchestrator.data.json_rows import Row
from orchestrator.errors import DataError

__all__ = ["SUFFIXES", "Row", "describe", "load_rows", "need_column", "pick_column"]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def load_rows(source: str, *, split: str = "train", limit: int | None = None, field: str = "task.data") -> list[Row]:
    """Rows of `source` in their own order, the first `limit` of them.

    source: JSONL/JSON/CSV/TSV/text file (a text file gives one row {"text": line} per non-empty line), `pocket:<name>`, or a name
    known to the `datasets` library, `owner/name`, `owner/name:configuration` or `owner/name::folder`; `split` is only read for these.
    Numbers of JSON files know how they were written (`json_rows.Decimal`). Raises DataError, naming `field`, for a missing, unreadable or
    empty source, and file and line (from 1) for what cannot be read as rows.
    """
    path = _path(source, field)
    rows = hub_rows.load(source, split, field, SUFFIXES) if path is None else _from_file(path, field)
    if not rows:
        raise DataError(f"{field}: {source!r} holds no rows; give a file with at least one")
    return rows[:limit]


def describe(source: str, *, field: str = "task.data") -> dict[str, str]:
    """What a tracker should know of a source: `name`, `source`, and `sha256` of the file's bytes where it is a file."""
    path = _path(source, field)
    if path is None:
        return {"name": source.replace("/", "_").replace(":", "_"), "source": source}
    return {"name": path.stem, "source": source, "sha256": hashlib.sha256(_bytes(path, field)).hexdigest()}


def _path(source: str, field: str) -> Path | None:
    """The file behind `source`, None where it must be a name of the `datasets` library."""
    if source == "pocket" or source.startswith("pocket:"):
        from orchestrator import pocket

        found = Path(pocket.resolve(source))
        if found.is_dir():
            raise DataError(f"{field}: {source!r} names a model; name rows of the pocket world, such as pocket:safety or pocket:obey")
        return found
    path = Path(os.path.expanduser(source))
    kind = _kind(path, source, field)
    if kind == "file":
        return path
    if kind == "folder":
        raise DataError(f"{field}: {source!r} is a folder; name the file in it (one of {', '.join(SUFFIXES)})")
    if kind is not None:
        raise DataError(f"{field}: {source!r} is a {kind}, which can be read only once; write its rows into a file (one of {', '.join(SUFFIXES)})")
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or source.startswith((".", "~")) or not hub_rows.is_name(source):
        raise DataError(
            f"{field}: file {hub_rows.short(source)} does not exist{_nearest(path)}; paths start from the folder of the config file or from here "
            f"({Path.cwd()})"
        )
    return None


def _kind(path: Path, source: str, field: str) -> str | None:
    """`file`, `folder`, another word for anything else under this path, None for nothing. Raises DataError where we may not look."""
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise DataError(f"{field}: {source!r} cannot be looked at: {error.strerror}; correct the permissions of its folders") from error
    except (OSError, ValueError):  # no such file; or too long, a NUL, half a character: no file can have this name
        return None
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"


def _nearest(path: Path) -> str:
    """A hint at files of nearly this name, the name with `%20` and the like read as in an address among them."""
    from urllib.parse import unquote

    plain = Path(unquote(str(path)))
    try:
        if plain != path and plain.is_file():
            return f", {str(plain)!r} does: write it without %"
        names = [one.name for _, one in zip(range(2000), path.parent.iterdir(), strict=False)]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)
    return f" (nearest there: {', '.join(close)})" if close else ""


def _from_file(path: Path, field: str) -> list[Row]:
    readers = {".jsonl": json_rows.lines, ".json": json_rows.document, ".csv": _table, ".tsv": _table, ".txt": _lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{field}: cannot read {path.name!r} by its ending; use one of {', '.join(SUFFIXES)}")
    try:
        text = _bytes(path, field).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = error.object[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
        utf16 = ", it looks like UTF-32" if wide else ", it looks like UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(f"{field}: {path} is not UTF-8 text ({error.reason} at byte {error.start}{utf16}); convert it") from error
    return reader(text, path, field)


def _bytes(path: Path, field: str) -> bytes:
    """The file's bytes, of one moment. Raises DataError."""
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            body = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{field}: {path} cannot be read: {error.strerror}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{field}: {path} was written to while it was read; start again when it is whole")
    return body


def _table(text: str, path: Path, field: str) -> list[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # TSV has no agreed quoting: a quotation mark in the middle of a sentence must not swallow lines
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    begun, most = 1, csv.field_size_limit(sys.maxsize)  # texts longer than the library's 128 KiB are no fault
    try:
        for cells in lines:
            if not any(cells) and len(cells) < 2:
                pass  # an empty line
            elif header is None:
                header = _header(cells, path, field)
            elif len(cells) != len(header):
                raise DataError(f"{field}: {path} line {begun} has {len(cells)} cells, the header has {len(header)} ({', '.join(header)})")
            else:
                rows.append(dict(zip(header, cells, strict=True)))
            begun = lines.line_num + 1
    except csv.Error as error:
        why = "a quotation mark opened there is never closed" if "unexpected end" in str(error) else str(error)
        raise DataError(f'{field}: {path} line {begun} cannot be read: {why}; a quotation mark inside a quoted text is written twice ("")') from error
    finally:
        csv.field_size_limit(most)
    return rows


def _header(cells: list[str], path: Path, field: str) -> list[str]:
    """Names of the columns; those without one are called by their position. Raises DataError for a name that stands twice."""
    names = [cell if cell.strip() else f"column {i}" for i, cell in enumerate(cells, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{field}: {path}: the first line names the column {twice[0]!r} {names.count(twice[0])} times; give each a name of its own")
    return names


def _lines(text: str, path: Path, field: str) -> list[Row]:
    return [{"text": line.strip()} for line in text.split("\n") if line.strip()]


def pick_column(rows: Sequence[Row], candidates: Sequence[str]) -> str | None:
    """The first of `candidates` that is a column of the first row, compared without case; None where there is none."""
    by_lower = {str(column).lower(): column for column in reversed(list(rows[0]))}
    return next((by_lower[name.lower()] for name in candidates if name.lower() in by_lower), None)


def need_column(rows: Sequence[Row], column: str, field: str) -> str:
    """`column` where every row has it; else DataError with the columns found and the nearest name."""
    for number, row in enumerate(rows, start=1):
        if column not in row:
            own = [str(name) for name in row if not str(name).startswith("__")]  # without what a loader noted in the row
            close = difflib.get_close_matches(column, own, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(f"{field}: row {number} has no column {column!r}; columns found: {', '.join(own) or 'none'}{hint}")
    return column
