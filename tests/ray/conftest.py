"""One small cluster and one pair of lanes for all of these tests: a lane takes longer to start than all its trials here to run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Workers are started by the cluster and inherit its environment; this is how they find fakes.py.
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def make_experiment(tmp_path_factory):
    """Experiment with its own output folder and three CPUs, and `changes` on top."""
    from orchestrator import config

    def make(**changes):
        ray = {"init_kwargs": {"num_cpus": 3}, "max_failures": 9, **changes.pop("ray", {})}
        folder = str(tmp_path_factory.mktemp("run"))
        base = {"output": {"dir": folder}, "recipes": [["full"], ["lora"]], "training": {"learning_rate": 1e-3}}
        return config.from_dict({**base, **changes, "ray": ray})

    return make


@pytest.fixture(scope="session")
def cluster(make_experiment):
    from orchestrator.lanes import lanes

    os.environ.pop("RAY_ADDRESS", None)
    info = lanes.connect(make_experiment().ray)
    yield info
    lanes.shutdown(info)


@pytest.fixture(scope="session")
def start_lanes(cluster, make_experiment):
    """Start lanes; the test stops them."""
    from orchestrator.lanes.lanes import Lanes, plan

    def start(trials=2, runner="fakes:run", **changes):
        experiment = make_experiment(**changes)
        lanes = Lanes()
        lanes.start(experiment, plan(experiment, cluster.nodes, trials), runner=runner)
        return lanes

    return start


@pytest.fixture(scope="session")
def pair(start_lanes):
    """Two lanes of one worker, shared."""
    lanes = start_lanes(ray={"lanes": 2})
    lanes.wait_ready(240)
    yield lanes
    lanes.stop(5)


@pytest.fixture
def make_spec(tmp_path):
    """Spec whose parameters are `params`, in a folder of its own."""
    from orchestrator.records import TrialSpec

    made = []

    def make(**params):
        trial_id = f"{tmp_path.name}-{len(made)}"
        folder = tmp_path / trial_id
        folder.mkdir()
        made.append(trial_id)
        return TrialSpec(trial_id, "full", (("full", {}),), {}, params, 0, "search", {}, str(folder))

    return make
