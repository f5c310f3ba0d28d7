"""A run in which nothing was measured says so, with the commonest reason and what to do, and ends with 1; 3 is for what was judged."""

from __future__ import annotations

import threading
from dataclasses import replace

import made_up
import pytest

from orchestrator.decision import limits, selection
from orchestrator.experiment import driver
from orchestrator.experiment.progress import Dashboard
from orchestrator.records import TrialResult
from orchestrator.report import figures
from orchestrator.storage import files
from orchestrator.terminal import screen
from orchestrator.tracking.tracker import NullTracker


def concluded(folder, results, monkeypatch):
    """The outcome of a run that left these results; its pictures left out."""
    monkeypatch.setattr("orchestrator.report.plots.trials.all_plots", lambda *_: [])
    monkeypatch.setattr("orchestrator.report.plots.refusals.report_plots", lambda *_: [])
    settings, before = made_up.experiment(folder), made_up.baseline()
    console = screen.console()
    state = driver.Run(settings, folder / "out", console, threading.Event(), NullTracker(), Dashboard(console, 3, 1), baseline=before)
    state.rows = [(result, limits.judge(result, before, settings.safety.limits)) for result in results]
    state.specs = {result.trial_id: made_up.spec(result) for result in results}
    (folder / "out").mkdir()
    return driver._conclude(state, 0.0)


def failed(number: int, error: str | None, fault: str | None = "trial", state: str = "failed") -> TrialResult:
    return replace(made_up.result(f"t{number:04d}", "lora", {"x": number}, state="failed"), error=error, fault=fault, state=state)


@pytest.mark.parametrize(("results", "says"), [
    ([], "the search ended before a trial did"),
    ([failed(0, "CUDA out of memory", "machine")],
     "the one trial failed. The commonest reason, first of t0000 (lora): CUDA out of memory; by a machine"),
    (
        [failed(0, "no room", "machine"), failed(1, "the loss became nan at step 4"), failed(2, "the loss became nan at step 17")],
        "all 3 trials failed. The commonest reason (2 of 3), first of t0001 (lora): the loss became nan at step 4; by its own settings or data",
    ),
    ([failed(0, "KeyError: 'x'", "safebasin"), failed(1, None, None, "stopped")], "1 of 2 trials failed, none was asked its suites"),
    ([failed(0, "[/b]\nhttps://me:geheim@host token", None)], "[/b] https://me:***@host token; see docs/troubleshooting.md"),
])  # fmt: skip
def test_nothing_measured_is_no_verdict(tmp_path, monkeypatch, results, says):
    outcome = concluded(tmp_path, results, monkeypatch)
    assert outcome.exit_code == 1
    assert outcome.sentence.startswith("Nothing was measured: ") and says in outcome.sentence and "feasible" not in outcome.sentence
    assert files.read_json(tmp_path / "out" / "best.json")["outcome"] == "nothing measured"
    assert "Nothing was measured" in (tmp_path / "out" / "report.md").read_text()


def test_one_judged_trial_is_enough_for_a_verdict(tmp_path, monkeypatch):
    outcome = concluded(tmp_path, [failed(0, "x"), made_up.result("t0001", "lora", {}, asr=0.6)], monkeypatch)
    assert outcome.exit_code == 3 and outcome.sentence.startswith("Nothing feasible: ")
    assert files.read_json(tmp_path / "out" / "best.json")["outcome"] == "nothing feasible"


def test_limits_without_suites_count_as_measured():
    one = made_up.result("t0000", "lora", {})
    one.suites = {}
    estimate = limits.Estimate(0.1, 0.0, 0.2, 50)
    held = limits.Constraint("external/x", "x", 0.0, estimate, "undecided")
    judged = limits.Judgement("undecided", (held,), 0.9, None, None, None, None)
    assert selection.best([(one, judged)]).outcome == "nothing feasible"
    assert selection.best([(one, replace(judged, constraints=()))]).outcome == "nothing measured"
    assert "Nothing was measured" not in figures.headline(selection.best([(one, judged)]), None, made_up.config.from_dict({}))
