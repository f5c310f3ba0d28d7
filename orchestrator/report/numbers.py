"""How a figure is written: digits, interval, size; a difference as `rose by` or `fell by`."""

from __future__ import annotations

import math

from orchestrator import texts
from orchestrator.decision.intervals import Estimate

MISSING = "not measured"


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A rate or score with fixed digits; `not measured` for None and NaN."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-0." + "0" * digits, "0." + "0" * digits) if float(text) == 0 else text


def size(estimate: Estimate) -> str:
    """`n=120 in 40 requests`, or `n=120`; `n=96 of 360 (stopped early)` where a suite was not asked to its end."""
    requests = f" in {estimate.requests} requests" if estimate.requests else ""
    return f"n={estimate.n}" + (f" of {estimate.of}" if estimate.of else "") + requests + (" (stopped early)" if estimate.of else "")


def figure(estimate: Estimate | None, signed: bool = False) -> str:
    """Value, interval and size: `+0.020 [-0.004, +0.049] n=120 in 40 requests`; `not measured` where there is nothing."""
    if estimate is None or not estimate.n:
        return MISSING
    lower, upper = number(estimate.lower, signed=signed), number(estimate.upper, signed=signed)
    return f"{number(estimate.value, signed=signed)} [{lower}, {upper}] {size(estimate)}"


def percent(share: float) -> str:
    """A share as `95%` or `97.5%`."""
    return f"{100 * share:.4g}%"


def moved(estimate: Estimate) -> str:
    """A paired change in words: `rose by +0.020 [-0.004, +0.049] n=120`, `fell by 0.017 (-0.017 [-0.040, +0.006] n=120)`; what was not measured
    is `was not measured`."""
    if not estimate.n or math.isnan(estimate.value):
        return "was not measured"
    told = figure(estimate, signed=True)
    return f"rose by {told}" if float(number(estimate.value)) > 0 else f"{texts.moved(estimate.value)} ({told})"
