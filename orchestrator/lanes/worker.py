"""The loop a lane's workers run inside the cluster: take a trial from the broker, run it, report, again."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import tempfile
import traceback
from typing import Any

from orchestrator import faults
from orchestrator.records import LaneContext, TrialSpec
from orchestrator.redaction import redact_text
from orchestrator.storage import disk_space
from orchestrator.terminal import streams


class LaneReset(Exception):
    """A group leaves so that Ray Train starts a fresh one; the trial it ran has been reported already."""


class BrokerReporter:
    """`records.Reporter` of rank 0: every event is one call to the broker, answered within milliseconds."""

    def __init__(self, call, lane: int, token: int, trial_id: str):
        self._call, self._key = call, (lane, token, trial_id)

    def report(self, event: dict[str, Any]) -> bool:
        return self._call("report", *self._key, event)


class NoReporter:
    """Reporter of the other ranks: only rank 0 speaks for a trial."""

    def report(self, event: dict[str, Any]) -> bool:
        return False


def lane_loop(config: dict[str, Any]) -> None:
    """`train_loop_per_worker` of a lane: take a trial, run it, report, again, until the broker says stop.

    `config`: broker (actor handle), lane, runner ("package.module:function"), torch_threads, use_gpu, once (leave after one
    trial: `isolate`). An exception of the runner is a failed trial and the lane goes on; with several ranks, or where the CUDA
    context is lost, the group leaves and Ray Train starts a fresh one.
    """
    import ray
    from ray import train

    context = prepare_worker(config, train)
    broker, lane = config["broker"], config["lane"]

    def call(method: str, *args: Any) -> Any:
        return ray.get(getattr(broker, method).remote(*args))

    token = _register(call, lane, context)
    runner = resolve(config["runner"])
    index = 0
    while True:
        kind, spec = call("take", lane, token, context.rank, index)
        if kind == "idle":
            continue
        if kind == "trial":
            reporter = BrokerReporter(call, lane, token, spec.trial_id) if context.rank == 0 else NoReporter()
            outcome = run_trial(runner, spec, reporter, context)
            if index == 0:
                # Imported modules and the cached base stay for good: taken out of the collector's sight, a collection after
                # each trial costs a few ms instead of 0.3 s.
                gc.freeze()
            kind = call("done", lane, token, context.rank, outcome)
            index += 1
        if kind == "reset":
            raise LaneReset(f"lane {lane} starts a fresh worker group")
        if kind == "stop" or (config["once"] and index):
            return


def prepare_worker(config: dict[str, Any], train) -> LaneContext:
    """Environment and threads of a worker process; the trial's own libraries are imported after this."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threads = config["torch_threads"]
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if not config["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    from ray.train.torch import get_device

    if threads:
        torch.set_num_threads(threads)
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    info = train.get_context()
    return LaneContext(rank=info.get_world_rank(), world_size=info.get_world_size(), device=str(device))


def _register(call, lane: int, context: LaneContext) -> int:
    """Rank 0 registers the group; the others learn its token through the one collective a lane uses itself."""
    import ray
    from ray.train.v2._internal.execution.context import get_train_context

    token = 0
    if context.rank == 0:
        handles = [get_train_context().controller_actor, ray.get_runtime_context().current_actor]
        token = call("register", lane, context.world_size, os.getpid(), socket.gethostname(), handles)
    return context.peers.first(token)


def run_trial(runner, spec: TrialSpec, reporter, context: LaneContext) -> dict[str, Any]:
    """Run one trial and say how it went (see `Broker.done`); frees what it left, whatever happened."""
    try:
        result = runner(spec, reporter, context)
        return {"result": result.to_dict() if context.rank == 0 else None}
    except Exception as error:  # the boundary between a user's trial and the lane: anything it raises is that trial's failure
        text = redact_text(traceback.format_exc())
        streams.tell(f"trial {spec.trial_id} failed\n{text}", sys.stderr)
        fault = faults.of(error)
        waited = wait_for_room(spec, reporter, error) if fault == "machine" and disk_space.is_full(error) else 0.0
        return {"error": f"{type(error).__name__}: {error}", "fault": fault, "traceback": text, "poisoned": is_poisoned(error), "waited": waited}
    finally:
        gc.collect()
        if context.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()


def wait_for_room(spec: TrialSpec, reporter, error: BaseException) -> float:
    """Seconds a trial's lane waited because its disk is full: taken up at once it would only fail again, and soon be given up."""
    where = spec.dir or tempfile.gettempdir()
    if not disk_space.has_room(where):
        reporter.report({"kind": "log", "step": 0, "storage": f"the disk of {where} is full ({error}); its lane waits for room"})
    return disk_space.waited(where, lambda: reporter.report({"kind": "phase", "phase": "waits for disk space", "step": 0}))


def is_poisoned(error: BaseException) -> bool:
    """Whether the process cannot go on: after a CUDA error other than out-of-memory every further CUDA call fails too."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    return "CUDA error" in str(error) or "NCCL" in str(error)


def resolve(path: str):
    """The function named `package.module:function`. Raises ImportError or AttributeError with Python's own sentence."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
