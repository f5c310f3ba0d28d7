"""Rows as people have them: everything that changes what is learnt is used or refused by name, and what was changed is counted."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.config import Columns
from orchestrator.data import conversations, turns
from orchestrator.data import rows as data_rows
from orchestrator.errors import DataError

S, Q, A = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
EARLIER = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def messages(row, **options):
    return list(conversations.normalise([row], **options)[0].messages)


def counts(*rows, **options):
    report = conversations.read(list(rows), **options).report
    return {one.what: one.rows for one in report.changed}, report


@pytest.mark.parametrize("row, wanted", [
    # Alpaca with its further columns
    ({"instruction": "q", "input": "", "output": "a", "system": "s"}, [S, Q, A]),
    ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, [*EARLIER, Q, A]),
    ({"instruction": "q", "output": "a", "history": [["q0", "a0"]], "system": "s"}, [S, *EARLIER, Q, A]),
    ({"instruction": "q", "output": "a", "history": '[["q0", "a0"]]', "system": ""}, [*EARLIER, Q, A]),
    ({"instruction": "q", "output": "a", "history": [], "system": None, "tools": "[]", "images": []}, [Q, A]),
    ({"instruction": "q", "output": "a", "history": EARLIER}, [*EARLIER, Q, A]),
    ({"instruction": "q", "input": 7, "output": "a"}, [{"role": "user", "content": "q\n\n7"}, A]),
    ({"instruction": "q", "input": 0, "output": "a"}, [{"role": "user", "content": "q\n\n0"}, A]),
    ({"instruction": "q", "input": False, "output": "a"}, [{"role": "user", "content": "q\n\nfalse"}, A]),
    ({"instruction": "q", "input": float("nan"), "output": "a"}, [Q, A]),
    ({"instruction": "q", "context": "c", "response": "a"}, [{"role": "user", "content": "q\n\nc"}, A]),
    # prompt and response
    ({"prompt": "q", "response": "a", "system_prompt": "s"}, [S, Q, A]),
    ({"prompt": "q", "response": "a", "history": [["q0", "a0"]]}, [*EARLIER, Q, A]),
    ({"question": "q", "context": "c", "answer": "a"}, [{"role": "user", "content": "q\n\nc"}, A]),
    ({"input": "q", "output": "a"}, [Q, A]),
    ({"prompt": 1, "response": 2.5}, [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2.5"}]),
    ({"prompt": "q", "response": True}, [Q, {"role": "assistant", "content": "true"}]),
    # TRL
    ({"prompt": [Q], "completion": [A]}, [Q, A]),
    ({"prompt": [S, *EARLIER, Q], "completion": [A]}, [S, *EARLIER, Q, A]),
    ({"prompt": [Q], "completion": "a"}, [Q, A]),
    ({"prompt": json.dumps([Q]), "completion": json.dumps([A])}, [Q, A]),
    ({"prompt": "q", "completion": [Q, A]}, [Q, A]),
    ({"prompt": [S, Q], "completion": [Q, A]}, [S, Q, A]),
    ({"prompt": "q", "completion": A}, [Q, A]),
    # ShareGPT and OpenAI
    ({"conversations": SHAREGPT, "system": "s"}, [S, Q, A]),
    ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT], "system": "s "}, [S, Q, A]),
    ({"messages": [{"role": "developer", "content": "s"}, Q, A]}, [S, Q, A]),
    ({"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]}, [Q, A]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, [Q, A]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "input_text", "text": "r"}]}, A]},
     [{"role": "user", "content": "q\nr"}, A]),
    ({"messages": [Q, {**A, "tool_calls": None, "weight": 1, "name": "x", "audio": None, "function_call": {}}]}, [Q, A]),
    ({"messages": [*EARLIER, Q, {**A, "weight": 0}]}, EARLIER),
    ({"messages": [EARLIER[0], {**EARLIER[1], "weight": 0}, Q, A]}, [*EARLIER, Q, A]),
    ({"conversations": [SHAREGPT[0], {**SHAREGPT[1], "train": True}, SHAREGPT[0], {**SHAREGPT[1], "train": False}]}, [Q, A]),
    ({"messages": [Q, {"role": "assistant", "content": 4}]}, [Q, {"role": "assistant", "content": "4"}]),
])  # fmt: skip
def test_what_a_row_holds_is_used(row, wanted):
    assert messages(row) == wanted


@pytest.mark.parametrize("row, said", [
    ({"messages": [Q, {**A, "tool_calls": [{"id": 1}]}]}, "calls of tools .tool_calls."),
    ({"messages": [Q, {**A, "function_call": {"name": "f"}}]}, "a call of a function"),
    ({"messages": [Q, {**A, "reasoning_content": "hm"}]}, "chain of thought"),
    ({"messages": [Q, {**A, "thinking": "hm"}]}, "chain of thought"),
    ({"messages": [Q, {**A, "audio": {"id": "x"}}]}, "audio"),
    ({"messages": [Q, A], "tools": [{"name": "f"}]}, "definitions of tools .column 'tools'."),
    ({"messages": [Q, A], "chat_template_kwargs": {"enable_thinking": False}}, "settings of the chat template .column 'chat_template_kwargs'."),
    ({"prompt": "p", "response": float("inf")}, "inf, which is no number"),
    ({"conversations": SHAREGPT, "tools": '[{"name": "f"}]'}, "definitions of tools"),
    ({"prompt": "q", "response": "a", "images": ["x.png"]}, "images"),
    ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "{}"}, SHAREGPT[1]]}, "'function_call'"),
    ({"conversations": [SHAREGPT[0], {"from": "observation", "value": "1"}, SHAREGPT[1]]}, "'observation'"),
    ({"messages": [Q, {"role": "function", "name": "f", "content": "1"}, A]}, "role 'function'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A]}, "type 'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "input_audio"}]}, A]}, "type 'input_audio'"),
    ({"messages": [Q, {**A, "weight": 0.5}]}, "weight 0.5"),
    ({"messages": [Q, {**A, "weight": 0}]}, "all 1 rows are left out .every answer has the weight 0"),
    ({"messages": [Q, {"role": "assistant", "content": None}]}, "assistant's text is missing"),
    ({"messages": [S, Q, A], "system": "other"}, "system text in 'system' and another one"),
    ({"messages": [Q, A], "history": [["x", "y"]]}, "earlier turns in 'history' beside 'messages'"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, "list of .question, answer."),
    ({"instruction": "q", "output": "a", "history": "then"}, "column 'history' is text that is not JSON"),
    ({"prompt": "q", "response": float("nan")}, "assistant's text is nan"),
    ({"prompt": float("nan"), "response": "a"}, "user's text is nan"),
    ({"prompt": "q", "response": float("inf")}, "assistant's text is inf"),
    ({"prompt": "q", "response": []}, "assistant's text is empty"),
    ({"prompt": "q", "response": {"text": ["a"]}}, "an object, not text"),
    ({"prompt": "q", "response": ["a", "b"]}, "a list that holds a text"),
    ({"prompt": "q", "response": b"a"}, "a bytes, not text"),
    ({"prompt": "q", "response": "\n\t "}, "assistant's text is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, r"preferences .*task\.columns\.response=chosen"),
    ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, S]}, "preferences"),
    ({"prompt": [Q], "completion": [Q]}, "holds the prompt only"),
    ({"prompt": [Q], "completion": [{"role": "user", "content": "r"}, A]}, "begins with a message of the user"),
    ({"text": "once upon a time"}, "plain text .*no prompt and answer"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(row, said):
    with pytest.raises(DataError, match=said):
        conversations.normalise([row])


def test_rows_are_named_by_number_from_one():
    good = {"messages": [Q, A]}
    with pytest.raises(DataError, match=r"task\.data \(f\.jsonl\): row 3: a message of the assistant holds calls of tools"):
        conversations.normalise([good, good, {"messages": [Q, {**A, "tool_calls": [1]}]}], source="f.jsonl")
    with pytest.raises(DataError, match="row 2 holds definitions of tools"):
        conversations.normalise([good, {**good, "tools": [1]}])


def test_every_change_is_counted_with_its_first_row():
    rows = [
        {"instruction": "q", "input": "", "output": "a", "source": "x", "meta": {"n": 1}},
        {"instruction": "q", "input": 5, "output": 6, "system": "s"},
        {"instruction": "q", "input": "", "output": 7, "history": [["q0", "a0"]]},
    ]
    changed, report = counts(*rows)
    assert changed == {
        "a number is used as text": 2, "the column 'system' is the system message": 1, "the column 'history' holds the turns before the prompt": 1,
        "several answers; the last is learnt, the others are given as context": 1,
    }  # fmt: skip
    assert (report.rows, report.used, report.form, report.unused) == (3, 3, "instruction", ("source", "meta"))
    assert {one.what: one.first for one in report.changed}["a number is used as text"] == 2
    (sentence,) = report.facts()
    assert sentence.startswith("task.data: 3 rows read as instruction; 2 rows: a number is used as text (first: row 2)")
    assert sentence.endswith("not used: source, meta") and report.warnings() == []


def test_rows_whose_answers_weigh_nothing_are_left_out_and_said():
    rows = [{"messages": [Q, A]}, {"messages": [Q, {**A, "weight": 0}]}, {"messages": [Q, A]}]
    found = conversations.read(rows)
    assert [c.id for c in found.conversations] == ["0", "2"] and [c.row for c in found.conversations] == [1, 3] and found.rows == [rows[0], rows[2]]
    assert (found.report.rows, found.report.used) == (3, 2)
    assert found.report.warnings() == ["task.data: not used: 1 row: every answer has the weight 0, so there is nothing to learn (first: row 2)"]


def test_words_for_empty_cells_and_columns_of_other_trainers_are_doubted():
    _, report = counts({"prompt": "q", "response": "nan", "reasoning": "hm"}, {"prompt": "q", "response": "nothing", "reasoning": ""})
    assert report.warnings() == [
        "task.data: 1 row: the column 'reasoning' is not used, though other trainers would (first: row 1)",
        "task.data: 1 row: the answer is the word 'nan', as tables write an empty cell; it is used as it stands (first: row 1)",
    ]


def test_fields_of_messages_that_are_not_used_are_listed():
    _, report = counts({"messages": [{**Q, "name": "eve"}, {**A, "mood": "good"}], "prompt_id": 3})
    assert report.unused == ("prompt_id", "messages[].name", "messages[].mood")


def test_columns_may_be_named():
    row = {"instruction": "q", "output": "a", "persona": "s", "before": [["q0", "a0"]], "system": "no"}
    assert messages(row, columns=Columns(system="persona", history="before")) == [S, *EARLIER, Q, A]
    assert messages({"prompt": "q", "chosen": "a", "rejected": "b"}, columns=Columns(response="chosen")) == [Q, A]
    with pytest.raises(DataError, match="no column 'persona'"):
        messages({"instruction": "q", "output": "a"}, columns=Columns(system="persona"))


def test_harmful_answers_may_be_messages_too():
    rows = [
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, {"role": "assistant", "content": "b"}]},
        {"prompt": "q", "chosen": "a", "rejected": float("nan")},
    ]
    safe = conversations.normalise(rows, kind="safety")
    assert [list(c.messages) for c in safe] == [[Q, A]] * 2
    harmful = conversations.harmful_answers(rows, safe, Columns(), "safety.data")
    assert [(c.id, c.answer, c.kind) for c in harmful] == [("0", "b", "harmful")]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(lambda text: not turns.blank(text))
NUMBER = st.one_of(st.integers(-(10**30), 10**30), st.booleans(), st.decimals(allow_nan=False, allow_infinity=False, places=3))


@settings(max_examples=60, deadline=None, derandomize=True)
@example([("q", "[]", "a", "null")])
@given(st.lists(st.tuples(TEXT, st.one_of(st.just(""), TEXT, NUMBER), st.one_of(TEXT, NUMBER), st.one_of(st.just(""), TEXT)), min_size=1, max_size=5))
def test_nothing_of_a_json_row_is_lost(tmp_path_factory, rows):
    """Numbers stand in the conversation as the file writes them; every text does."""

    def written(value):
        return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)

    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            cells = zip(("instruction", "input", "output", "system"), row, strict=True)
            file.write("{" + ", ".join(f'"{name}": {json.dumps(v) if isinstance(v, str) else written(v)}' for name, v in cells) + "}\n")
    for row, found in zip(rows, conversations.normalise(data_rows.load_rows(str(path))), strict=True):
        instruction, more, output, system = map(written, row)
        asked = f"{instruction.rstrip()}\n\n{more}" if not turns.blank(more) else instruction
        wanted = [asked, output]
        if not turns.blank(system):
            wanted.insert(0, system)
        assert [m["content"] for m in found.messages] == wanted


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_nothing_of_a_csv_row_is_lost(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "response"), *rows])
    assert [(c.messages[0]["content"], c.answer) for c in conversations.normalise(data_rows.load_rows(str(path)))] == rows
