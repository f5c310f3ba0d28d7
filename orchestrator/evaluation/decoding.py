"""Rows of tokens in a model, one token more at a time: with a key-value cache or without, padded on the left or not.

Which way is right depends on the model (`capability` finds out): state-space models keep their past elsewhere, recurrent ones see padding,
windows count it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Mode:
    """One way to compute the next token of several rows."""

    cache: bool
    """Keys and values of earlier tokens are kept; else every token computes the whole row again."""
    prefix: bool
    """A beginning that all rows share is computed once. Needs the cache."""
    padding: bool
    """Rows of unlike lengths in one batch, padded on the left; else only rows of one length go together."""
    leaving: bool = True
    """Rows that have ended can be taken out of the batch; not every cache of transformers can give up rows."""

    @property
    def name(self) -> str:
        """For records and tables."""
        if self.cache:
            return "cache, shared prefix" if self.prefix else "cache"
        return "no cache" if self.padding else "no cache, no padding"


MODES = (
    Mode(True, True, True), Mode(True, False, True), Mode(True, False, True, leaving=False), Mode(False, False, True), Mode(False, False, False),
)  # fmt: skip
"""Fastest first."""


def inner(model: nn.Module) -> nn.Module:
    """The model of transformers inside adapters of peft."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back."""
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class Calls:
    """Forward passes of a model, given only what its forward takes by name: the first GPT has no cache, BLOOM takes no positions."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.takes = frozenset(inspect.signature(inner(model).forward).parameters)
        self.text_config = model.config.get_text_config()
        self.cache_name = "cache_params" if "cache_params" in self.takes else "past_key_values"  # state-space models call it so
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}

    def __call__(self, ids: torch.Tensor, *, mask=None, positions=None, cache=None, last: bool = True) -> torch.Tensor:
        """Logits of (rows, tokens) ids: (rows, 1 or tokens, vocabulary); without `last` those of every token."""
        own = {"attention_mask": mask, "position_ids": positions, self.cache_name: cache, "use_cache": cache is not None}
        given = {name: value for name, value in own.items() if name in self.takes and (value is not None or name == "attention_mask")}
        return self.model(input_ids=ids, **given, **(self.last_only if last else {})).logits

    def new_cache(self) -> Any:
        """An empty cache of the kind that transformers itself makes for this model."""
        from transformers import DynamicCache

        return DynamicCache(config=self.text_config)


class Rows:
    """A batch of rows of token ids on its way through a model.

    `logits()` is of the token after each row, (rows, vocabulary); `append` puts a token to each row; `keep` drops rows.
    """

    def __init__(self, calls: Calls, mode: Mode, rows: Sequence[Sequence[int]], pad: int, prefix: Sequence[int] = ()):
        """prefix: tokens that every row begins with and `rows` leave out; only with `mode.prefix`."""
        import torch

        self.calls, self.mode, self.pad = calls, mode, pad
        self.device = next(calls.model.parameters()).device
        self.prefix = list(prefix)
        self.lengths = [len(row) for row in rows]
        longest = max(self.lengths)
        padded = [[pad] * (longest - len(row)) + list(row) for row in rows]
        self.ids = torch.tensor(padded, device=self.device)
        self.mask = torch.tensor([[0] * (longest - length) + [1] * length for length in self.lengths], device=self.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0) + len(self.prefix)
        self.padded = min(self.lengths) < longest
        self.cache = self._begun(len(rows)) if mode.cache else None
        if self.prefix:
            self.mask = torch.cat([self.mask.new_ones(len(rows), len(self.prefix)), self.mask], dim=1)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def last_positions(self) -> torch.Tensor:
        """(rows,): position of each row's last token."""
        return self.positions[:, -1]

    def logits(self) -> torch.Tensor:
        mask = self.mask if self.padded else None
        if self.mode.padding:
            return self.calls(self.ids, mask=mask, positions=self.positions, cache=self.cache)[:, -1]
        import torch

        found: list[Any] = [None] * len(self)
        for length in sorted(set(self.lengths)):
            members = [i for i, own in enumerate(self.lengths) if own == length]
            for i, row in zip(members, self.calls(self.ids[members][:, -length:])[:, -1], strict=True):
                found[i] = row
        return torch.stack(found)

    def append(self, tokens: torch.Tensor) -> None:
        """tokens: (rows,)."""
        import torch

        self.lengths = [length + 1 for length in self.lengths]
        last = self.positions[:, -1:] + 1
        if self.cache is not None:
            self.ids, self.positions = tokens[:, None], last
        else:
            self.ids, self.positions = torch.cat([self.ids, tokens[:, None]], 1), torch.cat([self.positions, last], 1)
        if self.padded or self.cache is None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self), 1)], dim=1)

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows (indices) stay, in this order."""
        if self.cache is not None:
            self.cache.batch_select_indices(rows)
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
        self.lengths = [self.lengths[i] for i in rows.tolist()]

    def _begun(self, count: int) -> Any:
        """The cache, with the prefix in it for every row."""
        import torch

        cache = self.calls.new_cache()
        if self.prefix:
            self.calls(torch.tensor([self.prefix], device=self.device), cache=cache)
            cache.batch_repeat_interleave(count)
        return cache


def windowed(config: Any) -> bool:
    """Whether the text config names windows or chunks of attention: they would count the padding between a shared prefix and the rest."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or any(getattr(config, name, None) for name in window_keys(config))


def window_keys(config: Any) -> list[str]:
    """Names of the text config's settings that are the width of a window or chunk of attention, or how many tokens sparse attention looks at."""
    held = config.to_dict()
    words = ("window", "chunk", "local_attention", "index_topk")
    return [k for k, v in held.items() if any(w in k for w in words) and isinstance(v, int) and not isinstance(v, bool) and v > 0]
