"""Task metrics: 0..1 per row, higher is better."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.data.conversations import Conversation
from orchestrator.data.tokens import tokenise
from orchestrator.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from torch import nn

Metric = Callable[[str, str], float]

NEG_LOSS = "neg_loss"
"""The metric that reads the model's likelihood of the reference and generates nothing."""


def squash(text: str) -> str:
    """Lower case, single spaces: the form in which answers are compared."""
    return " ".join(text.lower().split())


def exact_match(answer: str, reference: str) -> float:
    """1 where the texts are equal but for case and white space, else 0."""
    return float(squash(answer) == squash(reference))


def contains(answer: str, reference: str) -> float:
    """1 where the reference occurs in the answer, case and white space aside; an empty reference gives 0."""
    return float(bool(squash(reference)) and squash(reference) in squash(answer))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words (as SQuAD does, without dropping articles); 1 where both are empty."""
    said, wanted = re.findall(r"\w+", answer.lower()), re.findall(r"\w+", reference.lower())
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def final_number(answer: str, reference: str) -> float:
    """1 where the last number in both is the same (GSM8K: "#### 72"); 0 where either has none."""
    last = [re.findall(r"-?\d[\d,]*\.?\d*", text) for text in (answer, reference)]
    if not all(last):
        return 0.0
    said, wanted = (float(numbers[-1].replace(",", "")) for numbers in last)
    return float(said == wanted)


METRICS: dict[str, Metric] = {"exact_match": exact_match, "contains": contains, "token_f1": token_f1, "final_number": final_number}


def get_metric(name: str) -> Metric:
    """A metric by name, or `package.module:function`. Raises UnknownNameError, ConfigError for a function that cannot be imported."""
    if ":" not in name:
        if name not in METRICS:
            raise UnknownNameError("metric", name, [*METRICS, NEG_LOSS, "package.module:function"])
        return METRICS[name]
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ConfigError(f"task.metric {name!r} is no package.module:function; write names with dots and one colon, e.g. my_metrics:rouge")
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        raise ConfigError(f"task.metric {name!r} is part of Python itself, whose functions are no metrics; name a function of a module of your own")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module is a program that runs when it is imported
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"task.metric {name!r} cannot be imported: {said}; it must be installed or on PYTHONPATH of every worker") from error
    return _as_metric(found, name)


def _as_metric(found: Any, name: str) -> Metric:
    """A function of two texts. It is called with no text before a model has answered. Raises ConfigError."""
    if not inspect.isfunction(found):
        what = "a class" if isinstance(found, type) else "no Python function" if callable(found) else f"a {type(found).__name__}, not a function"
        raise ConfigError(f"task.metric {name!r} is {what}; name a function of (answer, reference) that returns a number from 0 to 1")
    if found.__module__.split(".")[0] in sys.stdlib_module_names:
        raise ConfigError(
            f"task.metric {name!r} is {found.__module__}.{found.__qualname__}, part of Python itself and no metric; name a function of your own"
        )
    try:
        inspect.signature(found).bind("answer", "reference")
    except TypeError as error:
        raise ConfigError(f"task.metric {name!r} does not take (answer, reference): {error}; name a function of these two texts") from error
    if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
        raise ConfigError(f"task.metric {name!r} returns no number but something to wait for or to walk through; name a plain function")
    return found


def check_metric(name: str) -> None:
    """Refuse a metric that does not exist. Raises UnknownNameError or ConfigError."""
    if name != NEG_LOSS:
        get_metric(name)


def score_task(metric: str, answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """The metric of each answer. Raises ConfigError where a custom metric returns something outside 0..1."""
    function = get_metric(metric)
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        value = function(answer, reference)
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"task.metric {metric!r} returned a {type(value).__name__}; a metric returns a number within 0..1") from None
        if not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise ConfigError(f"task.metric {metric!r} returned {value}; a metric must lie within 0..1, higher is better")
        scores.append(value)
    return scores


def neg_loss(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_length: int = 512,
    system_prompt: str | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """exp(-mean loss per answer token) of each conversation: the geometric mean probability of the reference, 0..1.

    A row whose whole answer is cut away by `max_length` gives 0. Batches hold up to `batch_tokens` padded tokens; batching changes
    nothing but rounding. Raises NonFiniteLogitsError for a model whose loss is NaN.
    """
    from orchestrator.evaluation.generate import inference

    if not conversations:
        return []
    named = [replace(c, id=str(i)) for i, c in enumerate(conversations)]
    examples, _ = tokenise(named, tokenizer, max_length=max_length, system_prompt=system_prompt, field="task.eval_data")
    scores = [0.0] * len(named)
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    with inference(model):
        while ordered:
            size = max(1, min(len(ordered), batch_tokens // len(ordered[-1].input_ids)))
            batch, ordered = ordered[-size:], ordered[:-size]
            for example, value in zip(batch, _likelihoods(model, batch), strict=True):
                scores[int(example.id)] = value
            if progress is not None:
                progress(len(batch))
    return scores


def _likelihoods(model: nn.Module, batch: Sequence[Any]) -> list[float]:
    import torch

    from orchestrator.evaluation.generate import check_finite
    from strategies import trying

    device = next(model.parameters()).device
    width = max(len(e.input_ids) for e in batch)
    ids = torch.tensor([[*e.input_ids, *[0] * (width - len(e.input_ids))] for e in batch], device=device)
    mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in batch], device=device)
    labels = torch.tensor([[*e.labels, *[-100] * (width - len(e.labels))] for e in batch], device=device)[:, 1:]
    logits = trying.forward(model)(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    means = losses.double().sum(1) / (labels != -100).sum(1).clamp(min=1)
    check_finite(torch.isnan(means))
    return torch.exp(-means).tolist()
