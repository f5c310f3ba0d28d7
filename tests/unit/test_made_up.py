"""Made-up data is named wherever figures are, and never meets somebody's own model unless it was written out."""

from __future__ import annotations

import json

import made_up as results
import pytest
import tiny_llama
from typer.testing import CliRunner

from orchestrator import cli, config
from orchestrator.data import made_up
from orchestrator.decision import selection as decision_selection
from orchestrator.errors import ConfigError, ModelError
from orchestrator.experiment import checks
from orchestrator.pocket import likeness
from orchestrator.pocket import tokens as pocket_tokens
from orchestrator.pocket.world import world
from orchestrator.report import run as report


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    """A model that is not the made-up world's."""
    return str(tiny_llama.saved(tmp_path_factory.mktemp("own") / "model"))


@pytest.fixture(scope="module")
def descendant(tmp_path_factory) -> str:
    """A folder with the made-up world's tokenizer, as a model trained from it has."""
    folder = tmp_path_factory.mktemp("descendant")
    pocket_tokens.build_tokenizer(world()).save_pretrained(folder)
    return str(folder)


def data(folder) -> dict[str, str]:
    for name in ("task", "safety", "harm"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return {name: str(folder / f"{name}.jsonl") for name in ("task", "safety", "harm")}


def test_a_model_of_ones_own_without_data_of_ones_own_is_refused(own):
    with pytest.raises(ConfigError) as caught:
        checks.check(config.load(None, [f"model.model_name_or_path={own}"]))
    for told in (own, "task.data is pocket:obey", "safety.data is pocket:safety", "safety.suites is pocket:harmful", "safety.suites=[...]"):
        assert told in str(caught.value)


def test_every_key_nobody_wrote_is_named_and_no_other(own, tmp_path):
    known = data(tmp_path)
    suites = f"safety.suites=[{{name: harm, data: {known['harm']}}}]"
    given = [f"model.model_name_or_path={own}", f"task.data={known['task']}", "task.eval_data=null", f"safety.data={known['safety']}", suites]
    assert made_up.strayed(config.load(None, given)) == {}
    for missing, key in ((1, "task.data"), (2, "task.eval_data"), (3, "safety.data"), (4, "safety.suites")):
        assert set(made_up.strayed(config.load(None, given[:missing] + given[missing + 1 :]))) == {key}
    body = {"model": {"model_name_or_path": own}, "task": {"data": known["task"]}}
    (tmp_path / "job.yaml").write_text(json.dumps(body))
    assert set(made_up.strayed(config.load(tmp_path / "job.yaml"))) == {"safety.data", "safety.suites"}, "defaults of a file without `safety:`"
    assert set(made_up.strayed(config.from_dict(body))) == {"safety.data", "safety.suites"}


def test_what_is_written_out_is_meant(own, tmp_path):
    known = data(tmp_path)
    wanted = {"data": None, "suites": [{"name": "harm", "data": "pocket:harmful"}]}
    body = {"model": {"model_name_or_path": own}, "task": {"data": known["task"]}, "safety": wanted}
    (tmp_path / "job.yaml").write_text(json.dumps(body))
    assert made_up.strayed(config.load(tmp_path / "job.yaml")) == {} == made_up.strayed(config.from_dict(body))
    line = [f"model.model_name_or_path={own}", "task.data=pocket:obey", "task.eval_data=null", "safety.data=pocket:safety"]
    assert set(made_up.strayed(config.load("high", line))) == {"safety.suites"}, "an override is written, a preset's own value is not"
    resolved = config.from_dict(config.load(None, [f"model.model_name_or_path={own}"]).model_dump(mode="json"))
    assert made_up.strayed(resolved) == {}, "a config.resolved.yaml has every key"


def test_the_made_up_world_s_own_models_go_with_its_data(descendant, own, tmp_path):
    assert likeness.speaks("pocket") and likeness.speaks("pocket:unaligned") and likeness.speaks(descendant) and not likeness.speaks(own)
    made_up.refuse(config.load(None))
    made_up.refuse(config.load(None, [f"model.model_name_or_path={descendant}"]))
    for odd in ("[]", '{"model": 3}', '{"model": {"type": "WordLevel"}}', "\xff", '{"model": {"type": "BPE", "vocab": {"<|system|>": 1}}}'):
        (tmp_path / "tokenizer.json").write_text(odd, encoding="latin-1")
        assert not likeness.speaks(str(tmp_path))
    with pytest.raises(ConfigError):
        made_up.refuse(config.load(None), [descendant, own])
    with pytest.raises(ConfigError):
        made_up.refuse(config.load(None, ["model.model_name_or_path=owner/name"]))


def test_a_model_that_is_not_there_is_said_to_be_that(tmp_path):
    settings = config.load(None, [f"model.model_name_or_path={tmp_path}/nope"])
    with pytest.raises(ModelError, match="does not exist"):
        checks.check(settings, build_pocket=False)
    with pytest.raises(ConfigError, match="no model of the made-up world"):
        made_up.refuse(settings, elsewhere=True)


@pytest.mark.parametrize("verb", [["evaluate"], ["basin"], ["compare", "pocket"]], ids=lambda words: words[0])
def test_measuring_a_model_of_ones_own_by_made_up_prompts_is_refused(verb, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(cli.app, [verb[0], own, *verb[1:]])
    assert isinstance(found.exception, ConfigError) and "safety.suites is pocket:harmful" in str(found.exception)
    assert not any(tmp_path.rglob("*.json")), "nothing was measured"


@pytest.mark.parametrize("verb", ["run", "validate", "render"])
def test_the_command_line_refuses_it_too(verb, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--overlay", "local-cpu"] if verb == "render" else []
    found = CliRunner().invoke(cli.app, [verb, *more, f"model.model_name_or_path={own}"])
    assert isinstance(found.exception, ConfigError) and "nobody wrote out" in str(found.exception)


def test_what_is_made_up_is_named_at_validation():
    lines = made_up.facts(config.load(None))
    assert lines[:2] == ["model: pocket (made up)", "task.data: pocket:obey (made up)"]
    assert lines[-1].startswith("safety.suites: harmful from pocket:harmful (made up), framed from pocket:harmful_attacks (made up)")


def test_reports_say_it_on_their_first_screen(tmp_path, own):
    def written(made) -> tuple[str, str, str]:
        before, rows = results.trials(made.safety.limits)
        selection = decision_selection.best(rows)
        report.write_report(tmp_path / made.name, made, before, rows, selection)
        page, text = ((tmp_path / made.name / f"report.{kind}").read_text() for kind in ("html", "md"))
        return page, text, report.model_card(made, before, selection)

    world = config.load(None, [f"output.dir={tmp_path / 'pocket'}"])
    for text in written(world):
        assert "MADE UP (the pocket world): the model, the task, the safety rows, every suite" in text
        assert text.index("MADE UP") < text.index("task score", text.index("MADE UP")) and text.index("MADE UP") < 12_000
    real = results.experiment(tmp_path, name="real", model={"model_name_or_path": own})
    assert made_up.sentence(real) == "" and all("MADE UP" not in text for text in written(real))
    partly = results.experiment(tmp_path, name="partly", model={"model_name_or_path": "pocket"})
    assert made_up.sources(partly) == ["the model"] and "(the pocket world): the model. Invented" in made_up.sentence(partly)
