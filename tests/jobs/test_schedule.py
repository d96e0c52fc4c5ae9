"""Who is due, when, and that one run follows another."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from histories import learning
from world import Tell, World, improving

from jobs import schedule as schedules
from jobs.recovery import WAITS
from jobs.schedule import Schedule
from persona.domain import EntryId, Run, RunState, User
from persona.engine.protocol import Progress, TrainRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import Busy, EngineDown, NotFound, StorageFull
from storage.runs import Runs

# One message has 16 tokens: 320 tokens are 20 messages, 20 tokens two.
RULES = {"min_new_tokens": 320, "max_age_hours": 24, "min_aged_tokens": 20}


def apply(world: World, **changes: object) -> None:
    rules = learning(**{**RULES, **changes})
    world.settings = world.settings.model_copy(update={"learning": rules})


@pytest.fixture(autouse=True)
def rules(world: World) -> None:
    apply(world)


async def due(world: World, user: User) -> bool:
    found = await world.users.by_id(user.id)
    assert found is not None
    return await world.schedule().due(found)


# Who is due


@pytest.mark.parametrize(("messages", "expected"), [(0, False), (19, False), (20, True), (40, True)])
async def test_enough_new_text_makes_a_user_due(
    world: World, ann: User, tell: Tell, messages: int, expected: bool
) -> None:
    await tell(messages)
    assert await due(world, ann) is expected


@pytest.mark.parametrize(
    ("messages", "hours", "expected"), [(2, 23, False), (1, 25, False), (2, 24, True), (2, 48, True)]
)
async def test_less_text_is_enough_after_a_day(
    world: World, ann: User, tell: Tell, messages: int, hours: int, expected: bool
) -> None:
    await tell(messages)
    world.clock.pass_by(hours=hours)
    assert await due(world, ann) is expected


async def test_who_is_paused_or_does_not_learn_is_never_due(world: World, ann: User, tell: Tell) -> None:
    eve = await world.users.add("eve", learn=False)
    await tell(40)
    await tell(40, eve)
    await world.users.set_paused(ann.id, True)
    world.clock.pass_by(days=30)
    assert not await due(world, ann)
    assert not await due(world, eve)


async def test_after_a_run_only_new_text_counts(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    assert (await world.train(ann)).state is RunState.KEPT
    assert not await due(world, ann)
    world.clock.pass_by(days=3)
    assert not await due(world, ann)  # what was held out is not new any more
    await tell(2)
    assert await due(world, ann)


async def test_threat_10_a_rejected_range_waits_for_enough_new_text(world: World, ann: User, tell: Tell) -> None:
    world.engine.predicts = None
    await tell(40)
    assert (await world.train(ann)).state is RunState.REJECTED
    assert not await due(world, ann)
    await tell(19)
    assert not await due(world, ann)
    await tell(1)
    assert await due(world, ann)


async def test_threat_09_a_range_that_diverged_waits_for_new_text(world: World, ann: User, tell: Tell) -> None:
    world.engine.trainable = None
    await tell(40)
    assert (await world.train(ann)).state is RunState.FAILED
    world.clock.pass_by(hours=1)
    assert not await due(world, ann)


async def test_a_deferred_range_still_counts_once_more_text_has_come(world: World, ann: User, tell: Tell) -> None:
    apply(world, held_out_messages=19)
    await tell(19)
    assert (await world.train(ann)).state is RunState.DEFERRED
    assert not await due(world, ann)
    await tell(1)
    assert await due(world, ann)


async def test_a_run_that_had_bad_luck_is_tried_again_after_a_while(world: World, ann: User, tell: Tell) -> None:
    class Down(ScriptedEngine):
        async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
            raise EngineDown("The engine is being restarted.")
            yield

    await tell(40)
    world.engine = Down()
    assert (await world.train(ann)).state is RunState.FAILED
    assert not await due(world, ann)
    world.clock.pass_by(minutes=15)
    assert await due(world, ann)


async def test_an_interrupted_run_is_taken_up_again_after_a_while(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    run = await world.runs.request(ann.id, world.clock())
    await world.runs.end(run.id, RunState.INTERRUPTED, "The run was stopped.", world.clock())
    assert not await due(world, ann)
    world.clock.pass_by(seconds=schedules.AGAIN.total_seconds())
    assert await due(world, ann)


async def test_a_version_lost_to_a_deletion_is_trained_anew(world: World, ann: User, tell: Tell) -> None:
    await tell(60)
    await world.train(ann)
    assert not await due(world, ann)
    await world.history.delete(ann.id, EntryId(3))
    assert await due(world, ann)
    assert (await world.train(ann)).state is RunState.KEPT
    assert not await due(world, ann)


async def test_a_lost_version_is_trained_anew_although_a_run_for_it_had_bad_luck(
    world: World, ann: User, tell: Tell
) -> None:
    await tell(60)
    await world.train(ann)
    await world.history.delete(ann.id, EntryId(3))
    run = await world.runs.request(ann.id, world.clock())
    await world.runs.end(run.id, RunState.FAILED, "The engine stopped.", world.clock(), metrics={"again": True})
    assert not await due(world, ann)
    world.clock.pass_by(minutes=15)
    assert await due(world, ann)


async def test_threat_14_a_run_that_fails_again_and_again_is_tried_less_and_less(
    world: World, ann: User, tell: Tell
) -> None:
    await tell(40)
    pauses = []
    for _ in range(9):
        run = await world.runs.request(ann.id, world.clock())
        await world.runs.end(run.id, RunState.FAILED, "The engine stopped.", world.clock(), metrics={"again": True})
        pauses.append(0)
        while not await due(world, ann):
            world.clock.pass_by(minutes=15)
            pauses[-1] += 15
    assert pauses == [15, 30, 60, 120, 240, 480, 960, 24 * 60, 24 * 60]
    for _ in range(60):  # stopped by hand: no bad luck
        run = await world.runs.request(ann.id, world.clock())
        await world.runs.end(run.id, RunState.INTERRUPTED, "The run was stopped.", world.clock())
    world.clock.pass_by(minutes=15)
    assert await due(world, ann)
    for _ in range(60):
        run = await world.runs.request(ann.id, world.clock())
        await world.runs.end(run.id, RunState.DEFERRED, "No memory.", world.clock(), metrics={"again": True})
    world.clock.pass_by(hours=23)
    assert not await due(world, ann)
    world.clock.pass_by(hours=1)
    assert await due(world, ann)


async def test_too_little_text_for_one_base_is_looked_at_again_on_another(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    assert (await world.train(ann)).state is RunState.DEFERRED
    assert not await due(world, ann)
    world.base = "other-base"
    assert await due(world, ann)


async def test_one_users_trouble_keeps_nobody_else_waiting(
    world: World, ann: User, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoe = await world.users.add("zoe")
    await tell(40)
    await tell(40, zoe)
    schedule = world.schedule()
    look = schedule.due

    async def broken(user: User) -> bool:
        if user.name == "ann":
            raise OverflowError
        return await look(user)

    monkeypatch.setattr(schedule, "due", broken)
    await schedule.check()
    assert await world.runs.last(ann.id) is None
    assert await world.runs.last(zoe.id) is not None


async def test_threat_25_bad_luck_is_tried_again_although_the_clock_was_set_back(
    world: World, ann: User, tell: Tell
) -> None:
    await tell(40)
    run = await world.runs.request(ann.id, world.clock())
    await world.runs.end(run.id, RunState.FAILED, "The engine stopped.", world.clock(), metrics={"again": True})
    world.clock.pass_by(days=-400)
    assert await due(world, ann)


async def test_threat_25_checks_go_on_after_the_clock_was_set_back(
    world: World, ann: User, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(world, check_seconds=0.1)
    schedule = await started(world)
    assert schedule._timer is not None
    (job,) = schedule._timer.get_jobs()
    job.modify(next_run_time=datetime.now(UTC) + timedelta(days=365))
    await tell(40)
    run = await found(world, ann)
    assert (await ended(schedule, run)).state is RunState.KEPT
    await schedule.stop()


async def test_a_version_of_another_base_is_trained_anew(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    world.base = "other-base"
    assert await due(world, ann)


async def test_a_version_of_another_base_is_trained_anew_once_whatever_run_came_last(
    world: World, ann: User, tell: Tell
) -> None:
    await tell(40)
    await world.train(ann)

    async def rejected_on(base: str) -> None:
        run = await world.runs.request(ann.id, world.clock())
        await world.runs.start(run.id, world.clock())
        seen = {"base": base, "through": await world.history.last_id(ann.id)}
        await world.runs.end(run.id, RunState.REJECTED, "Not better.", world.clock(), metrics=seen)

    await rejected_on(world.base)
    world.base = "other-base"
    assert await due(world, ann)
    await rejected_on("other-base")
    assert not await due(world, ann)


async def test_a_user_who_rolled_back_is_not_trained_against_their_will(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    await world.adapters.rollback(ann.id, 0)
    assert not await due(world, ann)


# Clocks


@pytest.mark.parametrize("days", [400, -400])
async def test_threat_25_a_jump_of_the_clock_makes_at_most_one_run(
    world: World, ann: User, tell: Tell, days: int
) -> None:
    await tell(40)
    await world.train(ann)
    await tell(2)
    world.clock.pass_by(days=days)
    schedule = world.schedule()
    for _ in range(5):
        await schedule.check()
    runs = await world.runs.list(ann.id)
    assert [run.state for run in runs] == [RunState.QUEUED, RunState.KEPT][days < 0 :]
    if days > 0:
        assert (await world.finetune().run(runs[0])).state.ended
        await schedule.check()
        assert len(await world.runs.list(ann.id)) == 2


async def test_threat_25_new_text_counts_while_the_clock_is_set_back(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    world.clock.pass_by(days=-400)
    await tell(20)
    assert await due(world, ann)


# The queue


async def started(world: World) -> Schedule:
    schedule = world.schedule()
    await schedule.start()
    return schedule


async def found(world: World, user: User) -> Run:
    """The user's run, once the timer has found them due."""
    async with asyncio.timeout(10):
        while (run := await world.runs.last(user.id)) is None:  # noqa: ASYNC110 - the timer is what is tested
            await asyncio.sleep(0.02)
    return run


