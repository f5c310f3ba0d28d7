"""The card that opens each strategy's file: fixed headings in a fixed order, read without importing the strategy."""

from __future__ import annotations

import ast
import dataclasses
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


def markdown() -> str:
    """All cards and knobs as one Markdown page: `python -m strategies.cards > docs/strategies.md`."""
    lines = ["# Strategies", "", "Made from the cards in `strategies/` by `python -m strategies.cards`.", ""]
    lines += ["| strategy | stage | needs | ZeRO stages |", "|---|---|---|---|"]
    for name in strategies.STRATEGIES:
        found, cls = card(name), strategies.get(name)
        lines.append(f"| [`{name}`](#{name}) | {found['Stage'].rstrip('.')} | {', '.join(sorted(cls.needs)) or '-'} | 0-{cls.max_zero_stage} |")
    for name in strategies.STRATEGIES:
        found = card(name)
        lines += ["", f"## {name}", "", found["Title"], ""]
        lines += [f"- **{heading}**: {found[heading]}" for heading in HEADINGS]
        fields = dataclasses.fields(strategies.get(name).Config)
        if fields:
            lines += ["", "| knob | default | meaning |", "|---|---|---|"]
            lines += [f"| `{f.name}` | {f.default!r} | {f.metadata['help']} |" for f in fields]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
