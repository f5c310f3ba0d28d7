"""EnchTable: the interference score and merge against formulas written out; a model on which it cannot work is refused in a sentence."""

from __future__ import annotations

import math

import pytest
import torch
import toy

from strategies import enchtable, linear
from strategies.base import StrategyError
from strategies.recipe import build
from strategies.updates import Update

SMALL = {"harmful_steps": 3, "harmful_rank": 2, "num_harmful": 6}


def reference_interference(a, b, ratio):
    """As the official code has it, on dense matrices."""
    parts = []
    for m in (a, b):
        u, s, v = torch.linalg.svd(m, full_matrices=False)
        n = int(s.shape[0] * ratio)
        parts.append((u[:, :n], s[:n], v[:n, :]))
    u, s, v = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts], 0)
    eye = torch.eye(s.shape[0])
    result = (u.t() @ u - eye) @ torch.diag(s) @ (v @ v.t() - eye)
    return float(torch.norm(result, p=1) / result.shape[0] / result.shape[1])


@pytest.mark.parametrize(("shape", "gamma"), [((8, 8), 0.5), ((12, 6), 0.5), ((6, 12), 0.9), ((10, 10), 0.1)])
def test_interference_is_the_official_formula_on_dense_matrices(shape, gamma):
    torch.manual_seed(0)
    a, b = torch.randn(shape), 0.3 * torch.randn(shape)
    assert enchtable.interference(Update("x", full=a), Update("x", full=b), gamma) == pytest.approx(reference_interference(a, b, gamma), rel=1e-4)


def test_orthogonal_updates_do_not_interfere_and_equal_ones_do():
    a, b = torch.zeros(6, 6), torch.zeros(6, 6)
    a[:3, :3], b[3:, 3:] = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    left = Update("x", full=a)
    assert enchtable.interference(left, Update("x", full=b), 0.5) == pytest.approx(0.0, abs=1e-6)
    assert enchtable.interference(left, left, 0.5) > 0.1


@pytest.mark.parametrize(("shape", "rank"), [((9, 7), 3), ((4, 9), 2), ((3, 8), 5)])
def test_the_low_rank_spectrum_is_that_of_the_multiplied_out_update(shape, rank):
    torch.manual_seed(1)
    update = Update("x", left=torch.randn(shape[0], rank), right=torch.randn(rank, shape[1]))
    u, s, vh = enchtable.spectrum(update)
    torch.testing.assert_close(u * s @ vh, update.dense(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(s, torch.linalg.svdvals(update.dense())[: len(s)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s)), atol=1e-4, rtol=1e-4)


def test_merge_is_the_papers_formula():
    torch.manual_seed(2)
    task = {"a": 0.01 * torch.randn(8, 8), "b": 0.01 * torch.randn(8), "c": 0.01 * torch.randn(6, 8), "own": torch.randn(2)}
    safety = {name: 0.5 * torch.randn_like(t) for name, t in task.items() if name != "own"}
    made = enchtable.merge(task, safety, beta=0.2, gamma=0.5, steepness=200.0)
    task_norm = torch.cat([t.reshape(-1) for t in task.values()]).norm()
    alpha = 0.2 * float(task_norm / torch.cat([t.reshape(-1) for t in safety.values()]).norm())
    for name in ("a", "c"):
        s = math.exp(-200 * reference_interference(task[name], alpha * safety[name], 0.5))
        assert 0 < s < 1
        torch.testing.assert_close(made[name], task[name] + s * alpha * safety[name])
    torch.testing.assert_close(made["b"], task["b"] + alpha * safety["b"])
    assert made["own"] is task["own"]


def test_without_a_safety_vector_nothing_is_added():
    task = {"a": torch.randn(3, 3)}
    torch.testing.assert_close(enchtable.merge(task, {"a": torch.zeros(3, 3)}), task)


# ------------------------------------------------------------------------------------------------ the strategy


def moved(module, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    return module


@pytest.mark.parametrize("ntk", [True, False])
def test_a_whole_model_is_merged_as_the_pure_function_says(ntk):
    data, start = toy.data(), toy.weights(toy.model())
    recipe = build([("enchtable", SMALL | {"ntk": ntk, "steepness": 20.0})])
    recipe.prepare_data(data)
    recipe.setup(toy.model())
    trained = toy.weights(moved(toy.model()))
    made = toy.weights(recipe.finish(moved(toy.model())))
    vector = {n: u.dense() for n, u in recipe.strategies[0].safety.items()}
    assert all(".self_attn." in n for n in vector) and len(vector) == 12
    task = {n: trained[n] - start[n] for n in start if "layers" in n}
    alpha = recipe.facts()["enchtable"]["alpha"]
    squares = [sum(float(t.norm()) ** 2 for t in group.values()) for group in (task, vector)]
    assert alpha == pytest.approx(0.1 * math.sqrt(squares[0] / squares[1]))
    for name, weight in made.items():
        if name not in vector:
            assert torch.equal(weight, trained[name])
            continue
        update = recipe.strategies[0].safety[name].times(alpha)
        s = math.exp(-20.0 * enchtable.interference(Update(name, full=task[name]), update, 0.5))
        torch.testing.assert_close(weight, trained[name] + s * alpha * vector[name], atol=1e-6, rtol=1e-4)
    assert recipe.facts()["enchtable"]["merged"] == 12


def test_the_linearised_harmful_training_learns_and_differs_from_the_plain_one():
    data, factors = toy.data(), {}
    for ntk in (True, False):
        recipe = build([("enchtable", SMALL | {"ntk": ntk, "harmful_steps": 6})])
        recipe.prepare_data(data)
        recipe.setup(toy.model())
        factors[ntk] = recipe.strategies[0].safety
    name = "model.layers.1.self_attn.o_proj.weight"
    assert linear.norm(factors[True][name]) > 0 and linear.similarity(factors[True][name], factors[False][name]) > 0.5
    assert not torch.equal(factors[True][name].left, factors[False][name].left)


@pytest.mark.parametrize(("knobs", "said"), [
    ({"beta": -1}, "beta=-1"), ({"gamma": 0}, "gamma=0"), ({"steepness": -1}, "steepness=-1"), ({"harmful_rank": 0}, "harmful_rank=0"),
])  # fmt: skip
def test_knobs_that_make_no_sense_are_refused(knobs, said):
    with pytest.raises(StrategyError, match=said):
        build([("enchtable", knobs)])


def test_data_without_harmful_answers_are_refused():
    recipe = build([("enchtable", SMALL)])
    recipe.prepare_data(toy.data(harmful=()))
    with pytest.raises(StrategyError, match="safety.harmful_data"):
        recipe.setup(toy.model())
