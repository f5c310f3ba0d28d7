"""Other people's files: whatever lies in and around an output folder is there, byte for byte, after every command and every end of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import made_up
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from orchestrator import config
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.errors import ConfigError, SafebasinError, StorageError
from orchestrator.experiment import checks, driver, handover, mirror, places
from orchestrator.experiment import folder as run_folder
from orchestrator.experiment import resume as resuming
from orchestrator.report import table
from orchestrator.search import tune
from orchestrator.storage import files as outputs
from orchestrator.storage import ownership
from orchestrator.verbs import compare, evaluate, render

BASE = made_up.result("baseline", "", {}, phase="baseline", asr=0.02)


def tree(root: Path) -> dict[str, tuple]:
    """Everything below: names, kinds, modes, bytes or where links point to."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder", path.stat().st_mode)
        else:
            found[name] = ("file", path.stat().st_mode, path.read_bytes())
    return found


def unchanged(before: dict, root: Path) -> None:
    after = tree(root)
    assert {name: after.get(name) for name in before} == before


def run_once(made, folder: Path, *, fail: bool = False, resumed: bool = False) -> None:
    """What a run does to its folder, without Ray: the same calls in the same order."""
    checks.check_output(folder, made.output.overwrite and not resumed, resumed, places.inputs(made))
    with ownership.active(folder, "run"), resuming.held(folder):
        if not resumed:
            driver.prepare_folder(made, folder)
        run_folder.claim_others(made, folder)
        result = made_up.result("t0001", "full", {"learning_rate": 0.01}, asr=0.02, over=0.02, score=0.9)
        trial = folder / "trials" / result.trial_id
        ownership.claim(trial, folder=True)
        workers_part(trial, folder)
        result.model_dir = str(trial / "model")
        judged = limits.judge(result, BASE, made.safety.limits)
        outputs.write_json(folder / "baseline.json", BASE.to_dict())
        table.write_trials_csv(folder / "trials.csv", [table.trial_row(result, judged)])
        outputs.write_json(trial / "result.json", result.to_dict())
        if fail:
            raise StorageError("the disk is full")
        remove = mirror.Folder().remove
        handover.remove_checkpoint(result, folder, remove)
        handover.prune_models([(result, judged)], "best", remove)
        handover.remove_trained(folder, "best", remove)
        spec = tune.build_spec(made, trial_id="t0001", recipe="full", params=result.params, seed=0, phase="search", folder=str(trial))
        selection = decision_selection.best([(result, judged)])
        handover.write_best(folder, made, selection, {"t0001": spec}, "card")
        outputs.write_text(folder / "report.html", "report")


