"""Live checks: what each new message says about the version that served."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "live_checks",
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("entry_id", sa.Integer, sa.ForeignKey("entries.id"), nullable=False),
        sa.Column("against", sa.Integer),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("nats_serving", sa.Float),
        sa.Column("nats_before", sa.Float),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "version", "entry_id"),
    )
    op.create_index("live_checks_of_entry", "live_checks", ["entry_id"])
