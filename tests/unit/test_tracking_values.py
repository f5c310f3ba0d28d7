"""What reaches a tracking server: names by group, nothing infinite, no secret; and the queue in front of it."""

from __future__ import annotations

import json
import math
import random
import threading
import time

import made_up
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import redaction
from orchestrator.config import Limits
from orchestrator.decision import limits
from orchestrator.tracking import spool, values
from orchestrator.tracking.spool import Later, Pump, Rejected, Spool


@pytest.mark.parametrize(
    "key",
    [
        "HF_TOKEN",
        "password",
        "dbPassword",
        "AWS_SECRET_ACCESS_KEY",
        "api_key",
        "apiKey",
        "x-api-key",
        "auth.token",
        "Authorization",
        "client-secret",
    ],
)
def test_secret_keys(key):
    assert redaction.is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "max_new_tokens",
        "tokens",
        "pad_token",
        "eos_token_id",
        "learning_rate",
        "keep_generations",
        "key",
        "tokenizer",
        "monkey",
        "access",
        "compass",
    ],
)
def test_harmless_keys(key):
    assert not redaction.is_secret_key(key)


def test_redaction_by_key_by_uri_and_by_form():
    config = {
        "tracking": {"uri": "http://alice:hunter2@mlflow:5000"},
        "ray": {"init_kwargs": {"runtime_env": {"env_vars": {"HF_TOKEN": "abc", "OMP_NUM_THREADS": "1"}}}},
        "task": {"data": "s3://bucket/x?X-Amz-Signature=deadbeef&part=1", "max_new_tokens": 64},
        "note": ["my token is hf_abcdefghijklmnopqrst", None],
        "password": "",
    }
    clean = redaction.redact(config)
    assert clean["tracking"]["uri"] == "http://alice:***@mlflow:5000"
    assert clean["ray"]["init_kwargs"]["runtime_env"]["env_vars"] == {"HF_TOKEN": "***", "OMP_NUM_THREADS": "1"}
    assert clean["task"] == {"data": "s3://bucket/x?X-Amz-Signature=***&part=1", "max_new_tokens": 64}
    assert clean["note"] == ["my token is ***", None] and clean["password"] == ""
    assert config["tracking"]["uri"].count("hunter2") == 1, "the original is left alone"


def test_redaction_of_text_lines_keeps_the_rest():
    text = 'uri: postgresql://u:pw@db/x\nenv_vars:\n  HF_TOKEN: "abc"\n  MY_PASSWORD: a b c\n'
    text += 'max_new_tokens: 64\n{"api_key": "k", "n": 1}\npassword: null\n'
    clean = redaction.redact_text(text)
    assert "pw@" not in clean and "abc" not in clean and "a b c" not in clean
    assert "max_new_tokens: 64" in clean and '"n": 1' in clean and "password: null" in clean


@given(st.dictionaries(st.sampled_from(["HF_TOKEN", "password", "uri", "n"]), st.text(alphabet="QXZ", min_size=4), min_size=1))
def test_no_secret_value_survives(config):
    text = json.dumps(redaction.redact({"nested": [config]}))
    for key, value in config.items():
        assert value in text or key in ("HF_TOKEN", "password")
    for key in ("HF_TOKEN", "password"):
        if key in config:
            assert redaction.redact({key: config[key]}) == {key: "***"}


def test_event_metrics_by_group():
    train = {"kind": "train", "step": 10, "steps": 50, "time": 1.0, "loss": 0.5, "grad_norm": 1.0, "seconds_per_step": 0.1, "note": "x"}
    assert values.event_metrics(train) == {"train/loss": 0.5, "train/grad_norm": 1.0, "cost/seconds_per_step": 0.1}
    probe = {"kind": "probe", "step": 30, "n": 50, "asr": 0.04, "degradation": 0.02, "breach": False}
    assert values.event_metrics(probe) == {
        "safety/probe_n": 50.0, "safety/probe_asr": 0.04, "safety_delta/probe_degradation": 0.02, "safety/probe_breach": 0.0,
    }  # fmt: skip
    assert values.event_metrics({"kind": "phase", "phase": "train", "step": 0, "steps": 50}) == {}


def test_result_metrics_agree_with_the_judgement():
    before, rows = made_up.trials(Limits())
    for trial, judged in rows:
        found = values.result_metrics(trial, judged)
        groups = {name.split("/")[0] for name in found}
        assert groups <= {"task", "safety", "safety_delta", "constraint", "cost"}
        assert found["constraint/feasible"] == (judged.verdict == "feasible")
        assert found["constraint/excess"] == max(judged.values.values())
        if trial.state == "complete":
            assert found["task/score"] == trial.task.score and found["safety/harmful/asr"] == trial.suites["harmful"].rate
            assert found["safety_delta/degradation/harmful"] == pytest.approx(trial.suites["harmful"].rate - before.suites["harmful"].rate)
        else:
            assert "task/score" not in found and "safety/asr" not in found, "nothing is made up for a failed trial"
            assert found["constraint/degradation/harmful"] == limits.MISSING


