"""Text from elsewhere (names, paths, prompts, messages of libraries) made fit for where it is shown: a terminal, Markdown.

Whoever shows such a text takes one of these functions, or a factory that does (`screen`, the templates of `report`): what is written in it is
read as text there, never as a command to a terminal, as markup, as HTML or as a link.
"""

from __future__ import annotations

import re
from typing import Any

_REPLACED = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_REPLACED[0x7F] = 0x2421
_REPLACED |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_REPLACED |= dict.fromkeys((0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF), 0xFFFD)
_REPLACED |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
_BREAKS = re.compile(r"\s*[\r\n\t\v\f\x1c-\x1f\x85\u2028\u2029]+\s*")


def clean(text: Any) -> str:
    """Text without characters that a terminal or a browser obeys, each replaced by one that only shows that there was one; same length.

    ESC becomes the picture of ESC, other control characters likewise; marks that turn the direction of writing, and halves of characters that no
    encoding knows, become U+FFFD. Line ends and tabs stay.
    """
    return str(text).translate(_REPLACED)


def one_line(text: Any, limit: int | None = None) -> str:
    """`clean` text in one line; of more than `limit` characters the first, with a mark that it was cut."""
    line = clean(_BREAKS.sub(" ", str(text))).strip()
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}\u2026"


_MARKS = re.compile(r"[\\`*~$|]|(?<!\w)_|_(?!\w)|!(?=\[)|(?<=\])[(\[:]|^(?:[#=+-]|\d+[.)])(?=\s|$)|^[-=]{2,}$", re.MULTILINE)
"""What Markdown would obey; not `[` by itself, so that intervals stay readable: a link needs what follows `]`."""


def markdown(text: Any) -> str:
    """Text for a line or a table cell of Markdown: in one line, nothing in it is markup, HTML, a link, a picture, a formula or the cell's end.

    None is empty.
    """
    if text is None:
        return ""
    line = _MARKS.sub(lambda found: _escaped(found[0]), one_line(text))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _escaped(mark: str) -> str:
    return f"{mark[:-1]}\\{mark[-1]}" if mark[:1].isdigit() else f"\\{mark}"


def code(text: Any) -> str:
    """Text as a code span of Markdown, whatever backticks it holds; one line, and whole inside a table cell too."""
    line = one_line(text) or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{pad}{line.replace('|', chr(92) + '|')}{pad}{fence}"


def fence(text: str) -> str:
    """Backticks that fence `text` as a block of Markdown: more of them than stand anywhere in a row in it, at least four."""
    return "`" * max([4, *(len(run) + 1 for run in re.findall("`+", text))])


def moved(change: float, digits: int = 3) -> str:
    """A difference in words: `rose by 0.020`, `fell by 0.017`, `did not change` where nothing is left of it at these digits."""
    size = f"{abs(change):.{digits}f}"
    return "did not change" if float(size) == 0 else f"{'rose' if change > 0 else 'fell'} by {size}"
