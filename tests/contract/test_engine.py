"""DeepSpeedEngine against PlainEngine, ZeRO 0-3 and with shards on the host, one worker (here) and two (two started processes over gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import engine_cases
import pytest
import torch
import toy

STAGES = (0, 1, 2, 3, *engine_cases.OFFLOADED)
ROOT = Path(__file__).parents[2]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """Results of both workers; started before the one-worker cases run, waited for after."""
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"log-{rank}" for rank in range(2)]
    processes = []
    for rank in range(2):
        with logs[rank].open("w") as log:
            command = [sys.executable, engine_cases.__file__, str(rank), "2", str(folder)]
            processes.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT))
    yield lambda: _results(processes, logs, folder)
    for process in processes:
        process.kill()
        process.wait()


def _results(processes, logs, folder):
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=550) == 0, log.read_text()[-4000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one(two_workers, tmp_path_factory):
    return engine_cases.everything(0, 1, str(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two(one, two_workers):
    return two_workers()


def assert_matches(found, reference):
    (weights, logs), (wanted, wanted_logs) = found, reference
    assert toy.largest_difference(weights, wanted) < CLOSE
    for log, wanted_log in zip(logs, wanted_logs, strict=True):
        assert log == pytest.approx(wanted_log, rel=1e-3, abs=1e-5)


def runs(*stages) -> list[tuple]:
    """(stage, case) of all cases but those that a strategy refuses at that stage."""
    whole = [s for s in stages if s not in engine_cases.OFFLOADED]
    found = [(s, case) for s in whole for case, options in engine_cases.CASES.items() if (s or 0) <= options.get("last_stage", 3)]
    return found + [(s, case) for s in stages if s in engine_cases.OFFLOADED for case in engine_cases.ON_HOST]


@pytest.mark.parametrize(("stage", "case"), runs(*STAGES))
def test_one_worker_matches_plain(one, stage, case):
    assert_matches(one[stage, case], one[None, case])


@pytest.mark.parametrize(("stage", "case"), runs(None, *STAGES))
def test_two_workers_match_plain_with_one(one, two, stage, case):
    for results in two:
        assert_matches(results[stage, case], one[None, case])


@pytest.mark.parametrize("stage", (None, *STAGES))
def test_resume_is_bit_for_bit(one, two, stage):
    for results in (one, *two):
        assert toy.identical(*results[stage, "resume"])


@pytest.mark.parametrize("stage", (None, *STAGES))
def test_shifted_moves_and_restores_bit_for_bit(one, two, stage):
    for results in (one, *two):
        before, inside, after, exported = results[stage, "shift"]
        assert toy.identical(before, after)
        wanted = one[None, "shift"]
        assert toy.largest_difference(inside, wanted[1]) < CLOSE < toy.largest_difference(inside, before)
        assert toy.largest_difference(exported, wanted[3]) < CLOSE


@pytest.mark.parametrize("stage", (None, *STAGES))
def test_a_nan_on_one_worker_raises_on_all(one, two, stage):
    for results in (one, *two):
        assert "the loss became nan at optimiser step 1; lower training.learning_rate" in results[stage, "nan"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_gathered_model_generates_in_the_middle_of_training(one, two, stage):
    for results in (one, *two):
        assert results[stage, "generates"] == one[None, "generates"]


def test_shards_stay_shards(two):
    """Adapters and frozen tensors are whole in every worker's export, frozen ones as they were."""
    start = toy.weights(toy.model(layers=2))
    for results in two:
        for stage in (0, 1, 2, 3):
            weights = results[stage, "frozen layers"][0]
            for name, tensor in weights.items():
                assert torch.equal(tensor, start[name]) == (".layers.1." in name)
