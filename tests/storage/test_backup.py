"""A backup under load, and back: the same history, versions and serving pointer, or a refusal in clear words."""

import asyncio
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from persona.domain import VersionState
from persona.errors import ConfigurationError, RequestError, SchemaError, StorageFull
from storage import backup as backup_module
from storage import restore
from storage.adapters import Adapters
from storage.backup import Backups
from storage.database import Database
from storage.failpoints import KILLED
from storage.history import History, ImportItem
from storage.users import Users

HERE = Path(__file__).parent


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "copies").mkdir()
    return tmp_path / "copies" / "first"


@pytest.fixture
def made(db: Database, adapters: Adapters) -> Backups:
    return Backups(db, adapters)


def back(backup: Path, home: Path, now, *, replace: bool = False) -> Path | None:
    home.mkdir(exist_ok=True)
    return restore.restore(backup, home, replace=replace, now=now).aside


async def contents(home: Path, name: str) -> dict[str, object]:
    """History, versions and pointer of a user, out of a state folder."""
    db = await Database.open(home / "persona.db")
    adapters = Adapters(db, home / "adapters")
    mended = await adapters.repair()
    assert all("before it was judged" in sentence for sentence in mended), "a candidate is all that may be unfinished"
    await db.check()
    user = await Users(db).get(name)
    entries = await History(db).page(user.id, limit=100_000)
    versions = await adapters.list(user.id)
    for version in versions:
        if version.state is VersionState.PUBLISHED:
            await adapters.verify(version)
    active = await adapters.active(user.id)
    await db.close()
    return {
        "texts": [(entry.role, entry.text) for entry in entries],
        "versions": [(version.number, version.state, version.sha256) for version in versions],
        "active": active.number if active else None,
    }


async def test_threat_34_a_backup_comes_back_with_history_versions_and_pointer(
    made, place, ann, make, adapters, target, tmp_path, now
):
    entry = (await place("hello", "hi", "how are you")).tail
    await make(ann.id, (entry,))
    await make(ann.id, (entry,), parent=1)
    await adapters.rollback(ann.id, 1)
    done = await made.make(target)
    assert (done.versions, done.left_out) == (2, ())
    for path in (target, *(path for path in target.rglob("*") if path.is_file())):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert back(target, tmp_path / "home", now) is None
    found = await contents(tmp_path / "home", "ann")
    assert [text for _, text in found["texts"]] == ["hello", "hi", "how are you"]
    assert [number for number, _, _ in found["versions"]] == [1, 2]
    assert found["active"] == 1
    with closing(sqlite3.connect(tmp_path / "home/persona.db")) as restored:
        assert restored.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_threat_34_backups_under_load_are_whole_while_turns_come_and_versions_go(
    made, db, history, ann, make, adapters, now, target, tmp_path
):
    stop = asyncio.Event()

    async def write() -> int:
        batches = 0
        while not stop.is_set():
            items = [ImportItem(f"batch {batches} item {at}", now, f"{batches}-{at}") for at in range(20)]
            await history.import_(ann.id, items, count=len, now=now)
            batches += 1
        return batches

    async def learn() -> None:
        while not stop.is_set():
            await make(ann.id)
            await adapters.prune(ann.id, keep=1)

    working = asyncio.gather(write(), learn())
    folders = [target.with_name(f"{at}") for at in range(4)]
    for folder in folders:
        await asyncio.sleep(0.1)
        assert (await made.make(folder)).left_out == ()
    stop.set()
    batches, _ = await working
    sizes = []
    for at, folder in enumerate(folders):
        back(folder, tmp_path / f"home{at}", now)
        found = await contents(tmp_path / f"home{at}", "ann")
        assert len(found["texts"]) % 20 == 0, "a batch is there as a whole or not at all"
        assert found["active"] is None or (found["active"], VersionState.PUBLISHED) in [
            v[:2] for v in found["versions"]
        ]
        sizes.append(len(found["texts"]))
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] <= sizes[-1] <= batches * 20
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


async def test_threat_34_a_version_that_goes_between_database_and_files_makes_the_copy_start_again(
    db, root, made, ann, make, adapters, target, tmp_path, now
):
    class Late(Adapters):
        """Its files go once, just before they would be copied."""

        gone = False

        async def copy(self, version, root) -> None:
            if not self.gone:
                self.gone = True
                await self.rollback(ann.id, 0)
                await self.prune(ann.id, keep=1)
            await super().copy(version, root)

    await make(ann.id)
    await make(ann.id)
    done = await Backups(db, Late(db, root)).make(target)
    assert (done.versions, done.left_out) == (1, ())
    back(target, tmp_path / "home", now)
    found = await contents(tmp_path / "home", "ann")
    assert [state for _, state, _ in found["versions"]] == [VersionState.RETIRED, VersionState.PUBLISHED]


