"""Pages made from code are what the code says now; links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.config import reference
from strategies import cards

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_strategies_page_is_what_the_cards_say():
    assert (ROOT / "docs" / "strategies.md").read_text() == cards.markdown(), "run: python -m strategies.cards > docs/strategies.md"


def test_the_config_page_is_what_the_fields_say():
    assert (ROOT / "docs" / "config.md").read_text() == reference.markdown(), "run: python -m orchestrator.config.reference > docs/config.md"
    relied = "model.model_name_or_path task.data safety.limits.max_degradation safety.judge search.trials tracking.uri output.dir"
    for section, _, key in (name.rpartition(".") for name in relied.split()):
        assert f"| `{key}` |" in reference.markdown().split(f"\n## {section}\n")[1].split("\n## ")[0]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_page_names_a_path_of_somebodys_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:work|root|home)/", page.read_text()), page
