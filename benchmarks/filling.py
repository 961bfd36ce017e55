"""Fills a database with finished jobs: copies of one that was run."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Engine, text

from store.database import connect
from store.settings import Settings
from store.tables import Artifact, Base, Corner, Job, JobEvent, Metrics

FEW = 1000
# Some jobs are whole; the others have one corner and less JSON, or the disk would fill.
WHOLE = f"(n <= {FEW} OR n % {FEW} = 0)"


def _copy(into: type[Base], **changed: str) -> str:
    """INSERT ... SELECT of rows `old`; what is changed to "" is left to the column's default."""
    columns = {column.name: f"old.{column.name}" for column in into.__table__.columns} | changed
    columns = {name: value for name, value in columns.items() if value}
    values = ", ".join(columns.values())
    return f"INSERT INTO {into.__tablename__} ({', '.join(columns)}) SELECT {values}"


_JOBS = _copy(
    Job,
    seq="",
    id="gen_random_uuid()",
    batch_id="NULL::uuid",
    batch_index="NULL::int",
    custom_id="n::text",
    labels=f"ARRAY['experiment-' || (n - 1) / {FEW}]",
)
_LESS = "jsonb_build_object('polytope', old.details->'polytope')"
_METRICS = _copy(
    Metrics, job_id="new.id", details=f"CASE WHEN {WHOLE} THEN old.details ELSE {_LESS} END"
)
_FILL = text(f"""
    WITH model AS (SELECT id AS model_id FROM jobs ORDER BY seq LIMIT 1), new AS (
        {_JOBS} FROM model, jobs AS old, generate_series(CAST(:first AS int), :last) AS n
        WHERE old.id = model_id RETURNING id, custom_id::int AS n
    ), kept AS (
        {_copy(Corner, job_id="new.id")} FROM new, model, corners AS old
        WHERE job_id = model_id AND (index = 0 OR {WHOLE})
    ), measured AS (
        {_METRICS} FROM new, model, metrics AS old WHERE job_id = model_id
    ), noted AS (
        {_copy(JobEvent, id="", job_id="new.id")} FROM new, model, job_events AS old
        WHERE job_id = model_id
    )
    {_copy(Artifact, job_id="new.id")} FROM new, model, artifacts AS old WHERE job_id = model_id
""")
_FOREIGN_KEYS = text("""
    SELECT conrelid::regclass, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE contype = 'f'
""")


def fill(url: str, chunks: Iterable[range]) -> None:
    """Adds copies of the first job that was run, numbered by their custom_id, a label each FEW.

    Foreign keys, which copies cannot violate, are taken off meanwhile: to check them would take
    longer than to write the rows.
    """
    engine = autocommit(url)
    with engine.connect() as connection:
        keys = connection.execute(_FOREIGN_KEYS).all()
        for table, name, _ in keys:
            connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
        for chunk in chunks:
            connection.execute(_FILL, {"first": chunk[0], "last": chunk[-1]})
        for table, name, key in keys:
            again = f"ALTER TABLE {table} ADD CONSTRAINT {name} {key} NOT VALID"
            connection.execute(text(again))
    engine.dispose()


def execute(url: str, statement: str, **values: Any) -> None:
    """A statement in no transaction but its own."""
    engine = autocommit(url)
    with engine.connect() as connection:
        connection.execute(text(statement), values)
    engine.dispose()


def autocommit(url: str) -> Engine:
    """To a database, without transactions that last."""
    return connect(Settings(mode="local", database_url=url)).execution_options(
        isolation_level="AUTOCOMMIT"
    )
