"""The broker that hands trials to lanes and collects what they say; `worker` is the loop on the other side.

It is a plain asyncio class (lanes.py makes it a Ray actor), so its rules are tested without a cluster. It holds the
queue of specs, knows which lane runs what, and collects events and results. Life of a trial:

    submitted -> queued -> running on a lane -> finished (complete, stopped or failed)
                    ^            | worker died, or a machine's fault: handed out again with attempt + 1, up to `max_trial_failures`;
                    |            | machine left: the same, and it does not count

Every rank takes its assignment from the broker itself, by number; nothing is broadcast. So an idle lane waits in no collective:
no process-group timeout can end it, and no NCCL kernel spins on a GPU that waits for work.

A group that Ray Train restarts registers again and gets a new token; whatever still arrives under an old token is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from orchestrator import faults
from orchestrator.records import Fault, TrialResult, TrialSpec

POLL_S = 20.0
"""Longest time a call waits for news before it answers "nothing yet" and is asked again."""

MOST_ATTEMPTS = 20
"""No trial is taken up more often than this, whatever interrupted it."""


@dataclasses.dataclass
class LaneState:
    token: int = 0
    """Of the group that is up; 0 while none is."""
    world_size: int = 1
    index: int = -1
    """Number of the assignment handed out last."""
    spec: TrialSpec | None = None
    """What the lane runs now."""
    done: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    resetting: bool = False
    """The group was asked to leave; Train counts that as a failure, we do not."""
    failure: dict[str, Any] | None = None
    """The first error of a rank of several. It is the trial's own, or comes of another rank's death; that is known when the group has ended."""
    waited: float = 0.0
    """Seconds its worker waited for room on a full disk after that error: such an interruption does not count against the trial."""
    deaths: int = 0
    """Groups that lost a worker, since `take_deaths`; without those whose machine left."""
    gone: str | None = None


class Broker:
    """Queue of trials and post office of their events; one per `Lanes`."""

    def __init__(self, lanes: int, max_trial_failures: int):
        self._lanes = {number: LaneState() for number in range(lanes)}
        self._max_trial_failures = max_trial_failures
        self._queue: deque[TrialSpec] = deque()
        self._specs: dict[str, TrialSpec] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        """Those not taken yet; `_forgotten` were before them."""
        self._forgotten = 0
        self._cancelled: set[str] = set()
        self._deaths: dict[str, int] = {}
        """Interruptions that count against a trial."""
        self._closing = False
        self._tokens = 0
        self._shun: dict[str, int] = {}
        """Trial -> the lane whose machine failed it: another one takes it up where there is another."""
        self._members: dict[int, list[Any]] = {}
        self._expected = self._present = 0
        self._leaving = False
        self._changed = asyncio.Condition()

    # -- the driver's side -------------------------------------------------------------------------------------------

    async def submit(self, spec: TrialSpec) -> None:
        """Queue a trial. With every lane gone, or while closing, it is told failed or stopped at once; nothing waits for ever."""
        if spec.trial_id in self._specs and spec.trial_id not in self._results:
            raise ValueError(f"trial {spec.trial_id!r} is queued or running; an id is free again when its trial has finished")
        self._results.pop(spec.trial_id, None)
        self._cancelled.discard(spec.trial_id)
        self._deaths.pop(spec.trial_id, None)
        self._shun.pop(spec.trial_id, None)
        self._specs[spec.trial_id] = spec
        if self._closing:
            self._finish(spec, "stopped", error="stopped before it started", facts={"started": False, "cancelled": True})
        elif self._all_gone():
            self._lost(spec)
        else:
            self._queue.append(spec)
        await self._wake()

    async def wait(self, trial_id: str, timeout: float = POLL_S) -> dict[str, Any] | None:
        """Result of a trial as `TrialResult.to_dict()`, or None where it is not there after `timeout` seconds."""
        await self._until(lambda: trial_id in self._results, timeout)
        return self._results.get(trial_id)

    async def events(self, cursor: int, timeout: float = POLL_S) -> tuple[int, list[dict[str, Any]]]:
        """Events from number `cursor` on and the next cursor; empty after `timeout` seconds without any. Those before are forgotten."""
        if cursor > self._forgotten:
            taken = self._events[: cursor - self._forgotten]
            del self._events[: cursor - self._forgotten]
            self._forgotten = cursor
            for event in taken:
                if event["kind"] == "finished":
                    self._slim(event["trial_id"])
        await self._until(lambda: len(self._events) + self._forgotten > cursor, timeout)
        return len(self._events) + self._forgotten, self._events[max(0, cursor - self._forgotten) :]

    async def cancel(self, trial_ids: list[str] | None = None, *, running: bool = True) -> None:
        """Ask trials (all of them with None) to stop: queued ones end at once, running ones at their next report.

        `running=False` leaves those that already run alone (the time budget is over).
        """
        wanted = [t for t in (self._specs if trial_ids is None else trial_ids) if t in self._specs and t not in self._results]
        for spec in [s for s in self._queue if s.trial_id in wanted]:
            self._queue.remove(spec)
            started = spec.attempt > 0
            why = "stopped after its worker died" if started else "stopped before it started"
            self._finish(spec, "stopped", error=why, facts={"started": started, "cancelled": True})
        if running:
            self._cancelled.update(wanted)
        await self._wake()

    async def close(self) -> None:
        """No further trial starts; queued ones end, running ones are asked to stop, idle groups go home."""
        self._closing = True
        await self.cancel()

    async def idle(self, timeout: float) -> bool:
        """Wait until no trial runs and none is queued; False where that takes longer than `timeout` seconds."""
        return await self._until(lambda: not self._queue and all(s.spec is None for s in self._lanes.values()), timeout)

    async def work(self, timeout: float = POLL_S) -> str:
        """For `isolate`: "trial" when one is queued, "stop" when closing, "idle" after `timeout` seconds."""
        await self._until(lambda: self._queue or self._closing, timeout)
        return "stop" if self._closing else "trial" if self._queue else "idle"

    async def ready(self, timeout: float) -> int:
        """Number of lanes that are up; waits until one is, or all are gone, or `timeout` seconds are over."""
        await self._until(lambda: any(s.token for s in self._lanes.values()) or self._all_gone(), timeout)
        return sum(1 for s in self._lanes.values() if s.token and not s.gone)

    async def add_lane(self, lane: int) -> None:
        """One lane more; its group registers later."""
        self._lanes[lane] = LaneState()

    async def census(self) -> tuple[int, int]:
        """(trials that wait for a lane, lanes that have no group at this moment and will have one)."""
        return len(self._queue), sum(1 for state in self._lanes.values() if not state.gone and not state.token)

    async def take_deaths(self, lane: int) -> int:
        """How often this lane lost a worker since the last call, without those whose machine left and those asked to leave."""
        state = self._lanes[lane]
        deaths, state.deaths = state.deaths, 0
        return deaths

    async def lane_gone(self, lane: int, sentence: str) -> bool:
        """The lane is given up; its trial goes to another one. True where this was the last lane: then no trial goes on in this run."""
        state = self._lanes[lane]
        state.gone, state.token = sentence, 0
        self._log({"kind": "lane_gone", "lane": lane, "error": sentence})
        self._interrupted(state, died=False)
        last = self._all_gone()
        if last:
            for spec in list(self._queue):
                self._lost(spec)
            self._queue.clear()
        await self._wake()
        return last

    async def expect(self, waiting: int) -> None:
        """Tune will run this many waiting processes (see `meet`); 0 when it will start no further trial. May change at any time."""
        self._expected, self._leaving = waiting, False
        await self._wake()

    async def attend(self, *, fresh: bool) -> None:
        """One of Tune's waiting processes takes a trial: its first one (`fresh`), or a further one."""
        self._present += int(fresh)
        self._leaving = False
        await self._wake()

    async def meet(self, timeout: float = POLL_S) -> bool:
        """A waiting process asks to hand its result to Tune; waits `timeout` seconds at most for the right moment.

        Tune gives the process of a finished trial to the next one, but throws away (a) the process that is just starting for
        that one, and (b) any second process that becomes free at the same time. Each costs seconds. So nobody hands in before
        all have started, and one at a time: the next when the one before has its new trial.
        """

        def may() -> bool:
            if self._closing or not self._expected:
                return True
            if self._present < self._expected or self._leaving:
                return False
            self._leaving = True  # here, so that of two that wake together only one goes
            return True

        return await self._until(may, timeout)

    async def members(self, *, absent: bool = False) -> list[Any]:
        """Handles of the actors (controllers and workers) that registered, for a forced end; with `absent` of lanes without a group."""
        chosen = [lane for lane in self._members if not absent or not self._lanes[lane].token]
        return [handle for lane in chosen for handle in self._members[lane]]

    # -- the lane's side ---------------------------------------------------------------------------------------------

    async def control(self, lane: int, handle: Any) -> None:
        """The lane's controller is up; it starts the worker group, however long that takes."""
        self._members[lane] = [handle]

    async def left(self, lane: int, why: Literal["home", "raised", "died"], machines: list[str]) -> None:
        """The lane's group has ended and nothing of it runs any more: what it was at goes to the next free lane, or has failed.

        `why`: it went home, a worker's loop raised, or a worker died; `machines` are those that left the cluster with it.
        """
        state = self._lanes[lane]
        if not machines:
            state.deaths += int(why == "died" or (why == "raised" and not state.resetting))
        self._interrupted(state, machines, died=why == "died" or bool(machines))
        state.token, state.resetting = 0, False
        await self._wake()

    async def register(self, lane: int, world_size: int, pid: int, host: str, handles: list[Any]) -> int:
        """A fresh worker group reports for work; what its predecessor ran was interrupted. Returns the group's token."""
        state = self._lanes[lane]
        self._tokens += 1
        self._members[lane] = list(handles)
        self._interrupted(state, died=False)
        self._lanes[lane] = LaneState(token=self._tokens, world_size=world_size, deaths=state.deaths)
        self._log({"kind": "lane_up", "lane": lane, "pid": pid, "host": host, "workers": world_size})
        await self._wake()
        return self._tokens

    async def take(self, lane: int, token: int, rank: int, index: int, timeout: float = POLL_S) -> tuple[str, TrialSpec | None]:
        """Assignment number `index` of this group: ("trial", spec), ("idle", None), ("stop", None) or ("reset", None)."""

        answers: list[tuple[str, TrialSpec | None]] = []

        def answered() -> bool:
            answer = self._answer(lane, token, rank, index)
            if answer is not None:
                answers.append(answer)
            return bool(answers)

        await self._until(answered, timeout)
        if answers and answers[0][0] == "trial" and rank == 0:
            await self._wake()
        return answers[0] if answers else ("idle", None)

    async def report(self, lane: int, token: int, trial_id: str, event: dict[str, Any]) -> bool:
        """An event of a running trial. True asks it to stop."""
        state = self._lanes[lane]
        if state.token != token or state.spec is None or state.spec.trial_id != trial_id or state.resetting:
            return True
        self._log({**event, "trial_id": trial_id, "lane": lane})
        await self._wake()
        return self._closing or trial_id in self._cancelled

    async def done(self, lane: int, token: int, rank: int, outcome: dict[str, Any]) -> str:
        """A rank is through with the trial: {"result": dict} or {"error": text, "fault": whose, "traceback": text, "poisoned": bool,
        "waited": seconds for a full disk}.

        Answers "next", "reset" (leave the group, so that Train starts a new one) or "stop". The trial is finished when every
        rank is through, or at an error: of a rank of several, when the group has left and had lost no worker. An error that is a
        machine's fault interrupts the trial as a death does.
        """
        state = self._lanes[lane]
        if state.token != token:
            return "stop"
        if state.spec is None or state.resetting:
            return "reset" if state.resetting else "next"
        if "error" in outcome:
            # Other ranks may sit in a collective that this rank will never join: only a new group is surely sound.
            state.resetting = state.world_size > 1 or bool(outcome.get("poisoned"))
            facts = {"traceback": outcome.get("traceback", ""), "lane": lane}
            state.waited = outcome.get("waited", 0.0)
            state.failure = {"error": outcome["error"], "fault": outcome.get("fault", "safebasin"), "facts": facts}
            if state.world_size == 1:
                self._interrupted(state, died=False)
        else:
            state.done[rank] = outcome
            if len(state.done) == state.world_size:
                self._finish_with(state.spec, state.done[0]["result"], lane)
                state.spec = None
        await self._wake()
        return "reset" if state.resetting else "next"

    # -- inside ------------------------------------------------------------------------------------------------------

    def _answer(self, lane: int, token: int, rank: int, index: int) -> tuple[str, TrialSpec | None] | None:
        state = self._lanes[lane]
        if state.token != token:
            return "stop", None
        if state.resetting:
            return "reset", None
        if state.spec is not None and state.index == index and rank not in state.done:
            return "trial", state.spec
        if self._closing:
            return "stop", None
        chosen = self._next_for(lane) if rank == 0 and state.spec is None else None
        if chosen is not None:
            self._assign(chosen, lane, state, index)
            return "trial", state.spec
        return None

    def _next_for(self, lane: int) -> TrialSpec | None:
        """The first trial in the queue, but none that this lane's machine has failed while another lane is up."""
        others = any(state.token and not state.gone for number, state in self._lanes.items() if number != lane)
        return next((spec for spec in self._queue if not others or self._shun.get(spec.trial_id) != lane), None)

    def _assign(self, spec: TrialSpec, lane: int, state: LaneState, index: int) -> None:
        self._queue.remove(spec)
        state.spec, state.index, state.done = spec, index, {}
        self._log({"kind": "started", "trial_id": spec.trial_id, "recipe": spec.recipe, "phase": spec.phase, "params": spec.params,
                   "seed": spec.seed, "attempt": spec.attempt, "lane": lane})

    def _interrupted(self, state: LaneState, machines: Sequence[str] = (), *, died: bool) -> None:
        """What this lane runs ends here. It is told failed where it raised by itself, or died too often; else it is next in the queue."""
        spec, state.spec = state.spec, None
        failure, state.failure = state.failure, None
        waited, state.waited = state.waited, 0.0
        if spec is None:
            return
        if failure is not None and not died and failure["fault"] != "machine":
            self._finish(spec, "failed", **{**failure, "error": faults.said(failure["error"], failure["fault"])})
            return
        said = failure["error"] if failure is not None and not died else None
        deaths = self._deaths[spec.trial_id] = self._deaths.get(spec.trial_id, 0) + int(not machines and not waited)
        event = {"kind": "interrupted", "trial_id": spec.trial_id, "attempt": spec.attempt, "deaths": deaths, "machines": list(machines)}
        self._log(event | ({"error": said} if said else {}))
        if self._closing or spec.trial_id in self._cancelled:
            self._finish(spec, "stopped", error=f"stopped after {said or 'its worker died'}", facts={"cancelled": True})
        elif deaths > self._max_trial_failures:
            why = f"it failed {deaths} times, the last time with {said}" if said else f"its worker died {deaths} times (killed, or out of memory)"
            why = f"{why}; ray.max_trial_failures={self._max_trial_failures} takes a trial up again that often"
            self._finish(spec, "failed", error=faults.said(why, "machine"), fault="machine", facts=failure["facts"] if said else None)
        elif spec.attempt + 1 >= MOST_ATTEMPTS:
            why = said or f"{' and '.join(machines) or 'its worker'} left"
            why = f"it was interrupted {spec.attempt + 1} times, the last time because {why}; no trial is taken up more often"
            self._finish(spec, "failed", error=faults.said(why, "machine"), fault="machine")
        else:
            if said:
                self._shun[spec.trial_id] = next(number for number, one in self._lanes.items() if one is state)
            self._queue.appendleft(dataclasses.replace(spec, attempt=spec.attempt + 1))

    def _lost(self, spec: TrialSpec) -> None:
        """No lane is left: a resumed run takes it up."""
        why = f"no lane is left to run it: {self._gone_sentence()}"
        self._finish(spec, "stopped", error=why, facts={"started": spec.attempt > 0, "cancelled": True})

    def _finish(self, spec: TrialSpec, state: str, *, error: str, fault: Fault | None = None, facts: dict[str, Any] | None = None) -> None:
        result = TrialResult(spec.trial_id, spec.recipe, dict(spec.params), spec.seed, spec.phase, state, error=error, fault=fault, facts=facts or {})
        self._store(spec, result.to_dict())

    def _finish_with(self, spec: TrialSpec, result: dict[str, Any], lane: int) -> None:
        facts = {**(result.get("facts") or {}), "lane": lane, "attempt": spec.attempt}
        if spec.trial_id in self._cancelled and result["state"] == "stopped":
            facts["cancelled"] = True
        self._store(spec, {**result, "facts": facts})

    def _store(self, spec: TrialSpec, result: dict[str, Any]) -> None:
        self._results[spec.trial_id] = result
        self._log({"kind": "finished", "trial_id": spec.trial_id, "result": result})

    def _slim(self, trial_id: str) -> None:
        """Keep no more of a finished trial than how it ended: the driver has the rest, and a search may have thousands."""
        if trial_id in self._results:  # else its id is in use again
            self._results[trial_id] = {"state": self._results[trial_id]["state"]}
            self._specs.pop(trial_id, None)

    def _log(self, event: dict[str, Any]) -> None:
        self._events.append({"time": time.time(), **event})

    def _all_gone(self) -> bool:
        return all(state.gone for state in self._lanes.values())

    def _gone_sentence(self) -> str:
        return "; ".join(f"lane {number}: {state.gone}" for number, state in self._lanes.items())

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, predicate, timeout: float) -> bool:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(predicate), timeout)
            except TimeoutError:
                return False
        return True
