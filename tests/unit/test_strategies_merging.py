"""RESTA, LoX, LSSF and the random control against formulas written out, on matrices, adapters and whole models."""

from __future__ import annotations

import math

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import lox, lssf, random_subspace, resta
from strategies.base import StrategyError, stable_seed
from strategies.recipe import build

SMALL = {"harmful_steps": 3, "harmful_rank": 2, "num_harmful": 6}


def moved(module, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    return module


def finished(items, module, data=None):
    recipe = build(items)
    recipe.prepare_data(data or toy.data())
    recipe.setup(toy.model())
    return recipe.finish(module), recipe


def adapted(items, data=None):
    """(model before finish, recipe) with LoRA of rank 2 and factors that are not zero."""
    recipe = build([("lora", {"lora_r": 2}), *items])
    recipe.prepare_data(data or toy.data())
    model = recipe.setup(toy.model())
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.01 * torch.randn(p.shape, generator=generator))
    return model, recipe


def adapter_deltas(model):
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            found[f"{name.removeprefix('base_model.model.')}.weight"] = module.scaling["default"] * b @ a
    return found


# ------------------------------------------------------------------------------------------------ RESTA


@given(st.floats(0.05, 0.95), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_dare_keeps_its_share_scales_it_and_keeps_the_mean(drop, seed):
    vector = torch.ones(100, 100)
    dropped = resta.dare(vector, drop, seed)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - drop)))
    spread = math.sqrt(drop / (1 - drop)) / 100
    assert abs(float(dropped.mean()) - 1) < 5 * spread
    assert torch.equal(dropped, resta.dare(vector, drop, seed))


def test_dare_without_dropping_is_the_vector_and_dropping_all_is_refused():
    vector = torch.randn(3, 3)
    assert resta.dare(vector, 0.0, 1) is vector
    with pytest.raises(ValueError, match="drop=1"):
        resta.dare(vector, 1.0, 1)
    torch.testing.assert_close(resta.merge(vector, vector, 0.5, drop=0.0), 1.5 * vector)


@pytest.mark.parametrize("drop", [0.0, 0.9])
def test_resta_adds_the_safety_vector_by_name(drop):
    start, trained = toy.weights(toy.model()), toy.weights(moved(toy.model()))
    model, recipe = finished([("resta", SMALL | {"gamma": 0.3, "drop": drop})], moved(toy.model()))
    vector = recipe.strategies[0].safety
    assert len(vector) == 21 and recipe.facts()["resta"]["merged"] == 21
    for name, weight in toy.weights(model).items():
        if name not in vector:
            assert torch.equal(weight, trained[name])
            continue
        expected = resta.merge(trained[name] - start[name], vector[name].dense(), 0.3, drop, stable_seed((7, name)))
        torch.testing.assert_close(weight, start[name] + expected, atol=1e-6, rtol=1e-4)
        assert drop == 0 or 0.02 < float((weight != trained[name]).float().mean()) < 0.25


def test_the_safety_vector_points_away_from_harm():
    data = toy.data()
    _, recipe = finished([("resta", {"harmful_steps": 8, "harmful_rank": 4, "gamma": 1.0, "drop": 0.0})], toy.model(), data)

    def harm(sign):
        model = toy.model().eval()
        with torch.no_grad():
            for name, update in recipe.strategies[0].safety.items():
                model.get_parameter(name).add_(sign * update.dense())
            batch = data.collate(data.harmful, range(16))
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            return float(torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()))

    assert harm(-1.0) < harm(0.0) < harm(1.0)


@pytest.mark.parametrize(("drop", "whole"), [(0.0, False), (0.9, True)])
def test_dropping_makes_adapters_whole_and_not_dropping_keeps_them(drop, whole):
    model, recipe = adapted([("resta", SMALL | {"drop": drop})])
    model = recipe.finish(model)
    assert hasattr(model, "peft_config") != whole
    if not whole:
        assert {m.r["default"] for m in model.modules() if hasattr(m, "lora_A")} == {4}


# ------------------------------------------------------------------------------------------------ LoX


