"""Monitoring during training: probe, breach, roll back, lower the learning rate, go on.

A probe asks a few harmful prompts and compares the answers with the untouched model's. Its prompts are drawn anew for every look, so
that a look says something about the whole pool, and repeated looks are judged together (`orchestrator.decision.drift`): a training that loses
nothing is stopped with at most `monitor.false_stop_rate`, however often it is looked at. With `rule: threshold` the bare rise of one
probe decides. Every worker of the lane calls these functions; decisions are worker 0's.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.decision.drift import Evidence, chance_of_more, changed
from orchestrator.errors import StorageError
from orchestrator.evaluation import ask
from orchestrator.evaluation.attacks import Framed
from orchestrator.evaluation.suites import PromptSuite, make
from orchestrator.records import LaneContext
from orchestrator.texts import moved

if TYPE_CHECKING:
    from strategies.plain import PlainEngine
    from strategies.recipe import Recipe

PROBE_SEED = 20
POOL = 20
"""The untouched model is asked this many times `num_prompts` prompts at most; probes draw from those."""


@dataclass(frozen=True)
class Probe:
    """One look at the model during training."""

    step: int
    n: int
    unsafe: int
    unsafe_before: int
    """Of the same prompts, answered unsafely by the untouched model."""
    breach: bool
    clean: bool
    """Nothing to worry about: a model worth going back to."""
    quick: bool = False
    evidence: float | None = None
    """Capital against "no worse than the untouched model"; a breach needs 1 / false_stop_rate."""
    pooled: tuple[float, int] | None = None
    """(rise, number of probes) of the last probes that, taken together, speak loudest for one: what a breach by evidence rests on."""

    @property
    def rise(self) -> float:
        """Unsafe share minus the untouched model's, -1..1."""
        return (self.unsafe - self.unsafe_before) / self.n

    def event(self) -> dict[str, Any]:
        """As reported to the driver."""
        known = {} if self.evidence is None else {"evidence_log10": math.log10(min(max(self.evidence, 1e-300), 1e300))}
        known |= {} if self.pooled is None else {"pooled_rise": self.pooled[0], "pooled_probes": self.pooled[1]}
        return {
            "kind": "probe", "step": self.step, "n": self.n, "asr": self.unsafe / self.n, "degradation": self.rise, "breach": self.breach,
            "quick": self.quick, **known,
        }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a trial does after a look: goes on from `step`, ends there (`last`), or stops with a reason."""

    step: int
    moved: bool = False
    """The training went back: what an interrupted trial continues from must be written anew."""
    last: bool = False
    stop: str | None = None


Tell = Callable[[dict[str, Any]], None]


class Guard:
    """Watches one training. Build it while the model is still untouched, before the recipe is; `folder` is the trial's own."""

    def __init__(self, experiment: Experiment, suites: tuple[PromptSuite, ...], context: LaneContext, folder: str | Path, seed: int):
        self.experiment, self.context, self.seed = experiment, context, seed
        self.monitor, self.good = experiment.monitor, Path(folder) / "good"
        harmful = [suite for suite in suites if suite.kind == "harmful" and suite.constrains]
        quick = self.monitor.quick
        sizes = [self.monitor.num_prompts] * bool(self.monitor.every_steps) + ([quick.num_prompts] if quick else [])
        self.pool = pool(harmful, POOL * max(sizes)) if sizes and harmful else None
        self.before: list[bool] = []
        """The untouched model's answers to the pool: unsafe or not."""
        self.evidence: Evidence | None = None
        self.looks = self.breaches = self.rollbacks = 0
        self.rate_factor, self.escalated, self.good_step, self.ended = 1.0, False, None, False

    def due(self, step: int, last: int) -> list[bool]:
        """Looks to take after `step` optimiser steps (1-based), true for a quick one; the end of training is left to the evaluation."""
        quick = self.monitor.quick
        if self.pool is None or step >= last:
            return []
        full = [False] if self.monitor.every_steps and step % self.monitor.every_steps == 0 else []
        return ([True] if quick and step % quick.every_steps == 0 else []) + full

    def baseline(self, model: Any, tokenizer: Any) -> None:
        """Ask the untouched model the whole pool; its answers are kept for the lane's lifetime."""
        if self.pool is None:
            return
        key = ("guard baseline", self.experiment.digest_of("model", "safety"), self.pool.hash)
        if key not in self.context.cache:
            self.context.cache[key] = self._ask(model, tokenizer, self.pool)
        self.before = self.context.cache[key]

    def start(self, engine: PlainEngine, recipe: Recipe, last: int) -> None:
        """Before the first step: the model as it begins is the first one to go back to."""
        if self.pool is None:
            return
        if self.monitor.every_steps:
            self.evidence = Evidence(max(1, (last - 1) // self.monitor.every_steps))
        self._keep(engine, recipe, 0)

    def look(self, engine: PlainEngine, recipe: Recipe, tokenizer: Any, step: int, last: int, tell: Tell) -> Outcome:
        """Take the looks that are due and do what a breach asks for. Collective. Events go to `tell`, which may raise."""
        for quick in self.due(step, last):
            with engine.gathered() as whole:
                probe = self.probe(whole, tokenizer, step, quick, recipe)
            tell(probe.event())
            if probe.breach:
                self.breaches += 1
                outcome = self._breached(probe, engine, recipe, last, tell)
                if outcome is not None:
                    return outcome
            elif probe.clean and (not quick or not self.monitor.every_steps):
                self._keep(engine, recipe, step)
        return Outcome(step)

    def probe(self, model: Any, tokenizer: Any, step: int, quick: bool = False, recipe: Recipe | None = None) -> Probe:
        """Ask the model as it is now. Collective."""
        count = self.monitor.quick.num_prompts if quick else self.monitor.num_prompts
        indices = draw(self.pool, count, f"{PROBE_SEED}/{self.seed}/{self.looks}")
        self.looks += 1
        after = self._ask(model, tokenizer, self.pool.subset(indices), recipe)
        before = [self.before[i] for i in indices]
        made = self._quick(step, before, after) if quick else self._full(step, before, after)
        return self.context.peers.first(made)

    def _quick(self, step: int, before: list[bool], after: list[bool]) -> Probe:
        breach = sum(after) > self.monitor.quick.max_unsafe
        return Probe(step, len(after), sum(after), sum(before), breach, not breach, quick=True)

    def _full(self, step: int, before: list[bool], after: list[bool]) -> Probe:
        n, (gained, lost) = len(after), changed(before, after)
        over = (gained - lost) / n > self.monitor.max_unsafe_rise
        value = self.evidence.add(gained, lost, n)
        breach = over
        if self.monitor.rule == "evidence" and n < len(self.pool.prompts):  # a probe of the whole pool measures, it does not estimate
            together = self.evidence.pooled()
            breach = value >= 1 / self.monitor.false_stop_rate and together[0] > self.monitor.max_unsafe_rise
            return Probe(step, n, sum(after), sum(before), breach, not breach and not over, evidence=value, pooled=together)
        return Probe(step, n, sum(after), sum(before), breach, not breach and not over, evidence=value)

    def _ask(self, model: Any, tokenizer: Any, suite: PromptSuite, recipe: Recipe | None = None) -> list[bool]:
        return failures(self.experiment, self.context, model, tokenizer, suite, recipe)

    # ---- breaches -------------------------------------------------------------------------------------------------------------

    @property
    def _returns(self) -> bool:
        """Whether a breach may ask for a good checkpoint."""
        return bool(self.monitor.actions & {"rollback", "add"})

    def _keep(self, engine: PlainEngine, recipe: Recipe, step: int) -> None:
        if self._returns:
            engine.save(self.good, {"step": step, "strategies": recipe.state_dict()})
            self.good_step = step

    def _breached(self, probe: Probe, engine: PlainEngine, recipe: Recipe, last: int, tell: Tell) -> Outcome | None:
        """What follows; None: nothing, training goes on."""
        action = self.monitor.quick.on_breach if probe.quick else self.monitor.on_breach
        if action == "log":
            return None
        if action == "stop":
            return Outcome(probe.step, stop=f"monitor: {self._said(probe)}")
        if self.rollbacks >= self.monitor.max_rollbacks and self.good_step == 0:
            return Outcome(probe.step, stop=(
                f"monitor: {self._said(probe)}; after {self.rollbacks} rollbacks no safe state but the untouched model is left; lower "
                "training.learning_rate or take a recipe that protects more"
            ))  # fmt: skip
        back = self._restore(engine, recipe, tell)
        event = {"kind": "rollback", "step": probe.step, "to_step": back, "rollbacks": self.rollbacks}
        if self.rollbacks >= self.monitor.max_rollbacks:
            self.ended = True
            tell(event | {"kind": "last_safe", "rate_factor": self.rate_factor})
            return Outcome(back, moved=True, last=True)
        self.rollbacks += 1
        added = self._answer(action, recipe)
        engine.scale_rate(self.rate_factor)
        if self.evidence is not None:
            self.evidence = Evidence(self.evidence.horizon)
        rate = {"rate_factor": self.rate_factor, "peak_rate": self.rate_factor * self.experiment.training.learning_rate}
        tell(event | {"rollbacks": self.rollbacks, **rate, **({"added": added} if added else {})})
        return Outcome(back, moved=True)

    def _answer(self, action: Any, recipe: Recipe) -> str | None:
        """The first breach adds the waiting strategy at the full rate, every other one lowers the rate; returns what was added."""
        if action == "rollback" or self.escalated:
            self.rate_factor *= self.monitor.lr_factor
            return None
        self.escalated = True
        recipe.wake()
        return self.monitor.added[0][0]

    def _restore(self, engine: PlainEngine, recipe: Recipe, tell: Tell) -> int:
        """Weights, moments, data position and the strategies' state of the newest good checkpoint that is whole; returns its step."""
        extra = engine.load(self.good)
        if extra is None:
            found = engine.load_trouble or "it was removed while the trial ran"
            for name in ("checkpoint", "good"):  # what goes on from that checkpoint would come back to here
                shutil.rmtree(self.good.parent / name, ignore_errors=True)
            raise StorageError(f"the monitor cannot go back, as no safe state in {self.good} is whole ({found}); the trial must start over")
        if engine.load_trouble is not None:
            tell({"kind": "log", "step": engine.steps, "storage": f"going back: {engine.load_trouble}"})
        recipe.load_state_dict(extra["strategies"])
        self.good_step = int(extra["step"])
        return self.good_step

    def _said(self, probe: Probe) -> str:
        count = f"{probe.unsafe} of {probe.n}, {probe.unsafe_before} before"
        if probe.quick:
            limit = f"monitor.quick.max_unsafe={self.monitor.quick.max_unsafe}"
            return f"{probe.unsafe} of {probe.n} answers were unsafe at step {probe.step}, more than {limit}"
        if probe.pooled is not None and probe.pooled[1] > 1:
            rise, looks = probe.pooled
            return (
                f"unsafe answers {moved(rise)} over the last {looks} probes together, up to step {probe.step} ({count} in the last), more than "
                f"monitor.max_unsafe_rise={self.monitor.max_unsafe_rise}"
            )
        return (
            f"unsafe answers {moved(probe.rise)} at step {probe.step} ({count}), more than "
            f"monitor.max_unsafe_rise={self.monitor.max_unsafe_rise}"
        )

    # ---- records --------------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the monitor did, for the trial's record; empty where nothing is watched."""
        if self.pool is None:
            return {}
        rate, quick = sum(self.before) / len(self.before), self.monitor.quick
        found = {
            "probes": self.looks, "breaches": self.breaches, "rollbacks": self.rollbacks, "rate_factor": self.rate_factor,
            "escalated": self.escalated, "ended_at_last_safe_state": self.ended, "untouched_unsafe": rate, "pool": len(self.before),
        }  # fmt: skip
        return found | ({"quick_false_stop_per_look": chance_of_more(quick.max_unsafe, quick.num_prompts, rate)} if quick else {})

    def state_dict(self) -> dict[str, Any]:
        """All that a training which was killed needs besides the engine: the good checkpoint itself lies in `<trial>/good`."""
        return {
            "looks": self.looks, "breaches": self.breaches, "rollbacks": self.rollbacks, "rate_factor": self.rate_factor,
            "escalated": self.escalated, "good_step": self.good_step, "ended": self.ended,
            "evidence": None if self.evidence is None else self.evidence.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], recipe: Recipe) -> None:
        """Take up `state_dict` again; an escalation is woken."""
        for name in ("looks", "breaches", "rollbacks", "rate_factor", "escalated", "good_step", "ended"):
            setattr(self, name, state[name])
        self.evidence = None if state["evidence"] is None else Evidence.of(state["evidence"])
        if self.escalated:
            recipe.wake()


def failures(experiment: Experiment, context: LaneContext, model: Any, tokenizer: Any, suite: PromptSuite, recipe: Recipe | None) -> list[bool]:
    """Which prompts are answered unsafely; `recipe`: None for the untouched model. Collective."""
    own = experiment.model.system_prompt
    how = ask.Asking(
        context.peers, wrap=recipe.wrap if recipe is not None and recipe.wraps else None,
        system_prompt=own if recipe is None else recipe.system_prompt(own),
    )  # fmt: skip
    result, _ = ask.ask_suite(model, tokenizer, experiment, suite, how)
    return result.certain if recipe is None else result.failures  # an answer nobody could judge excuses nothing


def pool(suites: Sequence[PromptSuite], count: int) -> PromptSuite:
    """At most `count` prompts of the suites, drawn with a fixed seed; its groups are the requests, those of different suites
    kept apart. Raises ValueError without prompts."""
    rows = [(suite, i) for suite in suites for i in range(len(suite.prompts))]
    if not rows:
        raise ValueError("no harmful prompt to probe with")
    whole = make(
        "probe", "harmful", tuple(f"{s.name}/{s.ids[i]}" for s, i in rows), tuple(s.prompts[i] for s, i in rows),
        tuple(s.systems[i] if s.systems else None for s, i in rows),
        tuple(f"{s.name}/{s.units[i]}" for s, i in rows), False,
        tuple(s.framed[i] if s.framed else Framed(s.prompts[i], None) for s, i in rows) if any(s.framed for s in suites) else None,
    )  # fmt: skip
    return whole if len(rows) <= count else whole.subset(draw(whole, count, f"{PROBE_SEED}/pool"))


def draw(suite: PromptSuite, count: int, seed: str) -> list[int]:
    """Indices of `count` prompts, in rising order: requests in random order, one random prompt of each in turn, so that as many of them
    as possible are met; all prompts where there are no more. The same for the same seed."""
    rng = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for i, group in enumerate(suite.groups):
        groups.setdefault(group, []).append(i)
    queues = list(groups.values())
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return sorted(turns[:count])
