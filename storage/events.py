"""Events as they are stored: once each, all of a batch in one transaction, and refused ones beside them.

What a message says becomes an entry, a fact or a rating; its row in `events` only proves that it was counted. So when
`store` returns, the broker may forget the whole batch, and when it raises, nothing of it has happened.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from persona.domain import Fact, Origin, Role, UserId
from persona.event import FACTS, Event, Happening, Known, Rating, Reason, Words
from storage import dead, facts, failpoints, identity, insertion, lookup, sources, tables
from storage.database import Database, Transaction, reading, writing
from storage.dead import Letter
from storage.sources import Source
from storage.tables import deletions, deliveries, entries, events, users
from storage.whole import in_thread

__all__ = ["Arrived", "Events", "Letter", "Outcome", "Row", "Source"]

REMEMBERED = 10_000  # deliveries without a name that are recognised; the broker holds fewer unacknowledged


class Outcome(StrEnum):
    """What became of one message."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Arrived:
    """One message: an event of a user, or a letter that is dead on arrival.

    user: the name in its topic · delivery: recognises the very message if it comes again · again: whether the broker
    may have delivered it before.
    """

    user_id: UserId | None
    content: Event | Letter
    user: str = ""
    payload: bytes = b""
    delivery: bytes | None = None
    again: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """An event as its user sees it: what arrived, and the entry that it became."""

    id: int
    kind: str
    source: str
    seq: int | None
    ts: datetime
    received: datetime
    entry_id: int | None


@dataclass(slots=True)
class _Batch:
    """What one call of `store` knows on its way."""

    arrived: Sequence[Arrived]
    now: datetime
    items: list[bytes | None] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by place; without one: still to be stored
    letters: list[Letter] = field(default_factory=list)

    def waiting(self, kind: type | tuple[type, ...] = object) -> list[tuple[int, UserId, Event]]:
        """Events that nobody has decided on yet, whose body is of that kind."""
        return [
            (at, one.user_id, one.content)
            for at, one in enumerate(self.arrived)
            if at not in self.outcomes
            and one.user_id is not None
            and isinstance(one.content, Event)
            and isinstance(one.content.body, kind)
        ]


def _utcnow() -> datetime:
    return datetime.now(UTC)


