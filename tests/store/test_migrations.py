"""The schema's history: from nothing to today's tables and back."""

from collections.abc import Callable

import pytest
from alembic import command
from sqlalchemy import create_engine, inspect, text

from polycollide import stack
from store.database import migrate, migrations
from store.settings import Settings
from store.tables import Base


@pytest.fixture
def empty(postgres: stack.Postgres, new_database: Callable[[], str]) -> Settings:
    settings = Settings(mode="local", database_url=new_database())
    engine = create_engine(settings.sqlalchemy_url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return settings


def tables(settings: Settings) -> set[str]:
    engine = create_engine(settings.sqlalchemy_url)
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found - {"alembic_version"}


def test_up_from_empty_gives_the_tables_of_the_code_and_down_again_leaves_none(
    empty: Settings,
) -> None:
    migrate(empty)
    assert tables(empty) == set(Base.metadata.tables)
    command.check(migrations(empty))  # raises where a model and a migration differ
    command.downgrade(migrations(empty), "base")
    assert tables(empty) == set()
    migrate(empty)
    assert tables(empty) == set(Base.metadata.tables)


def test_every_constraint_and_index_has_a_name_of_ours_and_every_time_a_zone(
    empty: Settings,
) -> None:
    migrate(empty)
    engine = create_engine(empty.sqlalchemy_url)
    with engine.begin() as connection:
        names = connection.scalars(
            text("""
                SELECT conname FROM pg_constraint
                WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
                AND conrelid <> 'alembic_version'::regclass
                UNION SELECT indexname FROM pg_indexes
                WHERE schemaname = 'public' AND tablename <> 'alembic_version'
            """)
        ).all()
        zoneless = connection.scalars(
            text("""SELECT table_name || '.' || column_name FROM information_schema.columns
                    WHERE table_schema = 'public'
                    AND data_type = 'timestamp without time zone'""")
        ).all()
    engine.dispose()
    assert names
    assert [name for name in names if name[:3] not in ("pk_", "fk_", "uq_", "ck_", "ix_")] == []
    assert zoneless == []


def test_what_older_code_writes_stays_good_and_a_step_back_loses_only_what_is_new(
    empty: Settings,
) -> None:
    """Migrations expand first: workers and an API of the version before go on meanwhile."""
    submit = text("""
        INSERT INTO jobs (id, key_id, labels, deadline_seconds, spec, model, corners, batch_key,
            source_sha256, source_name, target_sha256, target_name)
        SELECT gen_random_uuid(), key.id, '{}', 1, '{}', 'm', 1, 'k',
            blob.sha256, 's', blob.sha256, 't'
        FROM api_keys AS key, blobs AS blob
    """)
    migrate(empty, "0001")
    engine = create_engine(empty.sqlalchemy_url)
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO api_keys (id, name, prefix) VALUES (gen_random_uuid(), 'n', 'p')")
        )
        connection.execute(
            text("INSERT INTO blobs (sha256, media_type, size, bytes) VALUES (:zero, 'i', 0, '')"),
            {"zero": "0" * 64},
        )
        connection.execute(submit)
    migrate(empty)
    with engine.begin() as connection:
        connection.execute(submit)
        found = connection.scalars(text("SELECT patch_set FROM jobs")).all()
        connection.execute(text("UPDATE jobs SET patch_set = 'photos'"))
    command.downgrade(migrations(empty), "0001")
    with engine.begin() as connection:
        connection.execute(submit)
        left = connection.scalar(text("SELECT count(*) FROM jobs"))
    engine.dispose()
    assert found == [None, None] and left == 3
