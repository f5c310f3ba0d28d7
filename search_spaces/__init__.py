"""What may be tuned, over which range. One file per strategy, same name; `optuna.distributions` and nothing else of Optuna.

Each file has `space(num_layers)` (the strategy's own parameters), `defaults(num_layers)` (a point inside it, the paper's where there
is one) and may have LEARNING_RATE_FACTOR. Every parameter is a knob of the strategy. Names are flat: "learning_rate", "safegrad.rho".
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from search_spaces import common


def space(strategies: Sequence[str], *, num_layers: int, learning_rate: float) -> dict[str, BaseDistribution]:
    """Distributions of a recipe's parameters: the learning rate first, then each strategy's own.

    `num_layers` is the model's number of decoder layers, `learning_rate` the configured one (`training.learning_rate`); where a
    strategy works on another scale (lora), the range is centred on that. Raises ValueError for a strategy without a space.
    """
    found: dict[str, BaseDistribution] = {"learning_rate": common.learning_rate(centre(strategies, learning_rate))}
    for name in strategies:
        found |= {f"{name}.{key}": value for key, value in _module(name).space(num_layers).items()}
    return found


def defaults(strategies: Sequence[str], *, num_layers: int, learning_rate: float) -> dict[str, Any]:
    """A point inside `space` with the same names, tried first: the papers' settings at the configured learning rate."""
    found: dict[str, Any] = {"learning_rate": centre(strategies, learning_rate)}
    for name in strategies:
        found |= {f"{name}.{key}": value for key, value in _module(name).defaults(num_layers).items()}
    return found


def superseded(strategies: Sequence[str], pinned: Collection[str]) -> set[str]:
    """Parameters that have no effect once those in `pinned` ("freeze_layers.end") are given."""
    found = set()
    for name in strategies:
        for knob, others in getattr(_module(name), "SUPERSEDED", {}).items():
            if f"{name}.{knob}" in pinned:
                found |= {f"{name}.{other}" for other in others}
    return found


def centre(strategies: Sequence[str], learning_rate: float) -> float:
    """The learning rate a recipe is searched around: the configured one times what its strategies ask for (lora: 5)."""
    for name in strategies:
        learning_rate *= getattr(_module(name), "LEARNING_RATE_FACTOR", 1.0)
    return learning_rate


def to_spec(strategies: Sequence[str], params: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Sampled parameters as ({strategy: {knob: value}}, overrides of `training`). Every strategy has an entry.

    Raises ValueError for a parameter that belongs to none of the strategies.
    """
    sampled: dict[str, dict[str, Any]] = {name: {} for name in strategies}
    training: dict[str, Any] = {}
    for key, value in params.items():
        owner, dot, name = key.partition(".")
        if not dot:
            training[key] = value
        elif owner in sampled:
            sampled[owner][name] = value
        else:
            raise ValueError(f"parameter {key!r} belongs to none of the recipe's strategies {', '.join(strategies)}")
    return sampled, training


def _module(name: str) -> Any:
    if importlib.util.find_spec(f"search_spaces.{name}") is None:
        raise ValueError(f"no search space for strategy {name!r}; add search_spaces/{name}.py")
    return importlib.import_module(f"search_spaces.{name}")
