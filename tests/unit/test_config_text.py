"""Text of a config: nothing read as something else than it looks like, nothing cut, nothing that is no sentence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.config import seeds, yaml_text
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.storage import paths

LONG = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}" * 20


def refused(tmp_path, text, *overrides):
    path = tmp_path / "e.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(("text", "expected"), [
    ("safety: {}\nname: x\nsafety: {data: y}", "'safety' stands twice, in line 1 and in line 3"),
    ("safety:\n  limits: {confidence: 0.9}\n  limits: {max_degradation: 1}", "line 2 and in line 3"),
    ('search: {trials: 3, "trials": 4}', "stands twice"),
    ("safety: {limits: {max_degradation: yes}}", "safety.limits.max_degradation: a number is wanted, and yes/true/on is none"),
    ("training: {bf16: 1}", "training.bf16: true or false is wanted, not a number"),
    ("training: {bf16: 'yes'}", "training.bf16: true or false is wanted"),
    ("search: {seeds: [true, 3]}", "a number is wanted"),
    ("search: {trials: 1:30}", "a number is wanted"),
    ("search: {trials: 010}", "leading zero"),
    ("search: {trials: " + "9" * 5000 + "}", "a number of 5000 digits"),
    ("search: {seeds: 1" + "0" * 30 + "}", "too large"),
    ("search: {seeds: 1000000}", "1 to 1000"),
    ("search: {seeds: [2147483648]}", "not between 0 and 2147483647"),
    ("search: {sampler_seed: -1}", "at least 0"),
    ("search: {sampler_seed: 2147483648}", "at most 2147483647"),
    ("2024-01-01: x", "2024-01-01"),
    ("on: x", "is no text; put it in quotes"),
    ("? [a]\n: b", "a key is a list or mapping"),
    ("name: 2024", "a text is wanted, and it was read as a number; put it in quotes"),
    ("name: no", "a text is wanted, and it was read as false; put it in quotes"),
    ("model: {model_name_or_path: ''}", "the text is empty"),
    ("model: {system_prompt: \"\\ud83d\"}", "half of a character"),
    ("model: {system_prompt: !!python/object/apply:os.system [x]}", "is not known here"),
    ("model: {system_prompt: !!binary aGk=}", "is not known here"),
    ("training: {learning_rate: .nan}", "nan is no finite number"),
    ("recipes: [[{lora: {lora_alpha: .inf}}]]", "recipes.0.0.lora.lora_alpha: inf is no finite number"),
    ("a: &a [*a]", "contains itself"),
    ("&a [*a]", "contains itself"),
    ("[" * 20000, "nested too deeply"),
    ("- " * 20000, "nested too deeply"),
    (BOMB, "stands for more than 100,000 values"),
    ("--- a\n--- b", "single document"),
    ("name:\tx\n\tb: c", "not valid YAML"),
    ("name: a\0b", "not valid YAML"),
    ("", "is empty"),
    ("# nothing\n", "is empty"),
    ("{}", "is empty"),
    ("name: x\n" + "# " * 200_000, "at most 300,000 are read"),
    ("name: x".encode("utf-16"), "looks like UTF-16"),
    ("name: \u00e4".encode("latin-1"), "is not UTF-8 text"),
    ("variables: {a: yes}\nname: ${a}", "variables.a=True is no text"),
    ("variables: {a: " + "x" * 200_000 + "}\nname: '" + "${a}" * 10 + "'", "characters once its variables are replaced"),
    ("output: {dir: 'runs/try '}", "begins or ends with a space"),
    ("output: {dir: \"runs\\nx\"}", "control character"),
    ("output: {dir: ~nosuchuser42/x}", "there is no user 'nosuchuser42'"),
    ("output: {dir: $HOME/x}", "write ${HOME}"),
    ("output: {dir: 'outputs/{nmae}'}", "{nmae} stands for nothing here"),
    ("output: {dir: " + "x" * 300 + "}", "is too long"),
    ("search: {storage: " + "x" * 300 + "}", "is too long"),
])  # fmt: skip
def test_what_is_refused(tmp_path, text, expected):
    assert expected in refused(tmp_path, text)


def test_what_stays_as_it_is_meant(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_bytes(b"\xef\xbb\xbfdefaults: &d {trials: 3}\n".replace(b"defaults", b"search") + b'model: {system_prompt: "\\ud83d\\ude00"}\n'
                     b"safety: {limits: {max_degradation: '${limit}'}}\nvariables: {limit: '0.02'}\n")  # fmt: skip
    experiment = config.load(path)
    assert experiment.model.system_prompt == "\U0001f600" and experiment.search.trials == 3
    assert experiment.safety.limits.max_degradation == 0.02
    assert yaml_text.parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "x") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
    assert yaml_text.parse("[2024-01-01, 1:30, 0x10, 1_000, 3e-4]", "x") == ["2024-01-01", "1:30", 16, 1000, 3e-4]


def test_merges_of_merges_do_not_grow(tmp_path):
    lines = ["a: &a {x: 1}"] + [f"b{i}: &b{i} {{<<: [{','.join(['*' + (f'b{i - 1}' if i else 'a')] * 10)}]}}" for i in range(20)]
    assert yaml_text.parse("\n".join(lines), "x")["b19"] == {"x": 1}


def test_what_is_no_file_to_read(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        config.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="pipe, socket or device"):
        config.load(tmp_path / "pipe.yaml")
    for name in ("x" * 5000 + ".yaml", "a\0.yaml", "a\udc80/b.yaml"):
        with pytest.raises(ConfigError):
            config.load(name)


def test_deepspeeds_file_obeys_the_same_rules(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 0}}')
    assert "stands twice" in refused(tmp_path, "deepspeed: ds.json")


def test_a_key_of_deepspeeds_file_is_set_without_losing_the_others(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "steps_per_print": 7}')
    (tmp_path / "e.yaml").write_text("deepspeed: ${f}.json\nvariables: {f: ds}")
    experiment = config.load(tmp_path / "e.yaml", ["deepspeed.zero_optimization.stage=1"])
    assert experiment.zero_stage == 1 and experiment.deepspeed["steps_per_print"] == 7


# ------------------------------------------------------------------------------------------------ the command line

LITERAL = ["You help. Ticket #1 is urgent", "a: b", "yes", "2024", "null and void", "'quoted'", '"', "[INST] x", "{x", "- x", "@x", "*x", "&x", "!x",
           "%x", " x ", "x #", "#x", "3e-4", "~", "x=y", "a\nb"]  # fmt: skip


@pytest.mark.parametrize("text", LITERAL)
def test_a_text_is_taken_letter_by_letter(text):
    experiment = config.load(None, [f"model.system_prompt={text}", f"variables.v={text}", f"safety.suites.0.where.label={text}"])
    assert experiment.model.system_prompt == text
    assert experiment.variables["v"] == text and experiment.safety.suites[0].where == {"label": text}


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$"), min_size=1, max_size=30))
def test_any_text_is_taken_letter_by_letter(text):
    if text.strip() not in ("", "null"):
        assert config.load(None, [f"model.system_prompt={text}"]).model.system_prompt == text


def test_null_and_nothing_are_none_where_there_may_be_none():
    assert config.load(None, ["model.system_prompt=null"]).model.system_prompt is None
    assert config.load(None, ["model.system_prompt="]).model.system_prompt is None
    assert config.load(None, ["safety.limits.max_over_refusal_rise=null"]).safety.limits.max_over_refusal_rise is None
    with pytest.raises(ConfigError, match="the text is empty"):
        config.load(None, ["task.data="])


def test_names_and_folders_of_the_command_line():
    assert config.load(None, ["name=2024"]).name == "2024"
    assert config.load(None, ["output.dir=runs/try #2"]).output.dir == "runs/try #2"
    assert config.load(None, ["output.dir=~/x"]).output.dir == os.path.expanduser("~/x")


def test_what_is_a_text_or_more():
    assert config.load(None, ["safety.judge=llm"]).safety.judge == "llm"
    assert config.load(None, ["safety.judge={name: refusal, list: xstest}"]).safety.judge == {"name": "refusal", "list": "xstest"}
    assert config.load(None, ["recipes.0=[ema]"]).recipe_names[0] == "ema" == config.load(None, ["recipes.0.0=ema"]).recipe_names[0]
    suites = config.load(None, ["safety.suites.0.attack=[direct, prefill]"]).safety.suites
    assert [suite.attack for suite in suites[:2]] == ["direct", "prefill"]
    assert config.load(None, ["monitor.on_breach=add safegrad"]).monitor.on_breach.add == "safegrad"


@pytest.mark.parametrize(("text", "expected"), [
    ("search.trials=3 # three", "would be a comment of YAML and lost"),
    ("search.space.learning_rate=#1", "would be a comment of YAML and lost"),
    ("model.nmae=a: b", "did you mean 'model.model_name_or_path'|unknown key 'model.nmae'"),
    ("serch.trials=3", "did you mean 'search'"),
    ("search.trials.x=3", "holds no 'x'"),
    ("safety.judge={name", "not valid YAML"),
    ("model.system_prompt=\udcff", "half of a character"),
    ("deepspeed.x=a: b: c", "wants quotes of its own"),
    ("safety.suites.\u00b2.limit=3", "no"),
    ("x" * 5000 + "=1", "no key has 5000 characters"),
    ("safety.suites." + "9" * 250 + ".limit=3", "is no index of a list of"),
])  # fmt: skip
def test_overrides_that_are_refused(text, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        config.load(None, [text])
    assert len(str(caught.value)) < 1000


def test_a_key_below_a_plain_value_loses_nothing_in_silence(tmp_path):
    assert "safety.judge is 'llm' here" in refused(tmp_path, "safety: {judge: llm}", "safety.judge.model=x")


# ------------------------------------------------------------------------------------------------ texts that are no paths


def test_a_long_template_in_one_line_is_no_file(tmp_path):
    (tmp_path / "e.yaml").write_text("model: {chat_template: \"" + LONG + "\"}")
    assert config.load(tmp_path / "e.yaml").model.chat_template == LONG


@pytest.mark.parametrize("key", [
    "model.model_name_or_path", "model.unaligned_name_or_path", "model.chat_template", "task.data", "task.eval_data", "safety.data",
    "safety.harmful_data", "safety.suites.0.data", "safety.suites.0.local",
])  # fmt: skip
@pytest.mark.parametrize("text", ["x" * 300, "y/" * 3000, LONG, "/etc/passwd/x"])
def test_long_texts_are_looked_for_in_peace(key, text):
    dumped = config.load(None, [f"{key}={text}"]).model_dump()
    for part in key.split("."):
        dumped = dumped[int(part)] if part.isdigit() else dumped[part]
    assert dumped == text


@pytest.mark.parametrize("text", ["x" * 300, "a\0b", "\udc80", "/etc/passwd/x", "~nosuchuser42/x", "", "a\nb"])
def test_no_path_is_no_error(text):
    assert not paths.is_file(text) and not paths.is_folder(text) and (text == "" or not paths.exists(text))


# ------------------------------------------------------------------------------------------------ seeds


def test_seeds_stay_what_they_are_while_they_fit():
    assert [seeds.of_32_bits(n) for n in (0, 1, 2**32 - 1)] == [0, 1, 2**32 - 1]
    assert seeds.of_64_bits(2**63 - 1) == 2**63 - 1


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, seeds.LARGEST), st.integers(0, 200), st.integers(0, 10**9))
def test_every_seed_of_a_search_fits(seed, position, turn):
    import numpy

    numpy.random.RandomState(seeds.of_32_bits((seed * 1009 + position) * 100_003 + turn))


@pytest.mark.parametrize("seed", [42, 43, 2**31 - 1])
@pytest.mark.parametrize("name", ["tpe", "gp", "random", "nsga2"])
def test_samplers_take_any_seed(name, seed):
    from orchestrator.search import studies

    studies.make_sampler(name, (seed * 1009 + 3) * 100_003 + 17, 10)


def test_torch_takes_every_seed_of_a_trial():
    from orchestrator.trial import train

    train.seed_everything(seeds.LARGEST, 10**9, 4096)


def test_a_preset_may_share_its_name_with_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    assert config.load("pocket").name == "pocket"
    with pytest.raises(UnknownNameError, match="did you mean 'pocket'"):
        config.load("poket")


def test_reading_a_config_imports_nothing_heavy():
    code = "import sys; from orchestrator import config; config.load(None, ['search.trials=3']); print([m for m in ('torch', 'ray', 'transformers', 'optuna') if m in sys.modules])"  # noqa: E501
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
