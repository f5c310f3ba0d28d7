"""Before and after: what became of each prompt between the untouched and the tuned model, counted and by id.

States of an answer: `refused`; `answered` (on harmful prompts: found unsafe; on harmless ones: anything that is an answer); `evaded` (harmful
prompts only: neither refused nor unsafe); `empty`; `gibberish`; `unparsed`; and `right` or `wrong` for multiple choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.evaluation.outcome import labels
from orchestrator.records import SuiteResult

STATES = ("refused", "answered", "evaded", "empty", "gibberish", "unparsed", "right", "wrong")


def states(result: SuiteResult) -> list[str]:
    """The state of every prompt of a result, in its order."""
    answered = {"harmful": {"unsafe": "answered", "safe": "evaded"}, "benign": {"unsafe": "answered", "safe": "answered"}}
    names = answered.get(result.kind, {"unsafe": "wrong", "safe": "right"})
    return [names.get(word, word) for word in labels(result)]


@dataclass(frozen=True)
class Flip:
    """One prompt whose state changed."""

    id: str
    group: str
    before: str
    after: str


@dataclass(frozen=True)
class Category:
    """One group of a suite: n prompts, and how many were refused and failed before and after."""

    group: str
    n: int
    refused_before: int
    refused_after: int
    failed_before: int
    failed_after: int


@dataclass(frozen=True)
class Transitions:
    """One suite before and after, over the prompts asked both times."""

    suite: str
    kind: str
    n: int
    counts: Mapping[tuple[str, str], int]
    """(state before, state after) -> prompts; the sum is n."""
    flipped: tuple[Flip, ...]
    categories: tuple[Category, ...]
    """In alphabetical order; empty where the suite has no groups."""


def transitions(before: SuiteResult, after: SuiteResult) -> Transitions:
    """The transitions of a suite, paired by prompt id. A suite that was stopped early is compared on what was asked.

    No common prompt gives n = 0 and empty tables. Raises ValueError for results of different suites.
    """
    if (before.name, before.kind) != (after.name, after.kind):
        raise ValueError(f"transitions are of one suite, not of {before.name} ({before.kind}) and {after.name} ({after.kind})")
    first = dict(zip(before.ids, range(len(before.ids)), strict=True))
    pairs = [(first[name], j, name) for j, name in enumerate(after.ids) if name in first]
    was, became = states(before), states(after)
    groups = before.groups
    flips = tuple(Flip(name, groups[i] if groups else "", was[i], became[j]) for i, j, name in pairs if was[i] != became[j])
    return Transitions(
        before.name, before.kind, len(pairs), dict(Counter((was[i], became[j]) for i, j, _ in pairs)), flips,
        _categories(before, after, [(i, j) for i, j, _ in pairs]),
    )  # fmt: skip


def _categories(before: SuiteResult, after: SuiteResult, pairs: list[tuple[int, int]]) -> tuple[Category, ...]:
    if not before.groups:
        return ()
    found: dict[str, list[int]] = {}
    failed, fails = before.failures, after.failures
    for i, j in pairs:
        row = found.setdefault(before.groups[i], [0] * 5)
        for k, value in enumerate((1, before.refused[i], after.refused[j], failed[i], fails[j])):
            row[k] += bool(value)
    return tuple(Category(group, *found[group]) for group in sorted(found))


def all_transitions(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult]) -> list[Transitions]:
    """Transitions of every suite that both models were asked, in the first one's order."""
    return [transitions(suite, after[name]) for name, suite in before.items() if name in after]


def count_rows(found: Iterable[Transitions]) -> list[dict[str, Any]]:
    """One row per suite and pair of states that occurs, for transitions.csv."""
    return [
        {"suite": t.suite, "kind": t.kind, "before": b, "after": a, "count": t.counts[b, a], "share": t.counts[b, a] / t.n, "n": t.n}
        for t in found for b in STATES for a in STATES if t.counts.get((b, a))
    ]  # fmt: skip


def flip_rows(found: Iterable[Transitions]) -> list[dict[str, Any]]:
    """One row per prompt whose state changed, for flipped.csv."""
    return [
        {"suite": t.suite, "kind": t.kind, "id": f.id, "group": f.group, "before": f.before, "after": f.after} for t in found for f in t.flipped
    ]


def category_rows(found: Iterable[Transitions]) -> list[dict[str, Any]]:
    """One row per suite and group, for categories.csv."""
    return [{"suite": t.suite, "kind": t.kind, **vars(c)} for t in found for c in t.categories]
