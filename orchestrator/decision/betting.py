"""Betting against a claim on the sum of a finite population, drawn without replacement: the capital behind `sequential`.

A bettor against a claim starts with 1 and stakes a share c of what may be lost on each
draw; where the bettor's claim is false the capital is a supermartingale and reaches 1/alpha with probability at most alpha, however often
one looks (Ville). The stake is spread over several shares (`OVER`, `WITHIN`, `TOUCHED`), as no one of them suits every degradation. Per draw, with
m the mean of what is left if the claim held and `low` the least value that is left: 1 - c + c (x - low) / (m - low).
Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 86 (2024), section 5 (without
replacement; mixture of bets as in their dKelly); "Confidence sequences for sampling without replacement", NeurIPS 2020. Ours: the range
of what is left is taken from the untouched model's known answers (one that failed cannot get worse), and what cannot add up any more is
excluded, so the interval ends in a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

ROUNDING = 1e-9

Bets = tuple[np.ndarray, np.ndarray]
"""(shares of the largest stake, how the first capital is divided among them)."""

_STAKES = np.array([1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.06, 0.04, 0.02])
OVER: Bets = (_STAKES, _STAKES**1.5 / (_STAKES**1.5).sum())
"""Against "the limit is kept". A stake of 1 is ruined by a single draw at the far end and quickest where none comes."""
WITHIN: Bets = (np.array([1.0, 0.75, 0.5, 0.3, 0.12, 0.05]), np.array([0.2, 0.2, 0.1, 0.08, 0.04, 0.01]))
TOUCHED: Bets = (np.array([1.0, 0.75]), np.array([0.15, 0.22]))
"""Both against "the limit is broken", on sums and on how many units got worse; together 1. Any fixed division is valid; these favour clear cases."""


def log_capital(
    sums: Sequence[float] | np.ndarray, low: np.ndarray, high: np.ndarray, total: float, side: Literal["more", "less"]
) -> np.ndarray:
    """Log of the bettor's capital after each draw, shape (T,), against "the sum over all K units is at most `total`" (side `more`; at least
    `total` for `less`).

    sums: (T,) of the units drawn so far; low, high: (K,) least and largest possible sum of each unit, drawn ones first. Infinite from where
    the claim cannot come true any more. No draws: an empty array.
    """
    drawn = np.asarray(sums, dtype=float)
    if not len(drawn):
        return np.empty(0)
    if side == "more":
        return _impossible(drawn, low, total, _log_sum(_bets(drawn, low, total, OVER)))
    each = _bets(-drawn, -high, -total, WITHIN)
    touched = _bets(-(drawn > 0).astype(float), -np.ones(len(low)), -fewest(high, total), TOUCHED)
    return _impossible(-drawn, -high, -total, _log_sum(np.concatenate([each, touched], axis=1)))


def _bets(drawn: np.ndarray, low: np.ndarray, total: float, bets: Bets) -> np.ndarray:
    """Log capital of each share of a stake against "the sum is at most `total`", its own weight in it, shape (draws, shares)."""
    stakes, weights = bets
    draws, units = len(drawn), len(low)
    mean = (total - (np.cumsum(drawn) - drawn)) / (units - np.arange(draws))
    least = np.minimum.accumulate(low[::-1])[::-1][:draws]  # the least value among units not drawn yet
    room = mean - least
    gain = np.divide(drawn - least, room, out=np.ones(draws), where=room > ROUNDING)
    with np.errstate(divide="ignore"):
        return np.cumsum(np.log(np.maximum(1 - stakes + stakes * gain[:, None], 0.0)), axis=0) + np.log(weights)


def _log_sum(each: np.ndarray) -> np.ndarray:
    top = each.max(axis=1)  # finite: stakes below 1 are never ruined
    return top + np.log(np.exp(each - top[:, None]).sum(axis=1))


def _impossible(drawn: np.ndarray, low: np.ndarray, total: float, capital: np.ndarray) -> np.ndarray:
    """Infinite from where what the units left add at the least exceeds `total`."""
    rest = low.sum() - np.cumsum(low)[: len(drawn)]
    return np.where(np.maximum.accumulate(np.cumsum(drawn) + rest > total + ROUNDING), np.inf, capital)


def fewest(high: np.ndarray, total: float) -> int:
    """How many units must have got worse for a sum of `total`: as many as reach it at their largest; one more than there are where none do."""
    return int(np.searchsorted(np.cumsum(np.sort(high)[::-1]), total - ROUNDING)) + 1 if total > 0 else 0
