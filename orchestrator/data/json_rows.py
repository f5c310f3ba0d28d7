"""JSON and JSONL texts as rows: numbers keep how they were written, and what JSON readers disagree on is refused by line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError

Row = dict[str, Any]

MAX_DIGITS = 4000
"""Digits of a number; Python reads no more than 4300."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of half a character. Two of them make one; alone they are none, and no tokenizer or file takes them."""


class Decimal(float):
    """A number with a point or an exponent that knows its text: 3.10 stays "3.10"."""

    text: str

    def __new__(cls, text: str) -> Decimal:
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text

    def __reduce__(self):
        return (Decimal, (self.text,))


class _Refused(ValueError):
    """What the text holds and should not, in words that go after `line 3`."""


def lines(text: str, path: Path, field: str) -> list[Row]:
    """Rows of a JSONL text. Raises DataError, naming file and line (from 1), for a line that is no JSON object."""
    rows = []
    parts = text.split("\n")
    for number, line in enumerate(parts, start=1):
        if not line.strip():
            continue
        place = f"{field}: {path} line {number}"
        try:
            row = _parsed(line)
        except json.JSONDecodeError as error:
            cut = "; the file ends in the middle of it: was it cut?" if number == len(parts) and number > 1 else ""
            raise DataError(f"{place} is not JSON: {error.msg} at column {error.colno}{cut}") from error
        except _Refused as error:
            raise DataError(f"{place} {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{place} is a JSON {type(row).__name__}; every line must be an object {{column: value}}")
        rows.append(row)
    return rows


def document(text: str, path: Path, field: str) -> list[Row]:
    """Rows of a JSON text: a list of objects, {"data": [...]} or {category: [...]}. Raises DataError."""
    if not text.strip():
        return []
    try:
        body = _parsed(text)
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if every line is an object of its own" if error.msg == "Extra data" else ""
        raise DataError(f"{field}: {path} is not JSON: {error.msg} at line {error.lineno}{hint}") from error
    except _Refused as error:
        raise DataError(f"{field}: {path} {error}") from error
    if isinstance(body, dict) and isinstance(body.get("data"), list):
        body = body["data"]
    elif isinstance(body, dict) and body and all(isinstance(rows, list) for rows in body.values()):  # rows by category, as SafetyBench has them
        body = [{"category": name, **row} if isinstance(row, dict) else row for name, rows in body.items() for row in rows]
    if not isinstance(body, list) or not all(isinstance(row, dict) for row in body):
        raise DataError(f'{field}: {path} must hold a list of objects (or {{"data": [...]}}, or {{category: [...]}}), not {type(body).__name__}')
    return body


def value(text: str) -> Any:
    """A JSON text that stands in a cell (messages, history). Raises ValueError in words for anything that is none."""
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is text that is not JSON ({error.msg} at column {error.colno})") from error


def _parsed(text: str) -> Any:
    try:
        body = json.loads(text, parse_float=Decimal, parse_int=_whole, object_pairs_hook=_object)
    except RecursionError as error:
        raise _Refused("holds lists or objects inside each other too deeply to be read (about a thousand levels); correct or remove it") from error
    if _HALF.search(text):
        _check_halves(body)
    return body


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"holds a number of {len(text):,} digits, at most {MAX_DIGITS:,} are read; write it as text, in quotation marks")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"holds {twice!r} twice in one object, and only one of them could be used; remove the other")
    return found


def _check_halves(body: Any) -> None:
    """Raises _Refused for a text with a lone surrogate, with the column it stands in."""
    waiting: list[tuple[Any, str]] = [(body, "")]
    while waiting:
        part, column = waiting.pop()
        if isinstance(part, str):
            found = re.search("[\ud800-\udfff]", part)
            if found:
                where = f" in column {column!r}" if column else ""
                raise _Refused(
                    f"holds half a character (\\u{ord(found[0]):04x} alone, as of an emoji that was cut){where}; correct the text or remove the row"
                )
        elif isinstance(part, dict):
            waiting += [(name, column) for name in part] + [(one, column or name) for name, one in part.items()]
        elif isinstance(part, list):
            waiting += [(one, column) for one in part]
