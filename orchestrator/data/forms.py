"""One row of any supported form -> messages. What is there is used, what is not supported is refused by name, what is changed is counted.

Forms: `messages` (OpenAI, ShareGPT, TRL), `prompt_response` (texts, or TRL's lists of messages), `instruction` (Alpaca); beside each of
them a system text, and beside the last two earlier turns (`history`) and an input or context.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator import config
from orchestrator.data.counts import Tally
from orchestrator.data.rows import Row, need_column, pick_column
from orchestrator.data.turns import Message, Turns, blank, missing
from orchestrator.errors import DataError, brief

PROMPTS = ("prompt", "question", "input_text", "query", "goal", "behavior", "user", "input")
RESPONSES = ("response", "answer", "completion", "output", "output_text", "target", "safe_response", "chosen", "assistant", "label")
MESSAGES = ("messages", "conversations", "conversation", "chat")
SYSTEMS = ("system", "system_prompt")
HISTORIES = ("history",)
REFUSED = {
    "chat_template_kwargs": "settings of the chat template", "documents": "documents for the chat template",
    "tools": "definitions of tools", "functions": "definitions of functions", "tool_calls": "calls of tools", "function_call": "calls of functions",
    "images": "images", "image": "images", "videos": "videos", "video": "videos", "audios": "audio", "audio": "audio",
}  # fmt: skip
"""Columns that would change what is asked or learnt, and cannot be used here."""
DOUBTFUL = ("reasoning", "reasoning_content", "thinking", "train", "loss", "mask", "rejected")
"""Columns that mean something to other trainers and nothing here."""
LIKE = {
    "system": ("system_message", "system_msg", "sys", "sys_prompt", "systemprompt", "developer", "developer_message", "developer_prompt"),
    "history": (
        "chat_history", "conversation_history", "message_history", "dialog_history", "dialogue_history", "previous_turns", "past_turns",
        "previous_messages",
    ),
}  # fmt: skip
"""Names of columns that say what a key of `columns` takes, and that nobody is used to: not used unless the key names them, so refused."""
WEIGHTS = ("weight", "sample_weight", "row_weight")
BLANKS = ("nan", "null", "undefined", "<na>", "#n/a", "na", "n/a", "none", "nat")
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
LONG = 1_000_000
"""Characters from which a text is said to be long: none of it beyond `task.max_length` tokens is read by anybody."""


@dataclass
class Reader:
    """Reads the rows of one source."""

    columns: config.Columns
    where: str
    safety: bool = False
    tally: Tally = field(default_factory=Tally)
    used: dict[str, None] = field(default_factory=dict)
    """Columns that something was taken from."""
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        self.turns = Turns(self.where, self.tally)

    def read(self, rows: Sequence[Row], form: str) -> list[list[Message] | None]:
        """The messages of each row, the last of them the answer that is learnt; None for a row without an answer to learn.

        Raises DataError, naming the row (from 1), for what is no text, is empty, or is not supported.
        """
        reader = {"messages": self._messages, "prompt_response": self._pair, "instruction": self._instruction}[form](rows)
        system = self._beside(rows, self.columns.system, SYSTEMS)
        self._refuse(rows)
        found = []
        for i, row in enumerate(rows):
            messages = reader(i, row)
            if system and not missing(row.get(system)):
                messages = self._with_system(messages, row[system], system, i)
            learnt = self.turns.learnt(messages, i)
            found.append(None if learnt is None else self._checked(learnt, i))
        return found

    def unused(self, rows: Sequence[Row], also: Sequence[str]) -> list[str]:
        """Columns that nothing was taken from, without those in `also` and what a loader noted."""
        return [c for c in _all_columns(rows) if c not in self.used and c.lower() not in also and not c.startswith("__")]

    # ------------------------------------------------------------------------------------------------ the three forms

    def _messages(self, rows: Sequence[Row]):
        column = self._column(rows, self.columns.messages, MESSAGES)
        beside = self._beside(rows, self.columns.history, HISTORIES)

        def read(i: int, row: Row) -> list[Message]:
            if beside and not missing(row.get(beside), text=False):
                raise DataError(f"{self.where}: row {i + 1} has earlier turns in {beside!r} beside {column!r}; put all turns into {column!r}")
            return self.turns.conversation(row[column], column, i)

        return read

    def _pair(self, rows: Sequence[Row]):
        prompt = self._column(rows, self.columns.prompt, PROMPTS)
        response = self._column(rows, self.columns.response, [c for c in RESPONSES if c.lower() != prompt.lower()])
        return self._asked(rows, prompt, response, ("context", "input") if self.columns.input is None else ())

    def _instruction(self, rows: Sequence[Row]):
        instruction = self._column(rows, self.columns.instruction, ("instruction",))
        output = self._column(rows, self.columns.output or self.columns.response, ("output", *RESPONSES))
        return self._asked(rows, instruction, output, ("input", "context", "query"))

    def _asked(self, rows: Sequence[Row], prompt: str, response: str, usual: Sequence[str]):
        """Reader of rows with a prompt and an answer: history, prompt, input after a blank line, answer."""
        extra = self._beside(rows, self.columns.input, [name for name in usual if name not in (prompt.lower(), response.lower())])
        history = self._beside(rows, self.columns.history, HISTORIES)

        def read(i: int, row: Row) -> list[Message]:
            asked = self.turns.prompt(row[prompt], prompt, i)
            if extra and not missing(row.get(extra)):
                asked = self._with_input(asked, row[extra], extra, i)
            if history and not missing(row.get(history), text=False):
                asked = self._with_history(asked, row[history], history, i)
            return [*asked, *self.turns.answer(row[response], response, asked, i)]

        return read

    # ------------------------------------------------------------------------------------------------ columns beside them

    def _column(self, rows: Sequence[Row], named: str | None, usual: Sequence[str]) -> str:
        column = need_column(rows, named or pick_column(rows, usual) or usual[0], self.where)
        self.used[column] = None
        return column

    def _beside(self, rows: Sequence[Row], named: str | None, usual: Sequence[str]) -> str | None:
        """A column that only some rows may have."""
        if named:
            need_column([dict.fromkeys(_all_columns(rows))], named, self.where)
        column = named or pick_column([dict.fromkeys(_all_columns(rows))], [c for c in usual if c not in self.used])
        if column is not None and column in self.used:
            return None
        if column is not None:
            self.used[column] = None
        return column

    def _refuse(self, rows: Sequence[Row]) -> None:
        for column in _all_columns(rows):
            if column in self.used:
                continue
            name = column.lower()
            first = next((i for i, row in enumerate(rows) if not missing(row.get(column), text=False)), None)
            if first is None:
                continue
            if name in REFUSED:
                raise DataError(
                    f"{self.where}: row {first + 1} holds {REFUSED[name]} (column {column!r}), which are not supported: the row would be asked and "
                    "learnt without them; remove the column if that is what you want, or the rows"
                )
            meant = next((key for key, names in LIKE.items() if name in names), None)
            if meant is not None and getattr(self.columns, meant) is None:
                raise DataError(
                    f"{self.where}: row {first + 1} holds a text in the column {column!r}, which nothing uses: it would be asked and learnt "
                    f"without it; set {'safety' if self.safety else 'task'}.columns.{meant}={column}, or remove the column"
                )
            if name in WEIGHTS:
                self._refuse_weights(rows, column)
                continue
            if name in DOUBTFUL and not (self.safety and name == "rejected"):
                for i, row in enumerate(rows):
                    if not missing(row.get(column)):
                        self.tally.doubt(f"the column {column!r} is not used, though other trainers would", i)

    def _refuse_weights(self, rows: Sequence[Row], column: str) -> None:
        for i, row in enumerate(rows):
            if not missing(row.get(column)) and str(row[column]).strip() not in ("1", "1.0", "True", "true"):
                raise DataError(
                    f"{self.where}: row {i + 1} has the {column} {brief(row[column], 40)}, and rows are not weighted here; "
                    "remove the column, or the rows that should not count"
                )

    def _with_system(self, messages: list[Message], value: Any, column: str, i: int) -> list[Message]:
        text = self.turns.text(value, "system", i)
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"].strip() == text.strip():
                return messages
            raise DataError(f"{self.where}: row {i + 1} has a system text in {column!r} and another one among its messages; keep one of them")
        self.tally.change(f"the column {column!r} is the system message", i)
        return [{"role": "system", "content": text}, *messages]

    def _with_input(self, asked: list[Message], value: Any, column: str, i: int) -> list[Message]:
        more = self.turns.text(value, column, i)
        if asked[-1]["role"] != "user":
            raise DataError(f"{self.where}: row {i + 1} has a text in {column!r}, and a prompt whose last message is none of the user's; join them")
        if column != "input":
            self.tally.change(f"the column {column!r} stands after the prompt, a blank line between", i)
        return [*asked[:-1], {"role": "user", "content": f"{asked[-1]['content'].rstrip()}\n\n{more}"}]

    def _with_history(self, asked: list[Message], value: Any, column: str, i: int) -> list[Message]:
        if asked[0]["role"] == "system" or len(asked) > 1:
            raise DataError(f"{self.where}: row {i + 1} has earlier turns in {column!r} beside a prompt of several messages; keep one of them")
        earlier = self.turns.history(value, column, i)
        if earlier:
            self.tally.change(f"the column {column!r} holds the turns before the prompt", i)
        return [*earlier, *asked]

    # ------------------------------------------------------------------------------------------------ what every row must have

    def _checked(self, messages: list[Message], i: int) -> list[Message]:
        for message in messages:
            content = message["content"]
            if "\0" in content:
                raise DataError(
                    f"{self.where}: row {i + 1}: the {message['role']}'s text holds a NUL character, which no text does: the file is damaged or "
                    "binary; correct or remove the row"
                )
            if _CONTROL.search(content):
                self.tally.doubt("a text holds control characters (such as colours of a terminal), which are learnt as they stand", i)
            if blank(content) and message["role"] != "system":
                raise DataError(f"{self.where}: row {i + 1}: the {message['role']}'s text is empty; correct or remove the row")
            if len(content) > LONG:
                self.tally.doubt(f"a text of more than {LONG:,} characters; what lies beyond task.max_length is never read", i)
        if len(messages) < 2:
            raise DataError(f"{self.where}: row {i + 1} has an answer but no prompt before it")
        for name, text in (("answer", messages[-1]["content"]), ("prompt", messages[-2]["content"])):
            if len(text) < 12 and text.strip().lower() in BLANKS:
                self.tally.doubt(f"the {name} is the word {text.strip()!r}, as tables write an empty cell; it is used as it stands", i)
        return messages


def _all_columns(rows: Sequence[Row]) -> list[str]:
    """Columns of any row, in order of appearance."""
    found: dict[str, None] = {}
    for row in rows:
        if len(row) != len(found) or any(column not in found for column in row):
            found.update(dict.fromkeys(map(str, row)))
    return list(found)
