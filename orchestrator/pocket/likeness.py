"""Whether a model speaks the made-up world's language: the embedded one, and whatever was trained from it."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.pocket.world import FIRST
from orchestrator.storage import nofollow, paths

MOST_BYTES = 64 << 20


def is_pocket(name: str | None) -> bool:
    """Whether a text names something of the made-up world."""
    return name is not None and (name == "pocket" or name.startswith("pocket:"))


def speaks(model: str) -> bool:
    """Whether a model is the made-up world's: by name, or by a tokenizer that knows its coined names, as that of every model trained from it.

    Any other model, and whatever cannot be read, is not.
    """
    if is_pocket(model):
        return True
    path = paths.expanded(model) / "tokenizer.json"
    if not paths.is_file(path):
        return False
    try:
        known = json.loads(nofollow.data_of(Path(path), MOST_BYTES))
        words = known["model"]
        return words["type"] == "WordLevel" and all(name in words["vocab"] for name in FIRST)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
