"""The copy of the database before an upgrade."""

import stat

from alembic import command

from storage import database, database_file
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
    assert copy.name == "persona-before-0099-was-0003.db"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    receipt = await Users(again).forget(ann.id)
    assert receipt["upgrade_copies"] == 1
    assert database.upgrade_copies(db.path) == []
    await again.close()
