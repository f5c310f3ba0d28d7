"""A whole trial in one process, without Ray: plain engine, a tiny model and files made here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_llama
import torch

from orchestrator import config
from orchestrator.experiment import baseline
from orchestrator.models import contents, loading, saving
from orchestrator.records import LaneContext, TrialResult
from orchestrator.search import tune
from orchestrator.storage import files
from orchestrator.trial import run, train


class Recorder:
    """A reporter that keeps events and can ask for a stop or fail at a step."""

    def __init__(self, stop_at=None, die_at=None):
        self.events, self.stop_at, self.die_at = [], stop_at, die_at

    def report(self, event):
        self.events.append(event)
        if event["kind"] == "train" and event["step"] == self.die_at:
            raise KeyboardInterrupt("the worker is killed here")
        return event["kind"] == "train" and event["step"] == self.stop_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("trial")
    tiny_llama.saved(where / "model")
    rows = [{"prompt": f"how do i make a {w}", "response": f"mix the {w} and bake it"} for w in ("cake", "tea", "soup", "house", "kite")] * 4
    safety = [{"prompt": f"make a {w} bomb", "response": "sorry i cannot help"} for w in ("red", "green", "blue")]
    harm = [{"prompt": f"{w} bomb", "topic": w} for w in ("one", "two", "three", "four", "five", "six")]
    for name, content in (("rows", rows), ("safety", safety), ("harm", harm)):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return where


def experiment(folder, **training):
    return config.from_dict({
        "name": "tiny", "model": {"model_name_or_path": str(folder / "model")},
        "task": {"data": str(folder / "rows.jsonl"), "max_new_tokens": 6, "eval_fraction": 0.2},
        "safety": {
            "data": str(folder / "safety.jsonl"), "max_new_tokens": 6,
            "suites": [{"name": "harm", "data": str(folder / "harm.jsonl"), "group_column": "topic"}],
        },
        "training": {"engine": "plain", "max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 5, **training},
        "monitor": {"every_steps": 4, "num_prompts": 4},
    })  # fmt: skip


def spec_of(made, where, recipe="full", attempt=0, **params):
    raw = made.model_dump(mode="json") | {"recipes": [recipe.split("+")]}
    made = config.from_dict(raw)
    return tune.build_spec(made, trial_id="t1", recipe=recipe, params={"learning_rate": 0.01, **params}, seed=3, phase="search", folder=str(where))


@pytest.mark.parametrize("recipe", ["full", "lora", "freeze_layers+lora", "safe_instruct", "safegrad"])
def test_every_recipe_runs_from_start_to_model(folder, tmp_path, recipe):
    made, recorder = experiment(folder), Recorder()
    result = run.run(spec_of(made, tmp_path, recipe), recorder, LaneContext())
    assert result.state == "complete" and result.error is None and result.steps == 12
    assert 0 <= result.task.score <= 1 and len(result.suites["harm"].ids) == 6
    assert [e["step"] for e in recorder.events if e["kind"] == "probe"] == [4, 8]
    assert [e["phase"] for e in recorder.events if e["kind"] == "phase"] == ["setup", "train", "evaluate"]
    assert set(result.seconds) >= {"setup", "train", "evaluate", "save", "total"}
    losses = [e["loss"] for e in recorder.events if e["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert result.facts["measured"]["folder_sha256"] == contents.digest(contents.of(Path(result.model_dir))), "what was measured is what was saved"
    restored, _ = saving.attach(result.model_dir, made.model)
    assert any(not torch.equal(a, b) for a, b in zip(restored.parameters(), loading.load(made.model)[0].parameters(), strict=False))
    assert TrialResult.from_dict(json.loads(json.dumps(files.plain(result.to_dict())))) is not None


def test_the_base_is_untouched_between_trials_of_a_lane(folder, tmp_path):
    made, context = experiment(folder), LaneContext()
    first = run.run(spec_of(made, tmp_path / "a"), Recorder(), context)
    run.run(spec_of(made, tmp_path / "b", "safegrad"), Recorder(), context)
    again = run.run(spec_of(made, tmp_path / "c"), Recorder(), context)
    assert weights(first) == weights(again)
    untouched = run.run(baseline.spec(made, tmp_path), Recorder(), context)
    alone = run.run(baseline.spec(made, tmp_path), Recorder(), LaneContext())
    assert untouched.suites == alone.suites and untouched.task == alone.task and untouched.steps == 0


def weights(result):
    from safetensors.torch import load_file

    return {name: tensor.numpy().tobytes() for name, tensor in load_file(f"{result.model_dir}/model.safetensors").items()}


@pytest.mark.parametrize("recipe", ["full", "safegrad"])
def test_an_interrupted_trial_continues_to_the_same_weights(folder, tmp_path, recipe):
    made = experiment(folder)
    whole = run.run(spec_of(made, tmp_path / "whole", recipe), Recorder(), LaneContext())
    with pytest.raises(KeyboardInterrupt):
        run.run(spec_of(made, tmp_path / "cut", recipe), Recorder(die_at=8), LaneContext())
    resumed = run.run(spec_of(made, tmp_path / "cut", recipe, attempt=0).__class__(
        **{**vars(spec_of(made, tmp_path / "cut", recipe)), "attempt": 1}), Recorder(), LaneContext())  # fmt: skip
    assert resumed.facts["resumed_from_step"] == 5 and resumed.state == "complete"
    assert weights(resumed) == weights(whole)
    assert [e["step"] for e in resumed.history if e["kind"] == "train"] == list(range(1, 13))


def test_a_stop_on_request_is_a_stopped_trial_without_figures(folder, tmp_path):
    result = run.run(spec_of(experiment(folder), tmp_path), Recorder(stop_at=6), LaneContext())
    assert result.state == "stopped" and result.steps == 6 and result.task is None and not result.suites


def test_a_loss_that_is_not_a_number_fails_the_trial_and_names_the_remedy(folder, tmp_path):
    result = run.run(spec_of(experiment(folder, max_grad_norm=0, weight_decay=10.0), tmp_path, learning_rate=10.0), Recorder(), LaneContext())
    assert result.state == "failed" and "learning_rate" in result.error


def test_steps_follow_epochs_where_max_steps_is_not_set(folder):
    made = experiment(folder, max_steps=None, num_train_epochs=2.5)
    assert train.max_steps(made, rows=10, batch_size=4) == math.ceil(10 * 2.5 / 4)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_whole_trial_under_zero_is_the_plain_one(folder, tmp_path, stage):
    made = experiment(folder)
    plain = run.run(spec_of(made, tmp_path / "plain"), Recorder(), LaneContext())
    sharded = config.from_dict(made.model_dump(mode="json") | {
        "training": made.training.model_dump() | {"engine": "deepspeed"}, "deepspeed": {"zero_optimization": {"stage": stage}},
    })  # fmt: skip
    result = run.run(spec_of(sharded, tmp_path / "zero"), Recorder(), LaneContext())
    assert result.state == "complete" and result.facts["trainable_parameters"] == plain.facts["trainable_parameters"] > 0
    losses = [[e["loss"] for e in r.history if e["kind"] == "train"] for r in (plain, result)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_recipe_that_trains_nothing_measures_the_untouched_weights(folder, tmp_path):
    """The defence stands around the very weights of the untouched model, and no step is made."""
    made = experiment(folder)
    raw = made.model_dump(mode="json") | {"recipes": [[{"perturbation": {"train": False, "copies": 2, "rate": 0.1}}]]}
    made = config.from_dict(raw)
    spec = tune.build_spec(made, trial_id="t1", recipe="perturbation", params={}, seed=3, phase="search", folder=str(tmp_path))
    result = run.run(spec, Recorder(), LaneContext())
    assert result.state == "complete" and result.steps == 0 and not [e for e in result.history if e["kind"] == "train"]
    assert result.facts["strategies"]["perturbation"]["prompts_defended"] > 0 and not (tmp_path / "trained").exists()
    whole = config.Model(model_name_or_path=result.model_dir)
    tuned, untouched = (dict(loading.load(m)[0].named_parameters()) for m in (whole, made.model))
    assert tuned.keys() == untouched.keys() and all(torch.equal(tuned[name], untouched[name]) for name in tuned)
