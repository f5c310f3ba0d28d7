"""A monitored trial on two workers (two started processes over gloo): both roll back where worker 0 says so, and end with one model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def experiment(folder: Path) -> dict:
    return {
        "name": "two", "model": {"model_name_or_path": str(folder / "model")}, "recipes": [["freeze_layers"]],
        "task": {"data": str(folder / "rows.jsonl"), "max_new_tokens": 6, "eval_fraction": 0.2},
        "safety": {"data": None, "max_new_tokens": 6, "suites": [{"name": "harm", "data": str(folder / "harm.jsonl")}]},
        "training": {"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 0},
        "deepspeed": {"zero_optimization": {"stage": 1}}, "ray": {"num_workers": 2},
        "monitor": {"every_steps": 2, "num_prompts": 6, "on_breach": "rollback"},
    }  # fmt: skip


def worker(rank: int, folder: Path) -> None:
    """One of two workers. Only worker 0 sees unsafe answers, at its second look."""
    import torch.distributed as dist

    from orchestrator import config
    from orchestrator.records import LaneContext
    from orchestrator.search import tune
    from orchestrator.trial import monitor, run

    class Quiet:
        def report(self, event):
            return False

    def ask(self, model, tokenizer, suite, recipe=None):
        return [recipe is not None and rank == 0 and self.looks == 2] * len(suite.prompts)

    monitor.Guard._ask = ask
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    made = config.from_dict(experiment(folder))
    spec = tune.build_spec(
        made, trial_id="t1", recipe="freeze_layers", params={"learning_rate": 0.01}, seed=0, phase="search", folder=str(folder / "t1")
    )
    result = run.run(dataclasses.replace(spec), Quiet(), LaneContext(rank=rank, world_size=2))
    losses = [(e["step"], e["loss"], e["learning_rate"]) for e in result.history if e["kind"] == "train"]
    (folder / f"rank-{rank}.json").write_text(json.dumps([result.state, result.facts["monitor"], losses]))
    dist.destroy_process_group()


def test_both_workers_go_back_where_worker_0_says_so(tmp_path):
    import tiny_llama

    tiny_llama.saved(tmp_path / "model")
    rows = [{"prompt": f"how do i make a {w}", "response": f"mix the {w} and bake it"} for w in ("cake", "tea", "soup", "house", "kite")] * 4
    harm = [{"prompt": f"{w} bomb"} for w in ("one", "two", "three", "four", "five", "six")]
    for name, content in (("rows", rows), ("harm", harm)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = []
    try:
        for rank in range(2):
            with logs[rank].open("w") as log:
                command = [sys.executable, __file__, str(rank), str(tmp_path)]
                processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT))
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=500) == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second and first[0] == "complete" and first[1]["rollbacks"] == 1
    assert [step for step, *_ in first[2]] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert first[2][4][1] == first[2][2][1] and first[2][4][2] == 0.5 * first[2][2][2]


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
