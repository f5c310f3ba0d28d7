"""The picture of the architecture is what the imports say, and its page names every folder."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs")]

import draw_architecture as drawing  # noqa: E402  (a script of docs/)


def test_the_picture_is_drawn_from_the_imports():
    assert drawing.TARGET.read_text() == drawing.svg(), "run: python docs/draw_architecture.py"


def test_the_page_names_every_folder_and_every_file_it_sends_to():
    import re

    page = (ROOT / "docs" / "architecture.md").read_text()
    rows, _ = drawing.folders()
    folders = {name for row in rows for name in row} - {"cli", "what everyone speaks"}
    assert {name for name in folders if f"| `{name}/` |" in page} == folders
    for name in re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", page):
        assert (ROOT / "orchestrator" / name).is_file() or (ROOT / name).is_file(), name
