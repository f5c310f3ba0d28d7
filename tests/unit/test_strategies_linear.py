"""Reading and replacing weight updates: orientation, adapters of other ranks that survive saving, whole models, nothing touched by None."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import blocks, linear
from strategies.base import StrategyError
from strategies.updates import Update

SIZES = st.integers(1, 6)


def gpt2(seed=0):
    """A model whose linear layers store their weight as (d_in, d_out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)).train()


def adapted(module, *, r=2, alpha=6, seed=3, **more):
    """LoRA on every linear layer of the blocks, with factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    targets = [name.removesuffix(".weight") for name in (f"{n}.weight" for n in linear.block_linears(module))]
    transposed = type(module.get_submodule(targets[0])).__name__ == "Conv1D"
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=transposed, **more)
    model = get_peft_model(module, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def moved(module, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return module


def merged_deltas(model, start):
    """{name: stored-orientation change} of an adapted model, by peft's own arithmetic."""
    whole = dict(model.merge_and_unload().named_parameters())
    return {name: whole[name].detach() - weight for name, weight in start.items() if not torch.equal(whole[name], weight)}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None]).logits


def low_rank(name="x", d_out=5, d_in=4, r=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Update(name, left=torch.randn(d_out, r, generator=generator), right=torch.randn(r, d_in, generator=generator))


# ------------------------------------------------------------------------------------------------ arithmetic


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_low_rank_shortcuts_are_the_multiplied_out_ones(d_out, d_in, r_a, r_b, seed):
    a, b = low_rank(d_out=d_out, d_in=d_in, r=r_a, seed=seed), low_rank(d_out=d_out, d_in=d_in, r=r_b, seed=seed + 100)
    x, y = a.dense().double(), b.dense().double()
    assert linear.norm(a) == pytest.approx(float(x.norm()), rel=1e-5, abs=1e-5)
    assert linear.inner(a, b) == pytest.approx(float((x * y).sum()), rel=1e-4, abs=1e-4)
    assert linear.similarity(a, b) == pytest.approx(linear.cosine(x, y), abs=1e-4)
    total = linear.added(a, b, 2.0, -0.5)
    assert total.low_rank and total.left.shape[1] == r_a + r_b
    torch.testing.assert_close(total.dense(), (2 * x - 0.5 * y).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.times(3.0).dense(), 3 * a.dense())
    dense = Update("x", full=b.dense())
    torch.testing.assert_close(linear.added(a, dense, 2.0, -0.5).full, (2 * x - 0.5 * y).float(), atol=1e-4, rtol=1e-4)


def test_a_direction_without_length_is_refused_and_a_zero_vector_has_no_angle():
    with pytest.raises(ValueError, match="zero"):
        linear.onto(torch.zeros(3, 3), torch.ones(3, 2))
    assert linear.similarity(low_rank().times(0.0), low_rank()) == 0.0
    assert linear.cosine(torch.zeros(3), torch.ones(3)) == 0.0


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("build", [toy.model, gpt2])
def test_the_updates_of_adapters_are_what_peft_merges(build):
    start = toy.weights(build())
    model = adapted(build())
    found = {u.name: u for u in linear.updates(model, start)}
    expected = merged_deltas(model, start)
    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert found[name].transposed == (build is gpt2) and found[name].low_rank
        torch.testing.assert_close(found[name].dense(), delta.T if build is gpt2 else delta, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("build", [toy.model, gpt2])
def test_the_updates_of_a_whole_model_are_the_differences_inside_the_blocks(build):
    start, module = toy.weights(build()), moved(build())
    found = {u.name: u for u in linear.updates(module, start)}
    assert set(found) == {name for name in start if blocks.of(module).holds(name)}
    transposed = {name for name, u in found.items() if u.transposed}
    assert bool(transposed) == (build is gpt2) and all(start[n].ndim == 2 for n in transposed)
    for name, p in module.named_parameters():
        if name in found:
            delta = (p - start[name]).detach()
            torch.testing.assert_close(found[name].full, delta.T if name in transposed else delta)


def test_weights_that_did_not_move_and_adapters_at_zero_are_no_updates():
    start, module = toy.weights(toy.model()), toy.model()
    assert list(linear.updates(module, start)) == []
    model = adapted(toy.model())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and "layers.0" in name:
                p.zero_()
    assert all("layers.0" not in u.name for u in linear.updates(model, start))


def test_alignment_comes_in_the_updates_orientation():
    start = toy.weights(gpt2())
    before = {name: weight - torch.arange(weight.numel()).reshape(weight.shape) for name, weight in start.items()}
    update = next(u for u in linear.updates(moved(gpt2()), start) if u.name.endswith("c_fc.weight"))
    direction = linear.alignment(update, start, before)
    assert direction.shape == update.shape == (64, 16)
    torch.testing.assert_close(direction, torch.arange(16 * 64.0).reshape(16, 64).T, atol=1e-4, rtol=1e-4)
    assert linear.alignment(update, start, start) is None


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_model_of_another_form_is_refused_by_name(change):
    start, name = toy.weights(toy.model()), "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del start[name]
    else:
        start[name] = start[name][:3]
    with pytest.raises(StrategyError, match=f"{name}.*aligned model|aligned model.*{name}"):
        list(linear.updates(moved(toy.model()), start))


def test_adapters_whose_update_is_no_low_rank_matrix_are_refused():
    with pytest.raises(StrategyError, match="DoRA"):
        linear.adapters(adapted(toy.model(), use_dora=True))
    model = adapted(toy.model())
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(StrategyError, match="second"):
        linear.adapters(model)


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("kind", ["adapters", "whole", "half"])
def test_none_keeps_every_weight_bit_for_bit(kind):
    start = toy.weights(toy.model())
    module = adapted(toy.model()) if kind == "adapters" else moved(toy.model())
    if kind == "half":
        module, start = module.bfloat16(), {n: w.bfloat16() for n, w in start.items()}
    before = toy.weights(module)
    after = linear.edit(module, start, lambda update: None)
    assert after is module and toy.identical(before, toy.weights(after))


@pytest.mark.parametrize("build", [toy.model, gpt2])
@pytest.mark.parametrize("kind", ["adapters", "whole"])
def test_a_new_update_is_written_where_it_belongs_and_nowhere_else(build, kind):
    start = toy.weights(build())
    module = adapted(build()) if kind == "adapters" else moved(build())
    wanted = {u.name: 3.0 * u.dense() for u in linear.updates(module, start) if "1." in u.name and len(u.shape) == 2}
    kept = {u.name: u.dense() for u in linear.updates(module, start) if u.name not in wanted}
    turned = {u.name for u in linear.updates(module, start) if u.transposed}
    module = linear.edit(module, start, lambda u: u.times(3.0) if u.name in wanted else None)
    final = dict((module.merge_and_unload() if kind == "adapters" else module).named_parameters())
    for name, delta in (wanted | kept).items():
        torch.testing.assert_close(final[name], start[name] + (delta.T if name in turned else delta), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("build", [toy.model, gpt2])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_changed_rank_answer_alike_after_saving_and_loading(build, rslora, tmp_path):
    from peft import PeftModel

    start = toy.weights(build())
    model = adapted(build(), use_rslora=rslora)
    mean = sum(u.dense().abs().mean() for u in linear.updates(model, start))
    other = {u.name: low_rank(u.name, *u.shape, r=3, seed=len(u.name)).times(float(mean) * 0.1) for u in linear.updates(model, start)}
    before = merged_deltas(adapted(build(), use_rslora=rslora), start)
    model = linear.edit(model, start, lambda u: linear.added(u, other[u.name]) if "1." in u.name else None)
    answer = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(loaded), answer, atol=1e-6, rtol=1e-5)
    assert {m.r["default"] for m in loaded.modules() if hasattr(m, "lora_A")} == {2, 5}
    after = merged_deltas(loaded, start)
    for name, delta in before.items():
        extra = other[name].dense() if "1." in name else torch.zeros(1)
        expected = delta + (extra.T if build is gpt2 and "1." in name else extra)
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("build", [toy.model, gpt2])
def test_one_dense_update_turns_the_model_whole_and_keeps_the_others(build):
    start = toy.weights(build())
    expected = merged_deltas(adapted(build()), start)
    name = next(n for n in expected if "1." in n)
    generator = torch.Generator().manual_seed(1)
    turned = build is gpt2
    dense = torch.randn(expected[name].shape[::-1] if turned else expected[name].shape, generator=generator)
    model = linear.edit(adapted(build()), start, lambda u: u.replaced(full=dense) if u.name == name else None)
    assert not hasattr(model, "peft_config") and not any("lora" in n for n, _ in model.named_parameters())
    expected[name] = dense.T if turned else dense
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, start[n] + expected.get(n, 0.0), atol=1e-6, rtol=1e-4)


class Counted(Mapping):
    """Weights made anew at each lookup, which knows of how many weights tensors are alive at once."""

    def __init__(self, weights):
        self.weights, self.alive, self.most = weights, {}, 0

    def __getitem__(self, name):
        tensor = self.weights[name].clone()
        self.alive.setdefault(name, weakref.WeakSet()).add(tensor)
        self.most = max(self.most, sum(bool(len(found)) for found in self.alive.values()))
        return tensor

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


SIDE = {"safe_steps": 1, "num_safety": 2}, {"harmful_steps": 1, "num_harmful": 2}


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("safe_lora", {}), ("lssf", {}), ("random_subspace", {}), ("lox", {}), ("lox", {"rank": 2}), ("safemerge", SIDE[0]), ("resta", SIDE[1]),
     ("enchtable", SIDE[1])],
)  # fmt: skip
def test_weights_of_the_other_models_are_held_two_modules_at_a_time(name, knobs):
    from strategies.recipe import build

    gc.collect()
    aligned, unaligned = Counted(toy.weights(toy.model())), Counted(toy.unaligned_weights())
    recipe = build([(name, knobs)])
    recipe.prepare_data(toy.data(weights={"aligned": aligned, "unaligned": unaligned}))
    recipe.finish(moved(recipe.setup(toy.model())))
    assert 1 <= aligned.most <= 2 and unaligned.most <= 2 and (unaligned.most > 0) == ("unaligned_base" in recipe.strategies[0].needs)
