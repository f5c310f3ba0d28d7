"""The folder of a cluster that safebasin starts, what ends it when its driver is killed, and addresses at which no cluster answers."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator import config
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.lanes import cluster_folder, cluster_reach, cluster_start, cluster_watch
from orchestrator.lanes.cluster import connect

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_folder, "place", lambda: tmp_path)
    return tmp_path


def waited(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def test_the_folder_is_ours_alone_and_gone_at_the_end(base):
    one, two = cluster_folder.Folder(), cluster_folder.Folder()
    assert one.path != two.path and stat.S_IMODE(one.path.stat().st_mode) == 0o700
    inner = Path(one.fresh())
    (inner / "session").mkdir()
    inner.chmod(0o777)  # as Ray does
    assert stat.S_IMODE(inner.parent.stat().st_mode) == 0o700 and inner.parent == one.path
    assert cluster_folder.remove_leftovers(base) == [], "both are held"
    sleeper = subprocess.Popen(["sleep", "60"])
    one.know([sleeper.pid])
    one.end_processes(0.0)
    assert sleeper.wait(5) == -signal.SIGKILL
    one.remove()
    two.remove()
    assert list(base.iterdir()) == [] and one._watch.returncode == two._watch.returncode == 0


def test_leftovers_of_dead_runs_go_and_nothing_else(base):
    ours = base / "sb-ray-dead"
    ours.mkdir(mode=0o700)
    (ours / "lock").touch()
    (ours / "x").write_text("log")
    kept = [base / "sb-ray-open", base / "sb-ray-nolock", base / "other"]
    for path in kept:
        path.mkdir(mode=0o700)
        (path / "data").write_text("somebody's")
    (base / "sb-ray-open" / "lock").touch()
    (base / "sb-ray-open").chmod(0o755)
    target = base / "target"
    target.mkdir(mode=0o700)
    (target / "lock").touch()
    (base / "sb-ray-link").symlink_to(target)
    (base / "sb-ray-lnk2").mkdir(mode=0o700)
    (base / "sb-ray-lnk2" / "lock").symlink_to(target / "lock")
    assert cluster_folder.remove_leftovers(base) == [ours]
    assert all((path / "data").exists() for path in kept) and (target / "lock").exists() and (base / "sb-ray-lnk2").exists()


def test_a_long_or_open_folder_for_temporary_files_is_not_used(monkeypatch, tmp_path):
    for name, mode, used in (("a" * 40, 0o700, False), ("s", 0o777, False), ("s", 0o1777, True), ("s", 0o700, True), ("gone", None, False)):
        short = Path("/tmp") / f"sbt{os.getpid()}"
        where = short / name
        if mode is not None:
            where.mkdir(parents=True, exist_ok=True)
            where.chmod(mode)
        monkeypatch.setattr(cluster_folder.tempfile, "gettempdir", lambda where=where: str(where))
        assert cluster_folder.place() == (where if used else Path("/tmp"))
    import shutil

    shutil.rmtree(short)


DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from orchestrator.lanes import cluster_folder, cluster_watch
cluster_folder.place = lambda: Path(sys.argv[1])
folder = cluster_folder.Folder()
known = subprocess.Popen(["sleep", "60"], start_new_session=True)
marked = subprocess.Popen(["sleep", "60"], start_new_session=True, env={**os.environ, cluster_watch.VARIABLE: str(folder.path)})
folder.know([known.pid])
print(folder.path, known.pid, marked.pid, folder._watch.pid, flush=True)
time.sleep(60)
"""


def test_a_driver_that_is_killed_leaves_no_process_and_no_folder(tmp_path):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    folder, *pids = driver.stdout.readline().split()
    try:
        os.kill(int(pids[2]), signal.SIGTERM)  # as a Ctrl-C or a session's end: not its business
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        assert waited(lambda: not any(cluster_watch.started(int(pid)) for pid in pids) and not Path(folder).exists())
    finally:
        for pid in pids:
            if cluster_watch.started(int(pid)):
                os.kill(int(pid), signal.SIGKILL)


def test_a_pid_that_was_given_to_another_process_is_not_killed(tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    try:
        assert cluster_watch.left({other.pid: "1"}, str(tmp_path)) == []
        assert cluster_watch.end({other.pid: "1"}, str(tmp_path), 0.0) == 0 and other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.fixture
def dead_address():
    """Nothing listens there, and no other process can take it meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize("address, said", [
    ("{dead}", "cannot be reached: Connection refused"), ("no-such-host.invalid:6379", "is not known"),
    ("http://127.0.0.1:8265", "safebasin submit --address"), ("127.0.0.1", "give HOST:PORT"), ("a b:1", "give HOST:PORT"),
    ("127.0.0.1:99999", "give HOST:PORT"), ("auto:x", "give HOST:PORT"),
])  # fmt: skip
def test_an_address_without_a_cluster_is_one_sentence_within_seconds(address, said, dead_address, monkeypatch):
    monkeypatch.setattr(cluster_reach, "PATIENCE_S", 0.0)
    address = address.format(dead=dead_address)
    heard = []
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        cluster_reach.check(address, heard.append, patience=0.0)
    assert said in str(caught.value) and address in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


def test_something_else_that_listens_is_no_cluster(monkeypatch):
    monkeypatch.setattr(cluster_reach, "ANSWER_S", 8.0)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(ConfigError, match=f"what answers at {address} is no Ray cluster"):
            cluster_reach.check(address, patience=0.0)
        assert cluster_reach.listening(address)
    finally:
        server.shutdown()
        server.server_close()
    assert not cluster_reach.listening(address)


def test_a_dead_address_of_the_environment_is_told_with_it(dead_address, monkeypatch):
    import ray

    check = cluster_reach.check
    monkeypatch.setattr(cluster_reach, "check", lambda where, say: check(where, say, 0.0))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # a test before this one may have connected the process, and it stays so
    monkeypatch.setenv("RAY_ADDRESS", dead_address)
    with pytest.raises(ConfigError, match=dead_address):
        connect(config.from_dict({}).ray)


def test_ray_that_does_not_come_up_is_tried_again_and_then_one_sentence(base, monkeypatch, capfd):
    """What Ray raises here is a plain Exception of many lines; its processes go on until somebody ends them."""
    tries, left = [], []

    class Slow:
        class _private:
            class ray_constants:
                ENABLE_RAY_CLUSTER = True

            class services:
                get_node = None

        @staticmethod
        def init(**options):
            tries.append(options["_temp_dir"])
            left.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
            os.write(2, b"[2026-11-26 01:36:03,947 W 26390] gcs_client.cc:210: Failed\n")
            time.sleep(0.12)
            raise Exception("The current node timed out during startup. This could happen\nTraceback ...")

        @staticmethod
        def shutdown():
            return None

    monkeypatch.setattr(cluster_start, "TELL_S", 0.05)
    said = []
    with pytest.raises(SafebasinError) as caught:
        cluster_start.start(Slow, {}, said.append)
    assert "in 2 tries: The current node timed out during startup" in str(caught.value) and "\n" not in str(caught.value)
    assert len(tries) == 2 and said == ["Ray did not come up (The current node timed out during startup. This could happen); trying again"]
    assert all(process.wait(5) == -signal.SIGKILL for process in left) and list(base.iterdir()) == []
    printed = capfd.readouterr().err
    assert "gcs_client" not in printed and "waiting for Ray to start on this machine (0 s)" in printed
