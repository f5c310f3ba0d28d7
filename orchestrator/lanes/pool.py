"""The worker groups of a run: as many as the cluster has room for while the search runs, each kept up or given up.

A lane is one `TorchTrainer` run whose workers loop over specs from the broker (`orchestrator.lanes.broker`), so a trial pays no process
start, no imports and no process-group set-up. A thread here supervises each lane: Train's `FailureConfig` restarts a group
whose worker died; a lane that dies more often than `ray.max_failures`, or that no machine has room for any more, is given up.

Another thread watches the machines: where trials wait and a machine that joined has room, a lane is added. The last lane is not given
up for want of room: it waits `ray.room_timeout_s` for a machine.

With `ray.isolate` the same loop leaves after one trial and the next gets a fresh `TorchTrainer` run: Ray's documented pattern.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator import config
from orchestrator.lanes import capacity, cluster
from orchestrator.lanes.capacity import LanePlan
from orchestrator.lanes.worker import lane_loop

log = logging.getLogger(__name__)

WATCH_S = 2.0
"""How often the machines are counted."""

PLACE_S = "30"
"""How long Train waits for room for a group (its own default is a minute, again and again without end)."""


class Pool:
    """`start`, then `close` (no lane is added or started again), tell the groups to go home, and `join`."""

    def __init__(self, experiment: config.Experiment, plan: LanePlan, runner: str, broker: Any, say: Callable[..., None]):
        """`say(kind, sentence, **more)` tells the user of a change."""
        self._experiment, self._plan, self._runner, self._broker, self._say = experiment, plan, runner, broker, say
        self.alive: set[int] = set()
        """Lanes not given up: up, starting, or waiting for room."""
        self._threads: list[threading.Thread] = []
        self._changing = threading.Lock()
        """Held while lanes join or leave `alive`."""
        self._stopping = threading.Event()

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Start the planned lanes and the watch over the machines; returns at once."""
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", PLACE_S)
        for lane in range(self._plan.lanes):
            self._start_lane(lane)
        threading.Thread(target=self._watch, args=(cluster.machines(),), name="safebasin-machines", daemon=True).start()

    def close(self) -> None:
        """No lane is added from here on, and none waits for room any longer."""
        with self._changing:
            self._stopping.set()

    def join(self, seconds: float) -> bool:
        """Wait for every lane's end; False where one is left after `seconds`."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _start_lane(self, lane: int) -> None:
        self.alive.add(lane)
        thread = threading.Thread(target=self._supervise, args=(lane,), name=f"safebasin-lane-{lane}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self, known: dict[str, cluster.Machine]) -> None:
        """Say which machines join and leave, and add lanes where trials wait and there is room."""
        import ray

        while not self._stopping.wait(WATCH_S):
            try:
                now = cluster.machines()
                if now.keys() != known.keys():
                    self._say("machines", _moved(known, now))
                    known = now
                self._grow(now)
            except ray.exceptions.RayActorError:  # the broker is gone, and everyone was told
                return
            except Exception as error:  # the cluster's head may be away for a moment; what ends the run ends it elsewhere
                log.warning("the machines of the cluster could not be counted: %s: %s", type(error).__name__, error)

    def _grow(self, machines: dict[str, cluster.Machine]) -> None:
        import ray

        if not self.alive or len(self.alive) >= self._plan.most:
            return
        queued, absent = ray.get(self._broker.census.remote())
        room = capacity.room(self._plan, [machine.resources for machine in machines.values()]) - len(self.alive)
        if not self._experiment.ray.isolate:  # whose idle lanes hold nothing
            room = min(room, capacity.room(self._plan, cluster.free()) - absent)
        for _ in range(min(room, self._plan.most - len(self.alive), queued)):
            with self._changing:
                if self._stopping.is_set():
                    return
                lane = len(self._threads)
                ray.get(self._broker.add_lane.remote(lane))
                self._start_lane(lane)
            self._say("lane_added", f"lane {lane} is added, {capacity.count(len(self.alive), 'lane')} now", lane=lane, lanes=len(self.alive))

    def _supervise(self, lane: int) -> None:
        """Keep one lane up until the end, or give it up: after `ray.max_failures` deaths of its workers, or for want of room."""
        import ray

        try:
            sentence = self._keep_up(lane)
            if sentence is None:
                return
        except Exception as error:  # the boundary of this thread: whatever ends it, the lane is gone and its trial must be told
            sentence = f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # with the cluster gone there is nothing to free
            cluster.free_orphans()
        with self._changing:
            self.alive.discard(lane)
        if not self._stopping.is_set():
            log.info("lane %d is given up: %s", lane, sentence)  # the event tells the user
        with contextlib.suppress(ray.exceptions.RayError):  # a dead broker has told everyone already
            ray.get(self._broker.lane_gone.remote(lane, sentence))

    def _keep_up(self, lane: int) -> str | None:
        """Run the lane; why it is given up, None where it went home because it was told to."""
        import ray

        settings, deaths, reason = self._experiment.ray, 0, ""
        while deaths <= settings.max_failures and not self._stopping.is_set():
            if settings.isolate and ray.get(self._broker.work.remote()) != "trial":
                continue
            try:
                self._trainer(lane, settings.max_failures - deaths).fit()
                if not settings.isolate:
                    return None
                ray.get(self._broker.take_deaths.remote(lane))
                deaths = 0
            except ray.train.TrainingFailedError as error:
                cluster.free_orphans()
                # Train counts more as failures than we do: exits we asked for, and machines that left.
                reason = str(error).strip().splitlines()[-1]
                deaths += ray.get(self._broker.take_deaths.remote(lane))
                failure = type(getattr(error, "controller_failure", None)).__name__
                if failure in ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"):
                    if not self._room_again(lane):
                        return f"no machine of the cluster has room for its {capacity.count(self._plan.workers, 'worker')} any more"
                elif failure == "WorkerGroupStartupFailedError":
                    deaths += 1
                elif failure != "NoneType":
                    raise
        return f"its workers died {deaths} times, more than ray.max_failures={settings.max_failures}; last: {reason}"

    def _room_again(self, lane: int) -> bool:
        """Whether the lane is to try again: the last one waits for a machine with room, any other is given up (a new one may be added)."""
        with self._changing:
            if len(self.alive) > 1:
                self.alive.discard(lane)
                return False
        limit = self._experiment.ray.room_timeout_s
        size = f"{capacity.count(self._plan.workers, 'worker')} of {self._plan.per_worker}"
        self._say("no_room", f"no machine of the cluster has room for a lane ({size}); waiting up to {limit:g} s for one (ray.room_timeout_s)")
        until = time.monotonic() + limit
        while not self._stopping.wait(WATCH_S) and time.monotonic() < until:
            if capacity.room(self._plan, cluster.free()):
                return True
        return False

    def _trainer(self, lane: int, max_failures: int):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.config import LoggingConfig

        from orchestrator.lanes.control import LaneControl, NodeInterface

        class Trainer(TorchTrainer):
            """Without two actors: that which hands out Ray Data sets (lanes read rows themselves), and that which removes the placement group
            of a controller that was killed (`cluster.free_orphans` does; Train's is detached, asks Ray's dashboard, and stays for ever where
            there is none). Each is a process more for every group."""

            def _create_default_callbacks(self):
                left_out = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
                return [one for one in super()._create_default_callbacks() if type(one).__name__ not in left_out]

        experiment, plan = self._experiment, self._plan
        use_gpu = experiment.ray.use_gpu
        return Trainer(
            lane_loop,
            train_loop_config={
                "broker": self._broker, "lane": lane, "runner": self._runner, "torch_threads": experiment.training.torch_threads,
                "use_gpu": use_gpu, "once": experiment.ray.isolate,
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=plan.workers, use_gpu=use_gpu, resources_per_worker=plan.per_worker),
            run_config=RunConfig(
                name=f"lane-{lane}",
                storage_path=str((experiment.output_dir / "ray").resolve()),
                # Where a group finds no room it is for us to say what follows, not for Train to try without end.
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=0),
                callbacks=[LaneControl(self._broker, lane), NodeInterface()],
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )


def _moved(before: dict[str, cluster.Machine], now: dict[str, cluster.Machine]) -> str:
    """Which machines joined and left, in words."""
    joined = [f"{now[key].host} joined with {capacity.inventory([now[key].resources])}" for key in now if key not in before]
    left = [f"{before[key].host} left" for key in before if key not in now]
    return f"the cluster changed: {', '.join(joined + left)}; {capacity.inventory([one.resources for one in now.values()])} now"
