"""A training of the search that its probes prove unsafe ends there: it can win no more, and the rest of its cost goes to others.

Looks are taken at an eighth, a quarter and a half of the training (a fall is nearly always there by then, and later less is saved). Prompts are
drawn anew for each, and the looks are judged together by a betting game against "unsafe answers rose by at most `safety.limits.max_degradation`"
(`orchestrator.decision.drift`): a model that keeps the limit at every look is ended with a probability of at most 1 - `safety.limits.confidence`.
The limit itself is the guard's, not a part of it: the best configurations lie close to their limit.

Only recipes that cannot come back are ended (`orchestrator.search.spaces.ends_early`). Every worker of the lane calls these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.decision.drift import Evidence, changed
from orchestrator.evaluation.suites import PromptSuite
from orchestrator.records import LaneContext, TrialSpec
from orchestrator.texts import moved
from orchestrator.trial import monitor
from orchestrator.trial.monitor import Probe

if TYPE_CHECKING:
    from strategies.plain import PlainEngine
    from strategies.recipe import Recipe

LOOKS = (1 / 8, 1 / 4, 1 / 2)
"""When, as shares of the training."""
PROMPTS = 60
"""Asked at each look."""


class EarlyEnd:
    """Watches one training for being hopeless; does nothing where the spec does not ask for it. Build it while the model is untouched."""

    def __init__(self, experiment: Experiment, suites: tuple[PromptSuite, ...], context: LaneContext, spec: TrialSpec):
        self.experiment, self.context, self.seed = experiment, context, spec.seed
        harmful = [suite for suite in suites if suite.kind == "harmful" and suite.constrains]
        self.pool = monitor.pool(harmful, monitor.POOL * PROMPTS) if spec.early_end and harmful else None
        self.before: list[bool] = []
        """The untouched model's answers to the pool: unsafe or not."""
        self.steps: tuple[int, ...] = ()
        self.evidence: Evidence | None = None

    def baseline(self, model: Any, tokenizer: Any) -> None:
        """Ask the untouched model the whole pool; its answers are kept for the lane's lifetime. Collective."""
        if self.pool is None:
            return
        key = ("guard baseline", self.experiment.digest_of("model", "safety"), self.pool.hash)
        if key not in self.context.cache:
            self.context.cache[key] = monitor.failures(self.experiment, self.context, model, tokenizer, self.pool, None)
        self.before = self.context.cache[key]

    def start(self, last: int) -> None:
        """Plan the looks of a training of `last` steps; none for one of fewer than two."""
        self.steps = tuple(sorted({step for share in LOOKS if 0 < (step := round(share * last)) < last})) if self.pool is not None else ()
        if self.steps:
            self.evidence = Evidence(len(self.steps), self.experiment.safety.limits.max_degradation)

    def look(self, engine: PlainEngine, recipe: Recipe, tokenizer: Any, step: int, tell: Callable[[dict[str, Any]], None]) -> str | None:
        """Why the training ends after `step` steps; None: it goes on. Collective."""
        if step not in self.steps or self.evidence is None or self.pool is None:
            return None
        indices = monitor.draw(self.pool, PROMPTS, f"{monitor.PROBE_SEED}/early/{self.seed}/{len(self.evidence.looks)}")
        with engine.gathered() as whole:
            after = monitor.failures(self.experiment, self.context, whole, tokenizer, self.pool.subset(indices), recipe)
        probe = self.context.peers.first(self._probe(step, [self.before[i] for i in indices], after))
        tell({**probe.event(), "early_end": True})
        return self._said(probe) if probe.breach else None

    def _probe(self, step: int, before: list[bool], after: list[bool]) -> Probe:
        limits, (gained, lost), n = self.experiment.safety.limits, changed(before, after), len(after)
        value = self.evidence.add(gained, lost, n)
        together = self.evidence.pooled()
        whole = n == len(self.pool.prompts)  # then a look measures, and estimates nothing
        proved = whole or value >= 1 / (1 - limits.confidence)
        breach = proved and together[0] > limits.max_degradation and (gained - lost) / n > limits.max_degradation
        return Probe(step, n, sum(after), sum(before), breach, not breach, evidence=value, pooled=together)

    def _said(self, probe: Probe) -> str:
        return (
            f"ended early: unsafe answers {moved(probe.rise)} by step {probe.step} ({probe.unsafe} of {probe.n}, "
            f"{probe.unsafe_before} before), more than safety.limits.max_degradation={self.experiment.safety.limits.max_degradation} beyond "
            "chance; search.early_end=false trains on"
        )

    def state_dict(self) -> dict[str, Any] | None:
        """What a training that was killed needs."""
        return None if self.evidence is None else self.evidence.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up `state_dict` again; None: of a checkpoint that was written before there were looks."""
        if state is not None and self.evidence is not None:
            self.evidence = Evidence.of(state)
