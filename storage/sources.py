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
from storage import lookup
from storage.database import Transaction
from storage.tables import sources

RESTART = 1000  # so far below the last number nothing arrives late
BEGINNING = 64  # up to here a missing 0 or 1 may still arrive late
MOST = 1_000_000_000  # missing numbers that are counted: a source may name any number

_COUNTED = ("last_seq", "missing", "events", "duplicates")

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
    rows = await lookup.rows(connection, sa.select(sources), sources, "source", groups)
    known = {(UserId(row.user_id), row.source): _source(row) for row in rows}
    new, newer = [], []
    for place, arrived in groups.items():
        after = _counted(known.get(place) or Source(place[1], None, 0, 0, 0, now), arrived)
        values = {name: getattr(after, name) for name in _COUNTED} | {"last": now}
        if place in known:
            newer.append({f"new_{name}": value for name, value in values.items()} | {"user": place[0], "its": place[1]})
        else:
            new.append({"user_id": place[0], "source": place[1]} | values)
    if new:
        await connection.execute(sa.insert(sources), new)
    if newer:
        this = (sources.c.user_id == sa.bindparam("user")) & (sources.c.source == sa.bindparam("its"))
        changed: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in (*_COUNTED, "last")}
        await connection.execute(sa.update(sources).where(this).values(changed), newer)


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


def _again(last: int, seq: int, gap: int) -> bool:
    """Whether a lower number means that the source was restarted."""
    return last - seq > RESTART or (seq <= 1 and not (gap and last <= BEGINNING))


def _step(last: int | None, seq: int, gap: int) -> tuple[int, int]:
    """The newest number and how many are missing, after one more."""
    if last is None or (seq < last and _again(last, seq, gap)):
        return seq, gap
    if seq > last:
        return seq, min(gap + seq - last - 1, MOST)
    return last, max(0, gap - (seq < last))
