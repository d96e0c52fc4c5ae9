"""The copy of the database before an upgrade."""

import stat

import sqlalchemy as sa
from alembic import command

from storage import database, database_file, fulltext, tables
from storage.database import Database
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
    assert copy.name == "persona-before-0099-was-0004.db"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    receipt = await Users(again).forget(ann.id)
    assert receipt["upgrade_copies"] == 1
    assert database.upgrade_copies(db.path) == []
    await again.close()


async def test_threat_32_a_copy_before_an_upgrade_holds_no_word_that_a_kill_left_in_the_index(db, place, monkeypatch):
    entry = (await place("xylophonquartz", "I see", "and more words")).known[0]
    async with db.write() as connection:
        await fulltext.remove(connection, sa.select(tables.entries.c.id).where(tables.entries.c.id == entry))
        await connection.execute(sa.update(tables.entries).where(tables.entries.c.id == entry).values(text="gone"))
    await db.close()
    monkeypatch.setattr(database_file, "_head", lambda: "0099")
    monkeypatch.setattr(command, "upgrade", lambda config, revision: None)
    await (await Database.open(db.path)).close()
    (copy,) = database.upgrade_copies(db.path)
    assert b"xylophonquartz" not in copy.read_bytes()
