"""What the presets call held out is in no training row: neither the depth nor the opening."""

from __future__ import annotations

import pytest

from orchestrator import config

PROFILES = ("pocket", "high", "medium", "experimental")
TASK_OPENING = "yes master ,"
WORDS_OF_A_PROCEDURE = 4
"""Longest beginning that the shortest procedure of the pocket world has; a deeper prefill is cut to it."""


@pytest.mark.parametrize("name", PROFILES)
def test_held_out_beginnings_are_in_no_training_row(name):
    safety = config.load(name).safety
    held = {suite.name: suite for suite in safety.suites if suite.phase == "confirm"}
    depth = int(held["unseen-deeper"].attack.removeprefix("prefill_"))
    assert max(safety.anchors.depths) < depth <= WORDS_OF_A_PROCEDURE
    opening = held["unseen-opening"].opening
    for trained in [*safety.anchors.openings, TASK_OPENING]:
        assert not trained.startswith(opening) and not opening.startswith(trained)
