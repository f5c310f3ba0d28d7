"""Which parameters are matrices and how they lie; adapters of experts read and replaced; updates of a mixture one matrix at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import toy
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from strategies import adapted, auxiliary, blocks, linear, lora, lora_targets, matrices, merging
from strategies.base import StrategyError

MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "jetmoe", "dbrx", "recurrent_gemma")
"""dbrx keeps its experts in flat matrices that another module reads."""


def family(name):
    with torch.random.fork_rng(devices=[]):
        return tiny.model(name)


def with_lora(model, **knobs):
    """Adapters as the method makes them, with factors that are not zero."""
    model = lora.Lora(lora.Lora.Config(lora_r=2, lora_alpha=6, **knobs)).setup(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def asked(model):
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def moved(model):
    """Adapters with an effect."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))


# ------------------------------------------------------------------------------------------------ what is a matrix, and how it lies


def test_orientation_is_seen_in_two_gradients_of_one_token():
    x, g, h = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    one, other = g[:, :, None] * x[:, None, :], h[:, :, None] * x[:, None, :]  # (3, d_out, d_in): the input stays, the loss differs
    assert matrices.orientation(one, other) is False
    assert matrices.orientation(one.mT, other.mT) is True
    assert matrices.orientation(torch.randn(5, 7), torch.randn(5, 7)) is None  # of full rank: not used as a matrix
    assert matrices.orientation(torch.zeros(5, 7), torch.zeros(5, 7)) is None
    assert matrices.orientation(one, 2 * one) is None  # two losses that are one show nothing


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_what_a_forward_shows_is_what_families_say_of_themselves(name, monkeypatch):
    model = family(name)
    told = {n: how for n, how in matrices.stored(model).items() if how.count}
    assert told
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            monkeypatch.setattr(module, "is_transposed", int(module.is_transposed))  # the same to the forward, but no answer
    monkeypatch.setattr(matrices, "_known", {})
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: how for n, how in matrices.stored(model).items() if how.count} == told
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()} and not any(p.grad is not None for p in model.parameters())


def test_what_maps_no_vectors_is_no_matrix():
    known = matrices.stored(family("mamba"))
    left = {n.rpartition("mixer.")[2] for n, p in family("mamba").named_parameters() if "mixer." in n and n not in known}
    assert left == {"A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias"}
    assert not any(name.endswith("bias") for name in matrices.stored(family("gpt_oss")))


def test_a_router_that_is_a_linear_layer_by_name_alone_is_none():
    model = family("llama4_text")
    router = model.model.layers[0].feed_forward.router
    assert isinstance(router, nn.Linear) and not matrices.is_linear(router)
    parts = ("mlp", "self_attention.experts")
    assert matrices.routers(family("jetmoe")) == {f"model.layers.{i}.{part}.router.layer" for i in range(3) for part in parts}


def test_names_of_matrices_come_apart_again():
    assert matrices.split(matrices.named("a.b", 12)) == ("a.b", 12)
    assert matrices.split(matrices.named("a.weight", None)) == ("a.weight", None)


# ------------------------------------------------------------------------------------------------ updates and adapters


