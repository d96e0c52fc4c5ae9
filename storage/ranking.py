"""Which of a user's entries answer a question best: BM25, counted over that user's entries alone.

The index is shared, its own ranking would be too: then a user could read from an order how often others use a word.
Of each word the newest entries count, so that the work is bounded however long the history is.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import sqlalchemy as sa

from persona.domain import EntryId, UserId
from storage import database
from storage.database import Transaction
from storage.tables import entries

_MOST = 2000  # entries of one word
_LAST = 2**63 - 1
_SATURATION = 1.2  # k1 and b of Robertson and Zaragoza, «The Probabilistic Relevance Framework» (2009)
_LENGTH = 0.75


async def best(
    connection: Transaction, user_id: UserId, phrases: Sequence[str], before: EntryId | None
) -> list[EntryId]:
    """Entries that hold any of the `words.phrases`, best first; among equals the newest."""
    if not phrases:
        return []
    columns = sa.func.count().label("entries"), sa.func.avg(entries.c.tokens).label("tokens")
    everything = (await connection.execute(sa.select(*columns).where(entries.c.user_id == user_id))).one()
    below = _LAST if before is None else before
    found = (await connection.execute(database.hits(user_id, phrases, below, _MOST))).all()
    counts = Counter(row.phrase for row in found)
    scores: defaultdict[EntryId, float] = defaultdict(float)
    for row in found:
        rarity = math.log(1 + (everything.entries - counts[row.phrase] + 0.5) / (counts[row.phrase] + 0.5))
        scores[EntryId(row.id)] += rarity * _weight(row.tokens / (everything.tokens or 1.0))
    return sorted(scores, key=lambda entry_id: (-scores[entry_id], -entry_id))


def _weight(length: float) -> float:
    """What one occurrence is worth in an entry of this length, relative to the average."""
    return (_SATURATION + 1) / (1 + _SATURATION * (1 - _LENGTH + _LENGTH * length))
