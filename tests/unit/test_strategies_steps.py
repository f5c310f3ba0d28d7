"""sap, spard, sbr, constrained_sft, lisa and ema against formulas written out here, on tensors and through an engine."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import constrained_sft, ema, lisa, rows, sap, sbr, spard
from strategies.base import IGNORE, Example, StrategyError
from strategies.plain import PlainEngine
from strategies.recipe import build

finite = st.floats(-30, 30, width=32)


def started(name, knobs, *, steps=6, data=None, **training):
    """(strategy, recipe, data, engine) of one strategy on the toy model."""
    recipe = build([(name, knobs)])
    data = recipe.prepare_data(data if data is not None else toy.data())
    engine = PlainEngine(recipe.setup(toy.model()), training=toy.settings(**training), max_steps=steps)
    return recipe.strategies[0], recipe, data, engine


def named(engine, vector):
    return dict(zip(engine.trainable, vector.parts, strict=True))


def autograd(engine, loss):
    return dict(zip(engine.trainable, torch.autograd.grad(loss, list(engine.trainable.values()), allow_unused=True), strict=True))


def log_probability(module, example: Example) -> torch.Tensor:
    """Log-probability of one row's answer, token by token, without padding or batching."""
    logits = module(input_ids=torch.tensor([example.input_ids])).logits[0]
    total = 0.0
    for position, label in enumerate(example.labels):
        if label != IGNORE:
            total = total + torch.log(torch.softmax(logits[position - 1], dim=-1)[label])
    return total


# ---- rows --------------------------------------------------------------------------------------------------------------------------


def test_pairs_share_id_and_prompt_and_are_seeded():
    data = toy.data()
    safe, harmful = rows.pairs(data, 5, "x")
    assert len(safe) == len(harmful) == 5
    for a, b in zip(safe, harmful, strict=True):
        assert (a.id, a.prompt, a.kind, b.kind) == (b.id, b.prompt, "refusal", "harmful") and a.input_ids != b.input_ids
    assert len(rows.pairs(data, None, "x")[0]) == 16
    assert rows.pairs(data, 5, "x") == (safe, harmful) != rows.pairs(toy.data(seed=8), 5, "x")


def test_harmful_rows_of_other_prompts_are_no_pairs():
    with pytest.raises(StrategyError, match="x needs refusals with a harmful answer to the same prompt, and none of the 16 harmful rows"):
        rows.pairs(toy.data(harmful=toy.rows(16, 9, kind="refusal")), 5, "x")


def test_the_order_of_the_recipe_does_not_matter_to_what_a_method_reads():
    found = []
    for names in (("constrained_sft", "safe_instruct"), ("safe_instruct", "constrained_sft")):
        recipe = build([(name, {}) for name in names])
        data = recipe.prepare_data(toy.data())
        member = next(s for s in recipe.strategies if s.name == "constrained_sft")
        assert member.data is data and len(data.task) > 40
        recipe.setup(toy.model())
        found.append(member.facts()["reference_rows"])
    assert found == [len(data.task)] * 2


