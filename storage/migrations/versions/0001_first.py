"""The first schema."""

import sqlalchemy as sa
from alembic import op

from storage import fulltext
from storage.database import NEVER_REUSED

revision = "0001"
down_revision = None


def upgrade() -> None:
    _users()
    _keys()
    _entries()
    _runs()
    _versions()
    _forgotten()
    fulltext.create(op.get_bind())


def _users() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("learn", sa.Boolean, nullable=False),
        sa.Column("paused", sa.Boolean, nullable=False),
        sa.Column("active", sa.Integer),
        sa.Column("last_version", sa.Integer, nullable=False),
        sa.Column("salt", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        **NEVER_REUSED,
    )


def _keys() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("label", sa.String, nullable=False),
        sa.Column("learn", sa.Boolean, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("last_used", sa.DateTime),
        sa.Column("revoked", sa.DateTime),
        **NEVER_REUSED,
    )
    op.create_index("keys_of_user", "keys", ["user_id"])


def _entries() -> None:
    op.create_table(
        "entries",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("ts", sa.DateTime, nullable=False),
        sa.Column("origin", sa.String, nullable=False),
        sa.Column("conversation", sa.String, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("parent", sa.Integer, sa.ForeignKey("entries.id")),
        sa.Column("context", sa.JSON),
        sa.Column("version", sa.Integer),
        sa.Column("finish", sa.String),
        sa.Column("rating", sa.Integer),
        sa.Column("correction", sa.Text),
        sa.Column("digest", sa.LargeBinary),
        sa.Column("chain", sa.LargeBinary),
        sa.Column("item", sa.LargeBinary),
        sa.UniqueConstraint("user_id", "item", name="entries_item"),
        **NEVER_REUSED,
    )
    op.create_index("entries_of_user", "entries", ["user_id", "id"])
    op.create_index("entries_chain", "entries", ["user_id", "chain"])
    op.create_index("entries_digest", "entries", ["user_id", "digest"])
    op.create_index("entries_conversation", "entries", ["user_id", "conversation"])
    op.create_index("entries_parent", "entries", ["parent"])


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("started", sa.DateTime),
        sa.Column("ended", sa.DateTime),
        sa.Column("reason", sa.String),
        sa.Column("version", sa.Integer),
        sa.Column("metrics", sa.JSON, nullable=False),
        **NEVER_REUSED,
    )
    op.create_index("runs_of_user", "runs", ["user_id", "id"])
    op.create_index("runs_state", "runs", ["state"])
    op.create_table(
        "run_examples",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("entry_id", sa.Integer, nullable=False),
        sa.Column("frame", sa.String, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
    )
    op.create_index("run_examples_of_run", "run_examples", ["run_id"])
    op.create_index("run_examples_of_entry", "run_examples", ["entry_id"])


def _versions() -> None:
    op.create_table(
        "versions",
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("watermark", sa.Integer, nullable=False),
        sa.Column("parent", sa.Integer),
        sa.Column("base", sa.String, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id")),
        sa.Column("plan", sa.JSON, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "number"),
    )


def _forgotten() -> None:
    op.create_table(
        "deletions",
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "digest"),
    )
    op.create_table(
        "tombstones",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("salt", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
    )
    op.create_table(
        "backups",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
    )
