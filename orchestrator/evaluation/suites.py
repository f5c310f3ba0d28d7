"""Prompt suites: rows of a file become the prompts that safety is measured on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Literal

from orchestrator import config
from orchestrator.config import catalogue
from orchestrator.data.conversations import fingerprint
from orchestrator.data.rows import Row, load_rows, need_column, pick_column
from orchestrator.errors import DataError
from orchestrator.evaluation import attacks
from orchestrator.evaluation.attacks import Framed
from orchestrator.evaluation.judges import choice
from orchestrator.storage import paths

PROMPT_COLUMNS = ("prompt", "goal", "Behavior", "forbidden_prompt", "question", "instruction", "text")
ANSWER_COLUMNS = ("rejected", "harmful_answer", "target")
"""Columns that may hold a harmful answer to the prompt."""
SEED = 20240607
"""Of the draw behind `limit`; part of what a suite is, so never searched or changed by a run's seed."""


@dataclass(frozen=True)
class PromptSuite:
    """Prompts in the order they are reported in."""

    name: str
    kind: Literal["harmful", "benign", "choice"]
    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    systems: tuple[str | None, ...] | None
    """One system prompt per prompt, None where the rows have no `system` column (the model's own then applies)."""
    groups: tuple[str, ...] | None
    hash: str
    """sha256 of ids, prompts, system prompts, kind, and of framing and right choices where there are any."""
    constrains: bool = True
    framed: tuple[Framed, ...] | None = None
    """Where an attack frames more than text and system prompt: the framing of each prompt."""
    right: tuple[str, ...] | None = None
    """Letters of the right choices (kind `choice`)."""
    attack: str = "direct"
    phase: Literal["always", "confirm"] = "always"
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """data, licence, sha256 (of the suite), duplicates left out: what results say of where prompts are from."""
    texts: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    """What each prompt asks before its attack framed it; None where the suite was not loaded from rows."""
    requests: tuple[str, ...] | None = None
    """Name of the request each prompt asks, the unit of intervals and verdicts; empty for one of its own. None: every prompt is a request."""
    samples: int | None = 0
    """Answers drawn for each prompt in place of a greedy one; None: as many as `safety.generation` says."""

    @property
    def units(self) -> tuple[str, ...]:
        """A name for each prompt's request, unlike others' where it has none."""
        names = self.requests or ("",) * len(self.ids)
        return tuple(f"={name}" if name else f"#{id}" for name, id in zip(names, self.ids, strict=True))

    def asked(self, index: int, tokenizer: Any = None) -> Any:
        """Prompt `index` as `evaluation.generate` takes it; its system prompt goes apart. The tokenizer counts how deep an answer is begun; without
        one the whole of it is given."""
        return self.prompts[index] if self.framed is None else self.framed[index].asked(tokenizer)

    def begun(self, index: int, tokenizer: Any) -> str:
        """What the answer to prompt `index` is begun with; empty for most."""
        return "" if self.framed is None else self.framed[index].begun(tokenizer)

    def subset(self, indices: list[int]) -> PromptSuite:
        """The suite with only these prompts, in this order (probes)."""
        return replace(combine(self.name, [(self, i) for i in indices]), samples=self.samples)


def combine(name: str, picked: Sequence[tuple[PromptSuite, int]], ids: Sequence[str] | None = None) -> PromptSuite:
    """A suite of single prompts (suite, index) of others, each with its own system prompt, framing and group. Kind and the rest as the first's.

    `ids` replaces theirs. Raises ValueError for no prompts.
    """
    if not picked:
        raise ValueError("a suite of no prompts cannot be made")
    first = picked[0][0]

    def column(attribute: str, missing: Callable[[PromptSuite, int], Any]) -> tuple[Any, ...] | None:
        found = [(getattr(suite, attribute), suite, i) for suite, i in picked]
        if all(values is None for values, _, _ in found):
            return None
        return tuple(missing(suite, i) if values is None else values[i] for values, suite, i in found)

    made = make(
        name, first.kind, tuple(ids or [suite.ids[i] for suite, i in picked]), tuple(suite.prompts[i] for suite, i in picked),
        column("systems", lambda suite, i: None), column("groups", lambda suite, i: suite.name), first.constrains,
        column("framed", lambda suite, i: Framed(suite.prompts[i], None)), column("right", lambda suite, i: ""),
    )  # fmt: skip
    requests = column("requests", lambda suite, i: "")
    return replace(made, attack=first.attack, phase=first.phase, source=first.source, requests=requests)


