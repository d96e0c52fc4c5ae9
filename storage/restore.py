"""From a backup to a state folder, while no service runs: all of it is proved before anything is replaced.

What was there is moved aside into a folder of its own, never deleted. The database comes last: a state folder with an
unfinished restore and without a database is refused at the start, so that nobody mistakes it for a fresh one.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from persona.errors import ConfigurationError, RequestError, SchemaError
from storage import database_file, files
from storage.backup import ADAPTERS, DATABASE, FORMAT, MANIFEST, describe
from storage.failpoints import reach
from storage.tables import backups, deletions, entries, keys, tombstones, users
from storage.users import buried

UNFINISHED = "restoring-"
ASIDE = "before-restore-"

_FILE = re.compile(r"persona\.db|adapters/\d{1,18}/\d{1,18}/(adapter\.safetensors|manifest\.json)")


@dataclass(frozen=True, slots=True)
class Contents:
    """What a proved backup holds."""

    folder: Path
    created: datetime
    files: tuple[str, ...]


def read(backup: Path) -> Contents:
    """Compare every byte of a backup with its manifest.

    Raises RequestError if it is none, SchemaError if it is damaged or of a newer persona.
    """
    about = _manifest(backup)
    listed = about["files"]
    for name, expected in listed.items():
        path = backup / name
        if path.is_symlink() or not path.is_file() or describe(path) != expected:
            raise SchemaError(f"The backup {backup} is damaged: {name} is missing or changed; use another one.")
    return Contents(backup.absolute(), datetime.fromisoformat(about["created"]), tuple(listed))


@dataclass(frozen=True, slots=True)
class Restored:
    """What came of a restore. aside: where lies now what was there · again: who is back and was forgotten since ·
    deleted: entries that are back and were deleted since."""

    aside: Path | None
    again: tuple[str, ...]
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class _Known:
    """What the database that goes knows and the one that comes may not: where older copies lie, of whom nothing is to
    be known (salt, digest, time), which keys were revoked, and which entries were deleted (user, digest)."""

    places: set[tuple[str, datetime]] = field(default_factory=set)
    stones: set[tuple[bytes, bytes, datetime]] = field(default_factory=set)
    revoked: dict[bytes, datetime] = field(default_factory=dict)
    deleted: set[tuple[int, bytes]] = field(default_factory=set)


def restore(backup: Path, home: Path, *, replace: bool, now: datetime) -> Restored:
    """Put a backup in the place of what `home` holds. The caller holds the home's lock.

    Raises as `read` does, ConfigurationError if `home` holds something and `replace` is not set, StorageFull.
    """
    contents = read(backup)
    database = home / DATABASE
    if not replace and _occupied(home):
        raise ConfigurationError(
            f"{home} holds data already: with --replace it is moved aside and the backup takes its place."
        )
    with files.full_disk():
        known, unfinished = _known(home), sorted(home.glob(f"{UNFINISHED}*"))
        for path in unfinished:
            shutil.rmtree(path / ADAPTERS, ignore_errors=True)
        made = _copied(contents, home)
        aside = home / f"{ASIDE}{now:%Y%m%dT%H%M%S}" if _occupied(home) else None
        places = {str(contents.folder): contents.created} | ({str(aside): now} if aside else {})
        again, deleted = _record(made / DATABASE, known, places)
        for path in unfinished:  # only now: what they know of those who were forgotten is in the new one
            shutil.rmtree(path, ignore_errors=True)
        if aside is not None:
            _move_aside(database, aside)
        reach("restore-before-swap")
        _move_in(made, home)
    return Restored(aside, again, deleted)


def settle(home: Path) -> list[str]:
    """At the start, before the database is opened: remove what a restore left. One sentence for each mending.

    Raises ConfigurationError if a restore was cut short before its database was in place.
    """
    left = sorted(home.glob(f"{UNFINISHED}*"))
    if left and not (home / DATABASE).exists():
        raise ConfigurationError(
            f"A restore into {home} was cut short: run `persona restore` again, with --replace, before the start."
        )
    _forget_unfinished(home)
    return [f"The unfinished restore {path} was removed." for path in left]


def _manifest(backup: Path) -> dict[str, Any]:
    try:
        about = json.loads((backup / MANIFEST).read_bytes())
        form, schema, listed = about["format"], str(about["schema"]), dict(about["files"])
        datetime.fromisoformat(about["created"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise RequestError(f"{backup} is no backup: name the folder that `persona backup` made.") from None
    if form != FORMAT or not database_file.knows(schema):
        raise SchemaError(
            f"The backup {backup} was made by another persona (schema {schema}); install the one that made it, or a "
            "newer one, and restore it with that."
        )
    if DATABASE not in listed or not all(_FILE.fullmatch(name) for name in listed):
        raise SchemaError(f"The backup {backup} is damaged: its manifest names other files; use another one.")
    return {**about, "files": listed}


def _occupied(home: Path) -> bool:
    adapters = home / ADAPTERS
    return (home / DATABASE).exists() or (adapters.is_dir() and any(adapters.iterdir()))


def _copied(contents: Contents, home: Path) -> Path:
    """The backup's files beside their later place, durable, and the database proved and ready for use."""
    made = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=home))
    for name in contents.files:
        target = made / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.copy_file(contents.folder / name, target)
    (made / ADAPTERS).mkdir(mode=0o700, exist_ok=True)
    if not any((made / ADAPTERS).iterdir()):  # whatever the database names was left out of the backup as damaged
        (made / ADAPTERS / files.GONE).mkdir(mode=0o700)
    database_file.examine(made / DATABASE)
    for folder in (path for path in (*made.rglob("*"), made) if path.is_dir()):
        files.sync(folder)
    return made


