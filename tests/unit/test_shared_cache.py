"""The cache that machines share: the pocket world and the untouched model's record come from an address and are left there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_pocket_build import QUIET, log, stub  # noqa: F401  (log is a fixture)

from orchestrator import config, pocket
from orchestrator.errors import ConfigError
from orchestrator.experiment import baseline, checks
from orchestrator.storage import buckets, cache
from orchestrator.verbs import doctor
from tests import made_up


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine("a")` makes this process one whose own cache folder is another, with the shared cache at one address."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "shared"))  # a folder is as good as an address

    def become(name: str) -> Path:
        folder = tmp_path / name
        monkeypatch.setenv("SAFEBASIN_CACHE", str(folder))
        return folder

    return become


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A store of which nothing can be read or written."""
    (tmp_path / "disk").write_text("no folder")
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    monkeypatch.setenv(cache.VARIABLE, f"file://{tmp_path}/disk/cache")


def test_the_pocket_world_is_built_on_one_machine_and_fetched_by_the_next(machine, log, tmp_path):  # noqa: F811
    machine("a")
    built = pocket.ensure(train=stub, progress=QUIET)
    machine("b")
    fetched = pocket.ensure(train=stub, progress=QUIET)
    assert log.read_text() == "0\n", "built once"
    assert fetched.root != built.root and fetched.complete()
    names = {path.relative_to(built.root) for path in built.root.rglob("*") if path.is_file()}
    assert {path.relative_to(fetched.root) for path in fetched.root.rglob("*") if path.is_file()} == names
    assert all((built.root / name).read_bytes() == (fetched.root / name).read_bytes() for name in names)
    assert fetched.root.stat().st_mode & 0o777 == 0o755 and fetched.report.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in fetched.root.parent.iterdir() if path.name.startswith(".")] == []


def test_what_is_half_there_is_built_and_replaced_and_what_is_there_is_sent_once(machine, log, tmp_path):  # noqa: F811
    folder = pocket.ensure(machine("a"), train=stub, progress=QUIET).root  # an explicit folder shares nothing
    assert not (tmp_path / "shared").exists()
    store = buckets.open(f"file://{tmp_path}/shared")
    below = f"pocket/{folder.name}"
    (folder / "report.json").rename(tmp_path / "report.json")
    cache.send_folder(folder)
    machine("b")
    assert pocket.ensure(train=stub, progress=QUIET).complete() and log.read_text() == "0\n0\n", "a version without its report is none"
    cache.send_folder(pocket.build.location().root)
    assert len([key for key in store.list(below) if key.endswith("report.json")]) == 1, "b replaced it, once"
    store.delete(below)
    for _ in range(2):
        cache.send_folder(pocket.build.location().root)
    versions = {key.split("/")[2] for key in store.list(below)} - {cache.CURRENT}
    assert versions == {store.read(f"{below}/{cache.CURRENT}").decode()}, "the second time one is there, and nothing is sent"
    store.write(f"{below}/{cache.CURRENT}", b"../../elsewhere")
    machine("c")
    assert pocket.ensure(train=stub, progress=QUIET).complete() and log.read_text() == "0\n0\n0\n", "a pointer that is none of ours is not followed"
    machine("d")
    assert pocket.ensure(train=stub, progress=QUIET).complete() and log.read_text() == "0\n0\n0\n", "it was replaced"


def test_a_record_measured_on_one_machine_is_taken_on_another(machine, tmp_path):
    machine("a")
    name = Path("baselines") / "x.json"
    result = made_up.baseline()
    assert baseline.look_up(tmp_path / "a" / name) == (None, None)
    assert baseline.remember(tmp_path / "a" / name, result) is None
    machine("b")
    found, trouble = baseline.look_up(tmp_path / "b" / name)
    assert trouble is None and found.to_dict() == result.to_dict() and (tmp_path / "b" / name).is_file()
    (tmp_path / "shared" / name).write_text("{")
    machine("c")
    assert baseline.look_up(tmp_path / "c" / name) == (None, None), "a damaged record is measured anew"
    assert baseline.remember(tmp_path / "c" / name, result) is None
    assert json.loads((tmp_path / "shared" / name).read_text()) == result.to_dict(), "and replaced"


def test_a_store_that_is_away_costs_the_work_and_is_said(away, log, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path))
    assert pocket.ensure(train=stub, progress=QUIET).complete() and log.read_text() == "0\n"
    said = capsys.readouterr().err
    assert "the pocket world is built here: cannot read" in said and "stays on this machine: cannot" in said
    where = tmp_path / "baselines" / "x.json"
    assert "cannot read baselines/x.json" in baseline.look_up(where)[1]
    assert "cannot write baselines/x.json" in baseline.remember(where, made_up.baseline())
    found, trouble = baseline.look_up(where)
    assert found is not None and trouble is None, "what is here is not asked for"
    state = next(doctor._shared_cache(None))
    assert (state.what, state.state) == ("shared cache", "fail")


def test_an_address_that_cannot_be_used_is_refused_by_the_variables_name(monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "s3://bucket/cache?secret_key=planted")
    with pytest.raises(ConfigError, match=cache.VARIABLE) as error:
        checks.check_combinations(config.load(None, []))
    assert "planted" not in str(error.value)


def test_without_the_variable_nothing_is_shared(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path))
    assert cache.opened() is None and not cache.fetch_file(tmp_path / "x") and list(doctor._shared_cache(None)) == []
    assert not cache.fetch_folder(tmp_path / "y", os.path.exists)
