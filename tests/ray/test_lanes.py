"""Lanes on a real cluster: what they run, what they survive, and how they end."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
import time
from pathlib import Path

import psutil
import pytest

import orchestrator.lanes.cluster
from orchestrator.errors import CapacityError, ConfigError, LaneError
from orchestrator.lanes.lanes import connect, plan

WAIT = 180


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    return not alive(pid)


def events_of(lanes, trial_id, until="finished"):
    while True:
        event = lanes.next_event(trial_id, timeout=WAIT)
        assert event is not None, f"no {until} of {trial_id} within {WAIT} s"
        yield event
        if event["kind"] == until:
            return


def test_a_process_that_is_connected_stays_so(cluster, make_experiment):
    again = connect(make_experiment().ray)
    assert cluster.started and not again.started and again.address == cluster.address
    assert sum(node.get("CPU", 0) for node in again.nodes) == 3


def test_a_cluster_of_ours_listens_on_loopback_and_its_folder_is_ours_alone(cluster, pair):
    folder = orchestrator.lanes.cluster._folder.path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.getuid()
    assert cluster.address.startswith("127.0.0.1:") and Path(cluster.log_dir).is_relative_to(folder)
    watch = orchestrator.lanes.cluster._folder._watch.pid
    processes = [p for p in psutil.Process().children(recursive=True) if p.pid != watch]
    assert any(p.name() == "ray::RayTrainWorker" or "RayTrainWorker" in " ".join(p.cmdline()) for p in processes)
    open_ = {f"{c.laddr.ip}:{c.laddr.port} of {p.name()}" for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"}
    assert open_ and not [one for one in open_ if not one.startswith(("127.", "::1", "::ffff:127."))], open_


def test_no_call_of_rays_starts_a_second_cluster(cluster):
    from ray._private import auto_init_hook

    assert auto_init_hook.enable_auto_connect is False, "a thread that outlives the cluster would start another, in /tmp/ray"


def test_the_ray_client_is_refused_with_the_way_out(make_experiment):
    with pytest.raises(ConfigError, match="ray job submit"):
        connect(make_experiment(ray={"address": "ray://head:10001"}).ray)


def test_what_does_not_fit_is_refused_before_anything_starts(cluster, make_experiment):
    with pytest.raises(CapacityError, match="room for 3 such workers"):
        plan(make_experiment(ray={"num_workers": 4}), cluster.nodes, 5)


def test_trials_run_on_groups_that_stay_and_events_stream(pair, make_spec):
    specs = [make_spec(sleep=0.3, learning_rate=1e-3) for _ in range(6)]
    for spec in specs:
        pair.submit(spec)
    kinds = [event["kind"] for event in events_of(pair, specs[0].trial_id)]
    assert kinds == ["started", "train", "finished"]
    results = [pair.wait(spec.trial_id, WAIT) for spec in specs]
    assert [r.state for r in results] == ["complete"] * 6 and results[0].suites["harmful"].rate == 0.0
    # on a slow machine the first lane may be through before the second is up
    assert len({r.facts["pid"] for r in results}) <= 2, "at most two processes ran all six"
    assert sum(r.facts["seen"] for r in results if r.facts["pid"] == results[0].facts["pid"]) > 1, "the lane's cache stayed"


def test_an_exception_fails_its_trial_and_no_other(pair, make_spec):
    bad, good = make_spec(do="raise"), make_spec()
    pair.submit(bad)
    pair.submit(good)
    failed = pair.wait(bad.trial_id, WAIT)
    assert failed.state == "failed" and failed.error.startswith("ValueError: this trial cannot work (a defect of safebasin")
    assert failed.fault == "safebasin"
    assert "do_raise" in failed.facts["traceback"]
    assert pair.wait(good.trial_id, WAIT).state == "complete"


def test_a_trial_id_is_free_again_when_its_trial_has_finished(pair, make_spec):
    spec = make_spec(sleep=0.5)
    pair.submit(spec)
    with pytest.raises(ValueError, match="queued or running"):
        pair.submit(spec)
    assert pair.wait(spec.trial_id, WAIT).state == "complete"
    pair.submit(dataclasses.replace(spec, params={"do": "raise"}))
    assert pair.wait(spec.trial_id, WAIT).state == "failed"


def test_a_running_trial_stops_at_its_next_report_and_a_queued_one_at_once(pair, make_spec):
    running, other, queued = make_spec(do="count"), make_spec(do="count"), make_spec(do="count")
    for spec in (running, other, queued):
        pair.submit(spec)
    assert next(event for event in events_of(pair, running.trial_id, "train") if event["kind"] == "train")["step"] == 1
    for spec in (running, other, queued):
        pair.cancel(spec.trial_id)
    stopped, never = pair.wait(running.trial_id, WAIT), pair.wait(queued.trial_id, WAIT)
    assert stopped.state == "stopped" and stopped.facts["cancelled"] and stopped.facts["last"] < 40
    assert never.state == "stopped" and never.facts["started"] is False
    assert pair.wait(other.trial_id, WAIT).state == "stopped"


def test_a_killed_worker_resumes_its_trial_and_loses_no_other(pair, make_spec):
    victim, others = make_spec(do="count"), [make_spec(sleep=0.2) for _ in range(4)]
    pair.submit(victim)
    for spec in others:
        pair.submit(spec)
    pids = []
    for event in events_of(pair, victim.trial_id):
        if event["kind"] == "train" and event["step"] == 10 and not pids:
            pids.append(event["pid"])
            os.kill(event["pid"], signal.SIGKILL)
    result = pair.wait(victim.trial_id, 0)
    assert result.state == "complete" and result.facts["attempt_seen"] == 1
    assert 9 <= result.facts["first"] <= 12 and result.facts["last"] == 40, "it went on from its checkpoint"
    assert result.facts["pid"] != pids[0]
    assert [pair.wait(spec.trial_id, WAIT).state for spec in others] == ["complete"] * 4


def test_a_trial_that_kills_its_worker_every_time_is_told_failed(pair, make_spec):
    deadly, after = make_spec(do="die"), make_spec()
    pair.submit(deadly)
    result = pair.wait(deadly.trial_id, WAIT)
    assert result.state == "failed" and "died 2 times" in result.error and "ray.max_trial_failures=1" in result.error
    assert result.fault == "machine"
    pair.submit(after)
    assert pair.wait(after.trial_id, WAIT).state == "complete", "a lane is left"


def test_two_workers_train_together_and_an_error_on_one_rank_hangs_nobody(start_lanes, make_spec):
    lanes = start_lanes(ray={"num_workers": 2, "cpus_per_worker": 0.5, "lanes": 1, "max_failures": 0})
    try:
        together, broken, after = make_spec(do="reduce"), make_spec(do="raise_on_one_rank"), make_spec(do="reduce")
        for spec in (together, broken, after):
            lanes.submit(spec)
        result = lanes.wait(together.trial_id, WAIT)
        assert result.facts["total"] == 3.0 and (result.facts["world"], result.facts["rank"]) == (2, 0)
        failed = lanes.wait(broken.trial_id, WAIT)
        assert failed.state == "failed" and failed.error.startswith("RuntimeError: only rank 1 fails")
        # A fresh group goes on, though the lane may not lose a single worker: it left because it was asked to.
        assert lanes.wait(after.trial_id, WAIT).facts["total"] == 3.0
    finally:
        lanes.stop(5)


def test_a_placement_group_whose_maker_is_dead_is_removed_and_no_other(cluster, pair):
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    @ray.remote(num_cpus=0)
    class Maker:
        def make(self):
            made = placement_group([{"CPU": 0.01}])
            ray.get(made.ready())
            return made.id.hex(), placement_group([{"CPU": 999}]).id.hex()  # one that is held, one that waits

    def states():
        return {key: one["state"] for key, one in placement_group_table().items()}

    own = placement_group([{"CPU": 0.01}])
    maker = Maker.remote()
    orphans = ray.get(maker.make.remote())
    before = states()
    orchestrator.lanes.cluster.free_orphans()
    assert states() == before, "its maker lives"
    ray.kill(maker)
    until = time.monotonic() + 10
    while any(states()[one] != "REMOVED" for one in orphans) and time.monotonic() < until:
        orchestrator.lanes.cluster.free_orphans()
        time.sleep(0.1)
    assert {key for key, state in states().items() if state != before[key]} == set(orphans)
    remove_placement_group(own)


def test_isolate_gives_every_trial_its_own_process_and_a_deaf_one_is_ended(start_lanes, make_spec):
    lanes = start_lanes(ray={"isolate": True, "lanes": 1, "cpus_per_worker": 0.5})
    try:
        first, deaf = make_spec(), make_spec(do="deaf")
        lanes.submit(first)
        lanes.submit(deaf)
        pid = None
        while pid is None:
            event = lanes.next_event(timeout=WAIT)
            assert event is not None
            if event["kind"] == "lane_up":
                last = event["pid"]
            elif event["kind"] == "started" and event["trial_id"] == deaf.trial_id:
                pid = last
        result = lanes.wait(first.trial_id, 0)
        assert result.state == "complete" and result.facts["seen"] == 1
        assert result.facts["pid"] != pid
    finally:
        lanes.stop(1)
    assert lanes.wait(deaf.trial_id, 0).state == "stopped"
    assert gone(pid), "the process of a trial that never reports was ended"


def test_without_any_lane_left_every_trial_waits_for_a_resumed_run(start_lanes, make_spec):
    lanes = start_lanes(runner="fakes:no_such_runner", ray={"lanes": 1, "max_failures": 0, "cpus_per_worker": 0.5})
    try:
        waiting = make_spec()
        lanes.submit(waiting)
        result = lanes.wait(waiting.trial_id, WAIT)
        assert result.state == "stopped" and "no lane is left" in result.error and "no_such_runner" in result.error
        assert result.facts == {"started": False, "cancelled": True}
        late = make_spec()
        lanes.submit(late)
        assert lanes.wait(late.trial_id, 10).state == "stopped"
        with pytest.raises(LaneError, match="every lane is gone.*safebasin resume"):
            lanes.wait_ready(5)
    finally:
        lanes.stop(1)
