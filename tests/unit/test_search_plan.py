"""How many lanes fit, and what is said when none does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.errors import CapacityError
from orchestrator.lanes.capacity import inventory, plan, room


def experiment(**ray):
    return config.from_dict({"ray": ray})


def test_the_plan_says_what_will_be_started():
    found = plan(experiment(), [{"CPU": 2.0, "memory": 1e9}], trials=15)
    assert (found.lanes, found.workers, found.per_worker) == (2, 1, {"CPU": 1.0})
    assert found.sentence == "2 lanes of 1 worker (1 CPU each) on 2 CPUs"


@pytest.mark.parametrize(
    ("ray", "nodes", "trials", "lanes"),
    [
        ({"num_workers": 2}, [{"CPU": 3}], 9, 1),
        ({"num_workers": 2}, [{"CPU": 1}, {"CPU": 1}, {"CPU": 2}], 9, 2),
        ({"cpus_per_worker": 3}, [{"CPU": 4}, {"CPU": 4}], 9, 2),
        ({"cpus_per_worker": 0.1}, [{"CPU": 0.3}], 9, 3),
        ({"use_gpu": True, "cpus_per_worker": 4}, [{"CPU": 16, "GPU": 8}], 9, 4),
        ({"use_gpu": True}, [{"CPU": 64}, {"CPU": 64, "GPU": 2}], 9, 2),
        ({}, [{"CPU": 64}], 3, 3),
        ({"lanes": 2}, [{"CPU": 64}], 9, 2),
        ({}, [{"CPU": 4}], 0, 1),
    ],
)
def test_lanes_are_what_the_machines_hold(ray, nodes, trials, lanes):
    assert plan(experiment(**ray), nodes, trials).lanes == lanes


@pytest.mark.parametrize(
    ("ray", "nodes", "said"),
    [
        ({"cpus_per_worker": 8}, [{"CPU": 4}, {"CPU": 4}], r"a worker asks for 8 CPUs.*8 CPUs on 2 machines.*ray.cpus_per_worker=4"),
        ({"use_gpu": True}, [{"CPU": 4}], "ray.use_gpu=false"),
        ({"use_gpu": True, "gpus_per_worker": 2}, [{"CPU": 4, "GPU": 1}], "ray.gpus_per_worker"),
        ({"num_workers": 5}, [{"CPU": 4}], r"ray.num_workers=5.*room for 4 such workers.*ray.num_workers=4"),
        ({"lanes": 3}, [{"CPU": 2}], r"ray.lanes=3.*ray.lanes=2"),
        ({}, [{"memory": 1e9}], "CPUs"),
        ({}, [], "CPUs"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(ray, nodes, said):
    with pytest.raises(CapacityError, match=said):
        plan(experiment(**ray), nodes, 5)


def test_machines_that_join_may_bring_lanes_up_to_the_cap_and_the_trials():
    one = [{"CPU": 4.0}]
    assert [plan(experiment(**ray), one, trials).most for ray, trials in (({}, 9), ({"lanes": 3}, 9), ({"lanes": 4}, 2), ({}, 0))] == [9, 3, 2, 1]
    pairs = plan(experiment(num_workers=2, cpus_per_worker=2), one, 9)
    assert [room(pairs, nodes) for nodes in ([], [{"CPU": 3}], [{"CPU": 3}, {"CPU": 2.5}], [{"CPU": 8}, {"memory": 1.0}])] == [0, 0, 1, 2]
    assert inventory([{"CPU": 8, "GPU": 1}, {"CPU": 1}]) == "9 CPUs and 1 GPU on 2 machines" and inventory([{"CPU": 1}]) == "1 CPU"


@given(
    nodes=st.lists(st.integers(0, 16), min_size=1, max_size=5),
    workers=st.integers(1, 4),
    cpus=st.integers(1, 4),
    trials=st.integers(1, 30),
)
def test_a_plan_never_takes_more_than_there_is(nodes, workers, cpus, trials):
    machines = [{"CPU": float(n)} for n in nodes]
    places = sum(n // cpus for n in nodes)
    asked = experiment(num_workers=workers, cpus_per_worker=cpus)
    if places < workers:
        with pytest.raises(CapacityError):
            plan(asked, machines, trials)
        return
    found = plan(asked, machines, trials)
    assert 1 <= found.lanes <= trials and found.lanes * workers <= places
    assert found.lanes == trials or (found.lanes + 1) * workers > places


@pytest.mark.parametrize(("use_gpu", "backend", "resources"), [(True, "nccl", {"CPU": 4, "GPU": 2}), (False, "gloo", {"CPU": 4})])
def test_what_ray_train_is_asked_for(monkeypatch, use_gpu, backend, resources):
    """No GPU here: what would be handed to Ray is read, and nothing is started."""
    import ray.train.torch

    from orchestrator.lanes import pool

    class Read(ray.train.torch.TorchTrainer):
        def __init__(self, loop, **given):
            super().__init__(loop, **given)
            self.given = given

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Read)
    asked = experiment(use_gpu=use_gpu, gpus_per_worker=2, cpus_per_worker=4, num_workers=2)
    group = object.__new__(pool.Pool)
    group._experiment, group._runner, group._broker = asked, "module:function", None
    group._plan = plan(asked, [{"CPU": 8, "GPU": 4}], trials=1)
    trainer = group._trainer(0, 3)
    given = trainer.given
    names = {type(one).__name__ for one in trainer._create_default_callbacks()}
    assert {"LaneControl", "NodeInterface", "BackendSetupCallback"} <= names and "DatasetsCallback" not in names
    assert given["torch_config"].backend == backend and given["train_loop_config"]["use_gpu"] is use_gpu
    scaling = given["scaling_config"]
    assert (scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker) == (2, use_gpu, resources)
