"""Which of a user's entries answer a question best: BM25, counted over that user's entries alone.

The index is shared, its own ranking would be too: then a user could read from an order how often others use a word.
Of each word the newest entries count, and the newest ten thousand of all say how rare a word is, so that the work is
bounded however long the history is.
"""

import heapq
import json
import math
from collections import defaultdict
from collections.abc import Collection, Sequence

import sqlalchemy as sa

from persona.domain import EntryId, UserId
from storage import fulltext
from storage.database import Transaction
from storage.tables import entries

_MOST = 2000  # entries of one word
_WINDOW = 10_000  # newest entries over which rarity and the usual length are counted
_LAST = 2**63 - 1
_SATURATION = 1.2  # k1 and b of Robertson and Zaragoza, «The Probabilistic Relevance Framework» (2009)
_LENGTH = 0.75


async def best(
    connection: Transaction,
    user_id: UserId,
    phrases: Sequence[str],
    before: EntryId | None,
    *,
    exclude: Collection[EntryId],
    limit: int,
) -> list[EntryId]:
    """`limit` entries that hold any of the `words.phrases`, best first; among equals the newest."""
    if not phrases:
        return []
    newest = sa.select(entries.c.id, entries.c.tokens).where(entries.c.user_id == user_id)
    window = newest.order_by(entries.c.id.desc()).limit(_WINDOW).subquery()
    columns = (
        sa.func.count().label("entries"),
        sa.func.avg(window.c.tokens).label("tokens"),
        sa.func.min(window.c.id).label("first"),
    )
    everything = (await connection.execute(sa.select(*columns))).one()
    below = _LAST if before is None else before
    found = await connection.execute(fulltext.hits(user_id, phrases, below, _MOST))
    weights: dict[int, float] = {}  # by tokens
    scores: defaultdict[int, float] = defaultdict(float)
    for row in found:
        ids, lengths = json.loads(row.ids), json.loads(row.tokens)
        held = sum(entry_id >= everything.first for entry_id in ids)
        rarity = math.log(1 + (everything.entries - held + 0.5) / (held + 0.5))
        weights |= {length: _weight(length / (everything.tokens or 1.0)) for length in {*lengths} - weights.keys()}
        for entry_id, length in zip(ids, lengths, strict=True):
            scores[entry_id] += rarity * weights[length]
    for entry_id in exclude:
        scores.pop(entry_id, None)
    first = heapq.nsmallest(limit, scores, key=lambda entry_id: (-scores[entry_id], -entry_id))
    return [EntryId(entry_id) for entry_id in first]


def _weight(length: float) -> float:
    """What one occurrence is worth in an entry of this length, relative to the average."""
    return (_SATURATION + 1) / (1 + _SATURATION * (1 - _LENGTH + _LENGTH * length))
