"""What a lane knows of its machines, without a cluster."""

from __future__ import annotations

import socket

from orchestrator import lane_control
from orchestrator.cluster import Machine
from orchestrator.lane_pool import _moved


def test_the_interface_is_found_by_its_address():
    assert lane_control.interface_of("127.0.0.1") == "lo"
    assert lane_control.interface_of("203.0.113.7") is None


def test_gloo_gets_that_interface_and_a_setting_of_the_user_stays(monkeypatch):
    monkeypatch.setattr(lane_control.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for before, after in ((None, "lo"), ("eth7", "eth7")):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        if before:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
        lane_control.NodeInterface().after_init_train_context()
        assert lane_control.os.environ["GLOO_SOCKET_IFNAME"] == after
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_a_machine_is_lost_when_it_is_dead_draining_or_deaf(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.create_server(("127.0.0.1", 0)) as other:
        deaf = other.getsockname()[1]
        other.close()
        ports = {"well": raylet.getsockname()[1], "draining": raylet.getsockname()[1], "deaf": deaf, "dead": deaf}
        where = {"NodeManagerAddress": "127.0.0.1"}
        nodes = [{"NodeID": name, "Alive": name != "dead", "NodeManagerPort": port, **where} for name, port in ports.items()]
        monkeypatch.setattr(lane_control.ray, "nodes", lambda: nodes)
        group = [(None, name, f"{name}.host") for name in (*ports, "well", "unknown")]
        assert lane_control.lost_machines(group, {"draining"}) == ["dead.host", "deaf.host", "draining.host", "unknown.host"]
        assert lane_control.lost_machines(group[:1], set()) == []


def test_what_changed_is_one_sentence():
    before = {"a": Machine("one", {"CPU": 2.0}), "b": Machine("two", {"CPU": 1.0})}
    now = {"a": before["a"], "c": Machine("three", {"CPU": 4.0, "GPU": 1.0})}
    assert _moved(before, now) == "the cluster changed: three joined with 4 CPUs and 1 GPU, two left; 6 CPUs and 1 GPU on 2 machines now"
