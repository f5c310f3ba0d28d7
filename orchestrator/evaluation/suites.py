"""Prompt suites: rows of a file become the prompts that safety is measured on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from orchestrator import config
from orchestrator.data import fingerprint
from orchestrator.data_files import Row, load_rows, need_column, pick_column
from orchestrator.errors import DataError
from orchestrator.evaluation.attacks import get_attack

PROMPT_COLUMNS = ("prompt", "goal", "Behavior", "forbidden_prompt", "question", "instruction", "text")
SEED = 20240607
"""Of the draw behind `limit`; part of what a suite is, so never searched or changed by a run's seed."""


@dataclass(frozen=True)
class PromptSuite:
    """Prompts in the order they are reported in."""

    name: str
    kind: Literal["harmful", "benign"]
    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    systems: tuple[str | None, ...] | None
    """One system prompt per prompt, None where the rows have no `system` column (the model's own then applies)."""
    groups: tuple[str, ...] | None
    hash: str
    """sha256 of ids, prompts, system prompts and kind."""
    constrains: bool = True

    def subset(self, indices: list[int]) -> PromptSuite:
        """The suite with only these prompts, in this order (probes)."""

        def pick(values):
            return None if values is None else tuple(values[i] for i in indices)

        return make(self.name, self.kind, pick(self.ids), pick(self.prompts), pick(self.systems), pick(self.groups), self.constrains)


def make(name, kind, ids, prompts, systems, groups, constrains=True) -> PromptSuite:
    """A PromptSuite with its hash."""
    return PromptSuite(
        name, kind, ids, prompts, systems, groups, fingerprint(kind, list(ids), list(prompts), list(systems or ())), constrains
    )


def load_suite(suite: config.Suite) -> PromptSuite:
    """Prompts of a suite: read, filtered by `where`, drawn down to `limit`, framed by its attack.

    The draw has a fixed seed, takes groups in equal shares where there are groups, and keeps the rows' order. A column `system`
    gives a prompt its own system message. Raises DataError naming `safety.suites.<name>` for missing columns, a filter that leaves
    nothing, prompts that are empty or no text.
    """
    field = f"safety.suites.{suite.name}"
    rows = load_rows(suite.data, split=suite.split, field=f"{field}.data")
    own = pick_column(rows, ("id",))
    for position, row in enumerate(rows):
        row["__position__"] = str(row[own]) if own and row.get(own) not in (None, "") else str(position)
    column = _prompt_column(rows, suite.column, field)
    if suite.group_column:
        need_column(rows, suite.group_column, f"{field}.group_column")
    rows = _where(rows, suite.where, field)
    rows = _limited(rows, suite.limit, suite.group_column)
    _check_prompts(rows, column, field)
    system = pick_column(rows, ("system",))
    attack = get_attack(suite.attack)
    framed = [attack(row[column], (row.get(system) or None) if system else None) for row in rows]
    ids = [row["__position__"] for row in rows]
    if len(set(ids)) < len(ids):
        ids = [f"{name}#{i}" for i, name in enumerate(ids)]
    return make(
        suite.name,
        suite.kind,
        tuple(ids),
        tuple(prompt for prompt, _ in framed),
        tuple(s for _, s in framed) if any(s for _, s in framed) else None,
        tuple(str(row[suite.group_column]) for row in rows) if suite.group_column else None,
        suite.constrains,
    )


def _prompt_column(rows: list[Row], named: str | None, field: str) -> str:
    if named:
        return need_column(rows, named, f"{field}.column")
    column = pick_column(rows, PROMPT_COLUMNS)
    if column is None:
        found = ", ".join(str(c) for c in rows[0] if c != "__position__")
        raise DataError(f"{field}: no prompt column among {found}; name it as {field}.column (usual names: {', '.join(PROMPT_COLUMNS)})")
    return need_column(rows, column, f"{field}.column")


def _where(rows: list[Row], where: dict[str, str], field: str) -> list[Row]:
    for column, value in where.items():
        need_column(rows, column, f"{field}.where")
        kept = [row for row in rows if str(row[column]) == value]
        if not kept:
            values = sorted({str(row[column]) for row in rows})
            shown = ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")
            raise DataError(f"{field}.where: no row has {column} = {value!r}; values found: {shown}")
        rows = kept
    return rows


def _limited(rows: list[Row], limit: int | None, group: str | None) -> list[Row]:
    """`limit` rows: shuffled within each group, then one from each group in turn; in the file's order again."""
    if limit is None or limit >= len(rows):
        return rows
    rng = random.Random(SEED)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(str(row[group]) if group else "", []).append(i)
    queues = list(groups.values())
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return [rows[i] for i in sorted(turns[:limit])]


def _check_prompts(rows: list[Row], column: str, field: str) -> None:
    for row in rows:
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            kind = "empty" if isinstance(text, str) else f"a {type(text).__name__}, not text"
            raise DataError(f"{field}: the prompt of row {row['__position__']} (column {column!r}) is {kind}; correct or filter it out")


@dataclass(frozen=True)
class KnownSuite:
    """A suite that comes with safebasin."""

    name: str
    """As written in `data:`."""
    kind: Literal["harmful", "benign"]
    prompts: int
    groups: int
    licence: str
    description: str


_SHIPPED: tuple[tuple[str, Literal["harmful", "benign"], str], ...] = (
    ("harmful", "harmful", "made-up harmful requests, asked directly"),
    ("harmful_attacks", "harmful", "made-up harmful requests under attack framings"),
    ("borderline", "benign", "harmless requests that look harmful"),
    ("benign", "benign", "plain harmless requests"),
)


def known_suites() -> list[KnownSuite]:
    """Suites that come with safebasin, counted from the made-up world itself; nothing is built or downloaded."""
    from orchestrator.pocket import rows, world

    files = rows.files(world.world())
    return [
        KnownSuite(f"pocket:{name}", kind, len(table), len({row["topic"] for row in table}), "Apache-2.0", text)
        for name, kind, text in _SHIPPED
        for table in [files[f"suites/{name}.jsonl"]]
    ]
