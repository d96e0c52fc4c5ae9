"""The live check: what it scores, that it does so once, when it rolls back, and whom it leaves alone."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from histories import TEXT, entry, learning
from structlog.testing import capture_logs
from world import Tell, World

from jobs import live
from jobs.figures import Word
from jobs.live import LiveCheck
from persona.domain import EntryId, Role, RunState, User, UserId, Version, VersionState
from persona.engine.protocol import Health, Progress, ScoreRequest, TrainRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import Busy, EngineDown, PersonaError, StorageFull, TooLarge
from storage.live import Checked, LiveChecks
from storage.tables import entries


@dataclass
class Opinion:
    """Log-probabilities by version (0: the base) of what a user writes; each version is better than the one before."""

    of: dict[int, float] = field(default_factory=dict)
    error: Exception | None = None
    asked: Callable[[ScoreRequest], None] = lambda request: None

    def __call__(self, request: ScoreRequest) -> list[float]:
        answers = request.tokens[request.targets[0] - 1] == 258
        number = request.adapter.number if request.adapter else 0
        if not answers:
            self.asked(request)
            if self.error is not None:
                raise self.error
        return [-2.0 if answers else self.of.get(number, -2.0 + number / 10)] * len(request.targets)


@pytest.fixture
def opinion(world: World) -> Opinion:
    made = Opinion()
    world.engine = ScriptedEngine(score=made)
    return made


async def nobody(user_id: UserId) -> None:
    """No run is under way."""


async def kept(world: World, user: User) -> Version:
    """The version of a run that the gate kept."""
    run = await world.train(user)
    assert run.state is RunState.KEPT, run.reason
    version = await world.adapters.active(user.id)
    assert version is not None
    world.engine.scored.clear()
    return version


async def rounds(check: LiveCheck, count: int = 10) -> None:
    for _ in range(count):
        await check.round(nobody)


async def rolled_back(world: World, user: User, number: int) -> str | None:
    version = await world.adapters.get(user.id, number)
    assert version is not None
    return version.rolled_back


async def active(world: World, user: User) -> int | None:
    version = await world.adapters.active(user.id)
    return version.number if version else None


# What is scored


async def test_each_new_message_is_scored_once_under_both_versions(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(40)
    second = await kept(world, ann)
    check = world.live()
    await rounds(check)
    assert world.engine.scored == [], "what trained and what the gate judged by is old"
    await tell(5)
    await rounds(check)
    rows = await world.checks.list(ann.id)
    assert [(row.version, row.against, row.entry_id) for row in rows] == [(second.number, 1, n) for n in range(81, 86)]
    assert {row.tokens for row in rows} == {17}
    assert [row.serving for row in rows] == pytest.approx([17 * 1.8] * 5)
    assert [row.before for row in rows] == pytest.approx([17 * 1.9] * 5)
    asked = [request.adapter.number for request in world.engine.scored if request.adapter]
    assert asked == [2, 1] * 5
    assert check.counts == {"messages": 5, "rollbacks": 0}


async def test_each_side_is_shown_what_it_has_not_absorbed_as_by_the_gate(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    first = await kept(world, ann)
    await tell(40)
    second = await kept(world, ann)
    await tell(2)
    await rounds(world.live())
    quoted = [TEXT.decode(request.tokens).count('user: "I say') for request in world.engine.scored]
    assert (first.watermark, second.watermark) == (37, 77)
    newer = [number - 1 - second.watermark for number in (81, 82)]
    assert quoted[0::2] == newer
    assert all(count > more for count, more in zip(quoted[1::2], newer, strict=True))
    said = [TEXT.decode([request.tokens[i] for i in request.targets]) for request in world.engine.scored]
    assert said == ["I say aaib today"] * 2 + ["I say aaic today"] * 2


async def test_what_would_not_be_held_out_judges_nothing(world: World, ann: User, tell: Tell, opinion: Opinion) -> None:
    await tell(40)
    await kept(world, ann)
    texts = ["> only a quotation of others", "the same words 1", "The same words 2!", "the same words 3"]
    await world.say(ann, [entry(100 + at, text) for at, text in enumerate([*texts, "the same words 4", "other words"])])
    check = world.live()
    await rounds(check)
    assert [row.entry_id for row in await world.checks.list(ann.id)] == [42, 43, 44, 46]
    world.engine.scored.clear()
    await world.say(ann, [entry(200, "the same words 5")])
    await rounds(check)
    await rounds(world.live())
    assert world.engine.scored == []


async def test_secrets_are_redacted_before_they_are_scored(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    await world.say(ann, [entry(100, "write to ann@example.org"), entry(101, "and another line")])
    await rounds(world.live())
    read = [TEXT.decode(request.tokens) for request in world.engine.scored]
    assert all("[email]" in text and "example.org" not in text for text in read)


async def test_a_first_version_is_compared_with_the_base(world: World, ann: User, tell: Tell, opinion: Opinion) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(3)
    await rounds(world.live())
    assert {row.against for row in await world.checks.list(ann.id)} == {None}
    assert [request.adapter is None for request in world.engine.scored] == [False, True] * 3


async def test_a_version_whose_predecessor_lost_its_files_is_compared_with_the_base(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(40)
    await kept(world, ann)
    await tell(2)
    check = world.live()
    await rounds(check)
    await world.adapters.prune(ann.id, 1)
    await tell(3)
    await rounds(check)
    assert [row.against for row in await world.checks.list(ann.id)] == [1, 1, None, None, None]
    found = (await check.figures(ann.id))[2]
    assert (found.against, found.messages, found.tokens) == (None, 3, 51)


async def test_an_imported_version_is_its_owners_choice(world: World, ann: User, tell: Tell, opinion: Opinion) -> None:
    folder = await world.adapters.workspace(ann.id)
    (folder / "adapter.safetensors").write_bytes(b"imported")
    about = {"parent": None, "base": world.base, "run_id": None, "metrics": {"imported": True}, "plan": {}}
    version = await world.adapters.publish(ann.id, folder, watermark=EntryId(0), **about)  # type: ignore[arg-type]
    await world.adapters.point(ann.id, version.number)
    await tell(3)
    await rounds(world.live())
    assert world.engine.scored == []


# Once, whatever happens


async def test_a_round_is_short_and_a_restart_goes_on_where_it_ended(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(live.MESSAGES + 4)
    await world.live().round(nobody)
    assert len(await world.checks.list(ann.id)) == live.MESSAGES
    await world.live().round(nobody)
    assert [row.entry_id for row in await world.checks.list(ann.id)] == list(range(41, 45 + live.MESSAGES))
    assert len(world.engine.scored) == 2 * (live.MESSAGES + 4)


@pytest.mark.parametrize("after", [0, 1])
async def test_a_stop_in_the_middle_of_a_message_loses_and_doubles_nothing(
    world: World, ann: User, tell: Tell, opinion: Opinion, after: int
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(3)
    reached, hold = asyncio.Event(), asyncio.Event()

    class Slow(ScriptedEngine):
        async def score(self, request: ScoreRequest) -> list[float]:
            if len(self.scored) == 2 + after:
                reached.set()
                await hold.wait()
            return await super().score(request)

    world.engine = Slow(score=opinion)
    task = asyncio.create_task(world.live().round(nobody))
    await reached.wait()
    task.cancel()
    await asyncio.wait([task])
    assert [row.entry_id for row in await world.checks.list(ann.id)] == [41]
    hold.set()
    await rounds(world.live())
    assert [row.entry_id for row in await world.checks.list(ann.id)] == [41, 42, 43]


async def test_a_verdict_that_a_stop_cut_off_is_carried_out_after_the_start(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(60)
    for number in range(41, 81):
        await world.checks.add(ann.id, Checked(1, None, EntryId(number), 10, 40.0, 20.0), world.clock())
    await world.live().round(nobody)
    assert await active(world, ann) is None
    assert world.engine.scored == []


@pytest.mark.parametrize(
    "error",
    [Busy("Full."), EngineDown("It is being restarted.")],
    ids=["busy", "down"],
)
async def test_an_engine_that_cannot_score_now_is_asked_again_later(
    world: World, ann: User, tell: Tell, opinion: Opinion, error: PersonaError
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(3)
    opinion.error = error
    check = world.live()
    with capture_logs() as logged:
        await rounds(check)
    assert await world.checks.list(ann.id) == []
    assert logged == []
    opinion.error = None
    await rounds(check)
    assert len(await world.checks.list(ann.id)) == 3


async def test_threat_23_a_full_disk_costs_nothing_but_time(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    class Full(LiveChecks):
        full = True

        async def add(self, *args: object) -> bool:
            if self.full:
                raise StorageFull("The disk is full: nothing was written.")
            return await super().add(*args)  # type: ignore[arg-type]

    await tell(40)
    await kept(world, ann)
    await tell(2)
    world.checks = full = Full(world.users._db)
    check = world.live()
    await rounds(check)
    full.full = False
    await rounds(check)
    assert [row.entry_id for row in await full.list(ann.id)] == [41, 42]


async def test_an_entry_that_is_deleted_while_it_is_scored_counts_for_nothing(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    class Deleting(ScriptedEngine):
        async def score(self, request: ScoreRequest) -> list[float]:
            if not self.scored:
                await world.history.delete(ann.id, EntryId(41))
            return await super().score(request)

    await tell(40)
    await kept(world, ann)
    await tell(3)
    world.engine = Deleting(score=opinion)
    await rounds(world.live())
    assert [row.entry_id for row in await world.checks.list(ann.id)] == [42, 43]


async def test_threat_32_a_user_who_is_forgotten_while_scored_leaves_nothing_and_stops_nobody(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    class Forgetting(ScriptedEngine):
        async def score(self, request: ScoreRequest) -> list[float]:
            if request.adapter is not None and request.adapter.user_id == ann.id:
                await world.users.forget(ann.id)
            return await super().score(request)

    bob = await world.users.add("bob")
    for user in (ann, bob):
        await tell(40, user)
        await kept(world, user)
        await tell(2, user)
    world.engine = Forgetting(score=opinion)
    with capture_logs() as logged:
        await rounds(world.live())
    assert (len(await world.checks.list(ann.id)), len(await world.checks.list(bob.id))) == (0, 2)
    assert not [line for line in logged if "say" in str(line)]


async def test_cancelling_a_user_waits_until_nothing_of_theirs_is_scored(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    reached, scoring = asyncio.Event(), 0

    class Endless(ScriptedEngine):
        async def score(self, request: ScoreRequest) -> list[float]:
            nonlocal scoring
            if request.adapter is None or request.adapter.user_id != ann.id:
                return await super().score(request)
            scoring += 1
            reached.set()
            try:
                return await asyncio.get_running_loop().create_future()
            finally:
                scoring -= 1

    bob = await world.users.add("bob")
    for user in (ann, bob):
        await tell(40, user)
        await kept(world, user)
        await tell(2, user)
    world.engine = Endless(score=opinion)
    check = world.live()
    task = asyncio.create_task(check.round(nobody))
    await reached.wait()
    await check.cancel(bob.id)
    assert scoring == 1
    await check.cancel(ann.id)
    assert scoring == 0
    await task
    assert (len(await world.checks.list(ann.id)), len(await world.checks.list(bob.id))) == (0, 2)


async def test_a_message_that_does_not_fit_judges_nothing_and_holds_up_nothing(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(2)
    opinion.error = TooLarge("Prompt and reply together do not fit.")
    check = world.live()
    await rounds(check)
    opinion.error = None
    await tell(1)
    await rounds(check)
    assert [row.tokens for row in await world.checks.list(ann.id)] == [0, 0, 17]
    assert (await check.figures(ann.id))[1].messages == 1


# Whose turn it is


async def test_everybody_gets_their_turn(world: World, ann: User, tell: Tell, opinion: Opinion) -> None:
    others = [await world.users.add(name) for name in ("bob", "cem")]
    for user in (ann, *others):
        await tell(40, user)
        await kept(world, user)
        await tell(3 * live.MESSAGES, user)
    check = world.live()
    for expected in ([8, 0, 0], [8, 8, 0], [8, 8, 8], [16, 8, 8]):
        await check.round(nobody)
        assert [len(await world.checks.list(user.id)) for user in (ann, *others)] == expected


async def test_a_training_under_way_waits_for_one_message_at_most(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    class Training(ScriptedEngine):
        async def health(self) -> Health:
            return Health("b", "scripted", "none", "none", 8192, training=True)

    await tell(40)
    await kept(world, ann)
    await tell(5)
    world.engine = Training(score=opinion)
    await world.live().round(nobody)
    assert len(await world.checks.list(ann.id)) == live.BESIDE_TRAINING


async def test_threat_06_a_damaged_version_is_quarantined_and_the_others_are_checked(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    bob = await world.users.add("bob")
    for user in (ann, bob):
        await tell(40, user)
        version = await kept(world, user)
        await tell(2, user)
        if user is ann:
            Path(version.path, "adapter.safetensors").write_bytes(b"flipped")
    await rounds(world.live())
    damaged = await world.adapters.get(ann.id, 1)
    assert damaged is not None
    assert damaged.state is VersionState.QUARANTINED
    assert (len(await world.checks.list(ann.id)), len(await world.checks.list(bob.id))) == (0, 2)


async def test_whatever_goes_wrong_with_one_user_the_next_is_checked(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    def break_for_ann(request: ScoreRequest) -> None:
        if request.adapter is not None and request.adapter.user_id == ann.id:
            raise ValueError("I say something secret")

    bob = await world.users.add("bob")
    for user in (ann, bob):
        await tell(40, user)
        await kept(world, user)
        await tell(2, user)
    opinion.asked = break_for_ann
    with capture_logs() as logged:
        await world.live().round(nobody)
    assert len(await world.checks.list(bob.id)) == 2
    assert [(line["event"], line["error"]) for line in logged] == [("live check failed", "ValueError")]
    assert "secret" not in str(logged)


@pytest.mark.parametrize("off", ["live_check", "enabled"])
async def test_switched_off_it_does_nothing(world: World, ann: User, tell: Tell, opinion: Opinion, off: str) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(3)
    world.settings = world.settings.model_copy(update={"learning": learning(**{off: False})})
    await rounds(world.live())
    assert world.engine.scored == []


# The verdict


async def two_versions(world: World, user: User, tell: Tell) -> None:
    for _ in range(2):
        await tell(40, user)
        await kept(world, user)


async def test_threat_10_a_version_that_is_worse_is_rolled_back(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {2: -2.2}
    await tell(60)
    check, ended = world.live(), []

    async def interrupt(user_id: UserId) -> None:
        ended.append(user_id)

    with capture_logs() as logged:
        for _ in range(10):
            await check.round(interrupt)
    assert await active(world, ann) == 1
    left = await world.adapters.get(ann.id, 2)
    assert left is not None
    assert left.state is VersionState.PUBLISHED
    assert left.rolled_back is not None
    assert left.rolled_back.startswith("Rolled back by the live check: -0.300 nats per token against version 1 over ")
    assert ended == [ann.id]
    assert world.engine.flipped[-1].number == world.engine.staged[-1].number == 1
    assert check.counts["rollbacks"] == 1
    (line,) = logged
    assert (line["user"], line["version"], line["to"], line["messages"]) == (
        "ann",
        2,
        1,
        len(await world.checks.list(ann.id, 2)),
    )
    assert line["messages"] < 20
    assert (await check.figures(ann.id))[2].word is Word.WORSE


async def test_a_first_version_that_is_worse_gives_way_to_the_base(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    opinion.of = {1: -3.0}
    await tell(60)
    await rounds(world.live())
    assert await active(world, ann) is None
    assert "against the bare base" in str(await rolled_back(world, ann, 1))


@pytest.mark.parametrize(("nats", "word"), [(-1.9, Word.UNDECIDED), (-1.7, Word.BETTER)])
async def test_a_version_that_is_equal_or_better_stays(
    world: World, ann: User, tell: Tell, opinion: Opinion, nats: float, word: Word
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {2: nats}
    await tell(80)
    check = world.live()
    await rounds(check, 12)
    assert len(await world.checks.list(ann.id)) == 80
    assert await active(world, ann) == 2
    assert (await check.figures(ann.id))[2].word is word


@pytest.mark.parametrize("nats", [math.nan, -math.inf, math.inf])
async def test_threat_09_scores_that_are_not_finite_are_the_worst(
    world: World, ann: User, tell: Tell, opinion: Opinion, nats: float
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {2: nats}
    await tell(60)
    await rounds(world.live())
    assert await active(world, ann) == 1


async def test_a_predecessor_that_breaks_speaks_for_the_version(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {1: math.nan}
    await tell(30)
    check = world.live()
    await rounds(check)
    assert (await check.figures(ann.id))[2].word is Word.BETTER


async def test_what_breaks_on_both_sides_is_left_one_after_the_other_until_the_base_serves(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {1: math.nan, 2: math.nan}
    await tell(60)
    await rounds(world.live())
    assert await active(world, ann) is None


async def test_after_a_rollback_the_next_run_trains_from_what_serves_and_the_history_stays(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {2: -2.5}
    await tell(40)
    check = world.live()
    await rounds(check)
    assert await active(world, ann) == 1
    third = await kept(world, ann)
    start = world.engine.trained[-1].start
    assert (third.number, third.parent, start.number if start else None) == (3, 1, 1)
    assert len(await world.history.page(ann.id, limit=1000)) == 120
    await tell(2)
    await rounds(check)
    assert [row.against for row in await world.checks.list(ann.id, 3)] == [1, 1]


async def test_a_rollback_that_the_engine_cannot_stage_now_comes_later(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    class Unready(ScriptedEngine):
        ready = False

        async def stage(self, ref: object) -> None:
            if not self.ready:
                raise EngineDown("It is being restarted.")
            await super().stage(ref)  # type: ignore[arg-type]

    await two_versions(world, ann, tell)
    opinion.of = {2: -2.5}
    await tell(30)
    world.engine = engine = Unready(score=opinion)
    check = world.live()
    await rounds(check)
    assert await active(world, ann) == 2
    engine.ready = True
    await check.round(nobody)
    assert await active(world, ann) == 1


# Who is left alone


async def test_who_paused_or_does_not_learn_is_left_alone(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {2: -2.5}
    await tell(30)
    await world.users.set_paused(ann.id, True)
    await rounds(world.live())
    assert await active(world, ann) == 2
    assert world.engine.scored == []
    await world.users.set_paused(ann.id, False)
    await rounds(world.live())
    assert await active(world, ann) == 1


async def test_who_rolled_back_by_hand_is_left_alone(world: World, ann: User, tell: Tell, opinion: Opinion) -> None:
    await two_versions(world, ann, tell)
    await world.adapters.rollback(ann.id, 1)
    opinion.of = {1: -9.0}
    await tell(30)
    await rounds(world.live())
    assert await active(world, ann) == 1
    assert world.engine.scored == []


async def test_who_returned_by_hand_to_what_was_rolled_back_is_left_alone(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {2: -2.5}
    await tell(30)
    check = world.live()
    await rounds(check)
    await world.adapters.rollback(ann.id, 2)
    await tell(30)
    await rounds(check)
    assert await active(world, ann) == 2


async def test_a_version_that_stopped_serving_meanwhile_is_not_rolled_back(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await two_versions(world, ann, tell)
    opinion.of = {2: -2.5}
    await tell(30)
    check = world.live()

    async def meanwhile(user_id: UserId) -> None:
        await world.adapters.rollback(user_id, 0)

    for _ in range(10):
        await check.round(meanwhile)
    assert await active(world, ann) is None
    assert await rolled_back(world, ann, 2) is None


async def test_a_version_of_another_base_sleeps_unjudged(world: World, ann: User, tell: Tell, opinion: Opinion) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(3)
    world.base = "other-base"
    await rounds(world.live())
    assert world.engine.scored == []


async def test_what_assistants_and_devices_say_judges_nothing(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    await tell(3)
    async with world.users._db.write() as connection:
        for number, values in ((41, {"role": Role.ASSISTANT, "origin": "reply"}), (42, {"origin": "event"})):
            await connection.execute(entries.update().where(entries.c.id == number).values(**values))
    await rounds(world.live())
    assert [row.entry_id for row in await world.checks.list(ann.id)] == [43]


# Beside the runs


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.02)


async def test_the_schedule_has_messages_checked_and_a_stop_in_between_costs_nothing(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    await tell(40)
    await kept(world, ann)
    world.settings = world.settings.model_copy(update={"learning": learning(check_seconds=0.05)})

    async def checked(count: int) -> bool:
        return len(await world.checks.list(ann.id)) == count

    for count in (live.MESSAGES + 1, 2 * live.MESSAGES):
        schedule = world.schedule(live=world.live())
        await schedule.start()
        await tell(count - len(await world.checks.list(ann.id)))
        await until(lambda count=count: checked(count))  # type: ignore[misc]
        await schedule.stop()
    assert len(world.engine.scored) == 4 * live.MESSAGES


async def test_stopping_in_the_middle_of_a_score_ends_it(world: World, ann: User, tell: Tell, opinion: Opinion) -> None:
    reached = asyncio.Event()

    class Endless(ScriptedEngine):
        async def score(self, request: ScoreRequest) -> list[float]:
            reached.set()
            return await asyncio.get_running_loop().create_future()

    await tell(40)
    await kept(world, ann)
    await tell(2)
    world.engine = Endless(score=opinion)
    schedule = world.schedule(live=world.live())
    await schedule.start()
    await reached.wait()
    await schedule.stop()
    assert await world.checks.list(ann.id) == []
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("live")]


async def test_a_run_that_trains_from_what_is_rolled_back_ends_and_is_taken_up_from_what_serves(
    world: World, ann: User, tell: Tell, opinion: Opinion
) -> None:
    class Patient(ScriptedEngine):
        async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
            opinion.of[2] = -2.5  # from now on it is seen to be bad
            async for progress in super().train(request):
                yield progress

    await two_versions(world, ann, tell)
    await tell(40)
    world.engine = Patient(score=opinion)
    await world.engine.pause()
    rules = learning(check_seconds=0.05, min_new_tokens=320)
    world.settings = world.settings.model_copy(update={"learning": rules})
    schedule = world.schedule(live=world.live())
    await schedule.start()

    async def ended(state: RunState) -> bool:
        return (await world.runs.list(ann.id))[0].state is state

    async def back() -> bool:
        return await active(world, ann) == 1

    await until(back)
    assert await ended(RunState.INTERRUPTED)
    await world.engine.resume()
    world.clock.pass_by(minutes=16)
    await until(lambda: ended(RunState.KEPT))
    await schedule.stop()
    third = await world.adapters.get(ann.id, 3)
    assert third is not None
    assert third.parent == 1
