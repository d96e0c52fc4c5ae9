"""Where the messages of a request stand among the stored turns of their user.

Clients send the whole conversation again and again. What has a stored chain is known; the rest is new and follows the
last known turn. A deleted turn stays known by its chain, so that a client cannot bring it back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from persona.domain import EntryId, Role, UserId
from persona.errors import NotFound
from storage import identity
from storage.database import Transaction
from storage.identity import Turn, link
from storage.tables import deletions, entries, users

_BATCH = 500  # chains asked for in one query
_STARTS = 8  # places where a conversation may be picked up in its middle


@dataclass(frozen=True, slots=True)
class Match:
    """`stored` are the known turns still there; `new` follows them, with chains in `chains`."""

    conversation: str
    stored: tuple[EntryId, ...]
    new: tuple[Turn, ...]
    chains: tuple[bytes, ...]
    last: bytes  # chain after the last message


@dataclass(frozen=True, slots=True)
class _Path:
    """Chains of all turns of a request, with what is known of them."""

    chains: list[bytes]
    rows: list[sa.Row[Any] | None]  # the stored turn of each chain
    seen: int  # so many turns are known, stored or deleted
    under: sa.Row[Any] | None = None  # the stored turn before the first one


async def match(connection: Transaction, user_id: UserId, turns: Sequence[Turn], conversation: str | None) -> Match:
    """Match `turns` against the user's history; `conversation`: the id that the client gave, if any.

    Raises NotFound if the user was forgotten.
    """
    start = identity.seed(await salt(connection, user_id), conversation)
    path = await _look_up(connection, user_id, identity.links(start, turns))
    if turns and not path.seen:
        path = await _resume(connection, user_id, turns, conversation) or path
    stored = [row for row in (path.under, *path.rows[: path.seen]) if row is not None]
    return Match(
        conversation=conversation or await _conversation(connection, user_id, path, stored, start),
        stored=tuple(EntryId(row.id) for row in stored),
        new=tuple(turns[path.seen :]),
        chains=tuple(path.chains[path.seen :]),
        last=path.chains[-1] if path.chains else start,
    )


async def salt(connection: Transaction, user_id: UserId) -> bytes:
    """What makes the user's hashes unlike anyone else's. Raises NotFound if the user was forgotten."""
    found = (await connection.execute(sa.select(users.c.salt).where(users.c.id == user_id))).scalar_one_or_none()
    if found is None:
        raise NotFound("There is no such user.")
    return bytes(found)


def mark(salt: bytes, digest: bytes) -> bytes:
    """By which a deleted turn is known wherever it stands. Its words can only be guessed, by who has the salt."""
    return link(salt, digest)


async def _look_up(connection: Transaction, user_id: UserId, chains: list[bytes]) -> _Path:
    rows: dict[bytes, sa.Row[Any]] = {}
    gone: set[bytes] = set()
    for begin in range(0, len(chains), _BATCH):
        batch = chains[begin : begin + _BATCH]
        query = sa.select(entries).where(entries.c.user_id == user_id, entries.c.chain.in_(batch))
        rows |= {row.chain: row for row in await connection.execute(query.order_by(entries.c.id))}
        mine = sa.select(deletions.c.digest).where(deletions.c.user_id == user_id, deletions.c.digest.in_(batch))
        gone |= set((await connection.execute(mine)).scalars())
    seen = max((at for at, chain in enumerate(chains, 1) if chain in rows or chain in gone), default=0)
    return _Path(chains, [rows.get(chain) for chain in chains], seen)


async def _resume(
    connection: Transaction, user_id: UserId, turns: Sequence[Turn], conversation: str | None
) -> _Path | None:
    """The place where a client goes on that no longer sends the beginning, if there is one."""
    if len(turns) > 1:
        return await _middle(connection, user_id, turns, conversation)
    return await _end(connection, user_id, turns[0], conversation) if conversation else None


async def _middle(
    connection: Transaction, user_id: UserId, turns: Sequence[Turn], conversation: str | None
) -> _Path | None:
    """The longest match that begins at a turn, stored or deleted, equal to the first message and knows the second one
    too."""
    first = turns[0].digest
    query = sa.select(entries.c.chain).where(entries.c.user_id == user_id, entries.c.digest == first)
    if conversation:
        query = query.where(entries.c.conversation == conversation)
    chains = (await connection.execute(query.order_by(entries.c.id.desc()).limit(_STARTS))).scalars().all()
    hidden = mark(await salt(connection, user_id), first)
    query = sa.select(deletions.c.digest).where(deletions.c.user_id == user_id, deletions.c.turn == hidden)
    gone = (await connection.execute(query.limit(_STARTS))).scalars().all()
    best = None
    for chain in (*chains, *gone):
        path = await _look_up(connection, user_id, [chain, *identity.links(chain, turns[1:])])
        if conversation and any(row is not None and row.conversation != conversation for row in path.rows):
            continue
        if path.seen > max(1, best.seen if best else 0):
            best = path
    return best


async def _end(connection: Transaction, user_id: UserId, turn: Turn, conversation: str) -> _Path | None:
    """For a client that names the conversation and sends the newest message alone: the end of that conversation."""
    mine = (entries.c.user_id == user_id) & (entries.c.conversation == conversation)
    query = sa.select(entries).where(mine).order_by(entries.c.id.desc())
    tail = (await connection.execute(query.limit(1))).one_or_none()
    if tail is None:
        return None
    asked = (await connection.execute(query.where(entries.c.role == Role.USER).limit(1))).one_or_none()
    if asked is not None and asked.digest == turn.digest:
        return await _look_up(connection, user_id, [asked.chain])
    path = await _look_up(connection, user_id, [identity.link(tail.chain, turn.digest)])
    return replace(path, under=tail)


async def _conversation(
    connection: Transaction, user_id: UserId, path: _Path, stored: Sequence[sa.Row[Any]], start: bytes
) -> str:
    """That of the last known turn, unless something else follows it already: then a branch begins."""
    new = path.chains[path.seen :]
    if not stored:
        return identity.name(path.chains[0] if path.chains else start)
    last = stored[-1]
    follow = (entries.c.user_id == user_id) & (entries.c.parent == last.id)
    if new and (await connection.execute(sa.select(entries.c.id).where(follow).limit(1))).first():
        return identity.name(new[0])
    return str(last.conversation)
