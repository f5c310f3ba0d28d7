"""Special tokens written into the texts of rows: an end at an answer's end is taken off, one inside is refused, others are counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.data import template
from orchestrator.data.counts import Count
from orchestrator.data.turns import blank
from orchestrator.errors import DataError

if TYPE_CHECKING:
    from orchestrator.data.conversations import Conversation


def cleaned(conversations: Sequence[Conversation], tokenizer: Any, field: str) -> tuple[list[Conversation], list[Count], list[Count]]:
    """(conversations whose answers end without an end token, what was taken off, special tokens that stay in texts).

    An end token at the end of an answer comes from data made for another template; this one puts its own. Raises DataError, naming the
    row, for an end token inside the answer to learn, which would be cut there, and for an answer that is nothing else.
    """
    names = _texts(tokenizer, template.special_ids(tokenizer))
    ends = _texts(tokenizer, template.style(tokenizer).stops)
    if not names:
        return list(conversations), [], []
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    found, taken, left = [], {}, {}
    for conversation in conversations:
        if any(pattern.search(message["content"]) for message in conversation.messages):
            conversation = _one(conversation, pattern, ends, taken, left, field)
        found.append(conversation)
    return found, _counts(taken, "an end token {} at the end of an answer was taken off"), _counts(left, "the special token {} stands in a text")


def _one(conversation, pattern, ends: set[str], taken: dict[str, list[int]], left: dict[str, list[int]], field: str) -> Conversation:
    messages = []
    for k, message in enumerate(conversation.messages):
        text = message["content"]
        if message["role"] == "assistant":
            text = _stripped(conversation, text, ends, taken)
            inside = next((m[0] for m in pattern.finditer(text) if m[0] in ends), None)
            if k == len(conversation.messages) - 1 and inside is not None:
                raise DataError(
                    f"{field}: {place(conversation)}: the answer holds {inside!r} inside, the token that ends an answer: it would be learnt up to "
                    "there only; take the token out of the text, or make the rest a row or messages of their own"
                )
            if blank(text):
                raise DataError(f"{field}: {place(conversation)}: the answer is empty but for an end token; correct or remove the row")
        for name in dict.fromkeys(pattern.findall(text)):
            _note(left, name, conversation)
        messages.append(message if text == message["content"] else {**message, "content": text})
    return replace(conversation, messages=tuple(messages))


def _stripped(conversation: Conversation, text: str, ends: set[str], taken: dict[str, list[int]]) -> str:
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
        _note(taken, end, conversation)
    return text


def _texts(tokenizer: Any, ids: Any) -> set[str]:
    return {text for text in tokenizer.convert_ids_to_tokens(sorted(ids)) if text}


def _note(kind: dict[str, list[int]], name: str, conversation: Conversation) -> None:
    numbers = kind.setdefault(name, [])
    if not numbers or numbers[-1] != (conversation.row or 0):
        numbers.append(conversation.row or 0)


def _counts(kinds: dict[str, list[int]], what: str) -> list[Count]:
    return [Count(what.format(repr(name)), len(rows), min(rows)) for name, rows in kinds.items()]


def place(conversation: Conversation) -> str:
    """`row 3` of its source (from 1), or by id where it is from none."""
    return f"row {conversation.row}" if conversation.row is not None else f"row {conversation.id!r}"
