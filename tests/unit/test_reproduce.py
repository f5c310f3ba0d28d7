"""`safebasin reproduce`: what is the same is said to be, and every difference is named with its size."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_looking
from rich.console import Console
from typer.testing import CliRunner

from orchestrator import api, cli
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.experiment import identity, records
from orchestrator.experiment.driver import Outcome
from orchestrator.storage import files
from orchestrator.verbs import reproduce, running


def printed(found) -> str:
    console = Console(file=io.StringIO(), width=200)
    reproduce.show(found, console)
    return console.file.getvalue()


@pytest.fixture
def first(tmp_path):
    return test_looking.run_folder(tmp_path, "first")[0]


def changed(folder, trial, change):
    path = folder / "trials" / trial / "result.json"
    body = json.loads(path.read_text())
    change(body)
    files.write_json(path, body)


def test_the_same_records_are_the_same_to_the_last_prompt_whatever_the_ids(tmp_path, first):
    second = test_looking.run_folder(tmp_path, "second")[0]
    (second / "trials" / "t0003").rename(second / "trials" / "t0103")
    changed(second, "t0103", lambda body: body.update(trial_id="t0103"))
    found = reproduce.compared(records.read(str(first)), records.read(str(second)))
    assert found.same and found.exit_code == 0 and not found.made and found.pairs[0].recipe == "untouched"
    assert {pair.there for pair in found.pairs if pair.there != pair.here} == {"t0003"}
    assert printed(found).startswith(f"REPRODUCED: all {len(found.pairs)} measurements")
    stopped = replace(found, finished=False)
    assert not stopped.same and stopped.exit_code == 1 and "safebasin resume" in printed(stopped)
    assert not reproduce.Reproduction("a", "b", (), (), True).same, "nothing was compared"


def test_every_difference_is_named_with_its_size(tmp_path, first):
    second = test_looking.run_folder(tmp_path, "second", content={**test_looking.CONTENT, "model": "z"})[0]

    def flip(body):
        suite = body["suites"]["harmful"]
        for i in (3, 4):
            suite["unsafe"][i], suite["refused"][i] = not suite["unsafe"][i], not suite["refused"][i]
        scores = body["task"]["scores"]
        for i in [i for i, score in enumerate(scores) if score][:50]:
            scores[i] = 0.0
        body["task"]["score"] = sum(scores) / len(scores)

    changed(second, "t0003", flip)
    changed(second, "t0004", lambda body: body["params"].update(learning_rate=0.5))
    begun = identity.read(second)
    identity.write(second, replace(begun, versions={**begun.versions, "torch": "0.1"}))
    found = reproduce.compared(records.read(str(first)), records.read(str(second)))
    assert not found.same and found.exit_code == 3
    assert {(one.what, one.here) for one in found.made} == {("version of torch", "0.1"), ("content of model", "z")}
    odd = [pair for pair in found.pairs if not pair.same]
    assert [(pair.there, pair.here) for pair in odd] == [("t0003", "t0003"), ("t0004", None), (None, "t0004")]
    assert (odd[0].changed, odd[0].prompts) == (2, 600) and odd[0].score_there - odd[0].score_here == pytest.approx(0.25)
    told = printed(found)
    assert "task scores differ by up to 0.250, 2 of" in told and "2 configurations were tried in one run only" in told
    assert "version of torch" in told and "2 of 600" in told
    assert list(found.trials["same"]) == [pair.same for pair in found.pairs]


def test_a_run_of_before_versions_were_kept_says_so(tmp_path, first):
    path = first / identity.FILE
    body = json.loads(path.read_text())
    assert body.pop("versions")["torch"]
    files.write_json(path, body)
    found = reproduce.compared(records.read(str(first)), records.read(str(test_looking.run_folder(tmp_path, "second")[0])))
    assert {one.there for one in found.made} == {"not written down"} and found.same, "versions alone change no figure"
    files.write_json(path, body | {"versions": {"torch": 2}})
    with pytest.raises(SafebasinError, match="versions holds what is no version"):
        identity.read(first)


def test_the_command_runs_the_same_config_elsewhere(tmp_path, first, monkeypatch):
    seen, out = [], tmp_path / "new"

    def instead(experiment, console, **_):
        seen.append(experiment)
        test_looking.run_folder(tmp_path, "made")
        (tmp_path / "made").rename(out)
        return Outcome(0, SimpleNamespace(), out, "well")

    monkeypatch.setattr(running, "run", instead)
    ended = CliRunner().invoke(cli.app, ["reproduce", str(first), "-o", str(out)])
    assert ended.exit_code == 0, ended.output
    body = json.loads((out / "reproduction.json").read_text())
    assert body["same"] and body["folder"] == str(first) and len(body["pairs"]) == len(list(first.glob("trials/*"))) + 1
    before = records.read(str(first)).experiment
    exclude = {"output": True, "tracking": {"run_name"}}
    assert seen[0].model_dump(exclude=exclude) == before.model_dump(exclude=exclude) and seen[0].output.dir == str(out)
    with pytest.raises(ConfigError, match="is not empty"):
        api.reproduce(first, out, progress=False)
    with pytest.raises(ConfigError, match="the run"):
        api.reproduce(first, first / "again", progress=False)
    for path in first.glob("trials/*/result.json"):
        path.unlink()
    with pytest.raises(SafebasinError, match="no trial that ended"):
        api.reproduce(first, tmp_path / "third", progress=False)
