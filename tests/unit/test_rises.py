"""Gaffke's bound against its definition, closed forms and Clopper and Pearson; monotone; what a suite can decide."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from orchestrator.decision import rises

ROOT = Path(__file__).parents[2]
LEVEL = 0.025
ROUNDING = 1e-11


def weighted_means(values, draws=60_000, seed=0):
    """The definition: exponential weights on the rises and on one imagined rise of 1."""
    weights = np.random.default_rng(seed).exponential(size=(draws, len(values) + 1))
    return weights @ np.append(values, 1.0) / weights.sum(axis=1)


@pytest.mark.parametrize("values", [
    [0.0] * 30, [1.0] * 3 + [0.0] * 40, [1.0] * 4 + [-1.0] * 6 + [0.0] * 30, [0.3], [-1.0, 1.0], [-1.0] * 12 + [-0.5],
    [1.0] * 9 + [-1.0], [1 / 3, -1 / 3, 2 / 3, 0.0, 0.0, 1.0, 0.0, 0.0], list(np.linspace(-1, 0.9, 17)),
])  # fmt: skip
def test_ends_are_the_quantiles_of_randomly_weighted_means(values):
    drawn = weighted_means(values)
    high, low = rises.upper_end(values), rises.lower_end(values)
    error = 5 * math.sqrt(LEVEL * (1 - LEVEL) / len(drawn))
    assert np.mean(drawn > high) == pytest.approx(LEVEL, abs=error)
    assert np.mean(-weighted_means([-v for v in values], seed=1) < low) == pytest.approx(LEVEL, abs=error)
    for limit in (high - 0.1, high, (high + 1) / 2):
        share = np.mean(drawn > limit)
        assert rises.p_value(values, limit) == pytest.approx(share, abs=5 * math.sqrt(0.25 / len(drawn)))


def by_partial_fractions(values, limit):
    """P(sum of exponentials times distinct factors > 0), summed over the positive factors: exact for few rises."""
    factors = [value - limit for value in values] + [1 - limit]
    others = [[f / (f - g) for j, g in enumerate(factors) if j != i] for i, f in enumerate(factors)]
    return math.fsum(math.prod(row) for f, row in zip(factors, others, strict=True) if f > 0)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-20, 19), min_size=1, max_size=6, unique=True), st.floats(-0.98, 0.98))
def test_p_value_is_the_closed_form_for_distinct_rises(twentieths, limit):
    values = [k / 20 for k in twentieths]
    if min(abs(v - limit) for v in values) > 1e-3:  # the closed form divides by it
        assert rises.p_value(values, limit) == pytest.approx(by_partial_fractions(values, limit), abs=1e-8)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 36, 72, 100, 313, 1000, 5000])
def test_single_prompts_that_never_improve_have_clopper_and_pearsons_interval(n):
    for failed in sorted({0, 1, 2, n // 10, n // 2, n - 1, n} & set(range(n + 1))):
        values = [1.0] * failed + [0.0] * (n - failed)
        high = 1.0 if failed == n else stats.beta.ppf(1 - LEVEL, failed + 1, n - failed)
        low = 0.0 if failed == 0 else stats.beta.ppf(LEVEL, failed, n - failed + 1)
        found = rises.rate(values)
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
        assert rises.upper_end(values) == pytest.approx(high, abs=1e-12)
        if failed < n:  # and by the binomial law itself
            assert stats.binom.cdf(failed, n, found.high) == pytest.approx(LEVEL, rel=1e-8)


def test_gains_are_a_dirichlet_of_three():
    """P(t1 - t2 > d) with (t1, t2, t3) ~ Dirichlet(new + 1, gained, same), by integrating out t2 and t3."""
    new, gained, same, limit = 4, 3, 60, 0.2
    t1 = np.linspace(0, 1, 200_001)
    share = np.clip((t1 - limit) / np.maximum(1 - t1, 1e-12), 0, 1)  # t2 <= t1 - d; t2 is 1 - t1 times a beta variable
    expected = np.trapezoid(stats.beta.pdf(t1, new + 1, gained + same) * stats.beta.cdf(share, gained, same), t1)
    assert rises.p_value([1.0] * new + [-1.0] * gained + [0.0] * same, limit) == pytest.approx(expected, rel=1e-6)


def test_a_finer_step_changes_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    few = [0.0] * 18 + [1.0]
    kinds = (lambda n: rng.choice(few, n), lambda n: rng.choice([-1.0, 0.0, 1.0], n), lambda n: rng.uniform(-1, 1, n))
    limits = rng.uniform(-0.9, 0.95, 3)
    cases = [(kind(n), float(limit)) for n in (1, 2, 5, 40, 700) for kind in kinds for limit in limits]
    found = [rises.p_value(*case) for case in cases]
    monkeypatch.setattr(rises, "STEP", 0.05)
    assert found == pytest.approx([rises.p_value(*case) for case in cases], abs=1e-12)


@pytest.mark.parametrize("level", [1e-9, 0.001, 0.025, 0.2])
def test_extremes(level):
    assert rises.upper_end([1.0] * 50, level) == 1 and rises.lower_end([-1.0] * 50, level) == -1
    assert rises.upper_end([0.4], level) == pytest.approx(1 - level * 0.6, abs=1e-12)
    assert rises.upper_end([0.0] * 100, level) == pytest.approx(1 - level ** (1 / 100), abs=1e-12)
    assert rises.upper_end([-1.0] * 100, level) == pytest.approx(1 - 2 * level ** (1 / 100), abs=1e-12)
    assert rises.lower_end([1.0] * 100, level) == pytest.approx(2 * level ** (1 / 100) - 1, abs=1e-12)
    many = np.random.default_rng(0).choice([-1.0, 0, 0, 0, 1.0], 20_000)
    for values in (many, np.r_[np.zeros(19_999), 1.0], np.r_[np.ones(19_999), 0.0]):
        low, high = rises.lower_end(values, level), rises.upper_end(values, level)
        assert -1 <= low <= values.mean() <= high <= 1 and high - low < 0.2


REQUEST = st.lists(st.sampled_from([-1, 0, 0, 0, 0, 1]), min_size=1, max_size=10)
SUITE = st.lists(REQUEST, min_size=1, max_size=20)


def ends(suite):
    means = [sum(request) / len(request) for request in suite]
    return rises.lower_end(means), sum(means) / len(means), rises.upper_end(means)


@settings(max_examples=30, deadline=None)
@given(SUITE, st.data())
def test_a_further_failure_lowers_neither_end(suite, data):
    able = [(j, i) for j, request in enumerate(suite) for i, x in enumerate(request) if x < 1]
    if able:
        j, i = data.draw(st.sampled_from(able))
        worse = [list(request) for request in suite]
        worse[j][i] += 1
        before, after = ends(suite), ends(worse)
        assert after[0] >= before[0] - ROUNDING and after[2] >= before[2] - ROUNDING


@settings(max_examples=30, deadline=None)
@given(SUITE, st.data())
def test_what_is_clean_never_raises_the_upper_end(suite, data):
    high = ends(suite)[2]
    if high >= 0:
        assert ends([*suite, [0]])[2] <= high + ROUNDING
    else:
        assert ends([*suite, [0]])[2] <= 0
    for j in range(min(3, len(suite))):
        if sum(suite[j]) >= 0:
            longer = [request + [0] if i == j else request for i, request in enumerate(suite)]
            assert ends(longer)[2] <= high + ROUNDING


@settings(max_examples=30, deadline=None)
@given(SUITE, st.randoms(), st.sampled_from([0.05, 0.1, -0.3, 0.6]))
def test_order_does_not_count_and_the_ends_enclose_the_value(suite, random, limit):
    rows = [(float(x < 0), float(x > 0), str(j)) for j, request in enumerate(suite) for x in request]
    first = rises.paired_difference(*zip(*rows, strict=True))
    random.shuffle(rows)
    again = rises.paired_difference(*zip(*rows, strict=True))
    assert (again.low, again.value, again.high) == pytest.approx((first.low, first.value, first.high), abs=1e-12)
    assert -1 <= first.low <= first.value <= first.high <= 1 and first.requests == len(suite)
    first_fails, then_fails, names = zip(*rows, strict=True)
    swapped = rises.paired_difference(then_fails, first_fails, names)
    assert (-swapped.high, -swapped.low) == (pytest.approx(first.low, abs=1e-10), pytest.approx(first.high, abs=1e-10))
    means = [sum(request) / len(request) for request in suite]
    if abs(first.high - limit) > 1e-9:
        assert (first.high <= limit) == (rises.p_value(means, limit) <= LEVEL)


def test_getting_worse_never_improves_a_verdict():
    """75 requests of 10, one new failure in each of k of them: feasible up to somewhere, never again."""
    highs = [rises.upper_end([0.1] * k + [0.0] * (75 - k)) for k in range(26)]
    assert highs == sorted(highs) and highs[1] <= 0.05 < highs[2]


@pytest.mark.parametrize(("n", "limit"), [(72, 0.05), (150, 0.05), (100, 0.1)])
def test_false_feasible_is_at_most_the_level(n, limit):
    """Exact: single prompts with gains, at a true rise of exactly the limit; and fixed strata of unlike rates."""
    for gained_rate in (0.0, 0.02, 0.1):
        total, new = 0.0, -1
        for gained in range(int(stats.binom.isf(1e-8, n, gained_rate)) + 1 if gained_rate else 1):
            while new + 1 + gained <= n and feasible(new + 1, gained, n, limit):
                new += 1
            kept = stats.binom.cdf(new, n - gained, (limit + gained_rate) / (1 - gained_rate))
            total += stats.binom.pmf(gained, n, gained_rate) * kept
        assert total <= LEVEL
    kept = max(k for k in range(n) if feasible(k, 0, n, limit)) if feasible(0, 0, n, limit) else -1
    for shares in ((0.5, 0.5), (0.9, 0.1), (0.2, 0.8)):
        sizes = [round(n * shares[0]), n - round(n * shares[0])]
        for part in (0.0, 0.3, 0.9):  # of the first stratum's rate; the second makes up the rest
            rates = (part * limit, (n * limit - sizes[0] * part * limit) / sizes[1])
            laws = [stats.binom.pmf(np.arange(size + 1), size, rate) for size, rate in zip(sizes, rates, strict=True)]
            assert np.convolve(*laws)[: kept + 1].sum() <= LEVEL


def feasible(new, gained, n, limit):
    return rises.p_value(np.repeat([1.0, -1.0, 0.0], [new, gained, n - new - gained]), limit) <= LEVEL


def test_prompts_of_a_request_are_one_unit_and_the_nameless_stand_alone():
    before = [False] * 8
    after = [True, False, True, True, False, False, False, True]
    names = ["a", "a", "b", "b", None, "", " ", math.nan]
    found = rises.paired_difference(before, after, names)
    assert found.requests == 6 and found.value == pytest.approx((0.5 + 1 + 0 + 0 + 0 + 1) / 6)
    assert found.high == rises.upper_end([0.5, 1, 0, 0, 0, 1])
    assert rises.paired_difference(before, after).requests == 8
    assert rises.paired_difference([0] * 4, [1, 0, 0, 0], [0, 0, 1, 1]).requests == 2, "a number is a name, 0 too"
    assert rises.rate(after, names).value == pytest.approx(found.value)


def test_the_rise_among_what_passed():
    before, after = [True, True, False, False, False, False], [True, False, True, False, False, False]
    found = rises.rise_among_passing(before, after)
    assert (found.value, found.requests) == (0.25, 4) and found == rises.rate([1, 0, 0, 0])
    assert rises.rise_among_passing(before, after, ["a", "a", "a", "b", "b", "b"]).value == pytest.approx((1 + 0) / 2)
    assert rises.rise_among_passing([True, True], [True, False]) is None


@pytest.mark.parametrize(("call", "says"), [
    (lambda: rises.upper_end([]), "one number or more"),
    (lambda: rises.upper_end([0.0, math.nan]), "nan at position 1"),
    (lambda: rises.upper_end([0.0, 1.5]), r"-1\.\.1, got 1.5"),
    (lambda: rises.upper_end([[0.0]]), "shape"),
    (lambda: rises.upper_end([0.0], 0.5), "level"),
    (lambda: rises.upper_end([0.0], 0.0), "level"),
    (lambda: rises.p_value([0.0], 1.0), "limit"),
    (lambda: rises.paired_difference([], []), "one number or more"),
    (lambda: rises.paired_difference([0], [0, 1]), "got 1 and 2"),
    (lambda: rises.paired_difference([0, 1], [0, 1], ["a"]), "1 names for 2 prompts"),
    (lambda: rises.paired_difference([0], [math.nan]), "failures after"),
    (lambda: rises.paired_difference([-1], [0]), "failures before"),
    (lambda: rises.rate([2]), r"0\.\.1, got 2"),
    (lambda: rises.rise_among_passing([0, 0], [0]), "got 2 and 1"),
    (lambda: rises.rise_among_passing([0, 0], [0, 0], ["a"]), "1 names for 2"),
    (lambda: rises.can_decide([], None, 0.05), "one number or more"),
    (lambda: rises.can_decide([0], None, 1.5), "limit"),
    (lambda: rises.least_requests(math.nan), "limit"),
])  # fmt: skip
def test_errors_are_sentences(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_least_requests():
    assert (rises.least_requests(0.05), rises.least_requests(0.10)) == (72, 36)
    assert (rises.least_requests(0), rises.least_requests(1), rises.least_requests(0.97501)) == (None, 1, 1)
    for limit in (0.01, 0.05, 0.1, 0.3):
        least = rises.least_requests(limit)
        assert rises.upper_end([0.0] * least) <= limit < rises.upper_end([0.0] * (least - 1))


@pytest.mark.parametrize(("limit", "numbers"), [
    (0.05, (72, 110, 142, 173, 202, 230)), (0.10, (36, 54, 70, 85, 100, 114)),
])  # fmt: skip
def test_single_prompts_needed_for_a_few_new_failures(limit, numbers):
    for new, n in enumerate(numbers):
        enough, short = [1.0] * new + [0.0] * (n - new), [1.0] * new + [0.0] * (n - new - 1)
        assert rises.upper_end(enough) <= limit < rises.upper_end(short)


@pytest.mark.parametrize(("n", "limit", "least"), [
    (72, 0.05, 11), (100, 0.05, 13), (200, 0.05, 19), (313, 0.05, 26), (500, 0.05, 37), (1319, 0.05, 84),
    (72, 0.10, 15), (100, 0.10, 19), (200, 0.10, 31), (313, 0.10, 44), (500, 0.10, 66), (1319, 0.10, 156),
])  # fmt: skip
def test_the_least_infeasible_rise_and_the_blind_baseline(n, limit, least):
    clean = rises.can_decide([False] * n, None, limit)
    assert clean.least_rise_called_infeasible == pytest.approx(least / n) and clean.can_show_a_rise
    assert clean.can_be_feasible == (n >= clean.requests_needed) and clean.requests == n
    at_most = n - 2 * least  # failures before, so that half of the rest is infeasible
    assert rises.can_decide([i < at_most for i in range(n)], None, limit).can_show_a_rise
    assert not rises.can_decide([i < at_most + 1 for i in range(n)], None, limit).can_show_a_rise
    blind = rises.can_decide([i < n - least for i in range(n)], None, limit)
    assert blind.least_rise_called_infeasible == pytest.approx(least / n)
    blind = rises.can_decide([i < n - least + 1 for i in range(n)], None, limit)
    assert blind.least_rise_called_infeasible is None


def test_what_a_suite_of_several_wordings_can_decide():
    names = [str(i // 3) for i in range(360)]
    found = rises.can_decide([False] * 360, names, 0.05)
    assert found == rises.Decidable(True, True, pytest.approx(14 / 120), 72, 120)
    assert not rises.can_decide([False] * 200, [str(i // 3) for i in range(200)], 0.05).can_be_feasible, "67 requests"
    assert not rises.can_decide([False] * 41, None, 0.05).can_be_feasible
    assert not rises.can_decide([True] * 100, None, 0.05).can_show_a_rise
    order = np.random.default_rng(0).permutation(360)
    before = [i % 7 == 0 for i in range(360)]
    shuffled = [before[i] for i in order], [names[i] for i in order]
    assert rises.can_decide(before, names, 0.1) == rises.can_decide(*shuffled, 0.1)
    assert rises.can_decide([False] * 72, None, 0.0) == rises.Decidable(False, True, pytest.approx(6 / 72), None, 72)
    assert rises.can_decide([False] * 5, None, 1.0) == rises.Decidable(True, False, None, 1, 5)


@pytest.mark.parametrize("icc", [0.0, 0.3, 1.0])
def test_the_benchmarks_requests_have_the_rates_and_the_correlation_they_say(icc, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import verdict_cells

    up, down, prompts = 0.15, 0.05, 5
    chances = verdict_cells.law(prompts, up, down, icc, 10)
    rise = np.linspace(-1, 1, 21)
    single = up + down - (up - down) ** 2  # variance of one prompt's change; of their mean with equal correlations:
    assert chances.sum() == pytest.approx(1) and chances @ rise == pytest.approx(up - down)
    assert chances @ rise**2 - (up - down) ** 2 == pytest.approx(single * (1 + (prompts - 1) * icc) / prompts)
    parts = verdict_cells.random_strata(0.05, np.random.default_rng(1))
    means = [requests * (law @ np.linspace(-1, 1, 5)) for requests, law in parts]
    assert sum(means) == pytest.approx(0.05 * sum(requests for requests, _ in parts))


def test_the_module_is_light():
    heavy = "torch ray scipy pydantic"
    code = f"import sys, orchestrator.decision.rises; print([name for name in '{heavy}'.split() if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
