"""A backup: a folder with the database and every adapter that it names, complete and proved, or no folder at all.

    BACKUP/
        manifest.json    what lies here: schema, time, size and SHA-256 of every file
        persona.db       readable by itself
        adapters/        <user id>/<number>/ as in the state folder

The database is copied first, then the adapters that the copy names. If one of them was removed meanwhile, the copy is
older than the files and is made again. A backup is on record before its first byte: whoever is forgotten learns of it,
and the next start removes what a kill left.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from persona.domain import Version, VersionState
from persona.errors import AdapterError, Busy, PersonaError, RequestError
from storage import database_file, files
from storage.adapters import Adapters
from storage.database import Database
from storage.failpoints import reach
from storage.tables import backups
from storage.whole import in_thread

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE = "persona.db"
ADAPTERS = "adapters"

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that is there. `left_out` names versions whose own files are damaged."""

    folder: Path
    bytes: int
    versions: int
    left_out: tuple[Version, ...]


class _Moved(Exception):
    """A version went between the copy of the database and that of its files."""


def _utcnow() -> datetime:
    return datetime.now(UTC)


class Backups:
    """Makes backups of a running service, and knows where they lie."""

    def __init__(self, db: Database, adapters: Adapters, clock: Callable[[], datetime] = _utcnow) -> None:
        self._db, self._adapters, self._clock = db, adapters, clock

    async def make(self, target: Path) -> Made:
        """Make the new folder `target`. Raises RequestError if that cannot be, StorageFull, Busy."""
        if os.path.lexists(target):
            raise RequestError("The backup exists already; choose a new name.", code="file_exists", param="folder")
        record = await self._note(target)
        try:
            with _writable():
                return await self._made(target)
        except BaseException:
            if not await in_thread(os.path.lexists, target):  # else it holds its users, whoever still waits for it
                await self._strike(record)
            raise

    async def repair(self) -> list[str]:
        """At the start: remove what a kill left of backups. One sentence for each."""
        async with self._db.read() as connection:
            found = (await connection.execute(sa.select(backups.c.path).distinct())).scalars().all()
        left = [part for path in found for part in files.parts(Path(path))]
        for part in left:
            await in_thread(shutil.rmtree, part, ignore_errors=True)
        return [f"The unfinished backup {part} was removed." for part in left]

    async def _made(self, target: Path) -> Made:
        part = Path(await in_thread(_part, target))
        try:
            left_out = await self._fill(part)
            size, count = await in_thread(_seal, part, self._clock())
            reach("backup-before-rename")
            await in_thread(_publish, part, target)
            return Made(target, size, count, left_out)
        finally:
            await in_thread(shutil.rmtree, part, ignore_errors=True)

    async def _fill(self, part: Path) -> tuple[Version, ...]:
        for _ in range(_ATTEMPTS):
            await self._db.copy(part / DATABASE)
            reach("backup-after-database")
            try:
                return await self._copy_adapters(part)
            except _Moved:
                await in_thread(_empty, part)
        raise Busy("Versions changed faster than they could be copied; try the backup again.", retry_after=60)

    async def _copy_adapters(self, part: Path) -> tuple[Version, ...]:
        """Copy what the copied database names; returns what is damaged. Raises _Moved."""
        damaged = []
        for version in await in_thread(self._named, part / DATABASE):
            try:
                await self._adapters.copy(version, part / ADAPTERS)
            except AdapterError:
                await self._excuse(version)
                await in_thread(shutil.rmtree, files.folder(part / ADAPTERS, version.user_id, version.number))
                damaged.append(version)
        return tuple(damaged)

    def _named(self, copied: Path) -> list[Version]:
        with database_file.alone(copied) as connection:
            return self._adapters.named(connection)

    async def _excuse(self, version: Version) -> None:
        """Raises _Moved unless the version is still there, and so its files are really damaged."""
        now = await self._adapters.get(version.user_id, version.number)
        if now is None or now.state is not VersionState.PUBLISHED:
            raise _Moved

    async def _note(self, target: Path) -> int:
        async with self._db.write() as connection:
            row = sa.insert(backups).values(path=str(target.absolute()), created=self._clock())
            return int((await connection.execute(row.returning(backups.c.id))).scalar_one())

    async def _strike(self, record: int) -> None:
        with contextlib.suppress(PersonaError):  # a record too many does no harm: the folder is not there
            async with self._db.write() as connection:
                await connection.execute(sa.delete(backups).where(backups.c.id == record))


def _part(target: Path) -> str:
    return tempfile.mkdtemp(prefix=f".{target.name}.", suffix=files.PART, dir=target.parent)


def _empty(part: Path) -> None:
    (part / DATABASE).unlink()
    shutil.rmtree(part / ADAPTERS, ignore_errors=True)


def _seal(part: Path, created: datetime) -> tuple[int, int]:
    """Write the manifest and make everything durable: bytes and versions."""
    schema, _ = database_file.examine(part / DATABASE)
    found = sorted(path for path in part.rglob("*") if path.is_file())
    listed = {path.relative_to(part).as_posix(): describe(path) for path in found}
    about = {"format": FORMAT, "schema": schema, "created": created.isoformat(), "files": listed}
    with (part / MANIFEST).open("x", encoding="utf-8") as file:
        json.dump(about, file, indent=1)
    (part / MANIFEST).chmod(0o600)
    for path in (part / MANIFEST, part / DATABASE, *(path for path in part.rglob("*") if path.is_dir()), part):
        files.sync(path)
    return sum(about["bytes"] for about in listed.values()), sum(files.WEIGHTS in name for name in listed)


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _publish(part: Path, target: Path) -> None:
    os.rename(part, target)
    files.sync(target.parent)


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """What the file system says of a place where a backup shall lie, in our words."""
    try:
        with files.full_disk():
            yield
    except OSError as error:
        message = (
            f"The backup cannot be written there: {error.strerror}; name a folder that does not exist yet, in one that "
            "the service may write to."
        )
        raise RequestError(message, param="folder") from error