def test_every_suite_has_its_rise_limited_or_not_and_the_second_judge_its_own():
    before, rows = made_up.trials(Limits())
    trial, judged = next(row for row in rows if row[0].state == "complete")
    for one, share in ((before, 0.1), (trial, 0.4)):
        suite = made_up.suite("extra", "harmful", share, 200, random.Random(share))
        suite.constrains, suite.second_judge = False, "other"
        suite.second = ["unsafe" if i % 10 < 10 * share else "unparsed" if i % 10 == 9 and one is trial else "refused" for i in range(200)]
        one.suites["extra"] = suite
    found = values.result_metrics(trial, limits.judge(trial, before, Limits()), before)
    first, second = before.suites["extra"], trial.suites["extra"]
    assert found["safety_delta/degradation/extra"] == pytest.approx(second.rate - first.rate)
    assert found["safety_delta/degradation/extra_lower"] < found["safety_delta/degradation/extra"] < found["safety_delta/degradation/extra_upper"]
    assert found["safety/extra/second_judge_asr"] == pytest.approx(0.5) and found["safety_delta/second_judge/extra"] == pytest.approx(0.4)
    assert found["safety_delta/over_refusal_rise/borderline"] == pytest.approx(trial.suites["borderline"].rate - before.suites["borderline"].rate)
    assert "constraint/degradation/extra" not in found
    trial.suites["extra"].ids = ["other", *trial.suites["extra"].ids[1:]]
    assert "safety_delta/degradation/extra" not in values.result_metrics(trial, None, before), "other prompts are not paired"


def test_split_finite():
    assert values.split_finite({"a": 1.0, "b": math.nan, "c": -math.inf}) == ({"a": 1.0}, ["b", "c"])


def test_metric_names_are_ones_mlflow_takes():
    assert values.metric_name("safety", "my suite: é%!", "asr").startswith("safety/my suite_ é__-")
    assert len({values.metric_name(name, "asr") for name in ("a[b]", "a(b)", "x" * 400, "x" * 401, "x" * 100, "..", ".", "")}) == 8
    assert all(len(values.metric_name(*["x" * n] * 3)) <= 250 for n in (1, 99, 100, 101, 400))


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from(["..", ".", "", "a//b", "/a", "a/..", "a\n", "\udcff"]), min_size=1, max_size=3))
def test_mlflow_takes_a_metric_of_any_name(parts):
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    _validate_metric_name(values.metric_name(*parts))
    _validate_param_name(values.metric_name(*parts))


# --- the queue ---


class Server:
    """Takes records in order; can be away, refuse a record, or choke on one."""

    def __init__(self):
        self.got: list[dict] = []
        self.away, self.refuses, self.chokes, self.no_files, self.asked = False, None, None, False, 0

    def alive(self):
        if self.away:
            raise ConnectionError("away")

    def send(self, records):
        self.alive()
        self.asked += 1
        for record in records:
            if self.no_files and "file" in record:
                raise Later("HTTP 500 of the file store")
            if record["i"] == self.refuses:
                raise Rejected("never")
            if record["i"] == self.chokes:
                raise RuntimeError("HTTP 500")
        self.got += [r["i"] for r in records]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def started(tmp_path, server, monkeypatch=None):
    queue = Spool(tmp_path / "tracking.spool.jsonl")
    pump = Pump(queue, server.send, server.alive, "test server", pause=0.01, longest=0.5)
    pump.start()
    return queue, pump


