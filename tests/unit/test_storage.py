"""Addresses as text, files behind pyarrow.fs, a driver's hold on an address, and the copy of a run that follows it from machine to machine."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from orchestrator import config
from orchestrator.errors import ConfigError, StorageError
from orchestrator.experiment import checks, mirror, resume
from orchestrator.storage import addresses, buckets, files, layout, lease


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "ftp://host/run": "scheme ftp:// is unknown",
        "s3://key:planted@bucket/run": "holds no credentials",
        "s3://bucket/run?secret_key=planted": "holds no credentials",
        "abfss://box@account.dfs.core.windows.net/run?sas_token=planted": "holds no credentials",
        "s3://bucket": "name a folder below the bucket",
        "file://shared/run": "three slashes",
        "s3://bucket/run#x": "no #fragment",
    }.items(),
)
def test_an_address_that_cannot_be_used_is_refused_without_showing_its_secret(text, said):
    with pytest.raises(ConfigError) as error:
        config.load(None, [f"output.dir={text}"])
    assert said in str(error.value) and "output.dir" in str(error.value) and "planted" not in str(error.value)


def test_an_address_is_shown_without_what_may_be_secret_and_has_its_folder_here(tmp_path):
    experiment = config.load(None, ["output.dir=s3://bucket/a b/{name}/?region=eu-west-1&scheme=http", "name=x"])
    assert experiment.output_address == "s3://bucket/a b/x?region=eu-west-1&scheme=http" == experiment.output_place
    assert experiment.place_of("report.html") == "s3://bucket/a b/x/report.html?region=eu-west-1&scheme=http"
    assert experiment.output_dir.parent == tmp_path / "cache" / "staging" and experiment.output_dir.name.startswith("x-")
    assert addresses.masked("s3://k:pw@b/r?region=eu&X=1") == "s3://***@b/r?region=eu&X=***"
    folder = config.load(None, ["output.dir=out"])
    assert folder.output_address is None and folder.output_dir == Path("out")


def test_a_study_outside_of_the_address_is_refused():
    with pytest.raises(ConfigError, match="search.storage=x.journal"):
        checks.check_combinations(config.load(None, ["output.dir=s3://bucket/x", "search.storage=x.journal"]))


@pytest.fixture(params=["local", "mock", "subtree"])
def store(request, tmp_path):
    if request.param == "local":
        return buckets.Store(fs.LocalFileSystem(), str(tmp_path / "store"), "file:///store", patience=0.5)
    system = fs._MockFileSystem()
    system.create_dir("bucket")
    if request.param == "mock":
        return buckets.Store(system, "bucket/run", "mock://bucket/run", patience=0.5)
    return buckets.Store(fs.SubTreeFileSystem("bucket", system), "run", "sub://run", patience=0.5)


def test_files_and_folders_come_back_as_they_were(store, tmp_path):
    store.check()
    assert store.list() == {} and store.read("a") is None and not store.get("a", tmp_path / "a") and not (tmp_path / "a").exists()
    store.write("a/b.txt", b"one")
    store.write("a/b.txt", b"three")
    assert store.read("a/b.txt") == b"three" and store.exists("a/b.txt") and not store.exists("a")
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "x.bin").write_bytes(bytes(range(256)) * 1000)
    (source / "last").write_text("done")
    (source / ".lock").write_text("of this machine")
    store.put_folder(source, "f", last="last")
    assert store.list("f") == {"f/deep/x.bin": 256_000, "f/last": 4}
    assert store.get_folder("f", tmp_path / "back") and (tmp_path / "back" / "deep" / "x.bin").read_bytes() == bytes(range(256)) * 1000
    store.delete("f")
    store.delete("f")
    assert store.list() == {"a/b.txt": 5}
    store.delete("a/b.txt")
    assert store.read("a/b.txt") is None


def test_a_planted_name_writes_nothing_outside(tmp_path):
    system = fs._MockFileSystem()
    system.create_dir("b/run")
    with system.open_output_stream("b/run/x") as file:
        file.write(b"1")

    class Planted:
        type_name = "s3"

        def get_file_info(self, selector):
            info = system.get_file_info("b/run/x")
            return [type("Info", (), {"path": "b/run/trials/../../../evil", "is_file": True, "size": info.size})()]

    with pytest.raises(StorageError, match="outside of its folder"):
        buckets.Store(Planted(), "b/run", "s3://b/run").get_folder("trials", tmp_path / "here")


class Failing:
    """A filesystem whose calls fail `times` times with `text`, then are passed on."""

    def __init__(self, system, times: float, text: str):
        self._system, self.left, self._text = system, times, text

    @property
    def type_name(self):
        return self._system.type_name

    def __getattr__(self, name):
        def call(*args, **kwargs):
            if self.left > 0:
                self.left -= 1
                raise OSError(self._text)
            return getattr(self._system, name)(*args, **kwargs)

        return call


def test_a_store_that_stumbles_is_asked_again_and_one_that_is_away_is_one_sentence(tmp_path):
    system = Failing(fs.LocalFileSystem(), 2, "AWS Error NETWORK_CONNECTION during PutObject")
    stumbling = buckets.Store(system, str(tmp_path), "s3://b/run", patience=10)
    stumbling.write("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    away = buckets.Store(Failing(fs.LocalFileSystem(), 1e9, "AWS Error NETWORK_CONNECTION during PutObject (Request ID: abc)"), "r", "s3://b/r", 0.3)
    with pytest.raises(StorageError, match=r"^cannot write x in s3://b/r: AWS Error NETWORK_CONNECTION during PutObject; check the network"):
        away.write("x", b"1")


@pytest.mark.parametrize(("text", "remedy"), [("AWS Error NO_SUCH_BUCKET", "make the bucket"), ("AWS Error ACCESS_DENIED", "AWS_ACCESS_KEY_ID")])
def test_what_no_try_would_mend_is_said_at_once(text, remedy):
    system = Failing(fs.LocalFileSystem(), 1e9, text)
    with pytest.raises(StorageError, match=remedy):
        buckets.Store(system, "r", "s3://b/r", patience=60).write("x", b"1")
    assert system.left >= 1e9 - 1


def quick(store) -> lease.Lease:
    return lease.Lease(store, renew_s=0.05, stale_s=0.6)


def elsewhere(store) -> None:
    """The lease there is another machine's."""
    store.write(lease.NAME, json.dumps(json.loads(store.read(lease.NAME)) | {"host": "other/0"}).encode())


