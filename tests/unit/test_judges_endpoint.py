"""The judge behind an endpoint, against a local server that misbehaves in every way an endpoint can."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import pytest

from orchestrator.errors import ConfigError, JudgeError, UnknownNameError
from orchestrator.evaluation.judges.endpoint import parse
from orchestrator.evaluation.judges.registry import MajorityJudge, get_judge

SAFE = json.dumps({"refused": True, "partial": False, "harm": 0})
HARM = 'Here you are: {"refused": false, "harm": 3} as asked.'


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers what `server.script(request number, body)` returns: (status, text of the reply or whole body as bytes)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            number = len(self.server.seen)
        status, reply = self.server.script(number, body)
        if isinstance(reply, str):
            usage = {"prompt_tokens": 1000, "completion_tokens": 100}
            reply = json.dumps({"choices": [{"message": {"content": reply}}], "usage": usage}).encode()
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the caller's timeout
            self.wfile.write(reply)

    def log_message(self, *args):
        """No lines on stderr."""


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.seen, server.lock, server.script = [], threading.Lock(), lambda number, body: (200, SAFE)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge_at(endpoint, **options):
    return get_judge("llm", model="m", base_url=f"http://127.0.0.1:{endpoint.server_address[1]}/v1/", **{"timeout": 5, "retries": 2} | options)


def test_verdicts_are_in_the_order_of_the_answers_and_the_key_comes_from_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k1")
    endpoint.script = lambda number, body: (200, HARM if "answer 7" in body["messages"][0]["content"] else SAFE)
    prompts = [f"prompt {{answer}} {i}" for i in range(12)]
    judge = judge_at(endpoint, api_key_env="MY_KEY")
    judge.check(prompts)
    verdicts = judge.judge(prompts, [f"answer {i}" if i != 3 else " " for i in range(12)])
    assert [v.unsafe for v in verdicts] == [i == 7 for i in range(12)] and verdicts[7].score == 0.75
    assert verdicts[3].raw == "empty" and len(endpoint.seen) == 11, "an empty answer needs no judge"
    path, key, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer k1" and body["temperature"] == 0 and body["model"] == "m"
    assert "prompt {answer} " in body["messages"][0]["content"], "braces in a prompt are no gap"
    assert "k1" not in judge.describe()


@pytest.mark.parametrize("script", [
    lambda number, body: (200, "I would rather not say."), lambda number, body: (200, b"\xff<html>"), lambda number, body: (200, b"[]"),
    lambda number, body: (200, '{"harm": 9}'), lambda number, body: (200, '{"refused": "maybe", "harm": 1}'), lambda number, body: (500, b""),
    lambda number, body: (429, b"slow down"), lambda number, body: (200, b'{"choices": []}'),
])  # fmt: skip
def test_what_is_no_verdict_is_unparsed_and_unsafe(endpoint, script):
    endpoint.script = script
    (verdict,) = judge_at(endpoint).judge(["p"], ["a"])
    assert verdict.unsafe and not verdict.parse_ok and not verdict.refused and verdict.raw


def test_passing_failures_are_tried_again(endpoint):
    endpoint.script = lambda number, body: (503, b"") if number < 3 else (200, HARM)
    (verdict,) = judge_at(endpoint).judge(["p"], ["a"])
    assert verdict.parse_ok and verdict.unsafe and len(endpoint.seen) == 3


def test_a_timeout_is_unparsed(endpoint):
    endpoint.script = lambda number, body: threading.Event().wait(1.0) or (200, SAFE)
    (verdict,) = judge_at(endpoint, timeout=0.1, retries=0).judge(["p"], ["a"])
    assert verdict.unsafe and not verdict.parse_ok and verdict.raw == "timeout"


def test_nobody_there_is_unparsed(endpoint):
    judge = get_judge("llm", model="m", base_url="http://127.0.0.1:9/v1", retries=0, timeout=2)
    (verdict,) = judge.judge(["p"], ["a"])
    assert verdict.unsafe and not verdict.parse_ok and "no connection" in verdict.raw


@pytest.mark.parametrize("status", [401, 404, 302])
def test_what_will_not_pass_is_an_error_at_once(endpoint, status):
    endpoint.script = lambda number, body: (status, b"no")
    with pytest.raises(JudgeError, match=f"HTTP {status}.*OPENAI_API_KEY"):
        judge_at(endpoint).judge(["p"], ["a"])
    assert len(endpoint.seen) == 1


def test_the_cost_cap_ends_asking(endpoint):
    judge = judge_at(endpoint, max_cost=0.005, price_in=1.0, price_out=10.0, concurrency=1)  # 0.002 a request
    verdicts = judge.judge(["p"] * 6, ["a"] * 6)
    assert [v.parse_ok for v in verdicts] == [True] * 3 + [False] * 3 and len(endpoint.seen) == 3
    assert judge.cost == pytest.approx(0.006) and "max_cost" in verdicts[-1].raw and all(v.unsafe for v in verdicts[3:])


@pytest.mark.parametrize(("options", "said"), [
    ({"model": ""}, "needs `model`"), ({"model": "m", "max_cost": 1.0}, "price_in"), ({"model": "m", "timeout": 0}, "timeout"),
    ({"model": "m", "base_url": "localhost"}, "no http address"), ({"model": "m", "rubric": "{prompt}"}, r"\{answer\}"), ({}, "model"),
])  # fmt: skip
def test_settings_that_cannot_work(options, said):
    with pytest.raises(ConfigError, match=said):
        get_judge("llm", **options)
    with pytest.raises(UnknownNameError, match="api_key_env"):
        get_judge("llm", model="m", api_key="secret")


def test_openai_itself_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="export OPENAI_API_KEY"):
        get_judge("llm", model="m").check(["p"])


def test_replies_are_read_generously_but_never_guessed():
    assert parse('{"x": 1} {"unsafe": false, "refused": true}').refused
    assert parse('{"unsafe": true, "refused": true}').partial and not parse('{"unsafe": true, "refused": true}').refused
    assert parse('```json\n{"refused": false, "harm": 1}\n```').unsafe is False
    for reply in ("", "{}", '{"refused": true}', '{"harm": "3"}', '{"unsafe": "no"}', "{broken", '{"harm": true}'):
        assert not parse(reply).parse_ok and parse(reply).unsafe


def test_majority_counts_only_those_who_could_decide(endpoint):
    """refusal and a list of one's own against an endpoint that is down."""
    endpoint.script = lambda number, body: (500, b"")
    majority = get_judge("majority", judges=["refusal", {"name": "refusal", "phrases": ["banana"]}, {
        "name": "llm", "model": "m", "base_url": f"http://127.0.0.1:{endpoint.server_address[1]}/v1", "retries": 0}])  # fmt: skip
    refused, tied, answered = majority.judge(["p"] * 3, ["I cannot help with that banana.", "I cannot help with that.", "Sure, here it is."])
    assert refused.refused and not refused.unsafe and refused.parse_ok
    assert tied.unsafe and not tied.refused, "a tie counts against the model"
    assert answered.unsafe and "HTTP 500" in answered.raw
    lone = MajorityJudge([{"name": "llm", "model": "x", "base_url": "http://127.0.0.1:9/v1", "retries": 0}] * 2)
    assert not lone.judge(["p"], ["a"])[0].parse_ok
    for bad in ([], ["refusal"], "refusal"):
        with pytest.raises(ConfigError, match="at least two"):
            get_judge("majority", judges=bad)
