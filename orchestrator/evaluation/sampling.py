"""Sampled decoding: which token an answer goes on with where it is drawn instead of taken greedily.

A model that refuses greedily may comply in one answer of a few: decoding is an attack (Huang et al. 2023, "Catastrophic Jailbreak of Open-source
LLMs via Exploiting Generation", arXiv 2310.06987). Each row draws from a generator of its own, so an answer depends on neither batch nor worker.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one answer to each prompt is drawn."""

    temperature: float = 1.0
    """Logits are divided by it; above 0."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from (nucleus, Holtzman et al. 2020); above 0, at most 1."""
    number: int = 0
    """Which sample: another one draws other answers."""

    def seed(self, row: Sequence[int]) -> int:
        """Seed of a prompt's draws, from its tokens and the number of the sample; 63 bits."""
        digest = hashlib.sha256(f"{self.number} {list(row)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def draws(self, row: Sequence[int]) -> random.Random:
        """Numbers in [0, 1), one for each token of the answer."""
        return random.Random(self.seed(row))

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(rows,) tokens drawn by inversion: logits (rows, vocabulary), one number in [0, 1) a row. Rows with a NaN give some token."""
        import torch

        probability, order = torch.softmax(logits.float() / self.temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
        total = probability.cumsum(-1)
        kept = probability.masked_fill(total - probability >= self.top_p, 0.0)  # the likeliest token always stays
        total = kept.cumsum(-1)
        reached = torch.searchsorted(total, (uniform.to(total.dtype) * total[:, -1])[:, None], right=True)
        last = (kept > 0).sum(-1, keepdim=True).clamp(min=1) - 1  # rounding may point past what is kept
        return order.gather(-1, torch.minimum(reached, last))[:, 0]
