"""The Python API: its results say what the records and the command line say; importing it costs nothing."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading

import made_up
import pandas
import pytest
import test_check
import test_evaluating
import test_looking
from typer.testing import CliRunner

import orchestrator
from orchestrator import api, cli, config
from orchestrator.decision import selection as decision_selection
from orchestrator.errors import ConfigError, SafebasinError, UnknownNameError
from orchestrator.experiment import driver, stop
from orchestrator.experiment.driver import Outcome
from orchestrator.report import figures, table
from orchestrator.terminal import screen

folder = test_evaluating.folder


# ------------------------------------------------------------------------------------------------------------------ names


def test_the_package_gives_what_the_api_has_and_stays_light():
    assert set(api.__all__) <= set(dir(orchestrator)) and all(getattr(orchestrator, name) is getattr(api, name) for name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        orchestrator.runn  # noqa: B018
    heavy = "ray torch mlflow pandas matplotlib".split()
    code = f"import sys; from orchestrator import Experiment; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_an_experiment_of_a_file_a_mapping_and_another_one_are_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    sections = {"name": "x", "task": {"data": "rows.jsonl"}, "search": {"trials": 4}}
    (tmp_path / "job.yaml").write_text(json.dumps(sections))
    by_file = orchestrator.Experiment.load("job.yaml", "search.trials=5")
    by_mapping = orchestrator.Experiment.load(sections, "search.trials=5")
    by_experiment = orchestrator.Experiment.load(orchestrator.Experiment.load("job.yaml"), "search.trials=5")
    assert by_file == by_mapping == by_experiment and by_file.search.trials == 5 and by_mapping.task.data == str(tmp_path / "rows.jsonl")
    assert sections["search"] == {"trials": 4}, "the caller's mapping is the caller's"
    assert orchestrator.Experiment.load() == config.load() and orchestrator.Experiment.load("high").name == config.load("high").name
    with pytest.raises(ConfigError, match="search.trialz"):
        orchestrator.Experiment.load(sections, "search.trialz=1")


# ------------------------------------------------------------------------------------------------------------------ runs


def test_a_run_that_ended_is_read_as_its_records_say(tmp_path):
    where, made, before, rows = test_looking.run_folder(tmp_path)
    found = api.open_run(where)
    chosen = decision_selection.best(rows).best
    assert (found.verdict, found.exit_code) == ("feasible", 0) and found.sentence == figures.headline(decision_selection.best(rows), before, made)
    assert found.best.trial_id == chosen.handed_over[0].trial_id and found.best.score == chosen.score and found.best.seeds == chosen.seeds
    assert found.best.degradation == chosen.handed_over[1].degradation and found.best.model is None, "no model lies there"
    assert found.baseline.task.score == before.task.score and found.experiment.name == "run"
    expected = {r.trial_id: table.trial_row(r, j) for r, j in rows}
    trials = found.trials.set_index("trial_id", drop=False)
    assert set(trials.index) == set(expected) and list(trials.columns[: len(table.TRIAL_COLUMNS)]) == list(table.TRIAL_COLUMNS)
    for trial_id, row in expected.items():
        for name, value in row.items():
            told = trials.loc[trial_id, name]
            assert (pandas.isna(told) if value is None else told == value), (trial_id, name)
    assert all(pandas.api.types.is_float_dtype(trials[name]) for name in ("task_score", "held_out_score", "degradation_upper"))
    assert "<script" not in found._repr_html_() and found.sentence.split("<")[0][:40] in found._repr_html_()


def test_pictures_are_figures_a_notebook_can_show_and_one_without_data_says_why(tmp_path):
    where, *_ = test_looking.run_folder(tmp_path)
    found = api.open_run(where)
    for figure in (found.plot_score(), found.plot_rates(), found.plot_monitor(), found.plot_learning_rate()):
        assert figure._repr_png_().startswith(b"\x89PNG") and figure.axes[0].get_title(loc="left") or figure.get_suptitle()
    assert found.plot_score() is found.plots["score_against_degradation"].png.figure, "the one of the report"
    with pytest.raises(UnknownNameError, match="score_against_degradation"):
        found.plot("score_against_degradaton")
    empty, *_ = test_looking.run_folder(tmp_path, "none", ended=False)
    for path in empty.glob("trials/*/result.json"):
        path.unlink()
    left = api.open_run(empty)
    assert left.verdict == "stopped" and left.exit_code == 1 and left.best is None and list(left.trials.columns) == list(table.TRIAL_COLUMNS)
    assert left.plots["score_against_degradation"].png is None
    words = " ".join(text.get_text() for text in left.plot_score().axes[0].texts).split()
    assert words == left.plots["score_against_degradation"].text.split()
    (empty / "baseline.json").unlink()
    with pytest.raises(SafebasinError, match="untouched model was not measured"):
        api.open_run(empty).plot_score()


def test_run_is_the_commands_own_and_prints_only_where_asked(tmp_path, monkeypatch, capsys):
    where, made, before, rows = test_looking.run_folder(tmp_path)
    selection, seen = decision_selection.best(rows), []

    def instead(experiment, console, flag, on_checked, retry_failed):
        seen.append((experiment, retry_failed))
        on_checked()
        screen.say(console, "working")
        return Outcome(0, selection, where, "all is well")

    monkeypatch.setattr(driver, "run", instead)
    loud = api.run(made, f"output.dir={where}", "search.trials=16")
    assert (loud.verdict, loud.exit_code, loud.sentence) == ("feasible", 0, "all is well") and len(loud.trials) == len(rows)
    assert seen[0][0].search.trials == 16 and loud.experiment.search.trials == 16
    assert "working" in (told := capsys.readouterr().out) and "all is well" in told
    quiet = api.run(made, f"output.dir={where}", progress=False)
    assert quiet.verdict == "feasible" and capsys.readouterr() == ("", "")
    assert api.resume(where, "search.trials=+5", retry_failed=True, progress=False).experiment.search.trials == 20
    assert seen[-1][1] and seen[-1][0].output.resume


def test_signals_are_given_back_and_another_thread_may_run(monkeypatch, tmp_path):
    import signal

    before = signal.getsignal(signal.SIGINT)
    flag = stop.StopFlag()
    flag.listen()
    assert signal.getsignal(signal.SIGINT) == flag._handle
    flag.forget()
    flag.forget()
    assert signal.getsignal(signal.SIGINT) is before

    where, made, _, rows = test_looking.run_folder(tmp_path)
    monkeypatch.setattr(driver, "run", lambda *_, on_checked, **__: on_checked() or Outcome(1, None, where, "stopped early", stopped=True))
    results = []
    thread = threading.Thread(target=lambda: results.append(api.run(made, progress=False)))
    thread.start()
    thread.join()
    assert results[0].verdict == "stopped" and results[0].exit_code == 1


def test_made_up_data_is_refused_as_by_the_command(tmp_path):
    with pytest.raises(ConfigError, match="made-up|pocket"):
        api.run({"model": {"model_name_or_path": str(tmp_path)}}, progress=False)


# ------------------------------------------------------------------------------------------------------------------ models


def test_evaluate_says_what_its_command_says(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = folder / "job.yaml"
    found = api.evaluate(folder / "tuned", "safety.max_new_tokens=5", baseline=folder / "base", config=job, output="api", progress=False)
    words = ["evaluate", str(folder / "tuned"), "safety.max_new_tokens=5", "--baseline", str(folder / "base"), "-c", str(job), "-o", "cli"]
    ended = CliRunner().invoke(cli.app, words)
    assert ended.exit_code == found.exit_code
    assert (tmp_path / "api" / "rates.csv").read_bytes() == (tmp_path / "cli" / "rates.csv").read_bytes()
    body = json.loads((tmp_path / "cli" / "evaluation.json").read_text())
    assert (found.verdict, found.sentence) == (body["verdict"], body["sentence"]) and found.folder.name == "api"
    assert [row["rate"] for row in body["rates"]] == list(found.rates["rate"]) and [row["rise"] for row in body["rates"]] == list(found.rates["rise"])
    assert found.plot_rates()._repr_png_().startswith(b"\x89PNG")


def test_compare_says_what_its_command_says(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job, names = folder / "job.yaml", [str(folder / "base"), str(folder / "tuned")]
    found = api.compare(*names, "safety.max_new_tokens=5", config=job, output="api", progress=False)
    assert CliRunner().invoke(cli.app, ["compare", *names, "safety.max_new_tokens=5", "-c", str(job), "-o", "cli"]).exit_code == 0
    theirs = list(csv.DictReader(io.StringIO((tmp_path / "cli" / "comparison.csv").read_text())))
    assert [row["suite"] for row in theirs] == list(found.rates["suite"])
    assert [float(row["rate"]) for row in theirs] == pytest.approx(list(found.rates["rate"]), abs=1e-12)
    assert found.plot_rates()._repr_png_().startswith(b"\x89PNG") and "side by side" in found.sentence
    with pytest.raises(ConfigError, match="at least two"):
        api.compare(names[0], config=job, progress=False)


def test_check_says_what_its_command_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, policy = test_check.confirmed(tmp_path, at=test_check.datetime.now(test_check.UTC)), test_check.policy_file(tmp_path)
    found = api.check(run, policy, output="api")
    ended = CliRunner().invoke(cli.app, ["check", str(run), "--policy", policy, "-o", "cli"])
    assert ended.exit_code == (0 if found.passed else 1)
    ours, theirs = (json.loads((tmp_path / name / "evidence.json").read_text()) for name in ("api", "cli"))
    assert ours["rules"] == theirs["rules"] and found.evidence == (tmp_path / "api" / "evidence.json").relative_to(tmp_path)
    assert [row[:2] for row in found.rules.itertuples(index=False, name=None)] == [(one["rule"], one["passed"]) for one in theirs["rules"]]
    assert found.verdict == ("passed" if ended.exit_code == 0 else "failed") and found.sentence.startswith(("PASSED", "FAILED"))
    with pytest.raises(ConfigError, match="registered model"):
        found.register("a/b")


# ------------------------------------------------------------------------------------------------------------------ notebooks


def test_progress_in_a_notebook_is_one_text_that_changes(monkeypatch):
    shown, texts = [], []

    class Handle:
        def update(self, data, raw):
            assert raw
            texts.append(data["text/plain"])

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    import types

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(screen._Cell, "LEAST_S", 0.0)
    console = screen.Screen(file=io.StringIO(), force_jupyter=True, width=60)
    live = screen.live(console, "[b]first")
    live.start()
    live.update("second")
    live.stop()
    live.update("too late")
    assert [one.strip() for one in shown] == ["[b]first"] and [one.strip() for one in texts] == ["second", ""]
    assert screen.live(screen.silent(), "x") is None


def test_a_whole_made_up_table_is_shown_escaped(tmp_path):
    where, *_ = test_looking.run_folder(tmp_path)
    found = api.open_run(where)
    changed = api.RunResult(found.records, found.verdict, "<script>alert(1)</script>", 0)
    assert "<script>" not in changed._repr_html_() and made_up.RECIPES[0] in changed._repr_html_()
