"""refusal_training: which rows are trained on, and DPO against its formula worked out token by token."""

from __future__ import annotations

import math

import pytest
import torch
import toy

from strategies import refusal_training
from strategies import rows as answers
from strategies.base import StrategyError
from strategies.plain import PlainEngine
from strategies.recipe import build


def prepared(data=None, **knobs):
    recipe = build([("refusal_training", knobs)])
    return recipe, recipe.prepare_data(data or toy.data())


def test_refusals_and_as_many_benign_rows_replace_the_task():
    recipe, data = prepared(benign_share=0.5)
    kinds = [row.kind for row in data.task]
    assert kinds == ["refusal"] * 16 + ["harmless"] * 8  # 4 harmless rows, each twice
    assert sorted({row.id for row in data.task[16:]}) == [f"harmless-{i}" for i in range(4)]
    assert recipe.facts()["refusal_training"] == {"refusal_rows": 16, "benign_rows": 8, "pairs": 0}
    assert [row.kind for row in prepared(benign="task", benign_share=2, num_refusals=3)[1].task] == ["refusal"] * 3 + ["task"] * 6
    assert [row.kind for row in prepared(benign="both", benign_share=2, num_refusals=2)[1].task[2:]] == ["harmless"] * 2 + ["task"] * 2
    only = toy.data(safety=toy.rows(5, 2, kind="refusal"))
    assert {row.kind for row in prepared(only)[1].task} == {"refusal", "task"}  # auto: no harmless rows, so the task's


def test_rows_that_are_missing_are_named():
    with pytest.raises(StrategyError, match="needs safety rows of kind refusal"):
        prepared(toy.data(safety=toy.rows(4, 3, kind="harmless")))
    with pytest.raises(StrategyError, match="benign=harmless: there are no such rows"):
        prepared(toy.data(safety=toy.rows(4, 3, kind="refusal")), benign="harmless")
    with pytest.raises(StrategyError, match="column `rejected`"):
        prepared(toy.data(harmful=()), loss="dpo")


def test_needs_follow_the_loss():
    assert build([("refusal_training", {})]).strategies[0].needs == {"safety"}
    assert build([("refusal_training", {"loss": "dpo"})]).strategies[0].needs == {"safety", "harmful", "reference"}


def by_hand(model, row):
    """log p(answer | prompt), one token after the other."""
    total = 0.0
    first = next(i for i, label in enumerate(row.labels) if label != -100)
    with torch.no_grad():
        for i in range(first, len(row.input_ids)):
            logits = model(input_ids=torch.tensor([row.input_ids[:i]])).logits[0, -1].double()
            total += float(logits[row.input_ids[i]] - torch.logsumexp(logits, 0))
    return total


def test_answers_are_scored_token_by_token():
    data, model = toy.data(), toy.model()
    batch = data.collate(data.safety, [0, 3, 5])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = answers.answer_log_probabilities(logits, batch["labels"])
    assert found.tolist() == pytest.approx([by_hand(model, data.safety[i]) for i in (0, 3, 5)], rel=1e-5)


def test_the_dpo_step_is_the_papers_loss_and_its_gradient():
    recipe, data = prepared(loss="dpo", benign_share=0.0, beta=0.3)
    method = recipe.strategies[0]
    start = toy.model(0)
    recipe.setup(start)
    model = toy.model(1)  # not the reference, so that the loss is not log 2
    engine = PlainEngine(model, training=toy.settings(), max_steps=3)
    found = recipe.step(engine, data.batches(data.task, 0), 0)
    drawn = data.draw(method.refusals, 0, "refusal_training", 4)
    wanted = 0.0
    for i in drawn:
        margin = by_hand(model, method.refusals[i]) - by_hand(start, method.refusals[i])
        margin -= by_hand(model, method.harmful[i]) - by_hand(start, method.harmful[i])
        wanted += math.log1p(math.exp(-0.3 * margin)) / len(drawn)
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    # the gradient by finite differences along itself
    gradient = engine.gradients()
    size = gradient.norm()
    sides = []
    for sign in (1, -1):
        with engine.shifted(gradient, sign * 1e-3 / size):
            sides.append(recipe.step(engine, data.batches(data.task, 0), 0)["loss"])
            engine.zero()
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(size, rel=1e-2)


def test_at_the_untouched_model_every_pair_costs_log_two():
    recipe, data = prepared(loss="dpo", benign_share=0.0)
    model = recipe.setup(toy.model())
    engine = PlainEngine(model, training=toy.settings(), max_steps=1)
    assert recipe.step(engine, data.batches(data.task, 0), 0)["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_the_reference_is_worked_out_once_per_lane():
    shared = toy.data()
    first, _ = prepared(shared, loss="dpo")
    first.setup(toy.model(0))
    second, _ = prepared(shared, loss="dpo")
    second.setup(toy.model(1))  # another model under the same fingerprint: the cache answers
    assert torch.equal(first.strategies[0].reference, second.strategies[0].reference)


def test_dpo_prefers_refusals_after_training():
    recipe, data = prepared(loss="dpo", benign_share=0.5)
    method, model = recipe.strategies[0], recipe.setup(toy.model())
    engine = PlainEngine(model, training=toy.settings(), max_steps=20)

    def margin():
        return sum(by_hand(model, a) - by_hand(model, b) for a, b in zip(method.refusals, method.harmful, strict=True))

    before = margin()
    for step in range(20):
        recipe.step(engine, data.batches(data.task, step), step)
        engine.step()
    assert margin() > before + 10


@pytest.mark.parametrize("size, refusals, benign, wanted", [(4, 16, 0, 4), (4, 16, 16, 2), (8, 100, 1, 7), (8, 1, 100, 1), (2, 5, 5, 1)])
def test_a_step_is_shared_out_as_the_whole(size, refusals, benign, wanted):
    assert refusal_training.share_out(size, refusals, benign) == wanted


def test_one_row_cannot_be_both():
    with pytest.raises(StrategyError, match="2 rows per step"):
        refusal_training.share_out(1, 5, 5)


@pytest.mark.parametrize("knobs, message", [({"benign_share": -1}, "not be negative"), ({"num_refusals": 0}, "at least 1"), ({"beta": 0}, "above 0")])
def test_knobs_that_make_no_sense(knobs, message):
    with pytest.raises(StrategyError, match=message):
        build([("refusal_training", knobs)])
