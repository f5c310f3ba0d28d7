"""Search spaces: every sample is a valid recipe, defaults lie inside, rates have the right scale."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import search_spaces
import strategies
from strategies.base import StrategyError
from strategies.recipe import build, check


def composes(recipe) -> bool:
    """Whether a recipe of these strategies is allowed at all: recipes that never are have tests of their own."""
    try:
        build([(name, {}) for name in recipe])
    except StrategyError:
        return False
    return True


RECIPES = [recipe for n in (1, 2) for recipe in itertools.permutations(strategies.STRATEGIES, n) if composes(recipe)]
NEEDS = {"safety", "harmful", "unaligned_base", "reference"}


def sample(draw, distribution):
    if isinstance(distribution, CategoricalDistribution):
        return draw(st.sampled_from(distribution.choices))
    if isinstance(distribution, IntDistribution):
        return draw(st.integers(distribution.low, distribution.high))
    assert isinstance(distribution, FloatDistribution)
    return draw(st.floats(distribution.low, distribution.high))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_sample_is_a_valid_recipe(data):
    recipe = data.draw(st.sampled_from(RECIPES))
    layers = data.draw(st.integers(2 if {"freeze_layers", "lora"} <= set(recipe) else 1, 90))  # one layer cannot be both
    space = search_spaces.space(recipe, num_layers=layers, learning_rate=1e-3)
    params = {name: sample(data.draw, distribution) for name, distribution in space.items()}
    knobs, training = search_spaces.to_spec(recipe, params)
    assert set(knobs) == set(recipe) and set(training) == {"learning_rate"}
    warnings = check([(name, knobs[name]) for name in recipe], min(strategies.get(name).max_zero_stage for name in recipe), 2, layers, NEEDS)
    assert all("both change the trained weights" in warning for warning in warnings)


def test_a_sampled_freeze_range_never_leaves_the_model():
    for layers in range(1, 100):
        space = search_spaces.space(["freeze_layers"], num_layers=layers, learning_rate=1e-3)
        start, width = space["freeze_layers.start"], space["freeze_layers.width"]
        assert 0 <= start.low <= start.high and width.low >= 1
        assert start.high + width.high <= layers


def test_the_learning_rate_is_searched_around_the_configured_one():
    full = search_spaces.space(["full"], num_layers=8, learning_rate=2e-3)["learning_rate"]
    assert (full.low, full.high, full.log) == (5e-4, 8e-3, True)
    assert search_spaces.defaults(["safegrad"], num_layers=8, learning_rate=2e-3)["learning_rate"] == 2e-3


def test_lora_is_searched_on_its_own_scale():
    for recipe in (["lora"], ["freeze_layers", "lora"]):
        rate = search_spaces.space(recipe, num_layers=8, learning_rate=2e-3)["learning_rate"]
        assert (rate.low, rate.high) == pytest.approx((2.5e-3, 4e-2))
        assert search_spaces.defaults(recipe, num_layers=8, learning_rate=2e-3)["learning_rate"] == pytest.approx(1e-2)


def test_the_low_rate_control_is_a_tenth_also_beside_lora():
    for recipe, wanted in ((["low_rate"], 2e-4), (["low_rate", "lora"], 1e-3), (["lora", "low_rate"], 1e-3)):
        rate = search_spaces.space(recipe, num_layers=8, learning_rate=2e-3)["learning_rate"]
        assert (rate.low, rate.high) == pytest.approx((wanted / 4, wanted * 4))
        assert search_spaces.defaults(recipe, num_layers=8, learning_rate=2e-3)["learning_rate"] == pytest.approx(wanted)


def test_defaults_are_the_papers():
    found = search_spaces.defaults(["freeze_layers", "safegrad"], num_layers=32, learning_rate=1e-3)
    assert (found["freeze_layers.start"], found["freeze_layers.width"]) == (9, 6)  # Llama-2-7b-chat: 9 to 14
    assert (found["safegrad.rho"], found["safegrad.temperature"]) == (1.0, 1.0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no search space for strategy 'zzz'; add search_spaces/zzz.py"):
        search_spaces.space(["zzz"], num_layers=8, learning_rate=1e-3)
    with pytest.raises(ValueError, match="belongs to none"):
        search_spaces.to_spec(["full"], {"lora.lora_r": 4})
    with pytest.raises(ValueError, match="must be above 0"):
        search_spaces.space(["full"], num_layers=8, learning_rate=0.0)


def test_a_knob_without_effect_is_not_searched():
    assert search_spaces.superseded(["freeze_layers", "lora"], {"freeze_layers.end"}) == {"freeze_layers.width"}
    assert search_spaces.superseded(["freeze_layers", "lora"], {"freeze_layers.start"}) == set()


def test_a_located_range_leaves_nothing_of_it_to_search():
    assert search_spaces.superseded(["freeze_layers", "lora"], {"freeze_layers.range"}) == {"freeze_layers.start", "freeze_layers.width"}
    assert search_spaces.superseded(["freeze_layers"], {"freeze_layers.end"}) == {"freeze_layers.width"}
