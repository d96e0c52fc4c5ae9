"""The full-text index over entries: an FTS5 table beside theirs, with each row's owner as a word of its own."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from persona.domain import UserId
from storage import words
from storage.database import Transaction


def create(connection: sa.Connection) -> None:
    """Make the full-text table (the first migration calls this)."""
    connection.exec_driver_sql(
        "CREATE VIRTUAL TABLE entries_fts USING fts5(owner, words, tokenize = 'porter unicode61 remove_diacritics 2')"
    )


async def add(connection: Transaction, user_id: UserId, texts: Sequence[tuple[int, str]]) -> None:
    """Make entries of a user findable: `texts` are (entry id, text)."""
    rows = [{"id": entry_id, "owner": f"u{user_id}", "words": words.indexed(text)} for entry_id, text in texts]
    if rows:
        insert = "INSERT INTO entries_fts(rowid, owner, words) VALUES (:id, :owner, :words)"
        await connection.execute(sa.text(insert), rows)


async def remove(connection: Transaction, ids: sa.Select[Any]) -> None:
    """Take the entries that `ids` selects out of the index; call it before they are deleted."""
    table = sa.table("entries_fts", sa.column("rowid"))
    await connection.execute(sa.delete(table).where(table.c.rowid.in_(ids)))


def hits(user_id: UserId, phrases: Sequence[str], before: int, most: int) -> sa.TextClause:
    """The user's entries below `before` that hold each of the `words.phrases`, the newest `most` of each phrase.

    One row a phrase, its ids and their entries' tokens as lists in JSON: ten thousands of hits are too many for rows.
    The cross join keeps the index in front of the table.
    """
    one = """SELECT json_group_array(id) AS ids, json_group_array(tokens) AS tokens
        FROM (SELECT entries.id, entries.tokens FROM entries_fts CROSS JOIN entries ON entries.id = entries_fts.rowid
        WHERE entries_fts MATCH :p{at} AND entries.user_id = :user AND entries_fts.rowid < :before
        ORDER BY entries_fts.rowid DESC LIMIT :most)"""
    asked = {f"p{at}": f'owner : "u{user_id}" AND words : {phrase}' for at, phrase in enumerate(phrases)}
    every = sa.text(" UNION ALL ".join(one.format(at=at) for at in range(len(phrases))))
    return every.bindparams(user=user_id, before=before, most=most, **asked)
