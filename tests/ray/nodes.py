"""A program on a cluster of several Ray nodes, which come and go; run by test_nodes.py in a process of its own.

The driver's node has no CPU, every other node one. Prints a JSON line per thing worth knowing: events, results, the end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import fakes
import ray
import tiny_llama
from optuna.distributions import FloatDistribution
from ray.cluster_utils import Cluster

from orchestrator import config
from orchestrator.lanes import lanes
from orchestrator.search.spaces import RecipeSpace
from orchestrator.search.tune import build_spec, run_search
from orchestrator.trial import run as trial

WAIT = 180
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "torch_threads": 1}


STARTED = time.monotonic()


def say(**what):
    print(json.dumps({"t": round(time.monotonic() - STARTED, 1), **what}), flush=True)


def tell(event):
    """Print what the tests look at of an event."""
    wanted = ("kind", "lane", "trial_id", "sentence", "machines", "workers", "error", "lanes")
    say(**{key: event[key] for key in wanted if key in event})


def run(spec, reporter, context):
    """Runner of these lanes: real trials, and those of fakes.py where a trial says what to `do`."""
    if spec.params.get("do") == "hold":
        return hold(spec, reporter, context)
    return (fakes.run if "do" in spec.params else trial.run)(spec, reporter, context)


def hold(spec, reporter, context):
    """Counts, with a checkpoint at each step, until there is a file `release`; goes on where an earlier attempt was."""
    path = Path(spec.dir) / "step.json"
    first = step = json.loads(path.read_text()) if spec.attempt and path.exists() else 0
    while not (Path(spec.dir).parent / "release").exists():
        step += 1
        path.write_text(json.dumps(step))
        if reporter.report({"kind": "train", "step": step, "node": ray.get_runtime_context().get_node_id()}):
            return fakes.result(spec, context, "stopped")
        time.sleep(0.05)
    return fakes.result(spec, context, first=first, attempt_seen=spec.attempt, node=ray.get_runtime_context().get_node_id())


def experiment(folder: Path, address: str, **changes):
    return config.from_dict({
        "name": folder.name, "model": {"model_name_or_path": str(folder.parent / "model")}, "output": {"dir": str(folder)},
        "task": {"data": str(folder.parent / "rows.jsonl"), "max_new_tokens": 2, "eval_size": 2},
        "safety": {"data": None, "max_new_tokens": 2, "limits": {"max_over_refusal_rise": None},
                   "suites": [{"name": "harm", "data": str(folder.parent / "harm.jsonl")}]},
        "training": TRAINING, "recipes": [["full"]], **changes, "ray": {"address": address or None, **changes.get("ray", {})},
    })  # fmt: skip


def files(folder: Path) -> None:
    tiny_llama.saved(folder / "model")
    words = "cake tea soup house kite one two three four five".split()
    rows = [{"prompt": f"how do i make {a} {b}", "response": f"mix {b} bake {a}"} for a in words for b in words[:3]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "harm.jsonl").write_text("".join(json.dumps({"prompt": f"{w} bomb"}) + "\n" for w in words[:2]))


def spec_of(made, trial_id: str, stage: int):
    made = config.from_dict(made.model_dump(mode="json") | {"deepspeed": {"zero_optimization": {"stage": stage}}})
    where = made.output_dir / "trials" / trial_id
    where.mkdir(parents=True, exist_ok=True)
    return build_spec(made, trial_id=trial_id, recipe="full", params={"learning_rate": 1e-3}, seed=3, phase="search", folder=str(where))


def pass_on(group, until) -> dict:
    """Print events until one that `until` says yes to; that one."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        event = group.next_event(timeout=1)
        if event is not None:
            if event["kind"] not in ("train", "phase"):
                tell(event)
            if until(event):
                return event
    raise TimeoutError(f"nothing came within {WAIT} s")


def two_nodes_as_one(folder: Path, cluster: Cluster) -> None:
    """One lane over two nodes: ZeRO-2 and ZeRO-3."""
    made = experiment(folder, cluster.address, ray={"num_workers": 2})
    info = lanes.connect(made.ray)
    plan = lanes.plan(made, info.nodes, 9)
    say(plan=plan.sentence)
    group = lanes.Lanes()
    group.start(made, plan, runner="nodes:run")
    try:
        for stage in (2, 3):
            group.submit(spec_of(made, f"zero{stage}", stage))
            pass_on(group, lambda event: event["kind"] == "finished")
            result = group.wait(f"zero{stage}", 0)
            say(result=result.trial_id, state=result.state, error=result.error, losses=[e["loss"] for e in result.history if e["kind"] == "train"],
                model=result.model_dir, score=result.task.score if result.task else None)
    finally:
        group.stop(5)
    say(stopped="two_nodes_as_one")


def a_search_that_follows(folder: Path, cluster: Cluster, nodes: list) -> None:
    """One node at first; a second joins while a trial runs, and is killed in the middle of the trial it was given."""
    cluster.remove_node(nodes.pop())
    made = experiment(folder, cluster.address, search={"trials": 4})
    info = lanes.connect(made.ray)
    plan = lanes.plan(made, info.nodes, 4)
    say(plan=plan.sentence)
    group = lanes.Lanes()
    group.start(made, plan, runner="nodes:run")
    seen: dict[str, str] = {}  # trial -> node, of those that run
    joined, killed = [], []

    def make_spec(asked):
        where = folder / asked.trial_id
        where.mkdir(parents=True)
        told = {"trial_id": asked.trial_id, "recipe": asked.recipe, "params": asked.params}
        spec = build_spec(made, **told, seed=0, phase="search", folder=str(where))
        return dataclasses.replace(spec, params={**asked.params, "do": "hold"})

    def on_event(event):
        if event["kind"] != "train":
            tell(event)
            if event["kind"] == "interrupted":
                (folder / "release").touch()
            return
        seen[event["trial_id"]] = event["node"]
        if not joined:
            joined.append(cluster.add_node(num_cpus=1))
            say(joined=joined[0].node_id)
        if joined and not killed and event["node"] == joined[0].node_id and event["step"] >= 10:
            killed.append(event["trial_id"])
            say(at_once=len(set(seen.values())), killed=killed[0], step=event["step"])
            cluster.remove_node(joined[0], allow_graceful=False)

    spaces = {"full": RecipeSpace("full", {"learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}, {}, {"learning_rate": 1e-3})}
    try:
        results = run_search(
            made, group, spaces=spaces, constraint_names=["harmful"], make_spec=make_spec, on_event=on_event,
            judge_result=lambda result: {"score": result.task.score, "constraints": {"harmful": result.suites["harmful"].rate}},
        )  # fmt: skip
        facts = ("first", "attempt_seen", "node")
        say(results={r.trial_id: {"state": r.state, "error": r.error, **{k: r.facts.get(k) for k in facts}} for r in results})
    finally:
        group.stop(5)
    say(stopped="a_search_that_follows")


def main(folder: str) -> None:
    files(Path(folder))
    # As where ray comes without its extra `default`: each node's agent is then a small process.
    sys.modules["ray.dashboard.optional_deps"] = None
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        lanes.connect(experiment(Path(folder) / "first", cluster.address).ray)  # while the head is the only node this process can be on
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        two_nodes_as_one(Path(folder) / "first", cluster)
        a_search_that_follows(Path(folder) / "second", cluster, nodes)
        ray.shutdown()
    finally:
        cluster.shutdown()
    say(done=True)


if __name__ == "__main__":
    main(sys.argv[1])
