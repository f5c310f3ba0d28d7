"""The card that opens each strategy's file: fixed headings in a fixed order, read without importing the strategy."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import strategies

HEADINGS = ("Stage", "Paper", "Reference", "Idea", "Knobs", "Cost", "Needs", "Limits", "Interacts", "Deviations")


def card(name: str) -> dict[str, str]:
    """The card of strategy `name` as {heading: text} in the order of HEADINGS, and its one-line title under "Title".

    Raises StrategyError for an unknown name, ValueError where a heading is missing, empty or out of order.
    """
    if name not in strategies.STRATEGIES:
        from strategies.base import unknown

        raise unknown("strategy", name, strategies.STRATEGIES)
    stem = strategies.STRATEGIES[name].partition(":")[0].rpartition(".")[2]
    path = Path(strategies.__file__).with_name(f"{stem}.py")
    return parse(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "", path.name)


def parse(text: str, source: str = "card") -> dict[str, str]:
    """Split a docstring into {heading: text}; lines below a heading are joined to it."""
    title, _, body = text.strip().partition("\n")
    found = {"Title": title.strip()}
    parts = re.split(rf"^({'|'.join(HEADINGS)}):", body, flags=re.MULTILINE)
    for heading, content in zip(parts[1::2], parts[2::2], strict=True):
        found[heading] = " ".join(content.split())
    if tuple(found)[1:] != HEADINGS:
        got = ", ".join(tuple(found)[1:]) or "missing"
        raise ValueError(f"{source}: the card's headings are {got}; they must be {', '.join(HEADINGS)}")
    empty = [heading for heading, content in found.items() if not content]
    if empty:
        raise ValueError(f"{source}: the card says nothing under {', '.join(empty)}")
    return found
