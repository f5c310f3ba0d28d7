"""SafeGrad: the weight of the alignment gradient and the temperature of the KL, at the paper's defaults 1 and 1."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution


def space(num_layers: int) -> dict[str, BaseDistribution]:
    return {"rho": FloatDistribution(0.1, 5.0, log=True), "temperature": FloatDistribution(0.5, 4.0, log=True)}


def defaults(num_layers: int) -> dict[str, Any]:
    return {"rho": 1.0, "temperature": 1.0}
