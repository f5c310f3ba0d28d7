"""Damaged and odd files, odd names: everything ends in a sentence that names file and line, or is read whole."""

from __future__ import annotations

import json
import os
import sys
import threading
import types

import pytest

from orchestrator.data import conversations, hub_rows
from orchestrator.data import rows as data_rows
from orchestrator.errors import DataError
from orchestrator.storage import hub

ROW = '{"prompt": "q", "response": "a"}'


def refused(path, said, **options):
    with pytest.raises(DataError, match=said) as caught:
        data_rows.load_rows(str(path), **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize("line, said", [
    (r'{"prompt": "cut \ud83d", "response": "a"}', r"r\.jsonl line 2 holds half a character \(\\ud83d alone.*in column 'prompt'"),
    (r'{"messages": [{"role": "user", "content": "\uDE00"}]}', r"line 2 holds half a character \(\\ude00 alone.*in column 'messages'"),
    (r'{"a\udc00": 1}', "line 2 holds half a character"),
    ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "line 2 holds lists or objects inside each other too deeply"),
    ('{"a": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001, "line 2 holds lists or objects inside each other too deeply"),
    ('{"a": ' + "7" * 5000 + "}", "line 2 holds a number of 5,000 digits.*write it as text"),
    ('{"a": -' + "7" * 5000 + "}", "line 2 holds a number of 5,001 digits"),
    ('{"prompt": "q", "prompt": "r", "response": "a"}', "line 2 holds 'prompt' twice"),
    ('{"prompt": "q", "respo', "line 2 is not JSON.*was it cut"),
    ("\x00\x00\x00", "line 2 is not JSON"),
])  # fmt: skip
def test_lines_that_readers_disagree_on_are_refused_by_number(tmp_path, line, said):
    (tmp_path / "r.jsonl").write_text(f"{ROW}\n{line}")
    refused(tmp_path / "r.jsonl", rf"^safety\.data: .*{said}", field="safety.data")
    (tmp_path / "r.json").write_text(f"[{ROW}, {line}]")
    refused(tmp_path / "r.json", r"r\.json ")


def test_whole_emoji_huge_texts_and_numbers_as_written_are_read(tmp_path):
    path = tmp_path / "r.jsonl"
    long = json.dumps({"prompt": "x" * 3_000_000, "response": 10**3999})
    path.write_text(r'{"prompt": "\ud83d\ude00 \\ud83d", "response": 3.10, "n": 1e400}' + "\n" + long)
    first, second = conversations.normalise(data_rows.load_rows(str(path)))
    assert first.messages[0]["content"] == "\U0001f600 \\ud83d" and first.answer == "3.10"
    assert len(second.messages[0]["content"]) == 3_000_000 and second.answer == "1" + "0" * 3999
    assert "more than 1,000,000 characters" in conversations.read(data_rows.load_rows(str(path))).report.warnings()[0]


@pytest.mark.parametrize("text, said", [
    ('prompt,response\nq,a\nq,"a\nq,a\nq,a\n', "line 3 cannot be read: a quotation mark opened there is never closed"),
    ('prompt,response\nq,a\n"q"x,a\n', "line 3 cannot be read"),
    ("prompt,response,prompt\nq,a,r\n", "names the column 'prompt' 2 times"),
    ('prompt,response\n"q\n\nq",a\nq\n', "line 5 has 1 cells, the header has 2"),
    ("prompt,response\n", "holds no rows"),
    ("\n\n", "holds no rows"),
])  # fmt: skip
def test_tables_that_would_lose_cells_are_refused_by_line(tmp_path, text, said):
    (tmp_path / "r.csv").write_text(text)
    refused(tmp_path / "r.csv", said)


def test_tables_with_huge_cells_empty_lines_and_unnamed_columns_are_read(tmp_path):
    (tmp_path / "r.csv").write_text("\n,prompt,response\n0,q," + "a" * 300_000 + '\n\n1,"q\n\nq","a ""b"""\n')
    rows = data_rows.load_rows(str(tmp_path / "r.csv"))
    assert [list(row) for row in rows] == [["column 1", "prompt", "response"]] * 2
    assert len(rows[0]["response"]) == 300_000 and rows[1]["prompt"] == "q\n\nq" and rows[1]["response"] == 'a "b"'


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    refused(tmp_path / "rows.jsonl", "is a pipe")
    refused("/dev/null", "is a device")
    (tmp_path / "u.csv").write_bytes("prompt,response\nq,a\n".encode("utf-16"))
    refused(tmp_path / "u.csv", "not UTF-8 text.*looks like UTF-16")
    for name in ("x" * 5000, "a\0b", "~nobody-of-this-name/x", "a b/c", "my%20data/rows", "a:\n- b", "\ud83d", "owner/na me", "a//b", "c--d"):
        refused(name, "does not exist")


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    path.write_text(ROW)
    stat = os.fstat

    def grown(number):
        found = stat(number)
        path.write_text(path.read_text() + "\n" + ROW)
        return found

    monkeypatch.setattr(os, "fstat", grown)
    refused(path, "was written to while it was read")


def test_files_of_nearly_the_name_are_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train rows.jsonl", "gsm8k_train.jsonl"):
        (tmp_path / name).write_text(ROW)
    refused("train%20rows.jsonl", "'train rows.jsonl' does: write it without %")
    refused("gsm8k_trian.jsonl", r"does not exist \(nearest there: gsm8k_train\.jsonl\)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("gsm8k_trian", r"no file here \(nearest: gsm8k_train\.jsonl\).*HF_HUB_OFFLINE forbids asking the hub")


def test_a_hub_that_does_not_answer_is_asked_once_and_its_library_not_at_all(monkeypatch):
    """The library is told to keep to what it holds; without that it repeats every request for minutes."""
    from huggingface_hub import constants

    seen = []

    def load_dataset(name, configuration, *, split):
        seen.append((constants.HF_HUB_OFFLINE, threading.current_thread() is threading.main_thread()))
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=types.SimpleNamespace(HF_HUB_OFFLINE=False)))
    monkeypatch.setattr(hub, "away", lambda: "the hub cannot be reached (no network)")
    before = constants.HF_HUB_OFFLINE
    refused("owner/tpyo", "the hub cannot be reached .no network., and what this machine has kept of the hub does not hold it")
    assert seen == [(True, True)] and constants.HF_HUB_OFFLINE is before
    monkeypatch.setattr(hub, "away", lambda: None)
    refused("owner/tpyo", "could not be loaded: ConnectionError: offline")
    assert seen[1] == (before, True)


def test_names_that_no_data_set_can_have_are_told_from_names():
    assert all(map(hub_rows.is_name, ("gsm8k", "openai/gsm8k", "openai/gsm8k:main", "o/n::folder")))
    assert not any(map(hub_rows.is_name, ("a b", "a/b/c", "", "a%20b", "x" * 97, "a:b\nc")))
