"""The short form of benchmarks/chaos.py: a search that loses a worker, its raylet and its driver with the journal's end is the same search."""

from __future__ import annotations

import collections
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import chaos, tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRIALS, STEPS = 5, 200
SHORT = ("worker killed", "raylet killed", "journal torn")


def test_a_disturbed_search_ends_as_the_undisturbed_one(tmp_path):
    (tmp_path / "inputs").mkdir()
    tiny.make_inputs(tmp_path / "inputs")
    chaos.undisturbed(tmp_path / "undisturbed", tmp_path / "inputs", TRIALS, STEPS)
    (tmp_path / "disturbed").mkdir()
    faults = [chaos.FAULTS[name] for name in SHORT]
    struck, left_over = chaos.campaign(tmp_path / "disturbed", tmp_path / "inputs", TRIALS, STEPS, faults, random.Random(1), longest_rest_s=1.0)
    assert not left_over, f"the search ended before {SHORT[-left_over:]} could strike; give it more steps"
    for one in struck:
        assert (one.lost, one.doubled, one.left) == (0, 0, 0), one
    found = chaos.difference(tmp_path / "undisturbed" / "out", tmp_path / "disturbed" / "out")
    assert found.none, found
    assert found.trials > TRIALS, "a finalist is confirmed on the second seed"


def test_what_is_compared_tells_a_lost_a_doubled_and_another_trial(tmp_path, monkeypatch):
    """The benchmark itself must see what it is there to see."""
    record = {
        "trial_id": "t0001", "recipe": "full", "params": {"learning_rate": 1e-3}, "seed": 0, "phase": "search", "state": "complete", "steps": 9,
        "facts": {}, "task": {"scores": [1.0]}, "suites": {"harm": {"ids": ["a"], "unsafe": [False], "refused": [True]}},
    }  # fmt: skip
    for name, records in {"one": ["t0001", "t0002"], "two": ["t0001"]}.items():
        for trial in records:
            path = tmp_path / name / "out" / "trials" / trial / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(record | {"trial_id": trial, "steps": 9 if name == "one" else 8}))
        (tmp_path / name / "out" / "trials.csv").write_text("trial_id\n" + "".join(f"{trial}\n" for trial in [*records, "t0001"]))
    monkeypatch.setattr(chaos, "tracked", lambda folder: collections.Counter())
    found = chaos.difference(tmp_path / "one" / "out", tmp_path / "two" / "out")
    assert (found.lost, found.doubled, found.differs) == (2, 1, 1) and not found.none