async def test_threat_06_a_damaged_version_is_left_out_and_named_and_the_rest_is_kept(
    made, ann, make, target, tmp_path, now
):
    first, second = await make(ann.id), await make(ann.id)
    weights = Path(second.path, "adapter.safetensors")
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    done = await made.make(target)
    assert [version.number for version in done.left_out] == [second.number]
    back(target, tmp_path / "home", now)
    db = await Database.open(tmp_path / "home/persona.db")
    adapters = Adapters(db, tmp_path / "home/adapters")
    assert len(await adapters.repair()) == 1
    assert (await adapters.active(ann.id)).number == first.number
    await db.close()


async def test_threat_06_a_backup_whose_only_version_was_damaged_comes_back_without_it(
    made, ann, make, target, tmp_path, now
):
    weights = Path((await make(ann.id)).path, "adapter.safetensors")
    weights.chmod(0o600)
    weights.write_bytes(b"!")
    assert len((await made.make(target)).left_out) == 1
    back(target, tmp_path / "home", now)
    db = await Database.open(tmp_path / "home/persona.db")
    adapters = Adapters(db, tmp_path / "home/adapters")
    assert len(await adapters.repair()) == 1
    assert await adapters.active(ann.id) is None
    assert await adapters.repair() == []
    await db.close()


async def test_threat_34_a_backup_does_not_overwrite_and_a_failed_one_leaves_nothing(made, target, users, ann):
    target.write_text("precious")
    with pytest.raises(RequestError) as refusal:
        await made.make(target)
    assert refusal.value.code == "file_exists"
    assert target.read_text() == "precious"
    with pytest.raises(RequestError) as refusal:
        await made.make(target.parent / "no such folder" / "copy")
    assert refusal.value.param == "folder"
    assert (await users.forget(ann.id))["backups"] == [], "what failed is not on record"


@pytest.fixture
async def backup(made, place, ann, make, target) -> Path:
    await make(ann.id, ((await place("hello")).tail,))
    await made.make(target)
    return target


def rewrite(backup: Path, **changes: object) -> None:
    manifest = backup / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "database cut": lambda backup: os.truncate(backup / "persona.db", 8192),
    "database gone": lambda backup: (backup / "persona.db").unlink(),
    "a bit of it flipped": lambda backup: flip(backup / "persona.db"),
    "an adapter cut": lambda backup: os.truncate(next(backup.glob("adapters/*/*/adapter.safetensors")), 3),
    "an adapter gone": lambda backup: shutil.rmtree(backup / "adapters"),
    "a link in its place": lambda backup: link(next(backup.glob("adapters/*/*/adapter.safetensors"))),
    "files outside named": lambda backup: rewrite(backup, files={"persona.db": {}, "../../x": {}}),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


@pytest.mark.parametrize("damage", DAMAGES)
async def test_threat_24_a_damaged_backup_is_refused_and_nothing_is_touched(backup, tmp_path, now, damage):
    DAMAGES[damage](backup)
    with pytest.raises(SchemaError, match=r"is damaged: .*; use another one"):
        back(backup, tmp_path / "home", now)
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"[" * 100_000, b"\xff"])
async def test_a_folder_that_is_no_backup_is_refused(backup, tmp_path, now, content):
    (backup / "manifest.json").unlink()
    if content is not None:
        (backup / "manifest.json").write_bytes(content)
    with pytest.raises(RequestError, match="is no backup: name the folder"):
        back(backup, tmp_path / "home", now)


async def test_threat_24_a_backup_of_a_newer_persona_is_refused_in_clear_words(backup, tmp_path, now):
    rewrite(backup, schema="9999")
    with pytest.raises(SchemaError, match=r"another persona \(schema 9999\); install the one that made it"):
        back(backup, tmp_path / "home", now)
    rewrite(backup, schema="0001", format=2)
    with pytest.raises(SchemaError, match="another persona"):
        back(backup, tmp_path / "home", now)


