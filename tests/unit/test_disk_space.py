"""A full disk: told from other errors, waited for, and no reason to give up a record or a trial."""

from __future__ import annotations

import asyncio
import errno
import threading
import time

import pytest

from orchestrator.errors import StorageError
from orchestrator.lanes.broker import Broker
from orchestrator.records import TrialSpec
from orchestrator.storage import disk_space, files


@pytest.fixture
def disk(monkeypatch):
    """A disk whose room is a flag: `full` while set."""
    full = threading.Event()
    monkeypatch.setattr(disk_space, "has_room", lambda folder: not full.is_set())
    monkeypatch.setattr(disk_space, "LOOK_EVERY_S", 0.01)

    def replace(path, data, mode):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_bytes(data)

    monkeypatch.setattr(files.atomic, "replace", replace)
    return full


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True), (OSError(errno.EDQUOT, "x"), True), (OSError(errno.EACCES, "No space left"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True), (RuntimeError("CUDA error"), False),
    ],
)  # fmt: skip
def test_it_is_told_from_other_errors(error, full):
    assert disk_space.is_full(error) is full


def test_room_is_tried_and_nothing_is_left(tmp_path):
    assert disk_space.has_room(tmp_path / "not" / "there") and list(tmp_path.iterdir()) == []


def test_a_record_waits_for_room(tmp_path, disk):
    said = []
    disk.set()
    threading.Timer(0.2, disk.clear).start()
    with disk_space.patient(said.append, lambda: False):
        files.write_text(tmp_path / "result.json", "kept")
    assert (tmp_path / "result.json").read_text() == "kept"
    assert len(said) == 2 and "the disk is full; waiting" in said[0] and "room on the disk again" in said[1]


def test_without_a_run_and_after_a_stop_it_is_an_error_at_once(tmp_path, disk):
    disk.set()
    started = time.monotonic()
    with pytest.raises(StorageError, match="the disk is full; free space there"):
        files.write_text(tmp_path / "a", "x")
    with disk_space.patient(lambda line: None, lambda: True), pytest.raises(StorageError, match="the disk is full"):
        files.write_text(tmp_path / "a", "x")
    assert time.monotonic() - started < 5


def test_a_file_that_alone_is_too_large_is_not_tried_for_ever(tmp_path, disk, monkeypatch):
    tries = []

    def never(path, data, mode):
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.atomic, "replace", never)
    with disk_space.patient(lambda line: None, lambda: False), pytest.raises(StorageError, match="the disk is full"):
        files.write_text(tmp_path / "a", "x")
    assert len(tries) == files.TRIES


def test_an_interruption_that_was_waited_out_does_not_count_against_the_trial():
    async def life(waited):
        broker = Broker(1, 1)
        token = await broker.register(0, 1, 1, "host", [])
        await broker.submit(TrialSpec("t0001", "full", (), {}, {}, 0, "search", {}, ""))
        taken = 0
        for index in range(5):
            kind, _ = await broker.take(0, token, 0, index, timeout=0.01)
            taken += kind == "trial"
            if kind != "trial":
                break
            await broker.done(0, token, 0, {"error": "OSError: [Errno 28]", "fault": "machine", "traceback": "", "waited": waited})
        return taken

    assert asyncio.run(life(3.0)) == 5, "each time the disk had been full and had room again"
    assert asyncio.run(life(0.0)) == 2, "ray.max_trial_failures=1 takes it up again once"
