"""The user's cache folder: what can be made again lies here."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """`$SAFEBASIN_CACHE`, else `$XDG_CACHE_HOME/safebasin`, else `~/.cache/safebasin`. Not made here."""
    explicit = os.environ.get("SAFEBASIN_CACHE")
    if explicit:
        return Path(os.path.expanduser(explicit))
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(os.path.expanduser(base or "~/.cache")) / "safebasin"
