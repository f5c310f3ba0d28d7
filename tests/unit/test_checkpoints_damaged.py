"""Whatever becomes of a checkpoint's files, a training goes on from a state that was saved, or from the start; never from garbage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trained import run, saved, searched, unaligned  # noqa: F401 - unaligned is a fixture
from test_trial import Recorder, experiment, folder, spec_of  # noqa: F401 - folder is a fixture

from orchestrator import config
from orchestrator.errors import StorageError
from orchestrator.records import LaneContext
from orchestrator.trial import run as trial
from orchestrator.trial.monitor import Guard
from strategies import checkpoint, markers

SIGNATURE = {"engine": "plain", "parameters": "aa"}
ONE = {"rank": 0, "world_size": 1, "signature": SIGNATURE}


def save(where: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.write(where, {"weights": [torch.full((4,), float(step))], "step": step}, step=step, **ONE)


def intact(found: checkpoint.Reading) -> int | None:
    """The step of what was read, which must be what was saved at that step."""
    if found.step is not None:
        assert found.state["step"] == found.step and torch.equal(found.state["weights"][0], torch.full((4,), float(found.step)))
    return found.step


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder of two checkpoints."""
    where = tmp_path_factory.mktemp("two") / "checkpoint"
    save(where, 5, 10, 15)
    return where


def copied(where: Path, tmp: Path) -> Path:
    shutil.rmtree(tmp, ignore_errors=True)
    return Path(shutil.copytree(where, tmp))


FILES = ["latest", *(f"step-000000{step}/{name}" for step in (10, 15) for name in ("whole.json", "rank-0.pt"))]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_any_damage_to_any_files_leaves_an_intact_earlier_state_or_none(two, data):
    where = copied(two, two.parent / "damaged")
    assert sorted(str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()) == sorted(FILES)
    hurt = data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=5, unique=True))
    for name in hurt:
        content = (where / name).read_bytes()
        kind = data.draw(st.sampled_from(["cut", "flip", "gone", "other", "longer"]))
        at = data.draw(st.integers(0, len(content) - 1))
        if kind == "gone":
            (where / name).unlink()
        else:
            flipped = content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
            other = data.draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b'{"step": 1e999}']))
            (where / name).write_bytes({"cut": content[:at], "flip": flipped, "other": other, "longer": content + b"x"}[kind])
    found = checkpoint.read(where, **ONE)
    step = intact(found)
    whole = [s for s in (10, 15) if f"step-000000{s}/rank-0.pt" not in hurt and f"step-000000{s}/whole.json" not in hurt]
    assert not whole or step >= max(whole), "never worse than the newest untouched one"
    if step != 15:
        assert found.trouble, "what was passed over is said"
    save(where, 20)
    assert intact(checkpoint.read(where, **ONE)) == 20
    shutil.rmtree(where / "step-00000020")
    assert intact(checkpoint.read(where, **ONE)) == step, "the next save kept what was in use"


def test_the_sentence_names_what_was_damaged_and_what_was_taken(two, tmp_path):
    where = copied(two, tmp_path / "c")
    shard = where / "step-00000015" / "rank-0.pt"
    shard.write_bytes(shard.read_bytes()[:-9])
    found = checkpoint.read(where, **ONE)
    assert intact(found) == 10
    assert found.trouble == (
        "the checkpoint of step 15 is damaged (rank-0.pt is not what was written: its SHA-256 differs); the training goes on from the "
        "checkpoint of step 10"
    )
    shutil.rmtree(where / "step-00000010")
    found = checkpoint.read(where, **ONE)
    assert found.step is None and found.trouble.endswith("no other one is whole, so the training starts over")
    assert checkpoint.read(tmp_path / "nothing", **ONE) == checkpoint.Reading(None), "no checkpoint is no damage"


def test_checkpoints_of_before_shards_were_hashed_are_read(tmp_path):
    for extra in ({}, {"folder": "step-00000005"}):
        where = tmp_path / str(len(extra))
        (where / "step-00000005").mkdir(parents=True)
        torch.save({"weights": [torch.full((4,), 5.0)], "step": 5}, where / "step-00000005" / "rank-0.pt")
        (where / "latest").write_text(json.dumps({"step": 5, "world_size": 1, "signature": SIGNATURE, **extra}))
        found = checkpoint.read(where, **ONE)
        assert intact(found) == 5 and found.trouble is None
        save(where, 6)
        assert intact(checkpoint.read(where, **ONE)) == 6 and len(list(where.glob("step-*"))) == 2
    shard = where / "step-00000006" / "rank-0.pt"
    (where / "latest").write_text(json.dumps({"step": 6, "world_size": 1, "signature": SIGNATURE, "folder": "step-00000006"}))
    (shard.with_name("whole.json")).unlink()
    shard.write_bytes(shard.read_bytes()[:100])
    assert checkpoint.read(where, **ONE).step is None