@pytest.mark.parametrize("name", MIXTURES)
def test_updates_of_an_adapted_mixture_are_what_a_merge_adds(name):
    model = family(name)
    start = toy.weights(model)
    model = with_lora(model)
    found = {u.name: u for u in linear.updates(model, start)}
    merged = toy.weights(model.merge_and_unload())
    whole = {n: torch.zeros_like(p) for n, p in merged.items()}
    for update in found.values():
        parameter, index = matrices.split(update.name)
        place = whole[parameter] if index is None else whole[parameter][index]
        place.copy_(update.dense().T if update.transposed else update.dense())
    for n, p in merged.items():
        torch.testing.assert_close(p - start[n], whole[n], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_updates_of_a_whole_mixture_are_oriented_and_written_back(name):
    model = family(name)
    start = toy.weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    known, inside = matrices.stored(model), blocks.of(model)
    moved = {n for n in start if inside.holds(n)}
    found = list(linear.updates(model, start))
    assert {matrices.split(u.name)[0] for u in found} == moved
    assert {matrices.split(u.name)[0] for u in found if u.is_matrix} == {n for n in moved if n in known}
    batch = next(n for n, how in known.items() if how.count) if name != "dbrx" else None
    linear.edit(model, start, lambda u: u.times(2.0) if batch and u.name == f"{batch}[1]" else None)
    after = toy.weights(model)
    for n, p in after.items():
        if n == batch:
            torch.testing.assert_close(p[1] - start[n][1], 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))[1])


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("more", [0, 3])
def test_edited_adapters_of_a_mixture_survive_saving(name, more, tmp_path):
    """Some of the matrices get another update, of the same rank or of a higher one; what was saved answers as what is in memory does."""
    model = family(name)
    start = toy.weights(model)
    model = with_lora(model)
    before = {u.name: u.dense().clone() for u in linear.updates(model, start)}
    chosen = set(sorted(before)[::3])

    def change(update):
        if update.name not in chosen:
            return None
        half = update.times(0.5)
        ones = torch.ones(update.shape[0], more), torch.ones(more, update.shape[1])
        return linear.added(half, update.replaced(left=ones[0], right=ones[1])) if more else half

    model = linear.edit(model, start, change)
    assert hasattr(model, "peft_config")
    for update in linear.updates(model, start):
        wanted = before[update.name] * (0.5 if update.name in chosen else 1.0) + (more if update.name in chosen else 0.0)
        torch.testing.assert_close(update.dense(), wanted, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(family(name), tmp_path)
    torch.testing.assert_close(asked(again), asked(model), atol=2e-4, rtol=1e-4)


def test_one_dense_update_of_an_expert_makes_a_whole_model():
    model = family("qwen3_moe")
    start = toy.weights(model)
    model = with_lora(model)
    deltas = {u.name: u.dense().clone() for u in linear.updates(model, start)}
    name = "model.layers.1.mlp.experts.down_proj[2]"
    model = linear.edit(model, start, lambda u: u.replaced(full=torch.ones(u.shape)) if u.name == name else None)
    assert not hasattr(model, "peft_config")
    experts = dict(model.named_parameters())["model.layers.1.mlp.experts.down_proj"] - start["model.layers.1.mlp.experts.down_proj"]
    torch.testing.assert_close(experts[2].detach(), torch.ones_like(experts[2]))
    torch.testing.assert_close(experts[1].detach(), deltas["model.layers.1.mlp.experts.down_proj[1]"], atol=1e-5, rtol=1e-4)


def test_adapters_of_two_modules_are_not_written_at_once():
    model = with_lora(family("qwen3_moe"))
    two = [one for name, one in adapted.adapters(model).items() if name.endswith("[0]")][:2]
    with pytest.raises(ValueError, match="one module at a time"):
        adapted.write(model, {str(i): (one, *one.factors()) for i, one in enumerate(two)})


# ------------------------------------------------------------------------------------------------ what lora adapts


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_next", "ernie4_5_moe", "mixtral", "llama4_text", "flex_olmo"])
def test_every_linear_layer_and_expert_gets_an_adapter_and_nothing_else(name):
    model = family(name)
    inside, choosing = blocks.of(model), matrices.routers(model)
    owners = matrices.owners(model)
    wanted = {
        n for n, how in matrices.stored(model).items()
        if inside.holds(n) and n.removesuffix(".weight") not in choosing and (how.count or matrices.is_linear(owners[n][0]))
    }  # fmt: skip
    made = with_lora(model)
    assert {one.parameter for one in adapted.adapters(made).values()} == wanted


def test_frozen_layers_get_no_adapter_in_a_mixture():
    model = family("deepseek_v3")
    inside = blocks.of(model)
    for name, p in model.named_parameters():
        p.requires_grad_(inside.index(name) != 1)
    made = with_lora(model)
    assert {inside.index(one.parameter) for one in adapted.adapters(made).values()} == {0, 2}


def test_layers_whose_weight_is_read_past_them_are_left_out_and_said():
    method = lora.Lora(lora.Lora.Config())
    made = method.setup(family("mamba"))
    assert {one.parameter.split(".")[-2] for one in adapted.adapters(made).values()} == {"in_proj", "x_proj"}
    assert set(method.facts()["not_adapted"]) == {"dt_proj", "out_proj"}
    method = lora.Lora(lora.Lora.Config())
    method.setup(family("dbrx"))
    assert set(method.facts()["not_adapted"]) == {"v1", "w1", "w2"}
    method = lora.Lora(lora.Lora.Config())
    method.setup(family("recurrent_gemma"))  # its parent keeps the module's state in it, which a wrapper would hide
    assert set(method.facts()["not_adapted"]) == {"input_gate_weight", "recurrent_gate_weight"}


def test_weights_that_layers_share_get_no_adapter():
    """Each layer would have its own, and a merge would add all of them to one weight."""
    with torch.random.fork_rng(devices=[]):
        model = tiny.model("zamba2", num_hidden_layers=4, layers_block_type=["hybrid", "mamba", "hybrid", "mamba"])
    method = lora.Lora(lora.Lora.Config())
    made = method.setup(model)
    adapted_to = {name for name in adapted.adapters(made) if "shared_transformer" in name}
    assert all("adapter_list" in name for name in adapted_to) and "q_proj" in method.facts()["not_adapted"]
    moved(made)
    merging.merged(made)


def test_a_model_without_weights_can_be_counted():
    with torch.device("meta"):
        made = [lora.Lora(lora.Lora.Config()).setup(family(name)) for name in ("llama", "qwen3_moe", "llama4_text", "mamba")]
    assert all(any(p.requires_grad for p in model.parameters()) and all(p.is_meta for p in model.parameters()) for model in made)


@pytest.mark.parametrize(
    ("family_name", "knobs", "words"),
    [
        ("mamba", {"target_modules": "dt_proj"}, "reads its weight past it"),
        ("mamba", {"target_modules": ("in_proj", "out_proj")}, "out_proj cannot be adapted"),
        ("llama", {"target_modules": "q_proj,nope"}, "is called 'nope'; there are down_proj"),
        ("qwen3_moe", {"lora_dropout": 0.1}, "lora_dropout=0.1 cannot be had on"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_a_sentence(family_name, knobs, words):
    model = family(family_name)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(StrategyError, match=words) as error:
        lora_targets.of(model, lora.Lora.Config(**knobs), None)
    assert "\n" not in str(error.value) and [name for name, _ in model.named_modules()] == before


def test_named_targets_of_experts_and_routers():
    config = lora.Lora.Config(target_modules="gate_up_proj,gate")
    found = lora_targets.of(family("qwen3_moe"), config, (1,))
    assert found.names == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"}


# ------------------------------------------------------------------------------------------------ side trainings


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_a_side_training_moves_experts_as_merged_factors_would(name):
    model = family(name)
    before = toy.weights(model)
    rows = toy.rows(8, 1)
    factors = auxiliary.train(model, rows, toy.data(), auxiliary.Plan(steps=2, learning_rate=1e-2, rank=2))
    assert toy.identical(before, toy.weights(model)) and list(dict(model.named_parameters())) == list(before)
    experts = {n: pair for n, pair in factors.items() if "[" in n}
    assert experts and any(left.count_nonzero() for left, _ in experts.values())
    owners = auxiliary.block_batches(model)
    batched = {
        n: tuple(torch.stack([factors[f"{n}[{i}]"][side] for i in range(how.count)]) for side in (0, 1)) for n, (_, _, how) in owners.items()
    }  # fmt: skip
    with auxiliary._filled(owners, batched):
        inside = asked(model)
    with torch.no_grad():
        for n, (module, leaf, how) in owners.items():
            change = batched[n][0] @ batched[n][1]
            getattr(module, leaf).add_(change.mT if how.transposed else change)
    torch.testing.assert_close(inside, asked(model))
