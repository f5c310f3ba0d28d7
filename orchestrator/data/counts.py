"""What became of rows on their way to conversations: a count and the first row of every kind of change, for checks, records and reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator import texts
from orchestrator.errors import LONGEST


@dataclass(frozen=True)
class Count:
    """So many rows, the first of them by number (from 1), and what was done or is doubtful in words."""

    what: str
    rows: int
    first: int

    def sentence(self) -> str:
        return f"{self.rows} row{'s' if self.rows > 1 else ''}: {self.what} (first: row {self.first})"


@dataclass(frozen=True)
class RowsReport:
    """How the rows of one source were read."""

    field: str
    source: str
    form: str
    rows: int
    """Rows of the source."""
    used: int
    """Rows that became conversations."""
    changed: tuple[Count, ...] = ()
    """What was used otherwise than it is written, or left out of a row."""
    dropped: tuple[Count, ...] = ()
    """Rows that are not used, by reason."""
    doubts: tuple[Count, ...] = ()
    """What is used as it stands and probably should not be."""
    unused: tuple[str, ...] = ()
    """Columns, and fields of messages (`messages[].name`), that nothing was taken from."""

    def facts(self) -> list[str]:
        """Sentences for the screen; [] where every column was used as it is written."""
        parts = [count.sentence() for count in self.changed]
        if self.unused:
            parts.append(f"not used: {', '.join(self.unused[:12])}{f' and {len(self.unused) - 12} more' if len(self.unused) > 12 else ''}")
        return [texts.one_line(f"{self.field}: {self.rows} rows read as {self.form}; {'; '.join(parts)}", LONGEST)] if parts else []

    def warnings(self) -> list[str]:
        """Sentences on rows that are not used and on what is doubtful."""
        left_out = [f"{self.field}: not used: {count.sentence()}" for count in self.dropped]
        return [texts.one_line(line, LONGEST) for line in left_out + [f"{self.field}: {count.sentence()}" for count in self.doubts]]


@dataclass
class Tally:
    """Counts while rows are read; every kind counts a row once."""

    changed: dict[str, dict[int, None]] = field(default_factory=dict)
    dropped: dict[str, dict[int, None]] = field(default_factory=dict)
    doubts: dict[str, dict[int, None]] = field(default_factory=dict)
    fields: dict[str, None] = field(default_factory=dict)
    """Fields of messages that nothing was taken from."""

    def change(self, what: str, index: int) -> None:
        self.changed.setdefault(what, {})[index] = None

    def drop(self, why: str, index: int) -> None:
        self.dropped.setdefault(why, {})[index] = None

    def doubt(self, what: str, index: int) -> None:
        self.doubts.setdefault(what, {})[index] = None

    def report(self, field: str, source: str, form: str, rows: int, used: int, unused: Iterable[str]) -> RowsReport:
        def counts(kinds: dict[str, dict[int, None]]) -> tuple[Count, ...]:
            return tuple(Count(what, len(found), min(found) + 1) for what, found in kinds.items())

        columns = (*unused, *self.fields)
        return RowsReport(field, source, form, rows, used, counts(self.changed), counts(self.dropped), counts(self.doubts), columns)


def record(reports: Iterable[RowsReport]) -> list[dict[str, Any]]:
    """The same as plain values, for a trial's record; `sentences` are the facts and warnings."""
    return [{**asdict(report), "sentences": report.facts() + report.warnings()} for report in reports]
