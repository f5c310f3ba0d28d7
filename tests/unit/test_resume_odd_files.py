"""What a hand, a move to another disk or a fault may leave in a run's folder: a resume never waits for it, never takes it for the run's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume_state import RUN, SPACES, Driver, experiment

from orchestrator import config
from orchestrator.errors import ConfigError, StorageError
from orchestrator.experiment import identity, resume, trial_records
from orchestrator.storage import files, layout, nofollow, ownership
from orchestrator.tracking import spool
from orchestrator.trial import record_check


@pytest.fixture(autouse=True)
def _no_waiting():
    """A read that waits is ended, and fails the test."""

    def waits(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(25)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def listens(path):
    short = os.path.relpath(path)  # a socket's name may have about 100 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(short if len(short) < len(str(path)) else str(path))


ODD = {
    "pipe": os.mkfifo, "folder": lambda p: p.mkdir(), "device": lambda p: p.symlink_to("/dev/zero"), "loop": lambda p: p.symlink_to(p.name),
    "link to nothing": lambda p: p.symlink_to("nowhere"), "link to a pipe": lambda p: (os.mkfifo(f"{p}.x"), p.symlink_to(f"{p.name}.x")),
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run's folder with three finished trials and one that was asked."""
    where = tmp_path_factory.mktemp("kept") / "out"
    driver = Driver.begin(where)
    for _ in range(3):
        driver.end(driver.ask())
    driver.ask()
    files.write_text(where / layout.CONFIG, config.dump_yaml(driver.made))
    identity.write(where, identity.new(driver.made, {"model": "a"}, RUN))
    for name in ("trials.csv", "tracking.json", "tracking.spool.jsonl"):
        (where / name).write_text("")
    return where


def put(kept, tmp_path, name=None, odd=None):
    folder = shutil.copytree(kept, tmp_path / "out")
    if name is not None:
        (folder / name).unlink(missing_ok=True)
        odd(folder / name)
    return folder


def resumed(folder):
    """As `safebasin resume` begins: (experiment, run id, what was said, driver)."""
    said = []
    made = resume.load(folder)
    assert resume.interrupted(made, folder)
    run = resume.take_over(folder, made, {"model": "a"}, said.append)
    return made, run, said, Driver.resume(folder, said.append)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", [
    "trials/t0002/result.json", "trials/t0002/spec.json", "study.journal", "study.journal.lock", "run.json", "config.resolved.yaml", "trials.csv",
    "tracking.json", "tracking.spool.jsonl",
])  # fmt: skip
def test_a_resume_waits_for_nothing_and_goes_on(kept, tmp_path, name, odd):
    folder = put(kept, tmp_path, name, ODD[odd])
    made, run, said, driver = resumed(folder)
    assert run == RUN and made.safety.limits.max_degradation == 0.05
    again = {"t0002"} if name.endswith("result.json") else set()
    assert {r.trial_id for r in driver.found.results} == {"t0001", "t0002", "t0003"} - again
    assert [trial for trial, *_ in driver.rest()] == sorted(again | {f"t{n:04d}" for n in range(4, 10)})
    if name.startswith(("trials/", "study", "run.json")):
        lines = said + driver.found.sentences
        assert any(name.split("/")[-1] in line and f"{name.split('/')[-1]}.damaged-1" in line for line in lines), lines


def test_a_socket_or_a_file_too_large_is_no_record(tmp_path):
    listens(tmp_path / "s")
    with (tmp_path / "big").open("wb") as file:
        file.truncate(nofollow.MOST_RECORD + 1)
    for name in ("s", "big"):
        with pytest.raises(record_check.BadRecord, match="a socket|at most"):
            record_check.read_json(tmp_path / name)


@pytest.mark.parametrize("odd", ["pipe", "device", "folder"])
def test_a_queue_that_is_no_file_is_moved_aside(tmp_path, odd):
    ODD[odd](tmp_path / "q.jsonl")
    queue = spool.Spool(tmp_path / "q.jsonl")
    queue.append({"a": 1})
    assert os.path.lexists(tmp_path / "q.jsonl.damaged-1") and json.loads((tmp_path / "q.jsonl").read_text()) == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 50])
def test_a_file_in_the_place_of_the_journals_lock_is_moved_aside_at_once(kept, tmp_path, content):
    folder = put(kept, tmp_path, "study.journal.lock", lambda path: path.write_bytes(content))
    *_, said, driver = resumed(folder)
    assert (folder / "study.journal.lock.damaged-1").read_bytes() == content and any("study.journal.lock was no lock" in line for line in said)
    assert len(driver.rest()) == 6


def test_the_journals_lock_of_a_driver_that_was_killed_while_it_wrote_does_not_stop_a_resume(kept, tmp_path):
    folder = put(kept, tmp_path)
    for name in ("study.journal", "study.journal.lock"):
        (folder / name).unlink(missing_ok=True)
    with ownership.active(folder, "run"):
        ownership.claim(folder / "study.journal.lock")
    (folder / "study.journal.lock").symlink_to(folder / "study.journal")
    with ownership.active(folder, "run"):
        ownership.claim(folder / "study.journal.lock")
    *_, driver = resumed(folder)
    assert len(driver.rest()) == 6
    assert not os.path.lexists(folder / "study.journal.lock")


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: p.symlink_to("trials"), lambda p: p.symlink_to("nowhere"), os.mkfifo])
def test_trials_that_is_no_folder_is_refused_with_a_remedy_that_keeps_the_run(kept, tmp_path, make):
    folder = put(kept, tmp_path)
    shutil.rmtree(folder / "trials")
    make(folder / "trials")
    with pytest.raises(StorageError, match="put the folder trials/ back"):
        trial_records.read(folder, experiment(folder), SPACES, RUN)


