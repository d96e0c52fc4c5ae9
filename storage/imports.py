"""Uploaded history: each item is stored once, under its own id or, without one, under its time and text.

A line of an export names the entry that it was: where that still says the same, nothing is stored again. A deleted item
does not come back with the next upload, nor does a deleted turn of an export. Times in the future are set to now.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from persona.domain import EntryId, Line, Origin, Role, UserId
from persona.errors import Unprocessable
from storage import identity, insertion, turns
from storage.database import Transaction
from storage.tables import deletions, entries

MAX_CHARS = 2 << 20  # of one item's text, and of its context: what a chat may say, which an export holds
_BATCH = 500  # items of one transaction
_BATCH_CHARS = 1 << 20  # above which it takes no more
_BREATH = 50  # texts counted before others may run
_CONVERSATION = "import"


@dataclass(frozen=True, slots=True)
class ImportItem:
    """One item of uploaded history. Raises Unprocessable without text or time zone, or if it is too long."""

    text: str
    ts: datetime
    id: str | None = None
    context: tuple[Line, ...] = ()
    role: Role = Role.USER
    entry: EntryId | None = None  # which of the user's entries it was when it was exported, perhaps from elsewhere

    def __post_init__(self) -> None:
        if not identity.clean(self.role, self.text):
            raise Unprocessable("The item has no text.", param="text")
        if len(self.text) > MAX_CHARS:
            raise Unprocessable(f"The text is longer than {MAX_CHARS} characters: split it.", param="text")
        if self.size - len(self.text) > MAX_CHARS:
            raise Unprocessable(f"The context is longer than {MAX_CHARS} characters: shorten it.", param="context")
        if self.ts.tzinfo is None:
            raise Unprocessable("The time has no zone.", param="ts")
        if self.role not in (Role.USER, Role.ASSISTANT):
            raise Unprocessable("The item is neither the user's nor the assistant's.", param="role")

    @property
    def size(self) -> int:
        """Characters of the text and of its context."""
        return len(self.text) + sum(len(line.author) + len(line.text) for line in self.context)

    def key(self, salt: bytes) -> bytes:
        """What makes two items of a user the same."""
        named = f"id\0{self.id}" if self.id else f"text\0{self.ts.astimezone(UTC).isoformat()}\0{self.text}"
        return hashlib.sha256(salt + named.encode("utf-8", "surrogatepass")).digest()


@dataclass(slots=True)
class Batch:
    """The items of one transaction: so many, or fewer long ones."""

    items: list[ImportItem] = field(default_factory=list)
    size: int = 0

    def take(self, item: ImportItem) -> bool:
        """Add an item; whether the batch is full now."""
        self.items.append(item)
        self.size += item.size
        return len(self.items) == _BATCH or self.size >= _BATCH_CHARS


def batches(items: Iterable[ImportItem]) -> Iterator[Sequence[ImportItem]]:
    """`items` in pieces of one transaction each."""
    batch = Batch()
    for item in items:
        if batch.take(item):
            yield batch.items
            batch = Batch()
    if batch.items:
        yield batch.items


async def prepare(
    batch: Sequence[ImportItem], salt: bytes, count: Callable[[str], int], now: datetime
) -> dict[bytes, dict[str, Any]]:
    """The rows of a batch by key, tokens counted, without its own duplicates."""
    rows: dict[bytes, dict[str, Any]] = {}
    for start in range(0, len(batch), _BREATH):
        new: dict[bytes, ImportItem] = {}
        for item in batch[start : start + _BREATH]:
            if (key := item.key(salt)) not in rows:
                new.setdefault(key, item)
        rows |= await asyncio.to_thread(_rows, new, count, now)
    return rows


def _rows(items: dict[bytes, ImportItem], count: Callable[[str], int], now: datetime) -> dict[bytes, dict[str, Any]]:
    return {key: {**_row(item, count, now), "item": key, "was": item.entry} for key, item in items.items()}


async def store(connection: Transaction, user_id: UserId, rows: dict[bytes, dict[str, Any]]) -> int:
    """Store the rows that are new; how many that were."""
    held = sa.select(entries.c.item).where(entries.c.user_id == user_id, entries.c.item.in_(list(rows)))
    gone = sa.select(deletions.c.digest).where(deletions.c.user_id == user_id, deletions.c.digest.in_(list(rows)))
    seen = {*(await connection.execute(held)).scalars(), *(await connection.execute(gone)).scalars()}
    seen |= await _exported(connection, user_id, {key: row for key, row in rows.items() if row["was"] is not None})
    new = [{"user_id": user_id, **row} for key, row in rows.items() if key not in seen]
    for row in new:
        del row["was"]
    await insertion.insert(connection, new)
    return len(new)


async def _exported(connection: Transaction, user_id: UserId, rows: dict[bytes, dict[str, Any]]) -> set[bytes]:
    """Of lines of an export: those that are here under their own ids, and those whose turns were deleted here."""
    if not rows:
        return set()
    columns = (entries.c.id, entries.c.role, entries.c.text, entries.c.ts)
    here = sa.select(*columns).where(
        entries.c.user_id == user_id, entries.c.id.in_([row["was"] for row in rows.values()])
    )
    known = {(one.id, one.role, one.text, one.ts) for one in await connection.execute(here)}
    found = {key for key, row in rows.items() if (row["was"], row["role"], row["text"], row["ts"]) in known}
    salt, ids = await turns.salt(connection, user_id), {one[0] for one in known}
    marks = {
        key: turns.mark(salt, identity.digest(row["role"], row["text"]))
        for key, row in rows.items()
        if row["was"] not in ids
    }
    mine = sa.select(deletions.c.turn).where(deletions.c.user_id == user_id, deletions.c.turn.in_(list(marks.values())))
    deleted = set((await connection.execute(mine)).scalars())
    return found | {key for key, mark in marks.items() if mark in deleted}


def _row(item: ImportItem, count: Callable[[str], int], now: datetime) -> dict[str, Any]:
    text = identity.clean(item.role, item.text)
    lines = [[identity.printable(line.author), identity.printable(line.text)] for line in item.context]
    return {
        "role": item.role,
        "text": text,
        "ts": min(item.ts, now),
        "origin": Origin.IMPORT,
        "conversation": _CONVERSATION,
        "tokens": count(text),
        "context": lines or None,
    }
