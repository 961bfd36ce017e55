"""What is deleted, and when. Each call deletes a bounded number of rows; none commits."""

from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, text

from store import removal
from store.blobs import UNREFERENCED
from store.settings import Settings

# Rows of one pass: a lock held for well under a second, and a table swept in the end. Of jobs
# fewer, since much goes with each.
LIMIT, JOBS = 5000, 200

_FINISHED_BEFORE = """(
    SELECT 1 FROM jobs WHERE jobs.id = {table}.job_id
    AND finished_at < clock_timestamp() - :keep)"""
_SWEEPS = {
    "keep_checkpoints": """
        UPDATE jobs SET checkpoint_sha256 = NULL WHERE id IN (
            SELECT id FROM jobs WHERE checkpoint_sha256 IS NOT NULL
            AND finished_at < clock_timestamp() - :keep LIMIT :limit FOR UPDATE SKIP LOCKED)""",
    "keep_snapshots": f"""
        WITH gone AS (
            DELETE FROM artifacts WHERE (job_id, name) IN (
                SELECT job_id, name FROM artifacts WHERE name LIKE 'snapshots/%'
                AND EXISTS {_FINISHED_BEFORE.format(table="artifacts")} LIMIT :limit)
            RETURNING job_id, sha256
        ), freed AS (
            SELECT job_id, sum(size) AS bytes FROM gone JOIN blobs USING (sha256) GROUP BY job_id
        ), counted AS (
            UPDATE jobs SET file_bytes = GREATEST(0, file_bytes - bytes)
            FROM freed WHERE id = job_id
        )
        SELECT FROM gone""",
    "keep_progress": f"""
        DELETE FROM job_events WHERE id IN (
            SELECT id FROM job_events
            WHERE type = 'progress' AND created_at < clock_timestamp() - :keep
            AND EXISTS {_FINISHED_BEFORE.format(table="job_events")} LIMIT :limit)""",
    "keep_events": f"""
        DELETE FROM job_events WHERE id IN (
            SELECT id FROM job_events WHERE created_at < clock_timestamp() - :keep
            AND EXISTS {_FINISHED_BEFORE.format(table="job_events")} ORDER BY id LIMIT :limit)""",
    "keep_idempotency_keys": """
        DELETE FROM idempotency_keys WHERE (key_id, value) IN (
            SELECT key_id, value FROM idempotency_keys
            WHERE created_at < clock_timestamp() - :keep LIMIT :limit)""",
    "keep_workers": """
        WITH gone AS (
            DELETE FROM workers WHERE heartbeat_at < clock_timestamp() - :keep RETURNING slot
        ), sets AS (
            DELETE FROM patch_sets WHERE slot IN (SELECT slot FROM gone)
        ), refused AS (
            DELETE FROM refusals WHERE slot IN (SELECT slot FROM gone)
        )
        DELETE FROM models WHERE slot IN (SELECT slot FROM gone)""",
}


# Batches whose jobs are gone, each by itself.
_EMPTY_BATCHES = text("""
    DELETE FROM batches WHERE id IN (
        SELECT id FROM batches WHERE created_at < clock_timestamp() - :keep
        AND NOT EXISTS (SELECT FROM jobs WHERE batch_id = batches.id)
        LIMIT :limit FOR UPDATE SKIP LOCKED)
""")
_OLD_JOBS = text("""
    SELECT id FROM jobs WHERE finished_at < clock_timestamp() - :keep
    ORDER BY finished_at LIMIT :limit FOR UPDATE SKIP LOCKED
""")
# A walk over what is old, in an order that an index has, from where the last pass ended: what is
# old and needed is looked at once a walk, not at each pass. What is stored again at this moment has
# its row locked, and then is no longer old.
_WALK = """
    WITH looked AS MATERIALIZED (
        SELECT last_used_at, sha256 FROM {table}
        WHERE last_used_at < clock_timestamp() - :keep
        AND (last_used_at, sha256) > (COALESCE(CAST(:at AS timestamptz), '-infinity'), :sha256)
        ORDER BY last_used_at, sha256 LIMIT :limit
    ), gone AS (
        DELETE FROM {table} WHERE sha256 IN (
            SELECT sha256 FROM {table} WHERE sha256 IN (SELECT sha256 FROM looked)
            AND last_used_at < clock_timestamp() - :keep AND {unused}
            ORDER BY sha256 FOR UPDATE SKIP LOCKED)
        RETURNING sha256
    )
    SELECT last_used_at, sha256, (SELECT count(*) FROM gone) AS deleted FROM looked
    ORDER BY last_used_at DESC, sha256 DESC LIMIT 1
"""
_WALKS = {
    table: text(_WALK.format(table=table, unused=unused))
    for table, unused in {
        "blobs": UNREFERENCED,
        "specs": "NOT EXISTS (SELECT FROM jobs WHERE spec_sha256 = specs.sha256)",
    }.items()
}
WALKED = tuple(_WALKS)


class Place(NamedTuple):
    """How far a walk has come."""

    at: datetime | None = None
    sha256: str = ""


def sweep(connection: Connection, settings: Settings) -> dict[str, int]:
    """Deletes what is past its time, but for blobs and specs; how many rows by setting."""
    deleted = {}
    unneeded = settings.keep_unreferenced_blobs
    if settings.keep_jobs is not None:
        params = {"keep": settings.keep_jobs, "limit": JOBS}
        if old := connection.scalars(_OLD_JOBS, params).all():
            removal.delete_jobs(connection, old, unneeded)
        # Of a batch the jobs go first, some at a time.
        deleted["keep_jobs"] = len(old) + connection.execute(_EMPTY_BATCHES, params).rowcount
    deleted["keep_images"] = removal.delete_old_images(
        connection, settings.keep_images, LIMIT, unneeded
    )
    for setting, statement in _SWEEPS.items():
        keep: timedelta = getattr(settings, setting)
        params = {"keep": keep, "limit": LIMIT}
        deleted[setting] = connection.execute(text(statement), params).rowcount
    return deleted


def walk(
    connection: Connection, table: str, settings: Settings, place: Place
) -> tuple[int, Place | None]:
    """Deletes those of the next `LIMIT` old rows of a table of WALKED that nobody needs.

    How many, and where to go on; None at the end.
    """
    params = {"keep": settings.keep_unreferenced_blobs, "limit": LIMIT, **place._asdict()}
    last = connection.execute(_WALKS[table], params).one_or_none()
    if last is None:
        return 0, None
    return last.deleted, Place(last.last_used_at, last.sha256)


def lock_sweeping(connection: Connection) -> bool:
    """Takes the lock under which is swept, for this transaction; whether it was free."""
    return bool(connection.scalar(text("SELECT pg_try_advisory_xact_lock(7265637)")))
