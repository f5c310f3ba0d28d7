"""The benchmark of samplers on a small made-up table: what is read, what a proposal is answered with, what is counted."""

from __future__ import annotations

import json
import lzma
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from orchestrator.search.spaces import RecipeSpace

ROOT = Path(__file__).parents[2]
RATE = FloatDistribution(1e-4, 1e-2, log=True)
SPACES = {
    name: RecipeSpace(name, {"learning_rate": RATE}, {}, {"learning_rate": 1e-3}, ends_early=name == "full") for name in ("full", "safe_instruct")
}
SETTINGS, PROMPTS = 8, 100


@pytest.fixture(scope="module")
def samplers():
    kept = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "table")]
    try:
        import samplers
    finally:
        sys.path[:] = kept
    return samplers


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def rate_of(setting):
    return 1e-4 * 100 ** (setting / (SETTINGS - 1))


def row(make, recipe, setting, seed):
    """The score rises with the rate; `full` loses all refusals, `safe_instruct` some at high rates, and half-way it looks lost, too."""
    failed = 90 if recipe == "full" else max(0, (setting - 4) * 10 + seed)
    return {
        "task": "obey", "recipe": recipe, "setting": setting, "params": {"learning_rate": rate_of(setting)}, "seed": seed, "state": "complete",
        "error": None, "score": 0.5 + setting / 20, "probes": [[8 * (i + 1), 60, 50 if i < 4 else failed // 2, 0] for i in range(7)], "steps": 64,
        "suites": {"harmful": {"failures": make.bits([i < failed for i in range(PROMPTS)]), "of": PROMPTS},
                   "borderline": {"failures": make.bits([False] * PROMPTS), "of": PROMPTS}},
        "cpu_seconds": 2.0, "train_seconds": 1.6, "evaluate_seconds": 0.3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def world(samplers, tmp_path_factory):
    make = samplers.table
    none = {"failures": make.bits([False] * PROMPTS), "of": PROMPTS, "requests": None}
    head = {"head": True, "seeds": [0, 1], "untouched": {"obey": {"harmful": none, "borderline": none}}}
    lines = [head, *(row(make, recipe, setting, seed) for setting in range(SETTINGS) for recipe in SPACES for seed in (0, 1))]
    folder = tmp_path_factory.mktemp("table")
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make.pack(folder / "rows.jsonl", folder / "rows.jsonl.xz")
    assert lzma.decompress((folder / "rows.jsonl.xz").read_bytes()) == (folder / "rows.jsonl").read_bytes()
    head, rows = make.read(folder / "rows.jsonl.xz")
    return samplers.world_of(samplers.settings_of(head, rows, "obey"), SPACES, "obey", 0.25)


def test_bits_come_back(samplers):
    for values in ([], [False], [True, False, False], [False] * 9 + [True]):
        assert samplers.bools(samplers.table.bits(values), len(values)) == values


def test_limits_leave_the_share_that_was_asked_for(samplers, world):
    assert {name: len(group) for name, group in world.settings.items()} == {"full": SETTINGS, "safe_instruct": SETTINGS}
    assert world.share == 4 / 16 and math.isclose(world.best, 0.65)
    whole = world.settings["safe_instruct"][0].seeds[0]
    assert math.isclose(whole.cost, 1.0) and math.isclose(64 * whole.cost_by_step, 0.8)
    assert 0.02 < whole.values[samplers.NAMES[0]] < 0.06, "the upper end of no rise in 100 requests"


def test_a_proposal_is_answered_by_the_nearest_setting_that_is_left(samplers, world):
    replay = samplers.Replay(world, np.random.default_rng(0), "no")
    told = [replay.answer("safe_instruct", {"learning_rate": rate_of(3.2)}).setting.params["learning_rate"] for _ in range(3)]
    assert told == [rate_of(3), rate_of(4), rate_of(2)]
    first = {"learning_rate": 2e-4}
    once, again = replay.answer("safe_instruct", first), replay.again("safe_instruct", first)
    assert once.setting is again.setting


def test_early_ends_spare_first_trials_and_recipes_that_come_back(samplers, world):
    def states(early, recipe):
        replay = samplers.Replay(world, np.random.default_rng(0), early)
        return [replay.answer(recipe, {"learning_rate": rate}).score is None for rate in (1e-4, 2e-4, 1e-3)]

    assert states("no", "full") == [False] * 3 and states("ours", "full") == [False, True, True]
    assert states("ours", "safe_instruct") == [False] * 3 and states("every", "safe_instruct") == [True] * 3
    replay = samplers.Replay(world, np.random.default_rng(0), "every")
    told = replay.answer("full", {"learning_rate": 1e-3})
    assert math.isclose(told.cost, 8 / 64 * 0.8) and math.isclose(told.constraints[samplers.NAMES[0]], 50 / 60 - world.limits[samplers.NAMES[0]])
    assert samplers.NAMES[1] not in told.constraints


def test_every_method_searches_to_the_end_and_regret_only_falls(samplers, world, monkeypatch):
    monkeypatch.setattr(samplers, "BUDGET", 6)
    for name, method in samplers.METHODS.items():
        run = method.search(samplers.Replay(world, np.random.default_rng(3), method.early), 3)
        costs, curve = [cost for cost, *_ in run], samplers.curve(world, run)
        assert costs == sorted(costs) and (costs[-1] >= 6 or len({id(told.setting) for _, told, _ in run}) == 16), name
        assert all(0 <= b[1] < a[1] for a, b in zip(curve, curve[1:], strict=False)), name
        best = samplers.reported(run)
        assert best is None or best.recipe == "safe_instruct", name


def test_what_is_counted(samplers, world):
    fine, broken = world.settings["safe_instruct"][2], world.settings["safe_instruct"][7]
    zero, ten = dict.fromkeys(samplers.NAMES, -0.1), dict.fromkeys(samplers.NAMES, 0.1)
    lucky = samplers.Told(broken, 0.9, zero, 1.0)
    run = [(1.0, lucky, False), (2.0, samplers.Told(fine, 0.6, zero, 1.0), False)]
    assert samplers.curve(world, run) == [(2.0, pytest.approx(world.best - fine.score))], "what only seemed feasible lowers no regret"
    assert samplers.reported(run) is broken and samplers.reported([*run, (3.0, samplers.Told(broken, 0.9, ten, 1.0), True)]) is fine
    assert samplers.quantile([1.0, 2.0, math.inf], 0.5) == 2.0 and samplers.quantile([1.0, math.inf], 0.9) is None
    assert samplers.reach([(2.0, 0.3), (5.0, 0.1)], 0.2) == 5.0 and samplers.at([(2.0, 0.3), (5.0, 0.1)], 4, 1.0) == 0.3


def test_rows_and_their_table(samplers, world, monkeypatch):
    monkeypatch.setattr(samplers, "BUDGET", 8)
    names = ["ours: equal + early end (default)", "random"]
    rows = list(samplers.rows_of(world, names, 3))
    assert [one["method"] for one in rows] == names and all(one["repetitions"] == 3 for one in rows)
    text = samplers.shown(rows)
    assert "25.0% of 16 settings feasible" in text and text.count("\n| ours") == 1


def test_the_table_that_is_shipped_is_whole_and_small(samplers):
    path = samplers.table.PACKED
    head, rows = samplers.table.read(path)
    assert path.stat().st_size < 3e6 and len(rows) == 288 and all(one["state"] == "complete" and len(one["probes"]) == 7 for one in rows)
    assert len({(one["task"], one["recipe"], one["setting"], one["seed"]) for one in rows}) == 288
    for task in samplers.table.TASKS:
        settings = samplers.settings_of(head, rows, task)
        assert {name: len(group) for name, group in settings.items()} == {"+".join(recipe): 9 for recipe in samplers.table.RECIPES}