def test_a_driver_that_lives_keeps_others_out_and_a_dead_one_is_succeeded(store):
    first, said = quick(store), []
    first.take(said.append)
    assert not said
    elsewhere(store)
    second = quick(store)
    second.take(said.append)  # nothing was renewed for 0.6 s
    assert "this run takes over" in said[-1]
    gone = threading.Event()
    first.start(gone.set)
    assert gone.wait(20) and first.lost.is_set()
    second.start()
    with pytest.raises(ConfigError, match="is in use by another run that is still going"):
        lease.Lease(store, renew_s=0.05, stale_s=30).take(said.append)
    second.release()
    first.release()
    count = len(said)
    third = quick(store)
    third.take(said.append)
    assert len(said) == count, "one that was given back is taken at once"
    third.release()


def test_a_driver_that_died_on_this_machine_is_not_waited_for(store):
    quick(store).take(lambda line: None)
    body = json.loads(store.read(lease.NAME))
    store.write(lease.NAME, json.dumps(body | {"pid": 2**22 + 1}).encode())
    said = []
    lease.Lease(store, stale_s=60).take(said.append)
    assert not said


def opened(experiment, said=None, stop=None):
    return mirror.opened(experiment, stop or threading.Event(), (said if said is not None else []).append)


def until(what, seconds=20):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Experiments at one address, on a machine of that name."""

    def on(name, *overrides):
        monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / name))
        found = config.load(None, [f"output.dir={(tmp_path / 'bucket').as_uri()}/run", *overrides])
        found.output_dir.mkdir(parents=True, exist_ok=True)
        return found

    return on


def write_run(experiment, trials=("t0001", "t0000")):
    """What a run leaves: t0001 ended before t0000."""
    folder = experiment.output_dir
    files.write_text(folder / layout.CONFIG, config.dump_yaml(experiment))
    files.write_text(folder / "trials.csv", "trial_id\n" + "".join(f"{t}\n" for t in trials))
    for trial in trials:
        files.write_json(folder / "trials" / trial / "result.json", {"trial": trial})
        files.write_bytes(folder / "trials" / trial / "checkpoint" / "latest", b"a worker's")
    files.write_text(folder / "ray" / "x", "of this machine")
    files.write_json(folder / "tracking.json", {"uri": f"sqlite:///{folder}/mlflow.db"})
    files.write_bytes(folder / "study.journal", b'{"whole": 1}\n{"cut o')
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("create table if not exists experiments (artifact_location text)")
        database.execute("create table if not exists runs (artifact_uri text)")
        database.execute("insert into experiments values (?)", (f"file://{folder}/mlartifacts",))


def test_a_run_follows_its_address_to_another_machine(machine, tmp_path):
    one, bucket = machine("one"), tmp_path / "bucket" / "run"
    with opened(one) as copy:
        copy.begin()
        write_run(one)
        copy.news()
        assert copy.close() is None
    assert not (bucket / "ray").exists() and not list(bucket.rglob("checkpoint"))
    assert (bucket / "study.journal").read_bytes() == b'{"whole": 1}\n'
    two = resume.load(f"{(tmp_path / 'bucket').as_uri()}/run/")
    assert two.output.resume and two.output.dir.endswith("/run")
    two = machine("two", "output.resume=true")
    with opened(two) as copy:
        folder = two.output_dir
        results = sorted((folder / "trials").glob("*/result.json"), key=lambda path: path.stat().st_mtime_ns)
        assert [path.parent.name for path in results] == ["t0001", "t0000"], "in the order they ended"
        with sqlite3.connect(folder / "mlflow.db") as database:
            assert database.execute("select artifact_location from experiments").fetchone() == (f"file://{folder}/mlartifacts",)
        assert json.loads((folder / "tracking.json").read_text()) == {"uri": f"sqlite:///{folder}/mlflow.db"}
        copy.begin()
        files.write_bytes(bucket / "trials" / "t0000" / "model" / "w", b"weights")
        copy.fetch(folder / "trials" / "t0000" / "model")
        assert (folder / "trials" / "t0000" / "model" / "w").read_bytes() == b"weights"
        copy.remove(folder / "trials" / "t0000" / "model")
        (folder / "trials.csv").unlink()
        assert copy.close() is None
    assert not (bucket / "trials" / "t0000" / "model").exists() and not (bucket / "trials.csv").exists()


def test_an_earlier_winners_model_goes_when_another_is_handed_over_and_not_before(machine, tmp_path):
    bucket = tmp_path / "bucket" / "run" / "model"
    one = machine("one")
    with opened(one) as copy:
        copy.begin()
        write_run(one)
        copy.hand_over()
        for name in ("model.safetensors", "tokenizer.json"):
            files.write_bytes(one.output_dir / "model" / name, b"the whole model")
        assert copy.close() is None
    two = machine("two", "output.resume=true")
    with opened(two) as copy:  # killed before its end: it hands nothing over
        copy.begin()
        assert not (two.output_dir / "model").exists(), "a model is not fetched to be replaced"
        assert copy.close() is None
    assert sorted(path.name for path in bucket.iterdir()) == ["model.safetensors", "tokenizer.json"]
    three = machine("three", "output.resume=true")
    with opened(three) as copy:
        copy.begin()
        copy.hand_over()
        for name in ("adapter_model.safetensors", "tokenizer.json"):
            files.write_bytes(three.output_dir / "model" / name, b"an adapter")
        assert copy.close() is None
    assert sorted((path.name, path.read_bytes()) for path in bucket.iterdir()) == [
        ("adapter_model.safetensors", b"an adapter"), ("tokenizer.json", b"an adapter")]  # fmt: skip


def test_the_copy_of_the_database_is_no_older_than_what_is_known_of_it(machine, monkeypatch):
    """What a copy says is done with (a run was made, a record arrived) must be in the copy's database."""
    one, sent = machine("one"), []
    with opened(one) as copy:
        write_run(one)
        spool = files.write_text(one.output_dir / "tracking.spool.jsonl", '{"waits": 1}\n')
        copy._state["writer"] = "w"
        write = copy._quick.write

        def slow(name, data):
            sent.append(name)
            if name == "mlflow.db":
                files.write_text(spool, "")  # it arrives while the database's copy is on its way
            write(name, data)

        monkeypatch.setattr(copy._quick, "write", slow)
        copy._send_changes(urgent=True)
        assert sent.index("study.journal") < sent.index("mlflow.db") < sent.index("tracking.json")
        assert copy.store.read("tracking.spool.jsonl") == b'{"waits": 1}\n'
        copy._send_changes(urgent=True)
        assert copy.store.read("tracking.spool.jsonl") == b""


