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


def test_interval_ends_solve_tangos_equation():
    """Both ends satisfy |T(delta)| = z, with T written out again from the paper for 44 pairs of which one changed."""
    before, after = [False] * 44, [True] + [False] * 43
    estimate = intervals.paired_difference(before, after)
    assert estimate.value == pytest.approx(1 / 44)
    for delta in (estimate.lower, estimate.upper):
        n, b, c = 44, 1, 0
        a_, b_, c_ = 2 * n, -b - c + (2 * n - b + c) * delta, -c * delta * (1 - delta)
        q21 = (math.sqrt(b_**2 - 4 * a_ * c_) - b_) / (2 * a_)
        t = (b - c - n * delta) / math.sqrt(n * (2 * q21 + delta * (1 - delta)))
        assert abs(t) == pytest.approx(1.959964, abs=1e-3)


def test_no_change_has_the_rule_of_three_order():
    estimate = intervals.paired_difference([False] * 300, [False] * 300)
    z2 = 1.959964**2
    assert estimate.upper == pytest.approx(z2 / (300 + z2), rel=1e-3)
    assert estimate.lower == pytest.approx(-z2 / (300 + z2), rel=1e-3)


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
def test_clustered_coverage_by_simulation(shift, concentration):
    """60 topics of 5 prompts whose rates vary by topic: the 95 % interval covers, the one that ignores topics does not."""
    rng = np.random.default_rng(0)
    topics, per, base = 60, 5, 0.05
    groups = [str(g) for g in range(topics) for _ in range(per)]
    covered = naive = 0
    runs = 400
    for _ in range(runs):
        before = rng.random((topics, per)) < base
        topic_rate = rng.beta(concentration * (base + shift), concentration * (1 - base - shift), size=(topics, 1))
        after = rng.random((topics, per)) < topic_rate
        a, b = before.ravel().tolist(), after.ravel().tolist()
        e = intervals.paired_difference(a, b, groups)
        f = intervals.paired_difference(a, b)
        covered += e.lower <= shift <= e.upper
        naive += f.lower <= shift <= f.upper
    assert covered / runs >= 0.92
    assert naive < covered


def test_wilson_rate_reference():
    e = intervals.rate([True] * 3 + [False] * 17)
    z, n, p = 1.959964, 20, 0.15
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (e.lower, e.upper) == (pytest.approx(centre - half, abs=1e-6), pytest.approx(centre + half, abs=1e-6))
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
    return TrialResult(trial_id, recipe, params or {"learning_rate": float(len(trial_id))}, seed, "search", state, task, suites)


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
