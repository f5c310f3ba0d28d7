"""SafeMERGE against the formula written out: which updates are merged, and that the merge has no cross terms."""

from __future__ import annotations

import math

import pytest
import torch
import toy

from strategies import auxiliary, safemerge
from strategies.base import StrategyError
from strategies.recipe import build
from strategies.updates import Update

SMALL = {"safe_steps": 3, "safe_rank": 2, "num_safety": 6}


def reference(task, safe, aligned, unaligned, threshold, weight):
    """The paper's three lines, C formed."""
    v = aligned - unaligned
    c = v @ v.T / v.norm()
    rho = float(torch.nn.functional.cosine_similarity((c @ task).reshape(1, -1), task.reshape(1, -1)))
    return (weight * task + (1 - weight) * safe if rho < threshold else task), rho


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.6, 1.0])
def test_merge_is_the_papers_formula(threshold):
    for seed in range(8):
        torch.manual_seed(seed)
        task, safe, aligned, unaligned = (torch.randn(9, 6) for _ in range(4))
        expected, _ = reference(task, safe, aligned, unaligned, threshold, 0.8)
        torch.testing.assert_close(safemerge.merge(task, safe, aligned, unaligned, threshold, 0.8), expected)


def test_the_cosine_of_factors_is_that_of_the_multiplied_out_update():
    torch.manual_seed(0)
    left, right, aligned, unaligned = torch.randn(9, 2), torch.randn(2, 6), torch.randn(9, 6), torch.randn(9, 6)
    _, rho = reference(left @ right, left @ right, aligned, unaligned, 0.0, 1.0)
    assert safemerge.agreement(Update("x", left=left, right=right), aligned - unaligned) == pytest.approx(rho, abs=1e-6)


def test_pefts_linear_merge_is_another_one():
    """Mixing A and B separately with square roots of the weights leaves cross terms; they are the whole difference."""
    torch.manual_seed(0)
    (b1, a1), (b2, a2) = ((torch.randn(7, 2), torch.randn(2, 5)) for _ in range(2))
    u, w = math.sqrt(0.8), math.sqrt(0.2)
    peft = (u * b1 + w * b2) @ (u * a1 + w * a2)
    ours = safemerge.linear.added(Update("x", left=b1, right=a1), Update("x", left=b2, right=a2), 0.8, 0.2)
    assert ours.left.shape == (7, 4)
    torch.testing.assert_close(ours.dense(), peft - u * w * (b1 @ a2 + b2 @ a1))


def test_a_weight_that_alignment_left_alone_keeps_its_update():
    task, safe, aligned = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)
    assert safemerge.merge(task, safe, aligned, aligned.clone(), threshold=1.0) is task


def finished(module, knobs, data, before=()):
    recipe = build([*before, ("safemerge", SMALL | knobs)])
    recipe.prepare_data(data)
    recipe.setup(toy.model(0))
    return recipe.finish(module), recipe


def test_a_whole_model_is_merged_by_name_with_the_safe_update():
    data, start, unaligned = toy.data(), toy.weights(toy.model(0)), toy.unaligned_weights()
    module = toy.model(0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    trained = toy.weights(module)
    model, recipe = finished(module, {"threshold": 0.33}, data)
    safe = recipe.strategies[0].safe
    merged = 0
    for name, weight in toy.weights(model).items():
        if name not in safe:
            assert torch.equal(weight, trained[name])
            continue
        delta = trained[name] - start[name]
        expected, rho = reference(delta, safe[name].left @ safe[name].right, start[name], unaligned[name], 0.33, 0.8)
        torch.testing.assert_close(weight, start[name] + expected)
        assert torch.equal(weight, trained[name]) == (rho >= 0.33)
        merged += rho < 0.33
    assert 0 < merged < len(safe) and recipe.facts()["safemerge"]["merged"] == merged


def test_adapters_stay_adapters_and_a_frozen_weight_stays_untouched():
    data, start = toy.data(), toy.weights(toy.model(0))
    recipe = build([("lora", {"lora_r": 2, "layers": "1"}), ("safemerge", SMALL | {"threshold": 1.0})])
    recipe.prepare_data(data)
    model = recipe.setup(toy.model(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01, generator=torch.Generator().manual_seed(len(name)))
    model = recipe.finish(model)
    ranks = {m.r["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert ranks == {4} and recipe.facts()["safemerge"]["merged"] == 7
    merged = dict(model.merge_and_unload().named_parameters())
    assert all(torch.equal(merged[n], w) for n, w in start.items() if "layers.1." not in n)


def test_the_safe_update_learns_the_refusals_and_is_made_once_per_lane():
    data = toy.data()
    _, recipe = finished(toy.model(0), {"safe_steps": 30, "safe_rank": 4, "num_safety": 16}, data)
    calls = [key for key in data.cache if key[0] == "side training: safe"]
    finished(toy.model(0), {"safe_steps": 30, "safe_rank": 4, "num_safety": 16, "weight": 0.5}, data)
    assert len(calls) == 1 and [key for key in data.cache if key[0] == "side training: safe"] == calls
    model, rows = toy.model(0).eval(), [row for row in data.safety if row.kind == "refusal"]
    from strategies.linear import block_linears

    @torch.no_grad()
    def loss():
        batch = data.collate(rows, range(len(rows)))
        logits = model(input_ids=batch["input_ids"]).logits
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))

    before = loss()
    modules = {f"{n}.weight": m for n, m in block_linears(model).items()}
    factors = {n: (u.left, u.right) for n, u in recipe.strategies[0].safe.items()}
    with auxiliary.attached(model, modules, factors):
        assert loss() < before - 0.2


def test_safety_rows_without_refusals_are_refused():
    with pytest.raises(StrategyError, match="kind refusal"):
        finished(toy.model(0), {}, toy.data(safety=toy.rows(3, 1, kind="harmless"), harmful=()))


@pytest.mark.parametrize(("knobs", "said"), [
    ({"weight": 1.2}, "weight=1.2"), ({"threshold": 2}, "threshold=2"), ({"safe_steps": 0}, "safe_steps=0"),
    ({"safe_learning_rate": 0}, "safe_learning_rate=0"),
])  # fmt: skip
def test_knobs_that_make_no_sense_are_refused(knobs, said):
    with pytest.raises(StrategyError, match=said):
        build([("safemerge", knobs)])
