"""Live checks: one row for each message and the version that it judged, so that none counts twice.

A row holds numbers and no text. It goes with its message, with its user, and with a version that absorbed what was
deleted.
"""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from persona.domain import EntryId, UserId, VersionState
from storage import lineage
from storage.database import Database, Transaction
from storage.tables import entries, live_checks


@dataclass(frozen=True, slots=True)
class Checked:
    """What one message said: its loss under the serving version and under what it is compared with, in nats."""

    version: int
    against: int | None  # None: the bare base
    entry_id: EntryId
    tokens: int  # that were scored; 0: there was nothing in it to judge by
    serving: float | None  # None: not a finite number
    before: float | None


# Inside the class `list` is a method.
Rows = list[Checked]


class LiveChecks:
    """Every message that judged a version."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add(self, user_id: UserId, checked: Checked, now: datetime) -> bool:
        """Put it on record. False if it is there already, or if message or version are gone."""
        values = {
            "user_id": user_id,
            "version": checked.version,
            "entry_id": checked.entry_id,
            "against": checked.against,
            "tokens": checked.tokens,
            "nats_serving": _finite(checked.serving),
            "nats_before": _finite(checked.before),
            "created": now,
        }
        async with self._db.write() as connection:
            if not await _wanted(connection, user_id, checked):
                return False
            await connection.execute(sa.insert(live_checks).values(**values))
        return True

    async def list(self, user_id: UserId, version: int | None = None) -> Rows:
        """The user's, or those of one version, in the order of the messages."""
        query = sa.select(live_checks).where(live_checks.c.user_id == user_id)
        if version is not None:
            query = query.where(live_checks.c.version == version)
        async with self._db.read() as connection:
            found = await connection.execute(query.order_by(live_checks.c.version, live_checks.c.entry_id))
            return [_checked(row) for row in found]


async def _wanted(connection: Transaction, user_id: UserId, checked: Checked) -> bool:
    version = await lineage.row(connection, user_id, checked.version)
    if version is None or version.state == VersionState.DELETED:
        return False
    mine = sa.select(entries.c.id).where(entries.c.user_id == user_id, entries.c.id == checked.entry_id)
    if (await connection.execute(mine)).first() is None:
        return False
    key = {"user_id": user_id, "version": checked.version, "entry_id": checked.entry_id}
    return (await connection.execute(sa.select(live_checks).filter_by(**key))).first() is None


def _finite(nats: float | None) -> float | None:
    return nats if nats is not None and math.isfinite(nats) else None


def _checked(row: sa.Row[Any]) -> Checked:
    return Checked(row.version, row.against, EntryId(row.entry_id), row.tokens, row.nats_serving, row.nats_before)
