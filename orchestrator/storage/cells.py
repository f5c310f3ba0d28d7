"""Tables as CSV that a spreadsheet shows and never runs; and the way back.

A text that a spreadsheet would take for a formula (it begins with =, +, @, - or a control character, and is no number) gets an apostrophe in
front. Where a table has such a text, a last column `raw` holds, as JSON, the texts of the row as they are: {column: text}. Numbers stay numbers.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

RAW = "raw"
"""Name of the column with the texts as they are, where one was changed."""
_FORMULA = re.compile(r"'*(?:\s*[=+\-@\uff0b\uff0d\uff1d\uff20]|[\t\r\n\x00])")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def guarded(value: Any) -> Any:
    """A cell's value, a text that would be a formula with an apostrophe in front; numbers, booleans and None as they are."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value


def unguarded(text: str) -> str:
    """What `guarded` was given, of a text that it returned."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """CSV text of these columns, headings first; None and a key a row lacks are empty cells. No rows: the headings alone.

    Raises ValueError for a row with another key.
    """
    changed, lines = [], []
    for row in rows:
        if stray := [name for name in row if name not in columns]:
            raise ValueError(f"the table has no column {stray[0]!r}; columns are {', '.join(columns)}")
        shown = {guarded(name): guarded(value) for name, value in row.items()}
        raw = {name: value for name, value in row.items() if guarded(value) is not value}
        changed.append(raw)
        lines.append(shown | ({RAW: json.dumps(raw, ensure_ascii=False)} if raw else {}))
    heads = [guarded(name) for name in columns] + ([RAW] if any(changed) and RAW not in columns else [])
    return "".join(_line([row.get(head) for head in heads]) for row in [dict(zip(heads, heads, strict=True)), *lines])


def _line(values: Sequence[Any]) -> str:
    """One row; Python quotes a carriage return only where the row's end holds one."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return f"{buffer.getvalue()[:-2]}\n"


def from_csv(text: str) -> list[dict[str, str]]:
    """Rows of a CSV text that `to_csv` wrote, every cell as text, as it was before it was guarded; the column `raw` is left out."""
    found = csv.DictReader(io.StringIO(text, newline=""))
    return [
        {unguarded(name): unguarded(value or "") for name, value in row.items() if name is not None and name != RAW}
        for row in found
    ]  # fmt: skip
