"""Trials of a recipe that ends with a method acting after training share trainings, also after an interruption."""

from __future__ import annotations

import dataclasses
import warnings

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from orchestrator import config
from orchestrator.search import spaces as ranges
from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.studies import Studies

NAMES = ("harmful",)
LATE = RecipeSpace(
    "lora+safe_lora",
    {
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True), "lora.lora_r": IntDistribution(2, 16),
        "safe_lora.number": IntDistribution(1, 50),
    },
    {}, {"learning_rate": 1e-3, "lora.lora_r": 8, "safe_lora.number": 10}, frozenset({"safe_lora.number"}),
)  # fmt: skip


def experiment(where, trials=12, sampler="tpe", per_training=4):
    return config.from_dict({
        "search": {"trials": trials, "sampler": sampler, "trials_per_training": per_training}, "output": {"dir": str(where)},
    })  # fmt: skip


def training_of(asked):
    return asked.params["learning_rate"], asked.params["lora.lora_r"]


def tell(studies, asked):
    studies.tell(asked.trial_id, "complete", 0.5 + asked.params["safe_lora.number"] / 100, {"harmful": -0.01})


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_followers_have_the_leaders_training_and_knobs_of_their_own(tmp_path, sampler):
    studies = Studies.create(experiment(tmp_path, sampler=sampler), {"lora+safe_lora": LATE}, NAMES)
    asked = []
    while (one := studies.ask()) is not None:
        asked.append(one)
        tell(studies, one)
    groups = [asked[i : i + 4] for i in range(0, 12, 4)]
    assert len(asked) == 12 and asked[0].params == LATE.defaults
    for group in groups:
        assert len({training_of(one) for one in group}) == 1
        assert len({one.params["safe_lora.number"] for one in group}) == 4, "a follower repeats a setting"
    assert len({training_of(group[0]) for group in groups}) == 3, "every group has a training of its own"


def test_followers_asked_while_the_leader_still_runs_share_it_too(tmp_path):
    studies = Studies.create(experiment(tmp_path, trials=4), {"lora+safe_lora": LATE}, NAMES)
    assert len({training_of(studies.ask()) for _ in range(4)}) == 1


def test_a_sampler_that_insists_on_a_known_point_still_stays_with_the_groups_training(tmp_path, monkeypatch):
    studies = Studies.create(experiment(tmp_path, trials=8), {"lora+safe_lora": LATE}, NAMES)
    recipe = studies._recipes["lora+safe_lora"]
    # as gp does once it is sure of the best setting
    insisting = optuna.samplers.PartialFixedSampler
    monkeypatch.setattr(optuna.samplers, "PartialFixedSampler", lambda fixed, base: insisting({**fixed, "safe_lora.number": 10}, base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        asked = [studies.ask() for _ in range(4)]
    assert len({training_of(one) for one in asked}) == 1 and len({one.params["safe_lora.number"] for one in asked}) == 4
    assert len(recipe.seen) == 4


def test_a_training_whose_settings_are_used_up_gives_way_to_another(tmp_path):
    few = dataclasses.replace(LATE, distributions={**LATE.distributions, "safe_lora.number": IntDistribution(10, 11)})
    studies = Studies.create(experiment(tmp_path, trials=4, sampler="random"), {"lora+safe_lora": few}, NAMES)
    asked = [studies.ask() for _ in range(4)]
    assert len({str(one.params) for one in asked}) == 4 and training_of(asked[0]) == training_of(asked[1]) != training_of(asked[2])


def test_one_trial_per_training_trains_every_trial_anew(tmp_path):
    studies = Studies.create(experiment(tmp_path, trials=6, sampler="random", per_training=1), {"lora+safe_lora": LATE}, NAMES)
    assert len({training_of(studies.ask()) for _ in range(6)}) == 6


def test_a_recipe_without_late_parameters_shares_nothing(tmp_path):
    early = RecipeSpace("lora", {k: LATE.distributions[k] for k in ("learning_rate", "lora.lora_r")}, {}, {})
    studies = Studies.create(experiment(tmp_path, trials=6, sampler="random"), {"lora": early}, NAMES)
    assert len({training_of(studies.ask()) for _ in range(6)}) == 6


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 6])
def test_a_restored_search_goes_on_inside_the_group(tmp_path, cut):
    """Cut after `cut` trials, one more running: the lost one comes first, and every group still has one training."""
    studies = Studies.create(experiment(tmp_path, trials=8), {"lora+safe_lora": LATE}, NAMES)
    asked = []
    for _ in range(cut):
        asked.append(studies.ask())
        tell(studies, asked[-1])
    lost = studies.ask()
    studies = Studies.restore(experiment(tmp_path, trials=8), {"lora+safe_lora": LATE}, NAMES)
    again = studies.ask()
    assert again.params == lost.params
    asked.append(again)
    tell(studies, again)
    while (one := studies.ask()) is not None:
        asked.append(one)
        tell(studies, one)
    assert len(asked) == 8
    for group in (asked[:4], asked[4:]):
        assert len({training_of(one) for one in group}) == 1


def test_which_parameters_act_after_training_is_read_off_the_methods(tmp_path):
    made = config.from_dict({"recipes": [["lora", "safe_lora"], ["safegrad"]], "output": {"dir": str(tmp_path)}})
    spaces = ranges.resolve_space(made, num_layers=4)
    assert spaces["lora+safe_lora"].after_training == {"safe_lora.number"}
    assert spaces["safegrad"].after_training == frozenset()