def test_token_log_probabilities_are_shifted():
    data = toy.data()
    module = toy.model().eval()
    batch = data.collate(data.task, range(4))
    logp = rows.token_log_probabilities(module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    for i in range(4):
        assert float(logp[i].sum().detach()) == pytest.approx(float(log_probability(module, data.task[i]).detach()), abs=1e-4)
    assert float(logp[batch["labels"][:, 1:] == IGNORE].abs().max()) == 0.0


# ---- sap ---------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=5), st.floats(0.25, 4))
@settings(max_examples=100, deadline=None)
def test_contrastive_loss_in_both_forms(values, temperature):
    chosen, rejected = (torch.tensor(column) for column in zip(*values, strict=True))
    got = sap.contrastive(chosen, rejected, temperature)
    for loss, (c, r) in zip(got.tolist(), values, strict=True):
        margin = (c - r) / temperature
        wanted = math.log1p(math.exp(-margin)) if margin > -500 else -margin
        assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(sap.contrastive(chosen, rejected, temperature, "difference"), (rejected - chosen) / temperature)


def test_probes_point_along_the_difference():
    there, here = [torch.tensor([3.0, 5.0]), torch.zeros(2)], [torch.tensor([0.0, 1.0]), torch.zeros(2)]
    assert [p.tolist() for p in sap.probes(there, here, 0.5, "gradient")] == [[1.5, 2.0], [0.0, 0.0]]
    unit = sap.probes(there, here, 0.5, "unit")
    assert float(unit[0].square().mean().sqrt()) == pytest.approx(0.5) and unit[0][0] / unit[0][1] == pytest.approx(0.75)
    assert unit[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("layers", range(1, 81))
def test_the_default_range_lies_inside(layers):
    start, end = sap.default_range(layers)
    assert 0 <= start <= end < layers
    assert layers != 32 or (start, end) == (11, 19)


def hidden_with(module, layers, vectors, batch):
    """Mean task loss with vectors added to the outputs of `layers`, by a forward of our own through the model's parts."""
    handles = [
        module.model.layers[i].register_forward_hook(lambda m, a, out, v=v: out + v if torch.is_tensor(out) else (out[0] + v, *out[1:]))
        for i, v in zip(layers, vectors, strict=True)
    ]
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    for handle in handles:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)


def test_a_sap_step_is_algorithm_1_with_real_log_probabilities():
    """Against autograd written out here, pair by pair, on a copy of the model whose weights are really shifted."""
    knobs = {"num_pairs": 4, "pairs_per_step": 4, "start": 1, "end": 2, "beta": 3.0, "epsilon": 0.05, "probe": "gradient", "temperature": 2.0}
    method, recipe, data, engine = started("sap", knobs)
    module, batches = engine.module, data.batches(data.task, 0)
    safe, harmful = method.rows[:4], method.rows[4:]
    losses = [-torch.log(torch.sigmoid((log_probability(module, s) - log_probability(module, h)) / 2.0)) for s, h in zip(safe, harmful, strict=True)]
    direction = autograd(engine, sum(losses) / 4)
    scale = 0.05 * math.sqrt(sum(float(p.square().sum()) for p in engine.trainable.values()))
    scale /= math.sqrt(sum(float(g.square().sum()) for g in direction.values()))
    other = toy.model()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(direction[name], alpha=scale)
    zeros = [torch.zeros(32, requires_grad=True) for _ in range(2)]
    gradients = [torch.autograd.grad(hidden_with(m, (1, 2), zeros, batches[0]), zeros) for m in (other, module)]
    vectors = [3.0 * (a - b) for a, b in zip(*gradients, strict=True)]
    wanted = autograd(engine, hidden_with(module, (1, 2), vectors, batches[0]))
    before = toy.weights(module)
    metrics = recipe.step(engine, batches, 0)
    assert toy.identical(toy.weights(module), before)
    assert toy.largest_difference(named(engine, engine.gradients()), wanted) < 1e-5
    assert metrics["probe_norm"] == pytest.approx(math.sqrt(sum(float(v.square().sum()) for v in vectors)), rel=1e-3) and metrics["probe_norm"] > 1e-3
    assert recipe.facts()["sap"] == {"probed_layers": [1, 2], "steps_probed": 1, "steps_without_direction": 0, "pairs": 4}


def test_a_step_without_a_harmful_direction_is_plain():
    method, recipe, data, engine = started("sap", {"num_pairs": 4, "pairs_per_step": 2})
    object.__setattr__(method.config, "temperature", 1e30)  # beyond what a config may say
    batches = data.batches(data.task, 0)
    recipe.step(engine, batches, 0)
    got = engine.gradients()
    engine.gradient(batches)
    assert toy.identical(named(engine, got), named(engine, engine.gradients()))
    assert recipe.facts()["sap"]["steps_without_direction"] == 1


def test_hooks_and_weights_are_back_after_an_exception():
    method, recipe, data, engine = started("sap", {"num_pairs": 4, "pairs_per_step": 2})
    before = toy.weights(engine.module)
    calls = itertools.count()

    def failing(leaves, batches):
        if next(calls):
            raise KeyError("inside")
        return [torch.zeros_like(leaf) for leaf in leaves]

    engine.sensitivity = failing
    with pytest.raises(KeyError):
        recipe.step(engine, data.batches(data.task, 0), 0)
    assert toy.identical(toy.weights(engine.module), before)
    assert not any(m._forward_hooks for m in engine.module.modules())


# ---- spard -------------------------------------------------------------------------------------------------------------------------


@given(st.lists(finite, min_size=6, max_size=6), st.lists(finite, min_size=6, max_size=6), st.floats(0, 5), st.floats(0, 2), st.floats(0.01, 3))
@settings(max_examples=200, deadline=None)
def test_the_correction_is_the_shortest_step_to_the_threshold_within_the_radius(weights, gradient, loss, threshold, radius):
    w, g = (torch.tensor(v, dtype=torch.float64) for v in (weights, gradient))
    split = [{"a": v[:2], "b": v[2:].reshape(2, 2)} for v in (w, g)]
    new = spard.correct(*split, loss, threshold, radius)
    got = torch.cat([new["a"], new["b"].reshape(-1)])
    square = float(g @ g)
    if loss <= threshold or square <= 1e-12:
        assert torch.equal(got, w)
        return
    torch.testing.assert_close(got, w - min((loss - threshold) / square, radius) * g, rtol=1e-9, atol=1e-9)
    if (loss - threshold) / square <= radius:  # the linearised loss lands on the threshold, and no shorter step does it
        assert loss + float(g @ (got - w)) == pytest.approx(threshold, abs=1e-6)


def test_the_official_coefficient_agrees_for_one_tensor_of_norm_one_only():
    """(loss - tau) / |g_p| per tensor, at most alpha_max: the official code's, whose result AdamW rescales anyway."""
    official = lambda loss, tau, norm, cap: min((loss - tau) / (norm + 1e-8), cap)  # noqa: E731
    assert spard.coefficient(0.7, 1.0, 0.2, 1.0) == pytest.approx(official(0.7, 0.2, 1.0, 1.0))
    assert spard.coefficient(0.7, 4.0, 0.2, 1.0) == pytest.approx(official(0.7, 0.2, 2.0, 1.0) / 2)


def test_a_step_moves_the_weights_themselves():
    method, recipe, data, engine = started("spard", {"threshold": 0.1, "radius": 0.05, "safety_batch_size": 4, "share": 0.2})
    recipe.step(engine, data.batches(data.task, 0), 0)
    engine.step()
    after = toy.weights(engine.module)
    batch = data.batches(method.rows, 0, "spard", 4)[0]
    logits = engine.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    wanted = spard.correct(after, autograd(engine, loss), float(loss.detach()), 0.1, 0.05)
    metrics = recipe.after_step(engine, 0)
    assert toy.largest_difference(toy.weights(engine.module), wanted) < 1e-6
    assert not toy.identical(toy.weights(engine.module), after)
    assert (metrics["correction"], recipe.facts()["spard"]) == (0.05, {"safety_rows": 8, "corrections": 1, "looks": 1})


def test_below_the_threshold_nothing_moves():
    method, recipe, data, engine = started("spard", {"threshold": 100.0})
    before = toy.weights(engine.module)
    assert recipe.after_step(engine, 0)["correction"] == 0.0
    assert toy.identical(toy.weights(engine.module), before)


def test_greedy_selection_against_determinants_of_every_choice():
    generator = torch.Generator().manual_seed(0)
    safety, task = torch.randn(9, 4, generator=generator), torch.randn(5, 4, generator=generator)
    cosine = torch.nn.functional.cosine_similarity
    near = lambda a, b: float(cosine(a, b, dim=0))  # noqa: E731
    quality = [max(0.0, max(near(s, t) for t in task)) ** 4 for s in safety]
    kernel = torch.tensor([[quality[i] * near(safety[i], safety[j]) * quality[j] for j in range(9)] for i in range(9)], dtype=torch.float64)
    kernel += 1e-6 * torch.eye(9, dtype=torch.float64)
    wanted: list[int] = []
    for _ in range(4):
        rest = [i for i in range(9) if i not in wanted]
        wanted.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*wanted, i]][:, [*wanted, i]]))))
    assert spard.select(safety, task, 4) == wanted
    assert sorted(spard.select(safety, task, 20)) == list(range(9))
    twins = torch.cat([task[:1], task[:1], torch.randn(1, 4, generator=generator) + task[:1]])
    assert set(spard.select(twins, task, 2)) != {0, 1}  # the same row twice is never worth it


