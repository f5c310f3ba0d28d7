"""Trial runners that need no model: what a lane may meet, made on purpose. `spec.params["do"]` says which."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from orchestrator.records import LaneContext, Reporter, SuiteResult, TaskResult, TrialResult, TrialSpec


def run(spec: TrialSpec, reporter: Reporter, context: LaneContext) -> TrialResult:
    """Runner for `Lanes.start(runner="fakes:run")`: does what `spec.params["do"]` names, "score" without it."""
    return globals()[f"do_{spec.params.get('do', 'score')}"](spec, reporter, context)


def result(spec: TrialSpec, context: LaneContext, state: str = "complete", **facts) -> TrialResult:
    """Score and safety of a made-up world: both rise with the learning rate, which is unsafe above 1e-3."""
    rate = float(spec.params.get("learning_rate", 1e-4))
    unsafe = [rate > 1e-3] * 4
    suites = {"harmful": SuiteResult("harmful", "harmful", list("abcd"), None, unsafe, [not u for u in unsafe])}
    score = min(1.0, rate * 100)
    task = TaskResult("exact_match", score, [score], ["r0"])
    facts = {"pid": os.getpid(), "seen": context.cache.get("seen", 0), "rank": context.rank, "world": context.world_size, **facts}
    return TrialResult(spec.trial_id, spec.recipe, spec.params, spec.seed, spec.phase, state, task, suites, steps=1, facts=facts)


def do_score(spec, reporter, context):
    context.cache["seen"] = context.cache.get("seen", 0) + 1
    reporter.report({"kind": "train", "step": 1, "loss": 1.0})
    time.sleep(float(spec.params.get("sleep", 0.0)))
    return result(spec, context)


def do_count(spec, reporter, context):
    """Counts to 40 slowly, with a checkpoint file at each step; stops when asked; goes on where an earlier attempt was."""
    path = Path(spec.dir) / "step.json"
    first = json.loads(path.read_text())["step"] if spec.attempt and path.exists() else 0
    for step in range(first + 1, 41):
        path.write_text(json.dumps({"step": step, "pid": os.getpid()}))
        if reporter.report({"kind": "train", "step": step, "pid": os.getpid()}):
            return result(spec, context, "stopped", first=first, last=step)
        time.sleep(0.05)
    return result(spec, context, first=first, last=40, attempt_seen=spec.attempt)


def do_raise(spec, reporter, context):
    raise ValueError("this trial cannot work")


def do_raise_on_one_rank(spec, reporter, context):
    """Rank 1 raises while rank 0 waits for it in a collective."""
    import torch
    import torch.distributed as dist

    if context.rank == 1:
        raise RuntimeError("only rank 1 fails")
    dist.all_reduce(torch.ones(1))
    return result(spec, context)


def do_reduce(spec, reporter, context):
    """All ranks add up their number plus one."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([context.rank + 1.0])
    dist.all_reduce(total)
    reporter.report({"kind": "log", "step": 0, "from_rank": context.rank})
    return result(spec, context, total=total.item())


def do_die(spec, reporter, context):
    """Dies as by the out-of-memory killer, every time."""
    os.kill(os.getpid(), 9)


def do_deaf(spec, reporter, context):
    """Never looks at its reporter."""
    time.sleep(600)
    return result(spec, context)