class Events:
    """What arrived for every user: events, facts, sources and dead letters."""

    def __init__(self, db: Database, clock: Callable[[], datetime] = _utcnow) -> None:
        self._db = db
        self._clock = clock

    async def store(
        self, arrived: Sequence[Arrived], *, count: Callable[[str], int], now: datetime, kept: int | None = 100
    ) -> list[Outcome]:
        """Store a batch in its order, all or nothing; what became of each. Raises StorageFull or Busy.

        count: gives the tokens of a text · kept: payloads of dead letters kept per user, reason and minute; None: write
        no letter.
        """
        tokens = await in_thread(_count, arrived, count)
        batch = _Batch(arrived, now)
        await self._store(batch, tokens, kept)
        failpoints.reach("events-after-commit")
        return [batch.outcomes[at] for at in range(len(arrived))]

    @writing
    async def _store(self, batch: _Batch, tokens: dict[int, tuple[str, int]], kept: int | None) -> None:
        async with self._db.write() as connection:
            await _recognise(connection, batch)
            await _append(connection, batch, tokens)
            await _rate(connection, batch)
            await _know(connection, batch)
            await _conclude(connection, batch, kept)
            failpoints.reach("events-before-commit")

    @reading
    async def newest(self, user_id: UserId, *, before: int | None = None, limit: int = 100) -> list[Row]:
        """The newest `limit` events below the id `before`, newest first."""
        query = sa.select(*(events.c[name] for name in Row.__slots__)).where(events.c.user_id == user_id)
        if before is not None:
            query = query.where(events.c.id < before)
        async with self._db.read() as connection:
            found = await connection.execute(query.order_by(events.c.id.desc()).limit(limit))
            return [Row(**row._mapping) for row in found]

    @reading
    async def facts(self, user_id: UserId, kind: str | None = None, *, limit: int = 1000) -> list[Fact]:
        """What is known now, the newest first."""
        async with self._db.read() as connection:
            return await facts.known(connection, user_id, kind, limit)

    async def drop_fact(self, user_id: UserId, kind: str, key: str) -> bool:
        """Remove a fact or a state. False if there is none."""
        return await self._db.erase(lambda connection: facts.drop(connection, user_id, kind, key, self._clock()))

    @reading
    async def sources(self, user_id: UserId) -> list[Source]:
        """Where the user's events come from, and what is missing from each."""
        async with self._db.read() as connection:
            return await sources.of(connection, user_id)

    async def numbered(self) -> list[tuple[str, Source]]:
        """Every source that numbers its events, with the name of its user."""
        async with self._db.read() as connection:
            return await sources.everywhere(connection)

    async def missing(self) -> int:
        """Events of all users that their sources counted and that never arrived."""
        async with self._db.read() as connection:
            return await sources.missing(connection)

    async def letters(self, user_id: UserId | None, *, after: int = 0, limit: int = 100) -> list[Letter]:
        """Dead letters after the id `after`, oldest first: of a user, or of everybody and nobody."""
        async with self._db.read() as connection:
            return await dead.page(connection, user_id, after, limit)

    async def letter(self, letter_id: int, user_id: UserId | None = None) -> Letter | None:
        """A dead letter with its payload; with `user_id`, only if it is theirs."""
        async with self._db.read() as connection:
            return await dead.get(connection, letter_id, user_id)

    async def drop_letters(self, ids: Sequence[int]) -> int:
        """Remove dead letters; how many there were."""
        return await self._db.erase(lambda connection: dead.drop(connection, ids))

    async def prune(self, now: datetime, keep: timedelta) -> int:
        """Forget rows of events and dead letters older than `keep`; how many. Entries and facts stay, and repeats of
        an event that became an entry are still recognised by it.
        """
        limit = now - keep
        async with self._db.write() as connection:
            old = await connection.execute(sa.delete(events).where(events.c.received < limit))
            gone = int(old.rowcount) + await dead.prune(connection, limit)
        if gone:
            await self._db.scrub(entries=False)
        return gone


def _count(arrived: Sequence[Arrived], count: Callable[[str], int]) -> dict[int, tuple[str, int]]:
    """Cleaned text and its tokens, by place, of what will be entries."""
    counted: dict[int, tuple[str, int]] = {}
    for at, one in enumerate(arrived):
        body = one.content.body if isinstance(one.content, Event) else None
        if isinstance(body, Words | Happening):
            text = identity.clean(_role(body), body.text)
            counted[at] = text, count(text)
    return counted


def _role(body: Words | Happening) -> Role:
    """Only words are the user's own; what happened is nobody's speech, like a tool's output."""
    return Role.USER if isinstance(body, Words) else Role.TOOL


async def _recognise(connection: Transaction, batch: _Batch) -> None:
    """Decide on what was here before: by name, or, where there is none, by delivery."""
    salts = await _salts(connection, batch)
    gone = Arrived(None, Letter.anonymous(Reason.FORGOTTEN, batch.now))  # between arrival and now
    batch.arrived = [one if one.user_id is None or one.user_id in salts else gone for one in batch.arrived]
    batch.items = [_item(one, salts) for one in batch.arrived]
    known = await _known_items(connection, batch)
    delivered = await _delivered(connection, batch)
    for at, one in enumerate(batch.arrived):
        item = batch.items[at]
        name = (one.user_id, item) if item else None
        if name in known or (one.again and one.delivery in delivered):
            batch.outcomes[at] = Outcome.DUPLICATE
        elif one.delivery:
            delivered.add(one.delivery)
        if name:
            known.add(name)


