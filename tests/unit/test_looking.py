"""`status` and `report`: what they say is what the records say, whoever else is at work there, and nothing of the run is touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import made_up
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from orchestrator import cli, config
from orchestrator.decision import selection as decision_selection
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.experiment import identity as run_identity
from orchestrator.experiment import records
from orchestrator.report import figures
from orchestrator.report import run as report
from orchestrator.storage import files
from orchestrator.storage.layout import LOCK
from orchestrator.verbs import reporting, status

CONTENT = {"model": "a", "template": "b", "safety.suites.harmful": "c", "safety.suites.borderline": "d"}


def run_folder(tmp: Path, name: str = "run", *, ended: bool = True, good: bool = True, content=CONTENT, **sections):
    """(folder, experiment, baseline, rows) of a run as its records have it."""
    made = made_up.experiment(tmp / f"data-{name}", name=name, search={"trials": 15, "seeds": 2}, **sections)
    folder = tmp / name
    identity = run_identity.new(made, content)
    run_identity.write(folder, identity)
    before, rows = made_up.trials(made.safety.limits, good=good)
    files.write_json(folder / "baseline.json", before.to_dict())
    for result, _ in rows:
        files.write_json(folder / "trials" / result.trial_id / "spec.json", {"run": identity.run})
        files.write_json(folder / "trials" / result.trial_id / "result.json", result.to_dict())
    files.write_text(folder / "config.resolved.yaml", config.dump_yaml(made))
    if ended:
        files.write_json(folder / "best.json", {})
    return folder, made, before, rows


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_ended(tmp_path):
    folder, made, before, rows = run_folder(tmp_path)
    kept = contents(folder)
    found = status.look(str(folder))
    search = [(result, judged) for result, judged in rows if result.phase == "search"]
    assert (found.state, found.trials, found.done, found.open) == ("ended", 15, 15, ())
    assert found.failed == sum(result.state == "failed" for result, _ in search) > 0 and found.confirmations == len(rows) - 15 > 0
    assert found.feasible == sum(judged.verdict == "feasible" for _, judged in search) > 0
    assert found.outcome == figures.headline(decision_selection.best(rows), before, made)
    told = status.lines(found)
    assert told[0].startswith(f"{folder}: ended, the last trial ended ") and not any("resume" in line for line in told)
    assert contents(folder) == kept, "nothing was touched"


def test_one_that_runs_and_one_that_was_cut_short(tmp_path):
    folder, *_ = run_folder(tmp_path, ended=False)
    (folder / "trials" / "t0014" / "result.json").unlink(missing_ok=True)
    cancelled = json.loads((folder / "trials" / "t0013" / "result.json").read_text())
    files.write_json(folder / "trials" / "t0013" / "result.json", cancelled | {"state": "stopped", "facts": {"cancelled": True}})
    lock = FileLock(folder / LOCK)
    with lock:
        found = status.look(str(folder))
        assert found.state == "running" and found.open == ("t0013", "t0014") and found.outcome.startswith("Best so far within the limits")
        assert lock.is_locked
    found = status.look(str(folder))
    assert found.state == "interrupted" and status.lines(found)[-1] == f"go on with: safebasin resume {folder}"
    assert "asked and not ended: t0013, t0014" in status.lines(found)
    (folder / "baseline.json").unlink()
    assert status.look(str(folder)).outcome == "the untouched model was not measured yet"


def test_a_run_at_an_address(tmp_path):
    folder, *_ = run_folder(tmp_path)
    here, there = status.look(str(folder)), status.look(f"file://{folder}")
    assert (there.done, there.feasible, there.outcome, there.state) == (here.done, here.feasible, here.outcome, "ended") and there.written is None


def test_damaged_and_foreign_records_are_named_and_not_counted(tmp_path):
    folder, *_ = run_folder(tmp_path)
    (folder / "trials" / "t0001" / "result.json").write_text("{")
    files.write_json(folder / "trials" / "t0002" / "spec.json", {"run": "another"})
    (folder / "trials" / "t0003" / "result.json").write_text((folder / "trials" / "t0004" / "result.json").read_text())
    (folder / "trials" / "notes").mkdir()
    kept = contents(folder)
    found = status.look(str(folder))
    assert found.done == 12 and len(found.troubles) == 3 and all("is not counted" in line for line in found.troubles)
    assert contents(folder) == kept and sum(line.startswith("warning: ") for line in status.lines(found)) == 3


def test_what_is_no_run_is_said(tmp_path):
    for place in (tmp_path, tmp_path / "nothing", f"file://{tmp_path}"):
        with pytest.raises(ConfigError, match="holds no run"):
            records.read(str(place))


def test_the_report_is_the_one_the_run_wrote(tmp_path):
    folder, made, before, rows = run_folder(tmp_path)
    kept = contents(folder)
    own = report.write_report(tmp_path / "own", made, before, rows, decision_selection.best(rows))
    read, written = reporting.write([str(folder)], [], tmp_path / "again")
    assert {path.name for path in written} == {path.name for path in own} and read[0].sentence == figures.headline(
        decision_selection.best(rows), before, made
    )  # fmt: skip

    def page(path: Path) -> str:
        return re.sub(r"<dt>(model|template|suite)[^<]*hash.*?</dd>", "", path.read_text().replace(f"{folder}/", ""))

    places = (tmp_path / "own", tmp_path / "again")
    ours, theirs = (re.sub(r"\s+", " ", page(where / "report.md")).split("How it was measured")[0] for where in places)
    assert sorted(ours.split("|")) == sorted(theirs.split("|")), "the same cells, in whatever order the trials ended"
    assert f"safebasin run -c {folder}/best.yaml" in (tmp_path / "again" / "report.html").read_text()
    assert contents(folder) == kept and (tmp_path / "again" / ".safebasin.report.json").is_file()
    with pytest.raises(ConfigError, match=r"holds an earlier report.html.*--overwrite"):
        reporting.write([str(folder)], [], tmp_path / "again")
    reporting.write([str(folder)], [], tmp_path / "again", overwrite=True)


def test_under_other_limits_verdicts_are_others_and_it_says_so(tmp_path):
    folder, *_ = run_folder(tmp_path)
    read, _ = reporting.write([str(folder)], ["safety.limits.max_degradation=0.0"], tmp_path / "strict")
    assert read[0].selection.best is None and read[0].sentence.startswith("Nothing feasible") and "limit of 0" in read[0].sentence
    assert "OTHER LIMITS" in (tmp_path / "strict" / "report.html").read_text()
    for odd, told in (("search.trials=3", "only its limits can be others"), ("safety.limits.max_degradatoin=1", "did you mean"),
                      ("safety.limits.max_degradation=2", "at most 1")):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            reporting.write([str(folder)], [odd], tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_several_runs_in_one_page(tmp_path):
    one, two = run_folder(tmp_path, "one")[0], run_folder(tmp_path, "two", good=False)[0]
    read, (path, *_) = reporting.write([str(one), str(two)], [], tmp_path / "both")
    text = path.read_text()
    assert [item.name for item in read] == ["one", "two"] and "the best is of one." in text and "Nothing feasible" in text
    assert text.count(">safegrad</td>") == 2 and "0 of 3" in text
    other = run_folder(tmp_path, "other", content={**CONTENT, "safety.suites.harmful": "x"})[0]
    with pytest.raises(SafebasinError, match=r"with other safety\.suites\.harmful, so their trials cannot be compared"):
        reporting.write([str(one), str(other)], [], tmp_path / "refused")
    with pytest.raises(ConfigError, match="each once"):
        reporting.write([str(one), str(one)], [], tmp_path / "refused")


def run(*words: str):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, *_ = run_folder(tmp_path)
    assert json.loads(run("status", folder, "--json").output)["done"] == 15 and "15 of 15 trials done" in run("status", folder).output
    told = run("report", folder, "safety.limits.max_degradation=0.0")
    assert told.exit_code == 0 and "outputs/report-run/report.html" in told.output and (tmp_path / "outputs/report-run/report.html").is_file()
    assert isinstance(run("report", folder, "-o", folder).exception, ConfigError), "never into the run's own folder"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "report.html").write_text("mine")
    assert isinstance(run("report", folder, "-o", "theirs", "--overwrite").exception, ConfigError)
    assert (tmp_path / "theirs" / "report.html").read_text() == "mine"
