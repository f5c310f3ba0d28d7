"""Overrides of `safebasin resume`: what finished trials do not depend on may change, all else is refused with what may."""

from __future__ import annotations

import made_up
import pytest

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.experiment import amend, identity, resume
from orchestrator.storage import layout


@pytest.fixture
def begun(tmp_path):
    made = made_up.experiment(tmp_path, search={"trials": 15})
    folder = made.output_dir
    folder.mkdir()
    (folder / layout.CONFIG).write_text(config.dump_yaml(made))
    identity.write(folder, identity.new(made, {"model": "abc"}))
    return made


def test_more_trials_are_counted_on_the_runs_own(begun):
    assert resume.load(begun.output_dir, ["search.trials=+20"]).search.trials == 35
    assert resume.load(begun.output_dir, ["search.trials=+2", "search.trials = +3"]).search.trials == 20
    assert resume.load(begun.output_dir, ["search.trials=20"]).search.trials == 20


FREE = ["search.time_budget_s=60", "ray.lanes=2", "tracking.experiment=other", "tracking.enabled=false", "output.keep_models=all", "ray={lanes: 3}",
        "search.max_concurrent_trials=1", "training.save_steps=3"]  # fmt: skip


@pytest.mark.parametrize("text", FREE)
def test_what_no_finished_trial_depends_on_may_change(begun, text):
    made = resume.load(begun.output_dir, [text])
    bound, free = identity.changes(begun, made)
    assert not bound and any(line.startswith(text.partition("=")[0]) for line in free)


BOUND = ["safety.limits.max_degradation=0.2", "training.learning_rate=1", "recipes=[[lora]]", "search.seeds=3", "output.dir=x", "name=y",
         "model.dtype=bfloat16", "search.finalists=9",
         "ray.num_workers=2", "ray={num_workers: 2}", "search.space={}", "task.metric=token_f1", "variables.a=b",
         "search.storage=j"]  # fmt: skip


@pytest.mark.parametrize("text", BOUND)
def test_anything_else_is_refused_with_what_may(begun, text):
    with pytest.raises(ConfigError, match=r"these may change: ray\.\*, tracking\.\*, search\.trials, .*another output\.dir"):
        resume.load(begun.output_dir, [text])


def test_words_that_are_no_override_are_told_as_everywhere(begun):
    with pytest.raises(ConfigError, match="not of the form key=value"):
        resume.load(begun.output_dir, ["search.trials"])
    with pytest.raises(ConfigError, match=r"search\.trialz.*search\.trials"):
        resume.load(begun.output_dir, ["search.trialz=+3"])
    with pytest.raises(ConfigError, match="ray.lane"):
        resume.load(begun.output_dir, ["ray.lane=1"])


def test_what_was_amended_stays_so_for_the_next_resume_and_can_be_taken_back(begun):
    folder, content = begun.output_dir, {"model": "abc"}
    told = []
    resume.take_over(folder, resume.load(folder, ["search.trials=+20"]), content, told.append)
    assert "changed since the run began: search.trials: 15 there, 35 here" in told[-1]
    assert resume.load(folder, ["search.trials=+1"]).search.trials == 36
    resume.take_over(folder, resume.load(folder, ["search.trials=15"]), content, told.append)
    assert resume.load(folder).search.trials == 15


def test_no_overrides_leave_the_config_as_it_is(begun):
    assert amend.amended(begun, []) is begun
