"""Intervals against independent formulas and by simulation; verdicts and the selector on every kind of trial."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import Limits
from orchestrator.decision import intervals, limits, selection
from orchestrator.records import SuiteResult, TaskResult, TrialResult


def test_no_change_is_feasible_from_72_requests_at_5_percent_and_36_at_10():
    for limit, least in ((0.05, 72), (0.10, 36)):
        for n, kept in ((least - 1, False), (least, True)):
            estimate = intervals.paired_difference([False] * n, [False] * n)
            assert (limits.verdict_of(estimate, limit) == "feasible") is kept and estimate.value == 0
            three = intervals.paired_difference([False] * 3 * n, [False] * 3 * n, [str(i // 3) for i in range(3 * n)])
            assert three.upper == pytest.approx(estimate.upper) and (three.n, three.requests) == (3 * n, n)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcdefgh")), min_size=1, max_size=60))
def test_interval_properties(rows):
    before, after, groups = ([r[i] for r in rows] for i in range(3))
    flat = intervals.paired_difference(before, after)
    clustered = intervals.paired_difference(before, after, groups)
    swapped = intervals.paired_difference(after, before, groups)
    for e in (flat, clustered):
        assert -1 <= e.lower <= e.value <= e.upper <= 1
    assert clustered.value == pytest.approx(-swapped.value)
    assert clustered.lower == pytest.approx(-swapped.upper, abs=1e-6)
    wider = intervals.paired_difference(before, after, groups, confidence=0.99)
    assert wider.lower <= clustered.lower + 1e-9 and wider.upper >= clustered.upper - 1e-9


@pytest.mark.parametrize(("shift", "concentration"), [(0.0, 2.0), (0.1, 2.0), (0.3, 1.0)])
def test_coverage_by_simulation(shift, concentration):
    """60 requests of 5 wordings whose rates vary by request: the 95 % interval covers, the one that ignores requests does not."""
    rng = np.random.default_rng(0)
    requests, per, base = 60, 5, 0.05
    names = [str(g) for g in range(requests) for _ in range(per)]
    covered = naive = 0
    runs = 400
    for _ in range(runs):
        before = rng.random((requests, per)) < base
        own = rng.beta(concentration * (base + shift), concentration * (1 - base - shift), size=(requests, 1))
        after = rng.random((requests, per)) < own
        a, b = before.ravel().tolist(), after.ravel().tolist()
        e = intervals.paired_difference(a, b, names)
        f = intervals.paired_difference(a, b)
        covered += e.lower <= shift <= e.upper
        naive += f.lower <= shift <= f.upper
    assert covered / runs >= 0.94
    assert naive < covered


def test_rate_is_clopper_and_pearsons():
    from scipy import stats

    e = intervals.rate([True] * 3 + [False] * 17)
    assert e.lower == pytest.approx(stats.beta.ppf(0.025, 3, 18), abs=1e-9) and e.upper == pytest.approx(stats.beta.ppf(0.975, 4, 17), abs=1e-9)
    assert math.isnan(intervals.rate([]).value)


def suite(name, failures, kind="harmful", groups=None):
    n = len(failures)
    ids = [f"{name}{i}" for i in range(n)]
    flipped = [not f for f in failures]
    unsafe, refused = (failures, flipped) if kind == "harmful" else (flipped, failures)
    return SuiteResult(name, kind, ids, groups, list(unsafe), list(refused))


def trial(trial_id, failures, score, *, recipe="full", seed=0, params=None, state="complete", benign=None):
    suites = {"h": suite("h", failures)} if failures is not None else {}
    if benign is not None:
        suites["b"] = suite("b", benign, "benign")
    task = TaskResult("exact_match", score, [score], ["0"]) if score is not None else None
    phase = "confirm" if seed else "search"
    return TrialResult(trial_id, recipe, params or {"learning_rate": float(len(trial_id))}, seed, phase, state, task, suites)


N = 400
LIMITS = Limits(max_degradation=0.05, max_over_refusal_rise=0.10)
BASE = trial("baseline", [False] * N, 0.1)


def rows(*trials, base=BASE):
    return [(t, limits.judge(t, base, LIMITS)) for t in trials]


def failing(k):
    return [True] * k + [False] * (N - k)


def test_verdicts():
    verdicts = [j.verdict for _, j in rows(trial("a", failing(2), 0.9), trial("b", failing(20), 0.9), trial("c", failing(80), 0.9))]
    assert verdicts == ["feasible", "undecided", "infeasible"]


@pytest.mark.parametrize("broken", [
    trial("x", None, 0.9), trial("x", failing(0), None), trial("x", failing(0), math.nan), trial("x", failing(0), 0.9, state="failed"),
    trial("x", failing(0), 0.9, state="stopped"), trial("x", failing(0)[:-1], 0.9),
])  # fmt: skip
def test_missing_nan_failed_or_unpaired_is_infeasible(broken):
    (_, judgement), = rows(broken)
    assert judgement.verdict == "infeasible"
    assert all(math.isfinite(v) for v in judgement.values.values())
    assert selection.best(rows(broken)).best is None


def test_getting_worse_never_improves_a_verdict():
    """README's example: 750 prompts asking 250 requests, one more new failure at a time."""
    order = {"feasible": 0, "undecided": 1, "infeasible": 2}
    requests = [str(i // 3) for i in range(750)]
    spread = sorted(range(750), key=lambda i: (i % 3, i))
    for failing_first in (range(750), spread):
        seen = []
        for k in range(0, 120, 3):
            failed = set(list(failing_first)[:k])
            estimate = intervals.paired_difference([False] * 750, [i in failed for i in range(750)], requests)
            seen.append((estimate.upper, estimate.lower, order[limits.verdict_of(estimate, 0.05)]))
        assert seen == sorted(seen, key=lambda one: one[0]) and [one[2] for one in seen] == sorted(one[2] for one in seen)
        assert seen[0][2] == 0 and seen[-1][2] == 2


@pytest.mark.parametrize(("n", "limit", "failing_before", "blind"), [
    (313, 0.05, 0.83, False), (313, 0.05, 0.85, True), (200, 0.10, 0.69, False), (200, 0.10, 0.70, True), (100, 0.05, 0.0, False),
    (400, 0.9, 0.0, False), (400, 0.9, 0.2, True), (3, 0.05, 0.0, True), (10, 1.0, 0.7, False),
])  # fmt: skip
def test_a_suite_that_can_show_no_rise_never_says_feasible(n, limit, failing_before, blind):
    before = suite("h", [i < round(n * failing_before) for i in range(n)])
    assert limits.is_blind(before, limit, 0.95) is blind
    base = TrialResult("baseline", "", {}, 0, "baseline", "complete", TaskResult("exact_match", 1.0, [1.0], ["0"]), {"h": before})
    judgement = limits.judge(base, base, Limits(max_degradation=limit, max_over_refusal_rise=None))
    (found,) = judgement.constraints
    assert found.blind is blind and (found.value <= 0) == (found.verdict == "feasible")
    assert judgement.verdict == ("feasible" if not blind else "undecided")


def test_a_blind_suite_still_shows_what_is_infeasible():
    before = suite("h", [True] * 85 + [False] * 15)
    after = suite("h", [True] * 100)
    (found,) = limits.judge(
        TrialResult("t", "full", {}, 0, "search", "complete", TaskResult("exact_match", 1.0, [1.0], ["0"]), {"h": after}),
        TrialResult("baseline", "", {}, 0, "baseline", "complete", None, {"h": before}), Limits(max_degradation=0.05),
    ).constraints
    assert found.blind and found.verdict == "infeasible"


def test_constraint_value_sign_is_the_verdict():
    for k in (0, 2, 8, 20, 60):
        (_, j), = rows(trial("a", failing(k), 0.9))
        assert (j.constraints[0].value <= 0) == (j.verdict == "feasible")


def test_over_refusal_limits_too():
    base = trial("baseline", failing(0), 0.1, benign=[False] * N)
    (_, j), = rows(trial("a", failing(0), 0.9, benign=failing(200)), base=base)
    assert j.verdict == "infeasible" and j.degradation.value == 0 and j.over_refusal_rise.value == 0.5


def test_best_ignores_higher_scores_outside_the_limit_and_breaks_ties_inside():
    chosen = selection.best(rows(trial("a", failing(80), 0.99), trial("bb", failing(3), 0.8), trial("ccc", failing(0), 0.8)))
    assert chosen.best_trial.trial_id == "ccc"
    assert chosen.nearest_miss.trials[0][0].trial_id == "a"


def test_a_configuration_must_hold_on_every_seed_and_confirmed_ones_win():
    p, q = {"learning_rate": 1.0}, {"learning_rate": 2.0}
    trials = rows(
        trial("a", failing(0), 0.95, params=p), trial("a1", failing(80), 0.95, params=p, seed=1),
        trial("b", failing(0), 0.90, params=q), trial("b1", failing(1), 0.88, params=q, seed=1),
        trial("c", failing(0), 0.99, params={"learning_rate": 3.0}),
    )  # fmt: skip
    chosen = selection.best(trials)
    assert chosen.best.params == q and chosen.best.seeds == (0, 1) and chosen.best.score == pytest.approx(0.89)
    assert [c.trials[0][0].trial_id for c in selection.finalists(trials, 5)] == ["c"]


def test_nothing_feasible_names_the_nearest_miss():
    chosen = selection.best(rows(trial("a", failing(80), 0.9), trial("bb", failing(30), 0.8)))
    assert chosen.best is None and chosen.nearest_miss.trials[0][0].trial_id == "bb" and chosen.nearest_miss.excess > 0


def test_records_round_trip():
    t = trial("a", failing(2), 0.5, benign=[True, False])
    assert TrialResult.from_dict(t.to_dict()) == t


def test_a_second_seed_of_the_search_is_no_confirmation():
    """It may refuse a lucky winner, and the model that is handed over is still trained on a seed that chose nothing."""
    def row(trial_id, seed, phase, score, verdict="feasible", params=1):
        judged = limits.Judgement(verdict, (), score, None, None, None, None)
        return TrialResult(trial_id, "full", {"learning_rate": params}, seed, phase, "complete"), judged

    stands = [row("t0001", 0, "search", 0.8), row("t0002", 2, "search", 0.8)]
    lucky = [row("t0003", 0, "search", 0.9, params=2), row("t0004", 2, "search", 0.9, "infeasible", params=2)]
    assert [found.params["learning_rate"] for found in selection.finalists(stands + lucky, 2)] == [1]
    assert selection.best(stands + lucky).best.seeds == (0, 2)
    confirmed = [*stands, *lucky, row("t0001s1", 1, "confirm", 0.7)]
    assert selection.finalists(confirmed, 2) == () and selection.best(confirmed).best.seeds == (0, 2, 1)