def test_selection_embeds_once_per_lane():
    cache: dict = {}
    calls = []
    for _ in range(2):
        recipe = build([("spard", {"share": 0.1})])
        recipe.prepare_data(toy.data(cache=cache))
        module = toy.model()
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        recipe.setup(module)
    assert len(calls) == 4 + 10 + 2  # 16 refusals and 40 task rows in batches of 4; a look at the output layer for each
    assert len(recipe.strategies[0].rows) == 4


# ---- sbr ---------------------------------------------------------------------------------------------------------------------------


def test_penalty_is_the_mean_square():
    states, reference = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert float(sbr.penalty(states, reference)) == pytest.approx((1 + 4 + 0 + 4) / 4)
    torch.testing.assert_close(sbr.penalty(states, reference), torch.nn.functional.mse_loss(states, reference))  # the official code's
    with pytest.raises(ValueError, match="both must be"):
        sbr.penalty(states[:1], reference)


def test_the_gradient_is_that_of_the_task_and_the_weighted_penalty():
    method, recipe, data, engine = started("sbr", {"num_anchors": 5, "weight": 7.0})
    untouched = toy.model().eval()
    for step in range(2):
        batches = data.batches(data.task, step)
        total = 0.0
        for row in (r for r in data.safety if r.id in {a.id for a in method.anchors}):
            last = [m(input_ids=torch.tensor([row.prompt]), output_hidden_states=True).hidden_states[-1][0, -1] for m in (engine.module, untouched)]
            total = total + (last[0] - last[1].detach()).square().mean() / 5
        logits = engine.module(input_ids=batches[0]["input_ids"], attention_mask=batches[0]["attention_mask"]).logits[:, :-1]
        task = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batches[0]["labels"][:, 1:].flatten(), ignore_index=IGNORE)
        wanted = autograd(engine, task + 7.0 * total)
        metrics = recipe.step(engine, batches, step)
        got = engine.gradients()
        assert toy.largest_difference(named(engine, got), wanted) < 1e-5
        assert metrics["state_drift"] == pytest.approx(float(total), abs=1e-6)
        engine.combine([(1.0, got)])
        engine.step()
    assert metrics["state_drift"] > 1e-4


