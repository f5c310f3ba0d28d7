"""Every method on unlike families of models, through the checks and whole trials; what was saved answers the same in a fresh process; and the
page of families says what was found."""

from __future__ import annotations

from pathlib import Path

import cells
import chosen
import matrix
import pytest
import tiny
from test_generation import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = tuple(family for family in (*chosen.CELLS, *tiny.SHELLS) if family not in REFUSED)
SAVED: dict[str, list[Path]] = {}


@pytest.fixture(scope="module")
def where(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cells")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_does_what_it_claims_or_is_refused_and_the_page_says_so(family, where):
    asked, found, SAVED[family] = matrix.of_family(where, family)
    assert len(found) == len(cells.RECIPES)
    line = matrix.row(family, asked, found)
    written = next((one for one in PAGE.read_text().splitlines() if one.startswith(f"| {family} |")), "(no line)")
    assert line == written, "docs/models.md is old: write it anew with tests/families/matrix.py"


def test_saved_models_answer_the_same_in_a_fresh_process(where):
    """One process for all: it starts slowly."""
    folders = [folder for saved in SAVED.values() for folder in saved]
    if not folders:
        pytest.fail("the test before saved nothing")
    different = {Path(folder).parts[-2:]: by for folder, by in cells.reload(folders).items() if not by < cells.SAME}
    assert not different


@pytest.mark.parametrize("name", tiny.NO_DECODERS)
def test_what_is_no_causal_language_model_is_refused_as_the_page_says(name, tmp_path):
    sentence = matrix.refusal(tiny.saved_no_decoder(tmp_path / "model", name))
    assert sentence is not None and f"| {name} | {sentence} |" in PAGE.read_text()
