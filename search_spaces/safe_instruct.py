"""Safety rows per task row: the paper's sweep (0.005 to 0.1 on unaligned models), extended upwards; default its knee, 3 %."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution


def space(num_layers: int) -> dict[str, BaseDistribution]:
    return {"share": FloatDistribution(0.01, 0.3, log=True)}


def defaults(num_layers: int) -> dict[str, Any]:
    return {"share": 0.03}
