"""`kill -9` wherever it hurts: the last good version serves, and what is half done is never seen."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.recovery import recover
from persona.domain import RunState, VersionState
from storage.adapters import Adapters
from storage.database import Database
from storage.failpoints import KILLED
from storage.history import History
from storage.runs import Runs
from storage.users import Users

HERE = Path(__file__).parent
BEFORE_POINTER = [
    "publish-after-files",
    "publish-after-manifest",
    "publish-after-rename",
    "publish-after-row",
    "point-before-commit",
]


def child(script: str, *arguments: object, failpoint: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "PERSONA_FAILPOINT": failpoint, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
async def killed(db, root, ann, place, make) -> Callable[[str], int]:
    """`killed(failpoint)`: a process that publishes ann's second version dies there."""
    entry = (await place("learn this")).tail
    await make(ann.id, (entry,))

    def run(failpoint: str) -> int:
        process = child("kill_me.py", db.path, root, ann.id, entry, failpoint=failpoint)
        process.communicate(timeout=60)
        return process.returncode

    return run


async def reopened(db: Database, root: Path) -> tuple[Database, Adapters]:
    await db.close()
    again = await Database.open(db.path)
    return again, Adapters(again, root)


async def no_orphans(adapters: Adapters, root: Path, user_id: int) -> None:
    """Every folder belongs to a version that may serve, and each of those is whole."""
    serving = [v for v in await adapters.list(user_id) if v.state == VersionState.PUBLISHED]
    for version in serving:
        await adapters.verify(version)
    assert sorted(path.name for path in (root / str(user_id)).iterdir()) == [str(v.number) for v in serving]


@pytest.mark.parametrize("failpoint", BEFORE_POINTER)
async def test_threat_07_killed_before_the_pointer_the_old_version_serves(killed, db, adapters, root, ann, failpoint):
    for _ in range(2):
        assert killed(failpoint) == KILLED
    db, adapters = await reopened(db, root)
    assert await adapters.repair()
    assert await recover(Runs(db), adapters, datetime.now(UTC)) == {RunState.QUEUED: 1}
    active = await adapters.active(ann.id)
    assert (active.number, active.state) == (1, VersionState.PUBLISHED)
    await no_orphans(adapters, root, ann.id)
    await db.check()
    assert await adapters.repair() == []
    folder = await adapters.workspace(ann.id)
    (folder / "adapter.safetensors").write_bytes(b"next")
    version = await adapters.publish(
        ann.id, folder, watermark=1, parent=1, base="base", run_id=None, metrics={}, plan={}
    )
    assert version.number == 4  # the numbers of the two killed attempts are spent
    await db.close()


async def test_threat_07_killed_after_the_pointer_the_new_version_serves(killed, db, root, ann):
    assert killed("point-after-commit") == KILLED
    db, adapters = await reopened(db, root)
    assert await adapters.repair() == []
    assert (await adapters.active(ann.id)).number == 2
    await no_orphans(adapters, root, ann.id)
    await db.check()
    assert await recover(Runs(db), adapters, datetime.now(UTC)) == {RunState.KEPT: 1}
    run = await Runs(db).last(ann.id)
    assert (run.version, run.reason is not None, run.ended is not None) == (2, True, True)
    await db.close()


async def test_without_a_failpoint_the_child_publishes(killed, db, root, adapters, ann):
    assert killed("") == 0
    assert (await adapters.active(ann.id)).number == 2


CANARY = b"xylophonquartz"


def holding(folder: Path) -> list[str]:
    """Files that hold the canary. Not while a child uses the database: a look at the files lets go of our locks."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and CANARY in path.read_bytes())


@pytest.fixture
async def known_everywhere(db, root, ann, place, make, tmp_path) -> Path:
    """Ann in rows, log, search index, a version's weights and the copy that an upgrade left, which is returned."""
    entry = (await place(CANARY.decode())).tail
    version = await make(ann.id, (entry,))
    Path(version.path, "extra").write_bytes(CANARY)
    copy = tmp_path / "persona-before-0099-was-0003.db"
    await db.copy(copy)
    assert CANARY in copy.read_bytes()
    return copy


def forget_and_die(db: Database, root: Path, user_id: int, failpoint: str) -> None:
    process = child("forget_me.py", db.path, root, user_id, failpoint=failpoint)
    process.communicate(timeout=60)
    assert process.returncode == KILLED


async def test_threat_32_killed_after_a_user_was_forgotten_the_next_start_ends_it(
    known_everywhere, db, root, ann, bob, tmp_path
):
    forget_and_die(db, root, ann.id, "forget-after-commit")
    db, adapters = await reopened(db, root)
    users = Users(db)
    assert await users.by_id(ann.id) is None
    await users.add("ann")  # somebody new of the name must not save the copy
    await adapters.repair()
    name = known_everywhere.name
    assert await users.repair() == [f"The copy {name} of the database was removed: it held a user who was forgotten."]
    assert holding(tmp_path) == []
    assert await users.repair() == []
    await db.close()


async def test_threat_32_killed_before_a_user_was_forgotten_nothing_is_and_they_may_ask_again(
    known_everywhere, db, root, ann, bob, tmp_path
):
    forget_and_die(db, root, ann.id, "forget-before-commit")
    db, adapters = await reopened(db, root)
    assert await adapters.repair() + await Users(db).repair() == []
    assert known_everywhere.exists()
    assert (await Users(db).forget(ann.id))["upgrade_copies"] == 1
    assert holding(tmp_path) == []
    await db.close()


@pytest.mark.parametrize("left", ["of nobody who was forgotten", "of another time", "that is damaged"])
async def test_a_copy_before_an_upgrade_that_holds_nobody_who_was_forgotten_stays(db, users, ann, bob, left, tmp_path):
    copy = tmp_path / "persona-before-0099-was-0003.db"
    if left != "of another time":
        await users.forget(bob.id)
    await db.copy(copy)
    if left == "of another time":  # somebody put an older database in its place by hand: carl was not forgotten
        await users.add("carl")
        copy.unlink()
        await db.copy(copy)
        async with db.write() as connection:
            await connection.exec_driver_sql("DELETE FROM users WHERE name = 'carl'")
    if left == "that is damaged":
        copy.write_bytes(b"no database")
    assert await users.repair() == []
    assert sorted(path.name for path in tmp_path.glob("*before*")) == [copy.name]


async def test_threat_07_killed_while_writing_every_acknowledged_turn_is_there(db, ann, root):
    for round_ in range(3):
        process = child("write_forever.py", db.path, ann.id)
        for _ in range(20 + 7 * round_):
            acknowledged = int(process.stdout.readline())
        process.kill()
        rest = process.communicate(timeout=60)[0].split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        db, _ = await reopened(db, root)
        await db.check()
        stored = await History(db).page(ann.id, limit=100_000)
        assert acknowledged <= len(stored)
        assert [entry.text for entry in stored] == [f"message {number}" for number in range(len(stored))]
    await db.close()
