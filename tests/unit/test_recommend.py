"""`recommend` and `init`: what is advised can be searched with what there is, its figures are those of our table, and the config it writes loads."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import strategies
from orchestrator import cli, config
from orchestrator.config import yaml_text
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.verbs import decide, init, recommend
from orchestrator.verbs.recommend import Situation

ROOT = Path(__file__).parents[2]
SITUATIONS = [Situation(*given) for given in itertools.product(recommend.RISKS, (0, 1, 4), *[(False, True)] * 4)]


def table() -> dict[tuple[str, str], recommend.Measured]:
    """The pocket world's rows of docs/methods_table.md."""
    part = (ROOT / "docs" / "methods_table.md").read_text().split("## The pocket world")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([\w+, /]+) \| (\w+) \| ([^|]+) \| ([^|]+) \| [^|]+ \| [^|]+ \| ([^|]+) \|", part, re.MULTILINE)
    return {(name.strip(), settings): recommend.Measured(*(cell.strip() for cell in cells)) for name, settings, *cells in rows}


def test_every_figure_is_the_table_s():
    known = table()
    assert len(known) > 40
    for key, row in recommend.MEASURED.items():
        assert known[key] == row, f"docs/methods_table.md says {known[key]} of {key}; take it over in recommend.MEASURED"
    without = {key for key, row in known.items() if row.feasible.startswith(("3 of", "2 of", "1 of")) and float(row.score.split(" / ")[0]) > 0.5}
    assert all(set(strategies.get(part).needs) & {"safety"} for name, _ in without for part in re.split(r"\+", name)), (
        "recommend says that without safety rows no method kept the limits and learnt the task"
    )


@pytest.mark.parametrize("what", SITUATIONS, ids=str)
def test_what_is_advised_can_be_had_and_has_its_control(what):
    advice = recommend.advise(what)
    recipes = [choice.recipe for choice in advice.choices]
    assert recipes[-1] == ("full",) and len(set(recipes)) == len(recipes)
    for recipe in recipes:
        assert {need for name in recipe for need in strategies.get(name).needs} <= what.has
    told = recommend.lines(advice)
    assert all(line and line == line.strip() for line in told) and any(line.startswith("left out: ") for line in told) == bool(advice.left_out)


def test_the_advice_by_risk_is_there_and_corrected():
    full = {"safety": True, "harmful": True, "unaligned": True}
    high, medium, tries = (recommend.advise(Situation(risk, **full)) for risk in recommend.RISKS)
    assert high.choices[0].recipe == ("safegrad", "freeze_layers") and (high.max_degradation, high.on_breach) == (0.05, "rollback")
    assert medium.choices[0].recipe == ("sap", "lora") and "sap alone feasible on 0 of 3 seeds" in medium.choices[0].why
    assert medium.choices[1].recipe == ("safegrad",) and "feasible on 3 of 3 seeds" in medium.choices[1].why
    assert tries.choices[0].recipe == ("freeze_layers",) and tries.on_breach == "add safegrad"
    assert not any("safegrad" in choice.recipe for choice in tries.choices), "it joins at a breach"
    nothing = recommend.advise(Situation("high"))
    assert any("needs safety rows" in one for one in nothing.left_out) and "Without safety rows no method" in nothing.notes[0]
    api = recommend.advise(Situation("high", safety=True, api=True))
    assert [choice.recipe for choice in api.choices] == [("safe_instruct",), ("full",)]
    assert "SafeMERGE" in api.left_out[0] and "stand-in with open weights" in api.notes[0]


@pytest.mark.parametrize("what", SITUATIONS, ids=str)
def test_the_config_loads_and_says_what_was_advised(what):
    request = init.Request(what, 'a/"b\n: {', "rows.jsonl", "safety.jsonl" if what.safety else None, "base" if what.unaligned else None)
    text = init.written(request)
    made, advice = config.from_dict(yaml_text.parse(text, "it")), recommend.advise(what)
    assert made.model.model_name_or_path == 'a/"b\n: {' and [list(r) for r in made.recipes] == [list(c.recipe) for c in advice.choices]
    assert made.safety.limits.max_degradation == advice.max_degradation and len(made.search.seeds) == advice.seeds
    assert made.ray.use_gpu == (what.gpus > 0) and made.safety.data == request.safety
    assert {"stop": "stop", "rollback": "rollback"}.get(advice.on_breach, "add") == (made.monitor.actions and next(iter(made.monitor.actions)))
    assert max(map(len, text.splitlines())) <= 150 and not any(key.startswith("pocket") for key in re.findall(r"data: (\S+)", text))


def run(*words: str):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_init_writes_a_new_file_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    words = ("init", "--model", "owner/model", "--task", "rows.jsonl", "--risk", "high")
    assert run(*words).exit_code == 0 and (tmp_path / "job.yaml").stat().st_mode & 0o777 == 0o666 & ~cli_umask()
    before = (tmp_path / "job.yaml").read_text()
    found = run(*words, "--gpus", "4")
    assert isinstance(found.exception, ConfigError) and "is not replaced" in str(found.exception) and (tmp_path / "job.yaml").read_text() == before
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nothing")
    assert isinstance(run(*words, "-o", "link.yaml").exception, ConfigError) and not (tmp_path / "nothing").exists()
    assert run(*words, "-o", "deep/er/job.yaml").exit_code == 0
    assert config.load(tmp_path / "deep" / "er" / "job.yaml").task.data == str(tmp_path / "rows.jsonl"), "read from its own folder"
    assert "give --model" in str(run("init", "--task", "x").exception) and isinstance(run(*words[:-1], "hihg").exception, UnknownNameError)
    assert "needs safety rows" in str(run(*words, "--api", "-o", "api.yaml").exception) and not (tmp_path / "api.yaml").exists()


def cli_umask() -> int:
    from orchestrator.storage import files

    return 0o666 & ~files.file_mode()


def test_on_a_terminal_what_is_missing_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decide, "_interactive", lambda: True)
    answers = "owner/model\nrows.jsonl\nsafety.jsonl\n\nhigh\n2\ny\n"
    found = CliRunner().invoke(cli.app, ["init"], input=answers)
    assert found.exit_code == 0, found.output
    made = config.load("job.yaml")
    assert (made.model.model_name_or_path, made.task.data, made.safety.data, made.ray.use_gpu) == ("owner/model", "rows.jsonl", "safety.jsonl", True)
    assert made.model.unaligned_name_or_path is None and made.safety.limits.max_degradation == 0.05
    told = CliRunner().invoke(cli.app, ["recommend"], input="medium\n0\ny\nn\nn\n")
    assert told.exit_code == 0 and "[safegrad]" in told.output and "left out: [sap, lora]" in " ".join(told.output.split())


def test_recommend_without_a_terminal(tmp_path):
    body = json.loads(run("recommend", "--risk", "high", "--safety-data", "--json").output)
    assert body["choices"][0]["recipe"] == ["safegrad", "freeze_layers"] and body["on_breach"] == "rollback"
    told = " ".join(run("recommend", "--risk", "experimental", "--no-safety-data").output.split())
    assert "[freeze_layers]: advised for experimental risk" in told and "[full]: the control" in told
