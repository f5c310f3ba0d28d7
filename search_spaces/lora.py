"""LoRA: the rank, in powers of two. The scale lora_alpha is left at its default, since it multiplies the learning rate."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

LEARNING_RATE_FACTOR = 5.0
"""Adapters want about 5 times the rate of full fine-tuning (measured on the pocket model: full .002, LoRA .01; the usual pair on 7B
models is 2e-5 and 1e-4 to 2e-4). `search.space` replaces the range where that does not fit."""


def space(num_layers: int) -> dict[str, BaseDistribution]:
    return {"lora_r": CategoricalDistribution((2, 4, 8, 16, 32))}


def defaults(num_layers: int) -> dict[str, Any]:
    return {"lora_r": 8}
