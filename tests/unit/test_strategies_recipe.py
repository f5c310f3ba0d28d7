"""Recipes: composition, refusals, types of knobs; safe_instruct's mixture; cards."""

from __future__ import annotations

import pytest
import toy

import strategies
from strategies import cards, safe_instruct
from strategies.base import Strategy, StrategyError
from strategies.recipe import Recipe, build, check


def test_the_order_of_the_list_does_not_matter_for_setup():
    names = [s.name for s in sorted(build([("lora", {}), ("freeze_layers", {}), ("safegrad", {})]).strategies, key=lambda s: s.setup_rank)]
    assert names == ["safegrad", "freeze_layers", "lora"]


def test_an_empty_recipe_is_plain_fine_tuning():
    recipe, data = build([]), toy.data()
    assert recipe.prepare_data(data) is data and recipe.state_dict() == {} and recipe.names == ()


class Other(Strategy):
    name = "other"

    def step(self, engine, batches, step):
        return {"loss": 0.0}


def test_two_owners_of_the_step_are_refused():
    with pytest.raises(StrategyError, match="safegrad and other both replace a step's gradient"):
        Recipe([build([("safegrad", {})]).strategies[0], Other(config=object())])


@pytest.mark.parametrize(
    "items, message",
    [
        ([("lora", {}), ("lora", {})], "names lora twice"),
        ([("full", {}), ("lora", {})], "full trains every weight and lora none"),
        ([("lara", {})], "unknown strategy 'lara'; did you mean 'lora'"),
        ([("zzz", {})], "known: .*freeze_layers, full, .*lora, .*safe_instruct, .*safegrad"),
        ([("lora", {"rank": 4})], "unknown knob of lora 'rank'"),
        ([("lora", {"lora_rr": 4})], "did you mean 'lora_r'"),
        ([("full", {"x": 1})], "full has no knobs"),
        ([("lora", {"lora_r": "eight"})], "lora.lora_r='eight' is not a whole number"),
        ([("lora", {"lora_r": 2.5})], "lora.lora_r=2.5 is not a whole number"),
        ([("lora", {"lora_r": True})], "lora.lora_r=True is not a whole number"),
        ([("lora", {"lora_r": 0})], "at least 1"),
        ([("lora", {"lora_dropout": 1.0})], r"must be in \[0, 1\)"),
        ([("safegrad", {"loss": "KL"})], "safegrad.loss='KL' is not one of kl, sft"),
        ([("safegrad", {"projection": "maybe"})], "is not true or false"),
        ([("safe_instruct", {"share": 2})], "not between 0 and 1"),
        ([("safegrad", {"rho": None})], "safegrad.rho=None is not a number"),
    ],
)
def test_refusals_name_the_value_and_the_remedy(items, message):
    with pytest.raises(StrategyError, match=message):
        build(items)


def test_values_are_coerced_to_the_declared_type():
    config = build([("safegrad", {"rho": "3e-1", "num_safety": 20.0, "safety_batch_size": "4", "projection": "False"})]).strategies[0].config
    assert (config.rho, config.num_safety, config.safety_batch_size, config.projection) == (0.3, 20, 4, False)
    config = build([("lora", {"layers": [0, "1"], "target_modules": ["q_proj"], "lora_alpha": 8})]).strategies[0].config
    assert (config.layers, config.target_modules, config.lora_alpha) == ((0, 1), ("q_proj",), 8.0)
    assert build([("lora", {"layers": None})]).strategies[0].config.layers is None


def test_check_asks_for_what_is_missing():
    with pytest.raises(StrategyError, match="safegrad needs safety rows: give safety.data"):
        check([("safegrad", {})], 0, 1, 8, set())
    assert check([("safegrad", {}), ("lora", {})], 3, 2, 8, {"safety"}) == []


def test_check_refuses_a_stage_with_its_reason(monkeypatch):
    cls = strategies.get("safegrad")
    monkeypatch.setattr(cls, "max_zero_stage", 1)
    monkeypatch.setattr(cls, "zero_reason", "because")
    with pytest.raises(StrategyError, match="up to ZeRO stage 1, not 2: because; set deepspeed.zero_optimization.stage=1"):
        check([("safegrad", {})], 2, 1, None, {"safety"})


def test_state_of_another_recipe_is_refused():
    with pytest.raises(StrategyError, match="checkpoint is of the recipe"):
        build([("safegrad", {})]).load_state_dict({"lora": {}})


def test_mixture_has_the_share_and_the_seed():
    data = toy.data()
    mixed = build([("safe_instruct", {"share": 0.25})])
    rows = mixed.prepare_data(data).task
    assert rows[:40] == data.task and len(rows) == 50
    assert len(set(r.id for r in rows[40:])) == 10 and {r.kind for r in rows[40:]} <= {"refusal", "harmless"}
    assert mixed.facts() == {"safe_instruct": {"safety_rows_mixed": 10}}
    assert data.task == toy.data().task  # the caller's data is untouched
    many = safe_instruct.mix(data.task, data.safety, 1.0, 0)
    counts = [sum(r.id == s.id for r in many[40:]) for s in data.safety]
    assert set(counts) == {2}  # 40 of 20 rows: each twice
    assert safe_instruct.mix(data.task, data.safety, 0.25, 1) != safe_instruct.mix(data.task, data.safety, 0.25, 2)


def test_share_zero_returns_the_very_data_and_no_safety_rows_are_refused():
    data = toy.data(safety=())
    assert build([("safe_instruct", {"share": 0})]).prepare_data(data) is data
    with pytest.raises(StrategyError, match="give safety.data"):
        build([("safe_instruct", {})]).prepare_data(data)


def test_cards_refuse_missing_and_empty_headings():
    with pytest.raises(ValueError, match="headings are Stage, Idea; they must be"):
        cards.parse("Title.\n\nStage: a\nIdea: b", "x.py")
    text = "Title.\n\n" + "\n".join(f"{h}: text" for h in cards.HEADINGS)
    assert cards.parse(text)["Limits"] == "text"
    with pytest.raises(ValueError, match="nothing under Limits"):
        cards.parse(text.replace("Limits: text", "Limits:"))
    with pytest.raises(StrategyError, match="did you mean 'lora'"):
        cards.card("lorra")


def test_adapters_on_frozen_layers_alone_are_refused_before_a_device_is_taken():
    frozen = ("freeze_layers", {"start": 0, "end": 3})
    with pytest.raises(StrategyError, match="narrow freeze_layers"):
        check([frozen, ("lora", {})], zero_stage=0, num_workers=1, num_layers=4, available=set())
    with pytest.raises(StrategyError, match="narrow freeze_layers"):
        check([("lora", {"layers": "2-3"}), frozen], zero_stage=0, num_workers=1, num_layers=6, available=set())
    assert check([frozen, ("lora", {})], zero_stage=0, num_workers=1, num_layers=6, available=set()) == []


def test_a_recipe_that_trains_nothing_has_no_method_that_changes_weights():
    assert build([("lora", {})]).trains and build([("perturbation", {})]).trains
    assert not build([("perturbation", {"train": False})]).trains
    for other in ("lora", "full", "safe_lora", "safegrad"):
        with pytest.raises(StrategyError, match=f"perturbation.train=false leaves the weights untouched, so {other} cannot"):
            build([("perturbation", {"train": "false"}), (other, {})])
