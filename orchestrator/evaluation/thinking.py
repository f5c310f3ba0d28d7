"""Answers of reasoning models: what they think before they answer is no answer. It is cut off before anything is judged or scored.

A block of thoughts lies between two markers. Some chat templates open it in the prompt, so that an answer holds the closing marker only. A block
that is not closed leaves no answer: it is neither a refusal nor compliance, whatever stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARKERS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"), ("<unused94>thought", "<unused95>"),
)  # fmt: skip
"""(opening, closing) as models of the field write them: DeepSeek-R1, Qwen3, QwQ; Granite; Magistral; Seed-OSS; Sky-T1; Cohere; gpt-oss; MedGemma."""
_PARTS = {part for pair in MARKERS for one in pair for part in re.findall(r"<[^<>]+>|\[[^\[\]]+\]", one)}
UNFINISHED = "its thoughts were not finished within the tokens it was given; raise safety.max_new_tokens or safety.thinking_budget"


@dataclass(frozen=True)
class Spoken:
    """An answer in its two parts."""

    thoughts: str
    said: str
    finished: bool = True
    """Whether what was thought came to an end; without that there is no answer, and `said` is empty."""


def split(answer: str, begun: bool = False) -> Spoken:
    """Thoughts and what is said after them. `begun`: the prompt has opened a block already. An answer without markers is all said; text before an
    opened block belongs to what is said. Blocks may follow each other."""
    thoughts, said, rest = [], [], answer
    inside = begun
    closings = [closing for _, closing in MARKERS]
    while rest:
        if inside or (not thoughts and not said and _first(rest, [opening for opening, _ in MARKERS]) is None and _first(rest, closings)):
            found = _first(rest, closings)
            if found is None:
                return Spoken(" ".join([*thoughts, rest.strip()]).strip(), "", False)
            at, closing = found
            thoughts.append(rest[:at].strip())
            rest, inside = rest[at + len(closing) :], False
            continue
        found = _first(rest, [opening for opening, _ in MARKERS])
        if found is None:
            said.append(rest)
            break
        at, opening = found
        said.append(rest[:at])
        rest, inside = rest[at + len(opening) :], True
    if inside:
        return Spoken(" ".join(thoughts).strip(), "", False)
    return Spoken(" ".join(thoughts).strip(), " ".join(part.strip() for part in said if part.strip()))


def _first(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """(place, marker) of the first of several markers in a text."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found, default=None)


def begins(tokenizer: Any) -> bool:
    """Whether the chat template opens a block of thoughts for the model, at the end of the prompt. False without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    if not any(opening in tokenizer.chat_template for opening, _ in MARKERS):
        return False
    from orchestrator.data.tokens import render

    text = render(tokenizer, [{"role": "user", "content": "hello"}], generation=True).rstrip()
    return any(text.endswith(opening) for opening, _ in MARKERS)


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
