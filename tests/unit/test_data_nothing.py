"""Texts that show nothing, control characters, and columns that would be left out of what is learnt."""

from __future__ import annotations

import pytest

from orchestrator import config
from orchestrator.data import conversations, rows
from orchestrator.errors import DataError

INVISIBLE = ["", " ", "\u200b", "\ufeff", "\u2060", "\u3164", "\u00ad\u200d", "\ufe0f", "\U000e0041"]


def _read(row, columns=None, kind="task"):
    return conversations.read([{"prompt": "q", "response": "a"}, row], "auto", columns or config.Columns(), "rows", field=f"{kind}.data")


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
@pytest.mark.parametrize("column", ["prompt", "response"])
def test_a_text_that_shows_nothing_is_empty(text, column):
    with pytest.raises(DataError, match="row 2: the (user|assistant)'s text is empty"):
        _read({"prompt": "q", "response": "a", column: text})
    assert _read({"prompt": "q", "response": f"{text}x"}).conversations[1].answer.endswith("x")


def test_null_nul_and_control_characters():
    with pytest.raises(DataError, match="the user's text is missing .null."):
        _read({"prompt": None, "response": "a"})
    with pytest.raises(DataError, match="row 2: the assistant's text holds a NUL character"):
        _read({"prompt": "q", "response": "a\0"})
    assert "control characters" in " ".join(_read({"prompt": "q", "response": "\x1b[31mred"}).report.warnings())
    assert "control characters" not in " ".join(_read({"prompt": "q", "response": "a\tb\r\nc"}).report.warnings())


@pytest.mark.parametrize("word", ["NA", "None", "N/A", "NaT", "nan", "null"])
def test_words_of_empty_cells_are_told(word):
    assert repr(word) in " ".join(_read({"prompt": "q", "response": word}).report.warnings())


@pytest.mark.parametrize(("column", "key"), [("system_message", "system"), ("Sys", "system"), ("developer", "system"), ("chat_history", "history"),
                                             ("conversation_history", "history")])  # fmt: skip
def test_a_column_that_says_what_it_is_wants_its_key(column, key):
    value = [["x", "y"]] if key == "history" else "be kind"
    with pytest.raises(DataError, match=f"row 2 holds a text in the column {column!r}.*task.columns.{key}={column}"):
        _read({"prompt": "q", "response": "a", column: value})
    assert len(_read({"prompt": "q", "response": "a", column: value}, config.Columns(**{key: column})).conversations[1].messages) > 2
    _read({"prompt": "q", "response": "a", column: None})


def test_rows_are_not_weighted():
    with pytest.raises(DataError, match="row 2 has the weight 0.5, and rows are not weighted here"):
        _read({"prompt": "q", "response": "a", "weight": 0.5})
    _read({"prompt": "q", "response": "a", "weight": 1})


def test_utf_32_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "a", "response": "b"}'.encode("utf-32"))
    with pytest.raises(DataError, match="looks like UTF-32"):
        rows.load_rows(str(tmp_path / "a.jsonl"))
