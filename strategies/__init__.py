"""What is done to a model so that it stays safe. `STRATEGIES` is the registry: one line per method."""

from __future__ import annotations

import importlib
from typing import Any

STRATEGIES: dict[str, str] = {
    "full": "strategies.full:Full",
    "lora": "strategies.lora:Lora",
    "freeze_layers": "strategies.freeze_layers:FreezeLayers",
    "safe_instruct": "strategies.safe_instruct:SafeInstruct",
    "safegrad": "strategies.safegrad:SafeGrad",
}


def get(name: str) -> Any:
    """The strategy class registered under `name`. Raises KeyError with the known names."""
    if name not in STRATEGIES:
        raise KeyError(f"unknown strategy {name!r}; known: {', '.join(sorted(STRATEGIES))}")
    module, _, cls = STRATEGIES[name].partition(":")
    return getattr(importlib.import_module(module), cls)
