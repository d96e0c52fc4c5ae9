"""New entries, many at once, with their place in the search index. Runs inside a transaction that the caller opened.

Nobody else writes meanwhile, so the new ids are those above the last one: asking for each as it is made would cost a
round trip a row.
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from persona.domain import UserId
from storage import fulltext
from storage.database import Transaction
from storage.tables import entries


async def insert(connection: Transaction, rows: Sequence[dict[str, Any]]) -> list[int]:
    """The ids of the new entries, in order."""
    if not rows:
        return []
    last = (await connection.execute(sa.select(sa.func.coalesce(sa.func.max(entries.c.id), 0)))).scalar_one()
    await connection.execute(sa.insert(entries), rows)
    made = await connection.execute(sa.select(entries.c.id).where(entries.c.id > last).order_by(entries.c.id))
    ids = list(made.scalars())
    by_user: dict[UserId, list[tuple[int, str]]] = {}
    for entry_id, row in zip(ids, rows, strict=True):
        by_user.setdefault(row["user_id"], []).append((entry_id, row["text"]))
    for user_id, texts in by_user.items():
        await fulltext.add(connection, user_id, texts)
    return ids