async def ended(schedule: Schedule, run: Run) -> Run:
    async with asyncio.timeout(10):
        return await schedule.wait(run.user_id, run.id)


async def test_a_due_user_is_found_and_trained(world: World, ann: User, tell: Tell) -> None:
    apply(world, check_seconds=0.05)
    schedule = await started(world)
    await tell(40)
    run = await found(world, ann)
    assert (await ended(schedule, run)).state is RunState.KEPT
    await schedule.stop()


async def test_a_wish_is_carried_out_at_once(world: World, ann: User, tell: Tell) -> None:
    apply(world, check_seconds=3600)
    await tell(10)
    schedule = await started(world)
    run = await world.runs.request(ann.id, world.clock())
    schedule.wake()
    assert (await ended(schedule, run)).state is RunState.KEPT
    await schedule.stop()


async def test_nobody_is_trained_when_learning_is_switched_off(world: World, ann: User, tell: Tell) -> None:
    apply(world, enabled=False)
    await tell(40)
    await world.schedule().check()
    assert await world.runs.last(ann.id) is None


class Counting(ScriptedEngine):
    """Counts how many trainings run at once."""

    def __init__(self) -> None:
        super().__init__(score=lambda request: [-1.0 if request.adapter else -2.0] * len(request.targets))
        self.training = 0
        self.most = 0
        self.begun = asyncio.Event()
        self.go = asyncio.Event()

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        self.training += 1
        self.most = max(self.most, self.training)
        self.begun.set()
        try:
            await self.go.wait()
            async for progress in super().train(request):
                yield progress
        finally:
            self.training -= 1


