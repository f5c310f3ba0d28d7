"""Evaluators from outside: tasks of lm-evaluation-harness and of Inspect, as metrics that may be limits. Both are extras.

A metric is oriented so that a fall is a loss: `value` as the harness gives it, negated where `higher_is_better` is false. Limits are on the
fall below the untouched model, `max_drop`, by the interval of the two standard errors. Inference-time defences are not applied: the
harness asks the weights.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator import config
from orchestrator.errors import ConfigError, JudgeError, UnknownNameError
from orchestrator.peers import Peers

EXTRAS = {"lm_eval": "lm-eval", "inspect_ai": "inspect"}
"""Harness (the module's name) -> extra of safebasin that installs it."""


@dataclass(frozen=True)
class Measured:
    """One metric of one task: higher is better, whatever the harness's own direction."""

    value: float
    stderr: float | None
    max_drop: float | None
    n: int
    """Rows asked."""
    phase: str = "always"


def module(harness: str) -> Any:
    """The harness's module. Raises UnknownNameError, or ConfigError naming the extra where it is not installed."""
    if harness not in EXTRAS:
        raise UnknownNameError("external harness", harness, EXTRAS)
    try:
        return importlib.import_module(harness)
    except ImportError as error:
        raise ConfigError(
            f"safety.external: the harness {harness!r} is not installed ({error}); pip install 'safebasin[{EXTRAS[harness]}]' on every node"
        ) from error


def check(settings: tuple[config.External, ...]) -> None:
    """Refuse harnesses that are not there. Raises UnknownNameError, ConfigError."""
    for one in settings:
        module(one.harness)


def measure(model: Any, tokenizer: Any, settings: tuple[config.External, ...], peers: Peers | None = None) -> dict[str, dict[str, Any]]:
    """{name: value, stderr, max_drop, n, phase} of each evaluator, the same on every worker; worker 0 asks. Collective.

    Raises JudgeError, on every worker, where a harness fails or its result holds no such metric or standard error.
    """
    if not settings:
        return {}
    peers = peers or Peers()
    found = peers.first(_measured(model, tokenizer, settings) if peers.rank == 0 else {})
    if isinstance(found, JudgeError):
        raise found
    return found


def _measured(model: Any, tokenizer: Any, settings: tuple[config.External, ...]) -> dict[str, dict[str, Any]] | JudgeError:
    results = {}
    for one in settings:
        run = HARNESSES[one.harness]
        try:
            value, stderr, n = run(module(one.harness), model, tokenizer, one)
        except Exception as error:  # a harness raises what it likes; each becomes one sentence, and every worker hears of it
            return JudgeError(f"safety.external {one.name}: {one.harness} failed on {one.task!r}: {type(error).__name__}: {str(error)[:300]}")
        if not math.isfinite(value) or one.max_drop is not None and (stderr is None or not math.isfinite(stderr)):
            return JudgeError(
                f"safety.external {one.name}: {one.harness} gave {one.metric}={value} with standard error {stderr}; a limit needs both, "
                "choose another metric or leave max_drop out"
            )
        results[one.name] = asdict(Measured(value if one.higher_is_better else -value, stderr, one.max_drop, n, one.phase))
    return results


def _lm_eval(harness: Any, model: Any, tokenizer: Any, one: config.External) -> tuple[float, float | None, int]:
    """A task of lm-evaluation-harness, asked of the model in memory."""
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer, **one.model_options)
    options = dict(one.options)
    if "include_path" in options:  # a folder of task files of one's own, as the harness's command line has it
        options["task_manager"] = importlib.import_module("lm_eval.tasks").TaskManager(include_path=options.pop("include_path"))
    found = harness.simple_evaluate(model=wrapper, tasks=[one.task], limit=one.limit, **options)
    row = found["results"].get(one.task) or next(iter(found["results"].values()))
    rows = sum(int(counts.get("effective", 0)) for counts in (found.get("n-samples") or {}).values())
    return *_lm_eval_metric(row, one.metric), max(rows, 1)


def _lm_eval_metric(row: dict[str, Any], metric: str) -> tuple[float, float | None]:
    """`acc` may be written `acc,none`; its standard error stands beside it as `acc_stderr,none`."""
    key = metric if metric in row else next((k for k in row if k.split(",")[0] == metric), None)
    if key is None:
        raise KeyError(f"no metric {metric!r} among {', '.join(k for k in row if 'stderr' not in k)}")
    name, comma, filter_ = key.partition(",")
    stderr = row.get(f"{name}_stderr{comma}{filter_}")
    return float(row[key]), float(stderr) if isinstance(stderr, (int, float)) else None


def _inspect(harness: Any, model: Any, tokenizer: Any, one: config.External) -> tuple[float, float | None, int]:
    """A task of Inspect, asked of the model written to a folder for as long as it takes."""
    from strategies import merging

    with tempfile.TemporaryDirectory(prefix="safebasin-inspect-") as folder:
        whole = merging.merged(copy.deepcopy(model)) if merging.wrapped(model) else model
        whole.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        arguments = {"model_path": folder, "tokenizer_path": folder, **one.model_options}
        task = os.path.relpath(one.task) if os.path.isabs(one.task) else one.task  # a file of one's own; Inspect finds relative ones only
        (log,) = harness.eval(task, model="hf/local", model_args=arguments, limit=one.limit, log_dir=folder, **one.options)
    if log.status != "success":
        raise RuntimeError(f"the task ended with status {log.status}: {getattr(log, 'error', None)}")
    scores = [score.metrics for score in log.results.scores if one.metric in score.metrics]
    if not scores:
        raise KeyError(f"no metric {one.metric!r} among {', '.join(m for s in log.results.scores for m in s.metrics)}")
    stderr = scores[0].get("stderr")
    return float(scores[0][one.metric].value), None if stderr is None else float(stderr.value), max(int(log.results.completed_samples), 1)


HARNESSES: dict[str, Callable[..., tuple[float, float | None, int]]] = {"lm_eval": _lm_eval, "inspect_ai": _inspect}
