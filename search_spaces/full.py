"""Plain fine-tuning: only the learning rate, which every recipe searches."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution


def space(num_layers: int) -> dict[str, BaseDistribution]:
    return {}


def defaults(num_layers: int) -> dict[str, Any]:
    return {}