async def test_runs_go_one_after_another(world: World, ann: User, tell: Tell) -> None:
    world.engine = engine = Counting()
    engine.go.set()
    others = [await world.users.add(f"user{number}") for number in range(3)]
    for user in (ann, *others):
        await tell(40, user)
    schedule = world.schedule()
    await schedule.check()
    await schedule.start()
    for user in (ann, *others):
        run = await world.runs.last(user.id)
        assert run is not None
        assert (await ended(schedule, run)).state is RunState.KEPT
    assert engine.most == 1
    await schedule.stop()


async def test_stopping_lets_the_run_wait_and_the_next_start_takes_it_up(world: World, ann: User, tell: Tell) -> None:
    world.engine = engine = Counting()
    await tell(40)
    schedule = await started(world)
    run = await world.runs.request(ann.id, world.clock())
    schedule.wake()
    await engine.begun.wait()
    waiting = asyncio.create_task(schedule.wait(ann.id, run.id))
    await schedule.stop()
    with pytest.raises(Busy, match="taken up again"):
        await waiting
    assert engine.training == 0
    engine.go.set()
    again = await started(world)
    assert (await ended(again, run)).state is RunState.KEPT
    await again.stop()


async def test_one_users_run_can_be_cancelled_and_the_others_go_on(world: World, ann: User, tell: Tell) -> None:
    world.engine = engine = Counting()
    bob = await world.users.add("bob")
    await tell(40)
    await tell(40, bob)
    schedule = await started(world)
    first, second = [await world.runs.request(user.id, world.clock()) for user in (ann, bob)]
    schedule.wake()
    await engine.begun.wait()
    await schedule.cancel(bob.id)  # not under way: nothing happens
    await schedule.cancel(ann.id)
    assert (await ended(schedule, first)).state is RunState.INTERRUPTED
    engine.go.set()
    assert (await ended(schedule, second)).state is RunState.KEPT
    await schedule.stop()


