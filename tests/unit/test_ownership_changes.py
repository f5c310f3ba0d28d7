"""A run's list in a folder that is a copy, that somebody changed after the run ended, or in which links took the place of its files."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import made_up
import pytest
from test_ownership import run_once, tree

from orchestrator.errors import ConfigError, SafebasinError, StorageError
from orchestrator.experiment import places
from orchestrator.storage import ownership


def finished(tmp_path, name="out", **output):
    folder = tmp_path / name
    made = made_up.experiment(tmp_path, output={"dir": str(folder), **output})
    run_once(made, folder)
    time.sleep(0.02)  # file systems tell times apart by some milliseconds
    return folder, made_up.experiment(tmp_path, output={"dir": str(folder), "overwrite": True})


@pytest.mark.parametrize("name", ["report.html", "model/config.json", "ray/search/mynotes.txt", "trials/t0001/result.json",
                                  "trials/t0001/checkpoint/step-5/mynotes.txt", "trials/t0001/model/model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("old", [False, True])
def test_overwrite_leaves_what_somebody_changed_or_put_there_after_the_end(tmp_path, name, old):
    folder, again = finished(tmp_path)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text("mine")
    if old:  # brought along with its own, earlier time
        os.utime(path, (1_000_000_000, 1_000_000_000))
    before = tree(folder)
    with pytest.raises(ConfigError, match=rf"{name} was changed or put there since the run ended.*move it away, or give another output\.dir"):
        run_once(again, folder)
    assert tree(folder) == before
    path.rename(tmp_path / "away")
    run_once(again, folder)


def test_what_was_changed_is_remembered_through_a_resumed_run(tmp_path):
    folder, again = finished(tmp_path)
    note = folder / "ray" / "search" / "mynotes.txt"
    note.write_text("mine")
    made = made_up.experiment(tmp_path, output={"dir": str(folder)})
    run_once(made, folder, resumed=True)
    assert ownership.read(folder, "run").changed == {"ray/search/mynotes.txt"}
    with pytest.raises(ConfigError, match=r"ray/search/mynotes\.txt was changed or put there"):
        run_once(again, folder)
    (folder / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"report\.html was changed .* a resumed run would replace it"):
        run_once(made, folder, resumed=True)
    assert note.read_text() == (folder / "report.html").read_text() == "mine"


def test_a_run_that_was_killed_is_overwritten_but_not_what_came_long_after(tmp_path):
    folder, again = tmp_path / "out", made_up.experiment(tmp_path, output={"dir": str(tmp_path / "out"), "overwrite": True})
    with pytest.raises(StorageError):
        run_once(made_up.experiment(tmp_path, output={"dir": str(folder)}), folder, fail=True)
    note = folder / "ray" / "search" / "mynotes.txt"
    note.write_text("mine")
    os.utime(note, (time.time() + 200,) * 2)
    with pytest.raises(ConfigError, match=r"ray/search/mynotes\.txt was changed"):
        run_once(again, folder)
    note.unlink()
    run_once(again, folder)


def test_a_copied_folder_is_not_emptied_and_can_be_resumed(tmp_path):
    folder, _ = finished(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model" / "config.json").write_text("mine")
    (copy / "report.html").write_text("mine")
    again = made_up.experiment(tmp_path, output={"dir": str(copy), "overwrite": True})
    before = tree(copy)
    with pytest.raises(ConfigError, match="was written for another folder.*move it away or give another output.dir"):
        run_once(again, copy)
    assert tree(copy) == before
    run_once(made_up.experiment(tmp_path, output={"dir": str(copy)}), copy, resumed=True)
    assert (copy / "model.before-1" / "config.json").read_text() == "mine" and (copy / "model" / "config.json").exists()
    assert (copy / "report.html.before-1").read_text() == "mine"
    assert ownership.read(copy, "run").since is not None
    folder.rename(tmp_path / "moved")  # the same folder by another name
    run_once(made_up.experiment(tmp_path, output={"dir": str(tmp_path / "moved"), "overwrite": True}), tmp_path / "moved")


def test_a_list_without_a_place_deletes_nothing(tmp_path):
    folder, again = finished(tmp_path)
    body = json.loads((folder / ".safebasin.json").read_text())
    (folder / ".safebasin.json").write_text(json.dumps({key: body[key] for key in ("made_by", "format", "kind", "id", "made")}))
    before = tree(folder)
    with pytest.raises(ConfigError, match="by an earlier version, which did not note its folder"):
        run_once(again, folder)
    assert tree(folder) == before
    run_once(made_up.experiment(tmp_path, output={"dir": str(folder)}), folder, resumed=True)


@pytest.mark.parametrize("name", ["trials/t0001", "trials/t0001/model", "trials/baseline", "model", "plots", ".running.lock"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_link_at_any_depth_is_refused_before_anything_is_written(tmp_path, name, resumed):
    folder, again = finished(tmp_path)
    ours, outside = folder / name, tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("mine")
    if ours.is_dir():
        shutil.rmtree(ours)
    ours.unlink(missing_ok=True)
    ours.symlink_to(outside)
    before = tree(tmp_path)
    with pytest.raises(SafebasinError, match=name):
        run_once(made_up.experiment(tmp_path, output={"dir": str(folder)}) if resumed else again, folder, resumed=resumed)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["run", "evaluation", "model"])
@pytest.mark.parametrize("form", ["folder", "fifo"])
def test_a_marker_that_is_no_file_is_refused_by_name(tmp_path, kind, form):
    path = tmp_path / ownership.marker_name(kind)
    path.mkdir() if form == "folder" else os.mkfifo(path)
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ownership.NotOurs, match=f"{path.name} is no file that safebasin writes"):
        ownership.read(tmp_path, kind)
    assert len(os.listdir("/proc/self/fd")) == handles


def test_places_of_the_system_and_of_other_runs_are_refused(tmp_path):
    folder, _ = finished(tmp_path)
    for name in ("model", "model/x", "ray", "trials", "trials/t0001"):
        with pytest.raises(ConfigError, match="belongs to safebasin's run in|lies in the folder of a model"):
            places.check(folder / name)
    places.check(folder / "own")
    system = ("/etc/x", "/usr/share/x", "/bin", "/lib64/x", "/boot/x", "/proc/x", "/sys/x", "/dev/fd")
    secret = (Path.home() / ".ssh", Path.home() / ".gnupg" / "x")
    python = (Path(sys.prefix) / "lib" / "out", Path(sys.prefix), Path(places.__file__).parent / "out", tmp_path / "site-packages" / "x")
    for place in (*system, *secret, *python):
        with pytest.raises(ConfigError, match="lies (in|among)"):
            places.check(place)


def test_places_beside_those_of_the_system_are_free(tmp_path, monkeypatch):
    """A name that only begins like one of the system's, and an environment made in the project's own folder."""
    places.check("/library-of-results/x")
    places.check("/binaries/x")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    places.check(tmp_path / "outputs" / "x")
    with pytest.raises(ConfigError, match="lies in the Python installation"):
        places.check(tmp_path / "lib" / "x")
