"""The file itself: settings, schema, writers at once, damage, full disk, locks, backups."""

import asyncio
import contextlib
import hashlib
import logging
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import autogenerate, command
from alembic.config import Config
from alembic.migration import MigrationContext
from arriving import STORED, store, told

from persona.domain import EntryId, Line, Message, Origin, Role, VersionState
from persona.errors import Busy, ConfigurationError, SchemaError, StorageFull
from storage import database, database_file, fulltext, tables
from storage.adapters import Adapters
from storage.database import Database
from storage.events import Events
from storage.history import History
from storage.runs import Runs
from storage.users import Users

HERE = Path(__file__).parent


def plain(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


async def one(connection, statement: str):
    return (await connection.exec_driver_sql(statement)).scalar_one()


async def test_a_commit_is_on_the_disk_and_deleted_bytes_are_overwritten(db):
    async with db.write() as connection:
        settings = {
            name: await one(connection, f"PRAGMA {name}")
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete", "busy_timeout", "temp_store")
        }
    assert settings == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "secure_delete": 1,
        "busy_timeout": 5000,
        "temp_store": 2,
    }


async def test_readers_cannot_write(db):
    with pytest.raises(sa.exc.OperationalError):
        async with db.read() as connection:
            await connection.exec_driver_sql("DELETE FROM users")


async def write_and_raise(db: Database) -> None:
    async with db.write() as connection:
        await connection.execute(sa.insert(tables.tombstones).values(salt=b"", digest=b"", created=datetime.now(UTC)))
        raise KeyError


async def test_a_writer_that_raises_leaves_nothing(db):
    with pytest.raises(KeyError):
        await write_and_raise(db)
    async with db.read() as connection:
        assert await one(connection, "SELECT count(*) FROM tombstones") == 0


