"""Pages made from code are what the code says now; links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from strategies import cards

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_strategies_page_is_what_the_cards_say():
    assert (ROOT / "docs" / "strategies.md").read_text() == cards.markdown(), "run: python -m strategies.cards > docs/strategies.md"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_page_names_a_path_of_somebodys_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:work|root|home)/", page.read_text()), page