# ---- constrained_sft ---------------------------------------------------------------------------------------------------------------


def test_betas_count_from_the_first_answer_token():
    labels = torch.tensor([[IGNORE, IGNORE, 5, 6, 7, 8], [4, 5, IGNORE, IGNORE, IGNORE, IGNORE]])
    got = constrained_sft.betas(labels, 0.1, 5, 20, 3)
    torch.testing.assert_close(got, torch.tensor([[0.1, 0.1, 0.5, 2.0, 2.0, 0.1], [0.5, 2.0, 0.1, 0.1, 0.1, 0.1]]))
    assert constrained_sft.betas(labels, 0.1, 5, 20, 0).unique().tolist() == pytest.approx([0.1])


def test_the_weighted_gradient_is_that_of_the_papers_objective():
    """-(2 / b) log sigmoid(b (log p - log p_ref)), differentiated by autograd, where no weight is below its floor."""
    torch.manual_seed(0)
    logp, reference, b = -torch.rand(50) * 3, -torch.rand(50) * 3, torch.rand(50) * 2 + 0.1
    logp.requires_grad_()
    objective = -(2 / b) * torch.nn.functional.logsigmoid(b * (logp - reference))
    wanted = torch.autograd.grad(objective.sum(), logp)[0]
    w = constrained_sft.weights(logp, reference, b)
    assert not w.requires_grad and float(w.min()) > 1e-3
    torch.testing.assert_close(torch.autograd.grad(-(w * logp).sum(), logp)[0], wanted)
    official = torch.clamp(2 * (1 - torch.sigmoid(b * (logp.detach() - reference))), min=1e-3)
    torch.testing.assert_close(w, official)
    assert float(constrained_sft.weights(torch.tensor(0.0), torch.tensor(-100.0), 2.0)) == pytest.approx(1e-3)
    assert constrained_sft.weights(logp, reference, 0.0).unique().tolist() == [1.0]


