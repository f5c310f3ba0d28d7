"""`${name}` in a config: variables of the file, overridden on the command line, the environment for the rest."""

from __future__ import annotations

import pytest

from orchestrator import config
from orchestrator.errors import ConfigError

TEXT = """
variables: {data: "${SB_TEST_ROOT}/rows", model: "${data}/../model"}
model: {model_name_or_path: "${model}", chat_template: "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"}
task: {data: "${data}/train.jsonl"}
safety: {suites: [{name: a, data: "${data}/a.csv"}, {name: b, data: "${data}/b.csv"}]}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(TEXT)
    return file


def test_the_environment_fills_what_the_file_leaves_open(path, monkeypatch):
    monkeypatch.setenv("SB_TEST_ROOT", "/root/of/all")
    experiment = config.load(path)
    assert experiment.task.data == "/root/of/all/rows/train.jsonl"
    assert experiment.model.model_name_or_path == "/root/of/all/rows/../model"
    assert [s.data for s in experiment.safety.suites] == ["/root/of/all/rows/a.csv", "/root/of/all/rows/b.csv"]
    assert "{{ bos_token }}" in experiment.model.chat_template


def test_an_override_of_a_variable_reaches_every_use_and_needs_no_environment(path, monkeypatch):
    monkeypatch.delenv("SB_TEST_ROOT", raising=False)
    experiment = config.load(path, ["variables.data=/elsewhere"])
    assert experiment.task.data == "/elsewhere/train.jsonl"
    assert experiment.safety.suites[1].data == "/elsewhere/b.csv"


def test_an_unset_variable_is_named_with_the_key_that_uses_it(path, monkeypatch):
    monkeypatch.delenv("SB_TEST_ROOT", raising=False)
    with pytest.raises(ConfigError, match=r"variables\.data uses \$\{SB_TEST_ROOT\}.*export SB_TEST_ROOT"):
        config.load(path)


def test_relative_paths_built_from_a_variable_start_from_the_file(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "t.jsonl").write_text("{}")
    (tmp_path / "e.yaml").write_text('variables: {data: rows}\ntask: {data: "${data}/t.jsonl"}\n')
    assert config.load(tmp_path / "e.yaml").task.data == str((tmp_path / "rows" / "t.jsonl").resolve())


def test_where_results_come_from_is_hashed_by_what_was_read_and_not_by_variables(path, monkeypatch):
    monkeypatch.setenv("SB_TEST_ROOT", "/r")
    one, two = config.load(path), config.load(path, ["variables.unused=3"])
    assert two.variables["unused"] == "3" and one.digest() == two.digest()


def test_a_dumped_config_reads_back_the_same(path, monkeypatch, tmp_path):
    monkeypatch.setenv("SB_TEST_ROOT", "/r")
    experiment = config.load(path)
    (tmp_path / "again.yaml").write_text(config.dump_yaml(experiment))
    monkeypatch.delenv("SB_TEST_ROOT")
    assert config.load(tmp_path / "again.yaml") == experiment
