"""Where a user's events come from, and what never arrived: gaps in the sequence numbers of each source.

A number that is left out counts as missing until it arrives late. A source that starts again at 0 or 1, or far below,
was restarted: that is no gap. Runs inside a transaction that the caller opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from persona.domain import UserId
from storage.database import Transaction
from storage.tables import sources

RESTART = 1000  # so far below the last number nothing arrives late

Seen = tuple[UserId, str, int | None, bool]  # user, source, sequence number, whether it was a duplicate


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of one source of a user's events."""

    source: str  # "" for those that named none
    last_seq: int | None
    missing: int
    events: int
    duplicates: int
    last: datetime


async def note(connection: Transaction, seen: Sequence[Seen], now: datetime) -> None:
    """Count events in the order in which they arrived."""
    groups: dict[tuple[UserId, str], list[tuple[int | None, bool]]] = {}
    for user_id, source, seq, repeated in seen:
        groups.setdefault((user_id, source), []).append((seq, repeated))
    for (user_id, source), arrived in groups.items():
        this = (sources.c.user_id == user_id) & (sources.c.source == source)
        row = (await connection.execute(sa.select(sources).where(this))).one_or_none()
        after = _counted(_source(row) if row else Source(source, None, 0, 0, 0, now), arrived)
        values = {name: getattr(after, name) for name in ("last_seq", "missing", "events", "duplicates")}
        values["last"] = now
        if row:
            await connection.execute(sa.update(sources).where(this).values(**values))
        else:
            await connection.execute(sa.insert(sources).values(user_id=user_id, source=source, **values))


async def of(connection: Transaction, user_id: UserId) -> list[Source]:
    query = sa.select(sources).where(sources.c.user_id == user_id).order_by(sources.c.source)
    return [_source(row) for row in await connection.execute(query)]


async def missing(connection: Transaction) -> int:
    query = sa.select(sa.func.coalesce(sa.func.sum(sources.c.missing), 0))
    return int((await connection.execute(query)).scalar_one())


def _source(row: sa.Row[Any]) -> Source:
    return Source(row.source, row.last_seq, row.missing, row.events, row.duplicates, row.last)


def _counted(before: Source, arrived: Sequence[tuple[int | None, bool]]) -> Source:
    last, gap, stored, duplicates = before.last_seq, before.missing, before.events, before.duplicates
    for seq, repeated in arrived:
        stored += not repeated
        duplicates += repeated
        if seq is None or repeated:
            continue
        last, gap = _step(last, seq, gap)
    return Source(before.source, last, gap, stored, duplicates, before.last)


def _step(last: int | None, seq: int, gap: int) -> tuple[int, int]:
    """The newest number and how many are missing, after one more."""
    if last is None or (seq < last and (seq <= 1 or last - seq > RESTART)):
        return seq, gap
    if seq > last:
        return seq, gap + seq - last - 1
    return last, max(0, gap - (seq < last))
