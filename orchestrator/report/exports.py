"""Every table of a report beside it, as CSV and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.report.numbers import MISSING
from orchestrator.storage import files, ownership
from orchestrator.texts import one_line

FOLDER = "tables"
FIGURE = re.compile(r"([+-]?[\d.]+) \[([+-]?[\d.]+), ([+-]?[\d.]+)\] n=(.*)")
"""A figure with its interval and size, as `numbers.figure` writes it."""
SIGNED = re.compile(r"[+-]\d+(?:\.\d+)?")
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
            **{mark: "\\" + mark for mark in "&%$#_{}"}}  # fmt: skip


def write(folder: Path, tables: Sequence[Mapping[str, Any]]) -> list[Path]:
    """`tables/NAME.csv` and `.tex` of each table ("title", "head", "rows"); their paths. Those of an earlier report that are not written again are
    removed. Raises StorageError."""
    paths: list[Path] = []
    for table in tables:
        stem = folder / FOLDER / slug(table["title"])
        columns, rows = apart(table)
        paths.append(files.write_csv(stem.with_suffix(".csv"), [dict(zip(columns, row, strict=True)) for row in rows], columns))
        paths.append(files.write_text(stem.with_suffix(".tex"), latex(table)))
    for old in sorted((folder / FOLDER).glob("*")) if (folder / FOLDER).is_dir() else ():
        if old not in paths:
            ownership.remove(old)
    return paths


def of_page(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of a report's content (`view.view`), in the page's order; those without rows are left out."""
    shown, found = content["shown"], []
    if shown:
        found.append({"title": "Figures", "head": shown["head"], "rows": shown["rows"]})
        head = {"trial": "trial", "seed": "seed", "name": "constraint", "estimate": "measured rise", "passing": "fails of what passed before",
                "limit": "limit", "room": "room from interval to limit", "verdict": "verdict"}  # fmt: skip
        found.append(_picked("Every limit", shown["constraints"], head))
    recipe = {"recipe": "recipe", "trial": "trial", "verdict": "verdict", "score": "task score", "asr": "attack success",
              "degradation": "degradation", "rise": "over-refusal rise", "feasible": "feasible", "count": "tried", "seeds": "seeds"}  # fmt: skip
    found += [_picked("Recipes compared", content["recipes"], recipe), *content["decision"]]
    trial = {"trial": "trial", "recipe": "recipe", "phase": "phase", "seed": "seed", "state": "state", "verdict": "verdict", "score": "task score",
             "asr": "attack success", "degradation": "degradation", "rise": "over-refusal rise", "seconds": "seconds"}  # fmt: skip
    trials = _picked("All trials", content["trials"], trial)
    settings = [", ".join(f"{name}={value}" for name, value in one["params"].items()) for one in content["trials"]]
    trials = trials | {"head": [*trials["head"], "settings"], "rows": [[*row, one] for row, one in zip(trials["rows"], settings, strict=True)]}
    untouched = {"title": "The untouched model", "head": ["figure", "value"], "rows": [[one["what"], one["figure"]] for one in content["baseline"]]}
    suites = {"title": "Suites", "head": list(content["suites_head"]), "rows": content["suites_rows"]}
    return [table for table in (*found, trials, *content["safety"], untouched, suites) if table["rows"]]


def _picked(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, Any]:
    """A table of some values of each row; what a row lacks is empty."""
    return {"title": title, "head": list(columns.values()), "rows": [[str(row.get(key, "")) for key in columns] for row in rows]}


def slug(title: str) -> str:
    """A title as the stem of a file."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def apart(table: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(column names, rows) for CSV: a column of figures becomes four (value, `lower`, `upper`, `n`), numbers are numbers, what was not measured is
    None."""
    columns: list[list[Any]] = [list(column) for column in zip(*table["rows"], strict=True)]
    names: list[str] = []
    values: list[list[Any]] = []
    for name, column in zip(_unique(table["head"]), columns, strict=True):
        found = [FIGURE.fullmatch(str(cell)) for cell in column]
        if any(found) and all(match or cell in ("", MISSING) for match, cell in zip(found, column, strict=True)):
            names += [name, f"{name} lower", f"{name} upper", f"{name} n"]
            values += [[None if match is None else float(match[i]) for match in found] for i in (1, 2, 3)]
            values.append([None if match is None else match[4] for match in found])
        else:
            names.append(name)
            values.append([float(cell) if SIGNED.fullmatch(str(cell)) else cell for cell in column])
    return names, [list(row) for row in zip(*values, strict=True)]


def _unique(names: Sequence[str]) -> list[str]:
    """Column names, a second of a name marked: `after`, `after 2`."""
    return [name if names[:i].count(name) == 0 else f"{name} {names[:i].count(name) + 1}" for i, name in enumerate(names)]


def latex(table: Mapping[str, Any]) -> str:
    """A table as a `tabular` that needs no package, its title above it as a comment; every cell is text."""
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (table["head"], *table["rows"])]
    body = [lines[0], r"\hline", *lines[1:]]
    begin = rf"\begin{{tabular}}{{{'l' * len(table['head'])}}}"
    return "\n".join([f"% {one_line(table['title'])}", begin, r"\hline", *body, r"\hline", r"\end{tabular}", ""])


def _escaped(value: Any) -> str:
    return "".join(_SPECIAL.get(mark, mark) for mark in one_line(value))
