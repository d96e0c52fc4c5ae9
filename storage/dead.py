"""Dead letters: refused messages with their reason, so that nothing is dropped in silence and some can be replayed.

The first ones of a user, reason and minute keep their payload, a row each; all others of that minute are one row with a
count. So a flood costs a row a minute. Runs inside a transaction that the caller opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import sqlalchemy as sa

from persona.domain import UserId
from persona.event import Reason
from storage.database import Transaction
from storage.tables import dead_letters as table

MAX_NAME = 64  # characters of a name that a topic claims
MAX_KIND = 128
MAX_NAMES = 100  # names that are no user's, of a reason and minute


@dataclass(frozen=True, slots=True)
class Letter:
    """A refused message, or `count` of them without their payload."""

    user_id: UserId | None
    name: str  # of the user, as the topic has it
    kind: str
    source: str
    reason: Reason
    detail: str
    payload: bytes | None
    last: datetime
    count: int = 1
    id: int = 0
    first: datetime | None = None

    @classmethod
    def anonymous(cls, reason: Reason, now: datetime) -> "Letter":
        """Nothing but that it was."""
        return cls(None, "", "", "", reason, "The user was removed; nothing of it is kept.", None, now)


_Group = tuple[datetime, str, str, Reason]  # minute, name, source, reason
_Place = tuple[datetime, UserId | None, Reason]  # minute, user, reason


async def add(connection: Transaction, letters: Sequence[Letter], kept: int) -> None:
    """Store letters; of each user, reason and minute the first `kept` with their payload.

    All names that are no user's count as one, and of those the first ones of a minute are kept.
    """
    room: dict[_Place, int] = {}
    names: dict[_Place, set[str]] = {}
    whole: list[Letter] = []
    counted: dict[_Group, Letter] = {}
    for letter in map(_bounded, letters):
        minute = _minute(letter.last)
        place = (minute, letter.user_id, letter.reason)
        if letter.user_id is None:
            if place not in names:
                names[place] = await _names(connection, place)
            letter = letter if _join(names[place], letter.name) else replace(letter, name="", payload=None)
        if letter.payload is not None:
            if place not in room:
                room[place] = kept - await _payloads(connection, place)
            if room[place] > 0:
                room[place] -= 1
                whole.append(letter)
                continue
        group = (minute, letter.name, letter.source, letter.reason)
        before = counted.get(group)
        count = letter.count + (before.count if before else 0)
        counted[group] = replace(letter, payload=None, count=count)
    if whole:
        await connection.execute(sa.insert(table), [_row(letter) for letter in whole])
    for group, letter in counted.items():
        await _count(connection, group, letter)


async def page(connection: Transaction, user_id: UserId | None, after: int, limit: int) -> list[Letter]:
    query = sa.select(table).where(table.c.id > after).order_by(table.c.id).limit(limit)
    if user_id is not None:
        query = query.where(table.c.user_id == user_id)
    return [_letter(row) for row in await connection.execute(query)]


async def get(connection: Transaction, letter_id: int, user_id: UserId | None) -> Letter | None:
    query = sa.select(table).where(table.c.id == letter_id)
    if user_id is not None:
        query = query.where(table.c.user_id == user_id)
    row = (await connection.execute(query)).one_or_none()
    return _letter(row) if row else None


async def drop(connection: Transaction, ids: Sequence[int]) -> int:
    return int((await connection.execute(sa.delete(table).where(table.c.id.in_(ids)))).rowcount)


async def prune(connection: Transaction, limit: datetime) -> int:
    return int((await connection.execute(sa.delete(table).where(table.c.last < limit))).rowcount)


async def forget(connection: Transaction, user_id: UserId, name: str) -> int:
    """Remove the user's letters, and those from before there was a user of this name."""
    mine = (table.c.user_id == user_id) | (table.c.name == name)
    return int((await connection.execute(sa.delete(table).where(mine))).rowcount)


def _of(place: _Place) -> sa.ColumnElement[bool]:
    minute, user_id, reason = place
    return (table.c.minute == minute) & (table.c.reason == reason) & table.c.user_id.is_not_distinct_from(user_id)


async def _payloads(connection: Transaction, place: _Place) -> int:
    query = sa.select(sa.func.count()).where(_of(place), table.c.payload.is_not(None))
    return int((await connection.execute(query)).scalar_one())


async def _names(connection: Transaction, place: _Place) -> set[str]:
    return set((await connection.execute(sa.select(table.c.name).where(_of(place)).distinct())).scalars())


def _join(names: set[str], name: str) -> bool:
    """Whether there is still room for the name."""
    if len(names) < MAX_NAMES:
        names.add(name)
    return name in names


async def _count(connection: Transaction, group: _Group, letter: Letter) -> None:
    minute, name, source, reason = group
    this = (table.c.minute == minute) & (table.c.name == name) & (table.c.source == source)
    this &= (table.c.reason == reason) & table.c.payload.is_(None)
    more = {"count": table.c.count + letter.count, "last": letter.last}
    if not (await connection.execute(sa.update(table).where(this).values(**more))).rowcount:
        await connection.execute(sa.insert(table).values(**_row(letter)))


def _bounded(letter: Letter) -> Letter:
    """A topic may claim any name: what is kept of it is short and printable."""
    return replace(letter, name=_printable(letter.name, MAX_NAME), kind=_printable(letter.kind, MAX_KIND))


def _printable(text: str, most: int) -> str:
    """What is cut short says so: it must not pass for the shorter name of somebody else."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in text)


def _minute(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)


def _row(letter: Letter) -> dict[str, object]:
    names = ("user_id", "name", "kind", "source", "reason", "detail", "payload", "count", "last")
    values = {name: getattr(letter, name) for name in names}
    return {**values, "minute": _minute(letter.last), "first": letter.first or letter.last}


def _letter(row: sa.Row[tuple[object, ...]]) -> Letter:
    values = row._asdict()
    del values["minute"]
    return Letter(**{**values, "reason": Reason(values["reason"])})