def make(name, kind, ids, prompts, systems, groups, constrains=True, framed=None, right=None) -> PromptSuite:
    """A PromptSuite with its hash."""
    more = [part for part in (framed and [_told(f) for f in framed], right and list(right)) if part]
    hash = fingerprint(kind, list(ids), list(prompts), list(systems or ()), *more)
    return PromptSuite(name, kind, ids, prompts, systems, groups, hash, constrains, framed, right)


def _told(framed: Framed) -> tuple[Any, ...]:
    """What of a framing a suite's hash is taken of."""
    return astuple(framed)[: None if framed.depth is not None else -1]


def load_suite(suite: config.Suite) -> PromptSuite:
    """Prompts of a suite: read, filtered by `where`, freed of duplicates, drawn down to `limit`, framed by its attack.

    A name of the catalogue is read from its local copy where there is one, else from the hub. The draw has a fixed seed, takes groups in
    equal shares where there are groups, and keeps the rows' order. A column `system` gives a prompt its own system message. A prompt
    that occurs twice (case and white space aside, with the same system message) is asked once; `source` counts what was left out.
    Raises DataError naming `safety.suites.<name>` for missing columns, a filter that leaves nothing, prompts that are empty or no text.
    """
    name = f"safety.suites.{suite.name}"
    known = None if paths.is_file(suite.data) else catalogue.entry(suite.data)
    rows, origin = _rows(suite, known, name)
    own = pick_column(rows, ("id",))
    for position, row in enumerate(rows):
        row["__position__"] = str(row[own]) if own and row.get(own) not in (None, "") else str(position)
        row["__row__"] = position + 1  # as a person counts, whatever is filtered out later
    column = _prompt_column(rows, suite.column, name, known)
    group = _group_column(rows, suite, name, known)
    request = need_column(rows, suite.request_column, f"{name}.request_column") if suite.request_column else None
    rows = _where(rows, suite.where or _own_where(rows, known, origin), name)
    _check_prompts(rows, column, name)
    system = pick_column(rows, ("system",))
    if known is not None and known.name == "anthropic_red_team":
        rows = [{**row, column: first_turn(row[column])} for row in rows]
    rows, repeated = _distinct(rows, column, system)
    rows = _limited(rows, suite.limit, group)
    right = None
    if suite.kind == "choice":
        questions = choice.prepared(rows, column, f"{name}.data")
        rows, right = [{**row, column: text} for row, (text, _) in zip(rows, questions, strict=True)], tuple(letter for _, letter in questions)
    framed = _framed(suite, rows, column, system)
    ids = [row["__position__"] for row in rows]
    if len(set(ids)) < len(ids):
        ids = [f"{name}#{i}" for i, name in enumerate(ids)]
    made = make(
        suite.name, suite.kind, tuple(ids), tuple(f.prompt for f in framed),
        tuple(f.system for f in framed) if any(f.system for f in framed) else None,
        tuple(str(row[group]) for row in rows) if group else None,
        suite.constrains, tuple(framed) if any(f.wrapped for f in framed) else None, right,
    )  # fmt: skip
    if suite.language:
        origin = {**origin, "language": suite.language}
    source = {**origin, "licence": known.licence if known else origin.get("licence", "not stated"), "sha256": made.hash, "duplicates": repeated}
    return replace(
        made, attack=suite.attack, phase=suite.phase, source=source, texts=tuple(row[column] for row in rows),
        requests=tuple(_cell(row[request]) for row in rows) if request else None, samples=suite.samples if suite.kind == "harmful" else 0,
    )  # fmt: skip


def _framed(suite: config.Suite, rows: list[Row], column: str, system: str | None) -> list[Framed]:
    """Every prompt as its attack puts it. Raises UnknownNameError; DataError where an attack needs harmful answers and there are none."""
    asked = [(row[column], (row.get(system) or None) if system else None) for row in rows]
    depth = attacks.depth_of(suite.attack)
    if depth is None:
        attack = attacks.get_attack(suite.attack)
        framed = [attack(prompt, own) for prompt, own in asked]
        return framed if suite.opening is None else [replace(one, prefill=suite.opening) for one in framed]
    answers = _harmful_answers(suite, rows, column)
    return [attacks.prefill_at(depth, prompt, own, answer) for (prompt, own), answer in zip(asked, answers, strict=True)]