async def test_a_user_forgotten_under_a_run_does_not_stop_the_queue(world: World, ann: User, tell: Tell) -> None:
    world.engine = engine = Counting()
    bob = await world.users.add("bob")
    await tell(40)
    await tell(40, bob)
    schedule = await started(world)
    run = await world.runs.request(ann.id, world.clock())
    schedule.wake()
    await engine.begun.wait()
    await world.users.forget(ann.id)
    engine.go.set()
    with pytest.raises(NotFound):
        await ended(schedule, run)
    second = await world.runs.request(bob.id, world.clock())
    schedule.wake()
    assert (await ended(schedule, second)).state is RunState.KEPT
    await schedule.stop()


class Full(Runs):
    """Runs on a disk that takes nothing more from the end of a run on, until there is space again."""

    def __init__(self, runs: Runs) -> None:
        super().__init__(runs._db)
        self.space = 0  # tries until then
        self.stopped = False
        self.reasons: list[str] = []

    def _try(self) -> None:
        if self.space > 0:
            self.space -= 1
            raise StorageFull("The disk is full: nothing was written.")

    async def requeue(self, run_id: int, reason: str, *, hard: bool = False) -> Run:
        self._try()
        assert hard is self.stopped, "whether the service did stop"
        self.reasons.append(reason)
        return await super().requeue(run_id, reason, hard=hard)

    async def end(self, *args: Any, **named: Any) -> Run:
        self._try()
        return await super().end(*args, **named)


@pytest.mark.parametrize("state", [RunState.KEPT, RunState.REJECTED])
@pytest.mark.parametrize("space", [1, 4])
async def test_threat_23_a_run_that_ends_on_a_full_disk_is_put_right_once_there_is_space(
    world: World, ann: User, tell: Tell, monkeypatch: pytest.MonkeyPatch, state: RunState, space: int
) -> None:
    monkeypatch.setattr(schedules, "PAUSE_SECONDS", 0.01)
    world.engine = ScriptedEngine(score=improving if state is RunState.KEPT else lambda r: [-2.0] * len(r.targets))
    world.runs = full = Full(world.runs)
    await tell(40)
    schedule = await started(world)
    run = await world.runs.request(ann.id, world.clock())
    full.space = space
    schedule.wake()
    run = await ended(schedule, run)
    assert (run.state, full.space, "hard_stops" in run.metrics) == (state, 0, False)
    assert "stopped" not in f"{run.reason} {full.reasons}"
    assert len(full.reasons) == (state is RunState.REJECTED), "what serves is not trained again"
    await schedule.stop()


async def test_threat_23_a_start_on_a_full_disk_puts_right_what_a_kill_left_once_there_is_space(
    world: World, ann: User, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "PAUSE_SECONDS", 0.01)
    world.engine = ScriptedEngine(score=improving)
    world.runs = full = Full(world.runs)
    await tell(40)
    run = await world.runs.request(ann.id, world.clock())
    await world.runs.start(run.id, world.clock(), through=40)
    full.space, full.stopped = 4, True
    schedule = await started(world)
    run = await ended(schedule, run)
    assert (run.state, full.space, full.reasons) == (RunState.KEPT, 0, [WAITS])
    await schedule.stop()


async def test_waiting_for_a_run_that_is_not_there_or_of_somebody_else_is_not_found(world: World, ann: User) -> None:
    bob = await world.users.add("bob")
    run = await world.runs.request(ann.id, world.clock())
    schedule = world.schedule()
    for user_id, run_id in ((ann.id, 999), (bob.id, run.id)):
        with pytest.raises(NotFound):
            await schedule.wait(user_id, run_id)


async def test_waiting_for_a_queued_run_ends_when_the_service_stops(world: World, ann: User) -> None:
    schedule = world.schedule()
    run = await world.runs.request(ann.id, world.clock())
    waiting = asyncio.create_task(schedule.wait(ann.id, run.id))
    await asyncio.sleep(0.05)
    await schedule.stop()
    with pytest.raises(Busy):
        await waiting


async def test_the_pause_before_another_try_is_a_matter_of_minutes() -> None:
    assert timedelta(minutes=1) <= schedules.AGAIN <= timedelta(hours=1)
