"""The lanes of a run, seen from the driver: trials go in, events and results come out.

A lane is a Ray Train worker group that stays up and takes trial after trial from the broker (`orchestrator.lanes.broker`), so a trial pays no
process start, no imports and no process-group set-up. How many there are, and what becomes of one, is `pool`'s business.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from typing import Any

from orchestrator import config
from orchestrator.errors import LaneError
from orchestrator.lanes.broker import Broker
from orchestrator.lanes.capacity import LanePlan, plan
from orchestrator.lanes.cluster import ClusterInfo, connect, free_orphans, shutdown
from orchestrator.lanes.cluster import lost as cluster_lost
from orchestrator.lanes.pool import Pool
from orchestrator.records import TrialResult, TrialSpec

__all__ = ["ClusterInfo", "LanePlan", "Lanes", "connect", "plan", "shutdown"]

log = logging.getLogger(__name__)

WATCH_S = 1.0
"""How often it is looked whether the cluster lives."""


class Lanes:
    """The lanes of one run, seen from the driver. Use `start`, then `submit` and `next_event` or `wait`, and `stop` at the end."""

    def __init__(self) -> None:
        self._pump_thread: threading.Thread | None = None
        self._events: list[dict[str, Any]] = []
        self._results: dict[str, TrialResult] = {}
        self._pending: dict[str, TrialSpec] = {}
        self._news = threading.Condition()
        self._gone: dict[int, str] = {}
        self._started: set[str] = set()
        self._pool: Pool | None = None
        self.broken: str | None = None
        """Why no trial can run any more and how to go on; None while all is well."""
        self.dead = False
        """Whether the cluster itself is gone: nothing of it is asked any more."""
        self._again = ""
        self.broker: Any = None
        self.broker_name = ""
        self.helpers: list[threading.Thread] = []
        """Threads of others that use the lanes; `stop` waits for them."""
        self.plan: LanePlan | None = None

    @property
    def count(self) -> int:
        """Lanes there are, those that start included; changes while machines join and leave."""
        return len(self._pool.alive)

    def start(self, experiment: config.Experiment, plan: LanePlan, *, runner: str = "orchestrator.trial.run:run") -> None:
        """Start the broker and the lanes and return at once; trials may be submitted while the groups come up."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        self.plan = plan
        self._again = f"`safebasin resume {experiment.output_place}` goes on from what is finished"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.broker_name = f"safebasin-broker-{uuid.uuid4().hex[:8]}"
        actor = ray.remote(num_cpus=0, max_concurrency=10_000)(Broker)
        self.broker = actor.options(name=self.broker_name, scheduling_strategy=here).remote(plan.lanes, experiment.ray.max_trial_failures)
        self._pool = Pool(experiment, plan, runner, self.broker, self._say)
        self._pump_thread = threading.Thread(target=self._pump, name="safebasin-events", daemon=True)
        self._pump_thread.start()
        self._pool.start()
        threading.Thread(target=self._watch_cluster, name="safebasin-cluster", daemon=True).start()

    def wait_ready(self, timeout: float = 300.0) -> int:
        """Wait until a lane is up; the number of lanes that are. Raises LaneError where none came up in `timeout` seconds."""
        up = self._call("ready", timeout)
        if not up:
            raise LaneError(self.broken or f"no lane came up within {timeout:g} s; is the cluster busy with other jobs (`ray status`)?")
        return up

    def submit(self, spec: TrialSpec) -> None:
        """Queue a trial for the next free lane. An id may be used again when its trial has finished."""
        with self._news:
            self._results.pop(spec.trial_id, None)
            self._pending[spec.trial_id] = spec
        if self.broken:
            self._give_up(self.broken)
            return
        self._call("submit", spec)

    def wait(self, trial_id: str, timeout: float | None = None) -> TrialResult | None:
        """Result of a submitted trial; None where it is not there after `timeout` seconds."""
        with self._news:
            self._news.wait_for(lambda: trial_id in self._results, timeout)
            return self._results.get(trial_id)

    def next_event(self, trial_id: str | None = None, timeout: float | None = None) -> dict[str, Any] | None:
        """The oldest event not yet taken (of one trial, or of any); None after `timeout` seconds without one.

        Kinds: lane_up, lane_gone, lane_added, no_room, machines (of no trial; the last three carry a `sentence` for the user);
        started, interrupted, finished (`trial_id`; finished carries `result`, a TrialResult), and what the trial itself reports: phase, train,
        probe, log.
        """
        with self._news:
            self._news.wait_for(lambda: self._find(trial_id) is not None, timeout)
            position = self._find(trial_id)
            return None if position is None else self._events.pop(position)

    def expect(self, waiting: int) -> None:
        """How many of Tune's waiting processes there will be (see `Broker.meet`)."""
        self._call("expect", waiting)

    def cancel(self, trial_id: str) -> None:
        """Ask one trial to stop: at once when it is queued, at its next report when it runs."""
        self._call("cancel", [trial_id])

    def cancel_all(self, *, running: bool = True) -> None:
        """Ask every trial to stop; with `running=False` only those that have not started."""
        self._call("cancel", None, running=running)

    def stop(self, grace_s: float = 30.0) -> None:
        """End everything: running trials are asked to stop and get `grace_s` seconds, then their processes are ended."""
        import ray

        if self.broker is None:
            return
        self._pool.close()
        if self.dead:
            self._give_up("stopped with its lane")
            self.broker = None
            return
        try:
            ray.get(self.broker.close.remote())
            ray.get(self.broker.idle.remote(grace_s))
            self._end(absent=True)  # what waits for room or just starts runs nothing
            if not self._pool.join(10.0):
                self._end(absent=False)
                self._pool.join(10.0)
        except ray.exceptions.RayActorError as error:
            log.warning("the broker was gone before the lanes were stopped: %s", error)
        for thread in self.helpers:
            thread.join(30.0)
        ray.kill(self.broker, no_restart=True)
        self._free()
        self._pump_thread.join(10.0)
        self._give_up("stopped with its lane")
        self.broker = None

    # -- inside ------------------------------------------------------------------------------------------------------

    def _free(self) -> None:
        """Placement groups of controllers that were killed; the cluster learns of their death a moment later."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):  # with the cluster gone there is nothing to free
            for _ in range(3):
                free_orphans()
                time.sleep(0.2)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self.broker, method).remote(*args, **kwargs))
        except ray.exceptions.RayActorError as error:
            self._give_up(self._lost(f"its broker died: {type(error).__name__}"))
            raise LaneError(self.broken) from error

    def _find(self, trial_id: str | None) -> int | None:
        if trial_id is None:
            return 0 if self._events else None
        return next((i for i, event in enumerate(self._events) if event.get("trial_id") == trial_id), None)

    def _end(self, *, absent: bool) -> None:
        import ray

        for handle in ray.get(self.broker.members.remote(absent=absent)):
            ray.kill(handle, no_restart=True)

    def _pump(self) -> None:
        """Bring events from the broker into this process; if the broker dies, no trial goes on."""
        import ray

        cursor = 0
        while True:
            try:
                cursor, events = ray.get(self.broker.events.remote(cursor))
            except Exception as error:  # the actor or the whole cluster is gone; whatever the class, the answer is the same
                if not self._pool.closing:
                    self._give_up(self._lost(f"its broker died: {type(error).__name__}"))
                return
            with self._news:
                for event in events:
                    self._take_in(event)
                self._news.notify_all()

    def _take_in(self, event: dict[str, Any]) -> None:
        if event["kind"] == "finished":
            result = TrialResult.from_dict(event["result"])
            self._results[result.trial_id] = event["result"] = result  # one object for all who ask: a search may have thousands
            self._pending.pop(result.trial_id, None)
            if result.state == "failed":  # the screen says it; the traceback is in the trial's result.json
                log.debug("trial %s failed: %s\n%s", result.trial_id, result.error, result.facts.get("traceback", ""))
        elif event["kind"] == "started":
            self._started.add(event["trial_id"])
        elif event["kind"] == "lane_gone":
            self._gone[event["lane"]] = event["error"]
            if not self._pool.alive and not self._pool.closing:
                why = "; ".join(f"lane {lane}: {why}" for lane, why in sorted(self._gone.items()))
                self.broken = f"every lane is gone: {why}; {self._again}"
        self._events.append(event)

    def _give_up(self, sentence: str) -> None:
        """Every trial that waits is interrupted, here in the driver: the broker cannot tell any more. A resumed run takes them up."""
        with self._news:
            self.broken = self.broken or sentence
            for spec in list(self._pending.values()):
                facts = {"cancelled": True, "started": spec.trial_id in self._started}
                result = TrialResult(spec.trial_id, spec.recipe, dict(spec.params), spec.seed, spec.phase, "stopped", error=sentence, facts=facts)
                self._take_in({"kind": "finished", "time": time.time(), "trial_id": spec.trial_id, "result": result.to_dict()})
            self._news.notify_all()

    def _lost(self, what: str) -> str:
        """That the cluster is lost, in a sentence; waits a moment for the watch to see why."""
        until = time.monotonic() + 2 * WATCH_S
        while not self.dead and time.monotonic() < until:
            time.sleep(0.1)
        if self.broken and self.dead:
            return self.broken
        return f"the Ray cluster was lost ({what}); {self._again}. Worker logs are in Ray's session folder"

    def _watch_cluster(self) -> None:
        """Notice within seconds that the cluster died: Ray itself waits for a minute or longer, and then ends this process."""
        while not self._pool.closing:
            why = cluster_lost()
            if why is not None and not self._pool.closing:
                self.dead = True
                self._give_up(f"the Ray cluster died ({why}); {self._again}")
                return
            time.sleep(WATCH_S)

    def _say(self, kind: str, sentence: str, **more: Any) -> None:
        with self._news:
            self._take_in({"kind": kind, "time": time.time(), "sentence": sentence, **more})
            self._news.notify_all()