def _known(home: Path) -> _Known:
    """By the database that goes, and that of a restore that was cut short."""
    found = _Known()
    for database in (home / DATABASE, *home.glob(f"{UNFINISHED}*/{DATABASE}")):
        if database.exists():
            with contextlib.suppress(Exception), database_file.alone(database) as connection:  # it may be damaged
                found.places.update(_recorded(connection))
                found.stones.update(_stones(connection))
                found.revoked.update(_revoked(connection))
                found.deleted.update(_deleted(connection))
    return found


def _recorded(connection: sa.Connection) -> Iterator[tuple[str, datetime]]:
    for row in connection.execute(sa.select(backups.c.path, backups.c.created)):
        yield row.path, row.created


def _stones(connection: sa.Connection) -> Iterator[tuple[bytes, bytes, datetime]]:
    for row in connection.execute(sa.select(tombstones)):
        yield row.salt, row.digest, row.created


def _revoked(connection: sa.Connection) -> Iterator[tuple[bytes, datetime]]:
    for row in connection.execute(sa.select(keys.c.digest, keys.c.revoked).where(keys.c.revoked.is_not(None))):
        yield row.digest, row.revoked


def _deleted(connection: sa.Connection) -> Iterator[tuple[int, bytes]]:
    for row in connection.execute(sa.select(deletions.c.user_id, deletions.c.digest)):
        yield row.user_id, row.digest


def _back(connection: sa.Connection, deleted: Sequence[tuple[int, bytes]]) -> int:
    """How many entries of this database another one saw deleted."""
    count = 0
    for user_id, digest in deleted:
        same = (entries.c.chain == digest) | (entries.c.item == digest)
        query = sa.select(sa.func.count()).select_from(entries).where(entries.c.user_id == user_id, same)
        count += connection.execute(query).scalar_one()
    return count


def _record(database: Path, known: _Known, places: dict[str, datetime]) -> tuple[tuple[str, ...], int]:
    """Note where older copies lie, so that whoever is forgotten learns of them: each once; who was forgotten, so that
    late news of them are dropped; and which keys were revoked: they stay so. Returns the names of the forgotten who are
    back with this database, and how many entries are that were deleted."""
    with database_file.alone(database) as connection:
        held = set(_recorded(connection))
        named = {path for path, _ in held | known.places}
        new = {(path, created) for path, created in places.items() if path not in named} | (known.places - held)
        rows = [{"path": path, "created": created} for path, created in sorted(new, key=lambda one: one[1])]
        if rows:
            connection.execute(sa.insert(backups), rows)
        since = sorted(known.stones - set(_stones(connection)), key=lambda stone: stone[2])
        if since:
            buried_since = [{"salt": salt, "digest": digest, "created": created} for salt, digest, created in since]
            connection.execute(sa.insert(tombstones), buried_since)
        for digest, revoked in known.revoked.items():
            valid = (keys.c.digest == digest) & keys.c.revoked.is_(None)
            connection.execute(sa.update(keys).where(valid).values(revoked=revoked))
        names = connection.execute(sa.select(users.c.name).order_by(users.c.id)).scalars().all()
        here = set(connection.execute(sa.select(users.c.id)).scalars())
        gone = sorted({one for one in known.deleted if one[0] in here} - set(_deleted(connection)))
        deleted = _back(connection, gone)
        if gone:  # for the next restore to know, if this one is cut short
            told = [{"user_id": user_id, "digest": digest} for user_id, digest in gone]
            connection.execute(sa.insert(deletions), told)
    files.sync(database)
    return tuple(name for name in names if any(buried(salt, digest, name) for salt, digest, _ in since)), deleted


def _move_aside(database: Path, aside: Path) -> None:
    """The database goes first: from here until the end there is none."""
    home = database.parent
    with contextlib.suppress(Exception):  # it may be the damaged one that is replaced
        database_file.checkpoint(database)
    aside.mkdir(mode=0o700)
    rest = [*home.glob(f"{database.name}-*"), *database_file.upgrade_copies(database), home / ADAPTERS]
    for path in (database, *rest):
        if os.path.lexists(path):
            path.rename(aside / path.name)
    files.sync(aside)
    files.sync(home)


def _move_in(made: Path, home: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (home / ADAPTERS).rmdir()  # an empty one, at most
    (made / ADAPTERS).rename(home / ADAPTERS)
    files.sync(home)
    (made / DATABASE).rename(home / DATABASE)
    files.sync(home)
    shutil.rmtree(made)


def _forget_unfinished(home: Path) -> None:
    for path in home.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
