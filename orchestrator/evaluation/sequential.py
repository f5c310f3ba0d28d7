"""Sequential verdicts: ask a suite in random order and stop as soon as it is known whether the limit is kept.

**What is decided.** The suite's own degradation D = mean of x over its N prompts, x = tuned failure - untouched failure in {-1, 0, +1}. The
suite is finite, its prompts are drawn without replacement, and the only randomness used is the order of asking, which is ours: no
assumption about prompts is made, also not that they are independent. When every prompt was asked D is known exactly.
The verdict of a *full* suite (`orchestrator.decision.limits`) says more: it takes the requests for a sample of all such requests
and may stay undecided where D itself is known. So a suite that is asked to its end is judged there, and one that was stopped early is a
screening: its `infeasible` stands (D over the limit is never feasible there either), its `feasible` must be confirmed on the full suite.

**How.** Two bettors, one against "D <= limit" and one against "D > limit" (`betting`); whose capital reaches 1/alpha has refuted
that claim, however often one looks.

**Groups.** Whole requests in random order, where several prompts ask one (`request_column`), all in as many prompts;
a draw is a group's sum of x, bounded by its size. A rise over the limit needs a certain
number of groups that got worse at all, so a bettor also plays on how many did (`TOUCHED`); where changes fill whole groups that is sharper.
With few groups little can be decided early: a rise of 0.05 fits into 2.5 of 50 topics and whoever has not asked most of them cannot exclude
it (`floor`, for any method; `least_share`, for this one).

**What is asked first.** Where few prompts failed before (`CENSUS`) those are asked first, all of them: only they can get better, so
their sum, which would otherwise hide as much rise elsewhere, is then known, and the random order begins after them. Looks are laid where
`feasible` could next be known (`batch`).

The level is that of `safety.limits.confidence`, two-sided as everywhere: each wrong verdict has probability at most (1 - confidence) / 2.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.decision.sequential import LEAST_SAVED, SequentialTest, least_share
from orchestrator.errors import DataError
from orchestrator.records import Screening, SuiteResult, TrialResult

if TYPE_CHECKING:
    from orchestrator.evaluation.suites import PromptSuite


def untouched(experiment: Experiment, baseline: TrialResult) -> dict[str, str]:
    """What a trial must know of the untouched model to be asked in sequence (`TrialSpec.untouched`); empty where that is switched off."""
    if not experiment.safety.sequential.enabled:
        return {}
    found = {name: suite for name, suite in baseline.suites.items() if suite.constrains and _limit(experiment, suite.kind) is not None}
    return {name: "".join("01"[failed] for failed in suite.certain) for name, suite in found.items()}


def _limit(experiment: Experiment, kind: str) -> float | None:
    """The limit that a suite of this kind is held to, None for none."""
    limits = experiment.safety.limits
    return {"harmful": limits.max_degradation, "benign": limits.max_over_refusal_rise}.get(kind)


def tests_of(experiment: Experiment, suites: Iterable[PromptSuite], failures: Mapping[str, str], seed: str) -> dict[str, SequentialTest]:
    """A sequential test for each suite that `failures` (as from `untouched`) names.

    `seed` is to differ between trials: a search that met one order again and again would learn to be good at its beginning, and the
    order must know nothing of the model. Raises DataError where a suite has other prompts than the untouched model was asked.
    """
    found = {}
    for suite in suites:
        if suite.name not in failures:
            continue
        if len(failures[suite.name]) != len(suite.prompts):
            raise DataError(
                f"safety.suites.{suite.name}: the untouched model was asked {len(failures[suite.name])} prompts and there are "
                f"{len(suite.prompts)} now; the data changed during the run, so start it again"
            )
        if not _alike(suite):
            continue
        found[suite.name] = SequentialTest(
            [bit == "1" for bit in failures[suite.name]],
            _drawn(experiment, suite),
            limit=_limit(experiment, suite.kind), confidence=experiment.safety.limits.confidence, seed=f"{seed} {suite.name}",
        )  # fmt: skip
    return found


def _alike(suite: PromptSuite) -> bool:
    """Whether every request is asked in as many prompts as the others. Else the rise per prompt, which is what is decided here, is not the rise per
    request that the verdict is about, and the suite is asked in full."""
    return suite.requests is None or len(set(Counter(suite.units).values())) == 1


def _drawn(experiment: Experiment, suite: PromptSuite) -> tuple[str, ...] | None:
    """The units that are drawn as a whole; None for single prompts."""
    return suite.units if suite.requests is not None and experiment.safety.sequential.by == "request" else None


def ask(
    suite: PromptSuite, test: SequentialTest, least: int, part: Callable[[PromptSuite], tuple[SuiteResult, list[dict[str, Any]]]]
) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Ask `suite` part by part until `test` is done: (result of the prompts asked, in the suite's order, with its screening; their rows).

    `part` asks a suite in full; about `least` prompts go between two looks. With several workers all of them take the same decisions.
    """
    asked: list[int] = []
    results, rows = [], []
    while not test.done:
        indices = sorted(test.upcoming(test.batch(least)))
        result, texts = part(suite.subset(indices))
        test.add(dict(zip(indices, result.failures, strict=True)))
        asked += indices
        results.append(result)
        rows += texts
    order = sorted(range(len(asked)), key=asked.__getitem__)
    return _joined(results, order, test.record()), [rows[i] for i in order] if rows else []


def _joined(parts: list[SuiteResult], order: list[int], screening: Screening) -> SuiteResult:
    """One result of several parts: lists one after the other and then in `order`, counts added up, the rest as in the first part."""
    values: dict[str, Any] = {"screening": screening}
    for field in dataclasses.fields(SuiteResult):
        found = [getattr(part, field.name) for part in parts]
        if isinstance(found[0], list):
            whole = [item for one in found for item in one]
            values[field.name] = [whole[i] for i in order]
        elif isinstance(found[0], int) and not isinstance(found[0], bool):
            values[field.name] = sum(found)
    return dataclasses.replace(parts[0], **values)


def late_suites(experiment: Experiment, suites: Iterable[PromptSuite]) -> list[str]:
    """Warnings about suites that can hardly be stopped early as feasible, with the remedy; none where nothing is asked in sequence."""
    warnings = []
    for suite in suites if experiment.safety.sequential.enabled else ():
        limit = _limit(experiment, suite.kind)
        if not suite.constrains or limit is None:
            continue
        if not _alike(suite):
            warnings.append(
                f"suite {suite.name}: its requests have unlike numbers of prompts, so it is not asked in sequence but in full; give each request as "
                "many prompts"
            )
            continue
        groups = _drawn(experiment, suite)
        share = least_share([False] * len(suite.prompts), groups, limit, experiment.safety.limits.confidence)
        if share > 1 - LEAST_SAVED:
            what = f"{len(set(groups))} requests" if groups else f"{len(suite.prompts)} prompts"
            remedy = "; safety.sequential.by=prompt needs fewer" if groups else ""
            warnings.append(
                f"suite {suite.name}: with {what} and a limit of {limit:g} no trial can be known to be feasible before {share:.0%} of it "
                f"are asked, so only infeasible ones are stopped early{remedy}"
            )
    return warnings
