"""Copies of a model for trials: the untouched one is loaded once per lane and never written to."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.models.loading import load

if TYPE_CHECKING:
    from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Copies of all weights and buffers by name, tied ones once."""
    seen: dict[int, str] = {}
    state = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            state[name] = tensor.detach().clone()
    return state


def restore(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Write a snapshot back, bit for bit, into the model it was taken of (or one of the same form). Raises KeyError for other forms."""
    import torch

    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    missing = set(state) - set(tensors)
    if missing:
        raise KeyError(f"the model lacks {len(missing)} tensors of the snapshot, e.g. {sorted(missing)[0]}")
    with torch.no_grad():
        for name, tensor in state.items():
            tensors[name].copy_(tensor)
    return model


def base(cache: dict[Any, Any], model: config.Model, device: str = "cpu") -> tuple[nn.Module, Any]:
    """(fresh untouched model, tokenizer): loaded once per lane, copied in memory for every trial.

    The copy is bit-identical each time, shares no storage with the cached one, keeps tied weights tied, needs gradients everywhere and
    is in evaluation mode. One untouched copy is kept, on the CPU, under `("base model", ...)` in `cache`.
    """
    network, tokenizer = _kept(cache, model)
    return copy.deepcopy(network).to(device), copy.deepcopy(tokenizer)


def kept(cache: dict[Any, Any], model: config.Model) -> nn.Module:
    """The untouched copy `base` makes its copies of; only for reading."""
    return _kept(cache, model)[0]


def _kept(cache: dict[Any, Any], model: config.Model) -> tuple[nn.Module, Any]:
    key = ("base model", json.dumps(model.model_dump(mode="json"), sort_keys=True))
    if key not in cache:
        for stale in [k for k in cache if isinstance(k, tuple) and k and k[0] == "base model"]:
            del cache[stale]
        cache[key] = load(model)
    return cache[key]
