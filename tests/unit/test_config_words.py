"""What pydantic refuses is told in plain words, once for each key, with what to write instead."""

from __future__ import annotations

import pytest

from orchestrator import config
from orchestrator.config import yaml_text
from orchestrator.errors import ConfigError


@pytest.mark.parametrize(("override", "said"), [
    ("recipes=[full]", "write [[full]] instead of [full]"),
    ("recipes=full", "recipes: a list of recipes is wanted"),
    ("recipes=[]", "recipes: at least 1 must be named"),
    ("recipes=[[null]]", "recipes.0.0: the name of a strategy or {name: {knob: value}} is wanted"),
    ("recipes=[[{lora: 3}]]", "recipes.0.0.lora: a mapping is wanted"),
    ("recipes=[[full],[full]]", "recipes 1 and 2 are the same"),
    ("recipes=[[full],[{full: {}}]]", "recipes 1 and 2 are the same"),
    ("recipes=[" + ",".join(["[full]"] * 1001) + "]", "1,001 recipes"),
    ("search.seeds=2.0", "write 3 or [0, 1, 2]"),
    ("search.seeds=[]", "search.seeds: at least 1"),
    ("monitor.on_breach=nope", "log, stop, rollback or add <strategy> is wanted"),
    ("monitor.on_breach={add: [a]}", "monitor.on_breach.add: the name of a strategy"),
    ("safety.judge=[refusal]", "safety.judge: the name of a judge or"),
    ("name=a b", "letters a-z and A-Z, digits"),
    ("safety.suites=[{name: a/b, data: x}]", "a name may hold no slash"),
    ("safety.suites=[{name: a, data: x, where: {label: 1}}]", "where.label: a text is wanted; put it in quotes"),
    ("safety.suites=[{name: a, data: x}, {name: A, data: x}]", "repeats a name"),
    ("search=null", "search: a mapping of keys is wanted"),
    ("deepspeed=", "deepspeed: the text is empty"),
    ("output.dir=null", "would be a folder of that name"),
    ("output.dir=a/{name", "a brace { or } stands alone"),
    ("variables.a=${a}", "which is itself"),
    ("training.learning_rate=-1", "it must be greater than 0"),
    ("search.trials=2.5", "a whole number is wanted"),
])  # fmt: skip
def test_plain_words(override, said):
    with pytest.raises(ConfigError) as caught:
        config.load(None, [override])
    told = str(caught.value)
    assert said in told and "\n" not in told
    assert not any(word in told for word in ("Input should", "tuple", "String should", "literal[", "validation"))


def test_a_wrong_key_of_a_choice_is_told_alone():
    with pytest.raises(ConfigError) as caught:
        config.load(None, ["monitor.on_breach={addd: x}"])
    assert "did you mean add?" in str(caught.value) and "log, stop" not in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [
    ("l: [" + ",".join(["&a " + "x" * 50_000] + ["*a"] * 20_000) + "]", "10,000,000 characters"),
    ("l: [" + ",".join(["&a {" + "x" * 900 + ": 1}"] + ["*a"] * 20_000) + "]", "10,000,000 characters"),
    ('name: "\\UFFFFFFFF"', "stands for no character"),
    ('name: "\\U00110000"', "stands for no character"),
    ("<<: {a: 1}\n<<: {b: 1}\n", "`<<` stands twice"),
    ("x: {<<: {a: 1}, <<: {a: 1}}\n", "`<<` stands twice"),
], ids=range(6))  # fmt: skip
def test_yaml_that_grows_or_stands_for_nothing(text, said):
    with pytest.raises(ConfigError) as caught:
        yaml_text.parse(text, "c.yaml")
    assert said in str(caught.value)
