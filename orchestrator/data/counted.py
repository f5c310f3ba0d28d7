"""What the checks count of rows and prompts, as records that a run keeps: overlaps, and rows that fit
`task.max_length`. Numbers and ids, no texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TOLERATED = 0.01
"""Share of a suite's prompts that may occur among rows trained on."""
TASK = "task.eval_data"
ALIKE = 0.35
"""Share of evaluation rows that may be training rows nearly or as they stand. Rows of one task are alike by nature: of SQL questions with their
tables every fifth is, of arithmetic hardly any (docs/evaluation.md); above a third it is the same rows in another dress."""
KEPT = 0.95
"""Share of rows that the advised `task.max_length` keeps whole."""


@dataclass(frozen=True)
class Overlap:
    """Prompts of a suite, or evaluation rows, that occur among rows. Holds numbers and ids, never a text."""

    rows_of: str
    """The config key whose rows these are, e.g. `safety.data`."""
    suite: str
    """Name of the suite; `task.eval_data` for evaluation rows."""
    exact: int
    """Prompts that are a row's prompt as it stands (case, spacing and punctuation aside)."""
    near: int
    """Further ones that occur nearly so, or inside a longer text."""
    of: int
    """Prompts of the suite."""
    examples: tuple[tuple[int, str], ...]
    """(row counted from 1, prompt id) of some."""
    recipes: tuple[str, ...] = ()
    """Recipes that use these rows; empty where none does."""
    limited: bool = False
    """Whether a limit, or the task score, rests on these prompts."""
    allowed: bool = False
    """Whether the config says that it may be so (`safety.allow_overlap`, `task.allow_overlap`)."""

    @property
    def share(self) -> float:
        """Share of the prompts, 0..1."""
        return (self.exact + self.near) / self.of

    @property
    def is_task(self) -> bool:
        """Whether it is about evaluation rows of the task."""
        return self.suite == TASK

    @property
    def too_much(self) -> bool:
        """More than `TOLERATED` of what is measured was trained on; of evaluation rows as they stand, or more than `ALIKE` of them nearly."""
        over = (self.exact / self.of > TOLERATED or self.share > ALIKE) if self.is_task else self.share > TOLERATED
        return self.limited and bool(self.recipes) and over

    @property
    def decides_nothing(self) -> bool:
        """Whether no limit on this suite can be called kept."""
        return self.too_much and not self.allowed and not self.is_task

    @property
    def sentence(self) -> str:
        """What there is, with numbers, in a clause."""
        what = f"of the {self.of} evaluation rows" if self.is_task else f"of the {self.of} prompts of the suite {self.suite}"
        shown = ", ".join(f"row {row}" if self.is_task else f"row {row}, prompt id {name}" for row, name in self.examples)
        return (
            f"{self.exact + self.near} {what} ({100 * self.share:.1f} %) occur in {self.rows_of} ({self.exact} as they stand, {self.near} nearly or "
            f"inside a longer text; e.g. {shown})"
        )

    @property
    def verdict(self) -> str:
        """What follows from it for the outcome, in a clause; empty where nothing does."""
        if not self.too_much:
            return ""
        if self.is_task:
            return f"the task score is that of rows it was trained on{', as task.allow_overlap allows' if self.allowed else ''}"
        if self.allowed:
            return f"safety.allow_overlap lets a verdict rest on {self.suite} all the same: it says nothing about requests that were not trained on"
        return f"limits on {self.suite} stay undecided"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def alerts(facts: Mapping[str, Any]) -> list[str]:
    """What is said wherever an outcome is told: each overlap that is too much, and what follows."""
    return [f"CONTAMINATED: {one.sentence}; {one.verdict}" for one in of_facts(facts) if one.too_much]


