"""Every shipped experiment is valid, says where it comes from, and can be pointed at another model and other data."""

from __future__ import annotations

import pytest

import strategies.recipe
from orchestrator import config
from orchestrator.config import text
from orchestrator.experiment import checks
from orchestrator.search import spaces as ranges

LAYERS = 6


@pytest.mark.parametrize("name", text.presets())
def test_every_preset_is_valid(name):
    made = config.load(name)
    checks.check_names(made)
    checks.check_combinations(made)
    checks.check_recipes(made, None)
    assert made.name == name and text.presets()[name].read_text().startswith("# ")


@pytest.mark.parametrize(("name", "recipes", "actions"), [
    ("high", ("safegrad+freeze_layers",), {"rollback"}), ("medium", ("sap+lora", "safegrad+lora"), {"stop"}),
    ("experimental", ("freeze_layers",), {"add"}),
])  # fmt: skip
def test_the_risk_profiles_are_what_the_source_says_and_medium_has_what_protects_beside_it(name, recipes, actions):
    made = config.load(name)
    assert made.recipe_names == recipes and made.monitor.actions == actions
    if name != "medium":
        assert made.monitor.max_unsafe_rise == 0.05 and made.monitor.lr_factor == 0.5
    assert (name == "experimental") == (made.monitor.added == (("safegrad", {}),))


def test_the_cheap_form_is_ten_prompts_every_ten_steps_and_more_than_two():
    quick = config.load("medium").monitor.quick
    assert (quick.every_steps, quick.num_prompts, quick.max_unsafe, quick.on_breach) == (10, 10, 2, "stop")


def test_model_and_data_of_a_profile_can_be_replaced():
    suites = 'safety.suites=[{name: mine, data: prompts.csv}]'
    made = config.load("high", ["model.model_name_or_path=org/model", "model.unaligned_name_or_path=null", "task.data=mine.jsonl",
                                "task.eval_data=null", "safety.data=safe.jsonl", suites])  # fmt: skip
    assert not checks.uses_pocket(made) and made.recipe_names == ("safegrad+freeze_layers",)


def test_the_refusal_study_is_what_the_source_says():
    """The original, perturbation without training, refusal training, on harmful and harmless prompts; nothing is searched."""
    made = config.load("refusal_study")
    assert made.recipe_names == ("perturbation", "perturbation#2", "refusal_training+lora", "refusal_training+lora#2")
    assert {s.kind for s in made.safety.suites} == {"harmful", "benign"} and all(s.constrains for s in made.safety.suites)
    spaces = ranges.resolve_space(made, LAYERS)
    assert all(space.size == 1 and not space.distributions for space in spaces.values()) and made.search.trials == len(spaces)
    built = [strategies.recipe.build(config.recipe_items(recipe)) for recipe in made.recipes]
    assert [recipe.trains for recipe in built] == [False, False, True, True] and [recipe.wraps for recipe in built] == [True, True, False, False]


def test_the_refusal_study_can_be_pointed_at_other_data():
    suites = "safety.suites=[{name: harmful, data: llm_lat_harmful, limit: 5}, {name: benign, data: llm_lat_benign, limit: 5}]"
    words = ["model.model_name_or_path=org/model", "safety.data=LLM-LAT/harmful-dataset", "task.data=LLM-LAT/benign-dataset", "task.eval_data=null"]
    made = config.load("refusal_study", [*words, "task.limit=50", "task.metric=token_f1", suites, "search.space.learning_rate=2e-4"])
    assert not checks.uses_pocket(made) and [s.kind for s in made.safety.suites] == ["harmful", "benign"]
