"""Where a user's events come from, and what never arrived: gaps in the sequence numbers of each source.

A number that is left out counts as missing until it arrives late. A lower one that was never missing means, at 0 or 1
or far below, that the source was restarted: that is no gap. Runs inside a transaction that the caller opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from persona.domain import UserId
from storage import lookup
from storage.database import Transaction
from storage.tables import sources, users

RESTART = 1000  # so far below the last number nothing arrives late
MOST = 1_000_000_000  # missing numbers that are counted: a source may name any number
SOURCES = 1000  # of a user that are known; those that were silent longest are forgotten
GAPS = 100  # ranges that are remembered; of older ones only how many were missing

_COUNTED = ("last_seq", "gaps", "missing", "events", "duplicates")

Gaps = tuple[tuple[int, int], ...]  # missing numbers as ranges with both ends, ascending

Seen = tuple[UserId, str, int | None, bool]  # user, source, sequence number, whether it was a duplicate


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of one source of a user's events."""

    source: str  # "" for those that named none
    last_seq: int | None
    gaps: Gaps
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
        after = _counted(known.get(place) or Source(place[1], None, (), 0, 0, 0, now), arrived)
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
    for owner in {place[0] for place in groups if place not in known}:
        await _forget_silent(connection, owner)


async def _forget_silent(connection: Transaction, user_id: UserId) -> None:
    """A device may name itself anew at each start."""
    newest = sa.select(sources.c.source).where(sources.c.user_id == user_id).order_by(sources.c.last.desc())
    kept = sources.c.source.in_(newest.limit(SOURCES))
    await connection.execute(sa.delete(sources).where(sources.c.user_id == user_id, ~kept))


async def of(connection: Transaction, user_id: UserId) -> list[Source]:
    query = sa.select(sources).where(sources.c.user_id == user_id).order_by(sources.c.source)
    return [_source(row) for row in await connection.execute(query)]


async def missing(connection: Transaction) -> int:
    query = sa.select(sa.func.coalesce(sa.func.sum(sources.c.missing), 0))
    return int((await connection.execute(query)).scalar_one())


async def everywhere(connection: Transaction) -> list[tuple[str, Source]]:
    """Every source that numbers its events, with the name of its user."""
    joined = sources.join(users, users.c.id == sources.c.user_id)
    query = sa.select(users.c.name, sources).select_from(joined).where(sources.c.last_seq.is_not(None))
    return [(row.name, _source(row)) for row in await connection.execute(query)]


def _source(row: sa.Row[Any]) -> Source:
    gaps = tuple((first, last) for first, last in row.gaps)
    return Source(row.source, row.last_seq, gaps, row.missing, row.events, row.duplicates, row.last)


def _counted(before: Source, arrived: Sequence[tuple[int | None, bool]]) -> Source:
    after = before
    for seq, repeated in arrived:
        after = replace(after, events=after.events + (not repeated), duplicates=after.duplicates + repeated)
        if seq is not None and not repeated:
            after = _step(after, seq)
    return after


def _step(before: Source, seq: int) -> Source:
    """After one more number."""
    last = before.last_seq
    if last is None:
        return replace(before, last_seq=seq)
    if seq > last:
        return _ahead(before, last, seq)
    if any(first <= seq <= end for first, end in before.gaps):
        gaps = tuple(part for gap in before.gaps for part in _without(gap, seq))
        return replace(before, gaps=gaps, missing=max(0, before.missing - 1))
    if seq < last and (seq <= 1 or last - seq > RESTART):
        return replace(before, last_seq=seq, gaps=())
    return before


def _ahead(before: Source, last: int, seq: int) -> Source:
    if seq == last + 1:
        return replace(before, last_seq=seq)
    gaps = (*before.gaps, (last + 1, seq - 1))[-GAPS:]
    return replace(before, last_seq=seq, gaps=gaps, missing=min(before.missing + seq - last - 1, MOST))


def _without(gap: tuple[int, int], seq: int) -> Gaps:
    """What is left of a range when one of its numbers has arrived."""
    first, end = gap
    if not first <= seq <= end:
        return (gap,)
    return tuple(part for part in ((first, seq - 1), (seq + 1, end)) if part[0] <= part[1])
