"""Rows of several users at once, each found by its index.

Asked for values alone the database reads the whole table, and asked for users and values side by side it tries every
pair. So each user has a condition of their own. Runs inside a transaction that the caller opened.
"""

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from persona.domain import UserId
from storage.database import Transaction

_USERS = 100  # conditions in one query


async def rows(
    connection: Transaction,
    query: sa.Select[Any],
    table: sa.Table,
    column: str,
    wanted: Iterable[tuple[UserId, Any]],
    *also: sa.ColumnElement[bool],
) -> list[sa.Row[Any]]:
    """Rows of `query` that belong to a wanted (user, value of `column`). `also`: what their index asks in between."""
    values: dict[UserId, list[Any]] = {}
    for user_id, value in wanted:
        values.setdefault(user_id, []).append(value)
    each = [sa.and_(table.c.user_id == user_id, *also, table.c[column].in_(some)) for user_id, some in values.items()]
    found: list[sa.Row[Any]] = []
    for begin in range(0, len(each), _USERS):
        found += await connection.execute(query.where(sa.or_(*each[begin : begin + _USERS])))
    return found