@pytest.mark.parametrize("rank", [0, 1, 3, 99])
def test_extrapolate_is_the_papers_formula(rank):
    torch.manual_seed(0)
    aligned, unaligned = torch.randn(7, 5), torch.randn(7, 5)
    u, s, vh = torch.linalg.svd(aligned - unaligned)
    k = rank or 5
    expected = aligned + 0.7 * sum((s[i] * torch.outer(u[:, i], vh[i]) for i in range(min(k, 5))), torch.zeros(7, 5))
    torch.testing.assert_close(lox.extrapolate(aligned, unaligned, 0.7, rank), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_training_starts_from_the_extrapolated_weights(rank):
    start, before = toy.weights(toy.model()), toy.unaligned_weights()
    recipe = build([("lox", {"coef": 0.5, "rank": rank})])
    data = recipe.prepare_data(toy.data())
    model = recipe.setup(toy.model())
    for name, weight in toy.weights(model).items():
        if "layers" in name and weight.ndim == 2:
            torch.testing.assert_close(weight, lox.extrapolate(start[name], before[name], 0.5, rank), atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(weight, start[name])
        assert torch.equal(data.weights["aligned"][name], weight), "merging methods after it must see where training started"
    assert recipe.facts()["lox"]["extrapolated"] == 21


def test_after_lora_the_result_is_a_whole_model_that_holds_both():
    recipe = build([("lox", {"coef": 0.5}), ("lora", {"lora_r": 2})])
    recipe.prepare_data(toy.data())
    model = recipe.setup(toy.model())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)
    deltas, start, before = adapter_deltas(model), toy.weights(toy.model()), toy.unaligned_weights()
    model = recipe.finish(model)
    assert not hasattr(model, "peft_config")
    for name, delta in deltas.items():
        torch.testing.assert_close(model.get_parameter(name), lox.extrapolate(start[name], before[name], 0.5, 8) + delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("before", [(), (("lora", {"lora_r": 2}),)])
def test_a_merge_after_lox_sees_the_training_alone(before):
    """The extrapolation is no update of its own: one weight was trained, one is projected."""
    recipe = build([("lox", {"coef": 0.5, "rank": 2}), *before, ("safe_lora", {"select": "threshold", "threshold": 1.0})])
    data = recipe.prepare_data(toy.data())
    model = recipe.setup(toy.model())
    if before:
        with torch.no_grad():
            model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.fill_(0.01)
    else:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.add_(0.01)
    model = recipe.finish(model)
    assert recipe.facts()["safe_lora"]["updates"] == 1
    name = "model.layers.1.mlp.up_proj.weight"
    for other, weight in toy.weights(model).items():
        assert torch.equal(weight, data.weights["aligned"][other]) == (other != name)


def test_lora_before_lox_is_refused():
    with pytest.raises(StrategyError, match="name lox first"):
        build([("lora", {}), ("lox", {})])


# ------------------------------------------------------------------------------------------------ LSSF


def entropy_rank(values, eta):
    """Counted one by one."""
    p = [v * v / sum(w * w for w in values) for v in values]
    h = [-q * math.log(q) if q > 0 else 0.0 for q in p]
    return next(r for r in range(1, len(h) + 1) if sum(h[:r]) >= eta * sum(h) - 1e-12)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12), st.floats(0.05, 0.99))
@settings(max_examples=100, deadline=None)
def test_the_rank_is_the_smallest_that_holds_the_share_of_the_entropy(values, eta):
    values = sorted(values, reverse=True)
    assert abs(lssf.entropy_rank(torch.tensor(values, dtype=torch.float64), eta) - entropy_rank(values, eta)) == 0


def test_one_direction_has_rank_one_and_all_of_the_entropy_takes_all():
    assert lssf.entropy_rank(torch.tensor([3.0, 0.0, 0.0]), 0.9) == 1
    assert lssf.entropy_rank(torch.ones(5), 1.0) == 5


def test_weights_fall_from_top_to_one():
    weights = lssf.direction_weights(torch.tensor([4.0, 3.0, 2.0]), 2.0)
    assert weights.tolist() == [2.0, 1.5, 1.0]
    assert lssf.direction_weights(torch.tensor([4.0]), 2.0).tolist() == [2.0]


@pytest.mark.parametrize("top", [1.0, 2.0])
def test_restore_is_the_formula(top):
    torch.manual_seed(0)
    trained, aligned, unaligned = (torch.randn(8, 6) for _ in range(3))
    u, s, vh = torch.linalg.svd(aligned - unaligned)
    r = entropy_rank(s.tolist(), 0.8)
    assert 1 < r < 6
    step = torch.zeros(8, 6)
    for i in range(r):
        step += (1 + (top - 1) * (s[i] - s[r - 1]) / (s[0] - s[r - 1])) * s[i] * torch.outer(u[:, i], vh[i])
    torch.testing.assert_close(lssf.restore(trained, aligned, unaligned, 0.5, 0.8, top), trained + 0.5 * step, atol=1e-4, rtol=1e-4)
    assert lssf.restore(trained, aligned, aligned.clone()) is trained


