"""A user's history: turns and later events, in the order of their ids.

A turn is stored once, however often a client sends it. Nothing here holds a transaction while it counts tokens.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from persona.domain import Entry, EntryId, Finish, Line, Message, Origin, Role, UserId, VersionState
from persona.errors import NotFound, RequestError
from storage import fulltext, identity, imports, lineage, ranking, turns, words
from storage.database import Database, Transaction, reading, writing
from storage.failpoints import reach
from storage.identity import Turn
from storage.imports import ImportItem
from storage.tables import deletions, entries, events, live_checks, users

__all__ = ["History", "ImportItem", "Placement"]

T = TypeVar("T")

PAGE_BYTES = 4 << 20

_OWN = (Origin.CHAT, Origin.IMPORT, Origin.EVENT)
_START = EntryId(0)
_MOST_FOUND = 1000
_HAPPENED = 16  # events of devices among recent entries
_LONG = 4096  # characters whose tokens are not counted on the event loop


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request stands in history."""

    conversation: str
    known: tuple[EntryId, ...]  # the stored turns of this conversation, in order, those stored just now included
    tail: EntryId | None  # the last of them
    user_entry: EntryId | None  # the newest user turn if it was stored just now
    chain: bytes = field(default=b"", repr=False)  # what a reply to it follows