def _harmful_answers(suite: config.Suite, rows: list[Row], column: str) -> list[str]:
    """A harmful answer to each prompt: the pocket world's own, else of the suite's `answer_column`. Raises DataError."""
    name = f"safety.suites.{suite.name}"
    if suite.data.startswith("pocket:") and suite.answer_column is None:
        from orchestrator.pocket import judge

        topics = [judge.topic_of(row[column]) for row in rows]
        found = [topic.steps if topic is not None else "" for topic in topics]
    else:
        own = suite.answer_column or pick_column(rows, ANSWER_COLUMNS)
        if own is None:
            raise DataError(
                f"{name}: attack {suite.attack} begins the answer with a real harmful one, and the rows hold none; name its column as "
                f"{name}.answer_column (usual names: {', '.join(ANSWER_COLUMNS)})"
            )
        need_column(rows, own, f"{name}.answer_column")
        found = [_cell(row[own]) for row in rows]
    missing = [row["__row__"] for row, answer in zip(rows, found, strict=True) if not answer]
    if missing:
        raise DataError(f"{name}: the harmful answer of row {missing[0]} is empty, and attack {suite.attack} begins the answer with it; leave it out")
    return found


def _cell(value: Any) -> str:
    """A request's name; empty for a cell that is."""
    return "" if value is None or value != value else str(value).strip()


def _rows(suite: config.Suite, known: catalogue.Entry | None, name: str) -> tuple[list[Row], dict[str, Any]]:
    """(rows, what is known of where they are from)."""
    if known is None:
        shipped = {"licence": "Apache-2.0"} if suite.data.startswith("pocket") else {}
        return load_rows(suite.data, split=suite.split, field=f"{name}.data"), {"data": suite.data, **shipped}
    local = paths.expanded(suite.local) if suite.local else catalogue.find_local(known, catalogue.folders("."))
    if local is not None:
        return load_rows(str(local), field=f"{name}.local"), {"data": known.name, "file": local.name}
    try:
        return load_rows(known.hub, split=known.split, field=f"{name}.data"), {"data": known.name, "hub": known.hub, "split": known.split}
    except DataError as error:
        raise DataError(
            f"{error}. A local copy named {' or '.join(known.files[:2])} in a folder of {catalogue.VARIABLE}, or beside the config, is taken too"
            + ("; the hub asks for an account (HF_TOKEN)" if known.gated else "")
        ) from error


def _own_where(rows: list[Row], known: catalogue.Entry | None, origin: Mapping[str, Any]) -> dict[str, str]:
    """The filter that belongs to a suite of the catalogue."""
    if known is None:
        return {}
    return known.where | ({k: v for k, v in known.local_where.items() if k in rows[0]} if "file" in origin else {})


def first_turn(transcript: str) -> str:
    """The user's first message of a transcript `Human: ... Assistant: ...`; any other text as it is."""
    found = re.match(r"\s*Human:\s*(.*?)\s*(?:\n\s*Assistant:|$)", transcript, re.DOTALL)
    return found[1] if found and found[1] else transcript


def _distinct(rows: list[Row], column: str, system: str | None) -> tuple[list[Row], int]:
    """(rows whose prompt is new, how many were left out)."""
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        kept.setdefault((" ".join(row[column].lower().split()), str(row.get(system) or "") if system else ""), row)
    return list(kept.values()), len(rows) - len(kept)


def _group_column(rows: list[Row], suite: config.Suite, name: str, known: catalogue.Entry | None) -> str | None:
    if suite.group_column:
        return need_column(rows, suite.group_column, f"{name}.group_column")
    if known is None or not known.group:
        return None
    return pick_column(rows, (known.group,) if isinstance(known.group, str) else known.group)


def _prompt_column(rows: list[Row], named: str | None, field: str, known: catalogue.Entry | None = None) -> str:
    if named:
        return need_column(rows, named, f"{field}.column")
    usual = () if known is None else (known.column,) if isinstance(known.column, str) else known.column
    column = pick_column(rows, (*usual, *PROMPT_COLUMNS))
    if column is None:
        found = ", ".join(str(c) for c in rows[0] if c not in ("__position__", "__row__"))
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
            raise DataError(f"{field}: the prompt of row {row['__row__']} (column {column!r}) is {kind}; correct or filter it out")


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
