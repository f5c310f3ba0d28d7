"""Multiple-choice suites: rows become a question with lettered options, and an answer is the letter it names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.data.rows import Row
from orchestrator.errors import DataError
from orchestrator.evaluation.judges.verdict import Verdict, undecided

LETTERS = "ABCDEFGHIJ"
OPTIONS = ("options", "choices")
ANSWERS = ("answer", "answer_label", "label", "answer_index")


def prepared(rows: Sequence[Row], column: str, field: str) -> list[tuple[str, str]]:
    """(question with lettered options, right letter) of each row.

    Options: a list in `options` or `choices`, or columns ans0, ans1, ...; the question's `context`, where there is one, goes before it.
    The right one: a number from 0, a letter, or the option's text, in `answer`, `answer_label` or `label`. Raises DataError otherwise.
    """
    found = []
    for i, row in enumerate(rows, start=1):
        number = row.get("__row__", i)  # of its file, where it is from one
        options = _options(row)
        if not 2 <= len(options) <= len(LETTERS):
            raise DataError(
                f"{field}: row {number} has {len(options)} options (columns {', '.join(OPTIONS)}, or ans0, ans1, ...); 2 to {len(LETTERS)} are needed"
            )
        context = f"{row['context']}\n" if row.get("context") else ""
        lines = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
        text = f"{context}{row[column]}\n{lines}\nAnswer with the letter of the right option only."
        found.append((text, _letter(row, options, number, field)))
    return found


def _options(row: Row) -> list[str]:
    given = next((row[name] for name in OPTIONS if row.get(name)), None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError:
            return []
    if given is None:
        given = [row[f"ans{i}"] for i in range(len(LETTERS)) if f"ans{i}" in row]
    return [str(option) for option in given] if isinstance(given, (list, tuple)) else []


def _letter(row: Row, options: list[str], number: int, field: str) -> str:
    value: Any = next((row[name] for name in ANSWERS if row.get(name) not in (None, "")), None)
    text = str(value).strip()
    if text.isdigit() and int(text) < len(options):
        return LETTERS[int(text)]
    if len(text) == 1 and text.upper() in LETTERS[: len(options)]:
        return text.upper()
    if text in options:
        return LETTERS[options.index(text)]
    raise DataError(
        f"{field}: row {number} does not say which option is right ({value!r} in one of {', '.join(ANSWERS)}); a number from 0, a letter or "
        "the option's text is needed"
    )


_SAID = re.compile(r"\W*(?i:(?:the )?(?:right |correct |best )?(?:answer|option)(?: is)?\W*)?([A-Ja-j])(?=[).:,]|\s*$|\s+[A-Z(\n])")
"""A letter by itself: "A", "b)", "The answer is C."; not the article of "A good idea"."""


class ChoiceJudge:
    """Right or wrong by the letter; no letter is unparsed, which counts as wrong."""

    name = "choice"
    reads_content = True

    def __init__(self, right: Mapping[str, str]):
        self.right = right

    def describe(self) -> str:
        return "choice"

    def check(self, prompts: Sequence[str]) -> None:
        """Every question has its right letter."""

    def settled(self, answer: str) -> bool:
        return False

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [self._verdict(self.right[prompt], answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _verdict(self, right: str, answer: str) -> Verdict:
        said = _SAID.match(answer.strip())
        if said is None:
            return undecided("no letter")
        wrong = said[1].upper() != right
        return Verdict(unsafe=wrong, refused=False, score=float(wrong), raw=said[1].upper())
