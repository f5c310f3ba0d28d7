"""What is handed over and what is kept: best.yaml runs the winner again, model/ is whole, other models leave the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import made_up
import pytest

from orchestrator import config
from orchestrator.config import Limits
from orchestrator.decision import limits
from orchestrator.decision import selection as decision_selection
from orchestrator.errors import StorageError
from orchestrator.experiment import baseline, handover
from orchestrator.records import TrialResult
from orchestrator.search import tune
from orchestrator.storage import ownership

LIMITS = Limits(max_degradation=0.1)
BASE = made_up.result("baseline", "", {}, phase="baseline", asr=0.02)


def rows(folder: Path, *results: TrialResult):
    for result in results:
        result.model_dir = str(folder / "trials" / result.trial_id / "model")
        Path(result.model_dir).mkdir(parents=True, exist_ok=True)
        (Path(result.model_dir) / "model.safetensors").write_bytes(result.trial_id.encode())
    return [(result, limits.judge(result, BASE, LIMITS)) for result in results]


def trial(trial_id, recipe="safegrad", *, asr=0.02, score=0.9, **more):
    params = {"learning_rate": 0.001 * int(trial_id[1:]), "safegrad.rho": 0.5} if recipe == "safegrad" else {"learning_rate": 0.002}
    return made_up.result(trial_id, recipe, params, asr=asr, over=0.02, score=score, **more)


def spec(experiment, result: TrialResult):
    return tune.build_spec(
        experiment, trial_id=result.trial_id, recipe=result.recipe, params=result.params, seed=result.seed, phase="search", folder="x"
    )


def test_best_yaml_pins_everything_and_reads_back(tmp_path):
    experiment = made_up.experiment(tmp_path)
    found = rows(tmp_path, trial("t1", score=0.8), trial("t2", score=0.95), trial("t3", "full", asr=0.9, score=0.99))
    selection = decision_selection.best(found)
    handover.write_best(tmp_path, experiment, selection, {r.trial_id: spec(experiment, r) for r, _ in found}, "the card")
    again = config.load(tmp_path / "best.yaml")
    assert again.recipes == (({"safegrad": {"rho": 0.5}},),)
    assert again.training.learning_rate == 0.002 and again.search.space == {"learning_rate": 0.002}
    assert again.search.trials == 1 and again.search.seeds == (0,)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"t2"
    assert (tmp_path / "model" / "README.md").read_text() == "the card"
    written = json.loads((tmp_path / "best.json").read_text())
    assert written["best"]["recipe"] == "safegrad" and written["nearest_miss"] is None


def handed_over(folder, experiment, *results):
    found = rows(folder, *results)
    handover.write_best(folder, experiment, decision_selection.best(found), {r.trial_id: spec(experiment, r) for r, _ in found}, "card")


def test_nothing_feasible_leaves_no_model_of_its_own_from_before(tmp_path):
    experiment = made_up.experiment(tmp_path)
    handed_over(tmp_path, experiment, trial("t1"))
    assert (tmp_path / "model" / "model.safetensors").exists() and (tmp_path / "best.yaml").exists()
    handed_over(tmp_path, experiment, trial("t3", "full", asr=0.9))
    assert not (tmp_path / "model").exists() and not (tmp_path / "best.yaml").exists()
    written = json.loads((tmp_path / "best.json").read_text())
    assert written["outcome"] == "nothing feasible" and written["nearest_miss"]["recipe"] == "full"


@pytest.mark.parametrize("where", ["before", "instead"])
def test_a_model_of_somebody_elses_is_neither_replaced_nor_removed(tmp_path, where):
    """Also where it took the place of one that was handed over: the folder's own list says which is which."""
    experiment = made_up.experiment(tmp_path)
    if where == "instead":
        handed_over(tmp_path, experiment, trial("t1"))
        shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"cannot replace .*model: it was not written by this run; move it away"):
        handed_over(tmp_path, experiment, trial("t2"))
    handed_over(tmp_path, experiment, trial("t3", "full", asr=0.9))  # nothing feasible: its place is not needed
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "model").iterdir()] == [("model.safetensors", b"mine")]


def test_a_file_that_somebody_put_beside_the_handed_over_model_stays(tmp_path):
    experiment = made_up.experiment(tmp_path)
    handed_over(tmp_path, experiment, trial("t1"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    handed_over(tmp_path, experiment, trial("t2"))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"t2" and (tmp_path / "model" / "notes.txt").read_text() == "mine"
    handed_over(tmp_path, experiment, trial("t3", "full", asr=0.9))
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"notes.txt", ownership.marker_name("model")}


def test_models_that_cannot_win_leave_the_disk(tmp_path):
    results = [trial(f"t{i}", score=0.5 + 0.05 * i) for i in range(1, 6)] + [trial("t8", "full", asr=0.9), trial("t9", "full", asr=0.3)]
    results[-1].params = {"learning_rate": 0.1}
    found = rows(tmp_path, *results)
    best = sorted((r.trial_id for r in results[:5]), key=lambda t: -next(r.task.score for r in results if r.trial_id == t))[:3]
    with ownership.active(tmp_path / "run", "run") as owned:
        for result, _ in found:
            owned.claim(f"trials/{result.trial_id}", folder=True)
    found = rows(tmp_path / "run", *results)
    handover.prune_models(found, "all")
    assert all(Path(r.model_dir).exists() for r, _ in found)
    handover.prune_models(found, "best")
    assert [r.trial_id for r, _ in found if Path(r.model_dir).exists()] == sorted([*best, "t9"])


def test_a_disk_that_fills_up_leaves_no_half_model(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    monkeypatch.setattr(handover.shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="disk is full"):
        handover._copy_model(source, tmp_path / "model", "")
    assert not (tmp_path / "model").exists()


def test_a_baseline_record_is_recalled_and_a_damaged_one_replaced(tmp_path):
    where = tmp_path / "baselines" / "x.json"
    assert baseline.recall(where) is None
    baseline.remember(where, BASE)
    assert baseline.recall(where).suites == BASE.suites
    where.write_text("{")
    assert baseline.recall(where) is None and not where.exists()


def test_the_baseline_key_follows_what_its_figures_depend_on(tmp_path):
    import tiny_llama

    tiny_llama.saved(tmp_path / "model")
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "c", "response": "d"}\n')

    def key(**sections):
        task = {"eval_data": str(tmp_path / "held_out.jsonl"), **sections.pop("task", {})}
        return baseline.key(made_up.experiment(tmp_path, model={"model_name_or_path": str(tmp_path / "model")}, task=task, **sections))

    same = key()
    assert key(training={"max_steps": 7}) == same and key(search={"trials": 2}) == same
    assert key(task={"metric": "contains"}) != same and key(safety={"max_new_tokens": 9}) != same
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "c", "response": "e"}\n')
    assert key() != same
    regrouped = [{"name": "harmful", "data": str(tmp_path / "harmful.jsonl"), "kind": "harmful"}]
    assert key(safety={"suites": regrouped}) != key(), "an untouched model's record holds the groups that intervals are made of"
