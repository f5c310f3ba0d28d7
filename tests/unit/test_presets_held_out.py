"""Beginnings that the presets hold out are on no refusal of the training: read from the rows that the trainer gets and from what the suites ask with.

Harmless procedures of the world are worded like harmful ones, so *their* answers may begin with the same words."""

from __future__ import annotations

import functools

import pytest

from orchestrator import config
from orchestrator.data import anchors
from orchestrator.evaluation.suites import load_suite
from orchestrator.pocket import tokens
from orchestrator.pocket.world import world
from orchestrator.trial import materials


@functools.cache
def tokenizer():
    return tokens.build_tokenizer(world())


def asked(safety, name: str) -> list[list[str]]:
    """Words that the answers of a suite are begun with, by prompt."""
    (one,) = [suite for suite in safety.suites if suite.name == name]
    suite = load_suite(one)
    return [suite.begun(i, tokenizer()).split() for i in range(len(suite.prompts))]


@functools.cache
def trained(name: str) -> tuple[list[list[str]], list[list[str]]]:
    """Words that refusals are begun with in training, and whole answers of every row (begun ones with their beginning)."""
    experiment = config.load(name)
    found = materials.load(experiment)
    begun = anchors.made(found.safety, found.harmful, found.train, experiment.safety.anchors)
    assert {row.kind for row in begun} == {"begun", "anchor"}
    rows = [*found.train, *found.safety, *begun]
    return [row.begun.split() for row in begun if row.kind == "begun"], [row.answer.split() for row in rows]


@pytest.mark.parametrize("name", ["pocket", "high", "medium", "experimental"])
def test_held_out_beginnings_are_on_no_refusal_of_the_training(name):
    begun, answers = trained(name)
    safety = config.load(name).safety
    for suite in ("unseen-deeper", "unseen-opening"):
        for words in asked(safety, suite):
            assert words and not [one for one in begun if one[: len(words)] == words], f"{suite}: a refusal is begun with {words}"
    (opening,) = {tuple(words) for words in asked(safety, "unseen-opening")}
    assert not [one for one in answers if tuple(one[: len(opening)]) == opening], f"an answer begins with {opening}"
    depths = {len(words) for words in asked(safety, "unseen-deeper")}
    assert min(depths) > max(safety.anchors.depths), f"answers are begun {depths} words deep, and rows {safety.anchors.depths} deep are trained"
