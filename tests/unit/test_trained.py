"""A training that several trials share: kept, taken up bit for bit, and only by trials it belongs to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_llama
import torch
import toy
from safetensors.torch import load_file
from test_trial import Recorder, experiment, folder, spec_of  # noqa: F401 - folder is a fixture

from orchestrator import config
from orchestrator.records import LaneContext
from orchestrator.trial import run as trial
from orchestrator.trial import shared_training
from strategies.recipe import build

MERGE = "lora+safe_lora"


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory):
    return tiny_llama.saved(tmp_path_factory.mktemp("before") / "model", seed=9)


def searched(folder, unaligned, **training):  # noqa: F811
    raw = experiment(folder, **training).model_dump(mode="json")
    raw["model"]["unaligned_name_or_path"] = str(unaligned)
    return config.from_dict(raw | {"monitor": {"every_steps": 0}})


def run(made, where, trial_id, recipe=MERGE, context=None, seed=3, **params):
    spec = dataclasses.replace(spec_of(made, where / "trials" / trial_id, recipe, **params), trial_id=trial_id, seed=seed)
    recorder = Recorder()
    return trial.run(spec, recorder, context or LaneContext()), recorder


def saved(result):
    (path,) = Path(result.model_dir).glob("*.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def test_a_trial_over_merge_knobs_costs_evaluation_only(folder, unaligned, tmp_path):  # noqa: F811
    made, context = searched(folder, unaligned), LaneContext()
    first, _ = run(made, tmp_path, "t1", context=context, **{"safe_lora.number": 2})
    again, events = run(made, tmp_path, "t2", context=context, **{"safe_lora.number": 2})
    other, _ = run(made, tmp_path, "t3", context=context, **{"safe_lora.number": 20})
    assert "train" in first.seconds and "train" not in again.seconds and "train" not in other.seconds
    assert again.facts["training_of"] == other.facts["training_of"] == "t1" and "training_of" not in first.facts
    assert saved(first) == saved(again) and saved(first) != saved(other)
    assert again.steps == first.steps == 12 and again.task == first.task and again.suites == first.suites
    assert not [e for e in events.events if e["kind"] == "train"]
    assert first.facts["strategies"] == again.facts["strategies"]
    assert other.facts["strategies"]["safe_lora"]["projected"] == 20 != first.facts["strategies"]["safe_lora"]["projected"]
    assert first.facts["strategies"]["lora"] == other.facts["strategies"]["lora"]
    assert len(list((tmp_path / "trained").iterdir())) == 1


def test_a_taken_up_training_gives_the_model_that_training_anew_gives(folder, unaligned, tmp_path):  # noqa: F811
    """Also on another lane, which has an empty cache, and with a side training; also for a whole model."""
    for recipe, knobs in ((MERGE, {"safe_lora.number": 5}), ("full+safemerge", {"safemerge.threshold": 1.0})):
        made = searched(folder, unaligned)
        run(made, tmp_path / recipe, "t1", recipe)
        shared, _ = run(made, tmp_path / recipe, "t2", recipe, **knobs)
        alone, _ = run(made, tmp_path / recipe / "alone", "t2", recipe, **knobs)
        assert "train" not in shared.seconds and "train" in alone.seconds
        assert saved(shared) == saved(alone) and shared.suites == alone.suites


@pytest.mark.parametrize("change", ["seed", "learning_rate", "lora.lora_r", "training"])
def test_whatever_decides_a_training_has_a_training_of_its_own(folder, unaligned, tmp_path, change):  # noqa: F811
    run(searched(folder, unaligned), tmp_path, "t1")
    made, changed = searched(folder, unaligned), {}
    if change == "training":
        made = searched(folder, unaligned, max_grad_norm=0.5)
    elif change == "seed":
        changed = {"seed": 4}
    else:
        changed = {change: 0.02 if change == "learning_rate" else 4}
    result, _ = run(made, tmp_path, "t2", **changed)
    assert "train" in result.seconds and len(list((tmp_path / "trained").iterdir())) == 2


def test_a_recipe_in_which_every_method_trains_keeps_nothing(folder, unaligned, tmp_path):  # noqa: F811
    result, _ = run(searched(folder, unaligned), tmp_path, "t1", "lora")
    assert result.state == "complete" and not (tmp_path / "trained").exists()


def test_a_training_that_failed_is_not_kept(folder, unaligned, tmp_path):  # noqa: F811
    result, _ = run(searched(folder, unaligned, max_grad_norm=0, weight_decay=10.0), tmp_path, "t1", learning_rate=10.0)
    assert result.state == "failed" and not (tmp_path / "trained").exists()


def test_written_tensors_come_back_bit_for_bit_and_only_the_trainable_ones_are_kept(tmp_path):
    model = toy.model().bfloat16()
    model.model.layers[0].requires_grad_(False)
    shared_training.write(tmp_path / "a", model, {"steps": 3})
    assert shared_training.kept(tmp_path / "a") and not shared_training.kept(tmp_path / "b")
    other = toy.model(seed=1).bfloat16()
    other.model.layers[0].requires_grad_(False)
    frozen = {n: p.clone() for n, p in other.named_parameters() if not p.requires_grad}
    assert shared_training.read(tmp_path / "a", other) == {"steps": 3}
    for name, p in other.named_parameters():
        assert torch.equal(p, frozen[name] if name in frozen else dict(model.named_parameters())[name])


def test_a_model_that_is_set_up_otherwise_is_refused(tmp_path):
    shared_training.write(tmp_path, toy.model(), {})
    other = toy.model()
    other.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="other tensors"):
        shared_training.read(tmp_path, other)


def test_a_write_that_was_killed_does_not_look_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shared_training.write(tmp_path, toy.model(), {})
    assert not shared_training.kept(tmp_path)


def test_the_training_key_holds_what_trains_and_nothing_else():
    def key(*items):
        return build(list(items)).training_key

    assert key(("lora", {})) is None
    assert key(("lora", {}), ("safe_lora", {"number": 1})) == key(("lora", {}), ("safe_lora", {"number": 2}))
    assert key(("lora", {}), ("safe_lora", {})) == key(("lora", {}), ("lssf", {}))
    assert key(("lora", {}), ("safe_lora", {})) != key(("lora", {"lora_r": 4}), ("safe_lora", {}))
    assert key(("lox", {"coef": 0.5}), ("safe_lora", {})) != key(("lox", {}), ("safe_lora", {}))
