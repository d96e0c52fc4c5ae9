"""What is known of a user: the newest value of each fact and of each state.

Newest by the time that the event told, then by arrival. A value that was taken back leaves an empty row, so that an
older one which arrives late cannot bring it back. A time that is still to come was told by a clock that was ahead: it
says nothing, and whatever arrives is newer. Runs inside a transaction that the caller opened.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from persona.domain import Fact, UserId
from storage import lookup
from storage.database import Transaction
from storage.tables import facts

Place = tuple[UserId, str, str]  # user, kind, key


async def learn(connection: Transaction, told: Mapping[Place, Fact], now: datetime) -> None:
    """Keep each value that is not older than what is known."""
    if not told:
        return
    known = await _known(connection, told)
    new = [_row(place, fact) for place, fact in told.items() if place not in known]
    newer = [
        {"this": known[place].id, "told": fact.value, "at": fact.ts}
        for place, fact in told.items()
        if place in known and (known[place].ts <= fact.ts or known[place].ts > now)
    ]
    if new:
        await connection.execute(sa.insert(facts), new)
    if newer:
        this = sa.update(facts).where(facts.c.id == sa.bindparam("this"))
        await connection.execute(this.values(value=sa.bindparam("told"), ts=sa.bindparam("at")), newer)


async def known(connection: Transaction, user_id: UserId, kind: str | None, limit: int) -> list[Fact]:
    """The newest first."""
    query = sa.select(facts).where(facts.c.user_id == user_id, facts.c.value.is_not(None))
    if kind is not None:
        query = query.where(facts.c.kind == kind)
    found = await connection.execute(query.order_by(facts.c.ts.desc(), facts.c.id.desc()).limit(limit))
    return [Fact(row.kind, row.key, row.value, row.ts) for row in found]


async def drop(connection: Transaction, user_id: UserId, kind: str, key: str, now: datetime) -> bool:
    """Take a value back. False if there is none."""
    this = (facts.c.user_id == user_id) & (facts.c.kind == kind) & (facts.c.key == key)
    moment = sa.case((facts.c.ts > now, sa.literal(now, facts.c.ts.type)), else_=facts.c.ts)
    query = sa.update(facts).where(this, facts.c.value.is_not(None)).values(value=None, ts=moment)
    return (await connection.execute(query)).rowcount > 0


async def _known(connection: Transaction, told: Mapping[Place, Fact]) -> dict[Place, sa.Row[Any]]:
    query = sa.select(facts.c.id, facts.c.user_id, facts.c.kind, facts.c.key, facts.c.ts)
    found: list[sa.Row[Any]] = []
    for kind in {kind for _, kind, _ in told}:
        keys = [(user_id, key) for user_id, its, key in told if its == kind]
        found += await lookup.rows(connection, query, facts, "key", keys, facts.c.kind == kind)
    return {(UserId(row.user_id), row.kind, row.key): row for row in found}


def _row(place: Place, fact: Fact) -> dict[str, object]:
    user_id, kind, key = place
    return {"user_id": user_id, "kind": kind, "key": key, "value": fact.value, "ts": fact.ts}
