"""Answers of reasoning models: what they think before they answer (`data.thoughts`) is no answer. It is cut off before anything is judged or
scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from orchestrator.data.thoughts import MARKERS, UNFINISHED, Spoken, opened, split

__all__ = ["MARKERS", "UNFINISHED", "Spoken", "begins", "decoded", "split"]

_PARTS = {part for pair in MARKERS for one in pair for part in re.findall(r"<[^<>]+>|\[[^\[\]]+\]", one)}


def begins(tokenizer: Any) -> bool:
    """Whether the chat template opens a block of thoughts for the model, at the end of the prompt. False without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    if not any(opening in tokenizer.chat_template for opening, _ in MARKERS):
        return False
    from orchestrator.data.tokens import render

    return opened(render(tokenizer, [{"role": "user", "content": "hello"}], generation=True))


def decoded(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of rows of token ids without special tokens, but with the markers of thoughts, which are special tokens in some vocabularies."""
    special = {i for i in tokenizer.all_special_ids if tokenizer.convert_ids_to_tokens(i) in _PARTS}
    if not special:
        return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    return [_with_markers(tokenizer, row, special).strip() for row in rows]


def _with_markers(tokenizer: Any, row: Sequence[int], special: set[int]) -> str:
    parts: list[str] = []
    plain: list[int] = []
    for token in row:
        if token in special:
            parts += [tokenizer.decode(plain, skip_special_tokens=True), tokenizer.convert_ids_to_tokens(token)]
            plain = []
        else:
            plain.append(token)
    return "".join([*parts, tokenizer.decode(plain, skip_special_tokens=True)])
