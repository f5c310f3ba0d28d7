"""Makes `tiny` and `chosen` importable, and keeps torch to one thread."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
