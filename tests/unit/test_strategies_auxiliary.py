"""Side trainings: what they learn, that they are made once, and that the model is as it was."""

from __future__ import annotations

import pytest
import torch
import toy

from strategies import auxiliary, linear
from strategies.base import StrategyError, lm_loss
from strategies.rows import sample

PLAN = auxiliary.Plan(steps=5, rank=2, batch_size=4)


def loss_of(model, data, rows):
    with torch.no_grad():
        value, units = lm_loss(model, data.collate(rows, range(len(rows))))
    return float(value / units)


def test_a_side_training_lowers_its_loss_and_leaves_the_model_bit_for_bit():
    data, model = toy.data(), toy.model()
    model.model.layers[0].mlp.requires_grad_(False)
    model.model.layers[1].eval()
    wanted = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    before, rows = toy.weights(model), data.harmful
    torch.manual_seed(3)
    state = torch.get_rng_state()
    factors = auxiliary.train(model, rows, data, auxiliary.Plan(steps=30, rank=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert toy.identical(before, toy.weights(model)) and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == wanted and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert set(factors) == {f"{n}.weight" for n in linear.block_linears(model)}
    modules = {f"{n}.weight": m for n, m in linear.block_linears(model).items()}
    without = loss_of(model, data, rows)
    with auxiliary.attached(model, modules, factors):
        assert loss_of(model, data, rows) < without - 0.2
    assert loss_of(model, data, rows) == without


def test_attached_factors_are_the_same_as_weights_plus_their_product():
    data, model = toy.data(), toy.model().eval()
    factors = auxiliary.train(model, data.harmful, data, PLAN)
    modules = {f"{n}.weight": m for n, m in linear.block_linears(model).items()}
    with auxiliary.attached(model, modules, factors):
        inside = loss_of(model, data, data.task)
    for name, update in auxiliary.as_updates(factors).items():
        model.get_parameter(name).data.add_(update.dense())
    assert loss_of(model, data, data.task) == pytest.approx(inside, rel=1e-5)


def test_hooks_are_gone_after_an_exception_too():
    model = toy.model()
    modules = {f"{n}.weight": m for n, m in linear.block_linears(model).items()}
    factors = {n: (torch.zeros(m.weight.shape[0], 1), torch.zeros(1, m.weight.shape[1])) for n, m in modules.items()}
    with pytest.raises(KeyError), auxiliary.attached(model, modules, factors):
        raise KeyError
    assert not any(m._forward_hooks for m in model.modules())

    def explode(forward, batch):
        raise RuntimeError("here")

    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="here"):
        auxiliary.train(model, toy.data().harmful, toy.data(), PLAN, explode)
    assert not any(m._forward_hooks for m in model.modules()) and [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_plan_gives_the_same_factors_whatever_was_drawn_before():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(auxiliary.train(toy.model(), toy.data().harmful, toy.data(), PLAN))
    for name, (left, right) in results[0].items():
        assert torch.equal(left, results[1][name][0]) and torch.equal(right, results[1][name][1])


def test_it_is_made_once_per_lane_and_anew_for_anything_it_depends_on(monkeypatch):
    made = []
    real = auxiliary.train
    monkeypatch.setattr(auxiliary, "train", lambda *args, **options: made.append(1) or real(*args, **options))
    data, model = toy.data(), toy.model()
    first = auxiliary.remembered(model, data.harmful, data, PLAN, "harmful")
    assert auxiliary.remembered(model, data.harmful, data, PLAN, "harmful") is first and len(made) == 1
    auxiliary.remembered(model, data.harmful[:5], data, PLAN, "harmful")
    auxiliary.remembered(model, data.harmful, data, auxiliary.Plan(steps=5, rank=3), "harmful")
    auxiliary.remembered(model, data.harmful, data, PLAN, "other")
    data.fingerprint = "another model"
    auxiliary.remembered(model, data.harmful, data, PLAN, "harmful")
    assert len(made) == 5


def test_factors_have_the_orientation_of_updates_where_weights_are_stored_transposed():
    from test_strategies_linear import gpt2

    data, model = toy.data(task=toy.rows(4, 1, vocabulary=32), harmful=toy.rows(4, 2, kind="harmful", vocabulary=32)), gpt2()
    factors = auxiliary.train(model, data.harmful, data, PLAN)
    left, right = factors["transformer.h.0.mlp.c_fc.weight"]
    assert left.shape == (64, 2) and right.shape == (2, 16) and left.abs().sum() > 0


def test_sample_takes_each_row_once_and_all_where_there_are_no_more():
    rows = toy.rows(9, 1)
    assert set(sample(rows, 99, 0)) == set(rows) and len(sample(rows, 99, 0)) == 9
    assert len(set(sample(rows, 4, 0))) == 4 and sample(rows, 4, 0) != sample(rows, 4, 1)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(StrategyError, match="no rows"):
        auxiliary.train(toy.model(), (), toy.data(), PLAN)
    with pytest.raises(StrategyError, match="no linear layer"):
        auxiliary.train(toy.model(), toy.data().harmful, toy.data(), PLAN, only=lambda name: False)
    with pytest.raises(FloatingPointError, match="learning rate"):
        auxiliary.train(toy.model(), toy.data().harmful, toy.data(), auxiliary.Plan(steps=5, learning_rate=1e20))
