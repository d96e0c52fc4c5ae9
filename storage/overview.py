"""How every user's model is, in a few queries, however many users there are."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from persona.domain import Origin, Role, RunState, User, UserId
from storage.database import Database
from storage.tables import dead_letters, entries, runs, sources, users, versions

_OWN = (Origin.CHAT, Origin.IMPORT, Origin.EVENT)


@dataclass(frozen=True, slots=True)
class Overview:
    """One user and their model: the serving version, the last run that ended, what came since."""

    user: User
    base: str | None  # of the serving version
    held_out_loss: float | None  # nats per token on messages that no version has seen, when the version was judged
    last_training: datetime | None
    last_state: RunState | None
    last_reason: str | None
    training: bool
    new_tokens: int  # own words that the serving version has not absorbed
    missing: int  # events that never arrived
    dead: int  # dead letters since the time that was asked for


async def overview(db: Database, since: datetime) -> list[Overview]:
    """Every user, by name. `since`: dead letters are counted from then on."""
    async with db.read() as connection:
        rows = (await connection.execute(_users(since))).all()
        ended = {row.user_id: row for row in await connection.execute(_last_runs())}
    return [_one(row, ended.get(row.id)) for row in rows]


def _users(since: datetime) -> sa.Select[Any]:
    serving = versions.alias()
    mark = sa.func.coalesce(serving.c.watermark, 0)
    own = (entries.c.role == Role.USER) & entries.c.origin.in_(_OWN)
    new = sa.select(sa.func.coalesce(sa.func.sum(entries.c.tokens), 0)).where(
        entries.c.user_id == users.c.id, entries.c.id > mark, own
    )
    gaps = sa.select(sa.func.coalesce(sa.func.sum(sources.c.missing), 0)).where(sources.c.user_id == users.c.id)
    dead = sa.select(sa.func.coalesce(sa.func.sum(dead_letters.c.count), 0)).where(
        dead_letters.c.user_id == users.c.id, dead_letters.c.last >= since
    )
    running = sa.exists().where(runs.c.user_id == users.c.id, runs.c.state == RunState.RUNNING)
    judged = runs.alias()
    joined = users.outerjoin(serving, (serving.c.user_id == users.c.id) & (serving.c.number == users.c.active))
    joined = joined.outerjoin(judged, judged.c.id == serving.c.run_id)
    return (
        sa.select(
            users,
            serving.c.base.label("base"),
            judged.c.metrics.label("judged"),
            new.scalar_subquery().label("new_tokens"),
            gaps.scalar_subquery().label("missing"),
            dead.scalar_subquery().label("dead"),
            running.label("training"),
        )
        .select_from(joined)
        .order_by(users.c.name)
    )


def _last_runs() -> sa.Select[Any]:
    """The last run of each user that has ended."""
    last = sa.select(sa.func.max(runs.c.id)).where(runs.c.ended.is_not(None)).group_by(runs.c.user_id)
    return sa.select(runs).where(runs.c.id.in_(last))


def _one(row: sa.Row[Any], run: sa.Row[Any] | None) -> Overview:
    loss = (row.judged or {}).get("loss_after")
    return Overview(
        user=User(UserId(row.id), row.name, row.learn, row.paused, row.active, row.created),
        base=row.base,
        held_out_loss=loss if isinstance(loss, float) else None,
        last_training=run.ended if run else None,
        last_state=RunState(run.state) if run else None,
        last_reason=run.reason if run else None,
        training=bool(row.training),
        new_tokens=int(row.new_tokens),
        missing=int(row.missing),
        dead=int(row.dead),
    )
