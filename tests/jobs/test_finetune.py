"""From history to a serving version, and every way in which that fails."""

import asyncio
import contextlib
import math
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from histories import own
from structlog.testing import capture_logs
from world import Tell, World, improving

from jobs import plans
from persona.domain import EntryId, Frame, Message, Role, Run, RunState, User, Version, VersionState
from persona.engine.protocol import AdapterRef, Example, Progress, ScoreRequest, TrainRequest, ref
from persona.engine.scripted import ScriptedEngine
from persona.errors import AdapterError, Busy, EngineDown, NotFound, StorageFull, TrainingFailed
from persona.settings import Learning


async def test_a_run_ends_with_a_serving_version(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    run = await world.train(ann)
    assert run.state is RunState.KEPT
    assert run.version == 1
    assert run.reason is not None
    assert run.reason.startswith("Better: 2.000 → 1.990")
    version = await world.adapters.active(ann.id)
    assert version is not None
    assert (version.number, version.state, version.watermark) == (1, VersionState.PUBLISHED, 37)
    assert (version.parent, version.base, version.run_id) == (None, "base-hash", run.id)
    assert world.engine.staged == world.engine.flipped == [ref(version)]
    assert world.folders() == [f"{ann.id}/1"]


async def test_a_run_keeps_its_numbers(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    metrics = (await world.train(ann)).metrics
    assert metrics["p_better"] == 1.0
    assert metrics["messages"] == 3
    assert metrics["examples"] == 74
    assert metrics["new_tokens"] == 37 * 16
    assert metrics["through"] == 40


async def test_threat_11_a_run_records_where_each_example_came_from(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    run = await world.train(ann)
    rows = await world.runs.examples(run.id)
    assert {row.entry_id for row in rows} == set(range(1, 38))
    assert {row.frame for row in rows} == {Frame.TURN, Frame.DRAFT}
    sent = [example for example in world.engine.trained[0].examples if not example.distil]
    assert [row.tokens for row in rows] == [len(example.tokens) for example in sent]


async def test_the_plan_comes_from_the_settings(world: World, ann: User, tell: Tell) -> None:
    learning = world.settings.learning.model_copy(update={"passes": 2})
    world.settings = world.settings.model_copy(update={"learning": learning})
    await tell(40)
    await world.train(ann)
    plan, wanted = world.engine.trained[0].plan, world.settings.learning
    assert (plan.rank, plan.alpha, plan.layers) == (wanted.rank, wanted.alpha, wanted.layers)
    assert plan.passes == wanted.passes == 2
    assert (plan.learning_rate, plan.batch_tokens, plan.slice_tokens) == (
        wanted.learning_rate,
        wanted.batch_tokens,
        wanted.slice_tokens,
    )
    assert plan.max_tokens == wanted.max_run_tokens
    assert plan.seed == 0  # one A before training for all users


def test_a_run_that_starts_from_an_adapter_is_gentler() -> None:
    learning = Learning(learning_rate=3e-3, warm_rate=1e-3)
    prior, version = AdapterRef(plans.NOBODY, 0, "prior", ""), AdapterRef(7, 1, "version", "")
    rates = [plans.plan(learning, 2, start).learning_rate for start in (None, prior, version)]
    assert rates == [3e-3, 1e-3, 1e-3]


def test_long_messages_have_a_slower_rate() -> None:
    def rate(*lengths: int) -> float:
        own = [Example(list(range(length + 1)), list(range(1, length + 1))) for length in lengths]
        return plans.plan(Learning(learning_rate=3e-3), 2, None, own).learning_rate

    assert rate() == rate(1) == rate(32, 32) == rate(12, 52) == 3e-3
    assert rate(128) == rate(128, 128) == rate(56, 200) == 1.5e-3
    assert 1.5e-3 < rate(40) < 3e-3


async def test_the_next_run_goes_on_from_the_version_that_serves(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    first = await world.adapters.active(ann.id)
    assert first is not None
    await tell(20)
    run = await world.train(ann)
    second = await world.adapters.active(ann.id)
    assert second is not None
    assert (run.version, second.parent, second.watermark) == (2, 1, 57)
    assert world.engine.trained[1].start == ref(first)
    again = {row.entry_id for row in await world.runs.examples(run.id)}
    assert again == set(range(38, 58))  # of what was absorbed nothing


async def test_another_shape_starts_from_zero_on_the_whole_history(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    await tell(20)
    changed = world.settings.learning.model_copy(update={"rank": 8})
    world.settings = world.settings.model_copy(update={"learning": changed})
    run = await world.train(ann)
    assert run.state is RunState.KEPT
    assert world.engine.trained[1].start is None
    assert {row.entry_id for row in await world.runs.examples(run.id)} == set(range(1, 58))


async def test_another_base_lets_the_version_sleep_and_starts_from_zero(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    world.base = "other-base"
    run = await world.train(ann)
    second = await world.adapters.active(ann.id)
    assert second is not None
    assert (run.state, second.number, second.base, second.parent) == (RunState.KEPT, 2, "other-base", None)
    assert world.engine.trained[1].start is None


async def test_old_versions_are_pruned(world: World, ann: User, tell: Tell) -> None:
    changed = world.settings.learning.model_copy(update={"keep_versions": 2})
    world.settings = world.settings.model_copy(update={"learning": changed})
    for _ in range(4):
        await tell(20)
        assert (await world.train(ann)).state is RunState.KEPT
    assert world.folders() == [f"{ann.id}/3", f"{ann.id}/4"]


# Nothing is published


async def assert_nothing_changed(world: World, user: User) -> None:
    assert await world.adapters.active(user.id) is None
    assert world.engine.flipped == []
    assert world.folders() == []
    assert all(v.state is not VersionState.PUBLISHED for v in await world.adapters.list(user.id))


async def test_too_little_history_is_deferred(world: World, ann: User, tell: Tell) -> None:
    await tell(2)
    run = await world.train(ann)
    assert run.state is RunState.DEFERRED
    assert run.reason is not None
    assert run.reason.startswith("Only 2 new messages")
    assert world.engine.trained == []
    await assert_nothing_changed(world, ann)


@pytest.mark.parametrize("why", ["paused", "learn", "setting"])
async def test_who_does_not_want_to_learn_is_not_trained(world: World, tell: Tell, ann: User, why: str) -> None:
    user = await world.users.add("eve", learn=why != "learn")
    await tell(40, user)
    if why == "paused":
        await world.users.set_paused(user.id, True)
    if why == "setting":
        off = world.settings.learning.model_copy(update={"enabled": False})
        world.settings = world.settings.model_copy(update={"learning": off})
    assert (await world.train(user)).state is RunState.DEFERRED
    assert world.engine.trained == []


async def test_threat_10_a_candidate_that_is_no_better_is_rejected(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine.predicts = None  # every version scores alike
    run = await world.train(ann)
    assert (run.state, run.version) == (RunState.REJECTED, 1)
    version = await world.adapters.get(ann.id, 1)
    assert version is not None
    assert version.state is VersionState.REJECTED
    await assert_nothing_changed(world, ann)


async def test_threat_10_a_rejected_run_leaves_the_old_version_serving(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    await tell(20)
    world.engine.predicts = None
    assert (await world.train(ann)).state is RunState.REJECTED
    active = await world.adapters.active(ann.id)
    assert active is not None
    assert active.number == 1
    assert len(world.engine.flipped) == 1
    assert world.folders() == [f"{ann.id}/1"]


async def test_threat_09_training_that_diverges_publishes_nothing(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine.trainable = None
    run = await world.train(ann)
    assert run.state is RunState.FAILED
    assert run.reason == "The loss was not finite at step 1; nothing was published."
    await assert_nothing_changed(world, ann)


class Diverging(ScriptedEngine):
    """Ends its training with a loss of NaN, without saying that it failed."""

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        Path(request.out, "adapter.safetensors").write_bytes(b"nan")
        yield Progress(1, 1, math.nan, 100, 0.1, done=True)


async def test_threat_09_a_loss_that_is_not_finite_publishes_nothing(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine = Diverging()
    run = await world.train(ann)
    assert (run.state, run.reason) == (RunState.FAILED, "The training loss was not finite; nothing was published.")
    await assert_nothing_changed(world, ann)


async def test_threat_09_scores_that_are_not_finite_publish_nothing(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine.predicts = lambda request: [math.nan if request.adapter else -1.0] * len(request.targets)
    run = await world.train(ann)
    assert run.state is RunState.REJECTED
    await assert_nothing_changed(world, ann)


class Failing(ScriptedEngine):
    """Fails at one of its faces."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(score=lambda request: [-1.0 if request.adapter else -2.0] * len(request.targets))
        self._where = where
        self._error = error

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        async for progress in super().train(request):
            if self._where == "train" and progress.done:
                raise self._error
            yield progress

    async def score(self, request: ScoreRequest) -> list[float]:
        if self._where == "score" and len(self.scored) == 2:
            raise self._error
        return await super().score(request)

    async def stage(self, ref: AdapterRef) -> None:
        if self._where == "stage":
            raise self._error
        await super().stage(ref)

    async def flip(self, ref: AdapterRef) -> None:
        if self._where == "flip":
            raise self._error
        await super().flip(ref)


@pytest.mark.parametrize("where", ["train", "stage", "score"])
@pytest.mark.parametrize(
    "error",
    [
        TrainingFailed("Out of memory."),
        AdapterError("The file is foreign."),
        EngineDown("The engine is being restarted."),
        StorageFull("The disk is full."),
        Busy("There is no memory to train now."),
        ZeroDivisionError("user text"),
    ],
)
async def test_a_failure_anywhere_ends_the_run_with_a_sentence(
    world: World, ann: User, tell: Tell, where: str, error: Exception
) -> None:
    await tell(40)
    world.engine = Failing(where, error)
    run = await world.train(ann)
    assert run.state is (RunState.DEFERRED if type(error) is Busy else RunState.FAILED)
    assert run.reason is not None
    assert run.reason.endswith(".")
    assert "user text" not in run.reason
    assert bool(run.metrics.get("again")) is isinstance(error, (AdapterError, Busy, StorageFull))
    await assert_nothing_changed(world, ann)
    world.engine = ScriptedEngine(score=lambda request: [-1.0 if request.adapter else -2.0] * len(request.targets))
    assert (await world.train(ann)).state is RunState.KEPT


async def test_an_engine_that_misses_the_flip_does_not_undo_it(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine = Failing("flip", EngineDown("The engine is being restarted."))
    assert (await world.train(ann)).state is RunState.KEPT
    active = await world.adapters.active(ann.id)
    assert active is not None
    assert active.number == 1


async def test_live_conversations_are_read_after_the_gate_and_before_the_version_serves(
    world: World, ann: User, tell: Tell
) -> None:
    await tell(40)
    finetune, seen = world.finetune(), list[tuple[int, bool, bool]]()

    async def warm(user: User, version: Version) -> None:
        active = await world.adapters.active(user.id)
        seen.append((version.number, bool(world.engine.scored), active is not None))

    finetune.warm = warm
    assert (await finetune.run(await world.runs.request(ann.id, world.clock()))).state is RunState.KEPT
    assert seen == [(1, True, False)]


@pytest.mark.parametrize("trouble", [Busy("There is no room.", retry_after=1), None])
async def test_a_version_serves_though_conversations_could_not_be_read(
    world: World, ann: User, tell: Tell, trouble: Busy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tell(40)
    monkeypatch.setattr("jobs.finetune.WARM_SECONDS", 0.05)
    finetune = world.finetune()

    async def warm(user: User, version: Version) -> None:
        if trouble:
            raise trouble
        await asyncio.sleep(60)

    finetune.warm = warm
    assert (await finetune.run(await world.runs.request(ann.id, world.clock()))).state is RunState.KEPT
    assert await world.adapters.active(ann.id) is not None


# The world moves on while it trains


class Slow(ScriptedEngine):
    """Waits in the middle of its training."""

    def __init__(self) -> None:
        super().__init__(score=lambda request: [-1.0 if request.adapter else -2.0] * len(request.targets))
        self.reached = asyncio.Event()
        self.go = asyncio.Event()

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        async for progress in super().train(request):
            if progress.step == 2 and not progress.done:
                self.reached.set()
                await self.go.wait()
            yield progress


async def test_threat_08_a_rollback_in_the_last_moment_of_a_run_stays(
    world: World, ann: User, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tell(40)
    assert (await world.train(ann)).state is RunState.KEPT
    await tell(40)
    point = world.adapters.point

    async def late(*given: Any, **more: Any) -> None:
        await world.adapters.rollback(ann.id, 0)
        await point(*given, **more)

    monkeypatch.setattr(world.adapters, "point", late)
    run = await world.train(ann)
    assert (run.state, run.metrics["again"]) == (RunState.FAILED, False)
    assert "Another version began to serve meanwhile." in (run.reason or "")
    assert await world.adapters.active(ann.id) is None
    assert [version.state for version in await world.adapters.list(ann.id)][1:] == [VersionState.REJECTED]


async def test_threat_06_a_damaged_version_that_a_run_should_start_from_is_quarantined(
    world: World, ann: User, tell: Tell
) -> None:
    class Reading(ScriptedEngine):
        async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
            if request.start is not None:
                raise AdapterError("The file does not match its checksum.")
            async for progress in super().train(request):
                yield progress

    world.engine = Reading(score=improving)
    await tell(40)
    assert (await world.train(ann)).state is RunState.KEPT
    await tell(40)
    run = await world.train(ann)
    assert (run.state, run.metrics["again"]) == (RunState.FAILED, True)
    (version,) = await world.adapters.list(ann.id)
    assert version.state is VersionState.QUARANTINED
    assert (await world.train(ann)).state is RunState.KEPT


async def test_progress_can_be_read_while_it_trains_and_not_after(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine = engine = Slow()
    finetune = world.finetune()
    task = asyncio.create_task(finetune.run(await world.runs.request(ann.id, world.clock())))
    await engine.reached.wait()
    assert (finetune.progress[ann.id].step, finetune.progress[ann.id].steps) == (1, 3)
    engine.go.set()
    await task
    assert finetune.progress == {}


async def test_a_cancelled_run_is_interrupted_and_leaves_nothing(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine = engine = Slow()
    wanted = await world.runs.request(ann.id, world.clock())
    task = asyncio.create_task(world.finetune().run(wanted))
    await engine.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run = await world.runs.get(ann.id, wanted.id)
    assert run is not None
    assert run.state is RunState.INTERRUPTED
    assert run.reason is not None
    await assert_nothing_changed(world, ann)


async def during(world: World, user: User, act: str) -> None:
    match act:
        case "pause":
            await world.users.set_paused(user.id, True)
        case "rollback":
            await world.adapters.rollback(user.id, 0)
        case "delete":
            await world.history.delete(user.id, EntryId(45))
        case "base":
            world.base = "other-base"


@pytest.mark.parametrize("act", ["pause", "rollback", "delete", "base"])
async def test_a_change_of_mind_while_it_trains_is_respected(world: World, ann: User, tell: Tell, act: str) -> None:
    await tell(40)
    await world.train(ann)
    await tell(20)
    world.engine = engine = Slow()
    task = asyncio.create_task(world.train(ann))
    await engine.reached.wait()
    await during(world, ann, act)
    engine.go.set()
    run = await task
    assert run.state is RunState.FAILED
    active = await world.adapters.active(ann.id)
    assert (active.number if active else None) == (None if act == "rollback" else 1)
    assert engine.flipped == []
    assert world.folders() == [f"{ann.id}/1"]


async def test_a_user_forgotten_while_it_trains_does_not_come_back(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    world.engine = engine = Slow()
    task = asyncio.create_task(world.train(ann))
    await engine.reached.wait()
    await world.users.forget(ann.id)
    engine.go.set()
    with pytest.raises(NotFound):
        await task
    assert world.folders() == []
    assert engine.flipped == []


@pytest.mark.parametrize("after", range(1, 12))
async def test_a_cancellation_at_any_moment_leaves_one_whole_state(
    world: World, ann: User, tell: Tell, after: int
) -> None:
    await tell(40)
    wanted = await world.runs.request(ann.id, world.clock())
    task = asyncio.create_task(world.finetune().run(wanted))
    for _ in range(after * 12):
        await asyncio.sleep(0)
    await asyncio.sleep(after * 0.004)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    run = await world.runs.get(ann.id, wanted.id)
    assert run is not None
    active = await world.adapters.active(ann.id)
    assert (active is not None) is (run.state is RunState.KEPT)
    assert run.state.ended or run.state is RunState.QUEUED
    await world.adapters.repair()
    assert world.folders() == ([f"{ann.id}/1"] if active else [])


async def test_a_run_that_is_cancelled_when_its_version_was_to_serve_leaves_no_candidate(
    world: World, ann: User, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tell(40)
    finetune, reached = world.finetune(), asyncio.Event()
    attempt = finetune._attempt

    async def late(run: Run) -> Any:
        outcome = await attempt(run)
        reached.set()
        await asyncio.sleep(60)
        return outcome

    monkeypatch.setattr(finetune, "_attempt", late)
    task = asyncio.create_task(finetune.run(await world.runs.request(ann.id, world.clock())))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [version.state for version in await world.adapters.list(ann.id)] == [VersionState.REJECTED]
    assert world.folders() == []


# Apart and silent


async def test_threat_12_a_run_of_one_user_holds_nothing_of_another(world: World, ann: User, tell: Tell) -> None:
    bob = await world.users.add("bob")
    canary = "the canary sings at midnight"
    await world.history.place(bob.id, [Message(Role.USER, canary)], conversation_id=None, now=world.clock(), count=len)
    await tell(40)
    await world.say(bob, own(60, start=900))
    await world.train(bob)
    await tell(10)
    await world.train(ann)
    requests = world.engine.trained[1].examples, world.engine.scored
    of_ann = [example.tokens for example in requests[0]]
    of_ann += [request.tokens for request in requests[1] if request.adapter and request.adapter.user_id == ann.id]
    assert of_ann
    for tokens in of_ann:
        assert canary.encode() not in bytes(token for token in tokens if token < 256)
    rows = await world.runs.examples((await world.runs.list(ann.id))[0].id)
    mine = {entry.id for entry in await world.history.since(ann.id, EntryId(0))}
    assert {row.entry_id for row in rows} <= mine
    assert world.engine.trained[1].start is None


async def test_threat_28_user_text_is_in_no_log_and_no_reason(world: World, ann: User, tell: Tell) -> None:
    with capture_logs() as logs:
        await tell(40)
        reasons = [(await world.train(ann)).reason]
        world.engine = Failing("score", ValueError("I say aaab today"))
        await tell(40)
        reasons.append((await world.train(ann)).reason)
    assert logs
    assert "today" not in repr(logs) + repr(reasons)
    assert all("exc_info" not in line for line in logs)  # a traceback shows the values of variables
    assert any(line.get("error") == "ValueError" and "test_finetune.py" in line["at"] for line in logs)


async def test_the_database_holds_no_more_than_the_history(world: World, ann: User, tell: Tell) -> None:
    await tell(40)
    await world.train(ann)
    with contextlib.closing(sqlite3.connect(world.settings.database)) as plain:
        rows = plain.execute("select * from run_examples union all select id, 0, reason, 0, metrics, 0 from runs")
        assert "today" not in repr(rows.fetchall())
