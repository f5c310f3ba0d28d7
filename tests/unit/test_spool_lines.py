"""The queue: any text survives it, what is no record is kept and said, a full disk tears nothing; a locked or full database is one sentence."""

from __future__ import annotations

import json
import logging
import sqlite3
import time

import made_up
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.records import TrialSpec
from orchestrator.tracking import connect, mlflow, spool
from orchestrator.tracking.spool import Away, Pump, Spool
from orchestrator.tracking.tracker import wrong_record

LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n\r"
QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.lists(st.text(alphabet=st.sampled_from(LINE_ENDS + "ab\ud800\udfff\0\""), max_size=12), min_size=1, max_size=5))
def test_text_with_any_line_end_and_half_characters_survives(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("spool") / "s.jsonl"
    queue = Spool(path, wrong_record)
    records = [{"op": "text", "run": "a", "file": "f", "text": text} for text in texts]
    for record in records:
        queue.append(record)
    assert Spool(path, wrong_record).peek() == records == queue.peek()


def test_a_file_of_an_earlier_version_is_read_though_its_text_is_not_escaped(tmp_path):
    record = {"op": "text", "run": "a", "file": "f", "text": f"x{LINE_ENDS}y"}
    (tmp_path / "s.jsonl").write_bytes((json.dumps(record, ensure_ascii=False) + "\n").encode())
    assert Spool(tmp_path / "s.jsonl", wrong_record).peek() == [record]


GOOD = {"op": "log", "run": "a", "metrics": [["m", 1.5, 1, 2]], "params": {}, "tags": {}}
BAD = [
    b"5", b"[]", b"null", b'"text"', b"{}", b'{"op": "log"}', b'{"run": "a"}', b'{"op": "drop", "run": "a"}',
    b"\0\0\0", b"\xff\xfe", b"[" * 50_000,
    b'{"op": "log", "run": "a", "metrics": [["m", NaN, 1, 2]], "params": {}, "tags": {}}',
    json.dumps(GOOD | {"metrics": [["m", "1", 1, 2]]}).encode(),
    json.dumps(GOOD | {"run": 5}).encode(), json.dumps(GOOD | {"metrics": {}}).encode(), b'{"op": ["log"], "run": "a"}',
]  # fmt: skip


def test_lines_that_are_no_records_are_kept_beside_and_said_once(tmp_path, caplog):
    path = tmp_path / "s.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, *BAD, good, good[:20]]))
    queue = Spool(path, wrong_record)
    assert queue.peek() == [GOOD, GOOD]
    (said,) = [r.getMessage() for r in caplog.records]
    assert f"{len(BAD) + 1} lines are no records" in said and "line 2" in said and len(said) < 500
    assert (tmp_path / "s.skipped").read_bytes() == b"\n".join([*BAD, good[:20]]) + b"\n", "nothing is thrown away"
    queue.append(GOOD)
    caplog.clear()
    assert Spool(path, wrong_record).peek() == [GOOD] * 3 and not caplog.records, "skipped, and said, once"


@pytest.mark.parametrize("op", ["create", "log", "inputs", "text", "artifact", "status"])
def test_what_the_driver_puts_into_the_queue_is_what_is_taken_from_it(tmp_path, op):
    class Sink:
        uri, state_path, runs = "sqlite://", tmp_path / "tracking.json", {}

        send = alive = lambda self, *a: None

    from orchestrator.tracking.tracker import Tracker

    made = made_up.experiment(tmp_path)
    driver = Tracker(made, Sink(), {})
    driver.start_trial(TrialSpec("t0001", "full", (), {}, {}, 0, "search", {}, ""))
    driver.event("t0001", {"kind": "train", "step": 1, "loss": 1.0})
    driver.finish_trial(made_up.result("t0001", "full", {"learning_rate": 1e-3}), None)
    driver._put("text", "parent", file="a", text="b")
    driver.finish(None, [tmp_path / "x.png", tmp_path / "x.csv"])
    driver._put("inputs", "parent", datasets=[{"name": "n", "digest": "d"}])
    found = [record for record in driver._spool.peek() if record["op"] == op]
    assert found and [wrong_record(record) for record in found] == [None] * len(found)


def test_a_disk_that_fills_and_is_freed_tears_no_record(tmp_path, monkeypatch, caplog):
    """The write that fails leaves half a line, as a full disk does."""
    monkeypatch.setattr(spool, "REMIND", 0.0)
    path = tmp_path / "s.jsonl"
    queue = Spool(path)
    queue.append({"i": 0})

    def half(self, line):
        with path.open("a") as file:
            file.write(line[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "_append_line", half)
        patch.setattr(spool.files, "write_text", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        queue.append({"i": 1})
        time.sleep(0.01)
        queue.append({"i": 2})
    time.sleep(0.01)
    queue.append({"i": 3})
    assert [r["i"] for r in Spool(path).peek()] == [0, 1, 2, 3]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "kept in memory only" in said[0] and "can be written again" in said[1]


class Locked:
    """Answers questions and takes nothing, as a database that is locked for writing does."""

    def __init__(self):
        self.got, self.locked, self.asked = [], True, 0

    def alive(self):
        return None

    def send(self, records):
        self.asked += 1
        if self.locked:
            raise Away("database is locked")
        self.got += [record["i"] for record in records]


def test_a_receiver_that_takes_nothing_loses_nothing_and_is_said_now_and_then(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spool, "REMIND", 0.2)
    server = Locked()
    queue = Spool(tmp_path / "s.jsonl")
    pump = Pump(queue, server.send, server.alive, "test server", pause=0.005, longest=0.02)
    pump.start()
    for i in range(5):
        queue.append({"i": i})
    deadline = time.monotonic() + 20
    while len(caplog.records) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    tries, server.locked = server.asked, False
    assert pump.close(5) == 0 and server.got == [0, 1, 2, 3, 4] and not (tmp_path / "s.rejected.jsonl").exists()
    said = [r.getMessage() for r in caplog.records]
    assert "does not answer (database is locked)" in said[0] and "has not answered for" in said[1] and "5 records wait" in said[1]
    assert "answers again" in said[-1] and len(said) < tries, "not once a try"


def test_refusals_are_one_sentence_and_a_count(tmp_path, caplog):
    class Refusing(Locked):
        def send(self, records):
            raise spool.Rejected("run is deleted")

    queue = Spool(tmp_path / "s.jsonl")
    for i in range(40):
        queue.append({"run": "a", "i": i})
    pump = Pump(queue, Refusing().send, Refusing().alive, "test server", pause=0.005)
    pump.start()
    assert pump.close(10) == 0
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "refused a record of run a: run is deleted" in said[0] and "refused 39 more records" in said[1]
    assert len((tmp_path / "s.rejected.jsonl").read_text().splitlines()) == 40


def test_what_a_database_says_when_it_takes_nothing_is_known_whatever_stands_before_it_and_whatever_was_written():
    deep = "(raised as a result of Query-invoked autoflush)\n(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT ...]"
    assert mlflow._away(deep) == "(sqlite3.OperationalError) database or disk is full"
    assert mlflow._away("(sqlite3.OperationalError) no such table\n[SQL: ?]\n[parameters: ('database is locked',)]") is None


def test_a_locked_database_prints_no_tracebacks_and_gets_everything(tmp_path, monkeypatch, capfd, caplog):
    """Real MLflow and SQLite, with a short patience for the lock; one that lets readers in, and one that does not."""
    import sqlalchemy

    made = made_up.experiment(tmp_path, tracking={"uri": f"sqlite:///{tmp_path / 'ml.db'}"})
    driver = connect.open_tracker(made, tmp_path / "out")
    real = sqlalchemy.sql.text  # MLflow waits 20 s for a lock
    monkeypatch.setattr(sqlalchemy.sql, "text", lambda text: real(text.replace("busy_timeout = 20000", "busy_timeout = 50")))
    deadline = time.monotonic() + 100
    for mode in ("IMMEDIATE", "EXCLUSIVE"):
        while len(driver._spool) and time.monotonic() < deadline:
            time.sleep(0.02)
        capfd.readouterr(), caplog.clear()
        caplog.set_level(logging.WARNING)
        other = sqlite3.connect(tmp_path / "ml.db", isolation_level=None)
        other.execute(f"BEGIN {mode}")
        driver.start_trial(TrialSpec(mode, "full", (), {}, {}, 0, "search", {}, ""))
        driver.event(mode, {"kind": "train", "step": 1, "loss": 1.0})
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.02)
        other.execute("COMMIT")
        other.close()
        while len(driver._spool) and time.monotonic() < deadline:
            time.sleep(0.02)
        said = [r.getMessage() for r in caplog.records]
        assert len(said) == 2 and "database is locked" in said[0] and "answers again" in said[1], said
        assert "Traceback" not in "".join(capfd.readouterr()) and driver.run_id(mode)
    assert driver.close() == 0 and not (tmp_path / "out" / "tracking.spool.rejected.jsonl").exists()


@pytest.mark.parametrize("raw", ["{", "[]", "5", '{"runs": []}', '{"runs": {"parent": 5}}', "\0\0"])
def test_a_damaged_tracking_json_is_kept_aside_and_new_runs_are_made(tmp_path, raw, caplog):
    sink = mlflow.Sink.__new__(mlflow.Sink)
    sink.uri, sink.state_path, sink.experiment_id, sink._unsure = "sqlite://", tmp_path / "tracking.json", "1", set()
    sink.state_path.write_text(raw)
    assert sink.known_runs() == {} and (tmp_path / "tracking.json.damaged-1").read_text() == raw
    assert len(caplog.records) == 1 and "MLflow gets new runs" in caplog.text
