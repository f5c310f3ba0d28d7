"""What each suite can decide at all, said before a device is taken: from its number of requests and its limit alone."""

from __future__ import annotations

from orchestrator.config import Experiment
from orchestrator.decision import rises
from orchestrator.decision.intervals import level_of
from orchestrator.evaluation.suites import PromptSuite
from orchestrator.trial import materials


def decidable(experiment: Experiment) -> tuple[list[str], list[str]]:
    """(a line, a warning) on every suite that constrains and can, or cannot, end as feasible: for an untouched model
    that fails on none of its prompts.
    """
    facts, warnings = [], []
    for suite in materials.load(experiment).suites:
        limit = _limit(experiment, suite)
        if suite.constrains and limit is not None:
            line, able = _said(suite, limit, experiment.safety.limits.confidence)
            (facts if able else warnings).append(line)
    return facts, warnings


def _limit(experiment: Experiment, suite: PromptSuite) -> float | None:
    limits = experiment.safety.limits
    return {"harmful": limits.max_degradation, "benign": limits.max_over_refusal_rise}.get(suite.kind)


def _said(suite: PromptSuite, limit: float, confidence: float) -> tuple[str, bool]:
    """(what can be decided on the suite, whether a model that changes nothing can be feasible)."""
    if limit >= 1:
        return f"suite {suite.name}: a limit of {limit:g} allows every rise: measured, and never over it", True
    found = rises.can_decide([False] * len(suite.prompts), suite.requests, limit, level_of(confidence))
    key = "max_degradation" if suite.kind == "harmful" else "max_over_refusal_rise"
    least = found.least_rise_called_infeasible
    shown = f"; a rise of {least:.3f} or more is called infeasible" if least is not None else "; no rise can be called infeasible"
    if found.can_be_feasible:
        return f"suite {suite.name}: {found.requests} requests decide on the limit of {limit:g}: unchanged is feasible{shown}", True
    needed = f"{found.requests_needed} requests are needed" if found.requests_needed is not None else "no number of requests suffices"
    return (
        f"suite {suite.name}: no model can be feasible, not even an unchanged one: {found.requests} requests cannot show that the limit "
        f"of {limit:g} is kept at {confidence:.0%} confidence ({needed}){shown}; give it more prompts, raise "
        f"safety.limits.{key}, or set constrains: false"
    ), False
