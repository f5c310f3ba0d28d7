"""Real conversations are rendered where a chat template can do no harm before it renders them here.

A template may loop for hours on a word that only the data holds. Whatever is not plainly bounded (`template_limits.shape`) is rendered first
in a small process, all conversations of a source at once, each with little time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchestrator.data import template_limits
from orchestrator.errors import ModelError

EACH_S = 0.005
"""Computing time that a conversation adds to that of a process."""
BATCH_CHARACTERS, BATCH_ROWS = 8_000_000, 20_000
"""What one process is given at most; a longer conversation goes alone."""
KEPT = 2_000_000
"""Most conversations that are remembered as tried."""
_tried: set[bytes] = set()

Case = tuple[Sequence[dict[str, str]], bool]
"""(messages, whether the assistant's header is asked for)."""


def tried(tokenizer: Any, cases: Sequence[Case], place: Callable[[int], str] = lambda i: "") -> None:
    """Every case can be rendered with little time and memory. What the template itself refuses is left to whoever renders it.

    place: where a case comes from, in words. Raises ModelError naming it, for the one at which the template computes too long, or takes too
    much memory or room.
    """
    template = tokenizer.chat_template
    text = template.get("default") if isinstance(template, dict) else template
    if not isinstance(text, str) or template_limits.shape(text).bounded:
        return
    tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    base = hashlib.blake2b(json.dumps([text, tokens]).encode(), digest_size=12)
    left: dict[bytes, int] = {}
    for i, (messages, generation) in enumerate(cases):
        own = base.copy()
        own.update(json.dumps([list(messages), generation]).encode())
        if own.digest() not in _tried:
            left.setdefault(own.digest(), i)
    for batch in _batches(list(left.values()), cases):
        _one_process(text, tokens, cases, batch, place)
    if len(_tried) + len(left) > KEPT:
        _tried.clear()
    _tried.update(left)


def _batches(numbers: Sequence[int], cases: Sequence[Case]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for i in numbers:
        own = sum(len(message["content"]) for message in cases[i][0])
        if batch and (size + own > BATCH_CHARACTERS or len(batch) >= BATCH_ROWS):
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += own
    if batch:
        yield batch


def _one_process(text: str, tokens: dict[str, str], cases: Sequence[Case], batch: Sequence[int], place: Callable[[int], str]) -> None:
    asked = [{"messages": list(cases[i][0]), "generation": cases[i][1]} for i in batch]
    seconds = template_limits.SECONDS + EACH_S * len(batch)
    found = template_limits.render(text, tokens, asked, seconds=seconds, quiet=True)
    fault = next((k for k, line in enumerate(found) if line.get("kind") in ("memory", "size")), None)
    if fault is not None:
        what = f"takes more than {template_limits.MEMORY >> 20} MiB" if found[fault]["kind"] == "memory" else f"writes {found[fault]['error']}"
    elif len(found) < len(batch):
        fault, what = len(found), f"computes for more than {template_limits.SECONDS} s"
    else:
        return
    where = place(batch[fault])
    raise ModelError(
        f"{where + ': ' if where else ''}the chat template {what} on this conversation, though not on others; correct model.chat_template, or "
        "take the conversation out"
    )
