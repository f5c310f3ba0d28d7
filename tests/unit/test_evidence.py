"""Evidence over repeated looks: against its definition written out, and against chance, by enumeration and by simulation."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from orchestrator.decision.drift import BETS, Evidence, chance_of_more, changed


def by_definition(looks, horizon):
    """Every game of every start and bet, played one by one."""
    total = 0.0
    for bet, share in BETS:
        for start in range(horizon):
            capital = share / horizon
            for gained, lost, _ in looks[start:]:
                capital *= (1 + bet) ** gained * (1 - bet) ** lost
            total += capital
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_recursion_is_the_sum_over_all_games(seed):
    rng = random.Random(seed)
    looks = [(rng.randrange(4), rng.randrange(3), 20) for _ in range(7)]
    made = Evidence(9)
    for i, look in enumerate(looks):
        assert made.add(*look) == pytest.approx(by_definition(looks[: i + 1], 9), rel=1e-10)


def test_on_average_nothing_is_won_where_nothing_is_lost():
    """All pairs of draws without replacement from six prompts of which two turned unsafe and two safe: the mean capital is at most 1."""
    change = [1, 1, -1, -1, 0, 0]
    draws = list(itertools.combinations(change, 3))
    values = []
    for first, second in itertools.product(draws, draws):
        made = Evidence(2)
        for look in (first, second):
            made.add(look.count(1), look.count(-1), 3)
        values.append(made.value)
    assert math.fsum(values) / len(values) <= 1 + 1e-12


@pytest.mark.parametrize(("churn", "looks"), [(0.1, 12), (0.4, 40)])
def test_false_stops_over_a_whole_training_keep_their_rate(churn, looks):
    """400 trainings that change as many answers one way as the other, a prompt anew at every look."""
    rng, stopped = random.Random(1), 0
    for _ in range(400):
        made = Evidence(looks)
        for _ in range(looks):
            changes = [rng.random() < churn for _ in range(50)]
            gained = sum(c and rng.random() < 0.5 for c in changes)
            if made.add(gained, sum(changes) - gained, 50) >= 20 and made.rise() > 0.05:
                stopped += 1
                break
    assert stopped / 400 <= 0.05


@pytest.mark.parametrize(("rise", "at_most"), [(1.0, 1), (0.3, 2), (0.15, 4)])
def test_a_fall_of_safety_late_in_training_is_seen_after_few_looks(rise, at_most):
    made = Evidence(40)
    for _ in range(25):
        made.add(2, 2, 50)
    needed = next(i for i in range(1, 20) if made.add(round(50 * rise), 0, 50) >= 20)
    assert needed <= at_most and made.rise() == pytest.approx(rise, abs=0.05), "the quiet looks before are not averaged in"


def test_quiet_looks_cost_nothing_and_extremes_stay_finite():
    made = Evidence(3)
    for _ in range(5):
        assert made.add(0, 0, 50) == pytest.approx(1.0)
    for _ in range(4):
        made.add(1000, 0, 1000)
    assert made.value == math.inf and made.rise() == pytest.approx(1.0)
    assert Evidence(1).add(0, 5000, 5000) >= 0.0
    assert math.isnan(Evidence(1).rise())
    with pytest.raises(ValueError, match="at least one"):
        Evidence(0)


def test_state_goes_round_to_the_last_bit():
    made = Evidence(5)
    made.add(3, 1, 20)
    again = Evidence.of(made.state_dict())
    assert made.add(2, 0, 20) == again.add(2, 0, 20) and made.rise() == again.rise()


def test_counting_changes_and_the_bare_count():
    assert changed([True, False, False, True], [True, True, False, False]) == (1, 1)
    with pytest.raises(ValueError):
        changed([True], [])
    exact = sum(0.1**k * 0.9 ** (10 - k) * math.comb(10, k) for k in range(3, 11))
    assert chance_of_more(2, 10, 0.1) == pytest.approx(exact) and chance_of_more(10, 10, 0.3) == pytest.approx(0.0)


def test_the_benchmarks_rules_in_small():
    """`benchmarks/monitor.py` with few repetitions: the bare threshold cries wolf, the default does not and still sees a fall."""
    import importlib.util
    from pathlib import Path

    found = importlib.util.spec_from_file_location("monitor_benchmark", Path(__file__).parents[2] / "benchmarks" / "monitor.py")
    benchmark = importlib.util.module_from_spec(found)
    found.loader.exec_module(benchmark)
    for scenario in ((12, 0.1, 0.1, 0.0), (40, 0.5, 0.3, 0.9)):
        stops = benchmark.false_stops(scenario, 60)
        assert stops["evidence (default)"] <= 0.05 and stops["threshold, fresh prompts"] > 0.3
    seen = benchmark.delays((0.0, 0.0, 0.3), 20)["evidence (default)"]
    assert seen == {"early": 0.0, "seen": 1.0, "median": 1}
    assert "| 12 | 0.1 |" in benchmark.table(benchmark.measure(1), 1)


def test_what_is_pooled_is_said_with_the_number_of_looks():
    from orchestrator.experiment.progress import monitor_line

    evidence = Evidence(10)
    for gained, lost in ((0, 0), (3, 0), (3, 0), (0, 1)):
        evidence.add(gained, lost, 30)
    rise, looks = evidence.pooled()
    assert (rise, looks) == (pytest.approx(5 / 90), 3) and rise == evidence.rise()
    event = {"kind": "probe", "step": 40, "n": 30, "degradation": -1 / 30, "breach": True, "pooled_rise": rise, "pooled_probes": looks}
    assert monitor_line(event) == "step 40, probe of 30: unsafe answers -0.033, a breach by the last 3 probes together (+0.056)"
    assert monitor_line(event | {"breach": False}) == "step 40, probe of 30: unsafe answers -0.033"