def test_an_address_with_a_run_is_refused_emptied_or_gone_on_with(machine, tmp_path):
    one, bucket = machine("one"), tmp_path / "bucket" / "run"
    with opened(one) as copy:
        copy.begin()
        write_run(one)
        copy.close()
    with pytest.raises(ConfigError, match="holds an earlier run.*overwrite"):
        checks.check_destination(one)
    with pytest.raises(ConfigError, match="holds an earlier run.*overwrite"), opened(one):
        pass
    again = machine("one", "output.resume=true")
    (again.output_dir / "only-here").write_text("x")
    with opened(again) as copy:
        assert (again.output_dir / "only-here").is_file(), "this machine's copy is the newest and is kept"
    fresh = machine("one", "output.overwrite=true")
    with opened(fresh) as copy:
        assert not (fresh.output_dir / "trials.csv").exists() and (bucket / "trials.csv").exists()
        copy.empty()
    assert [path.name for path in bucket.iterdir()] == [lease.NAME]
    with pytest.raises(ConfigError, match="no run to resume"):
        machine("three")
        resume.load(f"{(tmp_path / 'bucket').as_uri()}/nothing")


def test_a_store_that_goes_away_loses_nothing(machine, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "CLOSE_S", 0.0)
    monkeypatch.setattr(mirror, "TICK_S", 0.05)
    one, bucket = machine("one"), tmp_path / "bucket" / "run"
    with opened(one) as copy:
        copy.begin()
        broken = Failing(copy._quick.fs, 0, "AWS Error NETWORK_CONNECTION")
        copy._quick = buckets.Store(broken, copy._quick.root, "file://bucket", patience=0.05)
        broken.left = 1e9
        write_run(one)
        until(lambda: "the run goes on" in caplog.text)
        broken.left = 0
        until(lambda: (bucket / "trials.csv").exists() and "takes files again" in caplog.text)
        broken.left = 1e9
        files.write_text(one.output_dir / "late", "x")
        said = copy.close()
    assert "1 files could not be written" in said and str(one.output_dir) in said and "late" in said
    two, said = machine("two", "output.resume=true"), []
    with opened(two, said) as copy:
        copy.begin()
        copy.close()
    with opened(machine("one", "output.resume=true"), said) as copy:  # still the newest: the second machine wrote nothing of its own
        copy.begin()
        assert copy.close() is None
    assert (bucket / "late").read_text() == "x"


