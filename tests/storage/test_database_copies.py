"""Copies of the database: the owner's backups, and the one before an upgrade."""

import asyncio
import stat

import pytest
from alembic import command

from persona.errors import RequestError
from storage import database, database_file
from storage.adapters import Adapters
from storage.database import Database
from storage.history import History, ImportItem
from storage.users import Users


async def test_threat_34_before_an_upgrade_the_file_is_copied_and_the_copy_goes_with_a_forgotten_user(
    db, place, ann, tmp_path, monkeypatch
):
    await place("xylophonquartz")
    await db.close()
    monkeypatch.setattr(database_file, "_head", lambda: "0099")
    monkeypatch.setattr(command, "upgrade", lambda config, revision: None)
    again = await Database.open(db.path)
    (copy,) = database.upgrade_copies(db.path)
    assert b"xylophonquartz" in copy.read_bytes()
    assert copy.name == "persona-before-0099-was-0002.db"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    receipt = await Users(again).forget(ann.id)
    assert receipt["upgrade_copies"] == 1
    assert database.upgrade_copies(db.path) == []
    await again.close()


async def test_threat_34_a_backup_under_load_is_consistent_and_can_be_restored(db, users, history, now, tmp_path, ann):
    stop = asyncio.Event()

    async def write() -> int:
        batches = 0
        while not stop.is_set():
            items = [ImportItem(f"batch {batches} item {at}", now, f"{batches}-{at}") for at in range(20)]
            await history.import_(ann.id, items, count=len, now=now)
            batches += 1
        return batches

    writing = asyncio.create_task(write())
    copies = [tmp_path / "copies" / f"{at}.db" for at in range(4)]
    copies[0].parent.mkdir()
    for copy in copies:
        await asyncio.sleep(0.1)
        await db.backup(copy)
    stop.set()
    batches = await writing
    sizes = []
    for copy in copies:
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        restored = await Database.open(copy)
        await restored.check()
        entries = await History(restored).page(ann.id, limit=100_000)
        assert len(entries) % 20 == 0  # a batch is there as a whole or not at all
        assert len(await History(restored).search(ann.id, "batch 0", limit=20)) == 20
        assert await Adapters(restored, tmp_path / "none").repair() == []
        sizes.append(len(entries))
        await restored.close()
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] <= sizes[-1] <= batches * 20


async def test_threat_34_a_backup_does_not_overwrite_and_a_failed_one_leaves_nothing(db, tmp_path, ann):
    taken = tmp_path / "taken.db"
    taken.write_text("precious")
    with pytest.raises(RequestError) as refusal:
        await db.backup(taken)
    assert refusal.value.code == "file_exists"
    assert taken.read_text() == "precious"
    with pytest.raises(RequestError) as refusal:
        await db.backup(tmp_path / "no such folder" / "copy.db")
    assert refusal.value.param == "file"
