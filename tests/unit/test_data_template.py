"""Templates of many kinds: what is asked is what was trained after, the header is never learnt, and a saved template says so itself."""

from __future__ import annotations

import pytest
import tiny_llama

from orchestrator.data import conversations
from orchestrator.data import template as data_template
from orchestrator.data import tokens as data_tokens
from orchestrator.errors import ModelError
from orchestrator.evaluation.generate import encode_prompts

ONE = "{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
HEAD = "{{ bos_token }}{% for m in messages %}" + ONE + "{% endfor %}"
GEN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
CHATML = "{% for m in messages %}{{ '<s>' + m['role'] + ' : ' + m['content'] + '</s>\n' }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + '\n' }}{% endfor %}"
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + 'how ' + m['content'] + ' you' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMS = HEAD.replace("m['content']", "m['content'] | trim") + GEN
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|system|>be kind' }}{% endif %}" + HEAD + GEN
THINKS = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and not loop.last %}{% set c = c.split('. ')[-1] %}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + c }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}" + GEN
)
MODEL_ROLE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + ('model' if m['role'] == 'assistant' else m['role']) + '|>' + m['content'] + '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}"
)

#: name -> (template, what is asked for [user "how"], what is learnt of the answer "no")
KINDS = {
    "heeds": (HEAD + GEN, "<s><|user|>how<|assistant|>", "no</s>"),
    "ignores, specials": (HEAD, "<s><|user|>how<|assistant|>", "no</s>"),
    "ignores, chatml": (CHATML, "<s>user : how</s>\n<s>assistant :", " no</s>"),
    "ignores, words, no end": (PLAIN, "user : how\nassistant :", " no\n</s>"),
    "inst needs no header": (INST, "<s>how how you", " no </s>"),
    "always, special end": (CHATML + "{{ '<s>assistant : ' }}", "<s>user : how</s>\n<s>assistant : ", "no</s>"),
    "always, special header, no end": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}{{ '<|assistant|>' }}", "<|user|>how<|assistant|>", "no</s>",
    ),
    "always, words, no end": (
        "{% for m in messages %}{{ '. ' + m['role'] + ' : ' + m['content'] }}{% endfor %}{{ '. assistant : ' }}",
        ". user : how. assistant : ", "no</s>",
    ),
    "trims": (TRIMS, "<s><|user|>how<|assistant|>", "no</s>"),
    "default system": (DEFAULT_SYSTEM, "<|system|>be kind<s><|user|>how<|assistant|>", "no</s>"),
    "drops earlier thoughts": (THINKS, "<|user|>how<|assistant|>", "no</s>"),
    "model role": (MODEL_ROLE, "<s><|user|>how</s><|model|>", "no</s>"),
}  # fmt: skip


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def conversation(*turns):
    return conversations.Conversation("x", tuple({"role": role, "content": text} for role, text in turns), row=7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_alone_is_learnt_after_exactly_what_is_asked(kind):
    template, asked, learnt = KINDS[kind]
    tokenizer = tiny_llama.tokenizer(template)
    (example,), _ = data_tokens.tokenise([conversation(("user", "how"), ("assistant", "no"))], tokenizer, max_length=64)
    assert list(example.prompt) == tokens(tokenizer, asked) == encode_prompts(tokenizer, ["how"])[0]
    assert [i for i in example.labels if i != -100] == tokens(tokenizer, learnt)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dialogue_is_asked_as_it_is_trained_too(kind):
    tokenizer = tiny_llama.tokenizer(KINDS[kind][0])
    turns = [("user", "how"), ("assistant", "yes"), ("user", "then"), ("assistant", "no")]
    (example,), _ = data_tokens.tokenise([conversation(*turns)], tokenizer, max_length=64)
    asked = [{"role": role, "content": text} for role, text in turns[:-1]]
    assert [list(example.prompt)] == encode_prompts(tokenizer, [asked])
    words = tokenizer.convert_ids_to_tokens([i for i in example.labels if i != -100])
    assert words[0] == "no" and words[-1] == "</s>" and "assistant" not in words and "<|assistant|>" not in words


@pytest.mark.parametrize("kind", KINDS)
def test_the_template_that_goes_with_the_model_says_the_same(kind, tmp_path):
    template, asked, _ = KINDS[kind]
    tokenizer = tiny_llama.tokenizer(template)
    data_template.correct(tokenizer)
    assert (tokenizer.chat_template != template) == kind.startswith("ignores") == bool(data_template.notes(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    once = again.chat_template
    data_template.correct(again)
    assert again.chat_template == once  # nothing is added twice
    question = [{"role": "user", "content": "how"}]
    assert again.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == asked
    assert asked == data_tokens.render(again, question, generation=True)
    plain = [*question, {"role": "assistant", "content": "no"}]
    first = tiny_llama.tokenizer(template)
    assert again.apply_chat_template(plain, tokenize=False) == first.apply_chat_template(plain, tokenize=False)


def test_a_header_with_quotes_and_signs_is_added_as_it_is():
    template = "{% for m in messages %}{{ \"it's \\\\ \U0001f600 }} \" + m['role'] + '\\n' + m['content'] + eos_token }}{% endfor %}\n"
    tokenizer = tiny_llama.tokenizer(template)
    data_template.correct(tokenizer)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "how"}], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("how</s>it's \\ \U0001f600 }} assistant\n")


def test_a_begun_answer_stands_where_the_template_puts_answers():
    question = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "yes one"}]
    ways = {INST: "<s>how how you yes one", PLAIN: "user : how\nassistant : yes one", HEAD + GEN: "<s><|user|>how<|assistant|>yes one"}
    for template, wanted in ways.items():
        tokenizer = tiny_llama.tokenizer(template)
        assert encode_prompts(tokenizer, [question]) == [tokens(tokenizer, wanted)]


