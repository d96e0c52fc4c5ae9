"""What becomes of a batch of messages, whoever sent them and whatever is wrong with them."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from persona.domain import User
from persona.engine.scripted import ScriptedText
from persona.errors import Busy, NotFound, RequestError, StorageFull
from persona.event import Reason
from persona.events import Delivery, Intake, Share
from persona.settings import Mqtt
from storage.database import Database
from storage.events import Arrived, Events, Outcome
from storage.history import History
from storage.users import Users

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
CANARY = "xylophonquartz"
STORED, DUPLICATE, DEAD = Outcome.STORED, Outcome.DUPLICATE, Outcome.DEAD


class Choking(ScriptedText):
    """A tokenizer with a fault: one word is too much for it."""

    def encode(self, text: str) -> list[int]:
        if "poison" in text:
            raise ZeroDivisionError(text)
        return super().encode(text)


@dataclass
class House:
    """An intake over real storage, with the users ann and bob."""

    intake: Intake
    users: Users
    events: Events
    history: History
    database: Database
    ann: User
    bob: User
    clock: list[datetime] = field(default_factory=lambda: [NOW])

    async def texts(self, user: User) -> list[str]:
        return [entry.text for entry in await self.history.page(user.id, limit=10_000)]

    async def reasons(self) -> list[Reason]:
        return [letter.reason for letter in await self.events.letters(None, limit=10_000)]

    @asynccontextmanager
    async def full_disk(self) -> AsyncIterator[None]:
        async with self.database.write() as connection:
            pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
            await connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        yield
        async with self.database.write() as connection:
            await connection.exec_driver_sql("PRAGMA max_page_count = 1000000")


Open = Callable[..., Any]


@pytest.fixture
def house(tmp_path: Path) -> Open:
    @asynccontextmanager
    async def begin(**settings: Any) -> AsyncIterator[House]:
        database = await Database.open(tmp_path / "persona.db")
        users, events, clock = Users(database), Events(database), [NOW]
        intake = Intake(Mqtt.model_validate(settings), users, events, Choking(), lambda: clock[0])
        database.on_removed(intake.removed)
        ann, bob = await users.add("ann"), await users.add("bob")
        try:
            yield House(intake, users, events, History(database), database, ann, bob, clock)
        finally:
            await database.close()

    return begin


def sent(user: str = "ann", kind: str = "message", /, payload: bytes | None = None, **body: Any) -> Delivery:
    content = json.dumps(body).encode() if payload is None else payload
    return Delivery(user, kind, content, size=len(content))


async def test_a_batch_is_stored_for_whom_its_topics_name(house: Open) -> None:
    async with house() as it:
        batch = [sent(text="hers"), sent("bob", text="his"), sent("ann", "fact", key="town", value="Ghent")]
        assert await it.intake.accept(batch) == [STORED] * 3
        assert (await it.texts(it.ann), await it.texts(it.bob)) == (["hers"], ["his"])
        assert [fact.value for fact in await it.events.facts(it.ann.id)] == ["Ghent"]
        assert it.intake.counts == Counter(stored=3)


REFUSED = [
    (sent("eve", text="hi"), Reason.UNKNOWN_USER, True),
    (sent("Ann", text="hi"), Reason.UNKNOWN_USER, True),
    (sent("", text="hi"), Reason.UNKNOWN_USER, True),
    (sent(user="bob", text="hi"), Reason.FORGED_USER, True),
    (sent("ann", "", text="hi"), Reason.BAD_TOPIC, True),
    (sent("ann", "a/b", text="hi"), Reason.BAD_TOPIC, True),
    (replace(sent(text="hi"), size=100_000), Reason.TOO_LARGE, False),
    (sent(payload=b"x" * 70_000), Reason.TOO_LARGE, False),
    (sent(payload=b"\xff"), Reason.BAD_ENCODING, True),
    (sent(payload=b"{"), Reason.BAD_JSON, True),
    (sent(payload=b""), Reason.BAD_JSON, True),
    (sent(texts="hi"), Reason.BAD_PAYLOAD, True),
    (sent(text="<think>hm</think>"), Reason.BAD_PAYLOAD, True),
    (replace(sent(text="hi"), retained=True), Reason.RETAINED, False),
    (sent("ann", "feedback", turn=99, rating=1), Reason.UNKNOWN_TURN, True),
    (sent(text="poison"), Reason.INTERNAL, True),
]


@pytest.mark.parametrize(("bad", "reason", "kept"), REFUSED, ids=[f"{at}-{one[1]}" for at, one in enumerate(REFUSED)])
async def test_whatever_is_wrong_with_a_message_its_neighbours_are_stored(
    house: Open, bad: Delivery, reason: Reason, kept: bool
) -> None:
    async with house() as it:
        assert await it.intake.accept([sent(text="one"), bad, sent(text="two")]) == [STORED, DEAD, STORED]
        assert await it.texts(it.ann) == ["one", "two"]
        (letter,) = await it.events.letters(None)
        assert (letter.reason, letter.count, letter.name) == (reason, 1, bad.user)
        assert letter.payload == (bad.payload if kept else None)
        assert (it.intake.counts["stored"], it.intake.counts["dead"]) == (2, 1)


async def test_who_does_not_learn_has_facts_and_states_and_no_history(house: Open) -> None:
    async with house() as it:
        await it.users.add("device", learn=False)
        kinds = ["message", "note", "fact", "state"]
        batch = [sent("device", kind, text="hi", key="k", value=1) for kind in kinds]
        assert await it.intake.accept(batch) == [DEAD, DEAD, STORED, STORED]
        assert await it.reasons() == [Reason.NOT_RECORDED]
        assert (await it.events.letters(None))[0].count == 2


async def test_threat_22_a_retained_copy_is_no_news(house: Open) -> None:
    async with house() as it:
        assert await it.intake.accept([replace(sent(text="old", id=1), retained=True)] * 3) == [DEAD] * 3
        assert await it.intake.accept([sent(text="old", id=1)]) == [STORED]


async def test_threat_21_a_delivery_that_comes_again_has_no_second_effect(house: Open) -> None:
    async with house() as it:
        one = replace(sent(text="ping"), mark=b"\0\7")
        bad = replace(sent(payload=b"{"), mark=b"\0\x08")
        assert await it.intake.accept([one, bad]) == [STORED, DEAD]
        assert await it.intake.accept([replace(one, again=True), replace(bad, again=True)]) == [DUPLICATE, DUPLICATE]
        others = [replace(one, again=True, mark=b"\0\x09"), replace(one, again=True, user="bob")]
        assert await it.intake.accept(others) == [STORED, STORED]
        assert it.intake.counts["duplicate"] == 2


@pytest.mark.parametrize("retained", [False, True])
async def test_threat_32_late_news_of_a_forgotten_user_leave_only_a_count(
    house: Open, retained: bool, tmp_path: Path
) -> None:
    async with house() as it:
        await it.users.add(CANARY)
        assert await it.intake.accept([sent(CANARY, text="hi")]) == [STORED]
        await it.users.forget((await it.users.get(CANARY)).id)
        for mark in (b"\0\1", None):
            late = replace(sent(CANARY, "note", text=CANARY), retained=retained, mark=mark)
            assert await it.intake.accept([late, replace(late, again=True)]) == [DEAD, DEAD]
        await it.intake.shed(Counter({CANARY: 5}))
        assert await it.users.get(CANARY) is None
        (letter,) = await it.events.letters(None)
        assert (letter.reason, letter.name, letter.kind, letter.count) == (Reason.FORGOTTEN, "", "", 9)
        async with it.database.read() as connection:
            kept = (await connection.exec_driver_sql("SELECT count(*) FROM deliveries")).scalar_one()
        assert kept == 0  # a hash of what they sent would be a trace as well
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


async def test_a_stranger_who_is_forgotten_or_comes_back_is_known_at_once(house: Open) -> None:
    async with house() as it:
        assert await it.intake.stranger("eve") is Reason.UNKNOWN_USER
        eve = await it.users.add("eve")
        assert await it.intake.accept([sent("eve", text="hi")]) == [STORED]
        await it.users.forget(eve.id)
        assert await it.intake.stranger("eve") is Reason.FORGOTTEN
        await it.users.add("eve")
        assert await it.intake.accept([sent("eve", text="hi again")]) == [STORED]


# Shares


def test_a_share_is_a_burst_that_fills_again() -> None:
    now = [100.0]
    share = Share(rate=2.0, burst=3, now=lambda: now[0])
    assert [share.take("ann") for _ in range(4)] == [True, True, True, False]
    assert share.take("bob")
    now[0] += 0.5
    assert [share.take("ann") for _ in range(2)] == [True, False]
    now[0] += 3600
    assert [share.take("ann") for _ in range(4)] == [True, True, True, False]


def test_threat_25_a_share_survives_a_clock_that_goes_back() -> None:
    now = [100.0]
    share = Share(rate=1.0, burst=3, now=lambda: now[0])
    assert share.take("ann")
    now[0] = -1_000_000.0
    assert [share.take("ann") for _ in range(3)] == [True, True, False]
    now[0] += 1
    assert [share.take("ann") for _ in range(2)] == [True, False]


def test_what_is_given_back_may_be_taken_again_and_never_exceeds_the_burst() -> None:
    share = Share(rate=1e-9, burst=2, now=lambda: 0.0)
    assert [share.take("ann") for _ in range(3)] == [True, True, False]
    share.give_back(["ann", "ann", "ann", "bob"])
    assert [share.take("ann") for _ in range(3)] == [True, True, False]
    assert [share.take("bob") for _ in range(3)] == [True, True, False]


def test_many_names_do_not_grow_the_memory_of_shares() -> None:
    share = Share(rate=1.0, burst=1, now=lambda: 0.0)
    for number in range(10_000):
        assert share.take(f"user-{number}")
    assert len(share._buckets) <= 4096
    assert not share.take("user-9999")


def test_a_share_is_one_for_all_threads() -> None:
    share = Share(rate=1e-9, burst=1000, now=lambda: 0.0)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: share.take("ann"), range(4000)))
    assert taken.count(True) == 1000


async def test_threat_19_who_floods_loses_the_excess_and_nobody_else_does(house: Open) -> None:
    async with house(burst=10, events_per_second=0.001) as it:
        flood = [sent(text=f"flood {number}") for number in range(500)]
        outcomes = await it.intake.accept([*flood, sent("bob", text="hi")])
        assert (outcomes.count(STORED), outcomes[-1]) == (11, STORED)
        (letter,) = await it.events.letters(it.ann.id)
        assert (letter.reason, letter.count, letter.payload) == (Reason.RATE, 490, None)


async def test_threat_23_what_a_full_disk_refuses_is_stored_later_however_often_it_was_tried(house: Open) -> None:
    async with house(burst=45, events_per_second=0.001) as it:
        batch = [sent(text=f"{number} " * 900) for number in range(40)]
        async with it.full_disk():
            for _ in range(5):
                with pytest.raises(StorageFull):
                    await it.intake.accept(batch)
                with pytest.raises(StorageFull):
                    await it.intake.send(it.ann, "message", json.dumps("word " * 9000).encode(), learn=True)
        assert it.intake.counts == Counter()
        assert await it.intake.accept(batch) == [STORED] * 40
        assert await it.intake.accept([sent(text="more")] * 6) == [STORED] * 5 + [DEAD]


async def test_threat_19_what_was_shed_is_counted_by_user(house: Open) -> None:
    async with house() as it:
        await it.intake.shed(Counter())
        await it.intake.shed(Counter(ann=300, eve=2))
        await it.intake.shed(Counter(ann=1))
        found = {letter.name: letter for letter in await it.events.letters(None)}
        assert {name: letter.count for name, letter in found.items()} == {"ann": 301, "eve": 2}
        assert {letter.reason for letter in found.values()} == {Reason.OVERFLOW}
        assert [letter.name for letter in await it.events.letters(it.ann.id)] == ["ann"]
        assert it.intake.counts["overflow"] == it.intake.counts["dead"] == 303


# One event of somebody who is known


async def test_an_event_of_a_known_user_is_stored_once_or_refused_with_its_reason(house: Open) -> None:
    async with house() as it:
        assert await it.intake.send(it.ann, "message", b'{"text":"hi","id":1}', learn=True) is STORED
        assert await it.intake.send(it.ann, "message", b'{"text":"hi","id":1}', learn=True) is DUPLICATE
        for payload, code in [(b"{", "bad_json"), (b"{}", "bad_payload"), (b'{"text":"\\u0000"}', "bad_payload")]:
            with pytest.raises(RequestError) as refused:
                await it.intake.send(it.ann, "message", payload, learn=True)
            assert (refused.value.status, refused.value.code) == (400, code)
        with pytest.raises(NotFound) as unknown:
            await it.intake.send(it.ann, "feedback", b'{"turn":1,"rating":1}', learn=True)
        assert unknown.value.code == "unknown_turn"
        assert await it.reasons() == []


async def test_an_event_above_the_share_is_told_to_come_back_later(house: Open) -> None:
    async with house(burst=1, events_per_second=0.001) as it:
        assert await it.intake.send(it.ann, "message", b'"one"', learn=True) is STORED
        with pytest.raises(Busy) as busy:
            await it.intake.send(it.ann, "message", b'"two"', learn=True)
        assert (busy.value.status, busy.value.code) == (429, "rate_limited")
        assert await it.intake.send(it.bob, "message", b'"three"', learn=True) is STORED


# Replay


async def test_a_letter_to_nobody_is_stored_once_somebody_has_the_name(house: Open) -> None:
    async with house() as it:
        await it.intake.accept([sent("eve", text="too early", ts=1_790_000_000), sent("eve", text="as well")])
        assert await it.intake.replay(await it.events.letters(None)) == Counter(dead=2, without_payload=0)
        eve = await it.users.add("eve")
        it.clock[0] = NOW + timedelta(days=1)
        letters = await it.events.letters(None)
        assert await it.intake.replay(letters) == Counter(stored=2, without_payload=0)
        assert await it.events.letters(None) == []
        first, second = await it.history.page(eve.id)
        assert (first.text, second.text) == ("too early", "as well")
        assert second.ts == NOW  # when it arrived, not when it was replayed
        assert await it.intake.replay(letters) == Counter(duplicate=2, without_payload=0)  # as after a crash
        assert len(await it.texts(eve)) == 2


async def test_two_replays_at_once_store_a_letter_once(house: Open) -> None:
    async with house() as it:
        await it.intake.accept([sent("eve", text=f"unnamed {number}") for number in range(10)])
        eve = await it.users.add("eve")
        letters = await it.events.letters(None)
        results = await asyncio.gather(*(it.intake.replay(letters) for _ in range(3)))
        assert sum(result["stored"] for result in results) == 10
        assert sorted(await it.texts(eve)) == [f"unnamed {number}" for number in range(10)]


async def test_what_is_known_by_now_leaves_the_dead_and_what_is_still_wrong_stays(house: Open) -> None:
    async with house(kept_payloads=10) as it:
        await it.users.add("device", learn=False)
        bad = [sent(payload=b"{"), sent("eve", text="known", id=7), sent("ann", "x/y", v=1), sent("device", text="no")]
        await it.intake.accept(bad)
        eve = await it.users.add("eve")
        await it.intake.accept([sent("eve", text="known", id=7)])
        found = await it.intake.replay(await it.events.letters(None))
        assert found == Counter(dead=2, duplicate=1, without_payload=1)
        assert await it.texts(eve) == ["known"]
        assert sorted(await it.reasons()) == ["bad_json", "bad_topic", "not_recorded"]


async def test_threat_23_what_was_stored_before_the_disk_was_full_is_not_stored_again(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that fails for no known reason goes in message by message, and on the way the disk is full."""
    async with house() as it:
        real, room = it.events.store, [2]

        async def store(arrived: Sequence[Arrived], **how: Any) -> list[Outcome]:
            if len(arrived) > 1:
                raise RuntimeError("who knows")
            if not room[0]:
                raise StorageFull("The disk is full.")
            room[0] -= 1
            return await real(arrived, **how)

        monkeypatch.setattr(it.events, "store", store)
        batch = [replace(sent(text="again"), mark=b"nonce" + bytes([at])) for at in range(3)]  # without id and time
        with pytest.raises(StorageFull):
            await it.intake.accept(batch)
        room[0] = 100
        assert await it.intake.accept([sent("bob", text="over HTTP meanwhile")]) == [STORED]
        assert await it.intake.accept(batch) == [DUPLICATE, DUPLICATE, STORED]
        assert await it.texts(it.ann) == ["again"] * 3
        assert await it.intake.accept([batch[0]]) == [STORED], "no repetition, as far as anybody can tell"


async def test_threat_22_a_letter_with_a_long_name_is_never_replayed_to_the_shorter_one(house: Open) -> None:
    async with house() as it:
        short = await it.users.add("a" * 64)
        assert await it.intake.accept([sent("a" * 65, text="forged")]) == [DEAD]
        assert await it.intake.replay(await it.events.letters(None)) == Counter(dead=1, without_payload=0)
        assert await it.texts(short) == []


# Privacy


async def test_threat_28_no_log_line_quotes_what_arrived(
    house: Open, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    bad = [replace(one, payload=one.payload.replace(b"hi", CANARY.encode())) for one, *_ in REFUSED]
    more = [sent(text=f"poison {CANARY}"), sent(CANARY, CANARY, text=CANARY), sent(payload=CANARY.encode())]
    async with house() as it:
        await it.intake.accept([*bad, *more, sent(text=CANARY), sent("ann", "state", key=CANARY, value=CANARY)])
        assert CANARY in (await it.texts(it.ann))[-1]
        for letter in await it.events.letters(None):
            assert CANARY not in letter.detail
    out = "".join(capfd.readouterr())
    assert "batch of events failed" in out + caplog.text
    assert CANARY not in out + caplog.text
