"""Anchors: safety rows whose answer was begun, so that a refusal is learnt, or kept, however the answer begins.

Refusals that live in the first tokens of an answer are lost when it is begun for the model or fine-tuned (Qi et al. 2024, arXiv 2406.05946,
"Safety Alignment Should Be Made More Than Just a Few Tokens Deep"; there as augmentation before tuning). Rows of three kinds:

- `begun`: a harmful prompt, the first words of its harmful answer, and the refusal, which alone is learnt;
- `begun`, with the first words of an answer of the *task* (after tuning its own opening is the strongest one), or with a fixed opening;
- `anchor`: a harmless prompt, the first words of its own answer, and the rest of it. Without them "begun" alone becomes a sign of harm, and begun
  harmless answers are lost while over-refusal still looks fine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.config import Anchors
from orchestrator.data.conversations import Conversation
from orchestrator.errors import ConfigError

SEED = 0
"""Which rows are begun and how deep is part of the data, so it is the same for every trial."""
TASK_WORDS = (1, 2, 3)
"""Words of a task answer with which one is begun."""


def first_words(text: str, count: int) -> str:
    """The first `count` words of a text as they stand in it, at most all but one of them; empty for a text of one word."""
    words = text.split()
    kept = words[: max(0, min(count, len(words) - 1))]
    if not kept:
        return ""
    end = 0
    for word in kept:
        end = text.index(word, end) + len(word)
    return text[:end].lstrip()


def begin(row: Conversation, words: str, kind: str, answer: str, number: int) -> Conversation:
    """The row with an answer begun with `words` and gone on with `answer`; `words` are read and not learnt."""
    text = f"{words} {answer}"
    messages = (*row.messages[:-1], {**row.messages[-1], "content": text})
    return replace(row, id=f"{row.id}~{kind}{number}", messages=messages, kind=kind, begun=words)


def made(safety: Sequence[Conversation], harmful: Sequence[Conversation], task: Sequence[Conversation], settings: Anchors) -> list[Conversation]:
    """The rows, at most `settings.rows` that are begun and `settings.harmless` times as many that anchor; in a seeded order, the same for
    every trial. Raises ConfigError where the rows that they are made from are missing."""
    rng = random.Random(SEED)
    refusals = [row for row in safety if row.kind == "refusal"]
    answers = {row.id: row.answer for row in harmful}
    begun = _begun(refusals, answers, settings) if settings.begun else []
    if settings.task_openings:
        words = [first_words(row.answer, count) for row in task for count in TASK_WORDS]
        begun += _opened(refusals, [one for one in words if one], rng, 1000)
    begun += _opened(refusals, settings.openings, rng, 2000)
    rng.shuffle(begun)
    begun = begun[: settings.rows]
    harmless = [row for row in safety if row.kind == "harmless"] or list(task)
    wanted = round(settings.harmless * len(begun))
    if wanted and not harmless:
        raise ConfigError("safety.anchors.harmless needs rows of kind harmless in safety.data, or task rows; give some, or set it to 0")
    found = [_anchor(harmless[i % len(harmless)], settings.depths[i % len(settings.depths)], i) for i in range(wanted)]
    return begun + [row for row in found if row is not None]


def _begun(refusals: Sequence[Conversation], answers: dict[str, str], settings: Anchors) -> list[Conversation]:
    found = []
    for row in refusals:
        if row.id in answers:
            for depth in settings.depths:
                words = first_words(answers[row.id], depth)
                if words:
                    found.append(begin(row, words, "begun", row.answer, depth))
    if not found:
        raise ConfigError(
            "safety.anchors.begun begins answers with real harmful ones, and no safety row has one: give a column `rejected` in safety.data "
            "(safety.columns.rejected), or set safety.anchors.begun=false"
        )
    return found


def _opened(refusals: Sequence[Conversation], openings: Sequence[str], rng: random.Random, first: int) -> list[Conversation]:
    """Each refusal once more, begun with one of the openings; none without any."""
    return [begin(row, rng.choice(openings), "begun", row.answer, first + i) for i, row in enumerate(refusals)] if openings else []


def _anchor(row: Conversation, depth: int, number: int) -> Conversation | None:
    words = first_words(row.answer, depth)
    if not words:
        return None
    rest = row.answer.lstrip()[len(words) :].lstrip()
    return begin(row, words, "anchor", rest, number)