async def _salts(connection: Transaction, batch: _Batch) -> dict[UserId, bytes]:
    ids = {one.user_id for one in batch.arrived if one.user_id is not None}
    found = await connection.execute(sa.select(users.c.id, users.c.salt).where(users.c.id.in_(ids)))
    return {UserId(row.id): row.salt for row in found}


def _item(one: Arrived, salts: dict[UserId, bytes]) -> bytes | None:
    if not isinstance(one.content, Event) or one.content.name is None or one.user_id not in salts:
        return None
    return hashlib.sha256(salts[one.user_id] + one.content.name).digest()


async def _known_items(connection: Transaction, batch: _Batch) -> set[tuple[UserId | None, bytes]]:
    """Names that are taken: by an event, by an entry that outlived its event's row, or by a deleted entry."""
    named = [(one.user_id, item) for one, item in zip(batch.arrived, batch.items, strict=True) if one.user_id and item]
    known: set[tuple[UserId | None, bytes]] = set()
    for table, column in ((events, "item"), (entries, "item"), (deletions, "digest")):
        query = sa.select(table.c.user_id, table.c[column].label("item"))
        known |= {(UserId(row.user_id), row.item) for row in await lookup.rows(connection, query, table, column, named)}
    return known


async def _delivered(connection: Transaction, batch: _Batch) -> set[bytes]:
    """Of the deliveries that may be repeats, those that are."""
    again = {one.delivery for one in batch.arrived if one.again and one.delivery}
    if not again:
        return set()
    query = sa.select(deliveries.c.digest).where(deliveries.c.digest.in_(again))
    return set((await connection.execute(query)).scalars())


async def _append(connection: Transaction, batch: _Batch, tokens: dict[int, tuple[str, int]]) -> None:
    """Words and happenings become entries."""
    places, rows = [], []
    for at, user_id, event in batch.waiting((Words, Happening)):
        assert isinstance(event.body, Words | Happening)
        text, length = tokens[at]
        if text:
            places.append(at)
            rows.append(_entry(user_id, event, text, length, batch.items[at]))
        else:  # thoughts and nothing else
            batch.outcomes[at] = Outcome.DEAD
            batch.letters.append(_letter(batch, at, Reason.BAD_PAYLOAD, "The text is empty."))
    ids = await insertion.insert(connection, rows)
    ledger = [_ledger(batch, at, entry_id) for at, entry_id in zip(places, ids, strict=True)]
    if ledger:
        await connection.execute(sa.insert(events), ledger)
    batch.outcomes |= dict.fromkeys(places, Outcome.STORED)


def _entry(user_id: UserId, event: Event, text: str, length: int, item: bytes | None) -> dict[str, Any]:
    body = event.body
    assert isinstance(body, Words | Happening)
    said = body.context if isinstance(body, Words) else ()
    lines = [[identity.printable(line.author), identity.printable(line.text)] for line in said]
    return {
        "user_id": user_id,
        "role": _role(body),
        "text": text,
        "ts": event.ts,
        "origin": Origin.EVENT,
        "conversation": f"{event.kind}/{event.source}" if event.source else event.kind,
        "tokens": length,
        "context": lines or None,
        "item": item,
    }


async def _rate(connection: Transaction, batch: _Batch) -> None:
    """Feedback weights a reply of the same user."""
    ledger = []
    for at, user_id, event in batch.waiting(Rating):
        assert isinstance(event.body, Rating)
        if await _weigh(connection, user_id, event.body):
            ledger.append(_ledger(batch, at, event.body.turn))
            batch.outcomes[at] = Outcome.STORED
        else:
            batch.outcomes[at] = Outcome.DEAD
            batch.letters.append(_letter(batch, at, Reason.UNKNOWN_TURN, "There is no such reply of this user."))
    if ledger:
        await connection.execute(sa.insert(events), ledger)