def test_records_arrive_once_and_in_order_from_many_threads(tmp_path):
    server = Server()
    queue, pump = started(tmp_path, server)
    threads = [
        threading.Thread(target=lambda k=k: [queue.append({"run": str(k), "i": k * 1000 + j}) for j in range(200)]) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pump.close(10) == 0
    assert sorted(server.got) == sorted(k * 1000 + j for k in range(4) for j in range(200))
    for k in range(4):
        own = [i for i in server.got if i // 1000 == k]
        assert own == sorted(own)
    assert not queue.path.exists(), "nothing waits, so no file is left"


def test_an_outage_keeps_order_and_is_said_once(tmp_path, caplog):
    server = Server()
    queue, pump = started(tmp_path, server)
    queue.append({"run": "a", "i": 0})
    wait_for(lambda: server.got == [0])
    server.away = True
    for i in range(1, 6):
        queue.append({"run": "a", "i": i})
    wait_for(lambda: pump.away_since is not None)
    assert [json.loads(line)["i"] for line in queue.path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    server.away = False
    wait_for(lambda: server.got == [0, 1, 2, 3, 4, 5])
    assert pump.close(5) == 0
    said = [r.getMessage() for r in caplog.records if r.name == "orchestrator.tracking.spool"]
    assert len(said) == 2 and "the search goes on" in said[0] and "answers again" in said[1]


def test_what_waits_survives_the_process(tmp_path):
    server = Server()
    server.away = True
    queue, pump = started(tmp_path, server)
    for i in range(3):
        queue.append({"run": "a", "i": i})
    begin = time.monotonic()
    assert pump.close(0.5) == 3
    assert time.monotonic() - begin < 3
    with queue.path.open("a") as file:
        file.write('{"run": "a", "i":')  # the line a dying process was writing
    server.away = False
    again = Spool(queue.path)
    pump = Pump(again, server.send, server.alive, "test server", pause=0.01)
    again.append({"run": "a", "i": 3})
    assert [record["i"] for record in Spool(queue.path).peek()] == [0, 1, 2, 3], "not written onto the cut line"
    pump.start()
    assert pump.close(5) == 0 and server.got == [0, 1, 2, 3]


def test_a_refused_record_is_set_aside_and_the_rest_arrives(tmp_path):
    server = Server()
    server.refuses = 1
    queue, pump = started(tmp_path, server)
    for i in range(4):
        queue.append({"run": "a", "i": i})
    assert pump.close(5) == 0
    assert server.got == [0, 2, 3]
    (line,) = (tmp_path / "tracking.spool.rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {"reason": "never", "record": {"run": "a", "i": 1}}


def test_a_record_that_always_chokes_a_living_server_does_not_block_the_queue(tmp_path):
    server = Server()
    server.chokes = 0
    queue, pump = started(tmp_path, server)
    for i in range(3):
        queue.append({"run": "a", "i": i})
    wait_for(lambda: server.got == [1, 2])
    assert pump.close(5) == 0 and "HTTP 500" in (tmp_path / "tracking.spool.rejected.jsonl").read_text()


def test_one_refused_record_among_many_costs_few_requests(tmp_path):
    server = Server()
    server.refuses = 137
    queue = Spool(tmp_path / "tracking.spool.jsonl")
    for i in range(400):
        queue.append({"run": "a", "i": i})
    pump = Pump(queue, server.send, server.alive, "test server", pause=0.01)
    pump.start()
    assert pump.close(5) == 0
    assert server.got == [i for i in range(400) if i != 137] and server.asked < 25


def test_files_wait_for_their_store_and_nothing_waits_for_them(tmp_path, caplog):
    server = Server()
    server.no_files = True
    queue, pump = started(tmp_path, server)
    queue.append({"run": "a", "i": 0, "file": "config.yaml"})
    for i in range(1, 4):
        queue.append({"run": "a", "i": i})
    wait_for(lambda: server.got == [1, 2, 3] and len(queue) == 1)
    wait_for(lambda: server.asked > 2 + spool.POISON_TRIES, 30)  # more tries than a record that chokes the server gets
    assert [json.loads(line)["i"] for line in queue.path.read_text().splitlines()][-1] == 0, "it waits on disk"
    server.no_files = False
    wait_for(lambda: server.got == [1, 2, 3, 0], 40)
    assert pump.close(5) == 0 and not (tmp_path / "tracking.spool.rejected.jsonl").exists()
    assert sum("config.yaml" in r.getMessage() for r in caplog.records) == 1, "said once"


def test_a_full_disk_does_not_stop_the_queue(tmp_path, caplog):
    """The spool's folder is a file, as a write to a full disk would also end in OSError."""
    (tmp_path / "blocked").write_text("")
    server = Server()
    queue = Spool(tmp_path / "blocked" / "spool.jsonl")
    pump = Pump(queue, server.send, server.alive, "test server", pause=0.01)
    pump.start()
    queue.append({"run": "a", "i": 0})
    queue.append({"run": "a", "i": 1})
    assert pump.close(5) == 0 and server.got == [0, 1]
    assert sum("kept in memory only" in r.getMessage() for r in caplog.records) == 1


def test_the_file_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "COMPACT", 10)
    queue = Spool(tmp_path / "s.jsonl")
    for i in range(30):
        queue.append({"i": i})
        if i > 2:
            queue.drop(1)
    assert [r["i"] for r in queue.peek()] == [27, 28, 29]
    assert len(queue.path.read_text().splitlines()) < 20
    assert [r["i"] for r in Spool(queue.path).peek()][-3:] == [27, 28, 29]
