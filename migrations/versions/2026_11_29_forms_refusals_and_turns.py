"""forms of settings, kinds that workers refuse, turns of keys"""

from datetime import datetime

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "refusals",
        sa.Column("slot", sa.Text(), nullable=False),
        sa.Column("batch_key", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        _since(),
        sa.PrimaryKeyConstraint("slot", "batch_key", name=op.f("pk_refusals")),
    )
    op.create_table(
        "unserved_kinds",
        sa.Column("batch_key", sa.Text(), nullable=False),
        _since(),
        sa.PrimaryKeyConstraint("batch_key", name=op.f("pk_unserved_kinds")),
    )
    first = sa.text("1")
    for table in ("workers", "jobs"):
        version = sa.Column(
            "schema_version", sa.SmallInteger(), server_default=first, nullable=False
        )
        op.add_column(table, version)
    op.add_column("jobs", sa.Column("checkpoint_steps", sa.Integer(), nullable=True))
    op.add_column(
        "jobs", sa.Column("keep", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.drop_index("ix_jobs_position", table_name="jobs")
    op.create_index(
        "ix_jobs_turns",
        "jobs",
        ["key_id", sa.literal_column("priority DESC"), "seq"],
        postgresql_where=sa.text("status = 'queued'"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_turns", table_name="jobs")
    op.create_index(
        "ix_jobs_position",
        "jobs",
        [sa.literal_column("priority DESC"), "seq"],
        postgresql_where=sa.text("status = 'queued'"),
    )
    for column in ("keep", "checkpoint_steps", "schema_version"):
        op.drop_column("jobs", column)
    op.drop_column("workers", "schema_version")
    op.drop_table("unserved_kinds")
    op.drop_table("refusals")


def _since() -> sa.Column[datetime]:
    time = postgresql.TIMESTAMP(timezone=True)
    return sa.Column("since", time, server_default=sa.text("now()"), nullable=False)