def workers_part(trial: Path, folder: Path) -> None:
    """What workers and Ray write without asking."""
    files = ["checkpoint/latest", "checkpoint/step-00000010/rank-0.pt", "model/model.safetensors", "model/config.json"]
    for path in [*(trial / f for f in files), folder / "trained" / ("0" * 16) / "facts.json", folder / "ray" / "search" / "tuner.pkl"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a worker's")
    (folder / "study.journal").write_text("{}\n")


OURS = ["model", "trained", "trials", "trials.csv", "report.html", "ray", "best.yaml", "study.journal", ".running.lock", "plots", ".git",
        "evaluation.json", "run.yaml", "basin.json", "safety_layers.json", ".safebasin.json"]  # fmt: skip
THEIRS = ["notes.txt", "lost+found", "Model", "src", "trials.csv.bak", ".hidden", "model2", "t0001", "ä b"]
INSIDE = ["trials/notes.txt", "trials/t0001/mine.txt", "model/mine.txt", "plots/mine.png", "ray/mine", "trials/t0001/model/mine.gguf",
          "trained/mine/x", "trials/t0001/checkpoint/mine"]  # fmt: skip
entries = st.tuples(st.sampled_from(["file", "folder", "link", "dangling"]), st.binary(max_size=8))


def plant(root: Path, name: str, kind: str, data: bytes, outside: Path) -> None:
    path = root / name
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    if kind == "file":
        path.write_bytes(data)
        path.chmod(0o640 if data else 0o600)
    elif kind == "folder":
        path.mkdir()
        (path / "inner").write_bytes(data)
        (path / "up").symlink_to(outside)
    else:
        path.symlink_to(outside if kind == "link" else root / "nowhere")


def commands(folder: Path):
    """Every way of writing into a folder, each as a call that may end in one sentence."""
    made = made_up.experiment(folder.parent, output={"dir": str(folder)})
    again = made_up.experiment(folder.parent, output={"dir": str(folder), "overwrite": True})
    quiet = Console(file=io.StringIO())
    yield lambda: checks.check_destination(made)
    yield lambda: run_once(made, folder, fail=True)
    yield lambda: run_once(made, folder)
    yield lambda: run_once(made, folder, resumed=True)
    yield lambda: run_once(again, folder, fail=True)
    yield lambda: run_once(again, folder)
    yield lambda: evaluating_written(folder)
    yield lambda: comparing_written(folder, quiet)
    yield lambda: render.check_output(folder, made) or render.write(render.Manifests("x", [{"kind": "a"}], []), folder)


def evaluating_written(folder: Path) -> None:
    evaluate.check_output(folder, True)
    with ownership.active(folder, "evaluation"):
        outputs.write_text(folder / "evaluation.json", "{}")
        outputs.write_bytes(folder / "plots" / "failures.png", b"x")


def comparing_written(folder: Path, quiet: Console) -> None:
    for kind, name in (("comparison", compare.FILE), ("basin", "basin.json"), ("locate", "safety_layers.json")):
        places.check_output(folder, kind, (), field="--output")
        with ownership.active(folder, kind):
            outputs.write_text(folder / name, "{}")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    before=st.dictionaries(st.sampled_from(OURS + THEIRS), entries, max_size=4),
    around=st.dictionaries(st.sampled_from(OURS + THEIRS), entries, max_size=3),
    later=st.dictionaries(st.sampled_from(OURS + THEIRS + INSIDE), entries, max_size=5),
)
def test_a_random_tree_in_and_around_the_folder_is_the_same_after_every_command(tmp_path_factory, before, around, later):
    root = tmp_path_factory.mktemp("tree")
    outside = root / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    job = root / "job"
    folder = job / "out"
    folder.mkdir(parents=True)
    for name, (kind, data) in around.items():
        plant(job, name, kind, data, outside)
    for name, (kind, data) in before.items():
        plant(folder, name, kind, data, outside)
    foreign = tree(root)
    for number, command in enumerate(commands(folder)):
        with contextlib.suppress(SafebasinError):  # refused in a sentence, or failed on purpose
            command()
        unchanged(foreign, root)
        if number == 3:  # after a whole run: somebody puts files among ours
            own = set(tree(root))
            for name, (kind, data) in later.items():
                plant(folder, name, kind, data, outside)
            foreign |= {name: one for name, one in tree(root).items() if name not in own}
    shutil.rmtree(root)


def test_a_refused_folder_stays_as_it_is_and_none_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = made_up.experiment(tmp_path, output={"dir": str(tmp_path / "new" / "out")})
    checks.check_destination(made)
    assert not (tmp_path / "new").exists(), "looking makes nothing"
    (tmp_path / "out" / "model").mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"holds model, which this run would write.*not made by it.*move it away, or give another folder"):
        driver.run(made_up.experiment(tmp_path, output={"dir": str(tmp_path / "out")}), Console(file=io.StringIO()))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("spelt", [".", "./", "..", "sub/..", "../here", "/", "link", "sub/../../here/."])
def test_here_and_above_are_refused_however_they_are_spelt(tmp_path, monkeypatch, spelt):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "link").symlink_to(here)
    monkeypatch.chdir(here)
    made = config.load(None, [f"output.dir={spelt}"])
    with pytest.raises(ConfigError, match=r"(is the folder you are in|lies above the folder you are in|is the root of).*give a folder"):
        checks.check_destination(made)


@pytest.mark.parametrize(("where", "why"), [("home", "is a home folder"), (".", "lies above the home folder"), ("repo", "work tree"),
                                            ("repo/.git/x", "git repository's own"), ("bare", "git repository's own")])  # fmt: skip
def test_homes_and_work_trees_are_refused(tmp_path, monkeypatch, where, why):
    (tmp_path / "home").mkdir()
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    for name in ("HEAD", "objects", "refs"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match=why):
        places.check(tmp_path / where)
    places.check(tmp_path / "repo" / "outputs" / "x")
    places.check(tmp_path / "home" / "x")


