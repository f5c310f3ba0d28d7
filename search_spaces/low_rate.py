"""The low-rate control: no knob, a tenth of the learning rate."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution

LEARNING_RATE_FACTOR = 0.1
"""With common.SPREAD the range ends at 0.4 of the configured rate; plain fine-tuning's starts at 0.25 of it."""


def space(num_layers: int) -> dict[str, BaseDistribution]:
    return {}


def defaults(num_layers: int) -> dict[str, Any]:
    return {}
