"""Points of several recipes' spaces as numbers that a kernel can compare: every range as 0..1, ordered choices by rank, others one apart.

A parameter that several recipes have (the same name: `lora.lora_r`, `freeze_layers.start`) is one coordinate for all of them, beside whether the
recipe has it at all. The learning rate is placed within the recipe's own range, which follows what its strategies ask for (adapters: five times
the rate), so that "low for this recipe" means the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

RATE = "learning_rate"
PRESENT = 0.5
"""How far a recipe that has a shared parameter lies from one that has not."""
NEAR = 0.12
"""Standard deviation of a near point around its centre, of a range of 1."""

Space = Mapping[str, BaseDistribution]


@dataclass(frozen=True)
class Coordinates:
    """N points as the kernel sees them."""

    recipe: np.ndarray
    """(N,) number of the recipe."""
    rate: np.ndarray
    """(N,) learning rate, 0..1 of its recipe's range; 0.5 where it is pinned."""
    shared: np.ndarray
    """(N, S) parameters that more than one recipe has."""
    own: np.ndarray
    """(N, O) all parameters but the rate, a block of columns for each recipe; meaningful between points of one recipe."""

    def __len__(self) -> int:
        return len(self.recipe)

    def joined(self, other: Coordinates) -> Coordinates:
        """These points and then the others."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("recipe", "rate", "shared", "own"))
        return Coordinates(*(np.concatenate(pair) for pair in pairs))


class Places:
    """Turns points (recipe, {parameter: value}) of these spaces into `Coordinates`."""

    def __init__(self, spaces: Mapping[str, Space]):
        self.spaces = dict(spaces)
        self._numbers = {name: number for number, name in enumerate(self.spaces)}
        names = sorted({key for space in spaces.values() for key in space if key != RATE})
        having = {key: [name for name, space in spaces.items() if key in space] for key in names}
        self._shared, self._own, columns, blocks = {}, {}, 0, 0
        for key in names:
            width = max(_width(spaces[name][key]) for name in having[key])
            if len(having[key]) > 1 and len({_width(spaces[name][key]) for name in having[key]}) == 1:
                self._shared[key] = (columns, width)
                columns += width + 1
            for name in having[key]:
                self._own[name, key] = (blocks, _width(spaces[name][key]))
                blocks += _width(spaces[name][key])
        self._columns, self._blocks = columns, blocks

    def of(self, points: Sequence[tuple[str, Mapping[str, Any]]]) -> Coordinates:
        """Coordinates of N points; values are those of their recipe's distributions. No points: arrays of length 0."""
        found = Coordinates(
            np.array([self._numbers[name] for name, _ in points], dtype=int), np.full(len(points), 0.5),
            np.zeros((len(points), self._columns)), np.zeros((len(points), self._blocks)),
        )  # fmt: skip
        for row, (name, params) in enumerate(points):
            for key, distribution in self.spaces[name].items():
                place = placed(distribution, params[key])
                if key == RATE:
                    found.rate[row] = place[0]
                    continue
                at, width = self._own[name, key]
                found.own[row, at : at + width] = place
                if key in self._shared:
                    at, width = self._shared[key]
                    found.shared[row, at], found.shared[row, at + 1 : at + 1 + width] = PRESENT, np.subtract(place, 0.5)
        return found


def placed(distribution: BaseDistribution, value: Any) -> list[float]:
    """A value as coordinates: 0..1 of a range (of its logarithm where that is searched), rank of ordered choices, one column for each choice
    of others, which then lie at distance 1 of each other."""
    if isinstance(distribution, CategoricalDistribution):
        ranks = ordered(distribution)
        number = distribution.choices.index(value)
        if ranks is not None:
            return [ranks[number] / max(1, len(ranks) - 1)]
        return [math.sqrt(0.5) if one == number else 0.0 for one in range(len(distribution.choices))]
    if distribution.single():
        return [0.5]
    low, high, value = (math.log(x) if distribution.log else float(x) for x in (distribution.low, distribution.high, value))
    return [(value - low) / (high - low)]


def ordered(distribution: CategoricalDistribution) -> list[int] | None:
    """Rank of each choice where all are numbers (8, 16, 32: equal steps); None for choices without an order."""
    if not all(isinstance(choice, (int, float)) and not isinstance(choice, bool) for choice in distribution.choices):
        return None
    rising = sorted(distribution.choices)
    return [rising.index(choice) for choice in distribution.choices]


def _width(distribution: BaseDistribution) -> int:
    if isinstance(distribution, CategoricalDistribution) and ordered(distribution) is None:
        return len(distribution.choices)
    return 1


def drawn(space: Space, rng: np.random.Generator, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """A random point, but for the values in `fixed`."""
    return {key: fixed[key] if key in fixed else _at(distribution, float(rng.random())) for key, distribution in space.items()}


def near(space: Space, point: Mapping[str, Any], rng: np.random.Generator, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """A point near another: ranges by a normal step, ordered choices at most one rank away, others changed one time in five."""
    found = {}
    for key, distribution in space.items():
        step, chance = float(rng.normal(0.0, NEAR)), float(rng.random())
        if key in fixed:
            found[key] = fixed[key]
        elif not isinstance(distribution, CategoricalDistribution):
            found[key] = _at(distribution, min(max(placed(distribution, point[key])[0] + step, 0.0), 1.0))
        elif ordered(distribution) is not None:
            rising, move = sorted(distribution.choices), int(chance < 0.25) - int(chance > 0.75)
            found[key] = rising[min(max(rising.index(point[key]) + move, 0), len(rising) - 1)]
        else:
            found[key] = distribution.choices[int(chance * 5 * len(distribution.choices))] if chance < 0.2 else point[key]
    return found


def _at(distribution: BaseDistribution, u: float) -> Any:
    """The value at u, 0..1, of a distribution; steps are rounded to, whole numbers have equal shares of u."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(u * len(distribution.choices)), len(distribution.choices) - 1)]
    low, high = distribution.low, distribution.high
    if distribution.single():
        return low
    value = math.exp(math.log(low) + u * (math.log(high) - math.log(low))) if distribution.log else low + u * (high - low)
    if isinstance(distribution, IntDistribution):
        step = 1 if distribution.log else distribution.step
        return int(min(max(low + round((value - low) / step) * step, low), high))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is not None:
        value = low + round((value - low) / distribution.step) * distribution.step
    return float(min(max(value, low), high))
