"""Tokenised rows: labels on the answer and its end, nothing else; what is trained is what generation continues."""

from __future__ import annotations

import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import conversations, tokens
from orchestrator.errors import DataError, ModelError

WORDS = st.lists(st.sampled_from(tiny_llama.WORDS), min_size=1, max_size=8).map(" ".join)


SHARED = tiny_llama.tokenizer()


@pytest.fixture
def tokenizer():
    return SHARED


def rows(*pairs, system=None):
    head = [{"role": "system", "content": system}] if system else []
    return [
        conversations.Conversation(str(i), (*head, {"role": "user", "content": q}, {"role": "assistant", "content": a}))
        for i, (q, a) in enumerate(pairs)
    ]


def labelled(example):
    return [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != -100]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.sampled_from([None, "be kind"]))
def test_labels_are_the_answer_and_its_end_after_exactly_the_generation_prompt(pairs, system):
    tokenizer = SHARED
    examples, report = tokens.tokenise(rows(*pairs), tokenizer, max_length=64, system_prompt=system)
    for (question, answer), example in zip(pairs, examples, strict=True):
        messages = tokens.with_system([{"role": "user", "content": question}], system)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(example.input_ids[: len(prompt)]) == prompt and set(example.labels[: len(prompt)]) == {-100}
        assert list(example.labels[len(prompt) :]) == list(example.input_ids[len(prompt) :])
        assert tokenizer.convert_ids_to_tokens(labelled(example)) == [*answer.split(), "</s>"]
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert report.answer_tokens == sum(len(a.split()) + 1 for _, a in pairs) and report.tokens == sum(len(e.input_ids) for e in examples)


def test_only_the_last_answer_of_a_dialogue_is_trained(tokenizer):
    turns = [("user", "how"), ("assistant", "one"), ("user", "then"), ("assistant", "two")]
    row = conversations.Conversation("d", tuple({"role": r, "content": c} for r, c in turns))
    (example,), _ = tokens.tokenise([row], tokenizer, max_length=64)
    assert tokenizer.convert_ids_to_tokens(labelled(example)) == ["two", "</s>"]


def test_long_rows_are_cut_at_the_end_and_rows_without_an_answer_left_are_dropped(tokenizer):
    pairs = [("how", "one two three four"), ("how do i make a cake", "yes"), ("how", "no")]
    examples, report = tokens.tokenise(rows(*pairs), tokenizer, max_length=6)  # <s> user how assistant = 4 tokens before an answer
    assert (report.rows, report.cut, report.dropped) == (3, 2, 1)
    assert [e.id for e in examples] == ["0", "2"]
    assert tokenizer.convert_ids_to_tokens(labelled(examples[0])) == ["one", "two"]
    with pytest.raises(DataError, match=r"all 3 rows.*task\.max_length=4.*raise task\.max_length above 5"):
        tokens.tokenise(rows(*pairs), tokenizer, max_length=4)


def test_kinds_travel_with_the_rows_and_can_be_set(tokenizer):
    row = conversations.Conversation("x", tuple(rows(("how", "no"))[0].messages), "refusal")
    assert tokens.tokenise([row], tokenizer, max_length=64)[0][0].kind == "refusal"
    assert tokens.tokenise([row], tokenizer, max_length=64, kind="task")[0][0].kind == "task"
    assert tokens.tokenise([], tokenizer, max_length=64)[0] == ()


def test_a_conversation_keeps_its_own_system_message(tokenizer):
    (example,), _ = tokens.tokenise(rows(("how", "no"), system="be kind"), tokenizer, max_length=64, system_prompt="be red")
    assert "red" not in tokenizer.decode(example.input_ids) and "kind" in tokenizer.decode(example.input_ids)


def test_a_template_that_does_not_end_answers_gets_the_end_token():
    template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt "
        "%}{{ 'assistant : ' }}{% endif %}"
    )
    tokenizer = tiny_llama.tokenizer(template)
    (example,), _ = tokens.tokenise(rows(("how", "no")), tokenizer, max_length=64)
    assert tokenizer.convert_ids_to_tokens(labelled(example)) == ["no", "</s>"]
    assert tokens.turn_end(tokenizer) == (None, frozenset({tokenizer.eos_token_id}))


def test_an_end_of_turn_token_other_than_the_tokenizers_end_also_stops_generation():
    template = tiny_llama.TEMPLATE.replace("{{ eos_token }}", "{{ '<|system|> .' }}")
    tokenizer = tiny_llama.tokenizer(template)
    end = tokenizer.convert_tokens_to_ids("<|system|>")
    assert tokens.turn_end(tokenizer) == (end, frozenset({end, tokenizer.eos_token_id}))
    (example,), _ = tokens.tokenise(rows(("how", "no")), tokenizer, max_length=64)
    assert tokenizer.convert_ids_to_tokens(labelled(example)) == ["no", "<|system|>"]


def test_a_template_that_differs_between_training_and_generation_is_refused():
    tokenizer = tiny_llama.tokenizer(tiny_llama.TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>yes' }}"))
    with pytest.raises(ModelError, match="differently for training and for generation.*model.chat_template"):
        tokens.tokenise(rows(("how", "no")), tokenizer, max_length=64)


def test_merges_across_the_border_leave_the_prompt_as_generation_sees_it():
    """A tokenizer that has `:no` as one token would otherwise train a prompt that generation never makes."""
    from tokenizers import Tokenizer, models

    made = tiny_llama.tokenizer()
    pieces = [*tiny_llama.SPECIALS, *"abcdefghijklmnopqrstuvwxyz: ", ":n", ":no"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [(":", "n"), (":n", "o")], unk_token="<unk>"))
    made = type(made)(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (example,), _ = tokens.tokenise(rows(("a", "no")), made, max_length=64)
    prompt = made("user:aassistant:", add_special_tokens=False)["input_ids"]
    assert list(example.input_ids[: len(prompt)]) == prompt
    assert made.convert_ids_to_tokens(labelled(example)) == ["n", "o", "</s>"]


def test_a_template_that_knows_no_system_role_says_so():
    tokenizer = tiny_llama.tokenizer("{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + tiny_llama.TEMPLATE)
    with pytest.raises(ModelError, match=r"no system role.*model\.system_prompt"):
        tokens.tokenise(rows(("how", "no")), tokenizer, max_length=64, system_prompt="be kind")
