"""The one place where something is printed with Rich: no text from elsewhere is ever read as markup, as an emoji code or as a terminal command.

Everything that prints to a person takes its console, tables and bars from here; `tests/unit/test_markup.py` holds it. The functions make
Rich's own Text of every string, so that they are safe on any console, also one that a caller of the Python API brought along.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn, TimeRemainingColumn, wrap_file
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from orchestrator.terminal import streams
from orchestrator.texts import clean, one_line

__all__ = ["Grid", "Screen", "bar", "console", "live", "say", "show", "silent", "styled", "upload"]


class Screen(Console):
    """A console that knows no markup, no emoji codes and no highlighting, and sends no control character that is not Rich's own."""

    def __init__(self, **options: Any):
        super().__init__(**(options | {"markup": False, "emoji": False, "highlight": False}))

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is, whatever Rich's callers ask for."""
        return super().render_str(clean(text), **(options | {"markup": False, "emoji": False, "highlight": False}))

    def on_broken_pipe(self) -> None:
        """Nobody reads any more: said to the caller, where Rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(self, renderable: RenderableType, options: Any = None):
        """Segments of what is printed; the last line of defence, also for what Rich itself made of a text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)


class _Steady:
    """A stream whose reader may go away, or whose disk may fill, without ending who writes: said once on stderr, then nothing is written."""

    def __init__(self, stream: IO[str]):
        self._stream, self._lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Any, *values: Any) -> Any:
        if self._lost:
            return None
        try:
            return call(*values)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lost = True
            streams.let_go(self._stream)
            streams.tell(f"safebasin: nothing more can be printed ({error}); the run goes on, its files say the rest", sys.stderr)
            return None


def console(*, stderr: bool = False, steady: bool = False) -> Screen:
    """A console on stdout, or stderr. `steady`: what cannot be printed any more (the reader of a pipe went away) ends nothing."""
    if not steady:
        return Screen(stderr=stderr)
    stream: Any = _Steady(sys.stderr if stderr else sys.stdout)
    return Screen(file=stream)


def in_notebook() -> bool:
    """Whether what is printed goes below a notebook's cell."""
    return Screen().is_jupyter


def silent() -> Screen:
    """A console that shows nothing."""
    return Screen(file=io.StringIO(), quiet=True, force_jupyter=False)


class _Cell:
    """A text below a notebook's cell that is replaced from time to time, and gone at the end. Used as Rich's Live is."""

    LEAST_S = 0.5
    """Seconds between two texts: each is a message to the browser."""

    def __init__(self, what: RenderableType, columns: int):
        self._what, self._columns, self._shown, self._handle = what, columns, 0.0, None

    def start(self) -> None:
        from IPython.display import display

        self._handle = display(self._data(), raw=True, display_id=True)

    def update(self, what: RenderableType) -> None:
        self._what = what
        if self._handle is not None and time.monotonic() - self._shown >= self.LEAST_S:
            self._shown = time.monotonic()
            self._handle.update(self._data(), raw=True)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)
            self._handle = None

    def _data(self) -> dict[str, str]:
        made = Screen(file=io.StringIO(), width=self._columns, force_terminal=False, force_jupyter=False)
        made.print(self._what)
        return {"text/plain": made.file.getvalue()}


def live(on: Console, what: RenderableType) -> Live | _Cell | None:
    """What shows something that changes: a part of the terminal, or of a notebook's cell; None where there is neither, as in a job's log."""
    if on.is_jupyter:
        return _Cell(what, on.width)
    return Live(what, console=on, refresh_per_second=4, transient=True) if on.is_terminal else None


def styled(text: str | Text, style: str = "") -> Text:
    """A text, to be joined to others, that holds nothing a terminal obeys."""
    if not isinstance(text, Text):
        return Text(clean(text).replace("\t", " "), style=style)
    safe = text.copy()
    if (plain := clean(safe.plain).replace("\t", " ")) != safe.plain:
        safe.plain = plain  # as long as it was, so that its styles stay where they are
    if style:
        safe.stylize(style)
    return safe


def say(on: Console, text: str | Text, style: str = "", *, whole: bool = False) -> None:
    """Print a line. `whole`: never broken into several, for paths and what is copied."""
    on.print(styled(text, style), highlight=False, markup=False, emoji=False, soft_wrap=whole)


def show(on: Console, what: Table) -> None:
    """Print a table."""
    on.print(what, highlight=False, markup=False, emoji=False)


def texts_of(table: Table) -> list[dict[str, str]]:
    """The rows of a table of texts, each {heading: cell}, for programs to read."""
    columns = [(str(column.header), [str(cell) for cell in column.cells]) for column in table.columns]
    return [dict(zip([head for head, _ in columns], cells, strict=True)) for cells in zip(*(cells for _, cells in columns), strict=True)]


class Grid(Table):
    """A table whose title, headings and cells are texts."""

    def __init__(self, *columns: str, title: str | None = None, **options: Any):
        super().__init__(title=None if title is None else styled(title), **options)
        for column in columns:
            self.add_column(column)

    def add_column(self, header: Any = "", footer: Any = "", **options: Any) -> None:
        super().add_column(_cell(header), _cell(footer), **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(_cell(cell) for cell in cells), **options)


def _cell(value: Any) -> Any:
    return styled(value) if isinstance(value, (str, Text)) else value


class _Words(ProgressColumn):
    """A column of texts: a constant, the task's description or one of its fields."""

    def __init__(self, text: str = "", field: str = ""):
        super().__init__()
        self._text, self._field = text, field

    def render(self, task: Task) -> Text:
        if self._text:
            return Text(self._text)
        return Text(one_line(task.fields.get(self._field, "") if self._field else task.description), no_wrap=True)


def bar(on: Console, *parts: str, **options: Any) -> Progress:
    """A progress bar of these parts: `bar`, `count`, `elapsed`, `left`, `description`, `field:NAME`; anything else is a constant text."""
    known: dict[str, type[ProgressColumn]] = {
        "bar": BarColumn, "count": MofNCompleteColumn, "elapsed": TimeElapsedColumn, "left": TimeRemainingColumn, "description": _Words,
    }  # fmt: skip
    columns = [known[p]() if p in known else _Words(field=p.removeprefix("field:")) if p.startswith("field:") else _Words(p) for p in parts]
    return Progress(*columns, console=on, **options)


def upload(on: Console, file: Any, size: int, what: str) -> Any:
    """A file object that shows on the console how far it was read; use as a context manager. `what` is a constant text."""
    return wrap_file(file, size, description=one_line(what).replace("[", "("), console=on)
