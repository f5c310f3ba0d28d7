"""Damaged configs of every kind, as values, as text and on the command line: an experiment, or one sentence; nothing else ever comes out.

SAFEBASIN_FUZZ_EXAMPLES sets how many mutations each test tries, SAFEBASIN_FUZZ_SEED which ones; the same numbers try the same ones.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import string
import sys
import types
import typing

import pytest
import tiny_llama
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from orchestrator import config
from orchestrator.config import text as config_text
from orchestrator.config import yaml_text
from orchestrator.errors import SafebasinError
from orchestrator.experiment import checks

EXAMPLES = int(os.environ.get("SAFEBASIN_FUZZ_EXAMPLES", "120"))
SEED = int(os.environ.get("SAFEBASIN_FUZZ_SEED", "0"))
TOO_LONG_S = 120
few = settings(deadline=None, max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
fewer = settings(few, max_examples=max(20, EXAMPLES // 10))


def keys(cls: type[BaseModel] = config.Experiment, prefix: str = "") -> list[str]:
    """Every dotted key, list items by their first index."""
    found = []
    for name, field in cls.model_fields.items():
        found.append(prefix + name)
        todo = [(field.annotation, prefix + name)]
        while todo:
            annotation, path = todo.pop()
            origin = typing.get_origin(annotation)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                found += keys(annotation, f"{path}.")
            elif origin in (tuple, list):
                found.append(f"{path}.0")
                todo.append((typing.get_args(annotation)[0], f"{path}.0"))
            elif origin in (typing.Union, types.UnionType):
                todo += [(part, path) for part in typing.get_args(annotation)]
            elif origin is dict:
                found.append(f"{path}.x")
    return sorted(set(found))


MORE = [
    "deepspeed.zero_optimization", "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.offload_optimizer", "deepspeed.optimizer",
    "deepspeed.zero_optimization.offload_optimizer.device", "deepspeed.fp16", "deepspeed.bf16.enabled", "deepspeed.train_batch_size",
    "deepspeed.flops_profiler", "deepspeed.scheduler", "search.space.learning_rate", "search.space.learning_rate.low",
    "search.space.learning_rate.high", "search.space.lora.lora_r", "search.space.safegrad.rho", "safety.judge.name", "safety.judge.list",
    "safety.judge.model", "safety.second_judge.name", "recipes.0.0.lora", "recipes.0.0.lora.lora_r", "recipes.0.0.lora.target_modules",
    "recipes.0.0.lora.layers", "recipes.0.0.safegrad.rho", "monitor.on_breach.add", "monitor.quick.every_steps", "safety.external.0.name", "nope",
    "search.nope", "recipes.9", "safety.suites.99.name", "", ".", "a..b",
]  # fmt: skip
KEYS = keys() + MORE
WORDS = [
    "pocket", "pocket:safety", "pocket:nope", "llm", "auto", "none", "null", "yes", "on", "1e3", "0x10", "010", "1:30", "2024-01-01", ".inf", ".nan",
    "~", "~/x", "~nosuchuser/x", "/", ".", "..", "/dev/zero", "/etc/passwd/x", "s3://b/x", "s3://u:p@b/x", "file:///x", "ray://x", "hdfs://",
    "a[red]",
    "[INST]", "[/b]", "{x}", "${HOME}", "${NOPE}", "$HOME", "#x", "a #b", "a: b", "- a", "*a", "&a", "!!python/object:os.system x", "%20", "a%20b",
    "advbench", "helm_safety", "xstest", "add safegrad", "add nope", "add ", "sdpa", "spda", "lora", "full", "safegrad", "nope", "x" * 300,
    "x" * 70_000,
    "a\nb", "a\tb", "a\0b", "\ud83d", "\u2028", "\u202e", "\x1b[31m", "{{ 1/0 }}", "{% for i in %}", "{{ messages[0].content }}", "hf_" + "a" * 30,
    "=",
    "", " ", "x ", "a.b", "a/b", "a\\b", "package.module:function", "os:system", "os.path:join", "pocket.nope:f", "-1", "9" * 5000, "٣", "²",
]  # fmt: skip
ODD = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 2**31, 2**63, 10**30, 10**400, [], {},
    [[]],
    [None], [0], [1, 1], ["a", "a"], [["lora"]], [["lora", "full"]], [[{}]], [[{"lora": 3}]], [[{"lora": {"lora_r": [0]}}]], {"a": 1}, {"name": 3},
    {"name": "refusal", "nope": 1}, {"low": 1}, {"low": -1, "high": 1}, {"low": 2, "high": 1, "log": True}, {"choices": []}, {"choices": [None]},
    {"choices": [[1]]}, {"type": "int", "low": 0.5, "high": 1e300}, {"step": 0, "low": 0, "high": 1}, {"add": "nope"}, {"add": {}}, {1: 2}, {None: 1},
    {"x" * 300: 1}, ("a",), b"a", {"stage": "auto"}, {"enabled": "auto"}, {"device": "nvme"}, [{"name": "a", "data": "b"}] * 3,
    [{"name": "a", "data": "helm_safety", "attack": ["direct", "nope"]}], [{"name": "a", "data": "pocket:harmful", "attack": [3]}],
    {"messages": 3}, {"password": "hunter2"}, {"name": "llm", "model": "x", "timeout": "x"}, {"name": "refusal", "phrases": [3]},
    {"name": "majority", "judges": [{"name": "refusal"}, 3]}, {"name": "hf_classifier", "model": "x" * 300, "template": "y" * 300},
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(ODD), st.sampled_from(WORDS), st.integers(), st.floats(), st.text(max_size=40),
    st.recursive(
        st.sampled_from([*ODD, *WORDS]), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a tiny model, rows, suites and the config of a small experiment with them; a cache where the pocket world was never built."""
    where = tmp_path_factory.mktemp("fuzz")
    tiny_llama.saved(where / "tiny")
    words = tiny_llama.WORDS
    rows = [{"prompt": f"{words[i]} {words[i + 1]} {words[i + 2]}", "response": words[i + 3]} for i in range(24)]
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    safe = [{"prompt": f"{words[i + 2]} {words[i]}", "response": "I am sorry, I cannot help with that."} for i in range(12)]
    (where / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in safe))
    (where / "asked.txt").write_text("\n".join(f"{words[i + 4]} {words[i + 9]} {words[i]}" for i in range(12)))
    (where / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    (where / "e.yaml").write_text(
        "model: {model_name_or_path: tiny}\ntask: {data: rows.jsonl, max_length: 64, max_new_tokens: 4}\n"
        "safety:\n  data: safe.jsonl\n  suites: [{name: asked, data: asked.txt}]\n  judge: refusal\nrecipes: [[full], [lora]]\ndeepspeed: ds.json\n"
    )
    patch = pytest.MonkeyPatch()
    patch.setenv("SAFEBASIN_CACHE", str(where / "cache"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.chdir(where)
    yield where
    patch.undo()


def one_sentence(call) -> None:
    """Nothing, or a SafebasinError a user can read."""

    def late(*_):
        raise AssertionError(f"takes more than {TOO_LONG_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(TOO_LONG_S)
    try:
        call()
    except SafebasinError as error:
        said = str(error)
        assert said.strip() and "Traceback" not in said and "pydantic" not in said and len(said) < 20_000, said
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put(raw, key: str, value) -> None:
    """Set a dotted key in nested plain values, as far as that goes."""
    parts = key.split(".")
    node = raw
    for here, following in zip(parts, parts[1:], strict=False):
        if isinstance(node, list):
            if not here.isdigit() or not node:
                return
            position = min(int(here), len(node) - 1)
            if not isinstance(node[position], dict | list):
                node[position] = {}
            node = node[position]
        else:
            if not isinstance(node.get(here), dict | list):
                node[here] = [{}] if following.isdigit() else {}
            node = node[here]
    if isinstance(node, list):
        node[:] = [value, *node[1:]]
    else:
        node[parts[-1]] = value


def damaged(text: str, rng: random.Random) -> str:
    """Lines doubled, moved, cut; characters and odd words put in."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randint(0, 7):
            case 0:
                lines.insert(to, lines[at])
            case 1:
                lines[at], lines[to] = lines[to], lines[at]
            case 2:
                lines[at] = lines[at][: rng.randint(0, len(lines[at]))]
            case 3:
                lines[at] = " " * rng.randint(0, 5) + lines[at].lstrip()
            case 4:
                place = rng.randint(0, len(lines[at]))
                lines[at] = lines[at][:place] + rng.choice([*WORDS, *"[]{}:,#&*!|>'\"%@`-? \t\0\x85\ufeff", "<<: ", "&a ", "*a", "? ", "--- ", "..."]) + lines[at][place:]  # noqa: E501
            case 5 if ":" in lines[at]:
                lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(WORDS)
            case 6 if lines[at]:
                place = rng.randrange(len(lines[at]))
                lines[at] = lines[at][:place] + rng.choice(string.printable) + lines[at][place + 1 :]
            case _:
                lines = lines[: rng.randint(1, len(lines))]
        text = "\n".join(lines)
    return text


def texts(where) -> list[str]:
    """What is damaged: the small experiment, the presets, and a config with everything written out."""
    shipped = [path.read_text() for path in config_text.presets().values()]
    return [(where / "e.yaml").read_text(), *shipped, config.dump_yaml(config.load(where / "e.yaml")), config.dump_yaml(config.load())]


def test_what_is_damaged_here_is_whole_before(places):
    found = checks.check(config.load(places / "e.yaml"))
    assert found.num_layers == 3 and any("24 training rows" in line or "training rows" in line for line in found.facts)
    for text in texts_of(places):
        (places / "whole.yaml").write_text(text)
        config.load(places / "whole.yaml")


@seed(SEED)
@few
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_values(places, changes):
    def call():
        raw = config.Experiment().model_dump(mode="json")
        for key, value in changes:
            put(raw, key, copy.deepcopy(value))
        checks.check(config.from_dict(raw), build_pocket=False)

    one_sentence(call)


@seed(SEED)
@few
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_values_in_a_file(places, changes):
    """As YAML writes them, so that what is read goes through variables and paths too."""
    raw = yaml.safe_load((places / "e.yaml").read_text())
    for key, value in changes:
        put(raw, key, copy.deepcopy(value))
    try:
        text = yaml.dump(raw, allow_unicode=True)
        (places / "values.yaml").write_text(text)
    except (ValueError, yaml.YAMLError):  # what no YAML file can hold, a number of thousands of digits or half a character, is met elsewhere
        return
    one_sentence(lambda: config.load(places / "values.yaml"))


@seed(SEED)
@few
@given(number=st.integers(0, 2**40))
def test_damaged_texts(places, number):
    rng = random.Random(number)
    body = damaged(rng.choice(texts_of(places)), rng).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = rng.randint(0, len(body))
        body = body[:at] + bytes([rng.randrange(256)]) + body[at:]
    (places / "damaged.yaml").write_bytes(body)

    def call():
        found = config.load(places / "damaged.yaml")
        assert config.from_dict(yaml_text.parse(config.dump_yaml(found), "dump")) == found
        if checks.uses_pocket(found) and not checks.pocket_built():
            checks.check(found, build_pocket=False)

    one_sentence(call)


_texts: dict = {}


def texts_of(where) -> list[str]:
    if where not in _texts:
        _texts[where] = texts(where)
    return _texts[where]


@seed(SEED)
@few
@given(words=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(WORDS) | st.text(max_size=60)), min_size=1, max_size=4), file=st.booleans())
def test_overrides(places, words, file):
    def call():
        found = config.load(places / "e.yaml" if file else None, [f"{key}={value}" for key, value in words])
        if not file:
            checks.check(found, build_pocket=False)

    one_sentence(call)


@seed(SEED)
@fewer
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(WORDS) | st.text(max_size=30)), max_size=2), number=st.integers(0, 2**40))
def test_validate_as_it_is_typed(places, changes, number):
    """The whole command with a real model and real files: an exit code that is known, and no traceback."""
    from orchestrator import cli
    from orchestrator.terminal import crash

    text = (places / "e.yaml").read_text()
    text = damaged(text, random.Random(number)) if number % 3 == 0 else text
    (places / "typed.yaml").write_text(text, errors="replace")
    words = [f"{key}={value}" for key, value in changes if "\0" not in value]
    crashed: list[BaseException] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["safebasin", "validate", "-c", "typed.yaml", *words])
    patch.setattr(crash, "_crashed", lambda error, how: crashed.append(error))

    def call():
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code in (0, 1, 2)

    try:
        one_sentence(call)
    finally:
        patch.undo()
    assert not crashed, (words, crashed)
