"""PlainEngine against formulas written out here with torch alone: autograd of the mean, AdamW, clipping, the schedule."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

from strategies import gradients
from strategies.base import IGNORE, lm_loss
from strategies.checkpoint import CheckpointError, latest
from strategies.markers import seal
from strategies.optim import lr_at, parameter_groups
from strategies.plain import PlainEngine


def engine(module=None, *, max_steps=10, **settings):
    return PlainEngine(module if module is not None else toy.model(), training=toy.settings(**settings), max_steps=max_steps)


def reference_gradient(module, batches) -> dict[str, torch.Tensor]:
    """Gradient of the mean cross-entropy over every labelled token of all batches, by autograd in one graph."""
    losses = []
    for batch in batches:
        logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row in range(len(logits)):
            for t in range(1, logits.shape[1]):
                if batch["labels"][row, t] != IGNORE:
                    losses.append(-torch.log_softmax(logits[row, t - 1], -1)[batch["labels"][row, t]])
    parameters = dict(module.named_parameters())
    mean = torch.stack(losses).mean()
    return dict(zip(parameters, torch.autograd.grad(mean, list(parameters.values())), strict=True)) | {"loss": mean.detach()}


def named(built, gradient):
    return dict(zip(built.trainable, gradient.parts, strict=True))


def test_gradient_is_that_of_the_mean_over_all_labelled_tokens():
    rows = toy.data(accumulation_steps=3)
    built = engine()
    batches = rows.batches(rows.task, 0)
    assert len(batches) == 3 and len({tuple(b["input_ids"].shape) for b in batches}) > 1
    wanted = reference_gradient(built.module, batches)
    loss = built.gradient(batches)
    got = named(built, built.gradients())
    assert loss == pytest.approx(float(wanted.pop("loss")), rel=1e-6)
    assert toy.largest_difference(got, wanted) < 1e-7


def test_gradient_adds_and_gradients_takes_out():
    rows, built = toy.data(), engine()
    first, second = rows.batches(rows.task, 0), rows.batches(rows.task, 1)
    built.gradient(first)
    a = built.gradients()
    assert built.gradients().norm() == 0.0
    built.gradient(second)
    b = built.gradients()
    built.gradient(first)
    built.gradient(second)
    both = built.gradients()
    for x, y, z in zip(a.parts, b.parts, both.parts, strict=True):
        torch.testing.assert_close(x + y, z, rtol=0, atol=1e-7)
    assert all(p.grad is None for p in built.module.parameters())


def test_dot_norm_and_combine():
    rows, built = toy.data(), engine()
    built.gradient(rows.batches(rows.task, 0))
    a = built.gradients()
    built.gradient(rows.batches(rows.task, 1))
    b = built.gradients()
    flat_a, flat_b = (torch.cat([p.reshape(-1).double() for p in g.parts]) for g in (a, b))
    assert a.dot(b) == pytest.approx(float(flat_a @ flat_b), rel=1e-12)
    assert a.norm() == pytest.approx(float(flat_a.norm()), rel=1e-12)
    assert a.gram(b) == pytest.approx([float(x @ y) for x, y in ((flat_a, flat_a), (flat_a, flat_b), (flat_b, flat_b))], rel=1e-12)
    built.combine([(0.5, a), (-2.0, b)])
    got = torch.cat([p.reshape(-1).double() for p in built.gradients().parts])
    torch.testing.assert_close(got, 0.5 * flat_a - 2.0 * flat_b, rtol=1e-5, atol=1e-9)
    built.combine([(1.0, a), (0.0, b)])
    assert all(torch.equal(x, y) for x, y in zip(a.parts, built.gradients().parts, strict=True))


def adamw(weights, gradient, moments, step, rate, decay):
    """AdamW as in Loshchilov & Hutter, written out; betas .9 and .999, eps 1e-8."""
    for name, g in gradient.items():
        m, v = moments.setdefault(name, [torch.zeros_like(g), torch.zeros_like(g)])
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g * g)
        if weights[name].ndim > 1:
            weights[name] = weights[name] * (1 - rate * decay)
        weights[name] = weights[name] - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return weights


def test_steps_are_clipped_adamw_at_the_scheduled_rate():
    rows, built = toy.data(), engine(max_steps=4, weight_decay=0.1, max_grad_norm=0.5, warmup_ratio=0.5)
    rates = [0.005, 0.01, 0.01, 0.005]
    weights, moments = toy.weights(built.module), {}
    for step, rate in enumerate(rates):
        batches = rows.batches(rows.task, step)
        gradient = reference_gradient(built.module, batches)
        gradient.pop("loss")
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient.values()))
        scale = min(1.0, 0.5 / (norm + 1e-6))
        weights = adamw(weights, {n: g * scale for n, g in gradient.items()}, moments, step + 1, rate, 0.1)
        built.gradient(batches)
        info = built.step()
        assert info["learning_rate"] == pytest.approx(rate)
        assert info["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert toy.largest_difference(toy.weights(built.module), weights) < 1e-5


def test_clipping_off_leaves_the_gradient():
    rows = toy.data()
    results = []
    for limit in (0.0, 1e9):
        built = engine(max_grad_norm=limit)
        built.gradient(rows.batches(rows.task, 0))
        built.step()
        results.append(toy.weights(built.module))
    assert toy.identical(*results)


def test_micro_batches_do_not_change_the_step():
    wide, narrow = toy.data(per_device_batch_size=8), toy.data(per_device_batch_size=2, accumulation_steps=4)
    results = []
    for rows in (wide, narrow):
        built = engine()
        for step in range(3):
            built.gradient(rows.batches(rows.task, step))
            built.step()
        results.append(toy.weights(built.export()))
    assert toy.largest_difference(*results) < 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_shifted_restores_bit_for_bit(fails):
    rows, built = toy.data(), engine()
    built.gradient(rows.batches(rows.task, 0))
    direction = built.gradients()
    before = toy.weights(built.module)
    try:
        with built.shifted(direction, 0.3):
            moved = toy.weights(built.module)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    for (name, old), part in zip(before.items(), direction.parts, strict=True):
        torch.testing.assert_close(moved[name], old + 0.3 * part)
    assert toy.identical(before, toy.weights(built.module))


def test_zero_forgets():
    rows, built = toy.data(), engine(weight_decay=0.0)
    before = toy.weights(built.module)
    built.gradient(rows.batches(rows.task, 0))
    built.zero()
    assert built.step()["grad_norm"] == 0.0
    assert toy.identical(before, toy.weights(built.module))


def test_a_loss_that_is_nan_names_the_step_and_the_knob():
    rows, built = toy.data(), engine()
    built.gradient(rows.batches(rows.task, 0))
    built.step()
    with pytest.raises(FloatingPointError, match=r"loss became nan at optimiser step 2; lower training\.learning_rate \(now 0\.01\)"):
        built.gradient(rows.batches(rows.task, 1), lambda forward, batch: tuple(x * float("nan") for x in lm_loss(forward, batch)))


def test_an_infinite_gradient_stops_before_the_weights_change():
    rows, built = toy.data(), engine()

    def root(forward, batch):
        loss, units = lm_loss(forward, batch)
        return (loss - loss.detach()).abs().sqrt(), units  # 0, with an infinite slope

    before = toy.weights(built.module)
    built.gradient(rows.batches(rows.task, 0), root)
    with pytest.raises(FloatingPointError, match="gradient's norm became"):
        built.step()
    assert toy.identical(before, toy.weights(built.module))


def test_a_step_without_batches_or_labels_is_refused():
    rows, built = toy.data(), engine()
    with pytest.raises(ValueError, match="no micro-batches"):
        built.gradient([])
    with pytest.raises(ValueError, match="no labelled token"):
        built.gradient([rows.collate(rows.task, [])])


def test_nothing_trainable_is_refused():
    module = toy.model()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        engine(module)


def train(built, rows, first, last):
    for step in range(first, last):
        built.gradient(rows.batches(rows.task, step))
        built.step()


def dropout_model():
    module = toy.model()
    module.config.attention_dropout = 0.2
    for layer in module.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return module


def test_resume_equals_uninterrupted_bit_for_bit(tmp_path):
    rows = toy.data()
    torch.manual_seed(3)
    whole = engine(dropout_model())
    train(whole, rows, 0, 6)
    torch.manual_seed(3)
    first = engine(dropout_model())
    train(first, rows, 0, 3)
    first.save(tmp_path, {"note": [1, 2]})
    train(first, rows, 3, 4)  # what a crash loses
    torch.manual_seed(99)
    second = engine(dropout_model())
    assert second.load(tmp_path) == {"note": [1, 2]}
    assert second.steps == 3
    train(second, rows, 3, 6)
    assert toy.identical(toy.weights(whole.export()), toy.weights(second.export()))


def test_checkpoints_are_safe_to_load_and_two_are_kept(tmp_path):
    rows, built = toy.data(), engine()
    assert built.load(tmp_path) is None
    for step in range(3):
        train(built, rows, step, step + 1)
        built.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    state = torch.load(tmp_path / "step-00000002" / "rank-0.pt", weights_only=True)
    assert set(state) == {"weights", "moments", "random", "rate_factor", "extra"}
    assert latest(tmp_path)["world_size"] == 1


def test_a_scaled_rate_lasts_and_is_saved(tmp_path):
    rows, built = toy.data(), engine(max_steps=4, lr_scheduler_type="constant", warmup_ratio=0.0, learning_rate=0.01)
    built.gradient(rows.batches(rows.task, 0))
    assert built.step()["learning_rate"] == 0.01
    built.scale_rate(0.5)
    built.scale_rate(0.25)
    built.save(tmp_path)
    again = engine(max_steps=4, lr_scheduler_type="constant", warmup_ratio=0.0, learning_rate=0.01)
    again.load(tmp_path)
    for one in (built, again):
        one.gradient(rows.batches(rows.task, 1))
        assert one.step()["learning_rate"] == 0.0025, "a factor replaces the one before"
    for factor in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="learning rate"):
            built.scale_rate(factor)


def test_a_step_that_is_saved_again_never_overwrites_what_the_marker_names(tmp_path, monkeypatch):
    built = engine()
    built.save(tmp_path, {"turn": 0})
    for turn in range(1, 4):
        built.save(tmp_path, {"turn": turn})
        assert engine().load(tmp_path) == {"turn": turn}
    assert len(list(tmp_path.glob("step-*"))) == 2
    monkeypatch.setattr("strategies.checkpoint._replace", lambda path, write_to: (write_to(path), 1 / 0)[0])
    with pytest.raises(ZeroDivisionError):
        built.save(tmp_path, {"turn": 9})
    monkeypatch.undo()
    assert engine().load(tmp_path) == {"turn": 3}


def test_a_save_that_dies_leaves_the_one_before(tmp_path, monkeypatch):
    rows, built = toy.data(), engine()
    train(built, rows, 0, 1)
    built.save(tmp_path)
    train(built, rows, 1, 2)

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        built.save(tmp_path)
    fresh = engine()
    fresh.load(tmp_path)
    assert fresh.steps == 1
    assert not list(tmp_path.rglob(".*"))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    rows, built = toy.data(), engine()
    with pytest.raises(ValueError, match="middle of a step"):
        built.gradient(rows.batches(rows.task, 0))
        built.save(tmp_path)
    built.step()
    built.save(tmp_path)
    narrower = toy.model()
    narrower.model.layers[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match="of another training"):
        engine(narrower).load(tmp_path)
    for marker in (tmp_path / "latest", next(tmp_path.glob("step-*/whole.json"))):
        marker.write_text(json.dumps(seal(json.loads(marker.read_text()) | {"world_size": 2})))
    with pytest.raises(CheckpointError, match=r"written by 2 worker\(s\), this training has 1; resume with ray.num_workers=2"):
        engine().load(tmp_path)


def test_after_export_only_the_model_is_left():
    rows, built = toy.data(), engine()
    train(built, rows, 0, 1)
    module = built.export()
    assert built.model is module and built.export() is module
    assert all(p.grad is None for p in module.parameters())
    with pytest.raises(RuntimeError, match="closed or its model exported"):
        built.gradient(rows.batches(rows.task, 1))
    built.close()


def test_gathered_gives_back_the_training_mode():
    built = engine()
    with built.gathered() as whole:
        whole.eval()
        assert whole is built.model
    assert built.module.training


def test_bf16_keeps_float32_master_weights_and_exports_the_loaded_type():
    rows = toy.data()
    module = toy.model().to(torch.bfloat16)
    module.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="training.bf16 is off"):
        engine(copy.deepcopy(module))
    built = engine(module, bf16=True, learning_rate=1e-4)
    assert {p.dtype for p in built.trainable.values()} == {torch.float32}
    before = toy.weights(built.module)
    train(built, rows, 0, 2)
    after = toy.weights(built.module)
    moved = [n for n in built.trainable if not torch.equal(before[n], after[n])]
    assert len(moved) == len(built.trainable)  # steps of 1e-4 are far below bfloat16's resolution
    assert {p.dtype for p in built.export().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@given(max_steps=st.integers(1, 300), warmup=st.floats(0, 0.99), rate=st.floats(1e-6, 1.0))
def test_the_rate_rises_to_its_peak_and_never_again(kind, max_steps, warmup, rate):
    rates = [lr_at(s, max_steps=max_steps, learning_rate=rate, kind=kind, warmup_ratio=warmup) for s in range(max_steps)]
    assert all(0 < r <= rate * (1 + 1e-9) for r in rates)
    peak = max(0, math.ceil(warmup * max_steps) - 1)
    assert rates[peak] == pytest.approx(rate)
    assert all(a <= b for a, b in zip(rates[:peak], rates[1 : peak + 1], strict=True))
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_schedule_values():
    linear = [lr_at(s, max_steps=4, learning_rate=1.0, kind="linear") for s in range(5)]
    assert linear == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = [lr_at(s, max_steps=4, learning_rate=1.0, kind="cosine") for s in range(5)]
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(5)])
    with pytest.raises(ValueError, match="'step' is not one of constant"):
        lr_at(0, max_steps=2, learning_rate=1.0, kind="step")


def test_vectors_do_not_decay():
    trainable = dict(toy.model().named_parameters())
    decayed, spared = parameter_groups(trainable, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in spared["params"]} == {1}
    assert len(parameter_groups(trainable, 0.0)) == 1


def test_dot_is_summed_in_float64(monkeypatch):
    a = torch.full((1000,), 1e4)
    a[0] = 3e7
    b = torch.ones(1000)
    b[0] = -1.0 / 3
    monkeypatch.setattr(gradients, "PIECE", 7)
    wanted = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    assert gradients.tensors_dot([a], [b]) == pytest.approx(wanted, rel=1e-14)
    with pytest.raises(ValueError, match="shapes must be equal"):
        gradients.tensors_dot([a], [b[:3]])


def test_helpers_on_named_gradients():
    x, y = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}, {"a": torch.tensor([4.0, 5.0]), "b": torch.tensor([6.0])}
    assert gradients.dot(x, y) == 32.0
    assert gradients.norm(x) == pytest.approx(math.sqrt(14))
    assert gradients.gram(x, y) == (14.0, 32.0, 77.0) and gradients.tensors_gram([], []) == (0.0, 0.0, 0.0)
    assert gradients.axpy(2.0, x, y)["a"].tolist() == [6.0, 9.0]
    assert gradients.axpy(0.0, {"a": torch.tensor([math.inf] * 2), "b": x["b"]}, y)["a"].tolist() == [4.0, 5.0]
    assert gradients.linear([(1.0, x), (-1.0, y)])["b"].tolist() == [-3.0]
    assert gradients.linear([(0.5, x), (1.0, y), (2.0, x)])["a"].tolist() == [6.5, 10.0]
    assert gradients.linear([(0.0, x), (1.0, y)])["a"].tolist() == [4.0, 5.0] and gradients.linear([(0.0, x)])["b"].tolist() == [0.0]
    with pytest.raises(ValueError, match="lengths must be equal"):
        gradients.linear_tensors([(1.0, [x["a"]]), (1.0, [])])
    with pytest.raises(ValueError, match="different parameters: b"):
        gradients.dot(x, {"a": x["a"]})
    with pytest.raises(ValueError, match="no gradients"):
        gradients.linear([])
