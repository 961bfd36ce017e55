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
