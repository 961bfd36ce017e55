"""What is deleted, and when. Each call deletes a bounded number of rows; none commits."""

from datetime import timedelta

from sqlalchemy import Connection, text

from store.settings import Settings

# Rows of one pass: a lock held for well under a second, and a table swept in the end.
LIMIT = 5000

_FINISHED_BEFORE = """(
    SELECT 1 FROM jobs WHERE jobs.id = {table}.job_id
    AND finished_at < clock_timestamp() - :keep)"""
_SWEEPS = {
    "keep_checkpoints": """
        UPDATE jobs SET checkpoint_sha256 = NULL WHERE id IN (
            SELECT id FROM jobs WHERE checkpoint_sha256 IS NOT NULL
            AND finished_at < clock_timestamp() - :keep LIMIT :limit FOR UPDATE SKIP LOCKED)""",
    "keep_snapshots": f"""
        DELETE FROM artifacts WHERE (job_id, name) IN (
            SELECT job_id, name FROM artifacts WHERE name LIKE 'snapshots/%'
            AND EXISTS {_FINISHED_BEFORE.format(table="artifacts")} LIMIT :limit)""",
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
    # A blob that is stored again at this moment has its row locked, and then is no longer old.
    "keep_unreferenced_blobs": """
        DELETE FROM blobs WHERE sha256 IN (
            SELECT sha256 FROM blobs
            WHERE last_used_at < clock_timestamp() - :keep
            AND NOT EXISTS (SELECT 1 FROM images WHERE images.sha256 = blobs.sha256)
            AND NOT EXISTS (SELECT 1 FROM jobs WHERE source_sha256 = blobs.sha256)
            AND NOT EXISTS (SELECT 1 FROM jobs WHERE target_sha256 = blobs.sha256)
            AND NOT EXISTS (SELECT 1 FROM jobs WHERE checkpoint_sha256 = blobs.sha256)
            AND NOT EXISTS (SELECT 1 FROM corners WHERE png_sha256 = blobs.sha256)
            AND NOT EXISTS (SELECT 1 FROM artifacts WHERE artifacts.sha256 = blobs.sha256)
            LIMIT :limit FOR UPDATE SKIP LOCKED)""",
}


def sweep(connection: Connection, settings: Settings) -> dict[str, int]:
    """Deletes what is past its time; how many rows by setting."""
    deleted = {}
    for setting, statement in _SWEEPS.items():
        keep: timedelta = getattr(settings, setting)
        params = {"keep": keep, "limit": LIMIT}
        deleted[setting] = connection.execute(text(statement), params).rowcount
    return deleted
