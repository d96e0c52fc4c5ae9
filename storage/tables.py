"""The tables of the database, as the code sees them.

Ids of users, entries and runs are never given twice, so that a cache, a watermark or a file name can never come to
mean something else. Times are stored in UTC and come back aware. The revisions in migrations/ make the same
tables; a test compares the two.
"""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from storage.database import NEVER_REUSED

metadata = sa.MetaData()


class Utc(sa.TypeDecorator[datetime]):
    """An aware datetime, stored as UTC."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone cannot be stored")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


def _user() -> sa.Column[int]:
    return sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False)


users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("learn", sa.Boolean, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False),
    sa.Column("active", sa.Integer),  # number of the serving version
    sa.Column("last_version", sa.Integer, nullable=False),  # highest number ever given
    sa.Column("salt", sa.LargeBinary, nullable=False),  # seeds the hash chain of turns
    sa.Column("created", Utc, nullable=False),
    **NEVER_REUSED,
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _user(),
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),  # SHA-256 of the secret
    sa.Column("label", sa.String, nullable=False),
    sa.Column("learn", sa.Boolean, nullable=False),
    sa.Column("created", Utc, nullable=False),
    sa.Column("last_used", Utc),
    sa.Column("revoked", Utc),
    **NEVER_REUSED,
)
sa.Index("keys_of_user", keys.c.user_id)

entries = sa.Table(
    "entries",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _user(),
    sa.Column("role", sa.String, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("ts", Utc, nullable=False),
    sa.Column("origin", sa.String, nullable=False),
    sa.Column("conversation", sa.String, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("parent", sa.Integer, sa.ForeignKey("entries.id")),
    sa.Column("context", sa.JSON(none_as_null=True)),  # [[author, text], …]
    sa.Column("version", sa.Integer),
    sa.Column("finish", sa.String),
    sa.Column("rating", sa.Integer),
    sa.Column("correction", sa.Text),
    sa.Column("digest", sa.LargeBinary),  # of a turn's role and text
    sa.Column("chain", sa.LargeBinary),  # of a turn and all turns before it
    sa.Column("item", sa.LargeBinary),  # names an imported item
    sa.UniqueConstraint("user_id", "item", name="entries_item"),
    **NEVER_REUSED,
)
sa.Index("entries_of_user", entries.c.user_id, entries.c.id, entries.c.tokens)
sa.Index("entries_said", entries.c.user_id, entries.c.role, entries.c.id, entries.c.origin, entries.c.tokens)
sa.Index("entries_chain", entries.c.user_id, entries.c.chain)
sa.Index("entries_digest", entries.c.user_id, entries.c.digest)
sa.Index("entries_conversation", entries.c.user_id, entries.c.conversation)
sa.Index("entries_parent", entries.c.parent)

deletions = sa.Table(
    "deletions",
    metadata,
    _user(),
    sa.Column("digest", sa.LargeBinary, nullable=False),  # chain or item of a deleted entry: it must not come back
    sa.Column("turn", sa.LargeBinary),  # salted hash of a deleted turn alone
    sa.PrimaryKeyConstraint("user_id", "digest"),
)
sa.Index("deletions_turn", deletions.c.user_id, deletions.c.turn)

versions = sa.Table(
    "versions",
    metadata,
    _user(),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("watermark", sa.Integer, nullable=False),
    sa.Column("parent", sa.Integer),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("created", Utc, nullable=False),
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id")),
    sa.Column("plan", sa.JSON, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.PrimaryKeyConstraint("user_id", "number"),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _user(),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("created", Utc, nullable=False),
    sa.Column("started", Utc),
    sa.Column("ended", Utc),
    sa.Column("reason", sa.String),
    sa.Column("version", sa.Integer),
    sa.Column("metrics", sa.JSON, nullable=False),
    **NEVER_REUSED,
)
sa.Index("runs_of_user", runs.c.user_id, runs.c.id)
sa.Index("runs_state", runs.c.state)

# `entry_id` is no foreign key: it outlives the entry, so that a run that is still training on it can be recognised.
run_examples = sa.Table(
    "run_examples",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("entry_id", sa.Integer, nullable=False),
    sa.Column("frame", sa.String, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("weight", sa.Float, nullable=False),
)
sa.Index("run_examples_of_run", run_examples.c.run_id)
sa.Index("run_examples_of_entry", run_examples.c.entry_id)

# What each message said about the version that served: numbers without text.
live_checks = sa.Table(
    "live_checks",
    metadata,
    _user(),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("entry_id", sa.Integer, sa.ForeignKey("entries.id"), nullable=False),
    sa.Column("against", sa.Integer),  # the version that it is compared with; NULL: the bare base
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("nats_serving", sa.Float),  # NULL: not a finite number
    sa.Column("nats_before", sa.Float),
    sa.Column("created", Utc, nullable=False),
    sa.PrimaryKeyConstraint("user_id", "version", "entry_id"),
)
sa.Index("live_checks_of_entry", live_checks.c.entry_id)

# What arrived over MQTT or as an event over HTTP: one row each, without its content, so that none counts twice.
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _user(),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),  # "" if it named none
    sa.Column("item", sa.LargeBinary),  # names the event; NULL without id and time
    sa.Column("seq", sa.Integer),
    sa.Column("ts", Utc, nullable=False),
    sa.Column("received", Utc, nullable=False),
    sa.Column("entry_id", sa.Integer),  # the entry that it became, while that lasts
    sa.UniqueConstraint("user_id", "item", name="events_item"),
    **NEVER_REUSED,
)
sa.Index("events_of_user", events.c.user_id, events.c.id)
sa.Index("events_received", events.c.received)

# The newest value of each key.
facts = sa.Table(
    "facts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _user(),
    sa.Column("kind", sa.String, nullable=False),  # fact or state
    sa.Column("key", sa.String, nullable=False),
    sa.Column("value", sa.Text),  # NULL: taken back; the row keeps an older value from returning
    sa.Column("ts", Utc, nullable=False),
    sa.UniqueConstraint("user_id", "kind", "key", name="facts_key"),
    **NEVER_REUSED,
)

# Sequence numbers by source, to notice what never arrived.
sources = sa.Table(
    "sources",
    metadata,
    _user(),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("last_seq", sa.Integer),
    sa.Column("gaps", sa.JSON, nullable=False),  # [[first, last], …] of what is missing
    sa.Column("missing", sa.Integer, nullable=False),
    sa.Column("events", sa.Integer, nullable=False),
    sa.Column("duplicates", sa.Integer, nullable=False),
    sa.Column("last", Utc, nullable=False),
    sa.PrimaryKeyConstraint("user_id", "source"),
)

# Messages that name neither id nor time, to recognise the newest ones when the broker delivers them again.
deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("user_id", sa.Integer),  # NULL: no user of ours
    sa.Column("digest", sa.LargeBinary, nullable=False),
    **NEVER_REUSED,
)
sa.Index("deliveries_digest", deliveries.c.digest)

dead_letters = sa.Table(
    "dead_letters",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id")),  # NULL: the topic names no user of ours
    sa.Column("name", sa.String, nullable=False),  # the user that the topic names
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("detail", sa.String, nullable=False),  # one sentence
    sa.Column("payload", sa.LargeBinary),  # NULL: not kept
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("minute", Utc, nullable=False),
    sa.Column("first", Utc, nullable=False),
    sa.Column("last", Utc, nullable=False),
    **NEVER_REUSED,
)
sa.Index("dead_letters_of_user", dead_letters.c.user_id, dead_letters.c.id)
sa.Index("dead_letters_lately", dead_letters.c.user_id, dead_letters.c.last, dead_letters.c.count)
sa.Index("dead_letters_group", dead_letters.c.minute, dead_letters.c.name, dead_letters.c.reason)

tombstones = sa.Table(
    "tombstones",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),  # salted hash of a forgotten user's name
    sa.Column("created", Utc, nullable=False),
)

backups = sa.Table(
    "backups",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("created", Utc, nullable=False),
)
