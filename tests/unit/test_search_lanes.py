"""What a lane knows of its machines, without a cluster."""

from __future__ import annotations

import io
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from orchestrator import config
from orchestrator.experiment.progress import Dashboard
from orchestrator.experiment.state import Run
from orchestrator.lanes import control
from orchestrator.lanes.cluster import Machine
from orchestrator.lanes.pool import _moved


def test_the_interface_is_found_by_its_address():
    assert control.interface_of("127.0.0.1") == "lo"
    assert control.interface_of("203.0.113.7") is None


def test_gloo_gets_that_interface_and_a_setting_of_the_user_stays(monkeypatch):
    monkeypatch.setattr(control.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for before, after in ((None, "lo"), ("eth7", "eth7")):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        if before:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
        control.NodeInterface().after_init_train_context()
        assert control.os.environ["GLOO_SOCKET_IFNAME"] == after
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_a_machine_is_lost_when_it_is_dead_draining_or_deaf(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.create_server(("127.0.0.1", 0)) as other:
        deaf = other.getsockname()[1]
        other.close()
        ports = {"well": raylet.getsockname()[1], "draining": raylet.getsockname()[1], "deaf": deaf, "dead": deaf}
        where = {"NodeManagerAddress": "127.0.0.1"}
        nodes = [{"NodeID": name, "Alive": name != "dead", "NodeManagerPort": port, **where} for name, port in ports.items()]
        monkeypatch.setattr(control.ray, "nodes", lambda: nodes)
        group = [(None, name, f"{name}.host") for name in (*ports, "well", "unknown")]
        assert control.lost_machines(group, {"draining"}) == ["dead.host", "deaf.host", "draining.host", "unknown.host"]
        assert control.lost_machines(group[:1], set()) == []


def test_what_changed_is_one_sentence():
    before = {"a": Machine("one", {"CPU": 2.0}), "b": Machine("two", {"CPU": 1.0})}
    now = {"a": before["a"], "c": Machine("three", {"CPU": 4.0, "GPU": 1.0})}
    assert _moved(before, now) == "the cluster changed: three joined with 4 CPUs and 1 GPU, two left; 6 CPUs and 1 GPU on 2 machines now"


def test_the_user_reads_what_became_of_machines_and_lanes():
    file = io.StringIO()
    with Dashboard(Console(file=file, width=200), total=9, lanes=1) as dashboard:
        state = Run(config.from_dict({}), Path("."), dashboard.console, threading.Event(), None, dashboard)
        state.event({"kind": "machines", "sentence": "the cluster changed: two joined with 1 CPU; 2 CPUs on 2 machines now"})
        state.event({"kind": "lane_added", "lane": 1, "lanes": 2, "sentence": "lane 1 is added, 2 lanes now"})
        state.event({"kind": "lane_up", "lane": 1, "host": "two"})
        assert dashboard.lanes == 2, "the ETA is of two lanes"
        state.event({"kind": "interrupted", "trial_id": "t0002", "attempt": 0, "deaths": 0, "machines": ["10.0.0.2"]})
        state.event({"kind": "lane_gone", "lane": 1, "error": "no machine of the cluster has room for its 1 worker any more"})
        assert dashboard.lanes == 1
        state.event({"kind": "interrupted", "trial_id": "t0003", "attempt": 0, "deaths": 1, "machines": []})
        state.event({"kind": "interrupted", "trial_id": "t0003", "attempt": 1, "deaths": 2, "machines": []})
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "the cluster changed: two joined with 1 CPU; 2 CPUs on 2 machines now",
        "lane 1 is added, 2 lanes now",
        "lane 1 is up on two",
        "t0002: 10.0.0.2 left the cluster, it is taken up again",
        "lane 1 is gone: no machine of the cluster has room for its 1 worker any more",
        "t0003: its worker died, it is taken up again",
        "t0003: its worker died",
    ]


def test_a_trial_that_is_submitted_while_the_search_is_closed_does_not_run():
    """Tune's thread asks and submits; the driver's thread closes the search and cancels what it knows of at that moment."""
    from orchestrator.search.tune import BasinSearch

    calls = []

    class Group:
        count, broken, broker_name = 1, None, "broker"

        def expect(self, waiting):
            return None

        def submit(self, spec):
            calls.append(("submit", spec))
            if spec == "t2":
                search.closed.set()  # Ctrl-C: everything known was cancelled a moment ago

        def cancel(self, trial_id):
            calls.append(("cancel", trial_id))

    names = iter(["t1", "t2", "t3"])
    studies = SimpleNamespace(ask=lambda: SimpleNamespace(trial_id=next(names)))
    search = BasinSearch(studies, Group(), lambda asked: asked.trial_id, dict, None)
    assert search.suggest("tune-1")["trial_id"] == "t1"
    assert calls == [("submit", "t1"), ("submit", "t2"), ("cancel", "t2")], "and nothing more is asked"
