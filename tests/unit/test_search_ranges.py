"""Ranges of the search: strategies' own spaces, pins, and what the user writes on top."""

from __future__ import annotations

import math

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator import config
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.search.spaces import RecipeSpace, inside, parse_range, resolve_space


class Provider:
    """Stands for `search_spaces`: every recipe has the rate, lora two knobs, freeze_layers one that depends on the model."""

    @staticmethod
    def space(strategies, *, num_layers, learning_rate):
        space = {"learning_rate": FloatDistribution(learning_rate / 10, learning_rate * 10, log=True)}
        if "lora" in strategies:
            space |= {"lora.lora_r": CategoricalDistribution([4, 8, 16]), "lora.lora_alpha": IntDistribution(4, 64)}
            space["lora.kind"] = CategoricalDistribution(["gaussian", "zero"])
        if "freeze_layers" in strategies:
            space["freeze_layers.start"] = IntDistribution(0, num_layers - 1)
        return space

    @staticmethod
    def defaults(strategies, *, num_layers, learning_rate):
        defaults = {"learning_rate": learning_rate}
        if "lora" in strategies:
            defaults |= {"lora.lora_r": 8, "lora.lora_alpha": 16}
        if "freeze_layers" in strategies:
            defaults["freeze_layers.start"] = 1
        return defaults

    @staticmethod
    def superseded(strategies, pinned):
        return set()


def spaces(recipes, space=None, num_layers=4):
    experiment = config.from_dict({"recipes": recipes, "search": {"space": space or {}}, "training": {"learning_rate": 1e-3}})
    return resolve_space(experiment, num_layers, Provider)


def test_each_recipe_gets_its_own_space_and_defaults():
    found = spaces([["full"], ["freeze_layers", "lora"]], num_layers=6)
    assert set(found["full"].distributions) == {"learning_rate"}
    both = found["freeze_layers+lora"]
    assert both.distributions["freeze_layers.start"].high == 5
    assert both.defaults == {"learning_rate": 1e-3, "lora.lora_r": 8, "lora.lora_alpha": 16, "freeze_layers.start": 1}


def test_a_knob_pinned_in_the_recipe_is_never_sampled():
    found = spaces([[{"lora": {"lora_r": 4}}]])["lora"]
    assert "lora.lora_r" not in found.distributions and "lora.lora_r" not in found.defaults and "lora.lora_r" not in found.fixed


def test_a_bare_value_pins_and_a_range_replaces_in_every_recipe_that_has_the_parameter():
    found = spaces([["full"], ["lora"]], {"learning_rate": 5e-4, "lora.lora_r": {"choices": [2, 4]}})
    assert found["full"].distributions == {} and found["full"].fixed == {"learning_rate": 5e-4}
    assert found["lora"].fixed == {"learning_rate": 5e-4}
    assert found["lora"].distributions["lora.lora_r"].choices == (2, 4)
    assert found["lora"].defaults == {"lora.lora_alpha": 16}, "8 is not offered any more, so the default is left to the sampler"


def test_defaults_are_moved_inside_the_users_range():
    alpha = {"low": 20, "high": 60, "step": 8}
    found = spaces([["lora"]], {"learning_rate": {"low": 1e-5, "high": 1e-4, "log": True}, "lora.lora_alpha": alpha})["lora"]
    assert found.distributions["learning_rate"] == FloatDistribution(1e-5, 1e-4, log=True)
    assert found.defaults["learning_rate"] == 1e-4 and found.defaults["lora.lora_alpha"] == 20


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora.lora_q", 4, "lora.lora_r"),
        ("learning_rat", 1e-3, "learning_rate"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(key, value, said):
    with pytest.raises(UnknownNameError, match=said):
        spaces([["full"], ["lora"]], {key: value})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("learning_rate", {"low": 1e-3}, "needs `low` and `high`"),
        ("learning_rate", {"low": 1e-3, "high": 1e-4}, "search.space.learning_rate"),
        ("learning_rate", {"low": 0, "high": 1e-4, "log": True}, "search.space.learning_rate"),
        ("learning_rate", [1e-3, 1e-4], "choices"),
        ("learning_rate", "fast", "not a number"),
        ("learning_rate", True, "not a number"),
        ("learning_rate", {"choices": []}, "at least one"),
        ("learning_rate", {"lo": 1, "high": 2}, "low"),
        ("lora.lora_alpha", {"low": 1.5, "high": 4}, "whole number"),
        ("lora.lora_alpha", {"low": 1, "high": 4, "type": "float"}, "type int"),
        ("lora.lora_r", {"low": 1, "high": 4}, "choices"),
        ("lora.lora_r", 4.5, "whole number"),
        ("lora.kind", "flat", "gaussian"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused_in_words(key, value, said):
    with pytest.raises(ConfigError, match=said):
        spaces([["lora"]], {key: value})


def test_an_override_of_a_pinned_knob_says_where_it_is_pinned():
    with pytest.raises(ConfigError, match="pins this knob"):
        spaces([[{"lora": {"lora_r": 4}}]], {"lora.lora_r": {"choices": [4, 8]}})


@pytest.mark.parametrize(
    ("distribution", "size"),
    [
        (CategoricalDistribution([1, 2, 3]), 3),
        (IntDistribution(1, 10, step=3), 4),
        (FloatDistribution(0.0, 1.0, step=0.25), 5),
        (FloatDistribution(0.5, 0.5), 1),
        (FloatDistribution(0.0, 1.0), math.inf),
    ],
)
def test_size_counts_the_points_of_a_space(distribution, size):
    assert RecipeSpace("r", {"x": distribution, "y": CategoricalDistribution(["a", "b"])}, {}, {}).size == 2 * size


def test_size_of_an_empty_space_is_one_point():
    assert RecipeSpace("r", {}, {}, {}).size == 1


@pytest.mark.parametrize("value", [-3, 0, 1, 2, 5, 9, 10, 14])
@pytest.mark.parametrize("distribution", [IntDistribution(0, 10, step=5), IntDistribution(1, 9, log=True), FloatDistribution(0.0, 1.0, step=0.1)])
def test_inside_always_gives_a_point_of_the_distribution(value, distribution):
    assert distribution._contains(distribution.to_internal_repr(inside(distribution, value)))


def test_parse_range_keeps_the_strategys_type():
    assert parse_range("x", {"low": 1, "high": 4}, FloatDistribution(0, 1)) == FloatDistribution(1.0, 4.0)
    assert parse_range("x", {"low": 1, "high": 4}, IntDistribution(0, 1)) == IntDistribution(1, 4)
