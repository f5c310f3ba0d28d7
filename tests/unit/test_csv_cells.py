"""Tables are shown by a spreadsheet and never run by it; numbers stay numbers; what was written is read back as it was."""

from __future__ import annotations

import csv
import io
import json

import made_up
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.decision import limits
from orchestrator.records import TrialResult
from orchestrator.report import safety
from orchestrator.report import table as report_table
from orchestrator.storage import cells

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "=cmd|'/c calc'!A1", "\t=1", "\r=1", "\n=1", " =1", "-x", "-", "--5", "-inf", "+nan", "\uff1d1", "'=1", "''@x", "-1_000"]  # fmt: skip  # noqa: E501
HARMLESS = ["", "a", "a=1", "1", "-1", "+1e-5", "-.5", "-0.25", "'", "'quoted'", "''", "a\nb", "a,b", 'a"b', "1e5"]
TEXTS = st.one_of(st.sampled_from(FORMULAS + HARMLESS), st.text(max_size=12), st.text(alphabet="'=+-@\t\r\n 1", max_size=6))
FEW = settings(derandomize=True, deadline=None, max_examples=200, database=None)


def plain(text: str) -> list[list[str]]:
    """Cells as a spreadsheet reads them, headings first."""
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_a_text(text):
    (heads, row) = plain(cells.to_csv([{"a": text, "n": -0.5}], ["a", "n"]))
    assert heads == ["a", "n", "raw"] and row[0] == f"'{text}" and row[1] == "-0.5"
    assert json.loads(row[2]) == {"a": text}


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_are_left_alone(text):
    assert plain(cells.to_csv([{"a": text, "n": -3}], ["a", "n"])) == [["a", "n"], [text, "-3"]]


@FEW
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
def test_what_is_written_is_read_back(rows):
    table = [{"x": a, "params.=y": b} for a, b in rows]
    written = cells.to_csv(table, ["x", "params.=y"])
    assert cells.from_csv(written) == table
    for line in plain(written):
        for cell in line:
            assert not cell.lstrip().startswith(("=", "+", "-", "@", "\t", "\r")) or _is_number(cell), cell


def _is_number(text: str) -> bool:
    return set(text) <= set("0123456789+-.eE") and float(text) == float(text)


def test_headings_too():
    assert plain(cells.to_csv([], ["=a", "b"])) == [["'=a", "b"]]
    assert plain(cells.to_csv([{"=a": 1}], ["=a", "b"])) == [["'=a", "b"], ["1", ""]]
    with pytest.raises(ValueError, match="no column 'c'"):
        cells.to_csv([{"c": 1}], ["=a"])


def test_the_table_of_trials_runs_nothing(tmp_path):
    result = made_up.result("t0000", "lora", {"lora.target": "=HYPERLINK(1)", "lora.lora_r": -4, "x": ["=1"], "rate": -2.5e-05})
    path = report_table.write_trials_csv(tmp_path / "trials.csv", [report_table.trial_row(result, None)])
    (row,) = csv.DictReader(path.open(newline=""))
    assert row["params.lora.target"] == "'=HYPERLINK(1)" and row["params.lora.lora_r"] == "-4" and row["params.rate"] == "-2.5e-05"
    assert row["params.x"] == '["=1"]' and json.loads(row["raw"]) == {"params.lora.target": "=HYPERLINK(1)"}
    (back,) = cells.from_csv(path.read_bytes().decode())
    assert back["params.lora.target"] == "=HYPERLINK(1)" and back["trial_id"] == "t0000"


def test_tables_of_prompts_run_nothing(tmp_path):
    def named(result: TrialResult) -> TrialResult:
        raw = result.to_dict()
        for suite in raw["suites"].values():
            suite["ids"] = [f"={i}" for i in suite["ids"]]
            suite["groups"] = [f"@{group}" for group in suite["groups"]]
        return TrialResult.from_dict(raw)

    experiment = made_up.experiment(tmp_path)
    before, after = named(made_up.baseline()), named(made_up.trials(experiment.safety.limits)[1][0][0])
    counts, flips, groups = safety.write_csv(tmp_path, before, after)
    assert plain(counts.read_text())[0][-1] == "n", "nothing was changed there"
    for path, column, sign in ((flips, "id", "="), (groups, "group", "@")):
        raw = list(csv.DictReader(path.open(newline="")))
        assert raw and all(row[column].startswith(f"'{sign}") for row in raw)
        assert all(row[column].startswith(sign) for row in cells.from_csv(path.read_bytes().decode()))
    assert limits.judge(after, before, experiment.safety.limits).degradation is not None
