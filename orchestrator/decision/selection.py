"""Trials of one configuration together, finalists, and the selector of "best"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.decision.limits import MISSING, Judgement, Verdict
from orchestrator.records import TrialResult


@dataclass(frozen=True)
class Configuration:
    """The trials of one recipe with the same settings, one per seed: the one whose suites were asked in full, where there is one."""

    recipe: str
    params: dict[str, Any]
    trials: tuple[tuple[TrialResult, Judgement], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Each once, in order of appearance."""
        return tuple(dict.fromkeys(result.seed for result, _ in self.trials))

    @property
    def confirmed(self) -> bool:
        """Whether it was trained on a further seed after the search; a second seed within the search is one more look of the search's."""
        return any(result.phase == "confirm" and result.seed != self.trials[0][0].seed for result, _ in self.trials)

    @property
    def screened(self) -> bool:
        """Whether a trial of it was stopped early and not asked in full since."""
        return any(judgement.screened for _, judgement in self.trials)

    @property
    def handed_over(self) -> tuple[TrialResult, Judgement]:
        """The trial whose model is handed over: where rows or prompts were held out of the search, the first that was asked them, a training
        that no choice was made by; else that of the first seed."""
        waited = (row for row in self.trials if row[0].phase == "confirm" and asked_what_waited(row[0]))
        return next(waited, self.trials[0])

    @property
    def shown(self) -> TrialResult:
        """The handed-over trial; with the suites that only later confirmations were asked, whose `source` names their trial."""
        first = self.handed_over[0]
        later = [(r.trial_id, suite) for r, _ in reversed(self.trials) for suite in r.suites.values() if suite.name not in first.suites]
        held = {suite.name: replace(suite, source={**suite.source, "trial": trial}) for trial, suite in later}
        return replace(first, suites={**first.suites, **held}) if held else first

    @property
    def promising(self) -> bool:
        """Feasible as far as it was asked, on every seed."""
        return all(judgement.verdict == "feasible" for _, judgement in self.trials)

    @property
    def holds(self) -> bool:
        """Feasible on every seed on what the search asks, in full; what was held out of it is not looked at."""
        return all(judgement.holds for _, judgement in self.trials) and not self.screened

    @property
    def verdict(self) -> Verdict:
        """Feasible only where every seed is, on full suites."""
        if any(judgement.verdict == "infeasible" for _, judgement in self.trials):
            return "infeasible"
        return "feasible" if self.promising and not self.screened else "undecided"

    @property
    def score(self) -> float:
        """Mean task score over seeds; a seed without a score counts as 0."""
        return sum(judgement.task_score or 0.0 for _, judgement in self.trials) / len(self.trials)

    @property
    def excess(self) -> float:
        """How far the worst constraint of the worst seed is over its limit (interval end); <= 0 where all are kept."""
        return max((c.value for _, judgement in self.trials for c in judgement.constraints), default=MISSING)


@dataclass(frozen=True)
class Selection:
    """The outcome: a best configuration, or none and the nearest miss."""

    best: Configuration | None
    nearest_miss: Configuration | None
    configurations: tuple[Configuration, ...]

    @property
    def best_trial(self) -> TrialResult | None:
        """The trial whose model is handed over (`Configuration.handed_over`)."""
        return self.best.handed_over[0] if self.best else None

    @property
    def measured(self) -> bool:
        """Whether anything is known of any trial's safety: a suite was asked, or a limit had a figure to be held against."""
        trials = [row for found in self.configurations for row in found.trials]
        return any(any(s.ids for s in r.suites.values()) or any(c.estimate.n for c in j.constraints) for r, j in trials)

    @property
    def outcome(self) -> str:
        """`feasible`, `nothing feasible`, or `nothing measured` where no trial got as far as a verdict."""
        return "feasible" if self.best else "nothing feasible" if self.measured else "nothing measured"


def asked_what_waited(result: TrialResult) -> bool:
    """Whether a trial was asked rows or prompts that the search never asks."""
    return result.confirmation is not None or any(s.phase == "confirm" and s.constrains for s in result.suites.values())


def control(trials: Sequence[tuple[TrialResult, Judgement]], plain: Sequence[str]) -> Configuration | None:
    """The plain fine-tuning to compare with: of the recipes in `plain` the configuration of the highest score, whatever its safety; None
    where none was scored."""
    found = [c for c in configurations(trials) if c.recipe in plain and all(j.task_score is not None for _, j in c.trials)]
    return min(found, key=lambda c: (-c.score, c.excess), default=None)


def configurations(trials: Sequence[tuple[TrialResult, Judgement]]) -> tuple[Configuration, ...]:
    """Trials grouped by recipe and settings, in order of appearance; the baseline is left out."""
    groups: dict[str, list[tuple[TrialResult, Judgement]]] = {}
    for result, judgement in trials:
        if result.phase != "baseline":
            _add(groups.setdefault(repr((result.recipe, sorted(result.params.items()))), []), result, judgement)
    return tuple(Configuration(rows[0][0].recipe, rows[0][0].params, tuple(rows)) for rows in groups.values())


def _add(rows: list[tuple[TrialResult, Judgement]], result: TrialResult, judgement: Judgement) -> None:
    """Put a trial among those of its configuration, one for each seed: of two, one that did not fail, then one asked in full, then the
    one with the worse verdict. A seed never counts twice."""
    for i, (known, judged) in enumerate(rows):
        if known.seed == result.seed:
            if _rank(result, judgement) < _rank(known, judged):
                rows[i] = (result, judgement)
            return
    rows.append((result, judgement))


def _rank(result: TrialResult, judgement: Judgement) -> tuple[bool, bool, int]:
    return result.state == "failed", judgement.screened, ("infeasible", "undecided", "feasible").index(judgement.verdict)


def finalists(trials: Sequence[tuple[TrialResult, Judgement]], count: int, *, more_seeds: bool = True) -> tuple[Configuration, ...]:
    """The `count` best configurations, by score, that are feasible as far as they were asked and wait for their confirmation.

    With `more_seeds` those that were not trained on a further seed since wait, without it
    those that were stopped early and could do better than the best so far.
    """
    waiting = [c for c in configurations(trials) if c.promising and (c.screened or more_seeds and not c.confirmed)]
    leader = None if more_seeds else best(trials).best
    waiting = [c for c in waiting if leader is None or c.score > leader.score]
    return tuple(sorted(waiting, key=lambda c: (-c.score, c.excess))[:count])


def best(trials: Sequence[tuple[TrialResult, Judgement]]) -> Selection:
    """Highest mean score among feasible configurations; where some were tried on further seeds, only those may win.

    The score is that on the rows of the search. Rows held out of it have no say; prompts held out of it may refuse a configuration (at a
    level that counts how many may be looked at, `limits.judge`), and prefer none. Ties go to the configuration further inside its limits.
    """
    found = configurations(trials)
    confirmed = [c for c in found if c.confirmed] or [c for c in found if len(c.seeds) > 1]
    candidates = [c for c in (confirmed or found) if c.verdict == "feasible"]
    winner = min(candidates, key=lambda c: (-c.score, c.excess), default=None)
    misses = [c for c in found if c.verdict != "feasible" and any(r.suites for r, _ in c.trials)]
    miss = min(misses, key=lambda c: (c.excess, -c.score), default=None)
    return Selection(winner, miss, found)
