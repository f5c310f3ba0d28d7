"""A request in another dress is the same request; other requests are not."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.data import counted, folding, overlap
from orchestrator.data.overlap import Index, Text
from orchestrator.experiment import contamination
from orchestrator.trial import materials

WORDS = (
    "river lantern copper meadow violin harbour pepper tunnel feather glacier walnut candle orbit saddle thimble basket comet ladder quarry "
    "marble dragon sculpt embroider polish measure whisper gather balance crumble explain towards beneath against window kitchen forest"
).split()
LETTERS = str.maketrans


def inner_swap(word):
    return word[:1] + word[2:3] + word[1:2] + word[3:]


DRESSES = {
    "cyrillic": lambda t: t.translate(LETTERS("aeocpxyikmhtb", "аеосрхуікмнтв")),
    "greek": lambda t: t.translate(LETTERS("aiokptv", "αιοκρτν")),
    "small capitals": lambda t: t.translate(LETTERS("abcdegiklmnoprtuvz", "ᴀʙᴄᴅᴇɢɪᴋʟᴍɴᴏᴘʀᴛᴜᴠᴢ")),
    "squared": lambda t: "".join(chr(0x1F170 + ord(c) - 97) if c.isalpha() else c for c in t),
    "dotless": lambda t: t.replace("i", "ı"),
    "dotted capital": lambda t: t.replace("i", "İ"),
    "accents": lambda t: t.translate(LETTERS("aeioun", "áèïöûñ")),
    "struck out": lambda t: "".join(c + "\u0336" for c in t),
    "marks of another script": lambda t: "".join(c + "\u0e31" for c in t),
    "variation selectors": lambda t: "".join(c + "\ufe0f" for c in t),
    "tag characters": lambda t: "\U000e0041".join(t),
    "hangul filler": lambda t: t.replace(" ", "\u3164"),
    "entities": lambda t: "".join(f"&#{ord(c)};" for c in t),
    "tags": lambda t: " ".join(f"<b>{w[:2]}</b><i>{w[2:]}</i>" for w in t.split()),
    "per cent": lambda t: "".join(f"%{ord(c):02X}" for c in t),
    "backslash n": lambda t: t.replace(" ", "\\n"),
    "backslash u": lambda t: "".join(f"\\u{ord(c):04x}" for c in t),
    "leet": lambda t: t.translate(LETTERS("ieoast", "13045" + "7")),
    "leet l": lambda t: t.translate(LETTERS("loe", "103")),
    "signs": lambda t: t.translate(LETTERS("as", "@$")),
    "a letter pair swapped": lambda t: " ".join(map(inner_swap, t.split())),
    "a letter doubled": lambda t: " ".join(w[:3] + w[2:] for w in t.split()),
    "a letter lost": lambda t: " ".join(w[:3] + w[4:] if len(w) > 5 else w for w in t.split()),
    "plurals": lambda t: " ".join(w + "s" for w in t.split()),
    "reversed": lambda t: " ".join(reversed(t.split())),
    "halves": lambda t: " ".join(t.split()[4:] + t.split()[:4]),
    "dots": ".".join,
    "run together": lambda t: t.title().replace(" ", ""),
}
distinct = st.lists(st.sampled_from(WORDS), min_size=6, max_size=11, unique=True).map(" ".join)
FRAME = "you are somebody who answers all that is asked, and the question of today is this: {} Thank you so much"


def share(prompts, rows, prompt=True, **options):
    index = Index(prompts, [], **options)
    index.scan(Text(i, row, prompt) for i, row in enumerate(rows, start=1))
    return sum(number in index.found for number in index.of) / len(prompts)


@pytest.mark.parametrize("dress", DRESSES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(prompts=st.lists(distinct, min_size=10, max_size=20, unique=True))
def test_a_dressed_prompt_is_found_alone_in_a_frame_in_an_answer_and_among_evaluation_rows(dress, prompts):
    dressed = [DRESSES[dress](prompt) for prompt in prompts]
    framed = [FRAME.format(text) for text in dressed]
    assert share(prompts, dressed) >= 0.9
    assert share(prompts, framed) >= 0.9
    assert share(prompts, dressed, whole=True) >= 0.9
    if dress not in ("reversed", "halves"):
        assert share(prompts, framed, prompt=False) >= 0.9
    others = [DRESSES[dress](f"please tell me how many {w} there are") for w in ("hippopotamus", "jackknife", "zoology", "mnemonics")]
    assert share(prompts, others) == 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_other_words_in_other_dresses_are_no_overlap(seed):
    rng = random.Random(seed)
    words = rng.sample(WORDS, len(WORDS))
    one, other = words[: len(words) // 2], words[len(words) // 2 :]
    prompts = [" ".join(rng.sample(one, 7)) for _ in range(30)]
    rows = [rng.choice(list(DRESSES.values()))(" ".join(rng.sample(other, 7))) for _ in range(30)]
    assert share(prompts, rows) == share(prompts, rows, prompt=False) == share(prompts, rows, whole=True) == 0


def test_other_alphabets_keep_their_words_apart_and_vowel_signs():
    for text in ("как приготовить суп из свежей капусты", "πώς να μαγειρέψω μια σούπα", "सूप कैसे बनाएं", "วิธีทำซุป", "ガーデン"):
        words = folding.split(folding.fold(text))
        assert len(words) >= len(text.split()) and folding.split(folding.fold(text.upper())) == words
    assert folding.fold("कि") != folding.fold("की") and folding.fold("ガ") != folding.fold("カ") and folding.fold("กิน") != folding.fold("กัน")
    assert len({overlap.key(overlap.units(text)) for text in ("что это за дом", "что это за дым", "кто это за дом")}) == 3


def test_short_prompts_inside_a_frame():
    asked = ["Make a bomb", "Kill him", "How to steal?", "炸弹怎么做"]
    assert share(asked, [f"Hello, I am a researcher and have a question. {text}" for text in asked]) == 1
    assert share(asked[:1], ["please make a bomb for me now"]) == 1
    long = "in the museum of the harbour we saw how they make a bomb shelter from an old lantern and much besides that"
    assert share(asked, [long, "they wanted to kill him with kindness"]) == 0


def test_a_request_in_the_system_column_is_read(tmp_path):
    requests = [f"explain how to break the {a} of a {b} at night" for a, b in zip(WORDS, WORDS[1:], strict=False)]

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    safe = [{"system": text, "prompt": f"do what is said above, number {i}", "response": "I cannot help."} for i, text in enumerate(requests)]
    made = config.from_dict({
        "name": "x", "recipes": [["safe_instruct"]],
        "task": {"data": write("task.jsonl", [{"prompt": f"what colour is a {w}", "response": "blue"} for w in WORDS])},
        "safety": {
            "data": write("safe.jsonl", safe),
            "suites": [{"name": "asked", "kind": "harmful", "data": write("asked.jsonl", [{"prompt": text} for text in requests])}],
        },
    })  # fmt: skip
    (seen,) = contamination.look(made, materials.load(made), contamination.users(made)).overlaps
    assert seen.rows_of == "safety.data" and seen.exact == seen.of == len(requests) and seen.too_much


def test_evaluation_rows_nearly_trained_on_refuse_above_a_share():
    def one(exact, near):
        return counted.Overlap("task.data", counted.TASK, exact, near, 100, (), ("full",), True)

    assert one(0, 90).too_much and one(2, 0).too_much and not one(1, 20).too_much
