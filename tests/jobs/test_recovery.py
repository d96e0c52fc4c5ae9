"""A stop under a run, soft or hard: it goes on from where it was, or begins anew where what it learned may not stay."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from histories import own
from structlog.testing import capture_logs
from world import Tell, World, improving

from jobs.recovery import HARD_STOPS, recover
from persona.domain import EntryId, Message, Role, Run, RunState, User
from persona.engine.protocol import Health, Progress, TrainRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import NotFound
from storage.failpoints import KILLED

HERE = Path(__file__).parent


class Stopping(ScriptedEngine):
    """Stands still after its second step until it is let go."""

    def __init__(self) -> None:
        super().__init__(score=improving, steps=5)
        self.reached = asyncio.Event()
        self.go = asyncio.Event()

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        async for progress in super().train(request):
            yield progress
            if progress.step == 2 and not self.go.is_set():
                self.reached.set()
                await self.go.wait()


@pytest.fixture(autouse=True)
def engine(world: World) -> Stopping:
    made = world.engine = Stopping()
    return made


async def soft_stop(world: World, user: User, engine: Stopping) -> Run:
    """SIGTERM in the middle of a run."""
    run = await world.runs.request(user.id, world.clock())
    finetune = world.finetune()
    task = asyncio.create_task(finetune.run(run))
    await engine.reached.wait()
    finetune.leave()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return await found(world, run)


async def hard_stop(world: World, user: User, engine: Stopping) -> Run:
    """`kill -9` in the middle of a run: as soft as this test can be, with the row as it was then."""
    run = await soft_stop(world, user, engine)
    return await world.runs.start(run.id, world.clock())


async def found(world: World, run: Run) -> Run:
    there = await world.runs.get(run.user_id, run.id)
    assert there is not None
    return there


async def started(world: World, engine: Stopping) -> Run:
    """The next start, and what became of the run."""
    engine.go.set()
    await world.adapters.repair()
    await recover(world.runs, world.adapters, world.clock())
    run = await world.runs.next()
    assert run is not None
    return await world.finetune().run(run)


def states(world: World) -> list[str]:
    """The files of runs that may go on."""
    return sorted(path.relative_to(world.root).as_posix() for path in world.root.glob("*/run-*/*"))


async def test_threat_26_a_run_that_a_stop_cut_off_waits_with_its_state(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    run = await soft_stop(world, ann, engine)
    assert (run.state, run.ended) == (RunState.QUEUED, None)
    assert run.reason == "The service stopped under this run; it is taken up again."
    assert states(world) == [f"{ann.id}/run-{run.id}/checkpoint.safetensors"]
    assert await world.adapters.list(ann.id) == []


@pytest.mark.parametrize("stop", [soft_stop, hard_stop])
async def test_threat_07_the_next_start_goes_on_with_the_same_examples(
    world: World, ann: User, tell: Tell, engine: Stopping, stop
) -> None:
    await tell(40)
    await stop(world, ann, engine)
    await tell(20)
    run = await started(world, engine)
    first, second = engine.trained
    assert (first.examples, first.plan, first.start, first.checkpoint) == (
        second.examples,
        second.plan,
        second.start,
        second.checkpoint,
    )
    assert run.state is RunState.KEPT
    assert run.reason is not None
    assert run.reason.endswith(" It went on after step 2.")
    version = await world.adapters.active(ann.id)
    assert version is not None
    assert (version.watermark, run.metrics["through"], run.metrics["messages"]) == (37, 40, 3)
    assert world.folders() == [f"{ann.id}/1"]


async def test_what_was_said_meanwhile_belongs_to_the_next_run(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    await soft_stop(world, ann, engine)
    await tell(20)
    await started(world, engine)
    run = await world.train(ann)
    version = await world.adapters.active(ann.id)
    assert version is not None
    assert (run.state, version.number, version.parent, version.watermark) == (RunState.KEPT, 2, 1, 57)


async def test_a_run_can_be_stopped_again_and_again(world: World, ann: User, tell: Tell, engine: Stopping) -> None:
    await tell(40)
    run = await soft_stop(world, ann, engine)
    for _ in range(3 * HARD_STOPS):
        finetune = world.finetune()
        finetune.leave()
        task = asyncio.create_task(finetune.run(run))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        run = await found(world, run)
        assert run.state is RunState.QUEUED
    assert (await started(world, engine)).state is RunState.KEPT


async def test_a_stop_while_it_is_judged_costs_the_judging_only(world: World, ann: User, tell: Tell) -> None:
    class Judged(ScriptedEngine):
        async def stage(self, ref) -> None:
            await super().stage(ref)
            if ref.number == 1:
                finetune.leave()
                task.cancel()
                await asyncio.sleep(1)

    await tell(40)
    world.engine = Judged(score=improving)
    finetune = world.finetune()
    task = asyncio.create_task(finetune.run(await world.runs.request(ann.id, world.clock())))
    with pytest.raises(asyncio.CancelledError):
        await task
    run = await world.runs.next()
    assert run is not None
    run = await world.finetune().run(run)
    assert (run.state, run.version) == (RunState.KEPT, 2)
    assert run.reason is not None
    assert run.reason.endswith(" It went on after step 3.")
    assert world.folders() == [f"{ann.id}/2"]


# What may not stay


async def meanwhile(world: World, user: User, what: str) -> None:
    learning = world.settings.learning
    match what:
        case "an entry it trained on is deleted":
            await world.history.delete(user.id, EntryId(45))
        case "an entry that it judges by is deleted":
            await world.history.delete(user.id, EntryId(60))
        case "another base":
            world.base = "other-base"
        case "another version serves":
            await world.adapters.rollback(user.id, 0)
        case "another plan":
            changed = learning.model_copy(update={"warm_rate": 5e-4})
            world.settings = world.settings.model_copy(update={"learning": changed})


@pytest.mark.parametrize("stop", [soft_stop, hard_stop])
@pytest.mark.parametrize(
    "what",
    [
        "an entry it trained on is deleted",
        "an entry that it judges by is deleted",
        "another base",
        "another version serves",
        "another plan",
    ],
)
async def test_a_run_begins_anew_where_its_ground_has_changed(
    world: World, ann: User, tell: Tell, engine: Stopping, stop, what: str
) -> None:
    await tell(40)
    engine.go.set()
    await world.train(ann)
    engine.go.clear()
    await tell(20)
    first = await stop(world, ann, engine)
    await meanwhile(world, ann, what)
    if "deleted" in what:
        assert states(world) == []
    run = await started(world, engine)
    assert run.id == first.id
    assert run.state is RunState.KEPT, run.reason
    assert run.reason is not None
    assert run.reason.endswith(" It began anew after a stop.")
    assert not list(world.root.glob("*/run-*"))


async def test_who_paused_meanwhile_is_not_trained_and_keeps_no_state(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    await soft_stop(world, ann, engine)
    await world.users.set_paused(ann.id, True)
    run = await started(world, engine)
    assert run.state is RunState.DEFERRED
    assert run.reason is not None
    assert run.reason.endswith(" What it had learned before the service stopped was discarded.")
    assert world.folders() == []


async def test_who_pauses_while_it_trains_ends_the_run_and_keeps_no_state(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    schedule = world.schedule()
    await schedule.start()
    run = await world.runs.request(ann.id, world.clock())
    schedule.wake()
    await engine.reached.wait()
    assert states(world)
    await schedule.cancel(ann.id)
    assert (await found(world, run)).state is RunState.INTERRUPTED
    assert world.folders() == []
    await schedule.stop()


async def test_threat_32_nothing_of_a_forgotten_user_goes_on(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    await soft_stop(world, ann, engine)
    await world.users.forget(ann.id)
    assert list(world.root.iterdir()) == []
    assert await world.runs.next() is None
    assert await world.adapters.repair() == []


async def test_deleting_an_entry_while_it_trains_removes_the_state_at_once_and_for_good(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    finetune = world.finetune()
    wanted = await world.runs.request(ann.id, world.clock())
    task = asyncio.create_task(finetune.run(wanted))
    await engine.reached.wait()
    await world.history.delete(ann.id, EntryId(5))
    assert states(world) == []
    finetune.leave()
    engine.go.set()
    run = await task
    assert (run.state, run.reason) == (
        RunState.FAILED,
        "The history or the version changed while this run was training.",
    )
    assert world.folders() == []


async def test_deleting_an_entry_that_was_just_read_leaves_no_place_for_a_state(
    world: World, ann: User, tell: Tell
) -> None:
    class Slow(ScriptedEngine):
        async def health(self) -> Health:  # asked when the history was read and nothing was made of it yet
            with contextlib.suppress(NotFound):
                await world.history.delete(ann.id, EntryId(5))
            return await super().health()

        async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
            async for progress in super().train(request):
                assert states(world) == []
                yield progress

    await tell(40)
    world.engine = Slow(score=improving)
    assert (await world.train(ann)).reason == "The history or the version changed while this run was training."
    assert world.folders() == []


async def test_deleting_an_entry_that_was_only_quoted_removes_the_state_too(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    said = await world.history.place(
        ann.id, [Message(Role.ASSISTANT, "quoted")], conversation_id=None, now=world.clock(), count=len
    )
    await soft_stop(world, ann, engine)
    assert said.tail is not None
    await world.history.delete(ann.id, said.tail)
    assert states(world) == []


async def test_deleting_an_entry_leaves_the_runs_of_others(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    bob = await world.users.add("bob")
    await tell(40)
    await world.say(bob, own(10, start=900))
    await soft_stop(world, ann, engine)
    await world.history.delete(bob.id, EntryId(45))
    assert len(states(world)) == 1
    assert (await started(world, engine)).reason.endswith("It went on after step 2.")  # type: ignore[union-attr]


# Hard stops


async def test_threat_07_a_run_under_which_the_service_dies_again_and_again_is_given_up(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    run = await hard_stop(world, ann, engine)
    for _ in range(HARD_STOPS):
        assert await recover(world.runs, world.adapters, world.clock()) == {RunState.QUEUED: 1}
        await world.runs.start(run.id, world.clock())
    assert await recover(world.runs, world.adapters, world.clock()) == {RunState.INTERRUPTED: 1}
    assert world.folders() == []


async def test_the_start_says_what_it_did_with_which_runs(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    await hard_stop(world, ann, engine)
    bob = await world.users.add("bob")
    lost = await world.runs.request(bob.id, world.clock())
    for _ in range(HARD_STOPS):
        await world.runs.requeue(lost.id, "The service stopped.", hard=True)
    await world.runs.start(lost.id, world.clock())
    with capture_logs() as logs:
        await recover(world.runs, world.adapters, world.clock())
    assert logs == [{"event": "runs after a stop", "log_level": "warning", "queued": 1, "interrupted": 1}]
    with capture_logs() as logs:
        assert (await started(world, engine)).state is RunState.KEPT
    resumed = [line for line in logs if line["event"] == "→ finetune after a stop"]
    assert [(line["from_step"], line["steps"]) for line in resumed] == [(2, 5)]
    assert "today" not in repr(logs)


async def test_states_that_no_run_goes_on_from_are_removed_at_the_start(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    run = await soft_stop(world, ann, engine)
    await world.runs.end(run.id, RunState.INTERRUPTED, "The run was stopped.", world.clock())
    (mended,) = await world.adapters.repair()
    assert mended == f"The folder {ann.id}/run-{run.id} was removed: no version and no run keeps it."
    assert world.folders() == []


KILLS = [
    "checkpoint-after-folder",
    "step-1",
    "step-3",
    "publish-after-files",
    "publish-after-rename",
    "publish-after-row",
    "point-before-commit",
    "point-after-commit",
    "checkpoint-before-drop",
    "delete-before-commit",
]


async def killed(world: World, user: User, place: str) -> list[str]:
    """A process that carries out a run dies there; what the next start mended, before any run is taken up."""
    environment = {**os.environ, "PERSONA_FAILPOINT": place, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    command = [sys.executable, str(HERE / "finetune_me.py"), str(world.settings.home), str(user.id), place]
    child = await asyncio.to_thread(subprocess.run, command, env=environment, timeout=60, check=False)
    assert child.returncode == KILLED
    mended = await world.adapters.repair()
    await recover(world.runs, world.adapters, world.clock())
    return mended


@pytest.mark.parametrize("place", KILLS)
async def test_threat_07_killed_anywhere_around_a_state_the_run_ends_in_one_served_version(
    world: World, ann: User, tell: Tell, engine: Stopping, place: str
) -> None:
    await tell(40)
    await killed(world, ann, place)
    assert await world.adapters.repair() == []
    engine.go.set()
    if (run := await world.runs.next()) is not None:
        await world.finetune().run(run)
    last, active = await world.runs.last(ann.id), await world.adapters.active(ann.id)
    assert last is not None
    assert active is not None
    assert (last.id, last.state, last.version, active.watermark) == (1, RunState.KEPT, active.number, 37)
    assert world.folders() == [f"{ann.id}/{active.number}"]
    if place in ("step-3", "publish-after-row", "delete-before-commit"):
        assert f"went on after step {2 if 'delete' in place else 3 if 'step' in place else 5}" in str(last.reason)


async def test_threat_07_killed_after_a_deletion_the_start_removes_what_had_learned_the_entry(
    world: World, ann: User, tell: Tell, engine: Stopping
) -> None:
    await tell(40)
    mended = await killed(world, ann, "delete-after-commit")
    assert await world.history.get(ann.id, EntryId(5)) is None
    assert f"The folder {ann.id}/run-1 was removed: no version and no run keeps it." in mended
    assert world.folders() == []
    waiting = await world.runs.next()
    assert waiting is not None
    engine.go.set()
    run = await world.finetune().run(waiting)
    assert (run.state, str(run.reason).endswith(" It began anew after a stop.")) == (RunState.KEPT, True)
    assert EntryId(5) not in {row.entry_id for row in await world.runs.examples(run.id)}
