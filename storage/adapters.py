"""Versions of adapters: rows in the database, files on disk, and the pointer that says which one serves.

A published version is never edited and its number never given again. The pointer names a version whose files are
complete, or none: files become durable before the row, the row before the pointer, and `repair` mends the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from persona.domain import ROLLED_BACK, EntryId, UserId, Version, VersionState
from persona.errors import AdapterError, Busy, ConfigurationError, NotFound, TrainingFailed
from storage import files, lineage
from storage.database import Database, Transaction, reading
from storage.failpoints import reach
from storage.tables import users, versions
from storage.whole import in_thread

# Inside the class `list` is a method.
Listing = list[Version]
Numbers = list[int]
Sentences = list[str]

_MAY_SERVE = (VersionState.CANDIDATE, VersionState.PUBLISHED)
_WITH_FILES = (VersionState.PUBLISHED, VersionState.QUARANTINED)  # when nothing runs


@dataclass(frozen=True, slots=True)
class Leaving:
    """A version that the live check takes out of service, and why: one sentence."""

    number: int
    reason: str


class Adapters:
    """Every version of every user, under the folder `root`."""

    def __init__(self, db: Database, root: Path) -> None:
        self._db = db
        self._root = root.absolute()
        db.on_removed(self._removed)

    async def workspace(self, user_id: UserId) -> Path:
        """A fresh folder to train into; end it with `publish` or `discard`."""
        return await in_thread(files.temporary, self._root, user_id)

    async def discard(self, folder: Path) -> None:
        """Give up a workspace."""
        assert folder.name.startswith(files.TEMPORARY), "only a workspace is discarded"
        await in_thread(files.remove, folder)

    async def checkpoint(self, user_id: UserId, run_id: int) -> Path:
        """Where that run keeps its state, with what lies there already; end it with `drop_checkpoint`."""
        return await in_thread(files.opened, files.checkpoint(self._root, user_id, run_id))

    async def drop_checkpoint(self, user_id: UserId, run_id: int) -> None:
        """No run goes on from that state any more."""
        reach("checkpoint-before-drop")
        await in_thread(files.remove, files.checkpoint(self._root, user_id, run_id))

    async def publish(
        self,
        user_id: UserId,
        folder: Path,
        *,
        watermark: EntryId,
        parent: int | None,
        base: str,
        run_id: int | None,
        metrics: dict[str, Any],
        plan: dict[str, Any],
    ) -> Version:
        """Turn a workspace that holds adapter.safetensors into a candidate: durable on disk, known, not yet serving.

        Raises AdapterError without weights, StorageFull, NotFound if the user was forgotten or if an
        entry that the version holds was deleted meanwhile. Then the workspace is gone.
        """
        try:
            number = await self._number(user_id)
            sha256, size = await in_thread(files.measure, folder)
            version = Version(
                user_id=user_id,
                number=number,
                state=VersionState.CANDIDATE,
                watermark=watermark,
                parent=parent,
                base=base,
                path="",
                sha256=sha256,
                bytes=size,
                created=datetime.now(UTC),
                run_id=run_id,
                metrics=metrics,
            )
            return await self._seal(folder, version, plan)
        finally:
            await in_thread(files.remove, folder)

    async def point(self, user_id: UserId, number: int, *, after: int | None = None) -> None:
        """Publish a candidate and let it serve, in one transaction.

        after: the version of the same base that has to serve until then, 0 for none. Raises NotFound if the candidate
        may not serve, TrainingFailed if another version serves meanwhile.
        """
        async with self._db.write() as connection:
            row = await lineage.row(connection, user_id, number)
            if row is None or row.state not in _MAY_SERVE:
                raise NotFound("There is no such version.")
            if after is not None and after != await lineage.serving(connection, user_id, row.base):
                raise TrainingFailed("Another version began to serve meanwhile.")
            await lineage.mark(connection, user_id, [number], VersionState.PUBLISHED)
            await lineage.serve(connection, user_id, number)
            reach("point-before-commit")
        reach("point-after-commit")

    async def reject(self, user_id: UserId, number: int) -> None:
        """The gate said no: the row of the candidate stays, its files go. Raises NotFound if it is no candidate."""
        async with self._db.write() as connection:
            row = await lineage.row(connection, user_id, number)
            if row is None or row.state != VersionState.CANDIDATE:
                raise NotFound("There is no such candidate.")
            await lineage.mark(connection, user_id, [number], VersionState.REJECTED)
        await self._drop(user_id, [number])

    async def rollback(
        self, user_id: UserId, number: int | None = None, *, leaving: Leaving | None = None
    ) -> Version | None:
        """Serve an earlier published version: the one before (None), that number, or the bare base (0).

        leaving: which version has to serve still, and why it shall not any more; that stays in its metrics. Returns
        what serves now, None for the base. Raises NotFound where there is nothing to go back to, or to leave.
        """
        async with self._db.write() as connection:
            if leaving is not None:
                await self._leave(connection, user_id, leaving)
            target = await self._target(connection, user_id, number)
            await lineage.serve(connection, user_id, target or None)
            row = await lineage.row(connection, user_id, target) if target else None
        return self._version(row) if row else None

    @reading
    async def active(self, user_id: UserId) -> Version | None:
        """The serving version, None for the bare base."""
        joined = versions.join(users, (users.c.id == versions.c.user_id) & (users.c.active == versions.c.number))
        query = sa.select(versions).select_from(joined).where(users.c.id == user_id)
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return self._version(row) if row else None

    @reading
    async def get(self, user_id: UserId, number: int) -> Version | None:
        async with self._db.read() as connection:
            row = await lineage.row(connection, user_id, number)
        return self._version(row) if row else None

    @reading
    async def list(self, user_id: UserId) -> Listing:
        """Every version that the user ever had, oldest first."""
        query = sa.select(versions).where(versions.c.user_id == user_id).order_by(versions.c.number)
        async with self._db.read() as connection:
            return [self._version(row) for row in await connection.execute(query)]

    async def verify(self, version: Version) -> None:
        """Compare every byte with the manifest and the database. Raises AdapterError, Busy."""
        path = files.folder(self._root, version.user_id, version.number)
        await in_thread(files.verify, path, _manifest(version))

    async def copy(self, version: Version, root: Path) -> None:
        """Copy the files of a version below another root, every byte compared. Raises AdapterError, StorageFull."""
        source = files.folder(self._root, version.user_id, version.number)
        target = files.folder(root, version.user_id, version.number)
        await in_thread(files.copy, source, target, _manifest(version))

    def named(self, connection: sa.Connection) -> Listing:
        """The published versions that a copy of the database names."""
        query = sa.select(versions).where(versions.c.state == VersionState.PUBLISHED)
        return [self._version(row) for row in connection.execute(query)]

    async def quarantine(self, user_id: UserId, number: int, reason: str) -> Version | None:
        """Take a damaged version out of service, for that reason; returns what serves now, None for the base.

        Raises Busy where the folder of all adapters is away: then nothing is known of this one.
        """
        if not await in_thread(files.there, self._root):
            raise Busy("The folder of adapters is missing or empty: is its disk there? Try again then.", retry_after=30)
        async with self._db.write() as connection:
            row = await lineage.row(connection, user_id, number)
            if row is None:
                raise NotFound("There is no such version.")
            if row.state in (VersionState.CANDIDATE, VersionState.PUBLISHED):  # else its files went on purpose
                await self._quarantine(connection, row, reason)
        return await self.active(user_id)

    async def prune(self, user_id: UserId, keep: int) -> Numbers:
        """Remove the files of all but the newest `keep` published versions; the serving one always stays.

        Damaged files of quarantined versions go, too; those that the engine had something else against go once they
        are older than all that is kept. Returns the numbers that can no longer be rolled back to.
        """
        query = sa.select(versions).where(versions.c.user_id == user_id)
        async with self._db.write() as connection:
            active = await lineage.pointer(connection, user_id)
            found = (await connection.execute(query.order_by(versions.c.number.desc()))).all()
            published = [row.number for row in found if row.state == VersionState.PUBLISHED and row.number != active]
            old = sorted(published[max(0, keep - (active is not None)) :])
            await lineage.mark(connection, user_id, old, VersionState.RETIRED)
        kept = [active, *published]
        oldest = min((number for number in kept if number is not None and number not in old), default=0)
        quarantined = [self._version(row) for row in found if row.state == VersionState.QUARANTINED]
        broken = [one.number for one in quarantined if one.number < oldest or not await self._sound(one)]
        await self._drop(user_id, old + broken)
        return old

    async def _sound(self, version: Version) -> bool:
        """Whether nothing is known against its files."""
        try:
            await self.verify(version)
        except Busy:
            return True
        except AdapterError:
            return False
        return True

    async def remove_user(self, user_id: UserId) -> None:
        """Remove every file of a user."""
        await in_thread(files.remove, self._root / str(int(user_id)))

    async def repair(self) -> Sentences:
        """At the start, before anything runs: make disk, rows and pointers agree. One sentence for each mending.

        The states of runs that go on from them stay. Raises ConfigurationError if the files of all versions are away:
        a folder that is not mounted comes back, a version that was taken out of service does not.
        """
        query = sa.select(versions).order_by(versions.c.user_id, versions.c.number)
        async with self._db.write() as connection:
            rows = (await connection.execute(query)).all()
            await in_thread(self._demand, rows)
            mended = [sentence for row in rows for sentence in await self._repair_row(connection, row)]
            kept = {files.folder(self._root, row.user_id, row.number) for row in rows if row.state in _WITH_FILES}
            kept |= {files.checkpoint(self._root, *run) for run in await lineage.kept(connection)}
        await in_thread(files.remove, self._root / files.GONE)
        return mended + await in_thread(self._repair_files, kept)

    def _demand(self, rows: Sequence[sa.Row[Any]]) -> None:
        """Raises ConfigurationError if published versions have nowhere to be."""
        if any(row.state == VersionState.PUBLISHED for row in rows) and not files.there(self._root):
            raise ConfigurationError(
                f"{self._root} is missing or empty, and the database names versions in it: mount it or "
                f"restore a backup; if they are lost, `mkdir -p {self._root / files.GONE}` lets persona start without."
            )

    async def _number(self, user_id: UserId) -> int:
        """The user's next version number, spent whatever happens then."""
        async with self._db.write() as connection:
            query = sa.update(users).where(users.c.id == user_id).values(last_version=users.c.last_version + 1)
            number: int | None = (await connection.execute(query.returning(users.c.last_version))).scalar()
        if number is None:
            raise NotFound("There is no such user.")
        return number

    async def _seal(self, folder: Path, version: Version, plan: dict[str, Any]) -> Version:
        target = files.folder(self._root, version.user_id, version.number)
        try:
            await in_thread(files.seal, folder, target, {**_manifest(version), "plan": plan})
            return await self._record(version, plan)
        except BaseException:
            await in_thread(files.remove, target)
            raise

    async def _record(self, version: Version, plan: dict[str, Any]) -> Version:
        async with self._db.write() as connection:
            user_id = version.user_id
            if not (await connection.execute(sa.select(users.c.id).where(users.c.id == user_id))).first():
                raise NotFound("There is no such user.")
            parent = await lineage.row(connection, user_id, version.parent) if version.parent else None
            if await lineage.holds_deleted(connection, version.run_id, parent):
                raise NotFound("An entry of this run was deleted while it was training.")
            values = {column.name: getattr(version, column.name) for column in versions.c if column.name != "plan"}
            made = await connection.execute(sa.insert(versions).values(**values, plan=plan).returning(*versions.c))
            row = made.one()
        reach("publish-after-row")
        return self._version(row)

    async def _target(self, connection: Transaction, user_id: UserId, number: int | None) -> int:
        active = await lineage.pointer(connection, user_id)
        if number is None and active is not None:
            return await lineage.before(connection, user_id, active) or 0
        row = await lineage.row(connection, user_id, number) if number else None
        if number != 0 and (row is None or row.state != VersionState.PUBLISHED):
            raise NotFound("There is no such version to go back to.")
        return number or 0

    async def _leave(self, connection: Transaction, user_id: UserId, leaving: Leaving) -> None:
        row = await lineage.row(connection, user_id, leaving.number)
        if row is None or leaving.number != await lineage.pointer(connection, user_id):
            raise NotFound("This version does not serve any more.")
        await lineage.note(connection, row, **{ROLLED_BACK: leaving.reason})

    async def _quarantine(self, connection: Transaction, row: sa.Row[Any], reason: str) -> None:
        await lineage.withdraw(connection, UserId(row.user_id), [row.number], VersionState.QUARANTINED)
        await lineage.note(connection, row, quarantined=reason)

    async def _removed(self, user_id: UserId, numbers: Sequence[int] | None) -> None:
        """Remove the files of versions (None: of the user) that went with an entry, and every state of a run."""
        if numbers is None:
            return await self.remove_user(user_id)
        for path in await in_thread(files.checkpoints, self._root, user_id):
            await in_thread(files.remove, path)
        return await self._drop(user_id, numbers)

    async def _drop(self, user_id: UserId, numbers: Sequence[int]) -> None:
        """Remove the files of versions that the database has let go."""
        for number in numbers:
            await in_thread(files.remove, files.folder(self._root, user_id, number))

    async def _repair_row(self, connection: Transaction, row: sa.Row[Any]) -> Sentences:
        name = f"Version {row.number} of user {row.user_id}"
        if row.state == VersionState.CANDIDATE:
            await lineage.mark(connection, UserId(row.user_id), [row.number], VersionState.REJECTED)
            return [f"{name} was rejected: the service stopped before it was judged."]
        path = files.folder(self._root, row.user_id, row.number)
        if row.state == VersionState.PUBLISHED and not files.looks_complete(path, row.bytes):
            await self._quarantine(connection, row, "its files are missing or incomplete")
            return [f"{name} was quarantined: its files are missing or incomplete."]
        return []

    def _repair_files(self, kept: set[Path]) -> Sentences:
        """Remove every folder under the root that no row keeps."""
        mended: Sentences = []
        for path in files.found(self._root):
            if path not in kept:
                files.remove(path)
                name = path.relative_to(self._root).as_posix()
                mended.append(f"The folder {name} was removed: no version and no run keeps it.")
        return mended

    def _version(self, row: sa.Row[Any]) -> Version:
        values = {name: value for name, value in row._asdict().items() if name != "plan"}
        path = str(files.folder(self._root, row.user_id, row.number))
        return Version(**{**values, "state": VersionState(row.state), "path": path})


def _manifest(version: Version) -> dict[str, Any]:
    """What the manifest of a version says, plan aside."""
    return {
        "number": version.number,
        "watermark": version.watermark,
        "parent": version.parent,
        "base": version.base,
        "sha256": version.sha256,
        "bytes": version.bytes,
        "created": version.created.isoformat(),
    }
