"""What is told to a tracking server, as plain values: metrics by group, params, tags. Knows no MLflow."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.data import counted
from orchestrator.decision.intervals import paired_difference
from orchestrator.decision.limits import Judgement
from orchestrator.records import SuiteResult, TrialResult, TrialSpec
from orchestrator.redaction import redact, redact_uri
from orchestrator.storage import files
from orchestrator.texts import clean


def metric_name(*parts: str) -> str:
    """Parts joined by `/`, as MLflow takes names: at most 250 long, no character it refuses, no step of a path.

    A step that had to be changed ends with four digits of its hash, so that `a[b]` and `a(b)` stay two names.
    """
    return "/".join(_step(step) for part in parts for step in str(part).split("/"))[:250].rstrip("/")


def _step(step: str) -> str:
    """One part of a metric's name; the same where nothing needs to be changed."""
    taken = re.sub(r"[^\w.\- ]", "_", step)[:100]
    if taken == step and taken.strip(".") != "":
        return taken
    return f"{taken.strip('.') or '_'}-{hashlib.sha256(step.encode(errors='backslashreplace')).hexdigest()[:4]}"


def event_metrics(event: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of one reported event by metric name: `train/loss`, `safety/probe_asr`, `safety_delta/probe_degradation`, `cost/...`.

    What is no number is left out; only events of kind `train`, `log`, `probe`, `rollback` and `last_safe` have any.
    """
    found: dict[str, float] = {}
    if event["kind"] in ("rollback", "last_safe"):
        return {f"safety/{key}": float(event[key]) for key in ("rollbacks", "rate_factor", "to_step")}
    if event["kind"] not in ("train", "log", "probe"):
        return found
    for key, value in event.items():
        if key in ("kind", "lane", "step", "steps", "time", "phase", "attempt") or not isinstance(value, (int, float)):
            continue
        if event["kind"] == "probe":
            name = metric_name("safety_delta" if "degradation" in key or "rise" in key else "safety", f"probe_{key}")
        else:
            name = metric_name("cost" if "seconds" in key or "memory" in key else "train", key)
        found[name] = float(value)
    return found


NO_COST = ("lane", "attempt")
"""Numbers among a trial's facts that say where it ran, not what it cost."""


def result_metrics(result: TrialResult, judgement: Judgement | None, baseline: TrialResult | None = None, level: float = 0.95) -> dict[str, float]:
    """Final figures of a trial by metric name; what was not measured is absent. May hold NaN (see `split_finite`).

    `baseline`: the untouched model, for the paired rise of every suite, limited or not, at `level`.
    """
    found: dict[str, float] = {}
    if result.task is not None:
        found["task/score"] = float(result.task.score)
        found["task/n"] = float(len(result.task.scores))
    if result.confirmation is not None:
        found["task/held_out_score"], found["task/held_out_n"] = float(result.confirmation.score), float(len(result.confirmation.scores))
    for name, suite in result.suites.items():
        found[metric_name("safety", name, "asr" if suite.kind == "harmful" else "over_refusal")] = suite.rate
        found[metric_name("safety", name, "n")] = float(len(suite.ids))
        found |= _by_the_second(name, suite)
        if suite.screening is not None:
            found[metric_name("safety", name, "stopped_early")] = float(suite.stopped_early)
        if suite.parse_failed:
            found[metric_name("safety", name, "parse_failed")] = float(suite.parse_failed)
    for part, seconds in result.seconds.items():
        found[metric_name("cost", f"seconds_{part}")] = float(seconds)
    found["cost/steps"] = float(result.steps)
    for name, value in result.facts.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in NO_COST:
            found[metric_name("cost", name)] = float(value)
    for name, left in (result.facts.get("untouched") or {}).items():
        found[metric_name("method", name, "untouched_share")] = float(left["share"])
    found |= {metric_name(name): value for name, value in counted.metrics(result.facts).items()}
    if baseline is not None and result is not baseline:
        for name, suite in result.suites.items():
            found |= _rises(name, baseline.suites.get(name), suite, level)
    return found | (_judged(judgement) if judgement is not None else {})


def _by_the_second(name: str, suite: SuiteResult) -> dict[str, float]:
    """The rate by the second judge: what it could not decide counts against the model on a harmful suite, as in the report's warning."""
    if not suite.second or suite.kind == "choice":
        return {}
    worse, what = (("unsafe", "unparsed"), "asr") if suite.kind == "harmful" else (("refused",), "over_refusal")
    return {metric_name("safety", name, f"second_judge_{what}"): sum(word in worse for word in suite.second) / len(suite.second)}


def _rises(name: str, before: SuiteResult | None, after: SuiteResult, level: float) -> dict[str, float]:
    """Paired rise of a suite's failures, and of attack success by the second judge, each with both ends; {} where other prompts were asked."""
    if before is None or before.ids != after.ids or not after.ids or before.kind != after.kind:
        return {}
    kinds = {"harmful": "degradation", "benign": "over_refusal_rise", "choice": "wrong_choices_rise"}
    pairs = {metric_name("safety_delta", kinds[after.kind], name): (before.certain, after.failures)}
    if after.kind == "harmful" and before.second is not None and after.second is not None:
        seen = [word == "unsafe" for word in before.second], [word in ("unsafe", "unparsed") for word in after.second]
        pairs[metric_name("safety_delta", "second_judge", name)] = seen
    found = {}
    for metric, (first, second) in pairs.items():
        rise = paired_difference(first, second, after.requests, level)
        found |= {metric: rise.value, f"{metric}_lower": rise.lower, f"{metric}_upper": rise.upper}
    return found


def _judged(judgement: Judgement) -> dict[str, float]:
    found = {"constraint/feasible": float(judgement.verdict == "feasible")}
    for name in ("asr", "over_refusal"):
        if getattr(judgement, name) is not None:
            found[f"safety/{name}"] = float(getattr(judgement, name))
    for name in ("degradation", "over_refusal_rise"):
        estimate = getattr(judgement, name)
        if estimate is not None:
            found |= {f"safety_delta/{name}": estimate.value, f"safety_delta/{name}_lower": estimate.lower}
            found[f"safety_delta/{name}_upper"] = estimate.upper
    for constraint in judgement.constraints:
        found[metric_name("constraint", constraint.name)] = constraint.value
        if constraint.estimate.n:  # the verdict's own figure, also where a suite was asked in sequence or at another level
            name = metric_name("safety_delta", constraint.name)
            found |= {name: constraint.estimate.value, f"{name}_lower": constraint.estimate.lower, f"{name}_upper": constraint.estimate.upper}
    if judgement.constraints:
        found["constraint/excess"] = max(c.value for c in judgement.constraints)
    return found


def split_finite(metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """(finite metrics, names of the others): a tracking server stores NaN as 0 or as the largest number, so it is not sent."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return finite, [name for name in metrics if name not in finite]


def trial_params(spec: TrialSpec) -> dict[str, str]:
    """What varies between trials, as params: the recipe, the seed and what was sampled."""
    params = {"recipe": spec.recipe or "untouched", "seed": str(spec.seed)}
    for name, value in redact(dict(spec.params)).items():
        params[metric_name(name)] = clean(value)[:6000]
    return params


def trial_tags(spec: TrialSpec, common: Mapping[str, str]) -> dict[str, str]:
    """Tags of a trial's run: those of the parent (UI filters drop children of a matching parent) and its own."""
    own = {"trial_id": spec.trial_id, "recipe": spec.recipe or "untouched", "phase": spec.phase, "seed": str(spec.seed), "state": "running"}
    return {**common, **{f"safebasin.{name}": value for name, value in own.items()}, "safebasin.attempt": str(spec.attempt)}


def text_of(value: Any) -> str:
    """A value as a tag's text: at most 8000 characters, secrets out; nothing that a data base or a browser would not take."""
    return clean(redact_uri(value if isinstance(value, str) else str(files.plain(value))))[:8000]
