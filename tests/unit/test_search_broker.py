"""The broker's rules without a cluster: hand out, interrupt, hand out again, refuse what is stale."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.lanes.broker import MOST_ATTEMPTS, Broker
from orchestrator.records import TrialResult, TrialSpec


def spec(trial_id: str) -> TrialSpec:
    return TrialSpec(trial_id, "full", (), {}, {}, 0, "search", {}, "/nowhere")


def outcome(trial_id: str, state="complete") -> dict:
    return {"result": TrialResult(trial_id, "full", {}, 0, "search", state).to_dict()}


def play(story):
    """Run a coroutine on a broker of two lanes that takes an interrupted trial up once."""

    async def run():
        return await story(Broker(lanes=2, max_trial_failures=1))

    return asyncio.run(run())


def test_specs_go_out_in_order_and_results_come_back():
    async def story(broker):
        await broker.submit(spec("a"))
        await broker.submit(spec("b"))
        token = await broker.register(0, 1, 1, "host", [])
        assert (await broker.take(0, token, 0, 0))[1].trial_id == "a"
        assert not await broker.report(0, token, "a", {"kind": "train", "step": 1})
        assert await broker.done(0, token, 0, outcome("a")) == "next"
        assert (await broker.take(0, token, 0, 1))[1].trial_id == "b"
        assert (await broker.wait("a"))["state"] == "complete" and await broker.wait("b", 0.01) is None
        return [event["kind"] for event in (await broker.events(0))[1]]

    assert play(story) == ["lane_up", "started", "train", "finished", "started"]


def test_all_ranks_get_the_same_trial_and_it_ends_with_the_last():
    async def story(broker):
        await broker.submit(spec("a"))
        token = await broker.register(0, 2, 1, "host", [])
        early = asyncio.create_task(broker.take(0, token, 1, 0))  # rank 1 asks before rank 0
        await asyncio.sleep(0)
        assert (await broker.take(0, token, 0, 0))[1].trial_id == "a" and (await early)[1].trial_id == "a"
        await broker.done(0, token, 0, outcome("a"))
        assert await broker.wait("a", 0.01) is None
        await broker.done(0, token, 1, {"result": None})
        return await broker.wait("a")

    assert play(story)["state"] == "complete"


def test_an_interrupted_trial_goes_out_again_and_a_stale_group_is_refused():
    async def story(broker):
        await broker.submit(spec("a"))
        old = await broker.register(0, 1, 1, "host", [])
        await broker.take(0, old, 0, 0)
        new = await broker.register(0, 1, 2, "host", [])
        assert (await broker.take(0, new, 0, 0))[1].attempt == 1
        assert await broker.report(0, old, "a", {"kind": "train"}), "the old group is told to stop"
        assert await broker.done(0, old, 0, outcome("a", "failed")) == "stop" and await broker.wait("a", 0.01) is None
        assert await broker.take(0, old, 0, 1) == ("stop", None)
        await broker.register(0, 1, 3, "host", [])
        return await broker.wait("a")

    result = play(story)
    assert result["state"] == "failed" and "died 2 times" in result["error"]
    assert result["fault"] == "machine" and "`safebasin resume` takes it up again" in result["error"]


def test_an_error_on_one_of_two_ranks_sends_the_group_home_without_counting_a_death():
    async def story(broker):
        await broker.submit(spec("a"))
        token = await broker.register(0, 2, 1, "host", [])
        await broker.take(0, token, 0, 0)
        assert await broker.done(0, token, 1, {"error": "ValueError: x"}) == "reset"
        assert await broker.take(0, token, 0, 1) == ("reset", None)
        assert await broker.done(0, token, 0, outcome("a")) == "reset", "the other rank hears it too"
        assert await broker.wait("a", 0.01) is None, "it may come of the other rank's death"
        await broker.left(0, "raised", [])
        assert await broker.take_deaths(0) == 0
        await broker.register(0, 2, 2, "host", [])
        await broker.left(0, "died", [])
        assert [await broker.take_deaths(0), await broker.take_deaths(0)] == [1, 0]
        return await broker.wait("a")

    result = play(story)
    assert result["state"] == "failed" and result["error"].startswith("ValueError: x (a defect of safebasin") and result["fault"] == "safebasin"


def test_a_trial_whose_machine_failed_it_is_taken_up_by_another_lane():
    full = {"error": "OSError: No space left on device", "fault": "machine", "traceback": "..."}

    async def story(broker):
        await broker.submit(spec("a"))
        one, two = await broker.register(0, 1, 1, "h", []), await broker.register(1, 1, 2, "h", [])
        await broker.take(0, one, 0, 0)
        assert await broker.done(0, one, 0, full) == "next"
        assert await broker.take(0, one, 0, 1, 0.01) == ("idle", None), "the other lane is up"
        again = (await broker.take(1, two, 0, 0))[1]
        assert again.trial_id == "a" and again.attempt == 1
        assert await broker.done(1, two, 0, full) == "next"
        events = (await broker.events(0))[1]
        return await broker.wait("a"), [event.get("error") for event in events if event["kind"] == "interrupted"]

    result, told = play(story)
    assert result["state"] == "failed" and result["fault"] == "machine" and result["facts"]["traceback"] == "..."
    assert "failed 2 times, the last time with OSError: No space left" in result["error"] and told == [full["error"]] * 2


def test_the_only_lane_takes_a_trial_up_again_itself():
    async def story(broker):
        await broker.lane_gone(1, "gone")
        await broker.submit(spec("a"))
        one = await broker.register(0, 1, 1, "h", [])
        await broker.take(0, one, 0, 0)
        await broker.done(0, one, 0, {"error": "OSError: x", "fault": "machine"})
        return (await broker.take(0, one, 0, 1))[1].attempt

    assert play(story) == 1


def test_events_that_were_taken_are_forgotten():
    async def story(broker):
        for name in "abc":
            await broker.submit(spec(name))
            token = await broker.register(0, 1, 1, "h", [])
        cursor, first = await broker.events(0)
        await broker.register(1, 1, 1, "h", [])
        again, then = await broker.events(cursor)
        return len(first), again - cursor, len(then), len(broker._events), await broker.events(again, 0.01), token

    first, more, then, held, none, _ = play(story)
    assert (first, more, then, held, none) == (3, 1, 1, 1, (4, []))


@pytest.mark.parametrize(("why", "machines"), [("died", []), ("died", ["10.0.0.2"])])
def test_an_error_that_comes_of_another_ranks_death_is_no_failure(why, machines):
    async def story(broker):
        await broker.submit(spec("a"))
        token = await broker.register(0, 2, 1, "host", [])
        await broker.take(0, token, 0, 0)
        assert await broker.done(0, token, 0, {"error": "RuntimeError: connection closed by peer"}) == "reset"
        assert await broker.report(0, token, "a", {"kind": "train"}), "nothing of the group goes on"
        await broker.left(0, why, machines)
        assert await broker.take_deaths(0) == int(not machines)
        token = await broker.register(0, 2, 2, "host", [])
        return (await broker.take(0, token, 0, 0))[1].attempt, await broker.wait("a", 0.01)

    assert play(story) == (1, None)


@pytest.mark.parametrize("poisoned", [True, False])
def test_a_single_worker_goes_on_after_an_error_unless_its_process_is_lost(poisoned):
    async def story(broker):
        await broker.submit(spec("a"))
        token = await broker.register(0, 1, 1, "host", [])
        await broker.take(0, token, 0, 0)
        return await broker.done(0, token, 0, {"error": "RuntimeError: x", "poisoned": poisoned})

    assert play(story) == ("reset" if poisoned else "next")


def test_a_lane_given_up_leaves_its_trial_to_another_and_the_last_one_tells_all():
    async def story(broker):
        for name in "abc":
            await broker.submit(spec(name))
        one, two = await broker.register(0, 1, 1, "h", []), await broker.register(1, 1, 2, "h", [])
        await broker.take(0, one, 0, 0)
        await broker.take(1, two, 0, 0)
        assert not await broker.lane_gone(0, "too many deaths")
        await broker.done(1, two, 0, outcome("b"))
        kind, again = await broker.take(1, two, 0, 1)
        assert (again.trial_id, again.attempt) == ("a", 1)
        assert await broker.lane_gone(1, "also dead")
        await broker.submit(spec("d"))
        results = [await broker.wait(name) for name in "abcd"]
        return [(result["state"], result["fault"]) for result in results]

    assert play(story) == [("failed", "machine"), ("complete", None), ("stopped", None), ("stopped", None)], "a resumed run takes all of them up"


def test_a_machine_that_left_costs_a_trial_nothing_and_its_lane_nothing():
    async def story(broker):
        await broker.submit(spec("a"))
        for lane in (0, 1, 0, 1):  # max_trial_failures is 1
            token = await broker.register(lane, 1, 1, "h", [])
            assert (await broker.take(lane, token, 0, 0))[1].trial_id == "a"
            await broker.left(lane, "died", ["10.0.0.2"])
            assert await broker.take_deaths(lane) == 0 and await broker.census() == (1, 2)
        token = await broker.register(0, 1, 1, "h", [])
        assert (await broker.take(0, token, 0, 0))[1].attempt == 4
        await broker.left(0, "died", [])
        assert await broker.wait("a", 0.01) is None, "its first death"
        token = await broker.register(0, 1, 1, "h", [])
        await broker.take(0, token, 0, 0)
        await broker.left(0, "died", [])
        return (await broker.wait("a"))["error"], [e["machines"] for e in (await broker.events(0))[1] if e["kind"] == "interrupted"]

    error, machines = play(story)
    assert "died 2 times" in error and machines == [["10.0.0.2"]] * 4 + [[], []]


def test_a_trial_is_not_taken_up_for_ever():
    async def story(broker):
        await broker.submit(spec("a"))
        for _ in range(MOST_ATTEMPTS):
            token = await broker.register(0, 1, 1, "h", [])
            assert (await broker.take(0, token, 0, 0))[0] == "trial"
            await broker.left(0, "died", ["10.0.0.2"])
        return await broker.wait("a", 0.01)

    assert "interrupted 20 times, the last time because 10.0.0.2 left" in play(story)["error"]


def test_a_lane_that_is_added_takes_what_waits():
    async def story(broker):
        await broker.submit(spec("a"))
        await broker.add_lane(2)
        assert await broker.census() == (1, 3)
        token = await broker.register(2, 1, 1, "h", [])
        assert await broker.census() == (1, 2)
        return (await broker.take(2, token, 0, 0))[1].trial_id

    assert play(story) == "a"


def test_cancel_ends_queued_trials_at_once_and_running_ones_at_their_report():
    async def story(broker):
        for name in "ab":
            await broker.submit(spec(name))
        token = await broker.register(0, 1, 1, "h", [])
        await broker.take(0, token, 0, 0)
        await broker.cancel(running=False)
        assert not await broker.report(0, token, "a", {"kind": "train"})
        await broker.cancel()
        assert await broker.report(0, token, "a", {"kind": "train"})
        await broker.done(0, token, 0, outcome("a", "stopped"))
        return (await broker.wait("a"))["facts"], (await broker.wait("b"))["facts"]

    running, queued = play(story)
    assert running["cancelled"] and queued == {"started": False, "cancelled": True}


def test_closing_sends_idle_groups_home_and_starts_nothing():
    async def story(broker):
        token = await broker.register(0, 1, 1, "h", [])
        waiting = asyncio.create_task(broker.take(0, token, 0, 0))
        await asyncio.sleep(0)
        await broker.close()
        assert await waiting == ("stop", None)
        await broker.submit(spec("late"))
        assert (await broker.wait("late"))["state"] == "stopped" and await broker.work() == "stop"
        return await broker.idle(1)

    assert play(story)


def test_waiting_processes_hand_in_one_at_a_time_once_all_are_up():
    async def story(broker):
        await broker.expect(2)
        await broker.attend(fresh=True)
        assert not await broker.meet(0.01), "the second one is not up"
        await broker.attend(fresh=True)
        first, second = asyncio.create_task(broker.meet(1)), asyncio.create_task(broker.meet(0.2))
        assert await first and not second.done()
        await broker.attend(fresh=False)
        assert await second
        await broker.expect(0)
        return await broker.meet(0.01)

    assert play(story)


def test_of_a_finished_trial_whose_events_were_taken_only_its_state_is_kept():
    async def life():
        broker = Broker(1, 1)
        token = await broker.register(0, 1, 1, "host", [])
        await broker.submit(spec("a"))
        await broker.take(0, token, 0, 0)
        await broker.done(0, token, 0, outcome("a"))
        cursor, events = await broker.events(0)
        assert events[-1]["result"]["trial_id"] == "a" and (await broker.wait("a"))["trial_id"] == "a"
        await broker.events(cursor, 0.01)  # the driver has taken them
        assert await broker.wait("a") == {"state": "complete"} and not broker._specs
        await broker.submit(spec("a"))  # its id may be used again
        return await broker.wait("a", 0.01)

    assert asyncio.run(life()) is None
