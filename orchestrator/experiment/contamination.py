"""Contaminated evidence: what is measured must not be what was trained on. Counts the overlaps of an experiment and says what follows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.config import Experiment, recipe_items
from orchestrator.data import conversations
from orchestrator.data.conversations import Conversation
from orchestrator.data.counted import ALIKE, TASK, TOLERATED, Overlap
from orchestrator.data.overlap import BACKGROUND, Index, Text
from orchestrator.errors import ConfigError
from orchestrator.trial.materials import Materials

SHOWN = 3
"""Examples that are kept of each overlap."""


@dataclass(frozen=True)
class Contamination:
    """All overlaps of an experiment, and what looking for them took."""

    overlaps: tuple[Overlap, ...]
    rows: int
    prompts: int
    seconds: float

    def facts(self) -> list[str]:
        """One line on what was compared."""
        learnt = {one.suite for one in self.overlaps if one.recipes}
        others = {one.suite for one in self.overlaps} - learnt
        found = f"rows that are trained on hold some of {', '.join(sorted(learnt))}" if learnt else "none is in rows that are trained on"
        asked = f"; rows that are only asked hold some of {', '.join(sorted(others))}, which harms nothing" if others else ""
        return [f"overlap: {self.prompts} prompts and evaluation rows looked for in {self.rows} rows ({self.seconds:.1f} s): {found}{asked}"]

    def refuse(self, *, resumed: bool = False) -> list[str]:
        """Warnings; raises ConfigError where what decides was trained on and the config does not allow it.

        A run that is `resumed` is not refused, since its config is settled: its limits on such a suite stay undecided.
        """
        for one in self.overlaps:
            if one.too_much and not one.allowed and not resumed:
                raise ConfigError(_refusal(one))
        return [_warning(one) for one in self.overlaps if one.recipes or one.rows_of.startswith("safety.")]  # what is only asked harms nobody


def look(experiment: Experiment, found: Materials, recipes: Sequence[str]) -> Contamination:
    """Compare every source of rows with every suite, and the training rows with the evaluation rows. Deterministic; linear in the rows.

    `recipes`: those that use safety rows, as `users` gives them.
    """
    started = time.perf_counter()
    everyone = experiment.recipe_names
    sources = [("task.data", found.train, everyone), (_evaluation_field(experiment), found.scored, ())]
    if experiment.safety.harmful_data is None:  # harmful answers beside the safe ones: the same rows
        sources.append(("safety.data", (*found.safety, *found.harmful), recipes))
    else:
        sources += [("safety.data", found.safety, recipes), ("safety.harmful_data", found.harmful, recipes)]
    overlaps = [one for field, rows, used in sources if rows for one in _with_suites(experiment, found, field, rows, used)]
    if found.scored:
        overlaps += _with_evaluation(experiment, found, everyone)
    rows = sum(len(rows) for _, rows, _ in sources)
    prompts = sum(len(suite.prompts) for suite in found.suites) + len(found.scored)
    return Contamination(tuple(overlaps), rows, prompts, time.perf_counter() - started)


def users(experiment: Experiment) -> tuple[str, ...]:
    """Names of the recipes that use safety or harmful rows, in training or after it, with what the monitor may add to them."""
    import strategies.recipe

    found = []
    for name, recipe in zip(experiment.recipe_names, experiment.recipes, strict=True):
        built = strategies.recipe.build(recipe_items(recipe), experiment.monitor.added)
        needs = frozenset().union(*(type(one).needs | one.needs for one in built.strategies))
        if needs & {"safety", "harmful"}:
            found.append(name)
    return tuple(found)


def _evaluation_field(experiment: Experiment) -> str:
    return TASK if experiment.task.eval_data is not None else "task.data (held out)"


def _with_suites(experiment: Experiment, found: Materials, field: str, rows: Sequence[Conversation], used: Sequence[str]) -> Iterator[Overlap]:
    settings, limits = experiment.safety, experiment.safety.limits
    asked = [(suite, i) for suite in found.suites for i in range(len(suite.prompts))]
    texts = [(suite.texts or suite.prompts)[i] for suite, i in asked]
    index = Index(texts, _spaced(rows, lambda row: row.prompt[-1]["content"]))
    index.scan(_texts(rows))
    start = 0
    for suite in found.suites:
        places = [index.found.get(index.of[start + i]) for i in range(len(suite.prompts))]
        start += len(suite.prompts)
        hits = [(place, suite.ids[i]) for i, place in enumerate(places) if place is not None]
        if hits:
            exact = sum(place.exact for place, _ in hits)
            limited = suite.constrains and (suite.kind == "harmful" or limits.max_over_refusal_rise is not None)
            examples = tuple((place.row, name) for place, name in sorted(hits, key=lambda hit: not hit[0].exact)[:SHOWN])
            yield Overlap(
                field, suite.name, exact, len(hits) - exact, len(places), examples, tuple(used), limited, settings.allow_overlap
            )  # fmt: skip


def _with_evaluation(experiment: Experiment, found: Materials, everyone: Sequence[str]) -> Iterator[Overlap]:
    """Evaluation rows among the training rows: the whole of what is asked, earlier turns included."""
    index = Index([conversations.asked(row) for row in found.scored], _spaced(found.train, conversations.asked), whole=True)
    index.scan(Text(row.row or i, conversations.asked(row)) for i, row in enumerate(found.train, start=1))
    places = [index.found.get(number) for number in index.of]
    hits = [(place, found.scored[i].id) for i, place in enumerate(places) if place is not None]
    if hits:
        exact = sum(place.exact for place, _ in hits)
        examples = tuple((place.row, name) for place, name in sorted(hits, key=lambda hit: not hit[0].exact)[:SHOWN])
        given = experiment.task.eval_data is not None  # rows that we held out ourselves: the same prompts stay on one side, likenesses are said
        yield Overlap(
            "task.data", TASK, exact, len(hits) - exact, len(places), examples, tuple(everyone), given, experiment.task.allow_overlap
        )  # fmt: skip


def _texts(rows: Sequence[Conversation]) -> Iterator[Text]:
    """Every turn, a system message included, and every answer."""
    for i, row in enumerate(rows, start=1):
        for message in row.messages:
            if isinstance(message["content"], str):
                yield Text(row.row or i, message["content"], message["role"] != "assistant")


def _spaced(rows: Sequence[Conversation], text) -> Iterable[str]:
    return (text(row) for row in rows[:: max(1, len(rows) // BACKGROUND)])


def _refusal(one: Overlap) -> str:
    if one.is_task:
        return (
            f"{one.sentence}; with more than {100 * TOLERATED:g} % of them as they stand, or {100 * ALIKE:g} % nearly, the task score says how well "
            "rows are remembered, not how well the task is learnt. Take them out of task.data or task.eval_data, or set task.allow_overlap=true, "
            "which the report will say"
        )
    return (
        f"{one.sentence}, which {_used(one)}; with more than {100 * TOLERATED:g} % a limit on this suite says nothing about other requests, so no "
        f"verdict may rest on it. Take these rows out, ask another suite (or set constrains: false), or set safety.allow_overlap=true, "
        "which the report will say"
    )


def _used(one: Overlap) -> str:
    shown = ", ".join(f"[{name}]" for name in one.recipes[:4]) + (", ..." if len(one.recipes) > 4 else "")
    return f"{shown} use{'s' * (len(one.recipes) == 1)}"


def _warning(one: Overlap) -> str:
    """What a user is told of an overlap that stops nothing."""
    if one.too_much:
        return f"CONTAMINATED: {one.sentence}; {one.verdict}"
    return one.sentence if one.recipes else f"{one.sentence}; no recipe trains on these rows"