async def test_threat_34_what_is_there_is_refused_or_moved_aside_but_never_deleted(backup, tmp_path, now):
    home = tmp_path / "home"
    back(backup, home, now)
    with closing(sqlite3.connect(home / "persona.db")) as old, old:
        old.execute("UPDATE users SET name = 'old'")
    before = (home / "persona.db").read_bytes()
    with pytest.raises(ConfigurationError, match="--replace"):
        back(backup, home, now)
    aside = back(backup, home, now, replace=True)
    assert aside is not None
    assert (aside / "persona.db").read_bytes() == before
    assert list((aside / "adapters").glob("*/*/adapter.safetensors"))
    assert (await contents(home, "ann"))["active"] == 1


async def test_threat_32_a_receipt_after_a_restore_names_the_backup_and_what_was_moved_aside(backup, tmp_path, now):
    home, moved = tmp_path / "home", backup.with_name("elsewhere")
    backup.rename(moved)
    later = now + timedelta(days=365)
    back(moved, home, later)
    aside = back(moved, home, later + timedelta(days=1), replace=True)
    db = await Database.open(home / "persona.db")
    user = await Users(db).get("ann")
    receipt = await Users(db).forget(user.id)
    assert {entry["path"] for entry in receipt["backups"]} == {str(moved), str(aside)}
    await db.close()


async def test_threat_32_a_restore_brings_nobody_back_in_silence(db, root, users, ann, bob, target, now):
    await Backups(db, Adapters(db, root)).make(target)
    await users.forget(ann.id)
    zoe = await users.add("zoe")
    await users.forget(zoe.id)
    await db.close()
    home = db.path.parent
    done = restore.restore(target, home, replace=True, now=now)
    assert done.again == ("ann",)
    again = await Database.open(home / "persona.db")
    assert await Users(again).forgotten("zoe"), "late news of her are dropped, although the backup never knew her"
    await Users(again).forget((await Users(again).get("ann")).id)
    assert await Users(again).forgotten("ann")
    assert not await Users(again).forgotten("bob")
    await again.close()


async def test_threat_35_a_restore_makes_no_revoked_key_valid_again(db, root, users, ann, bob, target, now):
    lost, secret = await users.add_key(ann.id)
    _, kept = await users.add_key(bob.id)
    await Backups(db, Adapters(db, root)).make(target)
    await users.revoke(ann.id, lost)
    await db.close()
    restore.restore(target, db.path.parent, replace=True, now=now)
    again = await Database.open(db.path)
    assert await Users(again).authenticate(secret) is None
    assert (await Users(again).authenticate(kept)).user.id == bob.id
    await again.close()


async def test_a_restore_says_how_many_deleted_entries_are_back(db, root, history, ann, target, place, now):
    first = await place("one", "two", "three")
    await history.import_(ann.id, [ImportItem("four", now)], count=len, now=now)
    await history.delete(ann.id, first.known[0])  # the backup does not know it either
    await Backups(db, Adapters(db, root)).make(target)
    for entry in (await history.page(ann.id))[-2:]:
        await history.delete(ann.id, entry.id)
    await db.close()
    home = db.path.parent

    class Cut(Exception):
        pass

    def cut(name: str) -> None:
        if name == "restore-before-swap":
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "reach", cut)
        with pytest.raises(Cut):
            restore.restore(target, home, replace=True, now=now)
    assert restore.restore(target, home, replace=True, now=now).deleted == 2
    again = await Database.open(db.path)
    assert (await History(again).import_(ann.id, [ImportItem("four", now)], count=len, now=now)) == (0, 1)
    await again.check()
    await again.close()


async def test_threat_32_who_was_forgotten_is_known_after_a_restore_that_failed(db, root, users, ann, target, now):
    """Only the folder of a first restore, cut short, knew it any more."""
    await Backups(db, Adapters(db, root)).make(target)
    await users.forget(ann.id)
    await db.close()
    home = db.path.parent
    cut = home / f"{restore.UNFINISHED}first"
    cut.mkdir()
    db.path.rename(cut / "persona.db")
    (target / "persona.db").chmod(0o600)
    sound = (target / "persona.db").read_bytes()
    (home / "adapters").mkdir(exist_ok=True)

    def full(contents, home):
        raise OSError(28, "no space")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "_copied", full)
        with pytest.raises(StorageFull):
            restore.restore(target, home, replace=True, now=now)
    assert (target / "persona.db").read_bytes() == sound
    assert restore.restore(target, home, replace=True, now=now).again == ("ann",)
    assert not list(home.glob(f"{restore.UNFINISHED}*"))


