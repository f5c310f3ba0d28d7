"""Ranges that every recipe shares."""

from __future__ import annotations

from optuna.distributions import FloatDistribution

SPREAD = 4.0
"""The learning rate is searched from a SPREADth to SPREAD times its centre."""


def learning_rate(centre: float) -> FloatDistribution:
    """Log range of the learning rate around `centre`. Raises ValueError where it is not above 0."""
    if centre <= 0:
        raise ValueError(f"learning rate {centre} must be above 0")
    return FloatDistribution(centre / SPREAD, centre * SPREAD, log=True)
