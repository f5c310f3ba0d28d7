"""Values of a row as turns of a conversation: lists of messages in their several dialects, earlier turns, plain texts and numbers."""

from __future__ import annotations

import decimal
import math
import re
from dataclasses import dataclass
from typing import Any

from orchestrator.data import json_rows
from orchestrator.data.counts import Tally
from orchestrator.errors import DataError, brief

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "developer": "system",
}  # fmt: skip
CALLS = ("function_call", "tool_call", "function", "observation", "tool_response", "ipython")
"""Roles in which other formats write calls of tools and what these gave back."""
_THOUGHT = "a chain of thought beside the text"
REFUSED = {
    "tool_calls": "calls of tools", "function_call": "a call of a function", "audio": "audio", "images": "images", "image": "images",
    "videos": "videos", "video": "videos", "reasoning_content": _THOUGHT, "reasoning": _THOUGHT, "thinking": _THOUGHT,
    "refusal": "a refusal beside the text",
}  # fmt: skip
"""Fields of a message that would change what is asked or learnt, and cannot be used here."""
WEIGHTS = ("weight", "train", "loss")
TEXT_PARTS = ("text", "input_text", "output_text", None)


def missing(value: Any, *, text: bool = True) -> bool:
    """Whether an optional cell holds nothing: null, NaN (an empty cell of a table), blank text, an empty list or object.

    text: the cell is read as text; where it is not, `[]`, `{}` and `null` written as text hold nothing either.
    """
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return blank(value) or (not text and value.strip() in ("[]", "{}", "null"))
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


