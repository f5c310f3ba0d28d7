"""freeze_layers, lora, and the two together."""

from __future__ import annotations

import pytest
import torch
import toy

from strategies import blocks, lora_targets
from strategies.base import StrategyError
from strategies.freeze_layers import FreezeLayers, fallback_range, frozen_tensors, tensor_hash
from strategies.lora import Lora, parse_layers
from strategies.plain import PlainEngine
from strategies.recipe import build, check


def after_training(items, steps=2, module=None):
    recipe = build(items)
    data = recipe.prepare_data(toy.data())
    engine = PlainEngine(recipe.setup(module or toy.model(layers=4)), training=toy.settings(), max_steps=steps)
    for step in range(steps):
        recipe.step(engine, data.batches(data.task, step), step)
        engine.step()
    return recipe, engine.export()


@pytest.mark.parametrize("modules", ["attention_mlp", "all", "attention", "mlp"])
def test_exactly_what_is_frozen_stays_bit_for_bit(modules):
    start = toy.weights(toy.model(layers=4))
    recipe, module = after_training([("freeze_layers", {"start": 1, "end": 2, "modules": modules})])
    recipe.finish(module)
    for name, weight in toy.weights(module).items():
        inside = ".layers.1." in name or ".layers.2." in name
        kinds = {"all": "", "attention": ".self_attn.", "mlp": ".mlp.", "attention_mlp": "_proj."}
        assert torch.equal(weight, start[name]) == (inside and kinds[modules] in name), name


def test_a_touched_frozen_tensor_is_found():
    recipe, module = after_training([("freeze_layers", {"start": 1, "end": 1})])
    recipe.finish(module)
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-7
    with pytest.raises(StrategyError, match=r"frozen tensor model\.layers\.1\.mlp\.up_proj\.weight was changed"):
        recipe.finish(module)


@pytest.mark.parametrize("order", [("freeze_layers", "lora"), ("lora", "freeze_layers")])
def test_adapters_spare_frozen_layers_in_either_order(order):
    knobs = {"freeze_layers": {"start": 1, "end": 2}, "lora": {"lora_r": 2}}
    recipe, module = after_training([(name, knobs[name]) for name in order])
    module = recipe.finish(module)
    inside = blocks.of(module)
    adapted = {inside.index(name) for name, _ in module.named_parameters() if "lora_A" in name}
    assert adapted == {0, 3}
    merged = toy.weights(module.merge_and_unload())
    start = toy.weights(toy.model(layers=4))
    for name in start:
        frozen = inside.index(name) in (1, 2)
        if frozen:
            assert torch.equal(merged[name], start[name])
    assert recipe.facts() == {"freeze_layers": {"frozen_tensors_proved": 18}, "lora": {"adapted_modules": 14}}


def test_an_adapter_on_a_frozen_module_is_found():
    recipe = build([("freeze_layers", {"start": 1, "end": 1}), ("lora", {})])
    recipe.prepare_data(toy.data())
    plain = build([("lora", {})])
    plain.prepare_data(toy.data())
    recipe.setup(toy.model())
    with pytest.raises(StrategyError, match="is frozen but carries an adapter"):
        recipe.strategies[0].finish(plain.setup(toy.model()))


def test_adapters_that_did_not_move_are_refused():
    recipe = build([("lora", {})])
    recipe.prepare_data(toy.data())
    with pytest.raises(StrategyError, match="no adapter moved"):
        recipe.finish(recipe.setup(toy.model()))


def test_an_adapted_model_starts_as_the_untouched_one():
    recipe = build([("lora", {"lora_r": 4})])
    recipe.prepare_data(toy.data())
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        wanted = toy.model().eval()(input_ids=ids).logits
        assert torch.equal(recipe.setup(toy.model()).eval()(input_ids=ids).logits, wanted)


