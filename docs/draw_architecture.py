"""Draws docs/img/architecture.svg from the imports: `python docs/draw_architecture.py`. Floors as rows, folders as boxes, an arrow a dependency.

Only arrows that say something new are drawn: one to a folder that is reached through another one already is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

WIDTH, HEIGHT, GAP, LEFT = 170, 40, 46, 20
TARGET = ROOT / "docs" / "img" / "architecture.svg"


def folders() -> tuple[list[list[str]], dict[str, set[str]]]:
    """(rows of names, highest first; who imports whom), with the two other packages as one box each at the bottom."""
    import test_structure as structure

    packages = {path.parent.name for path in structure.FILES if path.name == "__init__.py"}
    base = "what everyone speaks"
    rows = [sorted(name for name in names if name in packages) for names in reversed(structure.FLOORS)]
    rows = [["cli"], *[row for row in rows if row], [base], ["strategies", "search_spaces"]]
    known = {name for row in rows for name in row}

    def box(module: str) -> str:
        top, _, rest = module.partition(".")
        own = rest.partition(".")[0]
        return top if top != "orchestrator" else "cli" if own in ("cli", "api", "__main__") else own if own in known else base

    arrows: dict[str, set[str]] = {}
    for module, targets in structure.ARROWS.items():
        arrows.setdefault(box(module), set()).update(box(one) for one in targets if box(one) != box(module))
    return [middle(row, arrows) for row in rows], arrows


def middle(row: list[str], arrows: dict[str, set[str]]) -> list[str]:
    """The row with the box that its neighbours point at between them."""
    asked = max(row, key=lambda name: sum(name in arrows.get(other, ()) for other in row))
    if not any(asked in arrows.get(other, ()) for other in row):
        return row
    others = [name for name in row if name != asked]
    half = len(others) // 2
    return [*others[:half], asked, *others[half:]]


def shortest(arrows: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Arrows without those that a longer way implies."""

    def below(name: str) -> set[str]:
        found: set[str] = set()
        for one in arrows.get(name, ()):
            found |= {one} | below(one)
        return found

    return {(a, b) for a, targets in arrows.items() for b in targets if not any(b in below(other) for other in targets - {b})}


def svg() -> str:
    rows, arrows = folders()
    longest = max(map(len, rows))
    width = LEFT * 2 + longest * (WIDTH + GAP) - GAP
    where, parts = {}, []
    for y, row in enumerate(rows):
        start = (width - len(row) * (WIDTH + GAP) + GAP) / 2
        for x, name in enumerate(row):
            where[name] = (start + x * (WIDTH + GAP), LEFT + y * (HEIGHT + GAP))
    for a, b in sorted(shortest(arrows)):
        (ax, ay), (bx, by) = where[a], where[b]
        side = ay == by
        x1, y1 = (ax + (WIDTH if bx > ax else 0), ay + HEIGHT / 2) if side else (ax + WIDTH / 2, ay + HEIGHT)
        x2, y2 = (bx + (0 if bx > ax else WIDTH), by + HEIGHT / 2) if side else (bx + WIDTH / 2, by - 3)
        parts.append(f'<path d="M{x1:g},{y1:g} C{x1:g},{(y1 + y2) / 2:g} {x2:g},{(y1 + y2) / 2:g} {x2:g},{y2:g}" class="a" marker-end="url(#m)"/>')
    for name, (x, y) in where.items():
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
        parts.append(f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 5:g}">{name}</text>')
    height = LEFT * 2 + len(rows) * (HEIGHT + GAP) - GAP
    style = (
        "rect{fill:#fff;stroke:#0072B2;stroke-width:1.5}text{font:14px sans-serif;text-anchor:middle;fill:#222}"
        ".a{fill:none;stroke:#7F7F7F;stroke-width:1.2}"
    )
    arrow = (
        '<marker id="m" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#7F7F7F"/></marker>'
    )
    paper = f'<rect width="{width:g}" height="{height:g}" style="fill:#fff;stroke:none"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="Folders and what they import">'
    return "\n".join([head, f"<style>{style}</style><defs>{arrow}</defs>", paper, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(svg(), encoding="utf-8")
    print(TARGET)
