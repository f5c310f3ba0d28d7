"""Two workers without a shared disk (two processes over gloo, a cache folder each) and one address: a trial moves from machines to machines."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def experiment(folder: Path, output: str) -> dict:
    return {
        "name": "two", "model": {"model_name_or_path": str(folder / "model")}, "recipes": [["full"]],
        "task": {"data": str(folder / "rows.jsonl"), "max_new_tokens": 4, "eval_fraction": 0.2},
        "safety": {"data": None, "max_new_tokens": 4, "suites": [{"name": "harm", "data": str(folder / "harm.jsonl")}]},
        "training": {"engine": "plain", "max_steps": 12, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 3},
        "monitor": {"every_steps": 2, "num_prompts": 2, "on_breach": "rollback", "rule": "threshold", "max_unsafe_rise": 1.0},
        "output": {"dir": output},
    }  # fmt: skip


def worker(rank: int, folder: Path) -> None:
    """On machines a and b until step 8, then on machines c and d; and for comparison in one go in a plain folder."""
    import torch.distributed as dist

    from orchestrator import config
    from orchestrator.records import LaneContext
    from orchestrator.search import tune
    from orchestrator.trial import run as trial

    class Reporter:
        stop_at = None

        def report(self, event):
            return event["kind"] == "train" and event["step"] == self.stop_at

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)

    def run(output: str, where: Path, attempt: int = 0, stop_at: int | None = None):
        made = config.from_dict(experiment(folder, output))
        spec = tune.build_spec(
            made, trial_id="t1", recipe="full", params={"learning_rate": 0.01}, seed=0, phase="search", folder=str(where / "trials" / "t1")
        )
        reporter = Reporter()
        reporter.stop_at = stop_at
        return trial.run(dataclasses.replace(spec, attempt=attempt), reporter, LaneContext(rank=rank, world_size=2))

    address = f"{(folder / 'bucket').as_uri()}/run"
    os.environ["SAFEBASIN_CACHE"] = str(folder / "ab"[rank])
    first = run(address, Path("/drivers/own"), stop_at=8)
    os.environ["SAFEBASIN_CACHE"] = str(folder / "cd"[rank])
    dist.barrier()
    if rank == 0:
        names = [str(path.relative_to(folder / "bucket" / "run")) for path in (folder / "bucket" / "run").rglob("*") if path.is_file()]
        (folder / "held").write_text(json.dumps(sorted(names)))
        os.truncate(folder / "bucket" / "run" / "trials" / "t1" / "checkpoint" / "step-00000006" / "rank-1.pt", 900)
    dist.barrier()
    second = run(address, Path("/drivers/own"), attempt=1)
    whole = run(str(folder / "plain"), folder / "plain")
    states = [[r.state, r.steps, r.facts.get("resumed_from_step"), r.facts.get("storage")] for r in (first, second, whole)]
    (folder / f"rank-{rank}.json").write_text(json.dumps(states))
    dist.destroy_process_group()


def test_a_trial_goes_on_on_machines_that_never_saw_it(tmp_path):
    import tiny_llama

    tiny_llama.saved(tmp_path / "model")
    rows = [{"prompt": f"how do i make a {w}", "response": f"mix the {w} and bake it"} for w in ("cake", "tea", "soup", "house", "kite")] * 4
    harm = [{"prompt": f"{w} bomb"} for w in ("one", "two", "three", "four")]
    for name, content in (("rows", rows), ("harm", harm)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    troubles = one[1].pop()
    assert one == [["stopped", 8, None, None], ["complete", 12, 3], ["complete", 12, None, None]]
    assert other[1].pop() == troubles and other == one, "both agree on the checkpoint before, as the second worker's shard is cut off"
    assert len(troubles) == 1 and "step-00000006: rank-1.pt is not what was written" in troubles[0]
    held = json.loads((tmp_path / "held").read_text())
    kept = {name.split("/")[2] + "/" + name.rpartition("/")[2] for name in held}
    assert kept == {f"{kind}/{name}" for kind in ("checkpoint", "good") for name in ("latest", "whole.json", "rank-0.pt", "rank-1.pt")}, held
    assert len(held) == 14, "of each kind the newest and the one before"
    moved, whole = (load_file(next(where.rglob("trials/t1/model/model.safetensors"))) for where in (tmp_path / "bucket", tmp_path / "plain"))
    assert all(moved[name].equal(whole[name]) for name in whole), "interrupted or not, the same model bit for bit"
    assert not list((tmp_path / "c").rglob("model.safetensors")), "a machine that is not the driver's keeps no model"
    assert not Path("/drivers").exists()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
