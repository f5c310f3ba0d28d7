"""Trials whose run lies at an address: what a machine that is not the driver's sends, finds and keeps; a store that is away."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_llama
from pyarrow import fs
from test_storage import Failing
from test_trained import run, saved, searched
from test_trial import Recorder, experiment, folder, spec_of  # noqa: F401 - folder is a fixture

from orchestrator import config
from orchestrator.records import LaneContext
from orchestrator.storage import buckets
from orchestrator.trial import run as trial


def at(made, address):
    return config.from_dict(made.model_dump(mode="json") | {"output": {"dir": address}})


@pytest.fixture
def machine(tmp_path, monkeypatch):
    def on(name):
        monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / name))
        return tmp_path / name

    return on


def test_a_training_that_one_machine_made_is_taken_up_on_another(folder, tmp_path, machine):  # noqa: F811
    unaligned = tiny_llama.saved(tmp_path / "before" / "model", seed=9)
    address, bucket = f"{(tmp_path / 'bucket').as_uri()}/run", tmp_path / "bucket" / "run"
    made = at(searched(folder, unaligned), address)
    machine("one")
    first, _ = run(made, Path("/nowhere"), "t1")
    machine("two")
    second, recorder = run(made, Path("/nowhere"), "t2", **{"safe_lora.threshold": 0.9})
    assert first.state == second.state == "complete" and second.facts["training_of"] == "t1"
    assert not [event for event in recorder.events if event["kind"] == "train"]
    assert {path.name for path in (bucket / "trials").iterdir()} == {"t1", "t2"} and not list(tmp_path.glob("two/**/trials/*/model"))
    whole = searched(folder, unaligned)
    (tmp_path / "plain").mkdir()
    third, _ = run(whole, tmp_path / "plain", "t2", **{"safe_lora.threshold": 0.9})
    second.model_dir = str(bucket / "trials" / "t2" / "model")
    assert saved(second) == saved(third), "taken up or trained here, the same model bit for bit"


def test_a_finished_trial_leaves_no_checkpoint_of_any_rank_on_its_machine(folder, tmp_path, machine):  # noqa: F811
    machine("one")
    made = at(experiment(folder), f"{(tmp_path / 'bucket').as_uri()}/run")
    home = made.output_dir
    left = [home / "workers" / "rank-1" / "trials" / name / "checkpoint" / "step-5" / "rank-1.pt" for name in ("t1", "t2")]
    for path in left:  # from before an interruption, when this machine's worker was the second
        path.parent.mkdir(parents=True)
        path.write_bytes(b"gigabytes")
    result = trial.run(spec_of(made, tmp_path / "driver" / "trials" / "t1"), Recorder(), LaneContext())
    assert result.state == "complete" and [path.exists() for path in left] == [False, True], "another trial's may be wanted"
    assert not list(home.glob("trials/t1/checkpoint"))


def test_a_planted_marker_reaches_no_file_outside(folder, tmp_path, machine):  # noqa: F811
    machine("one")
    planted = tmp_path / "bucket" / "run" / "trials" / "t1" / "checkpoint" / "latest"
    planted.parent.mkdir(parents=True)
    planted.write_text(json.dumps({"step": 5, "world_size": 1, "signature": {}, "folder": "../../../../../elsewhere"}))
    made = at(experiment(folder), f"{(tmp_path / 'bucket').as_uri()}/run")
    result = trial.run(dataclasses.replace(spec_of(made, tmp_path / "driver" / "trials" / "t1"), attempt=1), Recorder(), LaneContext())
    assert result.state == "complete" and "resumed_from_step" not in result.facts
    (said,) = result.facts["storage"]
    assert "checkpoint/latest is damaged, or none of ours; the training starts over" in said


def test_training_goes_on_while_the_store_is_away(folder, tmp_path, machine, monkeypatch):  # noqa: F811
    monkeypatch.setattr("orchestrator.trial.files.MODEL_PATIENCE", 0.05)
    address, home = f"{(tmp_path / 'bucket').as_uri()}/run", machine("one")
    made, context, recorder = at(experiment(folder), address), LaneContext(), Recorder()
    system = Failing(fs.LocalFileSystem(), 1e9, "AWS Error NETWORK_CONNECTION during PutObject")
    context.cache[("store", address)] = buckets.Store(system, str(tmp_path / "bucket" / "run"), "s3://b/run", patience=0.05)
    result = trial.run(spec_of(made, tmp_path / "driver" / "trials" / "t1"), recorder, context)
    assert result.state == "complete" and result.steps == 12
    assert [event["step"] for event in recorder.events if event.get("storage")] == [5, 10]
    assert all("s3://b/run" in trouble and "check the network" in trouble for trouble in result.facts["storage"])
    (model,) = home.rglob("trials/t1/model/model.safetensors")
    assert model.is_file() and result.model_dir == str(model.parent), "what could not be sent stays"
