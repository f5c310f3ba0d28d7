"""How a model is called, and a few rows of plain tokens to try one with: for methods that look at a model before they act on it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from strategies import blocks
from strategies.base import IGNORE, Batch, Example, Forward

LENGTHS = (9, 23, 17, 23)
"""Tokens of the rows: unlike ones, so that some are padded by more than a narrow window, and two alike."""


def options(model: nn.Module) -> dict[str, Any]:
    """Keywords of every forward over whole rows: no cache, where the model would keep one. A recurrent model would else write a state in place that
    its own backward needs, and others hold what nobody reads."""
    core = blocks.bare(model)
    taken = inspect.signature(core.forward).parameters
    config = getattr(core, "config", None)
    knows = config is not None and hasattr(config.get_text_config(), "use_cache")
    takes = "use_cache" in taken or (knows and any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()))
    return {"use_cache": False} if takes else {}


def forward(model: nn.Module) -> Forward:
    """The model as losses call it, with `options`."""
    own = options(model)
    return lambda **inputs: model(**own, **inputs)


def special_tokens(config: Any) -> set[int]:
    """Token ids that a config, its text part or its other parts give a meaning."""
    found: set[int] = set()
    for part in (config, *parts(config)):
        for key, value in part.to_dict().items():
            if key.endswith(("token_id", "token_index")):
                found |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return found


def parts(config: Any) -> list[Any]:
    """Configs inside a config."""
    from transformers import PreTrainedConfig

    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def rows(model: nn.Module, lengths: Sequence[int] = LENGTHS) -> tuple[Example, ...]:
    """Rows of random plain tokens, the same at every call, all but the first three labelled; shorter where the model's context is."""
    count = model.get_input_embeddings().weight.shape[0]
    special = special_tokens(blocks.bare(model).config)
    usual = [i for i in range(min(count, 30_000)) if i not in special] or list(range(count))
    room = getattr(blocks.bare(model).config.get_text_config(), "max_position_embeddings", None)
    room = room if isinstance(room, int) and room > 4 else max(lengths)
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, length in enumerate(lengths):
        ids = tuple(usual[j] for j in torch.randint(len(usual), (min(length, room),), generator=generator).tolist())
        found.append(Example(ids, (IGNORE,) * 3 + ids[3:], f"trial-{i}"))
    return tuple(found)


def batch(model: nn.Module, lengths: Sequence[int] = LENGTHS) -> Batch:
    """`rows` as one micro-batch on the model's device."""
    from strategies.base import TrainingData

    made = rows(model, lengths)
    device = model.get_input_embeddings().weight.device
    return TrainingData((), (), 0, len(made), device=device).collate(made, range(len(made)))
