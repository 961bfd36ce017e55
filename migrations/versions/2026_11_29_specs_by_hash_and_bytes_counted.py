"""specs by hash, and bytes counted"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "specs",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column(
            "last_used_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_specs")),
    )
    op.create_index("ix_specs_last_used_at_sha256", "specs", ["last_used_at", "sha256"])
    op.add_column(
        "images", sa.Column("inline", sa.Boolean(), server_default="false", nullable=False)
    )
    op.add_column(
        "batches", sa.Column("bytes", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("metrics", sa.Column("size", sa.Integer(), nullable=True))
    # What is there keeps its spec where it is.
    op.alter_column("jobs", "spec", nullable=True)
    op.add_column("jobs", sa.Column("spec_sha256", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("spec_bytes", sa.Integer(), server_default="0", nullable=False))
    op.add_column(
        "jobs", sa.Column("file_bytes", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.create_foreign_key(
        op.f("fk_jobs_spec_sha256_specs"), "jobs", "specs", ["spec_sha256"], ["sha256"]
    )
    op.create_check_constraint(
        op.f("ck_jobs_spec"), "jobs", "spec IS NOT NULL OR spec_sha256 IS NOT NULL"
    )
    op.create_index(op.f("ix_jobs_spec_sha256"), "jobs", ["spec_sha256"])
    op.create_index(
        "ix_jobs_bytes", "jobs", ["key_id"], postgresql_include=["spec_bytes", "file_bytes"]
    )
    op.create_index(
        op.f("ix_jobs_finished_at"),
        "jobs",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    # The files of what has ended; what has not is counted when it does.
    op.execute("""
        UPDATE jobs SET file_bytes = counted.bytes FROM (
            SELECT job_id, sum(size) AS bytes FROM (
                SELECT job_id, png_sha256 AS sha256 FROM corners
                UNION ALL SELECT job_id, sha256 FROM artifacts
            ) AS files JOIN blobs USING (sha256) GROUP BY job_id
        ) AS counted WHERE jobs.id = counted.job_id
    """)


def downgrade() -> None:
    op.execute("""
        UPDATE jobs SET spec = specs.spec FROM specs
        WHERE jobs.spec IS NULL AND jobs.spec_sha256 = specs.sha256
    """)
    op.drop_index("ix_jobs_finished_at", table_name="jobs")
    op.drop_index("ix_jobs_bytes", table_name="jobs")
    op.drop_index("ix_jobs_spec_sha256", table_name="jobs")
    op.drop_constraint(op.f("ck_jobs_spec"), "jobs", type_="check")
    op.drop_constraint(op.f("fk_jobs_spec_sha256_specs"), "jobs", type_="foreignkey")
    op.drop_column("jobs", "file_bytes")
    op.drop_column("jobs", "spec_bytes")
    op.drop_column("jobs", "spec_sha256")
    op.alter_column("jobs", "spec", nullable=False)
    op.drop_column("metrics", "size")
    op.drop_column("batches", "bytes")
    op.drop_column("images", "inline")
    op.drop_table("specs")
