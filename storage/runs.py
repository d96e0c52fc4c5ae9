"""Training runs: what was asked for, what came of it, and which entries each one trained on.

A user has at most one open run. A run ends once; its reason is one sentence. One that a stop cut off has not ended: it
waits in the queue, and its metrics say how far it may look into history (`through`), so that it goes on with the same
examples. A deletion takes that mark away (lineage.void).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from persona.domain import EntryId, Frame, Run, RunState, UserId
from persona.errors import NotFound
from storage.database import Database, Transaction
from storage.tables import run_examples, runs, users

_OPEN = (RunState.QUEUED, RunState.RUNNING)
_NOTHING = EntryId(0)


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """Where one example of a run came from."""

    entry_id: EntryId
    frame: Frame
    tokens: int  # context included
    weight: float


# Inside the class `list` is a method.
Examples = list[ExampleRow]
Listing = list[Run]


class Runs:
    """Every run of every user."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def request(self, user_id: UserId, now: datetime) -> Run:
        """The user's open run, or a new one in the queue."""
        async with self._db.write() as connection:
            found = await _first(connection, runs.c.user_id == user_id, runs.c.state.in_(_OPEN))
            if found:
                return found
            if not (await connection.execute(sa.select(users.c.id).where(users.c.id == user_id))).first():
                raise NotFound("There is no such user.")
            values = {"user_id": user_id, "state": RunState.QUEUED, "created": now, "metrics": {}}
            made = await connection.execute(sa.insert(runs).values(**values).returning(*runs.c))
            return _run(made.one())

    async def start(self, run_id: int, now: datetime, through: EntryId = _NOTHING) -> Run:
        """Take a run out of the queue. Raises NotFound if it is not waiting there.

        through: the last entry that it may look at, unless it was told so before a stop.
        """
        async with self._db.write() as connection:
            found = await _first(connection, runs.c.id == run_id, runs.c.state == RunState.QUEUED)
            if found is None:
                raise NotFound("There is no such run.")
            metrics = {"through": through, **found.metrics}
            return await _update(connection, run_id, state=RunState.RUNNING, started=now, metrics=metrics)

    async def requeue(self, run_id: int, reason: str, *, hard: bool = False) -> Run:
        """Put a run that a stop cut off back into the queue; `hard` stops are counted.

        One that has ended keeps its outcome. Raises NotFound if its user was forgotten.
        """
        async with self._db.write() as connection:
            found = await _first(connection, runs.c.id == run_id)
            if found is None:
                raise NotFound("There is no such run.")
            if found.state.ended:
                return found
            stops = found.metrics.get("hard_stops", 0) + hard
            metrics = {**found.metrics, "hard_stops": stops} if stops else found.metrics
            return await _update(connection, run_id, state=RunState.QUEUED, reason=reason, metrics=metrics)

    async def end(
        self,
        run_id: int,
        state: RunState,
        reason: str | None,
        now: datetime,
        *,
        version: int | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Run:
        """Record how a run ended. One that has ended keeps its first outcome; NotFound if its user was forgotten."""
        assert state.ended, "a run ends in a state of rest"
        outcome = {"state": state, "reason": reason, "ended": now, "version": version, "metrics": metrics or {}}
        async with self._db.write() as connection:
            found = await _first(connection, runs.c.id == run_id)
            if found is None:
                raise NotFound("There is no such run.")
            return found if found.state.ended else await _update(connection, run_id, **outcome)

    async def next(self) -> Run | None:
        """The run that has waited longest."""
        async with self._db.read() as connection:
            return await _first(connection, runs.c.state == RunState.QUEUED)

    async def running(self) -> Listing:
        """Every run that is under way, or was when the service was killed."""
        query = sa.select(runs).where(runs.c.state == RunState.RUNNING).order_by(runs.c.id)
        async with self._db.read() as connection:
            return [_run(row) for row in await connection.execute(query)]

    async def list(self, user_id: UserId, limit: int = 50) -> list[Run]:
        """The user's newest runs, newest first."""
        query = sa.select(runs).where(runs.c.user_id == user_id).order_by(runs.c.id.desc()).limit(limit)
        async with self._db.read() as connection:
            return [_run(row) for row in await connection.execute(query)]

    async def get(self, user_id: UserId, run_id: int) -> Run | None:
        async with self._db.read() as connection:
            return await _first(connection, runs.c.user_id == user_id, runs.c.id == run_id)

    async def last(self, user_id: UserId) -> Run | None:
        return next(iter(await self.list(user_id, limit=1)), None)

    async def set_examples(self, run_id: int, rows: Sequence[ExampleRow]) -> None:
        """Record what the run trains on, before it does. Raises NotFound if its user was forgotten."""
        async with self._db.write() as connection:
            if not await _first(connection, runs.c.id == run_id):
                raise NotFound("There is no such run.")
            await connection.execute(sa.delete(run_examples).where(run_examples.c.run_id == run_id))
            if rows:
                await connection.execute(sa.insert(run_examples), [{"run_id": run_id, **asdict(row)} for row in rows])

    async def examples(self, run_id: int) -> Examples:
        query = sa.select(run_examples).where(run_examples.c.run_id == run_id).order_by(run_examples.c.id)
        async with self._db.read() as connection:
            found = await connection.execute(query)
            return [ExampleRow(EntryId(row.entry_id), Frame(row.frame), row.tokens, row.weight) for row in found]


async def _first(connection: Transaction, *where: sa.ColumnElement[bool]) -> Run | None:
    row = (await connection.execute(sa.select(runs).where(*where).order_by(runs.c.id).limit(1))).one_or_none()
    return _run(row) if row else None


async def _update(connection: Transaction, run_id: int, **values: Any) -> Run:
    query = sa.update(runs).where(runs.c.id == run_id).values(**values).returning(*runs.c)
    return _run((await connection.execute(query)).one())


def _run(row: sa.Row[Any]) -> Run:
    values = row._asdict()
    return Run(**{**values, "user_id": UserId(values["user_id"]), "state": RunState(values["state"])})
