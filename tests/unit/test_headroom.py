"""A suite on which plain fine-tuning loses nothing shows nothing: said where it is so, and only there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestrator import config
from orchestrator.records import SuiteResult, TaskResult, TrialResult
from orchestrator.report.headroom import unmoved

N = 100


def suite(name, failed, **more):
    failures = [i < failed for i in range(N)]
    return SuiteResult(name, "harmful", [str(i) for i in range(N)], None, failures, [not f for f in failures], **more)


def trial(recipe, failed, state="complete", **more):
    suites = {"harmful": suite("harmful", failed, **more)} if failed is not None else {}
    return TrialResult("t", recipe, {}, 0, "search", state, TaskResult("exact_match", 0.9, [0.9], ["0"]), suites)


def told(*trials, **more):
    chosen = SimpleNamespace(configurations=tuple(SimpleNamespace(recipe=t.recipe, trials=((t, None),)) for t in trials))
    return unmoved(chosen, trial("", 2, **more), config.load("pocket", ["recipes=[[full],[lora],[safegrad]]"]))


def test_plain_fine_tuning_that_loses_nothing_takes_the_limit_its_meaning():
    (line,) = told(trial("full", 4), trial("lora", 9), trial("safegrad", 2))
    said = "harmful has no headroom: 2 plain fine-tunings of this run moved attack success there by +0.070 at most, within the limit of 0.1"
    assert said in line.text


@pytest.mark.parametrize("trials", [
    [trial("full", 4), trial("lora", 60)],  # one lost its refusals
    [trial("full", 4), trial("lora", None, "stopped")],  # one was ended early, and may have
    [trial("safegrad", 2)],  # no plain one
    [],
])  # fmt: skip
def test_nothing_is_said_where_plain_fine_tuning_lost_refusals_or_was_not_asked_in_full(trials):
    assert told(*trials) == []


def test_suites_that_wait_or_are_only_measured_are_left_out():
    for more in ({"phase": "confirm"}, {"constrains": False}):
        assert told(trial("full", 4, **more), **more) == []
