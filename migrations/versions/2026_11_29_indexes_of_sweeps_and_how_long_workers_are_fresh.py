"""indexes of sweeps, and how long workers are fresh"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_blobs_last_used_at_sha256", "blobs", ["last_used_at", "sha256"])
    op.create_index(
        "ix_artifacts_snapshots",
        "artifacts",
        ["job_id"],
        postgresql_where=sa.text("name LIKE 'snapshots/%'"),
    )
    op.create_index(
        "ix_job_events_progress",
        "job_events",
        ["created_at"],
        postgresql_where=sa.text("type = 'progress'"),
    )
    op.create_index(
        "ix_job_events_created_at", "job_events", ["created_at"], postgresql_using="brin"
    )
    # What older workers are taken by.
    op.add_column(
        "workers",
        sa.Column(
            "fresh_for", sa.Interval(), server_default=sa.text("'10 seconds'"), nullable=False
        ),
    )


def downgrade() -> None:
    op.drop_column("workers", "fresh_for")
    op.drop_index("ix_job_events_created_at", table_name="job_events")
    op.drop_index("ix_job_events_progress", table_name="job_events")
    op.drop_index("ix_artifacts_snapshots", table_name="artifacts")
    op.drop_index("ix_blobs_last_used_at_sha256", table_name="blobs")
