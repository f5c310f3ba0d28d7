"""MLflow as teams run it: a server with basic auth, runs and users in PostgreSQL, artifacts through it in S3. Each of them goes away. No Ray."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import made_up
import pytest
import servers

from orchestrator.decision import selection
from orchestrator.errors import TrackingError
from orchestrator.tracking import connect

USER, PASSWORD = "searcher", "correct horse battery"
STEPS = range(1, 151)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with servers.site(tmp_path_factory.mktemp("site")) as made:
        made.mlflow.add_user(USER, PASSWORD)
        made.mlflow.add_user("colleague", PASSWORD)
        yield made


@pytest.fixture(autouse=True)
def login(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


def with_events(trial):
    trial.history = [{"kind": "train", "time": 1.7e9 + i, "step": i, "loss": 2 / i, "learning_rate": 1e-3, "grad_norm": 0.5 + i} for i in STEPS]
    return trial


def drive(tracker, rows) -> None:
    for trial, judged in rows:
        tracker.start_trial(made_up.spec(trial))
        for event in trial.history:
            tracker.event(trial.trial_id, event)
        tracker.finish_trial(trial, judged)


def drained(tracker) -> bool:
    return len(tracker._spool) == 0


def spooled(out: Path) -> list[tuple[str, str]]:
    return [(record["op"], record["run"]) for record in map(json.loads, (out / "tracking.spool.jsonl").read_text().splitlines())]


def points(site, experiment_id: str) -> dict[str, Counter]:
    """(name, step, milliseconds, value) of every metric point in PostgreSQL, by trial id ("parent", "baseline" are such)."""
    rows = site.database.execute(
        "mlflow",
        "select coalesce(t.value, 'parent'), m.key, m.step, m.timestamp, m.value from metrics m join runs r using (run_uuid) "
        f"left join tags t on t.run_uuid = r.run_uuid and t.key = 'safebasin.trial_id' where r.experiment_id = {experiment_id}",
    )
    found: dict[str, Counter] = {}
    for trial, *point in rows:
        found.setdefault(trial, Counter())[tuple(point)] += 1
    return found


def test_every_server_goes_away_in_mid_search_and_nothing_is_lost_or_doubled(site, tmp_path, caplog):
    experiment = made_up.experiment(tmp_path, tracking={"experiment": "outages", "uri": site.mlflow.url})
    before, rows = made_up.trials(experiment.safety.limits, count=10, good=False)
    before, rows, out = with_events(before), [(with_events(trial), judged) for trial, judged in rows], experiment.output_dir
    tracker = connect.open_tracker(experiment, out)
    tracker._pump.longest = 1.0  # seconds between tries; 30 otherwise
    assert tracker.ui_hint() == f"{site.mlflow.url}/#/experiments/{tracker.sink.experiment_id}/runs?viewStateShareKey=safebasin-trials"
    tracker.start_baseline(made_up.spec(before))
    for event in before.history:
        tracker.event("baseline", event)
    tracker.finish_baseline(before)
    drive(tracker, rows[:2])
    servers.wait_until(lambda: drained(tracker), caplog.record_tuples.__repr__)

    # the tracking server: killed, and started again in the middle of a trial
    site.mlflow.stop()
    begin = time.monotonic()
    drive(tracker, rows[2:5])
    assert time.monotonic() - begin < 2, "the driver never waits for the server"
    assert tracker.run_id(rows[4][0].trial_id) is None
    waiting = spooled(out)[-3 * (len(STEPS) + 5) :]
    assert [run for run in dict.fromkeys(run for _, run in waiting) if run.startswith("t")][-3:] == [trial.trial_id for trial, _ in rows[2:5]]
    assert [op for op, run in waiting if run == rows[4][0].trial_id] == ["create", "log", "inputs", *["log"] * (len(STEPS) + 2), "status"]
    servers.wait_until(lambda: tracker._pump.away_since is not None, caplog.record_tuples.__repr__)
    site.mlflow.launch()
    tracker.start_trial(made_up.spec(rows[5][0]))
    for event in rows[5][0].history[:50]:
        tracker.event(rows[5][0].trial_id, event)
    site.mlflow.ready()
    for event in rows[5][0].history[50:]:
        tracker.event(rows[5][0].trial_id, event)
    tracker.finish_trial(*rows[5])
    servers.wait_until(lambda: drained(tracker), caplog.record_tuples.__repr__)

    # its database: crashes while records are on the way
    drive(tracker, rows[6:7])
    site.database.stop()
    drive(tracker, rows[7:9])
    servers.wait_until(lambda: tracker._pump.away_since is not None, caplog.record_tuples.__repr__)
    site.database.start()
    servers.wait_until(lambda: drained(tracker), caplog.record_tuples.__repr__)

    # the store of its artifacts; the driver stops meanwhile and another one goes on
    site.storage.stop()
    tracker._put("text", "parent", file="note.txt", text="written while the store was away")
    drive(tracker, rows[9:])
    servers.wait_until(lambda: [op for op, _ in spooled(out)][-1:] == ["text"] and len(tracker._spool) == 1, caplog.record_tuples.__repr__)
    assert tracker.close("KILLED", timeout=1) == 1
    site.storage.start()
    tracker = connect.open_tracker(experiment, out)
    (out / "report.md").write_text("# report\nkey: value\n")
    (out / "plot.png").write_bytes(bytes(range(256)))
    tracker.finish(selection.best(rows), [out / "report.md", out / "plot.png"])
    assert tracker.close("FINISHED") == 0
    assert not (out / "tracking.spool.jsonl").exists() and not (out / "tracking.spool.rejected.jsonl").exists()
    check(site, tracker, before, rows)


def check(site, tracker, before, rows) -> None:
    """Everything the driver said is in PostgreSQL and in S3, once."""
    number = tracker.sink.experiment_id
    runs = site.database.execute("mlflow", f"select status, lifecycle_stage from runs where experiment_id = {number}")
    assert Counter(runs) == Counter({("FINISHED", "active"): 2 + len(rows) - 1, ("FAILED", "active"): 1}), "one of the made-up trials failed"
    found = points(site, number)
    assert set(found) == {"baseline", *(trial.trial_id for trial, _ in rows)} | ({"parent"} if "parent" in found else set())
    for trial in (before, *(trial for trial, _ in rows)):
        names = ("loss", "learning_rate", "grad_norm")
        wanted = Counter({(f"train/{name}", e["step"], int(e["time"] * 1000), e[name]): 1 for e in trial.history for name in names})
        assert Counter({point: n for point, n in found[trial.trial_id].items() if point[0].startswith("train/")}) == wanted, trial.trial_id
        once = Counter(name for name, *_ in found[trial.trial_id].elements() if not name.startswith("train/"))
        assert once and set(once.values()) == {1}, "final figures are there once"
    (root,) = [run for key, run in tracker.sink.runs.items() if key == "parent"]
    objects = {key.removeprefix(f"{number}/{root}/artifacts/"): body for key, body in site.storage.objects().items() if key.startswith(f"{number}/")}
    assert set(objects) == {"config.yaml", "note.txt", "report.md", "plots/plot.png"}
    assert objects["plots/plot.png"] == bytes(range(256)) and objects["note.txt"] == b"written while the store was away"


def test_a_wrong_login_is_one_sentence_without_the_password(site, tmp_path, monkeypatch):
    experiment = made_up.experiment(tmp_path, tracking={"experiment": "logins", "uri": site.mlflow.url})

    def refused() -> str:
        with pytest.raises(TrackingError) as caught:
            connect.open_tracker(experiment, experiment.output_dir)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 and "hunter2" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    assert "does not accept the user 'searcher'" in refused()
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in refused()
    assert not experiment.output_dir.exists(), "nothing is written before the login holds"

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    connect.open_tracker(experiment, experiment.output_dir).close()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "colleague")
    assert "does not let the user 'colleague' write to the experiment 'logins'" in refused()


def test_a_password_in_the_address_stays_in_the_environment(site, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    secret = PASSWORD.replace(" ", "%20")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", site.mlflow.url.replace("//", f"//{USER}:{secret}@"))
    experiment = made_up.experiment(tmp_path, tracking={"experiment": "address"})
    tracker = connect.open_tracker(experiment, experiment.output_dir)
    assert secret not in tracker.ui_hint()
    (experiment.output_dir / "config.resolved.yaml").write_text("name: x\n")
    tracker.finish(None, [experiment.output_dir / "config.resolved.yaml"])
    assert tracker.close() == 0
    for path in experiment.output_dir.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path
    assert not any(secret.encode() in body for body in site.storage.objects().values())


def test_drivers_that_start_together_make_one_experiment(site, tmp_path):
    found: list[str] = []

    def start(number: int) -> None:
        sink = connect.Sink(site.mlflow.url, tmp_path / str(number))
        sink.find_experiment("together")
        found.append(sink.experiment_id)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and len(set(found)) == 1
    assert site.database.execute("mlflow", "select count(*) from experiments where name = 'together'") == [(1,)]
