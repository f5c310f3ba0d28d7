"""The studies with real Optuna and a made-up world: budgets, duplicates, constraints, restore."""

from __future__ import annotations

import math
import warnings

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from orchestrator import config
from orchestrator.errors import ConfigError, StorageError, UnknownNameError
from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.studies import INFEASIBLE, SAMPLERS, Studies, make_sampler

NAMES = ("harmful", "borderline")
RATE = RecipeSpace("full", {"learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}, {}, {"learning_rate": 1e-3})


@pytest.fixture(autouse=True)
def _loud():
    """A warning of Optuna about a constraint set twice or a value refused is a bug of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def experiment(tmp_path, trials=12, sampler="tpe", **extra):
    return config.from_dict({"search": {"trials": trials, "sampler": sampler}, "output": {"dir": str(tmp_path)}, **extra})


def studies(tmp_path, spaces=None, **kwargs):
    return Studies.create(experiment(tmp_path, **kwargs), spaces or {"full": RATE}, NAMES)


def safe(**changes):
    return {"harmful": -0.05, "borderline": -0.1, **changes}


def everything(found: Studies):
    return [trial for trials in found.trials.values() for trial in trials]


def test_the_papers_defaults_come_first_and_the_pins_ride_along(tmp_path):
    space = RecipeSpace("lora", {"learning_rate": RATE.distributions["learning_rate"]}, {"lora.lora_r": 4}, {"learning_rate": 3e-3})
    asked = studies(tmp_path, {"lora": space}).ask()
    assert asked.params == {"learning_rate": 3e-3, "lora.lora_r": 4}
    assert (asked.trial_id, asked.recipe) == ("t0001", "lora")


def test_budget_is_shared_equally_and_then_over(tmp_path):
    found = studies(tmp_path, {name: RATE for name in ("a", "b", "c")}, trials=10)
    recipes = [found.ask().recipe for _ in range(10)]
    assert found.ask() is None
    assert sorted(recipes.count(name) for name in "abc") == [3, 3, 4]
    assert recipes[:3] == ["a", "b", "c"]


def test_budget_of_a_used_up_space_goes_to_the_others(tmp_path):
    two = RecipeSpace("two", {"lora.lora_r": CategoricalDistribution([4, 8])}, {}, {"lora.lora_r": 8})
    none = RecipeSpace("none", {}, {"learning_rate": 1e-3}, {})
    found = studies(tmp_path, {"two": two, "none": none, "full": RATE}, trials=12)
    asked = []
    while (one := found.ask()) is not None:
        asked.append(one)
        found.tell(one.trial_id, "complete", 0.5, safe())
    assert [a.recipe for a in asked].count("two") == 2 and [a.recipe for a in asked].count("none") == 1
    assert len(asked) == 12
    assert len({str((a.recipe, sorted(a.params.items()))) for a in asked}) == 12, "no point ran twice"


def test_search_ends_when_every_space_is_used_up(tmp_path):
    grid = RecipeSpace("grid", {"x.k": IntDistribution(1, 3), "x.b": CategoricalDistribution([True, False])}, {}, {})
    found = studies(tmp_path, {"grid": grid}, trials=50)
    seen = set()
    while (one := found.ask()) is not None:
        seen.add((one.params["x.k"], one.params["x.b"]))
        found.tell(one.trial_id, "complete", 0.1, safe())
    assert len(seen) == 6


def test_a_duplicate_is_told_what_is_known_and_not_run(tmp_path):
    grid = RecipeSpace("grid", {"x.k": IntDistribution(1, 4)}, {}, {"x.k": 1})
    found = studies(tmp_path, {"grid": grid}, trials=4, sampler="random")
    study = found._recipes["grid"].study
    first = found.ask()
    study.enqueue_trial({"x.k": 1})  # proposed again while the first one runs
    found.ask()
    found.tell(first.trial_id, "complete", 0.75, safe(harmful=0.2))
    study.enqueue_trial({"x.k": 1})  # and again when it is finished
    found.ask()
    twins = [t for t in everything(found) if "duplicate_of" in t.user_attrs and t.params == {"x.k": 1}]
    assert twins[0].state == TrialState.FAIL and twins[-1].state == TrialState.COMPLETE
    assert twins[-1].value == 0.75 and twins[-1].constraints == {"harmful": 0.2, "borderline": -0.1}


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, "absent"])
def test_a_safety_figure_that_is_not_there_is_infeasible(tmp_path, missing):
    found = studies(tmp_path)
    values = safe(harmful=missing)
    if missing == "absent":
        del values["harmful"]
    state = found.tell(found.ask().trial_id, "complete", 0.9, values)
    trial = everything(found)[0]
    assert state == TrialState.COMPLETE and trial.constraints == {"harmful": INFEASIBLE, "borderline": -0.1}


@pytest.mark.parametrize(
    ("state", "score", "told"),
    [
        ("complete", 0.9, TrialState.COMPLETE),
        ("complete", None, TrialState.FAIL),
        ("complete", math.nan, TrialState.FAIL),
        ("stopped", None, TrialState.PRUNED),
        ("failed", None, TrialState.FAIL),
        ("cancelled", None, TrialState.FAIL),
    ],
)
def test_every_end_is_told_with_every_constraint(tmp_path, state, score, told):
    found = studies(tmp_path)
    assert found.tell(found.ask().trial_id, state, score, None) == told
    trial = everything(found)[0]
    assert trial.state == told and trial.constraints == dict.fromkeys(NAMES, INFEASIBLE)
    assert not found._running


def test_a_constraint_that_was_not_announced_is_an_error(tmp_path):
    found = studies(tmp_path)
    with pytest.raises(ValueError, match="harmfull"):
        found.tell(found.ask().trial_id, "complete", 0.5, {"harmfull": 0.1})


def test_an_all_unsafe_search_has_no_best(tmp_path):
    found = studies(tmp_path, trials=6)
    while (one := found.ask()) is not None:
        found.tell(one.trial_id, "complete", 0.99, safe(harmful=0.3))
    with pytest.raises(ValueError, match="feasible"):
        _ = found._recipes["full"].study.best_trial


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_survive_failed_stopped_and_missing_trials(tmp_path, sampler):
    trials = 9 if sampler == "gp" else 14
    found = studies(tmp_path, sampler=sampler, trials=trials)
    ends = [("complete", 0.5, safe()), ("failed", None, None), ("complete", 0.4, safe(harmful=math.nan)), ("cancelled", None, None),
            ("stopped", None, {"harmful": 0.4}), ("complete", None, None)]
    count = 0
    while (one := found.ask()) is not None:
        state, score, values = ends[count % len(ends)]
        found.tell(one.trial_id, state, None if score is None else score + count / 100, values)
        count += 1
    assert count == trials
    assert all(set(trial.constraints) == set(NAMES) for trial in everything(found))


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_the_search_moves_towards_what_is_safe(tmp_path, sampler):
    """Score rises with the rate, and above 1e-3 the model is unsafe: later proposals must crowd at the safe side."""
    found = studies(tmp_path, sampler=sampler, trials=24)
    rates = []
    while (one := found.ask()) is not None:
        rate = one.params["learning_rate"]
        rates.append(rate)
        found.tell(one.trial_id, "complete", math.log10(rate), safe(harmful=math.log10(rate / 1e-3)))
    share = sum(rate <= 1.3e-3 for rate in rates[12:]) / 12
    assert share >= 0.6, rates
    feasible = [rate for rate in rates if rate <= 1e-3]
    assert max(feasible) > 7e-4


def test_sampler_is_seeded(tmp_path):
    def run(folder):
        found = studies(tmp_path / folder, trials=8)
        rates = []
        while (one := found.ask()) is not None:
            rates.append(one.params["learning_rate"])
            found.tell(one.trial_id, "complete", rates[-1], safe())
        return rates

    assert run("a") == run("b")


def test_restore_frees_interrupted_trials_and_goes_on_as_if_nothing_happened(tmp_path):
    straight = studies(tmp_path / "straight", trials=6)
    broken = studies(tmp_path / "broken", trials=6)
    for found in (straight, broken):
        for _ in range(3):
            one = found.ask()
            found.tell(one.trial_id, "complete", 0.5, safe())
    left_running = broken.ask()
    again = Studies.restore(experiment(tmp_path / "broken", trials=6), {"full": RATE}, NAMES)
    assert [t.state for t in everything(again)].count(TrialState.RUNNING) == 1, "it stands where it stood"
    first = again.ask()
    assert first.params == left_running.params, "what was interrupted is tried first"
    assert first.trial_id == left_running.trial_id == "t0004" and first.resumed, "it goes on where it was, in its own folder and run"
    again.tell(first.trial_id, "complete", 0.5, safe())
    while (one := again.ask()) is not None:
        again.tell(one.trial_id, "complete", 0.5, safe())
    told = [t for t in everything(again) if t.state == TrialState.COMPLETE]
    assert len(told) == 6 and not [t for t in everything(again) if t.state == TrialState.RUNNING]
    rates = [t.params["learning_rate"] for t in told]
    while (one := straight.ask()) is not None:
        straight.tell(one.trial_id, "complete", 0.5, safe())
    assert rates == [t.params["learning_rate"] for t in everything(straight)], "the sampler's random state was kept"


def test_a_second_search_in_the_same_place_is_refused(tmp_path):
    studies(tmp_path)
    with pytest.raises(StorageError, match="another place"):
        studies(tmp_path)


def test_restore_without_a_search_is_refused(tmp_path):
    with pytest.raises(StorageError, match="start a new one"):
        Studies.restore(experiment(tmp_path), {"full": RATE}, NAMES)


def test_an_error_of_optuna_is_not_swallowed(tmp_path):
    found = studies(tmp_path)
    asked = found.ask()
    found._recipes["full"].study.tell(0, 0.1)  # told behind our back
    with pytest.raises((ValueError, RuntimeError, optuna.exceptions.OptunaError)):
        found.tell(asked.trial_id, "complete", 0.5, safe())


def test_unknown_sampler_and_nsga2_with_early_stopping_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="tpe"):
        make_sampler("tpee", 0, 10)
    with pytest.raises(ConfigError, match="on_breach"):
        studies(tmp_path, sampler="nsga2", monitor={"every_steps": 5, "on_breach": "stop"})
