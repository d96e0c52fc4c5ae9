"""Events: what arrived, the newest facts and states, sequence numbers, dead letters."""

import sqlalchemy as sa
from alembic import op

from storage.database import NEVER_REUSED

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _events()
    _facts()
    _sources()
    _deliveries()
    _dead_letters()


def _user() -> sa.Column[int]:
    return sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False)


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        _user(),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("item", sa.LargeBinary),
        sa.Column("seq", sa.Integer),
        sa.Column("ts", sa.DateTime, nullable=False),
        sa.Column("received", sa.DateTime, nullable=False),
        sa.Column("entry_id", sa.Integer),
        sa.UniqueConstraint("user_id", "item", name="events_item"),
        **NEVER_REUSED,
    )
    op.create_index("events_of_user", "events", ["user_id", "id"])
    op.create_index("events_received", "events", ["received"])


def _facts() -> None:
    op.create_table(
        "facts",
        sa.Column("id", sa.Integer, primary_key=True),
        _user(),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("value", sa.Text),
        sa.Column("ts", sa.DateTime, nullable=False),
        sa.UniqueConstraint("user_id", "kind", "key", name="facts_key"),
        **NEVER_REUSED,
    )


def _sources() -> None:
    op.create_table(
        "sources",
        _user(),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("last_seq", sa.Integer),
        sa.Column("gaps", sa.JSON, nullable=False),
        sa.Column("missing", sa.Integer, nullable=False),
        sa.Column("events", sa.Integer, nullable=False),
        sa.Column("duplicates", sa.Integer, nullable=False),
        sa.Column("last", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "source"),
    )


def _deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user_id", sa.Integer),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        **NEVER_REUSED,
    )
    op.create_index("deliveries_digest", "deliveries", ["digest"])


def _dead_letters() -> None:
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id")),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("payload", sa.LargeBinary),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("minute", sa.DateTime, nullable=False),
        sa.Column("first", sa.DateTime, nullable=False),
        sa.Column("last", sa.DateTime, nullable=False),
        **NEVER_REUSED,
    )
    op.create_index("dead_letters_of_user", "dead_letters", ["user_id", "id"])
    op.create_index("dead_letters_group", "dead_letters", ["minute", "name", "reason"])