def test_trials_that_are_gone_are_said(kept, tmp_path):
    folder = put(kept, tmp_path)
    shutil.rmtree(folder / "trials")
    found = trial_records.read(folder, experiment(folder), SPACES, RUN)
    assert found.next_id == 5 and any("holds no trial" in line and "up to t0004" in line for line in found.sentences)


# ------------------------------------------------------------------------------------------------ the config, and run.json


@pytest.mark.parametrize("text", ["", "{}", "[]", "7", "[" * 100_000, "{" * 100_000, "- " * 5000, "\0\0", "a: [", "null", "# nothing"])
def test_a_resolved_config_that_is_none_is_not_needed(kept, tmp_path, text):
    folder = put(kept, tmp_path, "config.resolved.yaml", lambda path: path.write_text(text))
    made, *_ = resumed(folder)
    assert made.safety.limits.max_degradation == 0.05 and (folder / "config.resolved.yaml.damaged-1").read_text() == text


def test_a_hands_mistake_in_the_resolved_config_is_named(kept, tmp_path):
    folder = put(kept, tmp_path, "config.resolved.yaml", lambda path: path.write_text(f"search: {{trials: {'9' * 5000}}}"))
    with pytest.raises(ConfigError, match="line 1: a number of 5000 digits"):
        resume.load(folder)


def tampered(folder, **changes):
    path = folder / identity.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"run": ""}, {"run": "../../x"}, {"run": "a/b"}, {"run": "x" * 99}, {"run": 5}, {"config": {}},
                                     {"config": {"nope": 1}}, {"content": {"model": [1]}}, {"format": 2}])  # fmt: skip
def test_a_run_file_that_we_never_wrote_is_damaged_and_the_specs_name_the_run(kept, tmp_path, changes):
    folder = put(kept, tmp_path)
    tampered(folder, **changes)
    _, run, said, driver = resumed(folder)
    assert run == RUN and (folder / "run.json.damaged-1").exists() and any("moved to run.json.damaged-1" in line for line in said)
    assert len(driver.found.results) == 3


def test_a_run_file_without_hashes_says_that_nothing_was_compared(kept, tmp_path):
    folder = put(kept, tmp_path)
    tampered(folder, content={})
    *_, said, _ = resumed(folder)
    assert any("holds no hash of model" in line for line in said)


def edit(folder):
    path = folder / layout.CONFIG
    text = path.read_text()
    path.write_text(text.replace("max_degradation: 0.05", "max_degradation: 0.5"))
    assert path.read_text() != text


@pytest.mark.parametrize("lose", [lambda p: p.unlink(), lambda p: p.write_text("{"), lambda p: tampered(p.parent, config={}),
                                  lambda p: tampered(p.parent, config={**json.loads(p.read_text())["config"], "of a newer version": 1})])  # fmt: skip
def test_an_edited_config_is_noticed_without_the_run_file(kept, tmp_path, lose):
    folder = put(kept, tmp_path)
    lose(folder / identity.FILE)
    assert resumed(put(folder, tmp_path / "same"))[1] == RUN
    edit(folder)
    with pytest.raises(ConfigError, match=r"not the one that the trial t0001 was asked with \(safety.limits changed\).*run.json"):
        resume.interrupted(resume.load(folder), folder)


def test_without_run_file_and_hashes_all_that_is_not_known_is_said(kept, tmp_path):
    folder = put(kept, tmp_path)
    (folder / identity.FILE).unlink()
    for path in folder.glob("trials/*/spec.json"):
        raw = json.loads(path.read_text())
        del raw["config"]
        path.write_text(json.dumps(raw))
    *_, said, driver = resumed(folder)
    assert any("limits, recipes, suites, training, data and model" in line for line in said) and len(driver.found.results) == 3


def test_what_may_change_leaves_the_hashes_as_they_are(tmp_path):
    one = experiment(tmp_path).model_dump(mode="json")
    other = experiment(tmp_path / "x", trials=99, sampler="tpe", seeds=[0, 5]).model_dump(mode="json")
    assert identity.marks(one) == identity.marks(other)
    assert identity.marks(one) != identity.marks(experiment(tmp_path, seeds=[5]).model_dump(mode="json"))


# ------------------------------------------------------------------------------------------------ ids

numbers = st.one_of(st.integers(1, 30), st.integers(1, 10**9 - 1), st.sampled_from([9999, 10**6, 10**7 - 1, 10**7, 10**8 - 1, 10**9 - 1]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(planted=st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=4), many=st.integers(1, 30))
def test_ids_are_read_again_and_never_given_twice_however_often_a_run_is_resumed(planted, many):
    taken = set()
    for here in planted:
        taken |= set(here)
        first = record_check.next_number(taken)
        given_out = set(range(first, first + many))
        assert not given_out & taken and all(record_check.TRIAL_ID.fullmatch(f"t{number:04d}s1") for number in given_out)
        taken |= given_out


@pytest.mark.parametrize("name", ["t999999999", "t9999999", "t10000000", "t0100000"])
def test_a_planted_id_however_large_makes_no_id_come_twice(kept, tmp_path, name):
    folder = put(kept, tmp_path)
    (folder / "trials" / name).mkdir()
    given_out = []
    for _ in range(3):
        driver = Driver.resume(folder)
        asked = driver.ask()
        driver.end(asked)
        given_out.append(asked.trial_id)
    assert len(set(given_out)) == 3 and all(record_check.TRIAL_ID.fullmatch(one) for one in given_out) and name not in given_out


def test_where_no_id_is_free_it_is_said():
    with pytest.raises(StorageError, match="move the folders"):
        record_check.next_number(range(0, 10**9, 10**6 - 1))