def test_constrained_steps_equal_the_formula_token_by_token():
    method, recipe, data, engine = started("constrained_sft", {"beta": 0.5, "early_tokens": 2})
    untouched = toy.model().eval()
    for step in range(2):
        batches = data.batches(data.task, step)
        total, count = 0.0, 0
        for index in batches[0]["rows"].tolist():
            row = data.task[index]
            models = [m(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1) for m in (engine.module, untouched)]
            for number, position in enumerate(p for p, label in enumerate(row.labels) if label != IGNORE):
                ours, theirs = (m[position - 1, row.labels[position]] for m in models)
                b = 0.5 * (5 if number == 0 else 20 if number == 1 else 1)
                total = total - max(2 * (1 - float(torch.sigmoid(b * (ours - theirs)))), 1e-3) * ours
                count += 1
        wanted = autograd(engine, total / count)
        metrics = recipe.step(engine, batches, step)
        got = engine.gradients()
        assert toy.largest_difference(named(engine, got), wanted) < 1e-5
        assert metrics["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
        engine.combine([(1.0, got)])
        engine.step()
    assert abs(recipe.facts()["constrained_sft"]["early_weight"] - 1) > 1e-3


# ---- lisa --------------------------------------------------------------------------------------------------------------------------


def test_states_alternate_from_alignment():
    assert [lisa.aligning(s, 2, 3) for s in range(7)] == [True, True, False, False, False, True, True]
    assert [lisa.switches(s, 2, 3) for s in range(7)] == [True, False, True, False, False, True, False]


def test_the_proximal_term_pulls_to_the_weights_at_the_last_switch():
    method, recipe, data, engine = started("lisa", {"align_steps": 2, "task_steps": 3, "rho": 0.4, "start": 0.0})
    anchor = toy.weights(engine.module)
    for step in range(6):
        safe = step % 5 < 2
        if step in (2, 5):
            anchor = toy.weights(engine.module)
        batches = data.batches(data.task, step)
        source = data.batches(method.rows, step, "lisa") if safe else batches
        logits = engine.module(input_ids=source[0]["input_ids"], attention_mask=source[0]["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), source[0]["labels"][:, 1:].flatten(), ignore_index=IGNORE)
        if step > 0:
            loss = loss + 0.2 * sum((p - anchor[name]).square().sum() for name, p in engine.trainable.items())
        wanted = autograd(engine, loss)
        metrics = recipe.step(engine, batches, step)
        got = engine.gradients()
        assert toy.largest_difference(named(engine, got), wanted) < 1e-5
        assert metrics["aligning"] == float(safe)
        engine.combine([(1.0, got)])
        engine.step()
    assert recipe.facts()["lisa"] == {"safety_rows": 16, "alignment_steps": 3, "switches": 2}
    a, b = {"x": torch.tensor([3.0])}, {"x": torch.tensor([1.0])}
    assert lisa.proximal(a, b, 0.5)["x"].tolist() == [1.0]


# ---- ema ---------------------------------------------------------------------------------------------------------------------------


def test_the_average_is_put_in_place_at_the_end():
    method, recipe, data, engine = started("ema", {"decay": 0.7})
    kept = None
    for step in range(5):
        recipe.step(engine, data.batches(data.task, step), step)
        engine.step()
        recipe.after_step(engine, step)
        now = toy.weights(engine.module)
        kept = now if kept is None else {name: 0.7 * kept[name] + 0.3 * now[name] for name in now}
    recipe.end(engine)
    assert toy.largest_difference(toy.weights(engine.module), kept) < 1e-6
    assert toy.largest_difference(kept, now) > 1e-3
    assert recipe.facts()["ema"]["updates"] == 5 and recipe.facts()["ema"]["relative_distance_to_last"] > 1e-4


def test_average_of_tensors():
    old, new = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, -2.0])}
    assert ema.average(old, new, 0.75)["a"].tolist() == [1.5, 1.0]
    assert torch.equal(ema.average(old, new, 0.0)["a"], new["a"])


def test_saved_parts_of_another_engine_are_refused():
    engine = PlainEngine(toy.model(), training=toy.settings(), max_steps=1)
    with pytest.raises(ValueError, match="resume with the same settings"):
        engine.weights().like([torch.zeros(3)])


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("sap", {"beta": -1}, "negative"),
        ("sap", {"temperature": 0}, "above 0"),
        ("sap", {"start": 3, "end": 1}, "no range"),
        ("sap", {"num_pairs": 0}, "at least 1"),
        ("spard", {"radius": -1}, "must not be negative"),
        ("spard", {"share": 0}, "above 0"),
        ("spard", {"interval": 0}, "at least 1"),
        ("sbr", {"weight": -1}, "push the states away"),
        ("sbr", {"num_anchors": 0}, "at least 1"),
        ("constrained_sft", {"beta": -0.1}, "must not be negative"),
        ("lisa", {"rho": -1}, "drive the states apart"),
        ("lisa", {"task_steps": 0}, "at least 0 and 1"),
        ("lisa", {"start": 2}, r"in \[0, 1\]"),
        ("ema", {"decay": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_knobs_out_of_range(name, knobs, message):
    with pytest.raises(StrategyError, match=message):
        build([(name, knobs)])


def test_layers_outside_the_model_are_refused_before_training():
    with pytest.raises(StrategyError, match="outside the model: it has 4 layers"):
        build([("sap", {"end": 7})]).strategies[0].check(num_layers=4, num_workers=1)
