"""Rows become conversations; `rows.load_rows` is before, `tokens.tokenise` after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import config
from orchestrator.data import overlap
from orchestrator.data.counts import RowsReport, Tally
from orchestrator.data.forms import MESSAGES, PROMPTS, RESPONSES, Reader
from orchestrator.data.rows import Row, need_column, pick_column
from orchestrator.data.turns import Message, Turns, missing
from orchestrator.errors import DataError

SAFETY_KINDS = ("refusal", "harmless")


@dataclass(frozen=True)
class Conversation:
    """One row: the last message is the assistant's answer, the ones before it are the prompt."""

    id: str
    messages: tuple[Message, ...]
    kind: str = "task"
    """`task`; in safety data `refusal` or `harmless`; `harmful` for a harmful answer to a harmful prompt;
    `begun` and `anchor` for answers that were begun (`data.anchors`)."""
    row: int | None = dataclasses.field(default=None, compare=False)
    """Number in its source, from 1; for sentences only."""
    begun: str = ""
    """The beginning of the answer that is read and not learnt (`data.anchors`)."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


# ------------------------------------------------------------------------------------------------ rows -> conversations


@dataclass(frozen=True)
class Read:
    """Rows as conversations, and what was changed on the way."""

    conversations: list[Conversation]
    report: RowsReport
    rows: list[Row]
    """The row behind each conversation."""


def normalise(
    rows: Sequence[Row],
    format: str = "auto",
    columns: config.Columns | None = None,
    source: str = "",
    *,
    field: str = "task.data",
    kind: str = "task",
) -> list[Conversation]:
    """The conversations of `read`."""
    return read(rows, format, columns, source, field=field, kind=kind).conversations


def read(
    rows: Sequence[Row],
    format: str = "auto",
    columns: config.Columns | None = None,
    source: str = "",
    *,
    field: str = "task.data",
    kind: str = "task",
) -> Read:
    """Rows of any supported form as conversations, in order, with a report of what was used otherwise than it is written.

    format: `messages`, `prompt_response`, `instruction` or `auto` (by the columns of the first row). `columns` overrides the usual
    names. kind: `task`, or `safety`, where a row's own `kind` (refusal, harmless) is kept and a row without one counts as a refusal.
    Ids: the rows' `id` where every row has one of its own, else the position. Rows whose answers all have the weight 0 are left out and
    counted. Raises DataError for no rows, columns that cannot be recognised, a prompt or answer that is no text or empty, and for what
    would change the row's meaning and is not supported (tools, images, chains of thought beside the text).
    """
    where = f"{field} ({source})" if source and source != field else field
    if not rows:
        raise DataError(f"{where}: no rows; give data with at least one")
    columns = columns or config.Columns()
    form = _form(rows, format, columns, where)
    reader = Reader(columns, where, safety=kind == "safety")
    found = reader.read(rows, form)
    if kind == "task":
        _check_preferences(rows, columns, reader, where)
    ids = _ids(rows)
    kept = [i for i, messages in enumerate(found) if messages is not None]
    if not kept:
        raise DataError(f"{where}: all {len(rows)} rows are left out ({'; '.join(reader.tally.dropped)}); give rows with answers to learn")
    conversations = [Conversation(ids[i], tuple(found[i] or ()), _kind(rows[i], kind, i, where), i + 1) for i in kept]
    also = ("id", "kind", *REJECTED, "refusal") if kind == "safety" else ("id",)
    report = reader.tally.report(field, source, form, len(rows), len(kept), reader.unused(rows, also))
    return Read(conversations, report, [rows[i] for i in kept])


REJECTED = ("rejected", "harmful_response", "unsafe_response")


def _check_preferences(rows: Sequence[Row], columns: config.Columns, reader: Reader, where: str) -> None:
    """Raises DataError for rows of preferences: they are no answers to learn, unless the config says so by naming the column."""
    chosen = next((column for column in reader.used if column.lower() == "chosen"), None)
    if chosen is None or chosen in (columns.response, columns.output, columns.messages) or pick_column(rows, ("rejected",)) is None:
        return
    raise DataError(
        f"{where}: rows of preferences (columns {chosen!r} and 'rejected'): no method here learns a task from them; to learn {chosen!r} as plain "
        f"answers say so, {field_columns(where)}.response={chosen}"
    )


def harmful_answers(rows: Sequence[Row], conversations: Sequence[Conversation], columns: config.Columns, where: str) -> list[Conversation]:
    """The harmful answers beside the safe ones (column `rejected`): the same prompt and id, kind `harmful`. Rows without one are left out.

    `conversations` are those of the same rows (`Read.rows`). [] where there is no such column. Raises DataError for an answer that is no text.
    """
    column = need_column(rows, columns.rejected, where) if columns.rejected else pick_column(rows, REJECTED)
    if column is None:
        return []
    turns, found = Turns(where, Tally()), []
    for i, (row, safe) in enumerate(zip(rows, conversations, strict=True)):
        value = row.get(column)
        if safe.kind == "refusal" and not missing(value):
            answer = turns.learnt([*safe.prompt, *turns.answer(value, column, list(safe.prompt), i)], i)
            if answer is not None:
                found.append(Conversation(safe.id, tuple(answer), "harmful", safe.row))
    return found


def _form(rows: Sequence[Row], format: str, columns: config.Columns, where: str) -> str:
    if format != "auto":
        return format
    if columns.messages or (pick_column(rows, MESSAGES) and not (columns.prompt or columns.instruction)):
        return "messages"
    if not columns.prompt and (columns.instruction or pick_column(rows, ("instruction",))):
        if columns.output or columns.response or pick_column(rows, RESPONSES):
            return "instruction"
    elif (columns.prompt or pick_column(rows, PROMPTS)) and (columns.response or pick_column(rows, RESPONSES)):
        return "prompt_response"
    found = ", ".join(map(str, rows[0]))
    if pick_column(rows, ("text",)) and not pick_column(rows, RESPONSES):
        raise DataError(
            f"{where}: rows of plain text (columns found: {found}) hold no prompt and answer to tell apart, and only answers are learnt here; give a "
            f"prompt and a response, or messages; or name them, e.g. {field_columns(where)}.prompt=... {field_columns(where)}.response=..."
        )
    raise DataError(
        f"{where}: cannot tell prompt and answer from the columns found ({found}; in CSV and TSV the first line names them); "
        "expected messages, or a prompt "
        f"({', '.join(PROMPTS[:4])}...) with a response ({', '.join(RESPONSES[:4])}...), or instruction/input/output. "
        f"Name them, e.g. {field_columns(where)}.prompt={_nearest(rows, PROMPTS)} "
        f"{field_columns(where)}.response={_nearest(rows, RESPONSES)}"
    )


def field_columns(where: str) -> str:
    """`task.data (file)` -> `task.columns`: the key that names columns."""
    return where.split(" ")[0].rpartition(".")[0] + ".columns"


def _nearest(rows: Sequence[Row], wanted: Sequence[str]) -> str:
    import difflib

    def likeness(column: str) -> float:
        return max(difflib.SequenceMatcher(None, column.lower(), name).ratio() for name in wanted)

    return max(map(str, rows[0]), key=likeness, default="?")


def _ids(rows: Sequence[Row]) -> list[str]:
    own = [str(row.get("id") or "") for row in rows]
    return own if all(own) and len(set(own)) == len(own) else [str(i) for i in range(len(rows))]


def _kind(row: Row, kind: str, index: int, where: str) -> str:
    if kind in ("task", "harmful"):
        return kind
    own = row.get("kind")
    if missing(own):
        # the layout prompt/response/refusal (LLM-LAT/benign-dataset) holds harmless prompts; `refusal` is what not to say
        return "harmless" if "refusal" in row and "response" in row else "refusal"
    if own not in SAFETY_KINDS:
        raise DataError(
            f"{where}: row {index + 1}: kind {own!r} is none of {', '.join(SAFETY_KINDS)}; rows without a kind count as refusals"
        )
    return own


# ------------------------------------------------------------------------------------------------ sets of rows


def asked(row: Conversation) -> str:
    """All that a row asks, system message and earlier turns included, as one text; for comparing rows."""
    return "\n".join(message["content"] for message in row.prompt)


def split_holdout(rows: Sequence[Conversation], fraction: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out): about `fraction` of the distinct prompts held out, at least one on each side, both in the given order.

    Rows with the same prompt (case, spacing and punctuation aside) go to the same side, so that no evaluation prompt is trained on.
    Raises DataError where there are fewer than two distinct prompts.
    """
    first: dict[bytes, str] = {}
    same = [overlap.key(overlap.units(text), text) for text in map(asked, rows)]
    for row, key in zip(rows, same, strict=True):
        text = json.dumps(row.prompt, sort_keys=True)
        first[key] = min(first.get(key, text), text)
    keys = [first[key] for key in same]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise DataError(f"task.data holds {len(distinct)} distinct prompt(s), too few to hold rows out; give task.eval_data or more rows")
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: min(max(1, round(fraction * len(distinct))), len(distinct) - 1)])
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in held]


def sample(rows: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """`count` of the rows after a seeded draw, in the rows' order; all of them where there are no more."""
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[i] for i in sorted(chosen)]


def fingerprint(*parts: Any) -> str:
    """sha256 over the content of conversations (ids, messages, kinds) and plain values, order included."""

    def plain(part: Any) -> Any:
        if isinstance(part, Conversation):
            return [part.id, part.kind, list(part.messages), *([part.begun] if part.begun else [])]
        if isinstance(part, (list, tuple)):
            return [plain(p) for p in part]
        return part

    return hashlib.sha256(json.dumps(plain(parts), sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()
