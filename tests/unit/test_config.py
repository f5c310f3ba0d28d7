"""Config: text in, validated experiment out; every mistake a sentence that names the key and the remedy."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.config import yaml_text
from orchestrator.errors import ConfigError, UnknownNameError


def load_text(tmp_path, text, *overrides):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    return config.load(path, overrides)


def test_without_a_file_the_pocket_preset():
    experiment = config.load()
    assert experiment.name == "pocket" and len(experiment.recipes) == 5
    assert 0.05 <= experiment.safety.limits.max_degradation <= 0.10
    assert 0.10 <= experiment.safety.limits.max_over_refusal_rise <= 0.15


def test_dotted_names_scripts_rely_on():
    experiment = config.load(None, [
        "model.model_name_or_path=some/model", "task.data=x.jsonl", "safety.limits.max_degradation=0.02", "safety.judge=exact",
        "recipes=[[full], [freeze_layers, lora]]", "search.trials=3", "search.sampler=random", "search.seeds=2",
        "deepspeed.zero_optimization.stage=2", "ray.num_workers=2", "ray.use_gpu=true", "tracking.uri=sqlite:///x.db", "output.dir=out",
    ])  # fmt: skip
    assert experiment.recipe_names == ("full", "freeze_layers+lora")
    assert experiment.search.seeds == (0, 1) and experiment.zero_stage == 2 and experiment.ray.use_gpu is True
    assert experiment.model_dump()["output"]["dir"] == "out"


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", "3.0e-4", ".3e-3"])
def test_scientific_notation_is_a_number(tmp_path, text):
    assert load_text(tmp_path, f"training: {{learning_rate: {text}}}").training.learning_rate == 3e-4
    assert config.load(None, [f"training.learning_rate={text}"]).training.learning_rate == 3e-4


@settings(deadline=None)
@given(st.floats(min_value=1e-12, max_value=1e12, allow_nan=False))
def test_any_float_survives_yaml(value):
    assert yaml_text.parse(f"a: {value!r}", "x")["a"] == value


@settings(deadline=None)
@given(st.text(alphabet=string.ascii_letters + "_", min_size=1, max_size=12))
def test_words_stay_words(word):
    if word.lower() not in {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}:
        assert yaml_text.parse(f"a: {word}", "x")["a"] == word


@pytest.mark.parametrize(("text", "expected"), [
    ("serch: {trials: 3}", "did you mean search"),
    ("search: {trails: 3}", "did you mean trials"),
    ("search: {learning_rate: 1}", "did you mean training.learning_rate"),
    ("training: {learning_rate: fast}", "training.learning_rate"),
    ("search: {trials: 0}", "search.trials"),
    ("recipes: [[]]", "for plain fine-tuning write [full]"),
    ("recipes: [[{lora: {lora_r: 4}, full: {}}]]", "one name"),
    ("safety: {suites: [{name: a}]}", "data is required"),
    ("safety: {suites: [{name: a, data: x}, {name: a, data: y}]}", "repeats a name"),
    ("safety: {limits: {max_degradation: 2}}", "safety.limits.max_degradation"),
    ("search: {seeds: [1, 1]}", "repeats a seed"),
    ("a: [1", "not valid YAML"),
    ("- a", "not a mapping"),
    ("deepspeed: missing.json", "missing.json"),
])  # fmt: skip
def test_mistakes_are_sentences(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    assert expected in str(caught.value) and "pydantic" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, "search: {trials: 0, trails: 1}\ntraining: {max_steps: -1}")
    assert len(str(caught.value).splitlines()) == 3


def test_missing_files_and_presets():
    with pytest.raises(ConfigError, match="does not exist"):
        config.load("nowhere/e.yaml")
    with pytest.raises(UnknownNameError, match="did you mean 'pocket'"):
        config.load("poket")


@pytest.mark.parametrize("text", ["trials", "=3", "safety.suites.99.limit=1", "safety.suites.x.limit=1"])
def test_bad_overrides(text):
    with pytest.raises(ConfigError):
        config.load(None, [text])


def test_an_index_may_refer_to_a_default_list(tmp_path):
    experiment = load_text(tmp_path, "name: x", "safety.suites.0.limit=7")
    assert experiment.safety.suites[0].limit == 7 and experiment.safety.suites[0].data == "pocket:harmful"


def test_relative_paths_start_at_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    experiment = load_text(tmp_path, "task: {data: rows.jsonl}\ndeepspeed: ds.json")
    assert experiment.task.data == str(tmp_path / "rows.jsonl") and experiment.zero_stage == 1


def test_resolved_yaml_reads_back_equal(tmp_path):
    experiment = config.load(None, ["training.learning_rate=3e-5", "recipes=[[full],[{lora: {lora_r: 4}}],[lora]]"])
    assert load_text(tmp_path, config.dump_yaml(experiment)) == experiment
    assert experiment.recipe_names == ("full", "lora", "lora#2")


def test_digest_ignores_where_and_notices_what():
    base = config.load()
    assert base.digest() == config.load(None, ["output.dir=elsewhere", "ray.lanes=1", "tracking.enabled=false"]).digest()
    assert base.digest() != config.load(None, ["training.weight_decay=0.1"]).digest()
    assert base.digest() != config.load(None, ["ray.num_workers=2"]).digest(), "twice the rows per step"


def test_every_field_is_documented_in_the_schema():
    schema = config.json_schema()
    bare = []
    for name, definition in {"Experiment": schema, **schema["$defs"]}.items():
        for key, field in definition.get("properties", {}).items():
            is_section = "$ref" in field or any("$ref" in option for option in field.get("allOf", []))
            if not field.get("description") and not is_section:
                bare.append(f"{name}.{key}")
    assert not bare