def test_a_folder_that_holds_or_lies_in_what_is_read_is_refused(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    job = tmp_path / "job"
    (job / "model").mkdir(parents=True)
    (job / "data").mkdir()
    (job / "data" / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (job / "cfg").mkdir()
    (job / "cfg" / "zero.json").write_text("{}")
    (job / "cfg" / "job.yaml").write_text("deepspeed: zero.json\ntask: {data: ../data/rows.jsonl}\nmodel: {model_name_or_path: ../model}\n")
    (tmp_path / "other").symlink_to(job / "cfg")

    def refused(folder):
        with pytest.raises(ConfigError) as error:
            checks.check_destination(config.load(job / "cfg" / "job.yaml", [f"output.dir={folder}", *more]))
        return str(error.value)

    more: list[str] = []
    assert "holds" in refused(job) and "is in use" in refused(job)
    assert "lies in model.model_name_or_path" in refused(job / "model" / "deep" / "out")
    assert "holds task.data" in refused(job / "data")
    assert "holds the config" in refused(job / "cfg") and "holds the config" in refused(tmp_path / "other")
    more = ["deepspeed.gradient_clipping=1"]
    assert "holds the config" in refused(job / "cfg" / ".." / "cfg")
    checks.check_destination(config.load(job / "cfg" / "job.yaml", [f"output.dir={job / 'cfg' / 'out'}"]))


@pytest.mark.parametrize("body", ["", "{", "[]", "{}", '{"made_by": "safebasin"}', "x" * 100, "deep"])
def test_a_marker_that_we_did_not_write_owns_nothing(tmp_path, body):
    (tmp_path / ".safebasin.json").write_text("[" * 100_000 if body == "deep" else body)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="damaged or was not written by safebasin.*move it away"):
        checks.check_output(tmp_path, True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["../precious", "/etc/passwd", "a/../../x", "src/", ".git/", "job.yaml", "trials/../../x", "", ".", "trials\\x", 7])
def test_a_marker_that_names_what_no_run_makes_owns_nothing(tmp_path, name):
    body = {"made_by": "safebasin", "format": 1, "kind": "run", "id": "0" * 32, "made": ["trials/", name]}
    (tmp_path / ".safebasin.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="it lists .*which a run never makes"):
        ownership.opened(tmp_path, "run")
    with pytest.raises(ConfigError, match="it lists"):
        checks.check_output(tmp_path, True)


def test_links_are_never_followed(tmp_path):
    """A folder of ours that was replaced by a link, a link among our files, and an output folder that is itself a link."""
    target = tmp_path / "scratch"
    target.mkdir()
    (tmp_path / "out").symlink_to(target)
    made = made_up.experiment(tmp_path, output={"dir": str(tmp_path / "out")})
    run_once(made, tmp_path / "out")
    assert (target / "trials.csv").is_file() and (tmp_path / "out").is_symlink()
    precious = tmp_path / "precious"
    (precious / "t0001" / "checkpoint").mkdir(parents=True)
    (precious / "t0001" / "checkpoint" / "latest").write_text("x")
    (target / "trials" / "t0001" / "model" / "config.json").unlink(missing_ok=True)
    shutil.rmtree(target / "trials")
    (target / "trials").symlink_to(precious)
    before = tree(precious)
    assert not ownership.remove(tmp_path / "out" / "trials" / "t0001" / "checkpoint") and not ownership.remove(tmp_path / "out" / "trials")
    again = made_up.experiment(tmp_path, output={"dir": str(tmp_path / "out"), "overwrite": True})
    with pytest.raises(ConfigError, match="trials became links"):
        run_once(again, tmp_path / "out")
    assert tree(precious) == before
    with pytest.raises(ConfigError, match="is a link to nothing"):
        (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
        places.check(tmp_path / "dangling")


def test_overwrite_removes_what_the_run_made_and_nothing_else(tmp_path):
    folder = tmp_path / "out"
    run_once(made_up.experiment(tmp_path, output={"dir": str(folder)}), folder)
    own = ownership.read(folder, "run")
    assert own.empty() == []
    assert [path.name for path in folder.iterdir()] == [".safebasin.json"]
    with ownership.active(folder, "run"):
        assert ownership.opened(folder, "run").made == set()


def test_a_run_of_an_earlier_version_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("trials.csv", "config.resolved.yaml"):
        (tmp_path / "out" / name).write_text("x")
    for overwrite, resume in ((False, False), (True, False), (False, True)):
        with pytest.raises(ConfigError, match="a run of an earlier version of safebasin.*move the folder away, or finish the run with the version"):
            checks.check_output(tmp_path / "out", overwrite, resume)


def test_a_name_goes_on_the_list_before_it_is_made_and_off_when_it_is_gone(tmp_path):
    with ownership.active(tmp_path, "run") as owned:
        ownership.claim(tmp_path / "best.yaml")
        assert "best.yaml" in ownership.read(tmp_path, "run").made and not (tmp_path / "best.yaml").exists()
    assert "best.yaml" not in ownership.opened(tmp_path, "run").made, "nothing was made of it, so what comes there is not ours"
    (tmp_path / "report.html").write_text("mine")
    with ownership.active(tmp_path, "run"), pytest.raises(StorageError, match=r"report\.html: it is there and was not made by it.*move it away"):
        outputs.write_text(tmp_path / "report.html", "ours")
    assert (tmp_path / "report.html").read_text() == "mine" and owned.kind == "run"


def test_locate_layers_leaves_a_finished_run_alone(tmp_path):
    folder = tmp_path / "out"
    run_once(made_up.experiment(tmp_path, output={"dir": str(folder)}), folder)
    before = tree(folder)
    with ownership.active(folder, "locate"):
        outputs.write_text(folder / "safety_layers.json", "{}")
    unchanged(before, folder)
    assert set(tree(folder)) - set(before) == {"safety_layers.json", ".safebasin.locate.json"}


def test_the_copy_of_an_address_takes_up_what_workers_left_before_a_driver_came(tmp_path, monkeypatch):
    """A machine whose worker wrote into the copy, while the driver and its list were elsewhere, can be the driver's next."""
    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    made = config.load(None, [f"output.dir={(tmp_path / 'bucket').as_uri()}/run"])
    folder = made.output_dir
    files = ["trials/t0001/checkpoint/latest", "trials/t0001/notes.txt", "workers/rank-1/trials/t0001/checkpoint/latest"]
    for path in [folder / name for name in files]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    checks.check_output(folder, False, True, kind="mirror")
    with ownership.active(folder, "mirror") as owned:
        ownership.claim(folder / "trials" / "t0001", folder=True)
        owned.empty()
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [".safebasin.json", "trials/t0001/notes.txt"]


def test_objects_of_somebody_elses_at_an_address_are_neither_replaced_nor_deleted(tmp_path, monkeypatch):
    import threading

    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    bucket = tmp_path / "bucket" / "run"
    (bucket / "theirs").mkdir(parents=True)
    (bucket / "theirs" / "x").write_text("mine")
    address = f"output.dir={(tmp_path / 'bucket').as_uri()}/run"

    def written(*overrides):
        made = config.load(None, [address, *overrides])
        made.output_dir.mkdir(parents=True, exist_ok=True)
        with mirror.opened(made, threading.Event(), print) as copy:
            if made.output.overwrite:
                copy.empty()
            copy.begin()
            outputs.write_text(made.output_dir / "config.resolved.yaml", config.dump_yaml(made))
            outputs.write_text(made.output_dir / "trials.csv", "trial_id\n")
            outputs.write_text(made.output_dir / "trials" / "t0001" / "result.json", "{}")
            if not made.output.overwrite:
                (bucket / "report.html").write_text("mine")  # in mid-run
            outputs.write_text(made.output_dir / "report.html", "ours")
            return copy.close()

    assert "report.html" in written() and (bucket / "trials" / "t0001" / "result.json").exists()
    with pytest.raises(ConfigError, match=r"holds report\.html, which this run would write"):
        written("output.overwrite=true")
    (bucket / "report.html").rename(bucket / "theirs" / "report.html")
    (bucket / "trials" / "notes").write_text("mine")
    (bucket / "trials" / "t0002").mkdir()
    (bucket / "trials" / "t0002" / "result.json").write_text("mine")
    assert written("output.overwrite=true") is None
    names = ("theirs/x", "theirs/report.html", "trials/notes", "trials/t0002/result.json")
    assert {name: (bucket / name).read_text() for name in names} == dict.fromkeys(names, "mine")
    assert (bucket / "report.html").read_text() == "ours"
    (tmp_path / "bucket" / "two").mkdir()
    (tmp_path / "bucket" / "two" / "trials.csv").write_text("mine")
    before = tree(tmp_path / "bucket" / "two")
    with pytest.raises(ConfigError, match="holds trials.csv, which this run would write.*move it away"):
        written(f"output.dir={(tmp_path / 'bucket').as_uri()}/two", "output.overwrite=true")
    assert tree(tmp_path / "bucket" / "two") == before
