"""Which versions hold what: every version holds the entries of its own run and all that its ancestors hold.

What a run that is still open has learned so far is in no version; its checkpoint is taken for holding everything.

Runs inside a transaction that the caller opened, so that a pointer and what it points to change together.
"""

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from persona.domain import ROLLED_BACK, EntryId, RunState, UserId, VersionState
from storage.database import Transaction
from storage.tables import entries, live_checks, run_examples, runs, users, versions

_OPEN = (RunState.QUEUED, RunState.RUNNING)


async def row(connection: Transaction, user_id: UserId, number: int) -> sa.Row[Any] | None:
    query = sa.select(versions).where(versions.c.user_id == user_id, versions.c.number == number)
    return (await connection.execute(query)).one_or_none()


async def holders(connection: Transaction, user_id: UserId, entry_id: EntryId) -> list[int]:
    """Numbers of the versions, not yet deleted, that absorbed the entry themselves or through an ancestor."""
    query = sa.select(run_examples.c.run_id).where(run_examples.c.entry_id == entry_id).distinct()
    trained = set((await connection.execute(query)).scalars())
    found = await connection.execute(
        sa.select(versions).where(versions.c.user_id == user_id).order_by(versions.c.number)
    )
    holding: set[int] = set()
    numbers = []
    for version in found:  # a parent has a lower number than its child
        if version.run_id in trained or version.parent in holding:
            holding.add(version.number)
            if version.state != VersionState.DELETED:
                numbers.append(version.number)
    return numbers


async def holds_deleted(connection: Transaction, run_id: int | None, parent: sa.Row[Any] | None) -> bool:
    """Whether a version of this run and parent would hold an entry that has been deleted meanwhile."""
    if parent is not None and parent.state == VersionState.DELETED:
        return True
    joined = run_examples.outerjoin(entries, entries.c.id == run_examples.c.entry_id)
    query = sa.select(run_examples.c.id).select_from(joined).where(run_examples.c.run_id == run_id)
    return (await connection.execute(query.where(entries.c.id.is_(None)).limit(1))).first() is not None


async def void(connection: Transaction, user_id: UserId) -> None:
    """The user's open run goes on from no checkpoint: it may hold, if only as context, what is being deleted."""
    mine = (runs.c.user_id == user_id) & runs.c.state.in_(_OPEN)
    await connection.execute(sa.update(runs).where(mine).values(metrics={}))


async def kept(connection: Transaction) -> list[tuple[int, int]]:
    """(user, run) of each open run that may go on from its checkpoint."""
    found = await connection.execute(sa.select(runs).where(runs.c.state.in_(_OPEN)))
    return [(row.user_id, row.id) for row in found if "through" in row.metrics]


async def mark(connection: Transaction, user_id: UserId, numbers: Collection[int], state: VersionState) -> None:
    mine = versions.c.user_id == user_id
    await connection.execute(sa.update(versions).where(mine, versions.c.number.in_(numbers)).values(state=state))


async def withdraw(connection: Transaction, user_id: UserId, numbers: Collection[int], state: VersionState) -> None:
    """Mark the versions; if the serving one is among them, the newest published one before it takes over."""
    await mark(connection, user_id, numbers, state)
    if state is VersionState.DELETED:  # what it predicted came of what is deleted
        mine = (live_checks.c.user_id == user_id) & live_checks.c.version.in_(numbers)
        await connection.execute(sa.delete(live_checks).where(mine))
    active = await pointer(connection, user_id)
    if active is not None and active in numbers:
        await serve(connection, user_id, await before(connection, user_id, active))


async def before(connection: Transaction, user_id: UserId, number: int) -> int | None:
    """The newest published version below `number`; to one that the live check rolled back only its user returns."""
    query = sa.select(sa.func.max(versions.c.number)).where(
        versions.c.user_id == user_id,
        versions.c.state == VersionState.PUBLISHED,
        versions.c.number < number,
        versions.c.metrics[ROLLED_BACK].as_string().is_(None),
    )
    below: int | None = (await connection.execute(query)).scalar_one()
    return below


async def note(connection: Transaction, version: sa.Row[Any], **said: str) -> None:
    """Add to what is known of a version: why it was taken out of service."""
    this = (versions.c.user_id == version.user_id) & (versions.c.number == version.number)
    metrics = {**version.metrics, **said}
    await connection.execute(sa.update(versions).where(this).values(metrics=metrics))


async def pointer(connection: Transaction, user_id: UserId) -> int | None:
    """Number of the serving version."""
    query = sa.select(users.c.active).where(users.c.id == user_id)
    number: int | None = (await connection.execute(query)).scalar_one_or_none()
    return number


async def serving(connection: Transaction, user_id: UserId, base: str) -> int:
    """Number of the version that serves on that base; 0 if none does."""
    number = await pointer(connection, user_id)
    found = await row(connection, user_id, number) if number is not None else None
    return found.number if found is not None and found.base == base else 0


async def serve(connection: Transaction, user_id: UserId, number: int | None) -> None:
    await connection.execute(sa.update(users).where(users.c.id == user_id).values(active=number))
