"""What `safebasin doctor` says of a Ray cluster's doors, against small HTTP servers."""

from __future__ import annotations

import http.server
import threading

import pytest

from orchestrator import config
from orchestrator.verbs import doctor


@pytest.fixture
def serve():
    """Start a server that answers every request with one status; its port."""
    servers = []

    def start(status: int) -> int:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status if not self.headers.get("Authorization") else 500)
                self.end_headers()

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def said(experiment) -> dict[str, tuple[str, str]]:
    return {finding.what: (finding.state, finding.detail) for finding in doctor._ray(experiment)}


@pytest.mark.parametrize(("status", "state", "words"), [(200, "warn", "takes jobs without a token"), (401, "ok", "asks for a token")])
def test_a_dashboard_that_lets_strangers_in_is_flagged(serve, monkeypatch, status, state, words):
    port = serve(status)
    (found,) = doctor._strangers("127.0.0.1", port)
    assert found.state == state and words in found.detail and str(port) in found.detail


def test_no_dashboard_is_no_finding(serve):
    assert list(doctor._strangers("127.0.0.1", 9)) == [] and list(doctor._strangers("127.0.0.1", serve(404))) == []


def test_a_cluster_without_token_mode_is_flagged_and_where_its_dashboard_is_asked(serve, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    asked = []
    monkeypatch.setattr(doctor, "_strangers", lambda host: asked.append(host) or [])
    for address in ("10.0.0.1:6379", "auto", "head"):
        state, detail = said(config.from_dict({"ray": {"address": address}}))["ray auth"]
        assert state == "warn" and "RAY_AUTH_MODE=token" in detail
    assert asked == ["10.0.0.1", "127.0.0.1", "head"]


def test_a_dashboard_for_everyone_is_flagged(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = said(config.from_dict({"ray": {"init_kwargs": {"include_dashboard": True, "dashboard_host": "0.0.0.0"}}}))
    assert found["ray dashboard"][0] == "warn" and "0.0.0.0" in found["ray dashboard"][1]
    assert "ray dashboard" not in said(config.from_dict({}))
