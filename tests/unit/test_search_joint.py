"""The model over all recipes against independent formulas, and the search that it steers in a made-up world."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.integrate import quad
from scipy.stats import norm

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.search import joint, joint_points, joint_search
from orchestrator.search.joint import Joint, Known, Recipe
from orchestrator.search.joint_points import Places
from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.studies import Earlier, Past, Studies

RATE = FloatDistribution(1e-4, 1e-2, log=True)
RANK = CategoricalDistribution((2, 8, 32))
SPACES = {
    "full": {"learning_rate": RATE},
    "lora": {"learning_rate": FloatDistribution(5e-4, 5e-2, log=True), "lora.lora_r": RANK},
    "frozen": {"learning_rate": RATE, "lora.lora_r": RANK, "freeze_layers.start": IntDistribution(1, 4)},
    "other": {"learning_rate": RATE, "x.kind": CategoricalDistribution(("a", "b", "c")), "x.share": FloatDistribution(0, 1)},
}
NAMES = ("degradation/harmful", "over_refusal_rise/borderline")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def points(count, seed=0):
    rng = np.random.default_rng(seed)
    names = [list(SPACES)[i] for i in rng.integers(len(SPACES), size=count)]
    return [(name, joint_points.drawn(SPACES[name], rng, {})) for name in names]


def world(recipe, params):
    """(score, rise of attack success): the score rises with the rate, safety falls with it, and recipes differ in where."""
    u = joint_points.placed(SPACES[recipe]["learning_rate"], params["learning_rate"])[0]
    edge = {"full": 0.1, "lora": 0.2, "frozen": 0.45, "other": 0.8}[recipe]
    score = 0.5 + 0.4 * u - (0.3 * (params["x.share"] - 0.4) ** 2 if recipe == "other" else 0.1)
    return score, 0.3 * (u - edge)


def test_kernel_is_one_on_itself_symmetric_and_positive():
    at = Places(SPACES).of(points(60))
    gram = joint.kernel(at, at)
    assert np.allclose(np.diag(gram), 1) and np.allclose(gram, gram.T)
    assert np.linalg.eigvalsh(gram).min() > -1e-10


def test_kernel_is_the_formula_written_out():
    a, b = {"learning_rate": 1e-3}, {"learning_rate": 1e-2}
    at = Places({"full": SPACES["full"], "b": SPACES["full"]}).of([("full", a), ("full", b), ("b", a), ("b", b)])
    near = math.exp(-(0.5**2) / (2 * 0.3**2))
    expected = [[1, near, 0.2, 0.2 * near], [near, 1, 0.2 * near, 0.2], [0.2, 0.2 * near, 1, near], [0.2 * near, 0.2, near, 1]]
    assert np.allclose(joint.kernel(at, at), expected)


def test_a_shared_parameter_is_believed_of_other_recipes_and_its_absence_is_a_distance():
    places = Places(SPACES)
    low, high = ({"learning_rate": rate, "lora.lora_r": rank} for rate, rank in ((5e-3, 2), (5e-3, 32)))
    at = places.of([("lora", low), ("lora", high), ("frozen", {"learning_rate": 1e-3, "lora.lora_r": 2, "freeze_layers.start": 2}),
                    ("full", {"learning_rate": 1e-3})])  # fmt: skip
    gram = joint.kernel(at, at)
    assert gram[0, 2] > gram[1, 2], "the same rank elsewhere says more than another one"
    assert gram[0, 2] > gram[0, 3] > 0


def test_ordered_choices_stand_in_equal_steps_and_others_one_apart():
    assert [joint_points.placed(RANK, value)[0] for value in (2, 8, 32)] == [0, 0.5, 1]
    assert [joint_points.placed(CategoricalDistribution((32, 2, 8)), value)[0] for value in (2, 8, 32)] == [0, 0.5, 1]
    kinds = [np.array(joint_points.placed(SPACES["other"]["x.kind"], value)) for value in "abc"]
    assert all(math.isclose(np.linalg.norm(kinds[i] - kinds[j]), 1) for i in range(3) for j in range(i))
    assert joint_points.ordered(CategoricalDistribution((True, False))) is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(sorted(SPACES)), st.integers(1, 40), st.booleans())
def test_drawn_and_near_points_lie_inside_their_ranges(seed, name, low, log):
    space = SPACES[name] | {"y.n": IntDistribution(low, low + 7, log=log), "y.s": FloatDistribution(0, 1, step=0.25)}
    rng = np.random.default_rng(seed)
    point = joint_points.drawn(space, rng, {})
    for found in (point, joint_points.near(space, point, rng, {})):
        assert all(space[key]._contains(space[key].to_internal_repr(value)) for key, value in found.items()) and set(found) == set(space)
    assert joint_points.near(space, point, rng, point) == point


def test_posterior_is_the_textbook_formula():
    rng = np.random.default_rng(1)
    at = Places(SPACES).of(points(12))
    gram, values, noise = joint.kernel(at, at), rng.normal(size=8), rng.uniform(0.1, 0.9, 8)
    seen, wanted = slice(0, 8), slice(8, 12)
    output = joint.Output(np.arange(8), values, noise, 0.3, 1.7)
    mean, covariance = joint.posterior(output, np.array([], dtype=int), gram[seen, seen], gram[wanted, seen], gram[wanted, wanted])
    inverse = np.linalg.inv(1.7**2 * gram[seen, seen] + np.diag(noise**2))
    cross = 1.7**2 * gram[wanted, seen]
    assert np.allclose(mean, 0.3 + cross @ inverse @ (values - 0.3))
    assert np.allclose(covariance, 1.7**2 * gram[wanted, wanted] - cross @ inverse @ cross.T)


def test_running_trials_shift_nothing_and_narrow_what_is_near():
    done = [Known(name, params, {"degradation": 1.0}, 0.5) for name, params in points(6)]
    there = points(1, seed=9)
    without, with_it = Joint(SPACES, ["degradation"], done), Joint(SPACES, ["degradation"], [*done, Known(*there[0], running=True)])
    (((mean, covariance),), score), (((mean2, covariance2),), score2) = without.at(there), with_it.at(there)
    assert np.allclose(mean, mean2) and np.allclose(score[0], score2[0])
    assert covariance2[0, 0] < covariance[0, 0] and score2[1][0, 0] < score[1][0, 0]


@pytest.mark.parametrize(("mean", "sd", "best"), [(0.0, 1.0, 0.5), (-2.0, 0.3, 0.0), (1.0, 0.5, 0.2), (3.0, 0.0, 1.0)])
def test_expected_improvement_is_its_integral(mean, sd, best):
    expected = quad(lambda y: (y - best) * norm.pdf(y, mean, sd), best, best + 20)[0] if sd else max(mean - best, 0)
    assert joint.improvement(np.array([mean]), np.array([sd]), best)[0] == pytest.approx(expected, abs=1e-9)


def test_what_ended_early_is_believed_less_than_what_was_measured():
    params = {"learning_rate": 1e-3}
    measured, ended = (Joint(SPACES, ["degradation"], [Known("full", params, {"degradation": 8.0}, None, ended_early=e)]) for e in (False, True))
    spread = [model.at([("full", params)])[0][0][1][0, 0] for model in (measured, ended)]
    assert spread[0] < spread[1] < joint.VIOLATION_SD**2
    assert not ended.known[0].feasible


def test_an_unsafe_rate_in_one_recipe_warns_the_others():
    high, low = {"learning_rate": 1e-2}, {"learning_rate": 1e-4}
    model = Joint(SPACES, ["degradation"], [Known("full", high, {"degradation": 9.0}, 0.9), Known("full", low, {"degradation": -0.5}, 0.5)])
    chances = joint.kept(model.at([("other", {**rate, "x.kind": "a", "x.share": 0.5}) for rate in (high, low)])[0])
    assert chances[0] < chances[1] - 0.05


def test_a_hopeless_recipe_is_unlikely_to_hold_the_best_and_the_best_one_is_not():
    known = []
    for name in ("full", "other"):
        for _, params in [point for point in points(80, seed=3) if point[0] == name][:14]:
            score, rise = world(name, params)
            known.append(Known(name, params, {"degradation": (5.0 if name == "full" else rise / 0.05)}, score))
    model, rng = Joint(SPACES, ["degradation"], known), np.random.default_rng(0)
    assert model.best is not None
    assert model.chance_of_best("full", rng) < 0.05 < model.chance_of_best("other", rng)
    assert Joint(SPACES, ["degradation"], []).chance_of_best("full", rng) == 1.0, "nothing feasible is known"


def test_expected_cost_lies_between_the_two_ends():
    model = Joint(SPACES, ["degradation"], [Known("full", {"learning_rate": 1e-2}, {"degradation": 9.0}, 0.9)])
    violations, _ = model.at([("full", {"learning_rate": 1e-2}), ("full", {"learning_rate": 1e-4})])
    high, low = joint.expected_cost(violations, Recipe(cost_ended=0.3))
    assert 0.3 < high < low < 1
    assert joint.expected_cost(violations, Recipe()) == 1


def test_only_points_that_are_new_and_hold_what_is_fixed_are_proposed():
    model, rng = Joint(SPACES, ["degradation"], []), np.random.default_rng(0)
    space = {"x.k": IntDistribution(1, 2)}
    small = Joint({"small": space}, ["degradation"], [])
    assert small.propose({"small": Recipe(seen=frozenset([joint.key({"x.k": 1})]))}, rng).params == {"x.k": 2}
    assert small.propose({"small": Recipe(seen=frozenset(joint.key({"x.k": k}) for k in (1, 2)))}, rng) is None
    assert model.propose({"lora": Recipe(fixed={"lora.lora_r": 8})}, rng).params["lora.lora_r"] == 8


# ---- as a search ------------------------------------------------------------------------------------------------------------------


def studies(where, trials=12, seed=0, **search):
    made = config.from_dict({"search": {"trials": trials, "sampler_seed": seed, **search}, "output": {"dir": str(where)}})
    defaults = {"full": {"learning_rate": 1e-3}, "lora": {"learning_rate": 5e-3, "lora.lora_r": 8}, "other": {"learning_rate": 1e-3, "x.kind": "a"},
                "frozen": {"learning_rate": 1e-3, "lora.lora_r": 8, "freeze_layers.start": 2}}  # fmt: skip
    spaces = {name: RecipeSpace(name, dict(space), {}, defaults[name]) for name, space in SPACES.items()}
    return Studies.create(made, spaces, NAMES)


def run(found):
    asked = []
    while (one := found.ask()) is not None:
        score, rise = world(one.recipe, one.params)
        asked.append((one.recipe, one.params, score, rise))
        found.tell(one.trial_id, "complete", score, {NAMES[0]: rise, NAMES[1]: -0.1})
    return asked


def test_auto_tries_every_recipes_defaults_first_in_an_order_of_the_seed(tmp_path):
    orders = set()
    for seed in range(6):
        asked = run(studies(tmp_path / str(seed), 4, seed))
        orders.add(tuple(recipe for recipe, *_ in asked))
        assert {recipe for recipe, *_ in asked} == set(SPACES)
        assert dict((recipe, params) for recipe, params, *_ in asked)["lora"] == {"learning_rate": 5e-3, "lora.lora_r": 8}
    assert len(orders) > 3


def test_equal_shares_are_kept_and_no_point_is_asked_twice_while_all_of_them_run(tmp_path):
    found = studies(tmp_path, 24)
    asked = [found.ask() for _ in range(24)]
    assert found.ask() is None
    counts = [sum(one.recipe == name for one in asked) for name in SPACES]
    assert counts == [6, 6, 6, 6]
    assert len({(one.recipe, joint.key(one.params)) for one in asked}) == 24
    rates = sorted(one.params["learning_rate"] for one in asked if one.recipe == "full")
    assert min(b / a for a, b in zip(rates, rates[1:], strict=False)) > 1.01, "what runs is kept away from"


def test_the_search_is_the_same_for_the_same_seed(tmp_path):
    assert run(studies(tmp_path / "a", 14, 5)) == run(studies(tmp_path / "b", 14, 5)) != run(studies(tmp_path / "c", 14, 6))


def test_it_finds_the_best_feasible_where_random_does_not(tmp_path):
    def best(sampler, seed):
        asked = run(studies(tmp_path / f"{sampler}{seed}", 24, seed, sampler=sampler))
        return max((score for *_, score, rise in asked if rise <= 0), default=0.0)

    ours, random = ([best(sampler, seed) for seed in range(4)] for sampler in ("joint", "random"))
    assert np.median(ours) > np.median(random) and min(ours) > 0.79, (ours, random)  # the optimum is .82


def test_all_failed_and_all_stopped_searches_come_to_their_end(tmp_path):
    for state in ("failed", "stopped", "cancelled"):
        found = studies(tmp_path / state, 10)
        count = 0
        while (one := found.ask()) is not None:
            found.tell(one.trial_id, state)
            count += 1
        assert count == 10


# ---- adaptive allocation ----------------------------------------------------------------------------------------------------------


def test_a_new_best_is_run_on_the_second_seed_before_it_counts(tmp_path):
    found, seen, before = studies(tmp_path, 30, allocation="adaptive"), [], []
    while (one := found.ask()) is not None:
        score, rise = world(one.recipe, one.params)
        point = (one.recipe, joint.key(one.params))
        if one.seed is not None:
            assert one.seed == 2, "none of search.seeds"
            assert point in seen and point not in [p for p, _ in before], "only what was tried, once"
            assert score > max((s for _, s in before), default=-1.0)
            before.append((point, score))
        else:
            assert point not in seen
        seen.append(point)
        found.tell(one.trial_id, "complete", score, {NAMES[0]: rise, NAMES[1]: -0.1})
    assert len(seen) == 30 and before, "they count as trials"


def test_two_seeds_are_two_measurements_and_a_best_that_fails_on_the_second_is_none():
    params = {"learning_rate": 1e-3}
    good, bad = Known("full", params, {"degradation": -0.2}, 0.9), Known("full", params, {"degradation": 6.0}, 0.9)
    model = Joint(SPACES, ["degradation"], [good])
    assert model.best is not None and Joint(SPACES, ["degradation"], [good, bad]).best is None
    other = Known("full", {"learning_rate": 2e-3}, {"degradation": -0.2}, 0.7)
    assert joint_search.new_best([good, other]) == good
    assert joint_search.new_best([good, bad, other]) == other
    assert joint_search.new_best([good, good, other]) is None
    assert joint_search.new_best([good, Known("full", params, running=True), other]) is None, "its second seed runs"


def test_what_cannot_hold_the_best_is_left_out_and_the_reason_is_said(tmp_path):
    found = studies(tmp_path, 24, allocation="adaptive")
    asked = []
    while (one := found.ask()) is not None:
        score, rise = world(one.recipe, one.params)
        score, rise = (0.3, 0.6) if one.recipe == "full" else (score, rise)
        asked.append(one.recipe)
        found.tell(one.trial_id, "complete", score, {NAMES[0]: rise, NAMES[1]: -0.1})
    assert "full is left out after" in found.notes["full"] and "below 0.05" in found.notes["full"] and "other" not in found.notes
    assert asked.count("full") <= 2 < 6 < asked.count("other")


def test_an_adaptive_search_goes_on_after_a_crash_as_if_nothing_had_happened(tmp_path):
    whole = studies(tmp_path / "a", 24, allocation="adaptive")
    straight, past = [], []
    while (one := whole.ask()) is not None:
        score, rise = world(one.recipe, one.params)
        straight.append((one.trial_id, one.recipe, one.params, one.seed))
        past.append(Past(one.trial_id, one.recipe, one.params, ("complete", score, {NAMES[0]: rise, NAMES[1]: -0.1}), seed=one.seed))
        whole.tell(one.trial_id, *past[-1].outcome)
    assert any(seed is not None for *_, seed in straight[:15])
    for known in (5, 15):
        begun = studies(tmp_path / f"b{known}", 24, allocation="adaptive")
        made = config.from_dict({"search": {"trials": 24, "allocation": "adaptive"}, "output": {"dir": str(tmp_path / f"b{known}")}})
        spaces = {name: recipe.space for name, recipe in begun._recipes.items()}
        running = dataclasses.replace(past[known], outcome=None)
        again = Studies.restore(made, spaces, NAMES, Earlier([*past[:known], running], 0, lambda line: None))
        rest = []
        while (one := again.ask()) is not None:
            rest.append((one.trial_id, one.recipe, one.params, one.seed))
            score, rise = world(one.recipe, one.params)
            again.tell(one.trial_id, "complete", score, {NAMES[0]: rise, NAMES[1]: -0.1})
        assert rest == straight[known:]


def test_adaptive_allocation_needs_the_model_over_all_recipes(tmp_path):
    with pytest.raises(ConfigError, match="set search.sampler=auto"):
        config.from_dict({"search": {"allocation": "adaptive", "sampler": "tpe"}})
