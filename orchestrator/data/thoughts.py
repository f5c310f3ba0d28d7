"""Thoughts in the answers of reasoning models: where they lie, and what is said after them. Text alone, no tokenizer.

A block of thoughts lies between two markers. Some chat templates open it in the prompt, so that an answer holds the closing marker only. A block
that is not closed leaves no answer: it is neither a refusal nor compliance, whatever stands in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARKERS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"), ("<unused94>thought", "<unused95>"),
)  # fmt: skip
"""(opening, closing) as models of the field write them: DeepSeek-R1, Qwen3, QwQ; Granite; Magistral; Seed-OSS; Sky-T1; Cohere; gpt-oss; MedGemma."""
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


def opened(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a block that its template opened."""
    return any(prompt.rstrip().endswith(opening) for opening, _ in MARKERS)


def length(answer: str, begun: bool = False) -> int:
    """Characters up to where the last block of thoughts ends: 0 of an answer without one, all of it where a block is not closed."""
    spoken = split(answer, begun)
    if not spoken.finished:
        return len(answer)
    return max((at + len(closing) for _, closing in MARKERS if (at := answer.rfind(closing)) >= 0), default=0)
