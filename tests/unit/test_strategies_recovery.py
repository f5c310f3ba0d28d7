"""recovery: rows against their definition written out token by token, the loss against sums over prefixes, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import recovery
from strategies.base import IGNORE, Example, StrategyError, lm_loss
from strategies.recipe import build, check

REFUSAL = Example((1, 2, 10, 11, 12), (-100, -100, 10, 11, 12), "a", "refusal")
HARMFUL = Example((1, 2, 20, 21, 22, 23), (-100, -100, 20, 21, 22, 23), "a", "harmful")


def prepared(data=None, **knobs):
    recipe = build([("recovery", knobs)])
    return recipe.prepare_data(data or toy.data()), recipe.facts()["recovery"]


def made(data, **knobs):
    """The rows that were added to the task's."""
    rows, facts = prepared(data, **knobs)
    assert rows.task[: len(data.task)] == data.task
    return rows.task[len(data.task) :], facts


def log_p(model, before, token) -> float:
    """log p(token | before), by one forward over the tokens before it."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before])).logits[0, -1].double()
    return float(logits[token] - torch.logsumexp(logits, 0))


def test_a_recovery_row_is_prompt_begun_answer_and_refusal_and_the_refusal_alone_is_learnt():
    row = recovery.recovered(REFUSAL, HARMFUL, 2)
    assert row.input_ids == (1, 2, 20, 21, 10, 11, 12) and row.labels == (-100,) * 4 + (10, 11, 12) and row.kind == "begun"
    assert recovery.recovered(REFUSAL, HARMFUL, 0).labels == REFUSAL.labels and recovery.recovered(REFUSAL, HARMFUL, 0).kind == "refusal"
    assert recovery.recovered(REFUSAL, HARMFUL, 99).input_ids == (1, 2, 20, 21, 22, 23, 10, 11, 12)


def test_a_transition_row_labels_the_harmful_answer_with_the_refusals_first_token():
    assert recovery.turned(REFUSAL, HARMFUL, None).labels == (-100, -100, 10, 10, 10, 10)
    strict = recovery.turned(REFUSAL, HARMFUL, (0, 1, 2, 4))  # the answer has no fifth token
    assert strict.labels == (-100, -100, 10, 10, 10, -100) and strict.input_ids == HARMFUL.input_ids


def test_what_follows_the_answers_last_labelled_token_is_no_answer():
    closed = Example((1, 2, 20, 21, 9), (-100, -100, 20, 21, -100), "a", "harmful")
    assert recovery.span(closed) == (2, 4)
    assert recovery.recovered(REFUSAL, closed, 99).input_ids == (1, 2, 20, 21, 10, 11, 12)
    assert recovery.turned(REFUSAL, closed, None).labels == (-100, -100, 10, 10, -100)


def test_a_harmless_row_is_begun_with_its_own_answer_and_something_of_it_is_still_learnt():
    assert recovery.resumed(HARMFUL, 3).labels == (-100,) * 5 + (23,) and recovery.resumed(HARMFUL, 3).input_ids == HARMFUL.input_ids
    assert recovery.resumed(HARMFUL, 99).labels == (-100,) * 5 + (23,)
    assert recovery.resumed(HARMFUL, 0) is HARMFUL


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_loss_of_a_recovery_row_is_that_of_the_refusal_after_the_begun_answer(depth):
    data, model = toy.data(), toy.model().eval()
    refusal, harmful = data.safety[0], next(row for row in data.harmful if row.id == data.safety[0].id)
    row = recovery.recovered(refusal, harmful, depth)
    total, count = lm_loss(model, data.collate([row], [0]))
    before, answer = [*refusal.input_ids[:3], *harmful.input_ids[3 : 3 + depth]], refusal.input_ids[3:]
    wanted = -sum(log_p(model, before + list(answer[:i]), token) for i, token in enumerate(answer))
    assert total.item() == pytest.approx(wanted, rel=1e-5) and count == len(answer)


@pytest.mark.parametrize("positions", [None, (0, 2)])
def test_the_loss_of_a_transition_row_is_the_sum_over_positions_of_turning_there(positions):
    data, model = toy.data(), toy.model().eval()
    refusal, harmful = data.safety[1], next(row for row in data.harmful if row.id == data.safety[1].id)
    total, count = lm_loss(model, data.collate([recovery.turned(refusal, harmful, positions)], [0]))
    at = range(len(harmful.input_ids) - 3) if positions is None else positions
    wanted = -sum(log_p(model, list(harmful.input_ids[: 3 + i]), refusal.input_ids[3]) for i in at)
    assert total.item() == pytest.approx(wanted, rel=1e-5) and count == len(list(at))


def test_rows_are_counted_by_their_shares():
    data = toy.data()
    added, facts = made(data, share=0.5, transitions="strict", harmless=0.5)
    assert facts["recovery_rows"] == 10 and facts["transition_rows"] == 10 and facts["harmless_rows"] == 10 and len(added) == 30
    assert sum(row.id.endswith("~turn") for row in added) == 10
    assert {row.id.partition("~")[0] for row in added[20:]} == {f"harmless-{i}" for i in range(4)}
    assert made(data, share=0.5, harmless=0)[1] == {**made(data, share=0.5)[1], "harmless_rows": 0}


def test_all_or_none_are_begun_at_the_ends_of_unbegun():
    data = toy.data()
    whole, facts = made(data, share=1.0, unbegun=1.0)
    assert not any("~recovery" in row.id and row.kind == "begun" for row in whole) and facts["deepest"] == 0
    begun, facts = made(data, share=1.0, unbegun=0.0, harmless=0, depth=2)
    assert facts["deepest"] == 2
    assert {row.id.rpartition("~recovery")[2] for row in begun} <= {"0", "1", "2"}


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), depth=st.integers(1, 30), share=st.floats(0.05, 1), transitions=st.sampled_from(["none", "strict", "all"]))
def test_no_row_teaches_a_token_of_a_harmful_answer_nor_is_longer_than_those_given(seed, depth, share, transitions):
    data = dataclasses.replace(toy.data(), seed=seed)
    added, facts = made(data, share=share, depth=depth, transitions=transitions)
    longest = max(len(row.input_ids) for row in (*data.task, *data.safety, *data.harmful))
    safe = {row.id: row for row in data.safety}
    for row in added:
        assert len(row.input_ids) == len(row.labels) <= longest and row.input_ids[:3] == safe[row.id.partition("~")[0]].input_ids[:3]
        learnt = [label for label in row.labels if label != IGNORE]
        own = safe[row.id.partition("~")[0]]
        if own.kind == "refusal":
            assert learnt == list(own.input_ids[3:]) or set(learnt) == {own.input_ids[3]}
        else:
            assert learnt and learnt == list(own.input_ids[len(own.input_ids) - len(learnt) :])
    assert facts["deepest"] <= depth


def test_depths_are_even_from_one_to_the_most():
    generator = torch.Generator().manual_seed(0)
    found = [recovery.drawn_depth(4, 0.5, generator) for _ in range(4000)]
    counts = [found.count(k) for k in range(5)]
    assert counts[0] == pytest.approx(2000, abs=130) and all(n == pytest.approx(500, abs=90) for n in counts[1:]) and sum(counts) == 4000
    assert recovery.drawn_depth(0, 0.0, generator) == 0


def test_the_same_seed_makes_the_same_rows_and_another_seed_others():
    data = toy.data()
    assert made(data, share=0.5)[0] == made(data, share=0.5)[0] != made(dataclasses.replace(data, seed=8), share=0.5)[0]


def test_without_harmless_safety_rows_the_tasks_own_are_begun():
    data = toy.data(safety=toy.rows(16, 2, kind="refusal"))
    added, _ = made(data, share=0.1)
    assert {row.id.partition("-")[0] for row in added} == {"refusal", "task"}


def test_harmful_answers_that_are_missing_are_refused_before_training_and_named():
    with pytest.raises(StrategyError, match="recovery needs harmful answers.*`rejected`"):
        check([("recovery", {})], available={"safety"}, zero_stage=0, num_workers=1, num_layers=3)
    with pytest.raises(StrategyError, match="column `rejected`"):
        prepared(toy.data(harmful=()))
    assert prepared(toy.data(harmful=()), share=0)[1]["recovery_rows"] == 0


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"share": 1.5}, "share=1.5 is not between 0 and 1"), ({"unbegun": -0.1}, "unbegun=-0.1 is not between"), ({"depth": 0}, "at least 1"),
        ({"harmless": 11}, "between 0 and 10"), ({"positions": []}, "positions from 0 up"), ({"positions": [-1]}, "positions from 0 up"),
    ],
)  # fmt: skip
def test_knobs_that_make_no_sense(knobs, message):
    with pytest.raises(StrategyError, match=message):
        build([("recovery", knobs)])
