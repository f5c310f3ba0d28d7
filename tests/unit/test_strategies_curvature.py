"""curvature_restore and one_shot_patch: solvers against dense linear algebra, steps against loops written out, weights put back."""

from __future__ import annotations

import pytest
import torch
import toy

from strategies import after, one_shot_patch
from strategies.base import StrategyError, lm_loss
from strategies.curvature_restore import HALVINGS, CurvatureRestore, conjugate_gradients, diagonal, direction, lbfgs, two_loop
from strategies.recipe import build

SIZES = {"a": (3, 4), "b": (5,), "c": (2, 3)}


def vector(flat):
    """A flat vector as {name: tensor}."""
    found, start = {}, 0
    for name, shape in SIZES.items():
        count = torch.Size(shape).numel()
        found[name] = flat[start : start + count].view(shape)
        start += count
    return found


def flat(vectors):
    return torch.cat([vectors[name].reshape(-1) for name in SIZES])


def problem(seed=0, signs=None):
    """(matrix H, function v -> H v, right side g)."""
    generator = torch.Generator().manual_seed(seed)
    n = len(flat({k: torch.zeros(v) for k, v in SIZES.items()}))
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = torch.logspace(-2, 1, n, dtype=torch.float64) * (signs if signs is not None else 1.0)
    matrix = basis @ torch.diag(values) @ basis.T
    return matrix, lambda v: vector(matrix @ flat(v)), torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_conjugate_gradients_solve_the_damped_system(damping):
    matrix, product, g = problem()
    wanted = torch.linalg.solve(matrix + damping * torch.eye(len(g)), g)
    found = flat(conjugate_gradients(product, vector(g), damping, 200, 1e-10))
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_stop_at_negative_curvature_and_for_no_gradient():
    _, product, g = problem(signs=-1.0)
    assert torch.allclose(flat(conjugate_gradients(product, vector(g), 0.001, 50)), g / 0.001)
    zero = torch.zeros_like(g)
    assert torch.equal(flat(conjugate_gradients(product, vector(zero), 0.1, 5)), zero)


def dense_bfgs(pairs, n):
    """The inverse Hessian of BFGS updates one after the other, started from the last pair's scale."""
    pairs = [(s, y) for s, y in pairs if s @ y > 0]
    inverse = (pairs[-1][0] @ pairs[-1][1]) / (pairs[-1][1] @ pairs[-1][1]) * torch.eye(n, dtype=torch.float64)
    for s, y in pairs:
        rho, one = 1 / (s @ y), torch.eye(n, dtype=torch.float64)
        inverse = (one - rho * torch.outer(s, y)) @ inverse @ (one - rho * torch.outer(y, s)) + rho * torch.outer(s, s)
    return inverse


def test_the_two_loop_recursion_is_the_product_of_dense_updates():
    matrix, _, g = problem()
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(len(g), generator=generator, dtype=torch.float64) for _ in range(5)]
    pairs = [(s, matrix @ s) for s in steps]
    pairs[2] = (steps[2], -pairs[2][1])  # of negative curvature: skipped
    found = flat(two_loop(vector(g), [(vector(s), vector(y)) for s, y in pairs], 1.0))
    assert torch.allclose(found, dense_bfgs(pairs, len(g)) @ g, rtol=1e-8)
    assert torch.equal(flat(two_loop(vector(g), [], 0.5)), 0.5 * g)


def test_lbfgs_nears_the_solution_with_every_pair():
    matrix, product, g = problem()
    damping = 0.1
    system = matrix + damping * torch.eye(len(g))
    wanted = torch.linalg.solve(system, g)
    angles = []
    for history in (1, 4, 12):
        found = flat(lbfgs(product, vector(g), damping, history))
        angles.append(float(found @ wanted / (found.norm() * wanted.norm())))
    assert angles[0] < angles[1] < angles[2] and angles[2] > 0.99


def test_directions_always_lead_uphill():
    _, product, g = problem(signs=-1.0)
    for solver in ("cg", "lbfgs"):
        assert flat(direction(vector(g), solver, 0.01, product=product)) @ g > 0
    fisher = torch.rand(len(g), dtype=torch.float64)
    assert torch.allclose(flat(direction(vector(g), "diagonal", 0.2, fisher=vector(fisher))), g / (fisher + 0.2))
    with pytest.raises(ValueError, match="must be above 0"):
        diagonal(vector(g), vector(fisher), 0.0)


# ------------------------------------------------------------------------------------------------ derivatives of a model


