"""The hub is asked once and briefly: one that is away is said in seconds, one that answers with an error is there."""

from __future__ import annotations

import http.server
import socket
import threading

import pytest

from orchestrator.errors import ModelError
from orchestrator.evaluation.judges.classifier import ClassifierJudge
from orchestrator.evaluation.judges.classifier_formats import card_text
from orchestrator.storage import hub


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(hub, "_known", {})
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_hub_that_answers_with_an_error_is_there_and_is_asked_once(monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    assert hub.away() is None and hub.away() is None and len(asked) == 1
    server.shutdown()
    server.server_close()


def test_a_hub_that_is_not_there_or_never_answers_is_said(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert "cannot be reached" in hub.away()
        silent.listen()
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
        monkeypatch.setattr(hub, "_known", {})
        assert address in hub.away()
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "HF_ENDPOINT='nonsense' is no address" in hub.away()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in hub.away()


def test_folders_of_nearly_the_same_name_are_named(tmp_path, monkeypatch):
    for name in ("my model", "llama-tuned", ".hidden"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.near("my%20model") == "; did you mean the folder 'my model' (written without %)?"
    assert "'llama-tuned'" in hub.near("llama-tunde") and hub.near("meta-llama/x") == "" and hub.near("a\0b") == ""


@pytest.mark.parametrize("use", [
    lambda: ClassifierJudge("meta/lama", kind="sequence").check(["a"]),
    lambda: card_text("meta/lama", None, "harmbench"),
    lambda: hub.model("meta/lama", None, "here:"),
], ids=["judge", "card", "model"])  # fmt: skip
def test_whoever_asks_for_a_model_says_at_once_that_the_hub_is_away(monkeypatch, tmp_path, use):
    monkeypatch.setattr(hub, "away", lambda: "it is away")
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="'meta/lama' is no folder here and not in the local cache, and it is away"):
        use()