async def _weigh(connection: Transaction, user_id: UserId, body: Rating) -> bool:
    values: dict[str, Any] = {} if body.rating is None else {"rating": body.rating or None}
    if body.correction is not None:
        values["correction"] = identity.clean(Role.ASSISTANT, body.correction) or None
    mine = (entries.c.user_id == user_id) & (entries.c.id == body.turn) & (entries.c.origin == Origin.REPLY)
    return (await connection.execute(sa.update(entries).where(mine).values(**values))).rowcount > 0


async def _know(connection: Transaction, batch: _Batch) -> None:
    """Of facts and states the newest value of each key stays."""
    places = []
    newest: dict[facts.Place, Fact] = {}
    for at, user_id, event in batch.waiting(Known):
        assert isinstance(event.body, Known)
        assert event.kind in FACTS
        places.append(at)
        key, value = event.body.key, event.body.value
        fact = Fact(event.kind, key, identity.printable(value or "") or None, event.ts)
        before = newest.get((user_id, event.kind, key))
        if before is None or before.ts <= fact.ts:
            newest[user_id, event.kind, key] = fact
    await facts.learn(connection, newest, batch.now)
    if places:
        await connection.execute(sa.insert(events), [_ledger(batch, at, None) for at in places])
    batch.outcomes |= dict.fromkeys(places, Outcome.STORED)


def _ledger(batch: _Batch, at: int, entry_id: int | None) -> dict[str, Any]:
    one = batch.arrived[at]
    assert isinstance(one.content, Event)
    event = one.content
    return {
        "user_id": one.user_id,
        "kind": event.kind,
        "source": event.source,
        "item": batch.items[at],
        "seq": event.seq,
        "ts": event.ts,
        "received": batch.now,
        "entry_id": entry_id,
    }


def _letter(batch: _Batch, at: int, reason: Reason, detail: str) -> Letter:
    one = batch.arrived[at]
    assert isinstance(one.content, Event)
    event = one.content
    return Letter(one.user_id, one.user, event.kind, event.source, reason, detail, one.payload, batch.now)


async def _conclude(connection: Transaction, batch: _Batch, kept: int | None) -> None:
    """Letters, sequence numbers, and what recognises unnamed messages if they come again."""
    for at, one in enumerate(batch.arrived):
        if at not in batch.outcomes:
            assert isinstance(one.content, Letter)
            batch.outcomes[at] = Outcome.DEAD
            batch.letters.append(one.content)
    if kept is not None:
        await dead.add(connection, batch.letters, kept)
    await sources.note(connection, _seen(batch), batch.now)
    unnamed: list[dict[str, Any]] = [
        {"user_id": one.user_id, "digest": one.delivery}
        for at, one in enumerate(batch.arrived)
        if one.delivery and batch.outcomes[at] is not Outcome.DUPLICATE
        if batch.items[at] is None or batch.outcomes[at] is Outcome.DEAD
    ]
    if unnamed:
        await connection.execute(sa.insert(deliveries), unnamed)
        newest = sa.select(sa.func.max(deliveries.c.id) - REMEMBERED).scalar_subquery()
        await connection.execute(sa.delete(deliveries).where(deliveries.c.id <= newest))


def _seen(batch: _Batch) -> list[tuple[UserId, str, int | None, bool]]:
    """(user, source, seq, whether it was a duplicate) of every event, in order."""
    seen = []
    for at, one in enumerate(batch.arrived):
        if isinstance(one.content, Event) and one.user_id is not None and batch.outcomes[at] is not Outcome.DEAD:
            repeated = batch.outcomes[at] is Outcome.DUPLICATE
            seen.append((one.user_id, one.content.source, one.content.seq, repeated))
    return seen


async def forget(connection: Transaction, user_id: UserId, name: str) -> Counter[str]:
    """Delete what arrived for a user; counts by table."""
    counts: Counter[str] = Counter()
    for table in (events, tables.facts, tables.sources, deliveries):
        gone = await connection.execute(sa.delete(table).where(table.c.user_id == user_id))
        counts[table.name] = gone.rowcount
    counts["dead_letters"] = await dead.forget(connection, user_id, name)
    return counts