_INVISIBLE = re.compile(
    "[\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)
"""White space and what Unicode says to show as nothing."""


def blank(text: str) -> bool:
    """Whether a text shows nothing: empty, or of blanks and invisible characters alone."""
    return _INVISIBLE.fullmatch(text) is not None


def kind(value: Any) -> str:
    """A value's kind in JSON's words."""
    words = {"NoneType": "null", "dict": "an object", "list": "a list", "tuple": "a list", "str": "a text", "bool": "true or false"}
    return words.get(type(value).__name__, "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def is_turns(value: Any) -> bool:
    """Whether a value is a list of messages: objects of which one says whose it is."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, dict) for one in value) and any(map(_role, value))


def _role(turn: dict[str, Any]) -> str:
    role = turn.get("role")
    return str(turn.get("from") or "" if role is None else role)


@dataclass
class Turns:
    """Reads values of the rows of one source; raises DataError naming the row (from 1)."""

    where: str
    tally: Tally

    def conversation(self, value: Any, column: str, i: int) -> list[dict[str, Any]]:
        """A list of messages, also as JSON text; each {role, content}, with `learn` for an answer that is weighted."""
        if isinstance(value, str):
            value = self._json(value, f"column {column!r}", i, "; it must be a list of messages")
        if not isinstance(value, (list, tuple)) or not all(isinstance(turn, dict) for turn in value):
            raise DataError(f"{self._at(i)}: column {column!r} must be a list of {{role, content}}, not {kind(value)}")
        return [self._turn(turn, column, i) for turn in value]

    def prompt(self, value: Any, column: str, i: int) -> list[dict[str, Any]]:
        """A user's text, or TRL's list of messages."""
        value = self._maybe_turns(value, column, i)
        if is_turns(value):
            return self.conversation(value, column, i)
        return [{"role": "user", "content": self.text(value, "user", i)}]

    def answer(self, value: Any, column: str, asked: list[dict[str, Any]], i: int) -> list[dict[str, Any]]:
        """An answer's text, or TRL's list of messages; a list that begins with the prompt's messages repeats them (preference rows)."""
        value = self._maybe_turns(value, column, i)
        if not is_turns(value):
            return [{"role": "assistant", "content": self.text(value, "assistant", i)}]
        turns = self.conversation(value, column, i)
        plain = [_plain(turn) for turn in asked]
        for own in (plain, [turn for turn in plain if turn["role"] != "system"]):
            if [_plain(turn) for turn in turns[: len(own)]] == own:
                turns = turns[len(own) :]
                break
        if not turns or turns[0]["role"] not in ("assistant", "tool"):
            first = f"begins with a message of the {turns[0]['role']}" if turns else "holds the prompt only"
            raise DataError(f"{self._at(i)}: column {column!r} {first}; it must hold what follows the prompt, an answer of the assistant first")
        return turns

    def history(self, value: Any, column: str, i: int) -> list[dict[str, Any]]:
        """Earlier turns: [[question, answer], ...] (Alpaca, ChatGLM) or a list of messages, also as JSON text."""
        if isinstance(value, str):
            value = self._json(value, f"column {column!r}", i, "; it must be a list of [question, answer]")
        if is_turns(value):
            return self.conversation(value, column, i)
        if not isinstance(value, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
            raise DataError(f"{self._at(i)}: column {column!r} must be a list of [question, answer], or of {{role, content}}")
        return [
            {"role": role, "content": self.text(text, f"{role} of {column}", i)}
            for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)
        ]  # fmt: skip

    def learnt(self, turns: list[dict[str, Any]], i: int) -> list[Message] | None:
        """The messages up to the last answer that is to be learnt; None where every answer is weighted 0. Raises DataError without one."""
        answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise DataError(f"{self._at(i)} has no assistant answer among its {len(turns)} messages; training needs one")
        wanted = [k for k in answers if turns[k].get("learn", True)]
        if not wanted:
            self.tally.drop("every answer has the weight 0, so there is nothing to learn", i)
            return None
        last = wanted[-1]
        if last < len(turns) - 1:
            self.tally.change("messages after the last answer to learn are left out", i)
        if len(wanted) > 1:
            self.tally.change("several answers; the last is learnt, the others are given as context", i)
        return [_plain(turn) for turn in turns[: last + 1]]

    def text(self, value: Any, who: str, i: int) -> str:
        """A text; numbers and truth values as they are written in JSON, content parts joined. Raises DataError for anything else."""
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            self.tally.change("a truth value is used as text", i)
            return "true" if value else "false"
        if isinstance(value, (int, float, decimal.Decimal)):
            if not isinstance(value, (int, json_rows.Decimal)) and not math.isfinite(value):
                why = "as an empty cell of a table is written" if math.isnan(value) else "which is no number that can be written as a text"
                raise DataError(f"{self._at(i)}: the {who}'s text is {value}, {why}; correct or remove the row")
            self.tally.change("a number is used as text", i)
            return str(value)
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            value = [value]
        if isinstance(value, (list, tuple)) and value:
            return self._joined(value, who, i)
        shown = "missing (null)" if value is None else "empty" if value == [] else f"{kind(value)}, not text"
        raise DataError(f"{self._at(i)}: the {who}'s text is {shown}; correct or remove the row")

    # ------------------------------------------------------------------------------------------------ inside

    def _at(self, i: int) -> str:
        return f"{self.where}: row {i + 1}"

    def _json(self, text: str, what: str, i: int, wanted: str) -> Any:
        try:
            return json_rows.value(text)
        except ValueError as error:
            raise DataError(f"{self._at(i)}: {what} {error}{wanted}") from error

    def _maybe_turns(self, value: Any, column: str, i: int) -> Any:
        """A JSON text of messages, as tables hold TRL's lists, read; anything else as it is."""
        if isinstance(value, dict) and _role(value) and "text" not in value:
            return [value]
        if not (isinstance(value, str) and value.lstrip().startswith("[") and '"role"' in value):
            return value
        try:
            found = json_rows.value(value)
        except ValueError:
            return value  # a text that only looks like it
        if not is_turns(found):
            return value
        self.tally.change(f"the text in {column!r} is a list of messages", i)
        return found

    def _turn(self, turn: dict[str, Any], column: str, i: int) -> dict[str, Any]:
        said = _role(turn)
        role = ALIASES.get(said.strip().lower(), said.strip().lower())
        if role in CALLS:
            raise DataError(f"{self._at(i)}: role {brief(said, 60)} (calls of tools and their results) is not supported; remove the row")
        if role not in ROLES:
            raise DataError(f"{self._at(i)}: role {brief(said, 60)} is none of {', '.join(ROLES)}")
        if said.strip().lower() == "developer":
            self.tally.change("the role developer is read as system", i)
        for name, what in REFUSED.items():
            if not missing(turn.get(name), text=False):
                raise DataError(
                    f"{self._at(i)}: a message of the {role} holds {what} ({name}), which is not supported: it would be left out of what is asked "
                    "and learnt; remove the field if that is what you want, or the row"
                )
        content = turn.get("content", turn.get("value"))
        made: dict[str, Any] = {"role": role, "content": self.text(content, role, i)}
        for name in turn:
            if name in WEIGHTS and turn[name] is not None:
                self._weigh(made, turn[name], name, i)
            elif name not in ("role", "from", "content", "value") and name not in REFUSED and name not in WEIGHTS and not missing(turn[name]):
                self.tally.fields[f"{column}[].{name}"] = None
        return made

    def _weigh(self, made: dict[str, Any], weight: Any, name: str, i: int) -> None:
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            raise DataError(f"{self._at(i)}: {name} {weight!r} of a message is not supported; 0 (not learnt) and 1 (learnt) are")
        if made["role"] == "assistant":
            made["learn"] = made.get("learn", True) and bool(weight)
            if not weight:
                self.tally.change(f"an answer with {name} 0 is not learnt", i)
        elif weight:
            self.tally.change(f"{name} 1 of a message that is no answer is not used", i)

    def _joined(self, parts: list[Any] | tuple[Any, ...], who: str, i: int) -> str:
        """Content parts of type text, a line each."""
        texts = []
        for part in parts:
            named = part.get("type") if isinstance(part, dict) else None
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or named not in TEXT_PARTS:
                what = f"a part of type {named!r}" if named and named not in TEXT_PARTS else f"a list that holds {kind(part)}"
                raise DataError(f"{self._at(i)}: the {who}'s text is {what}, not text; only parts of type 'text' are supported, so remove the row")
            texts.append(text)
        if len(texts) > 1:
            self.tally.change("parts of a message are joined, a line each", i)
        return "\n".join(texts)


def _plain(turn: dict[str, Any]) -> Message:
    return {"role": turn["role"], "content": turn["content"]}
