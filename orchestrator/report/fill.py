"""Templates filled with plain values: what is shown is escaped once, here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from orchestrator import texts


def filled(template: str, content: Mapping[str, Any]) -> str:
    """A template of this package, filled in. What it is given is text: in HTML everything is escaped, in Markdown what would be markup, a
    link, HTML or the end of a cell; in both a character that turns the direction of writing or is none is replaced.

    In Markdown a template writes `|code` for a code span and `|block` for the content of a fenced block; in both `|told` for a sentence of ours,
    whose `spans` in backticks become code.
    """
    import jinja2

    html = template.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_cleaned if html else markdown_cell,
    )
    environment.filters |= {"code": lambda value: Markup(texts.code(value)), "block": block, "cell": markdown_cell}
    environment.filters["told"] = html_told if html else markdown_told
    return environment.get_template(template).render(content)


def _cleaned(value: Any) -> Any:
    """What goes into HTML: without characters that a browser obeys; it is escaped after this."""
    return texts.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def markdown_cell(value: Any) -> str:
    """Text that stays within a cell of a Markdown table and starts no HTML, markup or link; what a filter made so already as it is."""
    return value if isinstance(value, Markup) else Markup(texts.markdown(value))


_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def html_told(value: Any) -> Markup:
    """A sentence for HTML, escaped, its spans in backticks as code; other backticks stay."""
    parts = _SPAN.split(texts.clean(value))
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts))


def markdown_told(value: Any) -> Markup:
    """A sentence for Markdown in one line: nothing in it is markup but its spans in backticks, which are code."""
    parts = _SPAN.split(texts.one_line(value))
    told = [texts.code(part) if i % 2 else _inner(part) for i, part in enumerate(parts)]
    return Markup("".join(told))


def _inner(part: str) -> str:
    """Part of a line as Markdown, with the blanks at its ends that `texts.markdown` takes."""
    if not part.strip():
        return part
    lead, trail = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
    return f"{lead}{texts.markdown(part)}{trail}"


def block(text: str, language: str = "") -> Markup:
    """A fenced block, with a fence that nothing in it ends."""
    fence, body = texts.fence(text), texts.clean(text)
    return Markup(f"{fence}{language}\n{body}{'' if body.endswith(chr(10)) else chr(10)}{fence}")