SYSTEM, USER, TOOL, ANSWER = ("system", "be kind"), ("user", "how"), ("tool", "one"), ("assistant", "no")


@pytest.mark.parametrize("template, turns, said", [
    (HEAD.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}") + GEN,
     [SYSTEM, USER, ANSWER], "row 7: the chat template leaves out a message of the system"),
    (HEAD.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}") + GEN,
     [USER, TOOL, ANSWER], "row 7: the chat template leaves out a message of the tool"),
    ("{{ raise_exception('alternate') if messages|length > 2 }}" + HEAD + GEN, [USER, USER, ANSWER], "row 7: .*alternate"),
    ("{{ messages[2]['content'] | length / 0 if messages|length > 2 }}" + HEAD + GEN, [USER, USER, ANSWER], "row 7: .*zero"),
    ("{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}", [USER, ANSWER], "assistant's text out"),
])  # fmt: skip
def test_what_a_template_leaves_out_or_refuses_is_said_with_the_row(template, turns, said):
    with pytest.raises(ModelError, match=said):
        data_tokens.tokenise([conversation(*turns)], tiny_llama.tokenizer(template), max_length=64)


def test_a_system_prompt_that_the_template_leaves_out_is_refused():
    tokenizer = tiny_llama.tokenizer(HEAD.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}") + GEN)
    with pytest.raises(ModelError, match="leaves out a message of the system.*leave model.system_prompt out"):
        data_tokens.tokenise([conversation(("user", "how"), ("assistant", "no"))], tokenizer, max_length=64, system_prompt="be kind")


@pytest.mark.parametrize("text, kept", [("no</s>", "no"), ("no </s> </s>\n", "no "), ("no", "no")])
def test_an_end_token_at_the_end_of_an_answer_is_taken_off_and_counted(text, kept):
    from orchestrator.data import special_tokens

    tokenizer = tiny_llama.tokenizer()
    row = conversation(("user", "how"), ("assistant", text))
    (cleaned,), taken, left = special_tokens.cleaned([row], tokenizer, "task.data")
    assert cleaned.answer == kept and left == [] and [(one.rows, one.first) for one in taken] == [(1, 7)] * (text != kept)
    (example,), _ = data_tokens.tokenise([row], tokenizer, max_length=64)
    assert tokenizer.convert_ids_to_tokens([i for i in example.labels if i != -100]) == ["no", "</s>"]


def test_an_end_token_inside_an_answer_is_refused_and_other_special_tokens_are_counted():
    from orchestrator.data import special_tokens
    from orchestrator.errors import DataError

    tokenizer = tiny_llama.tokenizer()
    with pytest.raises(DataError, match=r"task\.data: row 7: the answer holds '</s>' inside.*learnt up to there only"):
        data_tokens.tokenise([conversation(("user", "how"), ("assistant", "no</s>yes"))], tokenizer, max_length=64)
    with pytest.raises(DataError, match="row 7: the answer is empty but for an end token"):
        data_tokens.tokenise([conversation(("user", "how"), ("assistant", "</s>"))], tokenizer, max_length=64)
    _, taken, left = special_tokens.cleaned([conversation(("user", "how <|assistant|> no </s>"), ("assistant", "no"))], tokenizer, "task.data")
    assert taken == [] and {one.what for one in left} == {f"the special token {name!r} stands in a text" for name in ("</s>", "<|assistant|>")}


def test_of_a_long_text_only_the_beginning_is_tokenised_with_the_same_tokens(monkeypatch):
    tokenizer = tiny_llama.tokenizer()
    long = "one two three " * 40
    rows = [conversation(("user", asked), ("assistant", answer)) for asked, answer in (("how", long), (long, "no"), ("how", "no"))]
    whole = data_tokens.tokenise(rows, tokenizer, max_length=20)
    sizes = []
    monkeypatch.setattr(data_tokens, "LONG_TEXT", 50)
    monkeypatch.setattr(data_tokens, "LONG_TOKEN", 1)
    ids = data_tokens._ids
    monkeypatch.setattr(data_tokens, "_ids", lambda tokenizer, texts: sizes.extend(map(len, texts)) or ids(tokenizer, texts))
    assert data_tokens.tokenise(rows, tokenizer, max_length=20) == whole and max(sizes) <= 400 < len(long)
    assert whole[1].cut == 2 and whole[1].dropped == 1


@pytest.mark.parametrize("split", ["ByteLevel", "Metaspace", None])
def test_the_beginning_of_a_text_has_the_tokens_that_the_whole_text_begins_with(split, monkeypatch):
    """Also of tokenizers that merge across words."""
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(200)]

    def text(count):
        return " ".join(rng.choices(words, k=count))

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    if split:
        core.pre_tokenizer = getattr(pre_tokenizers, split)()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    core.train_from_iterator([text(50) for _ in range(100)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    monkeypatch.setattr(data_tokens, "LONG_TEXT", 100)
    monkeypatch.setattr(data_tokens, "LONG_TOKEN", 2)
    for _ in range(30):
        whole, count = text(rng.randint(50, 300)), rng.randint(5, 60)
        (beginning,) = data_tokens.encode(tokenizer, [whole], count)
        assert beginning[: count + 1] == data_tokens.encode(tokenizer, [whole])[0][: count + 1]
