"""Settings of the right kind that mean nothing: refused with rule, value and remedy before a device is taken."""

from __future__ import annotations

import pytest
import tiny_llama

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.experiment import checks, checks_settings
from orchestrator.search import spaces
from strategies import recipe
from strategies.base import StrategyError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_llama.saved(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize(("override", "expected"), [
    ("training.learning_rate=.inf", "no finite number"),
    ("training.learning_rate=1e9", "at most 10"),
    ("training.learning_rate=-1", "greater than 0"),
    ("training.num_train_epochs=.inf", "no finite number"),
    ("training.num_train_epochs=1e300", "at most 10000"),
    ("search.trials=1000000000", "at most 100000"),
    ("ray.num_workers=1000000000", "at most"),
    ("ray.cpus_per_worker=.nan", "no finite number"),
    ("task.max_length=1000000000000", "at most"),
    ("search.time_budget_s=1e300", "at most"),
    ("model.dtype=float31", "float32"),
    ("safety.suites.0.limit=99999999999", "at most"),
])  # fmt: skip
def test_numbers_nobody_means(override, expected):
    with pytest.raises(ConfigError, match=expected):
        config.load(None, [override])


def test_every_number_of_a_config_is_bounded():
    """Found by walking the schema, so that a new field cannot be forgotten."""
    open_ended = []
    for section, definition in {"Experiment": config.json_schema(), **config.json_schema()["$defs"]}.items():
        for key, field in definition.get("properties", {}).items():
            for option in [field, *field.get("anyOf", [])]:
                if option.get("type") in ("integer", "number") and not ({"maximum", "exclusiveMaximum"} & set(option)):
                    open_ended.append(f"{section}.{key}")
                if option.get("type") in ("integer", "number") and not ({"minimum", "exclusiveMinimum"} & set(option)):
                    open_ended.append(f"{section}.{key}")
    assert open_ended == []


@pytest.mark.parametrize(("items", "expected"), [
    ([("lora", {"lora_r": 10**9})], "beyond 16384"),
    ([("lora", {"lora_r": [0]})], "not a whole number"),
    ([("lora", {"lora_alpha": -5})], "must be above 0"),
    ([("lora", {"target_modules": []})], "names no module"),
    ([("lora", {"lora_alpha": float("inf")})], "not a number"),
    ([("lora", {"lora_alpha": "nan"})], "not a number"),
    ([("lora", {"layers": "0-999999999"})], "not a list of layers"),
    ([("lora", {"layers": [-1]})], "not a list of layers"),
    ([("safegrad", {"rho": True})], "not a number"),
    ([("safegrad", {"num_safety": 10**12})], "beyond"),
    ([("perturbation", {"seed": -1})], "negative"),
])  # fmt: skip
def test_knobs_nobody_means(items, expected):
    with pytest.raises(StrategyError, match=expected):
        recipe.build(items)


def test_no_knob_takes_what_is_no_finite_number():
    import dataclasses
    import typing

    import strategies

    for name in strategies.STRATEGIES:
        hints = typing.get_type_hints(strategies.get(name).Config)
        for field in dataclasses.fields(strategies.get(name).Config):
            if {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}:
                for value in (float("nan"), float("inf"), True, "x", 10**30):
                    with pytest.raises(StrategyError):
                        recipe.build([(name, {field.name: value})])


@pytest.mark.parametrize(("space", "expected"), [
    ({"learning_rate": {"low": -1e-3, "high": 1e-3}}, "learning_rate reaches -0.001"),
    ({"learning_rate": {"low": 0, "high": 1e-3, "log": True}}, "learning_rate"),
    ({"learning_rate": {"low": 1e-3, "high": 1e-4}}, "learning_rate"),
    ({"learning_rate": {"low": 1e-4, "high": 1e4}}, "reaches 10000.0"),
    ({"learning_rate": -1}, "reaches -1"),
    ({"lora.lora_r": {"choices": [0, 8]}}, "holds 0, which cannot be used: lora.lora_r=0 must be at least 1"),
    ({"lora.lora_r": {"choices": [8, 8]}}, "repeats a value"),
    ({"lora.lora_r": {"choices": [8], "low": 2}}, "low would be ignored"),
    ({"safegrad.rho": {"low": -2.0, "high": 1.0}}, "holds -2.0, which cannot be used"),
    ({"safegrad.rho": {"low": 0.1, "high": 1.0, "log": "no"}}, "neither true nor false"),
    ({"safegrad.rho": 1e300}, "beyond"),
])  # fmt: skip
def test_search_ranges_no_trial_could_run_with(space, expected):
    experiment = config.from_dict({"recipes": [["lora"], ["safegrad"]], "search": {"space": space}})
    with pytest.raises(ConfigError, match=expected):
        spaces.resolve_space(experiment, 4)


def test_a_learning_rate_whose_own_range_leaves_what_is_allowed():
    experiment = config.from_dict({"recipes": [["lora"]], "training": {"learning_rate": 5.0}})
    with pytest.raises(ConfigError, match="the search around training.learning_rate reaches"):
        spaces.resolve_space(experiment, 4)


def test_attention_and_escalation_are_names_that_there_are():
    with pytest.raises(ConfigError, match="unknown model.attn_implementation 'spda'; did you mean 'sdpa'"):
        checks.check_names(config.load(None, ["model.attn_implementation=spda"]))
    for name in ("sdpa", "eager", "flash_attention_2", "kernels-community/flash-attn"):
        checks.check_names(config.load(None, [f"model.attn_implementation={name}"]))
    with pytest.raises(ConfigError, match="unknown strategy in monitor.on_breach.add 'nope'"):
        checks.check_names(config.load(None, ["monitor.on_breach=add nope"]))
    with pytest.raises(ConfigError, match="monitor.on_breach.add: unknown knob of safegrad"):
        checks.check_names(config.load(None, ["monitor.on_breach={add: {safegrad: {rhoo: 1}}}"]))
    assert "never acts" in checks_settings.idle_monitor(config.load(None, ["monitor.on_breach=stop", "monitor.every_steps=0"]))[0]
    assert not checks_settings.idle_monitor(config.load(None, ["monitor.on_breach=stop", "monitor.every_steps=10"]))


@pytest.mark.parametrize(("knobs", "expected"), [
    ({"target_modules": "nope"}, "unknown module in lora.target_modules 'nope'"),
    ({"target_modules": "q_proj, v_prj"}, "did you mean .*'v_proj'"),
    ({"target_modules": ["lm_head"]}, "unknown module in lora.target_modules 'lm_head'"),
    ({"lora_r": 5000}, "lora.lora_r=5000: the model is .* wide"),
])  # fmt: skip
def test_adapters_that_fit_no_part_of_the_model(tiny, knobs, expected):
    experiment = config.from_dict({"model": {"model_name_or_path": tiny}, "recipes": [[{"lora": knobs}]]})
    with pytest.raises(ConfigError, match=expected):
        checks_settings.check_adapters(experiment)


def test_adapters_that_fit(tiny):
    for knobs in ({"target_modules": "q_proj,v_proj"}, {"target_modules": ["up_proj"], "lora_r": 4}, {}):
        checks_settings.check_adapters(config.from_dict({"model": {"model_name_or_path": tiny}, "recipes": [[{"lora": knobs}]]}))
    searched = {"model": {"model_name_or_path": tiny}, "recipes": [["lora"]], "search": {"space": {"lora.lora_r": {"choices": [4, 5000]}}}}
    with pytest.raises(ConfigError, match="lora.lora_r=5000"):
        checks_settings.check_adapters(config.from_dict(searched))


@pytest.mark.parametrize(("setting", "expected"), [
    ({"name": "refusal", "phrases": [3]}, "phrases=\\[3\\] of the judge 'refusal_phrases'"),
    ({"name": "refusal", "window": True}, "a number is wanted"),
    ({"name": "llm", "model": "x", "timeout": "soon"}, "a number is wanted"),
    ({"name": "llm", "model": "x", "timeout": float("inf")}, "finite"),
    ({"name": "llm", "model": 3}, "a text is wanted"),
    ({"name": "llm", "model": "x", "concurrency": 10**9}, "not between 0 and 1,000,000"),
    ({"name": "llm", "model": "x", "rubric": "y" * 300}, "a rubric is a text"),
    ({"name": "hf_classifier", "model": "x", "threshold": True}, "a number is wanted"),
    ({"name": "majority", "judges": 3}, "cannot be made of"),
    ({"name": "majority", "judges": [3, 4]}, "3 names no judge"),
])  # fmt: skip
def test_options_of_judges_are_of_their_kind(setting, expected):
    from orchestrator.evaluation.judges import registry

    with pytest.raises(ConfigError, match=expected):
        registry.from_setting(setting)


@pytest.mark.parametrize("name", ["a%20b", "try #2", "a?b"])
def test_mlflows_database_is_not_put_where_mlflow_looks_elsewhere(tmp_path, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checks_settings.check_database(config.load(None, [f"output.dir={tmp_path}/{name}"]))  # the database lies beside the folder
    below = f"output.dir={tmp_path}/{name}/run"
    with pytest.raises(ConfigError, match="in a path as a sign of an address; name output.dir below a folder without it"):
        checks_settings.check_database(config.load(None, [below]))
    for other in ("tracking.enabled=false", "tracking.uri=http://127.0.0.1:1", f"tracking.uri=sqlite:///{tmp_path}/m.db?timeout=30"):
        checks_settings.check_database(config.load(None, [below, other]))


def test_the_pocket_models_depth_is_known():
    from orchestrator.pocket.train import Shape

    assert Shape().layers == checks_settings.POCKET_LAYERS


def test_what_does_not_wait_for_the_pocket_world(tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path))
    for override, expected in (
        ("model.chat_template={{ 1/0 }}", "divides by zero"), ("search.space.learning_rate={low: -1, high: 1}", "reaches -1"),
        ("search.space.nope=1", "unknown parameter in search.space"), ("model.model_name_or_path=./nope", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=expected):
            checks.check(config.load(None, [override]), build_pocket=False)
    with pytest.raises(ConfigError, match="unknown module in lora.target_modules"):
        written = [f"task.{key}=pocket:obey" for key in ("data", "eval_data")] + ["safety.data=pocket:safety", "safety.suites.0.data=pocket:harmful"]
        odd = [f"model.model_name_or_path={tiny}", "recipes=[[{lora: {target_modules: nope}}]]", *written]
        checks.check(config.load(None, odd), build_pocket=False)
    assert checks.check(config.load(), build_pocket=False).num_layers is None and not list(tmp_path.iterdir())