class History:
    """Everything that users said and were told."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def view(self, work: Coroutine[Any, Any, T]) -> T:
        """All that `work` reads of the database, here and elsewhere, is one view of it; it waits for nothing else."""
        return await self._db.at_once(work)

    async def place(
        self,
        user_id: UserId,
        messages: Sequence[Message],
        *,
        conversation_id: str | None,
        now: datetime,
        count: Callable[[str], int],
        store: bool = True,
    ) -> Placement:
        """Recognise the turns of a request and store the new ones. `count` gives the tokens of a text.

        Without `store` nothing is written. Raises NotFound if the user was forgotten.
        """
        said = identity.turns(messages)
        found = await self._match(user_id, said, conversation_id)
        if not store or not found.new:
            return _placement(found, found.stored, None)
        lengths = await _lengths([turn.text for turn in found.new], count)
        found, stored = await self._append(user_id, said, conversation_id, lengths, now)
        asked = [entry for entry, turn in zip(stored, found.new, strict=True) if turn.role == Role.USER]
        return _placement(found, found.stored + tuple(stored), asked[-1] if asked else None)

    @reading
    async def _match(self, user_id: UserId, said: Sequence[Turn], conversation: str | None) -> turns.Match:
        async with self._db.read() as connection:
            return await turns.match(connection, user_id, said, conversation)

    @writing
    async def _append(
        self,
        user_id: UserId,
        said: Sequence[Turn],
        conversation: str | None,
        lengths: dict[str, int],
        now: datetime,
    ) -> tuple[turns.Match, list[EntryId]]:
        """Match again, and store what is new."""
        async with self._db.write() as connection:
            found = await turns.match(connection, user_id, said, conversation)
            return found, await _append(connection, user_id, found, lengths, now)

    @writing
    async def reply(
        self,
        user_id: UserId,
        placement: Placement,
        text: str,
        *,
        finish: Finish,
        version: int | None,
        now: datetime,
        tokens: int,
    ) -> EntryId | None:
        """Store what persona answered. None if there is nothing to store, or nobody any more to store it for."""
        turn = _reply(text)
        if not turn.text:
            return None
        values = {
            **_turn(user_id, turn, placement.conversation, identity.link(placement.chain, turn.digest), now),
            "origin": Origin.REPLY,
            "tokens": tokens,
            "version": version,
            "finish": finish,
        }
        async with self._db.write() as connection:
            if not await _exists(connection, user_id):
                return None
            if same := await _same_reply(connection, values):
                return same
            parent = await _row(connection, user_id, placement.tail) if placement.tail else None
            return await _insert(connection, {**values, "parent": parent.id if parent else None})

    @reading
    async def since(
        self, user_id: UserId, watermark: EntryId, *, limit: int | None = None, roles: Collection[Role] | None = None
    ) -> list[Entry]:
        """Entries after `watermark`, oldest first; the first `limit` of them."""
        query = _mine(user_id).where(entries.c.id > watermark).order_by(entries.c.id).limit(limit)
        if roles is not None:
            query = query.where(entries.c.role.in_(list(roles)))
        return await self._all(query)

    @reading
    async def recent(
        self,
        user_id: UserId,
        after: EntryId,
        *,
        exclude: Collection[EntryId],
        limit: int,
        through: EntryId | None = None,
    ) -> list[Entry]:
        """The newest `limit` entries after `after`, up to `through`, that are not excluded, oldest first.

        Of what merely happened (events that are nobody's words) only the newest few: a chatty device must not crowd out
        what was said.
        """
        most = limit + len(exclude)
        mine = (entries.c.user_id == user_id) & (entries.c.id > after)
        if through is not None:
            mine &= entries.c.id <= through
        newest = sa.select(entries.c.id).where(mine).order_by(entries.c.id.desc())
        # Each role by its index: a question must not wait until a million events have been passed over.
        said = [newest.where(entries.c.role == role).limit(most) for role in (Role.USER, Role.ASSISTANT)]
        happened = newest.where(entries.c.role == Role.TOOL).limit(_HAPPENED)
        few = sa.union_all(*(sa.select(some.subquery()) for some in (*said, happened)))
        query = _mine(user_id).where(entries.c.id.in_(few)).order_by(entries.c.id.desc()).limit(most)
        return _without(await self._all(query), exclude, limit)[::-1]

    @reading
    async def conversation(self, user_id: UserId, tail: EntryId) -> list[Entry]:
        """The turns that lead to `tail`, and it, in order."""
        up = sa.select(entries.c.id, entries.c.parent).where(entries.c.user_id == user_id, entries.c.id == tail)
        chain = up.cte("chain", recursive=True)
        parents = sa.select(entries.c.id, entries.c.parent).join(chain, entries.c.id == chain.c.parent)
        chain = chain.union_all(parents)
        return await self._all(_mine(user_id).where(entries.c.id.in_(sa.select(chain.c.id))).order_by(entries.c.id))

    @reading
    async def live(self, user_id: UserId, since: datetime, *, limit: int) -> list[EntryId]:
        """The newest reply of each conversation that had one at or after `since`, newest first."""
        mine = (entries.c.user_id == user_id) & (entries.c.origin == Origin.REPLY) & (entries.c.ts >= since)
        newest = sa.func.max(entries.c.id)
        query = sa.select(newest).where(mine).group_by(entries.c.conversation).order_by(newest.desc()).limit(limit)
        async with self._db.read() as connection:
            return [EntryId(entry_id) for entry_id in (await connection.execute(query)).scalars()]

    @reading
    async def get(self, user_id: UserId, entry_id: EntryId) -> Entry | None:
        found = await self._all(_mine(user_id).where(entries.c.id == entry_id))
        return found[0] if found else None

    async def page(self, user_id: UserId, *, after: EntryId = _START, limit: int = 100) -> list[Entry]:
        """Entries after `after`, oldest first: up to `limit` of them with PAGE_BYTES of text, but one at least."""
        size = _bytes(entries.c.text) + _bytes(entries.c.context) + _bytes(entries.c.correction)
        some = _mine(user_id).with_only_columns(entries.c.id, size.label("size")).where(entries.c.id > after)
        few = some.order_by(entries.c.id).limit(limit).subquery()
        behind = (sa.func.sum(few.c.size).over(order_by=few.c.id) - few.c.size).label("behind")
        sized = sa.select(few.c.id, behind).subquery()
        fitting = sa.select(sized.c.id).where(sized.c.behind < PAGE_BYTES)
        return await self._all(_mine(user_id).where(entries.c.id.in_(fitting)).order_by(entries.c.id))

    @reading
    async def search(
        self,
        user_id: UserId,
        text: str,
        *,
        limit: int,
        before: EntryId | None = None,
        exclude: Collection[EntryId] = (),
    ) -> list[Entry]:
        """The user's entries that share words with `text`, best first. Whatever stands in `text` is only words."""
        phrases = words.phrases(identity.printable(text))
        most = min(limit, _MOST_FOUND)
        async with self._db.read() as connection:
            ids = await ranking.best(connection, user_id, phrases, before, exclude=exclude, limit=most)
            found = await connection.execute(_mine(user_id).where(entries.c.id.in_(ids)))
            by_id = {row.id: _entry(row) for row in found}
        return [by_id[entry_id] for entry_id in ids]

    @reading
    async def own_tokens(self, user_id: UserId, after: EntryId) -> int:
        """Tokens of the user's own words after `after`."""
        mine = (entries.c.user_id == user_id) & (entries.c.id > after)
        own = (entries.c.role == Role.USER) & entries.c.origin.in_(_OWN)
        query = sa.select(sa.func.coalesce(sa.func.sum(entries.c.tokens), 0)).where(mine, own)
        async with self._db.read() as connection:
            return int((await connection.execute(query)).scalar_one())

    @reading
    async def last_id(self, user_id: UserId) -> EntryId:
        """The user's newest entry, 0 without any."""
        query = sa.select(sa.func.coalesce(sa.func.max(entries.c.id), 0)).where(entries.c.user_id == user_id)
        async with self._db.read() as connection:
            return EntryId((await connection.execute(query)).scalar_one())

    async def import_(
        self, user_id: UserId, items: Iterable[ImportItem], *, count: Callable[[str], int], now: datetime
    ) -> tuple[int, int]:
        """Store uploaded history as (stored, duplicates), a batch a transaction. Importing twice stores once."""
        stored = duplicates = 0
        async with self._db.read() as connection:
            salt = await turns.salt(connection, user_id)
        for batch in imports.batches(items):
            prepared = await imports.prepare(batch, salt, count, now)
            async with self._db.write() as connection:
                await _demand(connection, user_id)
                kept = await imports.store(connection, user_id, prepared)
            stored += kept
            duplicates += len(batch) - kept
        return stored, duplicates

    async def feedback(self, user_id: UserId, entry_id: EntryId, rating: int | None, correction: str | None) -> Entry:
        """Rate or correct one of persona's replies. None leaves a value as it is; 0 and "" take it back."""
        if rating not in (None, -1, 0, 1):
            raise RequestError("A rating is 1, -1 or 0.", param="rating")
        values: dict[str, Any] = {} if rating is None else {"rating": rating or None}
        if correction is not None:
            values["correction"] = identity.clean(Role.ASSISTANT, correction) or None
        async with self._db.write() as connection:
            row = await _row(connection, user_id, entry_id)
            if row is None or row.origin != Origin.REPLY:
                raise NotFound("There is no such reply.")
            if values:
                await connection.execute(sa.update(entries).where(entries.c.id == entry_id).values(**values))
            return _entry(await _row(connection, user_id, entry_id) or row)

    async def delete(self, user_id: UserId, entry_id: EntryId) -> tuple[int, ...]:
        """Delete an entry, every version that absorbed it and whatever an open run has learned so far.

        Returns the versions' numbers. A client cannot bring the entry back.
        """
        async with self._db.write() as connection:
            row = await _row(connection, user_id, entry_id)
            if row is None:
                raise NotFound("There is no such entry.")
            numbers = await lineage.holders(connection, user_id, entry_id)
            await lineage.withdraw(connection, user_id, numbers, VersionState.DELETED)
            await lineage.void(connection, user_id)
            await _remove(connection, row)
            reach("delete-before-commit")
        reach("delete-after-commit")
        await self._db.removed(user_id, numbers)
        await self._db.scrub()
        return tuple(numbers)

    async def _all(self, query: sa.Select[Any]) -> list[Entry]:
        async with self._db.read() as connection:
            return [_entry(row) for row in await connection.execute(query)]


def _mine(user_id: UserId) -> sa.Select[Any]:
    return sa.select(entries).where(entries.c.user_id == user_id)


def _bytes(text: sa.Column[Any]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.length(sa.cast(text, sa.LargeBinary)), 0)


def _without(found: Sequence[Entry], exclude: Collection[EntryId], limit: int) -> list[Entry]:
    left = set(exclude)
    return [entry for entry in found if entry.id not in left][:limit]


async def _lengths(texts: list[str], count: Callable[[str], int]) -> dict[str, int]:
    """Tokens of each text; those of long ones are counted beside the event loop."""

    def counted() -> dict[str, int]:
        return {text: count(text) for text in texts}

    return counted() if sum(map(len, texts)) < _LONG else await asyncio.to_thread(counted)


def _placement(found: turns.Match, known: tuple[EntryId, ...], asked: EntryId | None) -> Placement:
    return Placement(found.conversation, known, known[-1] if known else None, asked, found.last)


def _reply(text: str) -> Turn:
    text = identity.clean(Role.ASSISTANT, text)
    return Turn(Role.ASSISTANT, text, identity.digest(Role.ASSISTANT, text))


def _turn(user_id: UserId, turn: Turn, conversation: str, chain: bytes, now: datetime) -> dict[str, Any]:
    return {
        "user_id": user_id,
        "role": turn.role,
        "text": turn.text,
        "ts": now,
        "conversation": conversation,
        "digest": turn.digest,
        "chain": chain,
    }


async def _exists(connection: Transaction, user_id: UserId) -> bool:
    return (await connection.execute(sa.select(users.c.id).where(users.c.id == user_id))).first() is not None


async def _demand(connection: Transaction, user_id: UserId) -> None:
    if not await _exists(connection, user_id):
        raise NotFound("There is no such user.")


async def _row(connection: Transaction, user_id: UserId, entry_id: EntryId) -> sa.Row[Any] | None:
    found = await connection.execute(_mine(user_id).where(entries.c.id == entry_id))
    row: sa.Row[Any] | None = found.one_or_none()
    return row


async def _append(
    connection: Transaction, user_id: UserId, found: turns.Match, lengths: dict[str, int], now: datetime
) -> list[EntryId]:
    """Store the new turns of a match, each under the one before it."""
    parent = found.stored[-1] if found.stored else None
    stored = []
    for turn, chain in zip(found.new, found.chains, strict=True):
        values = _turn(user_id, turn, found.conversation, chain, now)
        tokens = lengths.get(turn.text, 0)
        parent = await _insert(connection, {**values, "origin": Origin.CHAT, "tokens": tokens, "parent": parent})
        stored.append(parent)
    return stored


async def _insert(connection: Transaction, values: dict[str, Any]) -> EntryId:
    made = await connection.execute(sa.insert(entries).values(**values).returning(entries.c.id))
    entry_id = EntryId(made.scalar_one())
    await fulltext.add(connection, values["user_id"], [(entry_id, values["text"])])
    return entry_id


async def _same_reply(connection: Transaction, values: dict[str, Any]) -> EntryId | None:
    """The reply that says the same in the same place, from the same version and to the same end."""
    same = [entries.c[name].is_not_distinct_from(values[name]) for name in ("version", "finish")]
    here = _mine(values["user_id"]).where(entries.c.chain == values["chain"], entries.c.origin == Origin.REPLY, *same)
    row = (await connection.execute(here.order_by(entries.c.id.desc()).limit(1))).one_or_none()
    return EntryId(row.id) if row else None


async def _remove(connection: Transaction, row: sa.Row[Any]) -> None:
    """Delete one entry: what followed it follows its parent now, and its hashes stay to recognise it."""
    await fulltext.remove(connection, sa.select(entries.c.id).where(entries.c.id == row.id))
    await connection.execute(sa.update(entries).where(entries.c.parent == row.id).values(parent=row.parent))
    became = (events.c.user_id == row.user_id) & (events.c.entry_id == row.id)
    await connection.execute(sa.update(events).where(became).values(entry_id=None))
    await connection.execute(sa.delete(live_checks).where(live_checks.c.entry_id == row.id))
    await connection.execute(sa.delete(entries).where(entries.c.id == row.id))
    turn = turns.mark(await turns.salt(connection, row.user_id), row.digest) if row.digest else None
    for digest in {row.chain, row.item} - {None}:
        mine = {"user_id": row.user_id, "digest": digest}
        if not (await connection.execute(sa.select(deletions).filter_by(**mine))).first():
            await connection.execute(sa.insert(deletions).values(**mine, turn=turn))


def _entry(row: sa.Row[Any]) -> Entry:
    return Entry(
        id=EntryId(row.id),
        user_id=UserId(row.user_id),
        role=Role(row.role),
        text=row.text,
        ts=row.ts,
        origin=Origin(row.origin),
        conversation=row.conversation,
        tokens=row.tokens,
        parent=row.parent,
        context=tuple(Line(author, text) for author, text in row.context or ()),
        version=row.version,
        finish=Finish(row.finish) if row.finish else None,
        rating=row.rating,
        correction=row.correction,
    )
