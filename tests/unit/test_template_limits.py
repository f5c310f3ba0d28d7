"""Chat templates are tried in a small process first: the same result as transformers', and a sentence for whatever cannot be used."""

from __future__ import annotations

import time

import pytest
import tiny_llama

from orchestrator import config
from orchestrator.data import template_limits
from orchestrator.errors import ModelError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"  # noqa: E501
LLAMA2 = "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"  # noqa: E501
WITH_ALL = """{%- set ns = namespace(seen=0) -%}
{%- macro turn(m) -%}{{ m.role }}: {{ m.content | tojson }}{%- endmacro -%}
{%- for m in messages -%}
  {%- if m.role == 'system' %}{% continue %}{% endif -%}
  {%- set ns.seen = ns.seen + 1 -%}
  {%- if m.role == 'assistant' -%}{% generation %}{{ turn(m) }}{% endgeneration %}{%- else -%}{{ turn(m) }}{%- endif -%}
  {%- if ns.seen > 30 -%}{%- break -%}{%- endif %}
{% endfor -%}
{%- if tools is not none -%}tools{%- endif -%}
{{ dict(a=1)['a'] }}{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.mark.parametrize("template", [CHATML, LLAMA2, WITH_ALL], ids=["chatml", "llama2", "all"])
def test_the_same_texts_as_transformers(template):
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    found = template_limits.render(template, TOKENS, template_limits.CASES)
    assert len(found) == len(template_limits.CASES) and any("text" in line for line in found)
    for case, line in zip(template_limits.CASES, found, strict=True):
        try:
            (wanted,), _ = render_jinja_template([case["messages"]], chat_template=template, add_generation_prompt=case["generation"], **TOKENS)
        except TemplateError as error:
            assert line["error"] == str(error)
        else:
            assert line["text"] == wanted
    template_limits.check(template, TOKENS, "m")


LOOP = "{{ messages[0].content }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "expected"), [
    ("{% for i in %}", "is no Jinja template: Expected an expression"),
    ("{{ messages[0].content }}{% if %}", "is no Jinja template"),
    ("{{ 1 / 0 }}", "fails for a plain question: it divides by zero"),
    ("{% for i in range(10**9) %}x{% endfor %}", "fails for a plain question: a number or range in it is too large"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails for a plain question: it is nested too deeply"),
    (LOOP, "computes for more than 2 s"),
    ("{{ messages[0].content }}{{ 10 ** (10 ** 9) }}", "computes for more than 2 s"),
    ("{{ messages[0].content }}{{ 'a' * 10**10 }}", "takes more than 1024 MiB"),
    ("{{ messages[0].content }}{{ 'a' * 2000000 }}", "writes more than 1,000,000 characters"),
    ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "writes more than 1,000,000 characters"),
    ("{{ mesages }}", "leaves out the user's text"),
    ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out the answer"),
    ("{{ raise_exception('no') }}", "fails for a plain question: no"),
    ("{{ messages.foo.bar }}", "fails for a plain question: it uses what there is not"),
    ("{{ ''.__class__.__mro__ }}", "fails for a plain question: it reaches for"),
    ("{{ messages[0].content }}{% include '/etc/passwd' %}", "fails for a plain question"),
    ("{{ messages[0].content }}" + "{% if 1 %}" * 300 + "{% endif %}" * 300, "is no Jinja template"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is no Jinja template: it is nested too deeply"),
    ({"tool_use": CHATML}, "has no template `default`"),
    ("x" * 400_000, "has 400,000 characters"),
], ids=range(20))  # fmt: skip
def test_what_cannot_be_used_is_a_sentence(template, expected, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 2)
    with pytest.raises(ModelError) as caught:
        template_limits.check(template, TOKENS, "m")
    assert expected in str(caught.value) and str(caught.value).startswith("the chat template of 'm' ") and "\n" not in str(caught.value)


def test_templates_that_refuse_some_roles_are_taken():
    system_first = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
    single = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHATML
    for template in (system_first, single, {"default": CHATML, "tool_use": "{% broken"}):
        template_limits.check(template, TOKENS, "m")


def test_one_process_for_one_template(monkeypatch):
    started = []
    run = template_limits.subprocess.run
    monkeypatch.setattr(template_limits.subprocess, "run", lambda *a, **k: started.append(1) or run(*a, **k))
    template_limits._fault.cache_clear()
    for _ in range(3):
        template_limits.check(CHATML + " ", TOKENS, "m")
    assert len(started) == 1


def test_a_clock_that_runs_out_is_the_time_that_ran_out(monkeypatch):
    monkeypatch.setattr(template_limits, "PATIENCE_S", 1.5)
    monkeypatch.setattr(template_limits, "SECONDS", 60)
    begun = time.monotonic()
    with pytest.raises(ModelError, match="computes for more than 60 s"):
        template_limits.check(LOOP + "{# clock #}", TOKENS, "m")
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("where", ["config", "folder"])
def test_a_models_own_template_and_the_configs_are_tried(tmp_path, where):
    from orchestrator.models import loading

    bad = "{{ messages[0].content }}{{ 1 / 0 }}"
    tiny_llama.saved(tmp_path / "m")
    if where == "folder":
        (tmp_path / "m" / "chat_template.jinja").write_text(bad)
    with pytest.raises(ModelError, match="divides by zero"):
        loading.tokenizer(config.Model(model_name_or_path=str(tmp_path / "m"), chat_template=bad if where == "config" else None))


def _with(content: str, turns: str = "messages") -> str:
    return f"{{% for m in {turns} %}}{{{{ m.role }}}}: {{{{ {content} }}}}\n{{% endfor %}}{{% if add_generation_prompt %}}assistant: {{% endif %}}"


@pytest.mark.parametrize("template", [
    _with("m.content[:25]"), _with("m.content[:1000]"), _with("m.content[:50000]"), _with("m.content[-3000:]"), _with("m.content | truncate(500)"),
    _with("m.content | replace('b', 'c')"), _with("m.content | e"), _with("m.content | wordwrap(70)"), _with("m.content.split() | join(' ')"),
    _with("m.content", "messages[-2:]"), _with("m.content", "messages[:3]"),
    _with("m.content if loop.index0 == 0 or loop.last else m.content[:900]"),
], ids=range(12))  # fmt: skip
def test_a_template_that_cuts_or_changes_texts_is_refused(template):
    with pytest.raises(ModelError, match="cuts or changes texts: of (the user's text|the answer)"):
        template_limits.check(template, TOKENS, "m")


@pytest.mark.parametrize("content", ["m.content", "m.content | trim", "m.content | tojson", "m.content.split('</think>')[-1].lstrip()"])
def test_a_template_that_leaves_texts_whole_is_taken(content):
    template_limits.check(_with(content), TOKENS, "m")


def test_time_and_chance_in_a_template():
    clock = "time of day"
    for text, said in (("{{ strftime_now('%s') }}", clock), ("{{ strftime_now('%H:%M:%S') }}", clock), ("{{ [1, 1]|random }}", "random")):
        with pytest.raises(ModelError, match=said):
            template_limits.check(text + CHATML, TOKENS, "m")
    template_limits.check("{{ strftime_now('%d %b %Y') }}" + CHATML, TOKENS, "m")
    (told,) = template_limits.notes("{{ strftime_now('%d %b %Y') }}" + CHATML, TOKENS)
    assert "another text on another day" in told
    assert template_limits.notes(CHATML, TOKENS) == [] == template_limits.notes("{# strftime_now #}" + CHATML, TOKENS)


@pytest.mark.parametrize(("template", "bounded"), [
    (CHATML, True), (LLAMA2, True), (LOOP, False), (WITH_ALL, False),
    ("{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", False), ("{{ 'a' * messages | length }}", False),
    ("{{ '%9999d' % 1 }}", False), ("{{ messages[0].content.replace('a', 'b') }}", False), ("{% set x = x ~ x %}", False), ("{% if %}", False),
    ("{{ messages | tojson(indent=9) }}", False), ("{{ range(9) }}", False), ("{% macro f() %}{% endmacro %}", False),
])  # fmt: skip
def test_what_no_data_can_make_compute_for_long(template, bounded):
    assert template_limits.shape(template).bounded is bounded