async def test_threat_32_a_backup_whose_maker_did_not_wait_for_it_is_on_record(db, root, ann, target, monkeypatch):
    publish = backup_module._publish

    def late(part, place):
        publish(part, place)
        raise OSError(5, "the folder could not be synced")

    monkeypatch.setattr(backup_module, "_publish", late)
    with pytest.raises(RequestError, match="synced"):
        await Backups(db, Adapters(db, root)).make(target)
    receipt = await Users(db).forget(ann.id)
    assert [entry["path"] for entry in receipt["backups"]] == [str(target)]


async def on_record(home: Path) -> list[str]:
    """The folders that ann's receipt names, by their last name."""
    db = await Database.open(home / "persona.db")
    user = await Users(db).get("ann")
    receipt = await Users(db).forget(user.id)
    await db.close()
    return sorted(Path(entry["path"]).name.split("-2")[0] for entry in receipt["backups"])


@pytest.fixture
async def monday_again(db, root, users, ann, target, now) -> Path:
    """A state folder with backups of Monday and Tuesday, after Monday's was restored into it."""
    days = iter([ann.created + timedelta(days=1), ann.created + timedelta(days=2)])
    for day in ("monday", "tuesday"):
        at = next(days)
        await Backups(db, Adapters(db, root), lambda at=at: at).make(target.with_name(day))
    await db.close()
    back(target.with_name("monday"), db.path.parent, ann.created + timedelta(days=3), replace=True)
    return db.path.parent


async def test_threat_32_a_restore_does_not_lose_sight_of_backups_made_after_the_restored_one(monday_again):
    assert await on_record(monday_again) == ["before-restore", "monday", "tuesday"]


async def test_threat_32_the_next_restore_keeps_on_record_what_the_last_one_moved_aside(monday_again, ann, target):
    back(target.with_name("tuesday"), monday_again, ann.created + timedelta(days=4), replace=True)
    assert await on_record(monday_again) == ["before-restore", "before-restore", "monday", "tuesday"]


async def test_threat_32_a_restore_that_was_killed_loses_nothing_of_that_either(monday_again, ann, target):
    assert killed("restore_me.py", target.with_name("monday"), monday_again, failpoint="restore-before-swap") == KILLED
    back(target.with_name("monday"), monday_again, ann.created + timedelta(days=5), replace=True)
    assert await on_record(monday_again) == ["before-restore", "before-restore", "monday", "tuesday"]


async def test_threat_24_a_database_that_cannot_be_read_is_replaced_all_the_same(monday_again, ann, target):
    (monday_again / "persona.db").write_bytes(b"no database" * 1000)
    back(target.with_name("monday"), monday_again, ann.created + timedelta(days=4), replace=True)
    assert await on_record(monday_again) == ["before-restore", "monday"]


@pytest.mark.parametrize("failpoint", ["backup-after-database", "backup-before-rename"])
async def test_threat_07_what_a_kill_leaves_of_a_backup_is_named_in_a_receipt_and_removed_at_the_start(
    db, root, ann, users, made, target, failpoint
):
    assert killed("backup_me.py", db.path, root, target, failpoint=failpoint) == KILLED
    assert not target.exists()
    (left,) = target.parent.iterdir()
    (sentence,) = await made.repair()
    assert str(left) in sentence
    assert list(target.parent.iterdir()) == []
    assert await made.repair() == []
    assert killed("backup_me.py", db.path, root, target, failpoint=failpoint) == KILLED
    assert [entry["path"] for entry in (await users.forget(ann.id))["backups"]][-1] == str(target)


async def test_threat_07_a_restore_that_was_killed_is_refused_at_the_start_and_can_be_done_again(backup, tmp_path, now):
    home = tmp_path / "home"
    back(backup, home, now)
    assert killed("restore_me.py", backup, home, failpoint="restore-before-swap") == KILLED
    assert not (home / "persona.db").exists()
    with pytest.raises(ConfigurationError, match=r"cut short: run `persona restore` again, with --replace"):
        restore.settle(home)
    back(backup, home, now + timedelta(days=1), replace=True)
    assert restore.settle(home) == []
    assert (await contents(home, "ann"))["active"] == 1


async def test_a_restore_that_was_killed_before_it_touched_anything_is_swept_away(backup, tmp_path, now):
    back(backup, tmp_path / "home", now)
    (tmp_path / "home/restoring-abc").mkdir()
    (sentence,) = restore.settle(tmp_path / "home")
    assert "restoring-abc was removed" in sentence
    assert restore.settle(tmp_path / "home") == []


def killed(script: str, *arguments: object, failpoint: str) -> int:
    environment = {**os.environ, "PERSONA_FAILPOINT": failpoint, "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], env=environment).returncode
