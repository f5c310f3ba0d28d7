"""Rows of every form become conversations; what cannot is refused with field, finding and remedy."""

from __future__ import annotations

import json
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import Columns
from orchestrator.data import conversations as data
from orchestrator.data import rows as data_rows
from orchestrator.errors import DataError

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", '{"prompt": "q", "response": "a"}\n\n{"prompt": "q", "response": "a"}\n'),
        ("r.json", '[{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a"}]'),
        ("r.json", '{"data": [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a"}]}'),
        ("r.csv", "\ufeffprompt,response\nq,a\nq,a\n"),
        ("r.tsv", "prompt\tresponse\nq\ta\nq\ta\n"),
    ],
)
def test_every_file_form_reads_to_the_same_rows(tmp_path, name, text):
    assert data_rows.load_rows(write(tmp_path / name, text)) == [{"prompt": "q", "response": "a"}] * 2


def test_text_files_give_a_prompt_a_line_and_limit_takes_the_first(tmp_path):
    source = write(tmp_path / "p.txt", "one\n\n two \nthree\n")
    assert data_rows.load_rows(source, limit=2) == [{"text": "one"}, {"text": "two"}]


def test_quotation_marks_in_tsv_swallow_no_lines(tmp_path):
    source = write(tmp_path / "t.tsv", 'prompt\tresponse\n"open\t1\nnext"\t0\n')
    assert [row["prompt"] for row in data_rows.load_rows(source)] == ['"open', 'next"']


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("r.jsonl", "[1]\n", "line 1 is a JSON list"),
        ("r.json", '{"a": 1}\n{"a": 2}\n', "name it .jsonl"),
        ("r.json", '{"a": 1}', "list of objects"),
        ("r.csv", "a,b\n1\n", "line 2 has 1 cells, the header has 2"),
        ("r.csv", "a,b\n", "holds no rows"),
        ("r.jsonl", "", "holds no rows"),
        ("r.xml", "<a/>", "by its ending"),
    ],
)
def test_unreadable_files_are_refused_with_the_place(tmp_path, name, text, said):
    with pytest.raises(DataError, match=said) as caught:
        data_rows.load_rows(write(tmp_path / name, text), field="safety.data")
    assert str(caught.value).startswith("safety.data: ")


