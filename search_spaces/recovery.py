"""Recovery: harmful rows per task row around DeRTa's tenth, harmless ones beside them; depth and transitions are choices, not knobs to tune."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution


def space(num_layers: int) -> dict[str, BaseDistribution]:
    return {"share": FloatDistribution(0.02, 0.3, log=True), "harmless": FloatDistribution(0.5, 3.0, log=True)}


def defaults(num_layers: int) -> dict[str, Any]:
    return {"share": 0.1, "harmless": 1.0}
