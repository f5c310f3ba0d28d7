"""Hidden states at blocks are found, changed and read whatever else a block returns; in shells those of the text alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import toy
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import shells
import tiny

from strategies import block_outputs, blocks, locate, trying
from strategies.base import StrategyError
from strategies.plain import PlainEngine
from strategies.recipe import build


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"xlstm"}))  # its kernel takes some lengths only, so it is refused altogether
def test_every_family_gives_hidden_states_that_carry(family):
    model = tiny.model(family)
    places = block_outputs.places(model, "sap")
    assert len(places) == blocks.of(model).count and {place.width for place in places} == {32}
    block_outputs.check_carries(model, range(len(places)), places, "sap")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_a_place_reads_and_replaces_and_keeps_the_kind():
    hidden, other = torch.ones(2, 3, 4), torch.zeros(1)
    assert block_outputs.Place(None, 4).of(hidden) is hidden and block_outputs.Place(None, 4).replaced(hidden, other) is other
    place = block_outputs.Place(1, 4)
    assert place.of((other, hidden)) is hidden
    assert place.replaced((other, hidden), other) == (other, other) and place.replaced([other, hidden], other) == [other, other]


class Tuples(nn.Module):
    """A block that gives its hidden states behind another tensor of the same shape."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, hidden, **kwargs):
        return torch.zeros_like(hidden), self.own(hidden, **kwargs)


def test_hidden_states_are_what_the_next_block_is_given():
    model = toy.model().eval()
    layers = model.model.layers
    for i in range(len(layers)):
        layers[i] = Tuples(layers[i])

    def forward(input_ids=None, attention_mask=None, **kwargs):  # a decoder that takes the second of what its blocks give
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = model.model.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        turns = model.model.rotary_emb(hidden, places)
        for layer in model.model.layers:
            _, hidden = layer(hidden, attention_mask=None, position_embeddings=turns, position_ids=places)
        return BaseModelOutputWithPast(last_hidden_state=model.model.norm(hidden))

    model.model.forward = forward
    places = block_outputs.places(model, "sap")
    assert [place.index for place in places[:-1]] == [1, 1]
    block_outputs.check_carries(model, range(2), places, "sap")
    with pytest.raises(StrategyError, match=r"what this model says does not depend on it at layer 0 \(Tuples\); leave sap out"):
        block_outputs.check_carries(model, [0], [block_outputs.Place(0, 32)], "sap")


def test_blocks_without_hidden_states_are_refused_in_a_sentence():
    model = toy.model().eval()
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output[None])  # as where several streams are stacked
    model.model.layers[2].register_forward_pre_hook(lambda module, inputs: (inputs[0][0], *inputs[1:]))
    recipe = build([("sap", {"num_pairs": 2})])
    recipe.prepare_data(toy.data())
    for ask in (recipe.setup, recipe.strategies[0].check_model, locate.alike):
        with pytest.raises(StrategyError, match="LlamaDecoderLayer of this model gives none of the shape") as caught:
            ask(model)
        assert "\n" not in str(caught.value)


def test_blocks_of_unlike_width_cannot_be_compared(monkeypatch):
    monkeypatch.setattr(block_outputs, "places", lambda model, owner: (block_outputs.Place(None, 8), block_outputs.Place(None, 4)))
    with pytest.raises(StrategyError, match=r"are 4 to 8 wide; give freeze_layers\.start and end"):
        locate.alike(toy.model())


@pytest.mark.parametrize("family", ["openai-gpt", "rwkv", "mamba", "llama"])
def test_activations_do_not_depend_on_the_rows_beside(family):
    """No state is kept from row to row, and padding does not show."""
    model, data = tiny.model(family), toy.data()
    together = locate.last_token_states(model, data.task[:6], data)
    data.per_device_batch_size = 1
    torch.testing.assert_close(together, locate.last_token_states(model, data.task[:6], data), atol=1e-4, rtol=1e-4)


def test_no_cache_is_kept_wherever_a_model_would_keep_one():
    assert trying.options(tiny.model("rwkv")) == trying.options(tiny.model("granitemoe")) == {"use_cache": False}
    assert trying.options(tiny.model("openai-gpt")) == {} and trying.options(shells.gemma3()) == {"use_cache": False}


RECIPES = {
    "enchtable": {"harmful_steps": 2, "harmful_rank": 2, "modules": "attention_mlp"}, "sap": {"num_pairs": 4, "pairs_per_step": 2},
    "freeze_layers": {"start": 1, "end": 1}, "lisa": {}, "sbr": {"num_anchors": 2}, "safegrad": {"num_safety": 4, "safety_batch_size": 2},
    "spard": {"share": 0.1}, "curvature_restore": {"steps": 1, "num_rows": 4}, "one_shot_patch": {"steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("shell", shells.SHELLS)
def test_methods_act_on_the_text_of_a_shell_alone(shell):
    start = {name: p.detach().clone() for name, p in shells.SHELLS[shell]().named_parameters()}
    for name, knobs in RECIPES.items():
        model = shells.SHELLS[shell]().train()
        recipe = build([(name, knobs)])
        data = recipe.prepare_data(toy.data(weights={"aligned": start}, fingerprint=shell))
        engine = PlainEngine(recipe.setup(model), training=toy.settings(), max_steps=1)
        recipe.step(engine, data.batches(data.task, 0), 0)
        engine.step()
        recipe.after_step(engine, 0)
        after = dict(recipe.finish(engine.export()).named_parameters())
        assert all(torch.isfinite(p).all() for p in after.values())
        assert {one for one in start if not torch.equal(start[one], after[one])} <= {one for one in start if shells.of_text(one)}, name
        if name == "freeze_layers":
            frozen = set(recipe.strategies[0]._hashes)
            assert frozen and all(shells.of_text(one) and ".layers.1." in one for one in frozen)
        if name == "enchtable":
            assert recipe.facts()[name]["linearised_modules"] == 6 and all(shells.of_text(one) for one in recipe.strategies[0].safety)
        if name == "sap":
            assert recipe.strategies[0].layers == list(blocks.of(model).modules[1:3])