def whole_loss(model, rows, data):
    """Mean loss of rows, one row at a time."""
    total = units = 0.0
    for i in range(len(rows)):
        value, count = lm_loss(lambda **inputs: model(**inputs), data.collate(rows, [i]))
        total, units = total + value, units + count
    return total / units


def test_gradient_and_hessian_product_are_the_derivatives_of_the_mean_loss():
    model, data = toy.model(layers=1, hidden=16).double().eval(), toy.data()
    rows, parameters = data.task[:7], after.movable(model)
    with after.moving(model, parameters):
        loss, found = after.gradient(model, parameters, rows, data)
        wanted = torch.autograd.grad(whole_loss(model, rows, data), list(parameters.values()))
        assert loss == pytest.approx(whole_loss(model, rows, data).item()) == pytest.approx(after.mean_loss(model, rows, data))
        assert all(torch.allclose(found[n].double(), w, atol=1e-6) for n, w in zip(parameters, wanted, strict=True))
        direction_ = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, (n, p) in enumerate(parameters.items())}
        product = after.hessian_vector(model, parameters, rows, data, direction_)
        origin, sides = after.copies(parameters), []
        for sign in (1, -1):
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(origin[name] + sign * 1e-4 * direction_[name])
            sides.append(torch.autograd.grad(whole_loss(model, rows, data), list(parameters.values())))
        after.restore(parameters, origin)
    for name, a, b in zip(parameters, *sides, strict=True):
        wanted = (a - b) / 2e-4
        assert (product[name] - wanted).norm() < 1e-3 * wanted.norm(), name
    assert all(p.grad is None for p in model.parameters())


def test_the_fisher_diagonal_is_the_mean_square_of_each_rows_gradient():
    model, data = toy.model(layers=1, hidden=16), toy.data()
    parameters = after.movable(model)
    with after.moving(model, parameters):
        found = after.squared_gradients(model, parameters, data.task[:5], data)
        wanted = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for i in range(5):
            grads = torch.autograd.grad(whole_loss(model, data.task[i : i + 1], data), list(parameters.values()))
            for name, g in zip(parameters, grads, strict=True):
                wanted[name] += g**2 / 5
    assert all(torch.allclose(found[n], wanted[n], atol=1e-7) for n in parameters)


