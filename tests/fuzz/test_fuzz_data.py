"""Damaged data files of every kind: they are read as rows of texts, or refused in one sentence; nothing else ever comes out.

SAFEBASIN_FUZZ_EXAMPLES sets how many mutations each test tries; the same number tries the same ones.
"""

from __future__ import annotations

import json
import os
import random
import string

import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import conversations, hub_rows, tokens
from orchestrator.data import rows as data_rows
from orchestrator.errors import DataError, ModelError

EXAMPLES = int(os.environ.get("SAFEBASIN_FUZZ_EXAMPLES", "150"))

TURNS = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "no"}]
ROWS = [
    {"prompt": "how do i", "response": "no", "id": "x"},
    {"instruction": "how", "input": "one", "output": "two", "system": "be kind", "history": [["one", "two"]]},
    {"messages": [{"role": "system", "content": "be kind"}, *TURNS]},
    {"conversations": [{"from": "human", "value": "how"}, {"from": "gpt", "value": "no"}], "tools": "[]"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"prompt": "how", "chosen": "sorry", "rejected": "yes", "kind": "refusal"},
]
TABLE = "id,prompt,response\n1,how do i,no\n2,\"a \"\"cake\"\"\",\"one,\ntwo\"\n"
PIECES = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\ud83d", b"\\u0000",
    b"</s>", b"<|assistant|>", b"=1+1", b"\xf0\x9f\x98\x80",
    b"NaN", b"-Infinity", b"1e999", b"9" * 4400, b"null", b"true", b"[" * 3000, b'{"a":' * 3000,
]  # fmt: skip
ODD = [
    None, True, 0, -1.5, float("nan"), float("inf"), 10**30, "", " ", "nan", "</s>", "[]", "\ud83d", "\0", "x" * 5000, [], [[]], [None], [1, 2],
    ["a", "b"], {},
    {"text": "a"}, {"type": "text", "text": "a"}, [{"type": "text", "text": "a"}], [{"type": "image_url"}], {"role": "user"}, [{"role": "user"}],
    [{"role": None, "content": "a"}], [{"role": "assistant", "content": "a", "weight": 0}], [["a", "b"]], [["a"]], '[{"role": "user", "content": 3}]',
]  # fmt: skip


def damaged(base: bytes, rng: random.Random) -> bytes:
    """A few bytes of it flipped, cut, doubled, moved or replaced."""
    body = bytearray(base)
    for _ in range(rng.randint(1, 4)):
        at, to = sorted((rng.randint(0, len(body)), rng.randint(0, len(body))))
        match rng.randint(0, 5):
            case 0 if body:
                body[min(at, len(body) - 1)] = rng.randrange(256)
            case 1:
                del body[at : min(to, at + 20)]
            case 2:
                body[at:at] = body[at:to]
            case 3:
                body[at:at] = rng.choice(PIECES)
            case 4:
                body = body[:at] if rng.random() < 0.3 else body
            case _:
                body[at : at + 3] = rng.choice(string.printable).encode() * 3
    return bytes(body)


def twisted(value, rng: random.Random):
    """One value inside it replaced by an odd one, one key renamed, or one left out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return {**value, rng.choice(["role", "content", "tools", "weight", "system", "history", "images", "", "messages"]): rng.choice(ODD)}
        return {**value, key: twisted(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], twisted(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def check(path):
    """Rows of texts that can be tokenised and written, or a sentence."""
    for kind in ("task", "safety"):
        try:
            rows = data_rows.load_rows(str(path))
            found = conversations.read(rows, kind=kind)
            conversations.harmful_answers(found.rows, found.conversations, conversations.config.Columns(), "safety.data")
        except DataError as error:
            sentence = str(error)
            assert 10 < len(sentence) < 3000 and sentence.isprintable(), sentence[:300]
            continue
        assert len(found.conversations) == found.report.used <= found.report.rows == len(rows)
        for conversation in found.conversations:
            assert conversation.answer.strip() and conversation.messages[-1]["role"] == "assistant" and len(conversation.messages) > 1
            assert all(message["content"].encode() is not None for message in conversation.messages)
        json.dumps([found.report.facts(), found.report.warnings()])
        assert conversations.fingerprint(found.conversations)
        try:
            examples, _ = tokens.tokenise(found.conversations, TOKENIZER, max_length=64)
        except (DataError, ModelError) as error:
            assert "row" in str(error)
            continue
        assert all(example.labels[-1] != -100 for example in examples)


TOKENIZER = tiny_llama.tokenizer()


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.txt"])
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_bytes_of_files_damaged(tmp_path_factory, name, seed):
    rng = random.Random(seed)
    rows = rng.choices(ROWS, k=1) * rng.randint(1, 3)
    base = {"r.jsonl": "\n".join(map(json.dumps, rows)), "r.json": json.dumps(rows), "r.tsv": TABLE.replace(",", "\t")}
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(damaged(base.get(name, TABLE).encode(), rng))
    check(path)


@settings(max_examples=2 * EXAMPLES, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_values_of_rows_replaced(tmp_path_factory, seed):
    rng = random.Random(seed)
    row = rng.choice(ROWS)
    path = tmp_path_factory.getbasetemp() / "values.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in [row, twisted(twisted(row, rng), rng)]))
    check(path)
    path.write_text(json.dumps(twisted(row, rng)))
    check(path)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(name=st.text(min_size=1, max_size=40).filter(lambda text: not hub_rows.is_name(text)))
def test_texts_that_are_no_names_of_data(name):
    with pytest.raises(DataError):
        data_rows.load_rows(name)
