"""«Forget me»: nothing is left, nothing comes back, and nobody else is touched."""

import asyncio
import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa
from arriving import DEAD, refused, store, told

from persona.domain import Line, UserId
from persona.errors import NotFound
from persona.event import Reason
from storage import tables
from storage.backup import Backups
from storage.history import History, ImportItem

CANARY = "xylophonquartz"


def holding(folder: Path, needle: str) -> list[str]:
    """Files under `folder` that hold `needle` in any case."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and needle.lower().encode() in path.read_bytes().lower()
    ]


async def fill(history: History, user_id: UserId, now, secret: str, times: int = 40) -> None:
    items = [
        ImportItem(f"message {at}: {secret} tells {secret}{at}", now, f"{secret}-{at}", (Line(secret, secret),))
        for at in range(times)
    ]
    assert await history.import_(user_id, items, count=len, now=now) == (times, 0)


async def test_threat_32_forget_leaves_no_byte_in_database_log_and_search_index(
    users, history, adapters, make, place, answer, tmp_path, db, now
):
    name = "canaryname"
    user = await users.add(name)
    await users.add_key(user.id, label=CANARY)
    await fill(history, user.id, now, CANARY)
    first = await place(f"{CANARY} in a chat", user=user.id)
    entry = await history.get(user.id, first.tail)
    version = await make(user.id, (entry.id,))
    assert holding(tmp_path, CANARY)
    assert holding(tmp_path, name)

    receipt = await users.forget(user.id)

    assert holding(tmp_path, CANARY) == []
    assert holding(tmp_path, name) == []
    assert not Path(version.path).exists()
    assert not Path(version.path).parent.exists()
    assert receipt == {
        "run_examples": 1,
        "live_checks": 0,
        "versions": 1,
        "runs": 1,
        "entries": 41,
        "deletions": 0,
        "keys": 1,
        "events": 0,
        "facts": 0,
        "sources": 0,
        "deliveries": 0,
        "dead_letters": 0,
        "users": 1,
        "backups": [],
        "upgrade_copies": 0,
        "scrubbed": True,
    }
    await db.check()


async def test_threat_32_forget_leaves_other_users_as_they_were(users, history, ann, bob, now, make):
    await fill(history, ann.id, now, CANARY)
    await fill(history, bob.id, now, "bobcat")
    version = await make(bob.id, (await history.last_id(bob.id),))
    before = await history.page(bob.id)
    await users.forget(ann.id)
    assert await history.page(bob.id) == before
    assert len(await history.search(bob.id, "bobcat", limit=100)) == 40
    assert Path(version.path).exists()
    assert [user.name for user in await users.all()] == ["bob"]


async def test_threat_32_a_forgotten_users_key_and_rows_are_gone_and_only_a_salted_hash_tells(users, ann, db):
    _, secret = await users.add_key(ann.id)
    await users.forget(ann.id)
    assert await users.authenticate(secret) is None
    assert await users.get("ann") is None
    assert await users.forgotten("ann")
    assert not await users.forgotten("bob")
    with pytest.raises(NotFound):
        await users.forget(ann.id)


async def test_threat_32_a_user_of_the_same_name_is_somebody_new(users, ann, place, history, make):
    await place("hello")
    old = await make(ann.id)
    await users.forget(ann.id)
    again = await users.add("ann")
    assert again.id > ann.id
    assert not await users.forgotten("ann")
    assert await history.page(again.id) == []
    assert (await make(again.id)).path != old.path


async def test_threat_32_the_receipt_lists_the_backups_that_still_hold_the_user(users, ann, db, adapters, tmp_path):
    (tmp_path / "copies").mkdir()
    kept, lost = tmp_path / "copies" / "kept", tmp_path / "copies" / "lost"
    for folder in (kept, lost):
        await Backups(db, adapters).make(folder)
    shutil.rmtree(lost)
    late = await users.add("late")
    assert [entry["path"] for entry in (await users.forget(ann.id))["backups"]] == [str(kept)]
    assert (await users.forget(late.id))["backups"] == []


async def test_threat_32_forget_with_readers_at_work_still_scrubs(users, history, ann, bob, now, tmp_path):
    await fill(history, ann.id, now, CANARY)
    await fill(history, bob.id, now, "bobcat")
    stop = asyncio.Event()

    async def read() -> int:
        times = 0
        while not stop.is_set():
            await history.search(bob.id, "bobcat tells", limit=5)
            times += 1
        return times

    readers = [asyncio.create_task(read()) for _ in range(4)]
    await asyncio.sleep(0.05)
    receipt = await users.forget(ann.id)
    stop.set()
    assert all(times > 0 for times in await asyncio.gather(*readers))
    assert receipt["scrubbed"]
    assert holding(tmp_path, CANARY) == []


async def test_threat_32_a_candidate_in_the_making_dies_with_its_user(users, adapters, ann, root, now):
    folder = await adapters.workspace(ann.id)
    (folder / "adapter.safetensors").write_bytes(b"weights")
    await users.forget(ann.id)
    assert not folder.exists()
    with pytest.raises(NotFound):
        await adapters.publish(ann.id, folder, watermark=0, parent=None, base="b", run_id=None, metrics={}, plan={})
    assert list(root.iterdir()) == []


def of_events(user, secret: str = CANARY) -> list:
    """Everything that can arrive, and in each of its places the secret."""
    lines = [{"author": secret, "text": secret}]
    return [
        told(user, text=f"{secret} said", context=lines, source=secret, seq=1, id=secret, delivery=b"1"),
        told(user, f"note.{secret}", **{secret: secret}),
        told(user, "fact", key=secret, value=secret),
        told(user, "state", key=f"{secret}.lamp", value=[secret]),
        told(user, "feedback", turn=1, correction=secret),
        told(user, text=f"<think>{secret}</think>", delivery=b"2"),
        refused(user, payload=secret.encode(), kind=secret, source=secret),
        refused(user, Reason.RATE, payload=None, kind=secret),
    ]


async def test_threat_32_forget_leaves_no_byte_of_what_arrived(users, events, history, place, answer, tmp_path, db):
    name = "canaryname"
    early = refused(None, Reason.UNKNOWN_USER, name=name, payload=CANARY.encode())
    await store(events, early)  # before there was a user of the name
    user = await users.add(name)
    await store(events, *of_events(user), kept=2)
    await store(events, *of_events(user), kept=1)
    found = holding(tmp_path, CANARY)
    assert "persona.db" in found or "persona.db-wal" in found

    receipt = await users.forget(user.id)

    assert holding(tmp_path, CANARY) == []
    assert holding(tmp_path, name) == []
    counts = {table: receipt[table] for table in ("events", "facts", "sources", "deliveries", "dead_letters")}
    assert counts == {"events": 7, "facts": 2, "sources": 2, "deliveries": 2, "dead_letters": 8}
    async with db.read() as connection:
        for table in (tables.events, tables.facts, tables.sources, tables.deliveries, tables.dead_letters):
            assert (await connection.execute(sa.select(table))).first() is None
    await db.check()


async def test_threat_32_what_others_sent_stays_when_a_user_is_forgotten(users, events, history, ann, bob):
    await store(events, *of_events(ann), *of_events(bob, "bobcat"))
    await store(events, refused(None, Reason.UNKNOWN_USER, name="eve"))
    before = [await events.newest(bob.id), await events.facts(bob.id), await events.sources(bob.id)]
    letters = await events.letters(bob.id)
    await users.forget(ann.id)
    assert [await events.newest(bob.id), await events.facts(bob.id), await events.sources(bob.id)] == before
    assert await events.letters(bob.id) == letters
    assert "eve" in [letter.name for letter in await events.letters(None)]
    assert len(await history.search(bob.id, "bobcat", limit=9)) == 2


async def test_threat_32_an_event_under_way_does_not_bring_a_user_back(users, events, ann, bob, tmp_path, db):
    late = of_events(ann)
    await users.forget(ann.id)
    assert await store(events, *late, told(bob, text="hi")) == [DEAD] * len(late) + ["stored"]
    assert holding(tmp_path, CANARY) == []
    (letter,) = await events.letters(None)
    assert (letter.reason, letter.name, letter.count) == (Reason.FORGOTTEN, "", len(late))
    async with db.read() as connection:
        for table in (tables.events, tables.facts, tables.sources, tables.entries, tables.deliveries):
            assert not (await connection.execute(sa.select(table).where(table.c.user_id == ann.id))).all()
    await db.check()


async def test_threat_32_a_user_of_the_same_name_inherits_nothing_that_arrived(users, events, history, ann):
    late = of_events(ann)
    await store(events, *late)
    await users.forget(ann.id)
    again = await users.add("ann")
    for found in (events.newest, events.facts, events.sources, events.letters):
        assert await found(again.id) == []
    assert await store(events, told(again, text=f"{CANARY} said", id=CANARY, source=CANARY)) == ["stored"]


async def test_threat_32_forgetting_while_events_arrive_leaves_nothing(users, events, ann, bob, tmp_path, db):
    async def flood(user, secret: str) -> None:
        for number in range(30):
            words = [told(user, text=f"{secret} {number} {at}") for at in range(20)]
            await store(events, *words, *of_events(user, secret))

    floods = [asyncio.create_task(flood(ann, CANARY)), asyncio.create_task(flood(bob, "bobcat"))]
    await asyncio.sleep(0.3)
    await users.forget(ann.id)
    await asyncio.gather(*floods)
    assert holding(tmp_path, CANARY) == []
    assert len(await events.newest(bob.id, limit=10_000)) >= 600
    await db.check()