def test_adapters_and_whole_models_get_the_same_step():
    start, before = toy.weights(toy.model()), toy.unaligned_weights()
    model, recipe = adapted([("lssf", {"alpha": 0.5})])
    deltas = adapter_deltas(model)
    model = recipe.finish(model)
    assert hasattr(model, "peft_config")
    merged = toy.weights(model.merge_and_unload())
    for name, delta in deltas.items():
        expected = lssf.restore(start[name] + delta, start[name], before[name], alpha=0.5)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-4)
    trained = toy.weights(moved(toy.model()))
    whole = toy.weights(finished([("lssf", {"alpha": 0.5})], moved(toy.model()))[0])
    for name, weight in trained.items():
        expected = lssf.restore(weight, start[name], before[name], alpha=0.5) if name in deltas else weight
        torch.testing.assert_close(whole[name], expected, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ the random control


@pytest.mark.parametrize(("shape", "rank"), [((8, 8), None), ((8, 3), None), ((4, 9), None), ((9, 7), 2)])
def test_a_random_output_space_keeps_singular_values_and_the_input_side(shape, rank):
    torch.manual_seed(0)
    matrix = torch.randn(shape) if rank is None else torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    turned = random_subspace.rotated(matrix, 3)
    torch.testing.assert_close(turned.T @ turned, matrix.T @ matrix, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(turned) == torch.linalg.matrix_rank(matrix)
    assert torch.equal(turned, random_subspace.rotated(matrix, 3)) and not torch.allclose(turned, random_subspace.rotated(matrix, 4))


def test_the_random_direction_is_uniform():
    """A fixed column is turned to directions whose mean is zero and whose squares are equal."""
    column = torch.tensor([[2.0], [0.0], [0.0]])
    drawn = torch.cat([random_subspace.rotated(column, seed) for seed in range(2000)], dim=1)
    assert drawn.mean(1).abs().max() < 0.15
    torch.testing.assert_close(drawn.square().mean(1), torch.full((3,), 4 / 3), atol=0.15, rtol=0)


@pytest.mark.parametrize("operation", ["project", "merge", "add"])
@pytest.mark.parametrize("kind", ["adapters", "whole"])
def test_each_operation_is_the_methods_with_another_space(operation, kind):
    start, before, knobs = toy.weights(toy.model()), toy.unaligned_weights(), {"operation": operation, "strength": 0.4, "rank": 2}
    if kind == "adapters":
        model, recipe = adapted([("random_subspace", knobs)])
        deltas = adapter_deltas(model)
        made = toy.weights(recipe.finish(model).merge_and_unload())
    else:
        trained = toy.weights(moved(toy.model()))
        deltas = {n: trained[n] - start[n] for n in start if "layers" in n and start[n].ndim == 2}
        model, recipe = finished([("random_subspace", knobs)], moved(toy.model()))
        made = toy.weights(model)
    changed = 0
    for name, delta in deltas.items():
        got, own = made[name] - start[name], start[name] - before[name]
        changed += (got - delta).abs().max() > 1e-5
        if operation == "merge":
            assert 0.5 * delta.norm() < got.norm() < 1.01 * delta.norm()
            torch.testing.assert_close((got - 0.6 * delta).norm(), 0.4 * delta.norm(), atol=1e-4, rtol=1e-3)
        elif operation == "add":
            u, s, vh = torch.linalg.svd(own)
            torch.testing.assert_close(torch.linalg.svdvals(got - delta)[:2], 0.4 * s[:2], atol=1e-4, rtol=1e-3)
        elif (got - delta).abs().max() > 1e-5:
            v = random_subspace.rotated(own, stable_seed((7, name)))
            torch.testing.assert_close(got, v @ v.T @ delta / v.norm(), atol=1e-5, rtol=1e-3)
    assert changed == recipe.facts()["random_subspace"]["changed"] == (round(0.4 * len(deltas)) if operation == "project" else len(deltas))


@pytest.mark.parametrize(("name", "knobs", "said"), [
    ("resta", {"gamma": -1}, "gamma=-1"), ("resta", {"drop": 1}, "drop=1"), ("lox", {"coef": -1}, "coef=-1"), ("lox", {"rank": -1}, "rank=-1"),
    ("lssf", {"alpha": -1}, "alpha=-1"), ("lssf", {"eta": 0}, "eta=0"), ("random_subspace", {"strength": 2}, "strength=2"),
    ("random_subspace", {"rank": -1}, "rank=-1"),
])  # fmt: skip
def test_knobs_that_make_no_sense_are_refused(name, knobs, said):
    with pytest.raises(StrategyError, match=said):
        build([(name, knobs)])