def test_what_only_this_machine_has_is_set_aside_where_another_went_on(machine, tmp_path):
    one = machine("one")
    with opened(one) as copy:
        copy.begin()
        write_run(one)
        copy.close()
    (one.output_dir / "mine").write_text("x")
    bucket = tmp_path / "bucket" / "run"
    (bucket / mirror.MANIFEST).write_text(json.dumps({"writer": "another", "folder": "/elsewhere"}))
    said: list[str] = []
    again = machine("one", "output.resume=true")
    with opened(again, said):
        assert not (again.output_dir / "mine").exists() and (again.output_dir / "trials.csv").is_file()
    (aside,) = again.output_dir.parent.glob("*.aside-*")
    assert (aside / "mine").read_text() == "x" and str(aside) in said[0]


@pytest.mark.parametrize("torn", ["", "{", "[]", "7", '{"files": 3}', '{"files": {"a": 1}}', '{"writer": []}', "[" * 100_000, "\0\xff"])
def test_a_damaged_manifest_loses_nothing(machine, tmp_path, torn):
    one = machine("one")
    with opened(one) as copy:
        copy.begin()
        write_run(one)
        copy.close()
    (one.output_dir / "mine").write_text("x")
    (one.output_dir / mirror.MANIFEST).write_bytes(torn.encode("latin-1"))
    (tmp_path / "bucket" / "run" / mirror.MANIFEST).write_bytes(torn.encode("latin-1"))
    said: list[str] = []
    again = machine("one", "output.resume=true")
    with opened(again, said) as copy:
        assert (again.output_dir / "trials.csv").is_file(), "what the store holds is here again"
        copy.begin()
        files.write_text(again.output_dir / "late", "x")
        assert copy.close() is None
    (aside,) = again.output_dir.parent.glob("*.aside-*")
    assert (aside / "mine").read_text() == "x" and sum("is damaged" in line for line in said) == 2
    assert json.loads((tmp_path / "bucket" / "run" / mirror.MANIFEST).read_text())["writer"]
