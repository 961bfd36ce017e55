"""patch sets of workers"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "patch_sets",
        sa.Column("slot", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.Column("patches", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("stride", sa.Integer(), nullable=False),
        sa.Column("resize", sa.Integer(), nullable=False),
        sa.Column("index", sa.Text(), nullable=False),
        sa.Column(
            "reported_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("slot", "name", name=op.f("pk_patch_sets")),
    )
    op.create_table(
        "missing_patch_sets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "since",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_missing_patch_sets")),
    )
    # Null for jobs that need none, as all did that are there already.
    op.add_column("jobs", sa.Column("patch_set", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "patch_set")
    op.drop_table("missing_patch_sets")
    op.drop_table("patch_sets")