def test_where_the_disk_has_no_room_for_three_the_older_one_goes_first(tmp_path, monkeypatch):
    save(tmp_path, 5, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    seen = []
    replace = checkpoint._replace
    monkeypatch.setattr(checkpoint, "_replace", lambda *a: (seen.append(sorted(p.name for p in tmp_path.glob("step-*"))), replace(*a)))
    save(tmp_path, 15)
    assert seen[0] == ["step-00000010", "step-00000015"] and intact(checkpoint.read(tmp_path, **ONE)) == 15


@pytest.fixture
def stopped(folder, tmp_path):  # noqa: F811
    """(experiment, folder of a trial that was interrupted at step 11, its model when nothing interrupts it)."""

    class Interrupting(Recorder):
        def report(self, event):
            return super().report(event) or (event["kind"] == "train" and event["step"] == 11)

    raw = experiment(folder, save_steps=3, logging_steps=1).model_dump(mode="json")
    raw["monitor"] = {"every_steps": 4, "num_prompts": 2, "on_breach": "rollback", "rule": "threshold", "max_unsafe_rise": 1.0}
    made = config.from_dict(raw)
    spec = spec_of(made, tmp_path / "trials" / "t1")
    assert trial.run(spec, Interrupting(), LaneContext()).state == "stopped"
    whole = trial.run(spec_of(made, tmp_path / "trials" / "t2"), Recorder(), LaneContext())
    assert whole.state == "complete" and whole.steps == 12
    return made, spec, saved(whole)


@pytest.mark.parametrize("hurt, steps", [((9,), 6), ((9, 6), None), (("latest",), 9)])
def test_a_trial_goes_on_from_what_is_whole_and_ends_as_if_nothing_had_been(stopped, hurt, steps):
    _, spec, wanted = stopped
    where = Path(spec.dir) / "checkpoint"
    for name in hurt:
        path = where / name if isinstance(name, str) else where / f"step-{name:08d}" / "rank-0.pt"
        os.truncate(path, path.stat().st_size // 2)
    recorder = Recorder()
    result = trial.run(dataclasses.replace(spec, attempt=1), recorder, LaneContext())
    assert result.state == "complete" and result.facts.get("resumed_from_step") == steps
    assert result.facts["checkpoint"] == next(event["storage"] for event in recorder.events if event.get("storage"))
    assert "damaged" in result.facts["checkpoint"] and saved(result) == wanted


def test_a_monitor_that_has_no_whole_state_to_go_back_to_lets_the_trial_start_over(folder, tmp_path, monkeypatch):  # noqa: F811
    raw = experiment(folder, save_steps=3, logging_steps=1).model_dump(mode="json")
    raw["monitor"] = {"every_steps": 4, "num_prompts": 2, "on_breach": "rollback", "rule": "threshold", "max_unsafe_rise": 0.0}
    made = config.from_dict(raw)
    spec = spec_of(made, tmp_path / "trials" / "t1")

    class Vandal(Recorder):
        def report(self, event):
            if event["kind"] == "probe" and event["breach"]:
                for path in (Path(spec.dir) / "good").rglob("*.pt"):
                    path.write_bytes(b"")
            return super().report(event)

    recorder = Vandal()
    full = Guard._full
    monkeypatch.setattr(Guard, "_full", lambda *args: dataclasses.replace(full(*args), breach=True, clean=False))
    with pytest.raises(StorageError, match="no safe state in .* is whole"):
        trial.run(spec, recorder, LaneContext())
    assert not (Path(spec.dir) / "checkpoint").exists() and not (Path(spec.dir) / "good").exists()
    monkeypatch.setattr(Guard, "_full", full)
    again = trial.run(dataclasses.replace(spec, attempt=1), Recorder(), LaneContext())
    assert again.state == "complete" and "resumed_from_step" not in again.facts


@pytest.mark.parametrize("name, content", [
    ("weights.safetensors", b""), ("weights.safetensors", None), ("facts.json", b"{}"), ("facts.json", b'{"steps"'), ("facts.json", None),
])  # fmt: skip
def test_a_damaged_training_that_trials_share_is_trained_again(folder, unaligned, tmp_path, name, content):  # noqa: F811
    made, context = searched(folder, unaligned), LaneContext()
    first, _ = run(made, tmp_path, "t1", context=context)
    (path,) = tmp_path.glob(f"trained/*/{name}")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data) if content is None else content)
    second, _ = run(made, tmp_path, "t2", context=context)
    third, _ = run(made, tmp_path, "t3", context=context)
    assert "train" in second.seconds and "it is trained again" in second.facts["storage"][0]
    assert saved(first) == saved(second) == saved(third)
    assert third.facts["training_of"] == "t2" and "storage" not in third.facts


def test_an_address_whose_copies_are_damaged_gives_the_one_before_or_none(folder, tmp_path, monkeypatch):  # noqa: F811
    class Interrupting(Recorder):
        def report(self, event):
            return super().report(event) or (event["kind"] == "train" and event["step"] == 11)

    raw = experiment(folder, save_steps=3, logging_steps=1).model_dump(mode="json")
    made = config.from_dict(raw | {"output": {"dir": f"{(tmp_path / 'bucket').as_uri()}/run"}})
    bucket = tmp_path / "bucket" / "run" / "trials" / "t1" / "checkpoint"
    spec = spec_of(made, tmp_path / "driver" / "trials" / "t1")
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "one"))
    assert trial.run(spec, Interrupting(), LaneContext()).state == "stopped"
    assert sorted(path.name for path in bucket.iterdir()) == ["latest", "step-00000006", "step-00000009"]
    for number, (hurt, step) in enumerate([(["step-00000009/rank-0.pt"], 6), (None, None)]):
        for name in hurt or [path.relative_to(bucket) for path in bucket.rglob("*") if path.name in ("latest", "whole.json")]:
            (bucket / name).write_bytes(b"[]")
        monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / f"empty{number}"))
        result = trial.run(dataclasses.replace(spec, attempt=1), Recorder(), LaneContext())
        assert result.state == "complete" and result.facts.get("resumed_from_step") == step
        assert any(("the one before is used" if step else "the training starts over") in said for said in result.facts["storage"])


def test_a_marker_that_names_a_folder_elsewhere_is_none(two):
    good = json.loads((two / "latest").read_text())
    assert markers.parse(json.dumps(good)) == good
    folders = [{"folder": name} for name in ("../x", "step-1/../../x", "step-1/", 3, None)]
    for change in (*folders, {"step": True}, {"step": -1}, {"sha256": []}, {"serial": 10**400}):
        assert markers.parse(json.dumps(markers.seal(good | change))) is None, change
