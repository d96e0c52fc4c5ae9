"""Deleted turns are found by their words, and what is asked for often is read from indexes alone."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("deletions", sa.Column("turn", sa.LargeBinary))
    op.create_index("deletions_turn", "deletions", ["user_id", "turn"])
    op.drop_index("entries_of_user", "entries")
    op.create_index("entries_of_user", "entries", ["user_id", "id", "tokens"])
    op.create_index("entries_said", "entries", ["user_id", "role", "id", "origin", "tokens"])
    op.create_index("dead_letters_lately", "dead_letters", ["user_id", "last", "count"])