def test_other_encodings_folders_and_missing_files_are_refused(tmp_path):
    (tmp_path / "l.csv").write_bytes("prompt\ncaf\xe9".encode("latin-1"))
    for source, said in [
        (tmp_path / "l.csv", "not UTF-8"),
        (tmp_path, "is a folder"),
        (tmp_path / "no.jsonl", "does not exist"),
        ("./no", "does not exist"),
    ]:
        with pytest.raises(DataError, match=said):
            data_rows.load_rows(str(source))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` library that records what it is asked."""
    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        if name == "far/away":
            raise ConnectionError("Couldn't reach\n 'far/away' on the Hub")
        return [{"question": "q", "answer": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_data_set_names_go_to_the_library_with_configuration_and_split(hub):
    assert data_rows.load_rows("openai/gsm8k:main", split="test") == [{"question": "q", "answer": "a"}]
    assert data_rows.load_rows("openai/gsm8k") and hub == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", None, "train")]


def test_an_unreachable_hub_is_said_with_the_way_round_it(hub):
    with pytest.raises(DataError, match="ConnectionError: Couldn't reach 'far/away'.*local .*file works without a network"):
        data_rows.load_rows("far/away")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"messages": json.dumps(PAIR)},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [*PAIR, {"role": "user", "content": "thanks"}]},
        {"prompt": "q", "response": "a"},
        {"Question": "q", "Answer": "a"},
        {"input_text": "q", "completion": "a"},
        {"goal": "q", "target": "a", "category": "x"},
        {"Behavior": "q", "Safe_Response": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "response": "a"},
    ],
    ids=lambda row: "-".join(row),
)
def test_auto_recognises_the_usual_columns(row):
    assert list(data.normalise([row])[0].messages) == PAIR


def test_an_instruction_takes_its_input_after_a_blank_line():
    (row,) = data.normalise([{"instruction": "Add.\n", "input": "1 2", "output": 3}])
    assert [m["content"] for m in row.messages] == ["Add.\n\n1 2", "3"]


def test_named_columns_win_over_the_usual_ones():
    row = {"prompt": "no", "response": "no", "frage": "q", "antwort": "a"}
    assert list(data.normalise([row], "auto", Columns(prompt="frage", response="antwort"))[0].messages) == PAIR


def test_unknown_columns_are_named_with_the_nearest():
    with pytest.raises(DataError, match=r"found \(qestion, anwser.*task\.columns\.prompt=qestion task\.columns\.response=anwser"):
        data.normalise([{"qestion": "q", "anwser": "a"}], source="f.csv")
    with pytest.raises(DataError, match=r"safety\.data.*no column 'promt'.*prompt, response; did you mean 'prompt'"):
        data.normalise([{"prompt": "q", "response": "a"}], "auto", Columns(prompt="promt"), field="safety.data")
    with pytest.raises(DataError, match="row 2 has no column 'response'"):
        data.normalise([{"prompt": "q", "response": "a"}, {"prompt": "q"}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "response": " "}, "assistant's text is empty"),
        ({"prompt": None, "response": "a"}, "user's text is missing"),
        ({"messages": PAIR[:1]}, "no assistant answer"),
        ({"messages": PAIR[1:]}, "no prompt before it"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "role 'boss'"),
        ({"messages": "q"}, "not JSON"),
        ({"messages": 3}, "list of"),
    ],
)
def test_rows_without_prompt_or_answer_are_refused_by_number(row, said):
    with pytest.raises(DataError, match=f"row 1.*{said}|{said}"):
        data.normalise([row])
    with pytest.raises(DataError, match="no rows"):
        data.normalise([])


def test_kinds_are_read_in_safety_data_only():
    rows = [{"prompt": "q", "response": "a", **extra} for extra in ({"kind": "harmless"}, {"kind": ""}, {"kind": "refusal"})]
    assert [c.kind for c in data.normalise(rows)] == ["task"] * 3
    assert [c.kind for c in data.normalise(rows, kind="safety")] == ["harmless", "refusal", "refusal"]
    with pytest.raises(DataError, match="row 1: kind 'bad' is none of refusal, harmless"):
        data.normalise([{**rows[0], "kind": "bad"}], kind="safety")


def test_ids_are_the_rows_own_where_distinct_else_positions():
    def ids(*own):
        return [c.id for c in data.normalise([{"prompt": "q", "response": "a", "id": i} for i in own])]

    assert ids("x", "y") == ["x", "y"] and ids(7, 8) == ["7", "8"] and ids("x", "x") == ["0", "1"] and ids("x", None) == ["0", "1"]


def conversations(prompts):
    return data.normalise([{"prompt": p, "response": f"a {i}"} for i, p in enumerate(prompts)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda p: len(set(p)) > 1), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_held_out_prompt_is_trained_on_and_no_row_is_lost(prompts, fraction, seed):
    rows = conversations(prompts)
    train, held = data.split_holdout(rows, fraction, seed)
    assert train and held and sorted(train + held, key=lambda c: int(c.id)) == rows
    assert not {c.prompt[0]["content"] for c in train} & {c.prompt[0]["content"] for c in held}
    assert data.split_holdout(rows, fraction, seed) == (train, held)


def test_one_distinct_prompt_cannot_be_split():
    with pytest.raises(DataError, match="task.eval_data"):
        data.split_holdout(conversations("aaa"), 0.5, 0)


def test_samples_are_seeded_and_ordered():
    rows = conversations("abcdefgh")
    chosen = data.sample(rows, 4, 1)
    assert chosen == data.sample(rows, 4, 1) and [int(c.id) for c in chosen] == sorted(int(c.id) for c in chosen) and len(chosen) == 4
    assert data.sample(rows, 99, 1) == rows


def test_the_fingerprint_sees_text_kind_order_and_nothing_else():
    rows = conversations("ab")
    assert data.fingerprint(rows) == data.fingerprint(tuple(conversations("ab")))
    assert len({data.fingerprint(r) for r in (rows, rows[::-1], conversations("ac"), rows[:1])}) == 4
    assert data.fingerprint(rows, {"x": 1}) != data.fingerprint(rows, {"x": 2})


def test_a_description_holds_the_hash_of_the_bytes(tmp_path):
    import hashlib

    source = write(tmp_path / "r.csv", "a\n1\n")
    assert data_rows.describe(source) == {"name": "r", "source": source, "sha256": hashlib.sha256(b"a\n1\n").hexdigest()}
    assert data_rows.describe("owner/set:main")["name"] == "owner_set_main"