def of_facts(facts: Mapping[str, Any]) -> tuple[Overlap, ...]:
    """The overlaps that a record's facts hold, as written by `to_dict`; none in records of before they were counted."""
    found = []
    for raw in facts.get("overlaps") or ():
        examples = tuple((int(row), str(name)) for row, name in raw["examples"])
        found.append(Overlap(**{**raw, "examples": examples, "recipes": tuple(raw["recipes"])}))
    return tuple(found)


@dataclass(frozen=True)
class Fit:
    """How many rows of a source are learnt whole."""

    field: str
    what: str
    """In words, e.g. `training rows`."""
    rows: int
    looked: int
    """Rows that were tokenised; the other figures are of these."""
    cut: int
    """Rows that lose the end of their answer only."""
    dropped: int
    """Rows that lose the whole answer: they are not trained on."""
    max_length: int
    needed: int
    """Tokens that keep 95 % of the rows whole."""

    @property
    def sampled(self) -> bool:
        return self.looked < self.rows

    @property
    def about(self) -> int:
        """Rows that are learnt, whole or in part; estimated where rows were sampled."""
        return self.rows - math.ceil(self.dropped * self.rows / self.looked)

    @property
    def sentence(self) -> str:
        """`12 of 60 training rows fit task.max_length=32 (48 dropped: their prompt leaves no room for an answer)`."""
        told = [f"{self.dropped} dropped: their prompt leaves no room for an answer"] if self.dropped else []
        told += [f"{self.cut} lose the end of their answer"] if self.cut else []
        told += [f"{self.looked} looked at"] if self.sampled else []
        about = "about " if self.sampled and told[:-1] else ""
        return f"{about}{self.about} of {self.rows} {self.what} fit task.max_length={self.max_length}" + (f" ({'; '.join(told)})" if told else "")

    def amended(self, line: str) -> str:
        """A sentence that counts these rows as read, counting them as learnt; unchanged where all are learnt whole, or it is about others."""
        begun = {"training rows": "task: ", "safety rows": "safety data: "}.get(self.what)
        if begun is None or not line.startswith(begun) or not (self.cut or self.dropped):
            return line
        own = f"{self.rows} {'rows' if self.what == 'safety rows' else self.what}"
        return line.replace(own, self.sentence, 1)

    @property
    def advice(self) -> str:
        return f"task.max_length={self.needed} keeps {KEPT:.0%} of them whole"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fits_of(facts: Mapping[str, Any]) -> tuple[Fit, ...]:
    """The counts that a record's facts hold; none in records of before they were kept."""
    return tuple(Fit(**raw) for raw in facts.get("fits") or ())


def lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, sentence) of everything counted, for a report."""
    found = [("rows learnt", one.sentence) for one in fits_of(facts)]
    overlaps = [("overlap", one.sentence) for one in of_facts(facts)]
    if not overlaps and facts.get("overlaps") is not None:
        overlaps = [("overlap", "no prompt of a suite, and no evaluation row, occurs among the rows")]
    return found + overlaps


def metrics(facts: Mapping[str, Any]) -> dict[str, float]:
    """The counts as numbers by name: `data/overlap/<suite>/<rows>`, the share of its prompts; `data/<rows>/dropped`, `.../cut`, `.../rows`."""
    found = {f"data/overlap/{one.suite}/{one.rows_of}": one.share for one in of_facts(facts)}
    for fit in fits_of(facts):
        name = fit.what.replace(" ", "_")
        found |= {f"data/{name}/rows": float(fit.rows), f"data/{name}/looked_at": float(fit.looked)}
        found |= {f"data/{name}/dropped": float(fit.dropped), f"data/{name}/cut": float(fit.cut)}
    return found


def tags(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a tracking server is told in words."""
    found = {"overlap": "; ".join(one.sentence for one in of_facts(facts)), "contaminated": "; ".join(alerts(facts))}
    lost = [fit.sentence for fit in fits_of(facts) if fit.cut or fit.dropped]
    return {name: text for name, text in (*found.items(), ("rows_learnt", "; ".join(lost))) if text}
