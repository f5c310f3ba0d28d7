"""How many lanes a cluster holds. Pure arithmetic on what its machines have; asked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.config import Experiment
from orchestrator.errors import CapacityError


@dataclass(frozen=True)
class LanePlan:
    """What will be started."""

    lanes: int
    workers: int
    """Workers of one lane."""
    cpus: float
    """CPUs of one worker."""
    gpus: float
    """GPUs of one worker, 0 without `ray.use_gpu`."""
    sentence: str
    """The plan in words, for the user."""
    most: int = 1
    """Lanes at most, whatever machines join later."""

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of one worker as Ray names them."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


def plan(experiment: Experiment, nodes: Sequence[dict[str, float]], trials: int) -> LanePlan:
    """Lanes for `trials` trials on machines with these resources (`{"CPU": 8, "GPU": 1}` each, as Ray reports them).

    A worker must fit on one machine; a lane's workers may sit on several. Never more lanes than trials. Raises CapacityError
    with what is asked, what there is, and the remedy.
    """
    settings = experiment.ray
    gpus = settings.gpus_per_worker if settings.use_gpu else 0.0
    cpus, workers = settings.cpus_per_worker, settings.num_workers
    places = sum(_workers_on(node, cpus, gpus) for node in nodes)
    asked = f"a worker asks for {_amount(cpus, gpus)}"
    there = inventory(nodes)
    if places == 0:
        raise CapacityError(f"{asked}, and no machine of the cluster has that ({there}); {_remedy(nodes, cpus, gpus)}")
    if places < workers:
        raise CapacityError(
            f"ray.num_workers={workers}: {asked}, and the cluster ({there}) has room for {count(places, 'such worker')}; "
            f"set ray.num_workers={places}, ask for less per worker, or join a larger cluster with ray.address"
        )
    fitting = places // workers
    if settings.lanes is not None and settings.lanes > fitting:
        raise CapacityError(
            f"ray.lanes={settings.lanes} of {count(workers, 'worker')}: {asked}, and the cluster ({there}) has room for "
            f"{count(fitting, 'lane')}; set ray.lanes={fitting} or leave it out"
        )
    most = max(1, min(settings.lanes or trials, trials))
    lanes = min(fitting, most)
    how = ", a fresh worker group per trial" if settings.isolate else ""
    sentence = f"{count(lanes, 'lane')} of {count(workers, 'worker')} ({_amount(cpus, gpus)} each) on {there}{how}"
    return LanePlan(lanes, workers, cpus, gpus, sentence, most)


def room(found: LanePlan, nodes: Iterable[dict[str, float]]) -> int:
    """Lanes of this plan's size that fit on machines with these resources, as `plan` counts them."""
    return sum(_workers_on(node, found.cpus, found.gpus) for node in nodes) // found.workers


def inventory(nodes: Sequence[dict[str, float]]) -> str:
    """What machines have together, in words: `6 CPUs on 3 machines`."""
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    where = f" on {len(nodes)} machines" if len(nodes) > 1 else ""
    return _amount(cpus, gpus) + where


def places(experiment: Experiment, node: dict[str, float]) -> int:
    """Workers that run at once on this machine if it is the whole cluster; 0 where not even one lane fits."""
    try:
        found = plan(experiment, [node], experiment.search.trials)
    except CapacityError:
        return 0
    return found.lanes * found.workers


def this_machine() -> dict[str, float]:
    """What a cluster of this machine alone would offer, in Ray's words."""
    import os

    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}


def _workers_on(node: dict[str, float], cpus: float, gpus: float) -> int:
    room = math.floor(node.get("CPU", 0.0) / cpus + 1e-9)
    return min(room, math.floor(node.get("GPU", 0.0) / gpus + 1e-9)) if gpus else room


def _remedy(nodes: Sequence[dict[str, float]], cpus: float, gpus: float) -> str:
    if gpus and not any(node.get("GPU") for node in nodes):
        return "set ray.use_gpu=false to train on CPU, or join a cluster with GPUs with ray.address"
    if gpus and all(node.get("GPU", 0.0) < gpus for node in nodes):
        return "set ray.gpus_per_worker to what one machine has"
    most = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    if most < cpus:
        if not most:
            return "give its machines CPUs (a head node may be started with none)"
        return f"set ray.cpus_per_worker={most:g} or less"
    return "set ray.cpus_per_worker and ray.gpus_per_worker to what one machine has at the same time"


def _amount(cpus: float, gpus: float) -> str:
    return count(cpus, "CPU") + (f" and {count(gpus, 'GPU')}" if gpus else "")


def count(number: float, word: str) -> str:
    """`1 lane`, `2 lanes`."""
    return f"{number:g} {word}{'' if number == 1 else 's'}"