def test_modes_and_flags_come_back_also_after_an_exception():
    model = toy.model()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    before = [(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    parameters = {"x": model.model.layers[1].mlp.up_proj.weight}
    with pytest.raises(RuntimeError, match="now"), after.moving(model, parameters):
        assert sum(p.requires_grad for p in model.parameters()) == 1 and not model.training
        raise RuntimeError("now")
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before


# ------------------------------------------------------------------------------------------------ on models


def tuned(adapters=False, **knobs):
    """A model some steps from the start, and the strategy with its rows."""
    from strategies.plain import PlainEngine

    recipe = build(([("lora", {"lora_r": 2})] if adapters else []) + [("curvature_restore", {"num_rows": 12} | knobs)])
    data = recipe.prepare_data(toy.data())
    model = recipe.setup(toy.model())
    engine = PlainEngine(model, training=toy.settings(learning_rate=3e-2 if adapters else 1e-2), max_steps=8)
    for step in range(8):
        recipe.step(engine, data.batches(data.task, step), step)
        engine.step()
    return recipe, engine.export()


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("solver", ["diagonal", "cg", "lbfgs"])
@pytest.mark.parametrize("objective", ["refusal", "harmful", "both"])
def test_the_goal_improves_while_the_task_is_held(adapters, solver, objective):
    recipe, model = tuned(adapters, solver=solver, objective=objective, steps=2, iterations=4, tolerance=0.03, radius=0.3)
    before = toy.weights(model)
    method = recipe.strategies[-1]
    data = toy.data()
    task, losses = after.mean_loss(model, method.task, data), [after.mean_loss(model, group, data) for _, group in method.goals]
    model = recipe.finish(model)
    facts = recipe.facts()["curvature_restore"]
    assert facts["restoring_steps"] >= 1 and facts["task_loss_before"] == pytest.approx(task, rel=1e-4)
    assert after.mean_loss(model, method.task, data) <= task * 1.03 + 1e-4
    now = [after.mean_loss(model, group, data) for _, group in method.goals]
    assert sum(sign * (b - a) for (sign, _), a, b in zip(method.goals, losses, now, strict=True)) > 0
    moved = {name for name, p in toy.weights(model).items() if not torch.equal(p, before[name])}
    assert moved and (not adapters or all("lora_" in name for name in moved))
    if not adapters:
        assert length_of(toy.weights(model), before) <= 0.3 * length_of(before, toy.weights(toy.model())) * 1.001


def length_of(a, b):
    return float(sum((a[name] - b[name]).double().square().sum() for name in a)) ** 0.5


def test_where_no_step_is_allowed_nothing_moves_by_a_bit():
    recipe, model = tuned(tolerance=0.0, radius=50.0)
    before = toy.weights(model)
    model = recipe.finish(model)
    facts = recipe.facts()["curvature_restore"]
    assert facts["ended_by"] == "tolerance" and facts["restoring_steps"] == 0 and facts["halvings"] == HALVINGS + 1
    assert toy.identical(toy.weights(model), before)


def test_the_cap_ends_the_path():
    recipe, model = tuned(objective="harmful", cap=0.5)
    assert recipe.finish(model) is model and recipe.facts()["curvature_restore"]["ended_by"] == "cap"


def test_frozen_layers_stay():
    recipe = build([("freeze_layers", {"start": 1, "end": 1}), ("curvature_restore", {"num_rows": 8, "steps": 1, "tolerance": 1.0})])
    recipe.prepare_data(toy.data())
    model = recipe.setup(toy.model())
    with torch.no_grad():  # as if trained
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    assert recipe.finish(model) is model
    start = toy.weights(toy.model())
    assert all(torch.equal(p, start[n]) for n, p in toy.weights(model).items() if ".layers.1." in n and "_proj" in n)


def test_needs_follow_the_objective():
    for objective, wanted in (("refusal", {"safety"}), ("harmful", {"harmful"}), ("both", {"safety", "harmful"})):
        assert build([("curvature_restore", {"objective": objective})]).strategies[0].needs == wanted
    assert CurvatureRestore.needs == {"safety", "harmful"}
    with pytest.raises(StrategyError, match="column `rejected`"):
        build([("curvature_restore", {"objective": "both"})]).prepare_data(toy.data(harmful=()))


@pytest.mark.parametrize("knobs, message", [({"radius": -1}, "at least 0"), ({"steps": 0}, "at least 1"), ({"damping": 0}, "above 0")])
def test_knobs_that_make_no_sense(knobs, message):
    with pytest.raises(StrategyError, match=message):
        build([("curvature_restore", knobs)])


# ------------------------------------------------------------------------------------------------ one_shot_patch


def test_a_patch_is_plain_training_on_its_rows():
    data, model, other = toy.data(), toy.model(), toy.model().eval()
    rows = data.safety[:3]
    before, now = one_shot_patch.patch(model, rows, data, 4, 5e-3)
    optimizer = torch.optim.AdamW(other.parameters(), lr=5e-3, weight_decay=0.0)
    batch = data.collate(rows, [0, 1, 2])
    losses = []
    for _ in range(4):
        loss = other(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    assert before == pytest.approx(losses[0], rel=1e-5) and now < losses[-1]
    assert toy.largest_difference(toy.weights(model), toy.weights(other)) < 1e-4


def test_a_patch_moves_adapters_alone_and_says_what_it_did():
    recipe = build([("lora", {"lora_r": 2}), ("one_shot_patch", {"examples": 2, "steps": 3, "rate": 2.0})])
    recipe.prepare_data(toy.data(learning_rate=1e-2))
    model = recipe.setup(toy.model())
    before = toy.weights(model)
    model = recipe.strategies[1].finish(model)  # not lora's, which refuses adapters that training did not move
    moved = {name for name, p in toy.weights(model).items() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    facts = recipe.strategies[1].facts()
    assert facts["patched_rows"] == 2 and facts["refusal_loss_after"] < facts["refusal_loss_before"]


def test_the_rate_follows_the_trainings():
    results = []
    for rate, learning_rate in ((0.5, 1e-2), (1.0, 5e-3)):
        recipe = build([("one_shot_patch", {"rate": rate})])
        recipe.prepare_data(toy.data(learning_rate=learning_rate))
        results.append(toy.weights(recipe.finish(toy.model())))
    assert toy.identical(*results)


@pytest.mark.parametrize("knobs, message", [({"examples": 11}, "1 to 10"), ({"steps": -1}, "not be negative"), ({"rate": 0}, "above 0")])
def test_patches_that_make_no_sense(knobs, message):
    with pytest.raises(StrategyError, match=message):
        build([("one_shot_patch", knobs)])