async def test_a_writer_that_is_cancelled_anywhere_leaves_nothing_half_done_and_blocks_nobody(db, history, ann, now):
    async def place(text: str) -> None:
        await history.place(ann.id, [Message(Role.USER, text)], conversation_id=None, now=now, count=len)

    for step in range(60):
        task = asyncio.create_task(place(f"cancelled {step}"))
        for _ in range(step):
            await asyncio.sleep(0.0002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.wait_for(place(f"after {step}"), 5)
    texts = [entry.text for entry in await history.page(ann.id, limit=1000)]
    assert len(texts) == len(set(texts))
    assert {f"after {step}" for step in range(60)} <= set(texts)
    await db.check()


async def test_five_writers_at_once_in_one_process_all_succeed(db, users, now):
    history = History(db)
    people = [await users.add(f"user{at}") for at in range(5)]

    async def write(user) -> None:
        for at in range(40):
            await history.place(
                user.id, [Message(Role.USER, f"message {at}")], conversation_id=None, now=now, count=len
            )

    await asyncio.gather(*(write(user) for user in people))
    for user in people:
        assert [entry.text for entry in await history.page(user.id)] == [f"message {at}" for at in range(40)]


async def test_five_writers_at_once_on_five_connections_all_succeed(db, users, now):
    people = [await users.add(f"user{at}") for at in range(5)]
    opened = [await Database.open(db.path) for _ in people]

    async def write(user, own: Database) -> None:
        for at in range(30):
            await History(own).place(
                user.id, [Message(Role.USER, f"message {at}")], conversation_id=None, now=now, count=len
            )

    await asyncio.gather(*(write(user, own) for user, own in zip(people, opened, strict=True)))
    for own in opened:
        await own.close()
    for user in people:
        assert len(await History(db).page(user.id)) == 30
    await db.check()


async def test_what_is_done_at_once_is_one_transaction_of_what_is_read_in_it(db, users):
    await users.add("ann")

    async def look() -> list[int]:
        before = len(await users.all())
        with contextlib.closing(plain(db.path)) as other:
            other.execute("DELETE FROM users")
        assert db._reading == 1
        return [before, len(await users.all())]

    assert await db.at_once(look()) == [1, 1]
    assert db._reading == 0
    assert await users.all() == []


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
async def test_what_fails_at_once_gives_its_connection_back_and_leaves_nothing(db, users, write):
    async def fails():
        async with db.write() if write else db.read() as connection:
            assert await one(connection, "SELECT count(*) FROM users") == 0
            if write:
                await connection.exec_driver_sql("DELETE FROM users")
        raise ZeroDivisionError

    for _ in range(10):
        with pytest.raises(ZeroDivisionError):
            await db.at_once(fails(), write=write)
    assert await users.all() == []
    await users.add("ann")


async def test_what_is_done_at_once_must_not_wait_for_anything_else(db, users):
    async def sleeps():
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waits for something else"):
        await db.at_once(sleeps())
    assert await users.all() == []


async def test_what_is_done_at_once_is_committed_though_its_caller_leaves(db, users):
    await users.add("ann")
    loop = asyncio.get_running_loop()

    async def pause() -> None:
        loop.call_soon_threadsafe(pausing.cancel)
        time.sleep(0.1)  # noqa: ASYNC251 - it has a thread of its own
        async with db.write() as connection:
            await connection.exec_driver_sql("UPDATE users SET paused = 1")

    pausing = asyncio.create_task(db.at_once(pause(), write=True))
    with pytest.raises(asyncio.CancelledError):
        await pausing
    assert [user.paused for user in await users.all()] == [True]


async def test_nothing_can_be_written_where_the_database_is_only_read(db, users):
    async def writes():
        async with db.write():
            pass

    with pytest.raises(RuntimeError, match="only read"):
        await db.at_once(writes())
    await users.add("ann")


async def test_a_reader_who_left_holds_no_old_state_and_no_deleted_byte(db, users):
    """Of what was read nothing is left to be read: a statement in the middle of its rows would keep its view."""
    for number in range(3):
        await users.add(f"user{number}")

    async def read() -> None:
        async with db.read() as connection:
            leaving.cancel()
            await connection.exec_driver_sql("SELECT * FROM users")

    leaving = asyncio.create_task(read())
    with pytest.raises(asyncio.CancelledError) as held:
        await leaving
    await users.add("ann")
    assert len(await users.all()) == 4
    assert await db.scrub(wait=1.0)
    assert held.value is not None


async def test_a_writer_who_leaves_waits_no_longer_for_another_programs_lock(db, users):
    with contextlib.closing(plain(db.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(users.add("ann"), 0.1)
        assert not db._writing.locked()
    await users.add("ann")


async def test_a_reader_sees_one_state_while_others_write(db, users):
    async with db.read() as connection:
        before = await one(connection, "SELECT count(*) FROM users")
        await users.add("ann")
        assert await one(connection, "SELECT count(*) FROM users") == before
    assert len(await users.all()) == 1


@pytest.fixture
def locked(db) -> Iterator[None]:
    """Another program holds the write lock for six seconds."""
    command_line = [sys.executable, str(HERE / "hold_lock.py"), str(db.path), "6"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        yield


async def test_threat_24_a_lock_that_another_program_holds_is_waited_for(db, users, locked):
    assert await users.all() == []
    assert (await users.add("ann")).id == 1


async def test_threat_24_a_lock_that_is_never_given_back_is_reported(tmp_path):
    db = await Database.open(tmp_path / "persona.db", patience=0.0)
    holder = plain(db.path)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Busy) as busy:
        await Users(db).add("ann")
    assert busy.value.retry_after > 0
    holder.execute("ROLLBACK")
    holder.close()
    assert await Users(db).add("ann")
    await db.close()


async def test_threat_23_a_full_disk_is_reported_and_nothing_is_written(db, history, place, ann):
    await place("before")
    async with db.write() as connection:
        pages = await one(connection, "PRAGMA page_count")
    with db._writer.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFull) as full:
        await place("canary " * 5000)
    assert "canary" not in str(full.value)
    assert "canary" not in str(full.value.__cause__)
    with db._writer.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert [entry.text for entry in await history.page(ann.id)] == ["before"]
    assert (await place("after")).user_entry
    await db.check()


@contextmanager
def unwritable() -> Iterator[None]:
    """No file may grow any more; SQLite hears of it as of a spent quota: the write failed.

    No fixture: the tests' own output may be a file, and is written once a test's body has ended.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_threat_23_a_disk_too_full_to_connect_is_told_as_full(db, users):
    with unwritable(), pytest.raises(StorageFull):  # the index of the log finds no place
        await users.all()


def spent(place: Path, size: int) -> None:
    raise StorageFull("The disk is full: nothing was written; free some space and try again.")


async def test_threat_23_a_write_that_fails_is_a_full_disk_if_there_is_no_space_for_anything_else(
    db, users, ann, monkeypatch
):
    with unwritable():
        with pytest.raises(sa.exc.OperationalError, match="disk I/O error"):  # this limit is no quota: reserve tells
            await users.add("bob")
        monkeypatch.setattr(database_file, "reserve", spent)
        with pytest.raises(StorageFull):
            await users.add("bob")


async def test_threat_23_a_full_disk_does_not_lock_users_out(db, users, ann):
    _, secret = await users.add_key(ann.id)
    with db._writer.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    assert (await users.authenticate(secret)).user == ann


async def test_threat_28_errors_of_the_driver_do_not_quote_parameters(db):
    with pytest.raises(sa.exc.IntegrityError) as error:
        async with db.write() as connection:
            await connection.execute(sa.insert(tables.runs).values(user_id=77, state="canary", reason="canary"))
    assert "canary" not in str(error.value)


async def test_threat_28_nothing_of_what_is_stored_or_searched_is_logged_at_any_level(caplog, place, history, ann):
    caplog.set_level(logging.DEBUG)
    await place("the canary sings")
    assert await history.search(ann.id, "canary", limit=1)
    assert "canary" not in caplog.text


async def test_the_file_is_private(db, ann):
    for path in db.path.parent.glob("persona.db*"):
        if path.name != "persona.db.lock":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


async def test_the_tables_in_code_are_those_that_the_migrations_make(db):
    engine = sa.create_engine(f"sqlite:///{db.path}")
    with engine.connect() as connection:
        options = {
            "compare_type": True,
            "include_name": lambda name, kind, parents: not str(name).startswith("entries_fts"),
        }
        found = autogenerate.compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)
        numbered = connection.exec_driver_sql(
            "SELECT name FROM sqlite_schema WHERE sql LIKE '%AUTOINCREMENT%' ORDER BY name"
        )
        people = ["entries", "keys", "runs", "users"]
        assert list(numbered.scalars()) == sorted(["dead_letters", "deliveries", "events", "facts", *people])
    engine.dispose()
    assert found == []


async def test_opening_again_changes_nothing(db, place, history, ann):
    await place("hello")
    await db.close()
    again = await Database.open(db.path)
    assert len(await History(again).page(ann.id)) == 1
    assert database.upgrade_copies(db.path) == []
    await again.close()


async def test_ten_opening_at_once_make_one_schema(tmp_path):
    path = tmp_path / "deep" / "persona.db"
    opened = await asyncio.gather(*(Database.open(path) for _ in range(10)))
    assert (await Users(opened[0]).add("ann")).id == 1
    assert await Users(opened[9]).get("ann")
    for db in opened:
        await db.close()


def test_the_migrations_are_found_from_any_folder_without_an_ini_file(tmp_path):
    script = (
        "import asyncio, pathlib\n"
        "from storage.database import Database\n"
        "async def main():\n"
        "    db = await Database.open(pathlib.Path('here.db'))\n"
        "    await db.check()\n"
        "    await db.close()\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "here.db").stat().st_size > 0


def test_a_file_that_cannot_be_read_is_let_go(tmp_path, monkeypatch):
    path, opened, connect = tmp_path / "persona.db", [], sqlite3.connect
    path.write_bytes(b"no database" * 1000)
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: opened.append(connect(*args, **more)) or opened[-1])
    with pytest.raises(sqlite3.DatabaseError):
        database_file.connect(path)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")


async def test_threat_24_a_newer_schema_is_refused_in_clear_words_and_left_alone(db, ann):
    await db.close()
    with plain(db.path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    before = db.path.read_bytes()
    with pytest.raises(SchemaError, match="schema 9999, and this persona knows schemas up to"):
        await Database.open(db.path)
    assert db.path.read_bytes() == before


async def test_a_place_where_no_database_can_be_is_refused_in_clear_words(tmp_path):
    (tmp_path / "persona.db").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        await Database.open(tmp_path / "persona.db")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        await Database.open(tmp_path / "file" / "persona.db")


async def test_examining_a_file_changes_nothing(db, ann):
    await db.close()
    before = db.path.read_bytes()
    assert database.examine(db.path) == ("0004", "0004")
    assert db.path.read_bytes() == before


async def test_threat_24_a_foreign_database_is_refused(tmp_path):
    path = tmp_path / "persona.db"
    with plain(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(SchemaError, match="unknown"):
        await Database.open(path)


@pytest.mark.parametrize("damage", ["cut", "noise", "zeroed tail", "another kind of file"])
async def test_threat_24_a_damaged_file_is_refused_in_clear_words(db, place, tmp_path, damage):
    await place(*(f"message {at} " * 50 for at in range(60)))
    await db.close()
    good = db.path.read_bytes()
    bad = {
        "cut": good[: len(good) // 2 + 100],
        "noise": good[:8192] + os.urandom(len(good) - 8192),
        "zeroed tail": good[: len(good) // 2] + bytes(len(good) - len(good) // 2),
        "another kind of file": b"hello, I am a text file\n" * 1000,
    }[damage]
    db.path.write_bytes(bad)
    with pytest.raises(SchemaError, match=r"persona\.db is damaged .* copy a backup to its place"):
        await Database.open(db.path)


async def test_check_finds_damage_under_an_open_database(db, place):
    await place(*(f"message {at} " * 50 for at in range(60)))
    await db.check()
    await db.scrub()
    size = db.path.stat().st_size
    with db.path.open("r+b") as file:
        file.seek(size - 3 * 4096)
        file.write(os.urandom(2 * 4096))
    with pytest.raises(SchemaError, match="damaged"):
        await db.check()


async def test_a_crash_in_a_migration_leaves_the_schema_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "persona.db"
    real = fulltext.create
    monkeypatch.setattr(fulltext, "create", lambda connection: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await Database.open(path)
    with plain(path) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
    connection.close()
    monkeypatch.setattr(fulltext, "create", real)
    await (await Database.open(path)).close()


FIRST = """
INSERT INTO users (id, name, learn, paused, active, last_version, salt, created)
VALUES (1, 'ann', 1, 0, 1, 1, x'00112233445566778899aabbccddeeff', '2026-04-01 12:00:00.000000');
INSERT INTO keys (user_id, digest, label, learn, created) VALUES (1, :key, 'phone', 1, '2026-04-01 12:00:00.000000');
INSERT INTO entries (id, user_id, role, text, ts, origin, conversation, tokens, context)
VALUES
(1, 1, 'user', 'the xylophone is mine', '2026-04-02 12:00:00.000000', 'import', 'import', 4, '[["bob", "whose?"]]'),
(2, 1, 'assistant', 'Yes.', '2026-04-02 12:01:00.000000', 'reply', 'c-1', 1, NULL);
INSERT INTO entries_fts(rowid, owner, words) VALUES (1, 'u1', 'the xylophone is mine'), (2, 'u1', 'Yes.');
INSERT INTO runs (id, user_id, state, created, metrics) VALUES (1, 1, 'kept', '2026-04-03 12:00:00.000000', '{}');
INSERT INTO run_examples (run_id, entry_id, frame, tokens, weight) VALUES (1, 1, 'turn', 4, 1.0);
INSERT INTO versions (user_id, number, state, watermark, base, sha256, bytes, created, run_id, plan, metrics)
VALUES (1, 1, 'published', 1, 'b', 's', 9, '2026-04-03 12:00:00.000000', 1, '{}', '{}');
INSERT INTO deletions (user_id, digest) VALUES (1, x'beef');
"""


def of_the_first_schema(path: Path) -> dict[str, list]:
    """Make a database as the first revision made it, with rows in every table; what it holds."""
    engine = sa.create_engine(f"sqlite:///{path}", isolation_level="AUTOCOMMIT")
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    connection = plain(path)
    for statement in filter(str.strip, FIRST.split(";\n")):
        connection.execute(statement, {"key": hashlib.sha256(b"pk-old").digest()} if ":key" in statement else {})
    kept = contents(connection)
    connection.close()
    return kept


def contents(connection: sqlite3.Connection) -> dict[str, list]:
    names = ("users", "keys", "entries", "runs", "run_examples", "versions", "deletions", "entries_fts")
    return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names}


async def test_threat_24_a_database_of_the_first_schema_is_upgraded_with_everything_in_it(tmp_path):
    path = tmp_path / "persona.db"
    kept = of_the_first_schema(path)
    assert all(kept.values())
    db = await Database.open(path)
    connection = plain(path)
    kept["deletions"] = [(*row, None) for row in kept["deletions"]]  # what they said was not kept then
    assert contents(connection) == kept
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0004",)]
    connection.close()
    await db.check()
    ann = (await Users(db).authenticate("pk-old")).user
    first, second = await History(db).page(ann.id)
    assert (first.text, first.origin) == ("the xylophone is mine", Origin.IMPORT)
    assert first.context == (Line("bob", "whose?"),)
    assert [entry.id for entry in await History(db).search(ann.id, "xylophone", limit=5)] == [first.id]
    assert (await Adapters(db, tmp_path / "adapters").get(ann.id, 1)).state is VersionState.PUBLISHED
    assert (await Runs(db).last(ann.id)).id == 1
    assert await store(Events(db), told(ann, text="hello", id=1), told(ann, "fact", key="k", value=1)) == [STORED] * 2
    assert await History(db).last_id(ann.id) == EntryId(second.id + 1)
    await db.close()


async def test_an_upgrade_keeps_a_copy_of_the_first_schema_that_opens_again(tmp_path):
    path = tmp_path / "persona.db"
    kept = of_the_first_schema(path)
    await (await Database.open(path)).close()
    (copy,) = database.upgrade_copies(path)
    assert copy.name == "persona-before-0004-was-0001.db"
    connection = plain(copy)
    assert contents(connection) == kept
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    connection.close()
    again = await Database.open(copy)
    assert await Users(again).get("ann")
    await again.close()


async def test_of_the_copy_of_an_upgrade_a_forgotten_user_is_gone_as_well(tmp_path):
    path = tmp_path / "persona.db"
    of_the_first_schema(path)
    db = await Database.open(path)
    assert (await Users(db).forget((await Users(db).get("ann")).id))["upgrade_copies"] == 1
    await db.close()
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"xylophone" in file.read_bytes()]


async def test_scrub_says_when_another_program_keeps_the_log(db, place):
    await place("hello")
    reader = plain(db.path)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM users").fetchall()
    await place("more")
    assert not await db.scrub(wait=0.2)
    reader.close()
    assert await db.scrub(wait=5.0)
    wal = db.path.with_name("persona.db-wal")
    assert not wal.exists() or wal.stat().st_size == 0


async def test_while_another_program_reads_a_scrub_lets_our_readers_in(db, place, users):
    await place("hello")
    reader = plain(db.path)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM users").fetchall()
    await place("more")
    scrubbing = asyncio.create_task(db.scrub(wait=30.0))
    for _ in range(5):
        await asyncio.sleep(0.06)
        async with asyncio.timeout(5):
            assert len(await users.all()) == 1
    assert not scrubbing.done()
    reader.close()
    assert await scrubbing


async def test_what_is_no_entry_is_deleted_without_writing_the_search_index_anew(db, place, events, ann):
    await place("hello", "you", "again")
    async with db.read() as connection:
        before = await one(connection, "SELECT group_concat(hex(block)) FROM entries_fts_data")
    await events.drop_fact(ann.id, "fact", "town")
    await events.drop_letters([1])
    async with db.read() as connection:
        assert await one(connection, "SELECT group_concat(hex(block)) FROM entries_fts_data") == before
    await db.scrub()
    async with db.read() as connection:
        assert await one(connection, "SELECT group_concat(hex(block)) FROM entries_fts_data") != before


async def test_threat_32_words_that_no_scrub_took_out_of_the_index_leave_it_at_the_next_start(db, place):
    entry = (await place("xylophonquartz", "I see", "and more words")).known[0]
    async with db.write() as connection:
        await fulltext.remove(connection, sa.select(tables.entries.c.id).where(tables.entries.c.id == entry))
        await connection.execute(sa.update(tables.entries).where(tables.entries.c.id == entry).values(text="gone"))
    await db.close()
    assert b"xylophonquartz" in db.path.read_bytes()
    await (await Database.open(db.path)).close()
    assert b"xylophonquartz" not in db.path.read_bytes()
