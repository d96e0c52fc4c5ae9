"""Users and their keys, from the first to the last: a forgotten user leaves nothing but a salted hash of the name.

Of a key only the SHA-256 is stored; the secret is shown once, when it is made.
"""

import asyncio
import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from persona.domain import Caller, User, UserId
from persona.errors import Busy, NotFound, RequestError, StorageFull
from storage import database, events, files, fulltext
from storage.database import Database, Transaction, reading
from storage.failpoints import reach
from storage.tables import (
    backups,
    deletions,
    entries,
    keys,
    live_checks,
    run_examples,
    runs,
    tombstones,
    users,
    versions,
)
from storage.whole import in_thread

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TOUCH = timedelta(minutes=1)
_PATIENCE = 1.0  # seconds in which noting the use of a key may be tried once more; one try waits five for a lock


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as its owner sees it: everything but the secret."""

    id: int
    label: str
    learn: bool
    created: datetime
    last_used: datetime | None
    revoked: datetime | None


def _utcnow() -> datetime:
    return datetime.now(UTC)


class Users:
    """The people and devices that persona serves."""

    def __init__(self, db: Database, clock: Callable[[], datetime] = _utcnow) -> None:
        self._db = db
        self._clock = clock
        self._touched: dict[int, datetime] = {}  # when the use of each key was last noted, or tried to be

    async def add(self, name: str, *, learn: bool = True) -> User:
        """A new user. Raises RequestError if the name is taken or malformed."""
        if not _NAME.fullmatch(name):
            raise RequestError(
                "A user name has 1 to 64 of the characters a-z, 0-9, dot, dash and underscore, "
                "and begins with a letter or digit.",
                code="invalid_user_name",
                param="name",
            )
        async with self._db.write() as connection:
            if await _find(connection, users.c.name == name):
                raise RequestError("A user of this name exists already.", code="user_exists", param="name")
            values = {"name": name, "learn": learn, "paused": False, "created": self._clock()}
            query = sa.insert(users).values(**values, last_version=0, salt=secrets.token_bytes(16))
            return _user((await connection.execute(query.returning(*users.c))).one())

    @reading
    async def get(self, name: str) -> User | None:
        async with self._db.read() as connection:
            return await _find(connection, users.c.name == name)

    @reading
    async def named(self, names: Iterable[str]) -> list[User]:
        """Those of the names that are users."""
        async with self._db.read() as connection:
            found = await connection.execute(sa.select(users).where(users.c.name.in_(list(names))))
            return [_user(row) for row in found]

    @reading
    async def by_id(self, user_id: UserId) -> User | None:
        async with self._db.read() as connection:
            return await _find(connection, users.c.id == user_id)

    @reading
    async def all(self) -> list[User]:
        async with self._db.read() as connection:
            return [_user(row) for row in await connection.execute(sa.select(users).order_by(users.c.name))]

    async def set_paused(self, user_id: UserId, paused: bool) -> None:
        async with self._db.write() as connection:
            await connection.execute(sa.update(users).where(users.c.id == user_id).values(paused=paused))

    async def add_key(self, user_id: UserId, *, learn: bool = True, label: str = "") -> tuple[int, str]:
        """A new key as (id, secret): 256 random bits that nobody can show again."""
        secret = f"pk-{secrets.token_urlsafe(32)}"
        async with self._db.write() as connection:
            if not await _find(connection, users.c.id == user_id):
                raise NotFound("There is no such user.")
            values = {"user_id": user_id, "digest": _digest(secret), "label": label, "learn": learn}
            query = sa.insert(keys).values(**values, created=self._clock()).returning(keys.c.id)
            key_id = (await connection.execute(query)).scalar_one()
        return key_id, secret

    async def authenticate(self, secret: str) -> Caller | None:
        """Who the key speaks for; None if it is unknown or revoked."""
        digest = _digest(secret)
        row = await self._keyed(digest)
        known = row.digest if row else bytes(len(digest))
        if not hmac.compare_digest(known, digest) or row is None:
            return None
        if row.last_used is None or self._clock() - row.last_used >= _TOUCH:
            await self._touch(row.key_id)
        return Caller(_user(row), row.key_id, row.learn and row.key_learn)

    @reading
    async def _keyed(self, digest: bytes) -> sa.Row[Any] | None:
        columns = [keys.c.id.label("key_id"), keys.c.digest, keys.c.learn.label("key_learn"), keys.c.last_used]
        query = sa.select(users, *columns).join(keys, keys.c.user_id == users.c.id)
        async with self._db.read() as connection:
            found = await connection.execute(query.where(keys.c.digest == digest, keys.c.revoked.is_(None)))
            row: sa.Row[Any] | None = found.one_or_none()
            return row

    async def keys(self, user_id: UserId) -> list[Key]:
        columns = [keys.c[name] for name in Key.__slots__]
        async with self._db.read() as connection:
            found = await connection.execute(sa.select(*columns).where(keys.c.user_id == user_id).order_by(keys.c.id))
            return [Key(**row._mapping) for row in found]

    async def revoke(self, user_id: UserId, key_id: int) -> bool:
        """End a key. False if the user has no such key; ending it twice is no error."""
        mine = (keys.c.user_id == user_id) & (keys.c.id == key_id)
        async with self._db.write() as connection:
            when = sa.func.coalesce(keys.c.revoked, sa.bindparam("now", self._clock(), keys.c.created.type))
            changed = await connection.execute(sa.update(keys).where(mine).values(revoked=when))
        return changed.rowcount > 0

    async def forget(self, user_id: UserId) -> dict[str, Any]:
        """Remove everything that is known of the user, beyond recovery, and say how much it was.

        The receipt counts rows by table and lists the backups that still hold the user.
        """
        async with self._db.write() as connection:
            user = await _find(connection, users.c.id == user_id)
            if user is None:
                raise NotFound("There is no such user.")
            receipt: dict[str, Any] = await _erase(connection, user)
            receipt["backups"] = await _holding(connection, user.created)
            salt = secrets.token_bytes(16)
            stone = {"salt": salt, "digest": _salted(salt, user.name), "created": self._clock()}
            await connection.execute(sa.insert(tombstones).values(**stone))
            reach("forget-before-commit")
        reach("forget-after-commit")
        await self._db.removed(user_id, None)
        receipt["upgrade_copies"] = _drop_copies(self._db.path)
        receipt["scrubbed"] = await self._db.scrub()
        return receipt

    async def forgotten(self, name: str) -> bool:
        """Whether a user of this name was forgotten and has not been added again: late news of them is dropped."""
        async with self._db.read() as connection:
            if await _find(connection, users.c.name == name):
                return False
        return await self._buried(name)

    async def repair(self) -> list[str]:
        """At the start: end what a kill left of forgetting. One sentence for each mending.

        Files of adapters are `Adapters.repair`'s, and the write-ahead log is emptied by opening the database.
        """
        known = {(user.id, user.name) for user in await self.all()}
        mended = []
        for copy in database.upgrade_copies(self._db.path):
            absent = set(await in_thread(database.people, copy)) - known  # ids are never given again
            if any([await self._buried(name) for _, name in absent]):
                copy.unlink(missing_ok=True)
                mended.append(f"The copy {copy.name} of the database was removed: it held a user who was forgotten.")
        return mended

    async def _buried(self, name: str) -> bool:
        """Whether anybody of this name was forgotten."""
        async with self._db.read() as connection:
            stones = (await connection.execute(sa.select(tombstones.c.salt, tombstones.c.digest))).all()
        return await in_thread(lambda: any(buried(stone.salt, stone.digest, name) for stone in stones))

    async def _touch(self, key_id: int) -> None:
        """Note the use of a key, or try to once a minute: a full or locked disk must not keep the user waiting."""
        now, tried = self._clock(), self._touched.get(key_id)
        if tried is not None and timedelta(0) <= now - tried < _TOUCH:
            return
        self._touched[key_id] = now
        with contextlib.suppress(StorageFull, Busy, TimeoutError):
            async with asyncio.timeout(_PATIENCE), self._db.write() as connection:
                await connection.execute(sa.update(keys).where(keys.c.id == key_id).values(last_used=now))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def buried(salt: bytes, digest: bytes, name: str) -> bool:
    """Whether a tombstone is that of a user of this name."""
    return hmac.compare_digest(digest, _salted(salt, name))


def _salted(salt: bytes, name: str) -> bytes:
    return hashlib.scrypt(name.encode("utf-8", "surrogatepass"), salt=salt, n=1 << 10, r=8, p=1, dklen=32)


def _user(row: sa.Row[Any]) -> User:
    return User(UserId(row.id), row.name, row.learn, row.paused, row.active, row.created)


async def _find(connection: Transaction, where: sa.ColumnElement[bool]) -> User | None:
    row = (await connection.execute(sa.select(users).where(where))).one_or_none()
    return _user(row) if row else None


async def _erase(connection: Transaction, user: User) -> dict[str, Any]:
    """Delete the user's rows, children before parents; counts by table."""
    user_id = user.id
    mine = sa.select(entries.c.id).where(entries.c.user_id == user_id)
    await fulltext.remove(connection, mine)
    await connection.execute(sa.update(entries).where(entries.c.user_id == user_id).values(parent=None))
    of_runs = run_examples.c.run_id.in_(sa.select(runs.c.id).where(runs.c.user_id == user_id))
    counts = {"run_examples": (await connection.execute(sa.delete(run_examples).where(of_runs))).rowcount}
    for table in (live_checks, versions, runs, entries, deletions, keys):
        counts[table.name] = (await connection.execute(sa.delete(table).where(table.c.user_id == user_id))).rowcount
    arrived = await events.forget(connection, user_id, user.name)
    await connection.execute(sa.delete(users).where(users.c.id == user_id))
    return {**counts, **arrived, "users": 1}


async def _holding(connection: Transaction, since: datetime) -> list[dict[str, str]]:
    """Backups made since then that are still there."""
    made = await connection.execute(sa.select(backups).where(backups.c.created >= since).order_by(backups.c.id))
    return [{"path": row.path, "created": row.created.isoformat()} for row in made if _there(Path(row.path))]


def _there(backup: Path) -> bool:
    return backup.exists() or bool(files.parts(backup))


def _drop_copies(path: Path) -> int:
    copies = database.upgrade_copies(path)
    for copy in copies:
        copy.unlink(missing_ok=True)
    return len(copies)
