"""A template that loops on a word of the data only is stopped in a process of its own, and the row is named."""

from __future__ import annotations

import pytest
import tiny_llama

from orchestrator.data import conversations, template_limits, template_rows, tokens
from orchestrator.errors import ModelError
from orchestrator.evaluation import generate

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def _words(effect):
    words = tiny_llama.tokenizer()
    words.chat_template = "{% if 'vulnerab' in messages[0].content %}" + effect + "{% endif %}" + CHAT
    template_limits.check(words.chat_template, words.special_tokens_map, "m")
    return words


def _rows(*prompts):
    rows = [{"prompt": prompt, "response": "b"} for prompt in prompts]
    return conversations.read(rows, "auto", conversations.config.Columns(), "rows").conversations


@pytest.mark.parametrize(("effect", "said"), [
    (LOOP, "computes for more than 1 s"),
    ("{{ messages[0].content * 10**10 }}", "takes more than 1024 MiB"), ("{{ 'ab' * 900000 }}", "writes more than"),
])  # fmt: skip
def test_the_row_at_which_a_template_hangs_is_named(effect, said, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    words = _words(effect)
    with pytest.raises(ModelError, match=f"task.data: row 3: the chat template {said}"):
        tokens.tokenise(_rows("one", "two", "a vulnerability", "four"), words, max_length=64)
    with pytest.raises(ModelError, match=f"suite x: prompt 2: the chat template {said}"):
        generate.encode_prompts(words, ["one", "vulnerable"], where="suite x")
    with pytest.raises(ModelError, match=said):
        tokens.render(words, [{"role": "user", "content": "vulnerabilities"}], generation=True)


def test_rows_that_pass_are_tried_once(monkeypatch):
    words = _words("{% for i in range(9) %}{{ 1 * 2 }}{% endfor %}")
    started = []
    render = template_limits.render
    monkeypatch.setattr(template_limits, "render", lambda *a, **k: started.append(len(a[2])) or render(*a, **k))
    monkeypatch.setattr(template_rows, "BATCH_ROWS", 4)
    asked = [([{"role": "user", "content": f"q{i}"}], True) for i in range(10)]
    for _ in range(2):
        template_rows.tried(words, [*asked, *asked])
    assert started == [4, 4, 2]


def test_a_row_that_the_template_cuts_is_named():
    words = tiny_llama.tokenizer()
    words.chat_template = CHAT.replace("m.content", "(m.content[:9] if 'secret' in m.content else m.content)")
    template_limits.check(words.chat_template, words.special_tokens_map, "m")
    with pytest.raises(ModelError, match="task.data: row 2: the chat template cuts or changes the text of a message of the user"):
        tokens.tokenise(_rows("one", "a long and secret question"), words, max_length=64)
    with pytest.raises(ModelError, match="cuts or changes the text of a prompt"):
        generate.encode_prompts(words, ["a long and secret question"])
