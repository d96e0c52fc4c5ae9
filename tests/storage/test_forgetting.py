"""«Forget me»: nothing is left, nothing comes back, and nobody else is touched."""

import asyncio
import shutil
from pathlib import Path

import pytest

from persona.domain import Line, UserId
from persona.errors import NotFound
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