def test_targets_are_linear_layers_of_the_blocks():
    module = toy.model(layers=2, tie=False)

    def names(layers=None, **knobs):
        return lora_targets.of(module, Lora.Config(**knobs), layers).modules

    assert len(names()) == 14
    assert names((1,), target_modules="q_proj, v_proj") == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    module.model.layers[0].requires_grad_(False)
    assert {blocks.of(module).index(n) for n in names(target_modules=("q_proj",))} == {1}


@pytest.mark.parametrize("value, wanted", [("2-4", (2, 3, 4)), ("0, 3-4", (0, 3, 4)), ((1, 0), (0, 1)), ("5", (5,)), (None, None)])
def test_layers_are_written_as_ranges_or_lists(value, wanted):
    assert parse_layers(value, 6) == wanted


@pytest.mark.parametrize("value, message", [("a-b", "not a list of layers"), ("6", "it has 6 layers, 0 to 5"), ("4-2", "names no layer")])
def test_layers_that_make_no_sense(value, message):
    with pytest.raises(StrategyError, match=message):
        parse_layers(value, 6)


@pytest.mark.parametrize(
    "knobs, layers, message",
    [
        ({"start": 2, "end": 8}, 8, r"layers 2 to 8 are outside the model, which has 8: 0 to 7"),
        ({"start": 8, "width": 2}, 8, "outside the model"),
        ({"start": 3, "end": 2}, 8, "is no range"),
        ({"start": 1}, 8, "give start with end or width"),
        ({"end": 1}, 8, "give start with end or width"),
        ({"start": 1, "width": 0}, 8, "at least 1"),
    ],
)
def test_ranges_that_make_no_sense(knobs, layers, message):
    with pytest.raises(StrategyError, match=message):
        check([("freeze_layers", knobs)], 0, 1, layers, set())


def test_ranges():
    assert FreezeLayers(FreezeLayers.Config(start=2, end=5)).range(8) == (2, 5)
    assert FreezeLayers(FreezeLayers.Config(start=2, width=3)).range(8) == (2, 4)
    assert FreezeLayers(FreezeLayers.Config(start=6, width=4)).range(8) == (6, 7)
    assert FreezeLayers(FreezeLayers.Config(start=2, end=5, width=1)).range(8) == (2, 5)
    assert fallback_range(32) == (9, 14)  # the paper's range for Llama-2-7b-chat
    for layers in range(1, 100):
        start, end = fallback_range(layers)
        assert 0 <= start <= end < layers
    assert check([("freeze_layers", {})], 0, 1, 8, set()) == [
        "freeze_layers: no range given, layers 2 to 4 of 8 are frozen unless the search finds better"
    ]


def test_freezing_everything_is_refused():
    module = toy.model(layers=2)
    module.model.embed_tokens.requires_grad_(False)
    module.model.norm.requires_grad_(False)
    recipe = build([("freeze_layers", {"start": 0, "end": 1, "modules": "all"})])
    with pytest.raises(StrategyError, match="nothing is left to train"):
        recipe.setup(module)
    everything = build([("freeze_layers", {"start": 0, "end": 1}), ("lora", {})])
    with pytest.raises(StrategyError, match="no module to adapt"):
        everything.setup(toy.model(layers=2))


@pytest.mark.parametrize(
    ("modules", "wanted"),
    [("all", 9), ("attention_mlp", 7), ("attention", 4), ("mlp", 3)],
)
def test_what_belongs_to_a_range(modules, wanted):
    module = toy.model(layers=4)
    found = frozen_tensors(module, 3, 3, modules)
    assert len(found) == wanted and all(name.startswith("model.layers.3.") for name in found)
    assert any("norm" in name for name in found) == (modules == "all")


def test_hashes_see_bits_types_and_shapes():
    a = torch.zeros(2, 3)
    assert tensor_hash(a) == tensor_hash(a.clone())
    assert len({tensor_hash(t) for t in (a, -a, a.reshape(3, 2), a.to(torch.bfloat16), a.to(torch.int32))}) == 5
