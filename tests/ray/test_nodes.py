"""Several Ray nodes on this machine: lanes over two of them, nodes that join and nodes that die in the middle of a trial. A lane of two
nodes that loses one of them is in test_object_storage.py.

One program (nodes.py) runs the whole story in a process of its own, because a process joins one cluster in its life.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import nodes
import pytest

from orchestrator.models import saving
from orchestrator.records import LaneContext
from orchestrator.trial import run

pytestmark = pytest.mark.timeout(900)
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(folder, what nodes.py said)."""
    folder = tmp_path_factory.mktemp("nodes")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent)]), "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # a node counts as dead after 5 s without an answer, a group without room is given up after 5 s
        "RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "10",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    }  # fmt: skip
    done = subprocess.run([sys.executable, str(HERE / "nodes.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=800)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and "done" in said[-1], done.stdout[-5000:] + done.stderr[-5000:]
    return folder, said


def part(story, name: str) -> list[dict]:
    """What was said until the end of one part of the story, from the end of the one before."""
    lines = story[1]
    end = next(i for i, line in enumerate(lines) if line.get("stopped") == name)
    start = max((i for i, line in enumerate(lines[:end]) if "stopped" in line), default=0)
    return lines[start : end + 1]


def result_of(lines: list[dict], trial_id: str) -> dict:
    return next(line for line in lines if line.get("result") == trial_id)


class Quiet:
    def report(self, event):
        return False


@pytest.fixture(scope="module")
def one_worker(story):
    """The same trial on one worker with the plain engine and the same rows in every step."""
    made = nodes.experiment(story[0] / "plain", "", training={**nodes.TRAINING, "engine": "plain", "per_device_train_batch_size": 4})
    return run.run(nodes.spec_of(made, "plain", 0), Quiet(), LaneContext())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_lane_on_two_nodes_trains_as_one_worker_does(story, one_worker, stage):
    lines = part(story, "two_nodes_as_one")
    assert lines[0]["plan"] == "1 lane of 2 workers (1 CPU each) on 2 CPUs on 3 machines"
    found = result_of(lines, f"zero{stage}")
    assert found["state"] == "complete", found["error"]
    assert found["losses"] == pytest.approx([e["loss"] for e in one_worker.history if e["kind"] == "train"], rel=1e-3)
    weights = [dict(saving.attach(path, nodes.experiment(story[0] / "plain", "").model)[0].named_parameters()) for path in
               (found["model"], one_worker.model_dir)]  # fmt: skip
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[1]) < 1e-5


def test_a_node_that_joins_in_mid_search_is_used(story):
    lines = part(story, "a_search_that_follows")
    assert next(line for line in lines if "plan" in line)["plan"].startswith("1 lane of 1 worker")
    said = [line["sentence"] for line in lines if line.get("kind") in ("machines", "lane_added")]
    assert any("joined with 1 CPU; 2 CPUs on 3 machines now" in sentence for sentence in said), said
    assert "lane 1 is added, 2 lanes now" in said
    assert next(line for line in lines if "at_once" in line)["at_once"] == 2, "both nodes ran a trial"


def test_a_node_that_dies_costs_its_trial_the_time_since_its_checkpoint_and_nothing_else(story):
    lines = part(story, "a_search_that_follows")
    results = next(line for line in lines if "results" in line)["results"]
    killed = next(line for line in lines if "killed" in line)
    assert len(results) == 4 and {found["state"] for found in results.values()} == {"complete"}, results
    moved = results.pop(killed["killed"])
    assert moved["attempt_seen"] == 1 and moved["first"] >= killed["step"], "it went on from its checkpoint"
    assert moved["node"] != next(line for line in lines if "joined" in line)["joined"]
    assert {found["attempt_seen"] for found in results.values()} == {0}, "no other trial noticed"
    interrupted = [line for line in lines if line.get("kind") == "interrupted"]
    assert [line["trial_id"] for line in interrupted] == [killed["killed"]] and interrupted[0]["machines"]
