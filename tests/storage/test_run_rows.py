"""Runs: asked for, started, ended once."""

import asyncio
from datetime import timedelta

import pytest

from persona.domain import Frame, RunState
from persona.errors import NotFound
from storage.runs import ExampleRow


async def test_a_user_has_one_open_run(runs, ann, bob, now):
    asked = await asyncio.gather(*(runs.request(ann.id, now) for _ in range(5)))
    assert {run.id for run in asked} == {1}
    assert asked[0].state == RunState.QUEUED
    await runs.start(1, now)
    assert (await runs.request(ann.id, now)).state == RunState.RUNNING
    assert (await runs.request(bob.id, now)).id == 2


async def test_runs_wait_in_the_order_of_their_requests(runs, ann, bob, now):
    assert await runs.next() is None
    first, second = await runs.request(bob.id, now), await runs.request(ann.id, now)
    assert (await runs.next()).id == first.id
    await runs.start(first.id, now)
    assert (await runs.next()).id == second.id


async def test_a_run_remembers_how_it_ended(runs, ann, now):
    run = await runs.request(ann.id, now)
    started = await runs.start(run.id, now + timedelta(seconds=1))
    assert (started.state, started.started) == (RunState.RUNNING, now + timedelta(seconds=1))
    later = now + timedelta(seconds=9)
    ended = await runs.end(run.id, RunState.KEPT, "It is better.", later, version=3, metrics={"p": 0.9})
    assert (ended.state, ended.reason, ended.ended, ended.version) == (RunState.KEPT, "It is better.", later, 3)
    assert ended == await runs.get(ann.id, run.id) == await runs.last(ann.id)
    assert ended.metrics == {"p": 0.9}


async def test_a_run_ends_once(runs, ann, now):
    run = await runs.request(ann.id, now)
    first = await runs.end(run.id, RunState.FAILED, "No space.", now)
    assert await runs.end(run.id, RunState.KEPT, None, now, version=1) == first
    with pytest.raises(NotFound):
        await runs.start(run.id, now)


async def test_after_the_end_a_new_run_may_be_asked_for(runs, ann, now):
    run = await runs.request(ann.id, now)
    await runs.end(run.id, RunState.DEFERRED, "Too little.", now)
    assert (await runs.request(ann.id, now)).id == run.id + 1


async def test_runs_are_listed_newest_first(runs, ann, now):
    for _ in range(4):
        await runs.end((await runs.request(ann.id, now)).id, RunState.DEFERRED, "Too little.", now)
    assert [run.id for run in await runs.list(ann.id)] == [4, 3, 2, 1]
    assert [run.id for run in await runs.list(ann.id, limit=2)] == [4, 3]
    assert (await runs.last(ann.id)).id == 4


async def test_threat_02_runs_of_others_are_unknown(runs, ann, bob, now):
    run = await runs.request(ann.id, now)
    assert await runs.get(bob.id, run.id) is None
    assert await runs.list(bob.id) == []
    assert await runs.last(bob.id) is None


async def test_examples_are_replaced_as_a_whole(runs, ann, now):
    run = await runs.request(ann.id, now)
    rows = [ExampleRow(5, Frame.TURN, 10, 1.0), ExampleRow(5, Frame.DRAFT, 12, 0.5), ExampleRow(6, Frame.REPLY, 9, 1.0)]
    await runs.set_examples(run.id, rows)
    assert await runs.examples(run.id) == rows
    await runs.set_examples(run.id, rows[:1])
    assert await runs.examples(run.id) == rows[:1]
    await runs.set_examples(run.id, [])
    assert await runs.examples(run.id) == []


async def test_a_run_that_a_stop_cut_off_waits_again_before_the_others(runs, ann, bob, now):
    running = await runs.start((await runs.request(ann.id, now)).id, now)
    queued = await runs.request(bob.id, now)
    assert await runs.running() == [running]
    again = await runs.requeue(running.id, "The service stopped.")
    assert (again.state, again.reason, again.ended) == (RunState.QUEUED, "The service stopped.", None)
    assert await runs.running() == []
    assert [(await runs.next()).id, (await runs.request(ann.id, now)).id] == [running.id, running.id]
    await runs.start(running.id, now)
    assert (await runs.next()).id == queued.id


async def test_a_run_looks_as_far_into_history_as_when_it_first_began(runs, ann, now):
    run = await runs.request(ann.id, now)
    assert (await runs.start(run.id, now, 40)).metrics == {"through": 40}
    await runs.requeue(run.id, "The service stopped.")
    assert (await runs.start(run.id, now, 60)).metrics == {"through": 40}


async def test_hard_stops_are_counted(runs, ann, now):
    run = await runs.request(ann.id, now)
    for hard in (True, False, True):
        await runs.start(run.id, now, 40)
        await runs.requeue(run.id, "The service stopped.", hard=hard)
    assert (await runs.get(ann.id, run.id)).metrics == {"through": 40, "hard_stops": 2}


async def test_a_run_that_has_ended_does_not_wait_again(runs, ann, now):
    run = await runs.request(ann.id, now)
    ended = await runs.end(run.id, RunState.KEPT, "Better.", now, version=1)
    assert await runs.requeue(run.id, "The service stopped.") == ended


async def test_a_forgotten_users_run_is_gone(runs, users, ann, now):
    run = await runs.request(ann.id, now)
    await runs.set_examples(run.id, [ExampleRow(1, Frame.TURN, 1, 1.0)])
    await users.forget(ann.id)
    for call in (
        runs.start(run.id, now),
        runs.end(run.id, RunState.FAILED, "x", now),
        runs.set_examples(run.id, []),
        runs.requeue(run.id, "x"),
        runs.request(ann.id, now),
    ):
        with pytest.raises(NotFound):
            await call
    assert await runs.examples(run.id) == []
