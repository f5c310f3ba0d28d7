"""What is said last: a search that was cut short is not called infeasible, and the end names what to do and where things are."""

from __future__ import annotations

import csv
import json
import sys

import made_up
import pytest
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.errors import ConfigError
from orchestrator.experiment import driver, endings, progress
from orchestrator.report import figures, view


def selection_of(made, *trials):
    before = made_up.baseline()
    return before, decision_selection.best([(one, limits.judge(one, before, made.safety.limits)) for one in trials])


def test_a_search_that_was_cut_short_is_not_called_infeasible(tmp_path):
    made = made_up.experiment(tmp_path)
    bad = made_up.result("t0001", "full", {}, asr=0.6)
    before, found = selection_of(made, bad)
    ended, stopped = (figures.headline(found, before, made, stopped=cut) for cut in (False, True))
    assert ended.startswith("Nothing feasible: none of 1 configuration keeps") and "Nothing feasible" not in stopped
    assert stopped.startswith("No model to hand over so far: none of 1 configuration keeps every limit") and "Nearest miss: t0001" in stopped
    before, good = selection_of(made, made_up.result("t0002", "safegrad", {}, asr=0.0, over=0.0))
    assert good.best is not None and figures.headline(good, before, made, stopped=True).startswith("Best so far within the limits: t0002")
    assert figures.headline(decision_selection.best([]), before, made, stopped=True) == "Nothing was measured yet."
    page = view.view(made, before, [], found, {"stopped": True})
    assert page["sentence"] == stopped and "Nothing feasible" not in figures.note(found, before, made, stopped=True)


def test_a_trial_stopped_on_request_is_one_word_and_names_the_way_on(tmp_path):
    made = made_up.experiment(tmp_path)
    one = made_up.result("t0001", "full", {}, state="stopped")
    one.error, one.facts = "stopped on request", {"cancelled": True}
    line = progress.outcome_line(one, limits.judge(one, made_up.baseline(), made.safety.limits)).plain
    assert line.endswith("stopped on request, `safebasin resume` goes on with it") and "stopped stopped" not in line
    one.error, one.facts = "ended by the monitor", {}
    assert "stopped  ended by the monitor" in progress.outcome_line(one, limits.judge(one, made_up.baseline(), made.safety.limits)).plain


def test_the_end_names_model_config_and_report_where_they_are(tmp_path):
    made = made_up.experiment(tmp_path, model={"model_name_or_path": "pocket"})
    _, found = selection_of(made, made_up.result("t0002", "safegrad", {}, asr=0.0, over=0.0))
    folder = made.output_dir
    (folder / "model").mkdir(parents=True)
    for name in ("best.yaml", "report.html"):
        (folder / name).write_text("x")
    told = endings.lines(made, driver.Outcome(0, found, folder, "s"))
    assert told[0] == f"model: {folder / 'model'} (the model handed over)" and told[1] == f"best.yaml: {folder / 'best.yaml'} (trains it again)"
    assert told[2:] == [f"report: {folder / 'report.html'}"]
    _, none = selection_of(made, made_up.result("t0001", "full", {}, asr=0.6))
    assert not any(line.startswith(("model:", "best.yaml:")) for line in endings.lines(made, driver.Outcome(3, none, folder, "s")))
    assert endings.lines(made, driver.Outcome(1, None, tmp_path / "nothing", "s")) == [], "no file that is not there"


@pytest.mark.parametrize("end", ["flag", "second Ctrl-C"])
def test_the_command_names_resume_after_a_stop(end, tmp_path, monkeypatch):
    made = made_up.experiment(tmp_path, model={"model_name_or_path": "pocket"})

    def stopped(settings, console, stop, **_):
        stop.set()
        if end == "second Ctrl-C":
            raise KeyboardInterrupt
        return driver.Outcome(1, None, settings.output_dir, "stopped after 0 of 15 trials")

    monkeypatch.setattr(driver, "run", stopped)
    monkeypatch.setattr(cli, "_load", lambda *words: made)
    told: list[str] = []
    monkeypatch.setattr(cli.streams, "tell", lambda line, _: told.append(line))
    found = CliRunner().invoke(cli.app, ["run"])
    assert ("MADE UP (the pocket world): the model." in found.output) == (end == "flag")
    assert found.exit_code != 0 and f"go on with: safebasin resume {made.output_place}" in found.output + "\n".join(told)


def run(*words: str):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_version_output_and_dry_run(tmp_path, monkeypatch):
    assert run("--version").output == run("version").output
    seen = []
    monkeypatch.setattr(cli, "_run", lambda settings, exit_zero: seen.append(str(settings.output_dir)))
    assert run("run", "-o", tmp_path / "here").exit_code == 0 and seen == [str(tmp_path / "here")]
    monkeypatch.setattr(cli, "_validate", lambda settings: seen.append("checked"))
    assert run("run", "--dry-run", "-o", tmp_path / "there").exit_code == 0 and seen[1:] == ["checked"] and not (tmp_path / "there").exists()
    assert run("apply", "safe_lora", "-o", tmp_path, "--model", "x", "--aligned", "y").exception.__class__ is ConfigError, "-o is known: it is full"


def test_json_for_programs(tmp_path):
    for kind in ("attacks", "strategies", "judges", "presets", "recipes", "suites"):
        rows = json.loads(run("list", kind, "--json").output)
        assert rows and all(isinstance(value, str) for row in rows for value in row.values()) and len({tuple(row) for row in rows}) == 1
    assert {"attack": "direct", "what it does": "The prompt as it is."} in json.loads(run("list", "attacks", "--json").output)
    found = json.loads(run("doctor", "--json", f"output.dir={tmp_path / 'out'}").output)
    assert {"what", "state", "detail"} == set(found[0]) and found[0]["what"] == "python"


def test_json_of_a_config_that_is_valid_and_of_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))  # a world that was never built is taken on trust
    found = run("validate", "--json", f"output.dir={tmp_path / 'out'}")
    body = json.loads(found.output)
    assert body["valid"] is True and body["trials"] == 15 and len(body["recipes"]) == 5 and "model: pocket (made up)" in body["facts"]
    assert isinstance(run("validate", "--json", "search.trials=0").exception, ConfigError)


def test_compare_prints_the_rows_of_its_file(tmp_path, monkeypatch):
    from orchestrator.verbs import compare

    one, other = (made_up.result(name, "full", {}, asr=asr) for name, asr in (("t0001", 0.1), ("t0002", 0.3)))
    entries = {"a": compare.Entry("a", "x", one), "b": compare.Entry("b", "y", other)}
    monkeypatch.setattr(compare, "entry", lambda name, *_: entries[name])
    monkeypatch.setattr(compare, "_measured", lambda name: True)
    found = run("compare", "a", "b", "--json", "-o", tmp_path / "out")
    rows = json.loads(found.stdout)
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["model"], row["suite"], float(row["rate"])) for row in written] == [(row["model"], row["suite"], row["rate"]) for row in rows]
    assert "intervals" in found.stderr and sys.stdout is not None
