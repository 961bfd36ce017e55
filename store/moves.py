"""How a job's status changes: one form of statement for every event that befalls jobs."""

from sqlalchemy import TextClause, text

from store.lifecycle import Event, sources, sql_after

CHANNEL = "polycollide_jobs"  # of the notices that wake whoever watches a job
CANCELED = "'Canceled by its owner.'"


# What a job without a result keeps: pictures of its corners on their way.
KEPT = """(SELECT COALESCE(sum(size), 0) FROM artifacts JOIN blobs USING (sha256)
    WHERE artifacts.job_id = jobs.id)"""


def befall(
    event: Event,
    which: str,
    sets: str,
    *,
    reason: str,
    columns: str = "id, status",
    file_bytes: str = "file_bytes",
) -> TextClause:
    """SQL that lets `event` befall the jobs that `which` (`[FROM ...] WHERE ...`) selects.

    It writes down what happened, wakes those who watch, and answers with `columns` of the jobs
    that it moved. `which` locks several jobs in order of their ids, so that two who want the same
    ones wait for each other but never in a circle. `file_bytes` are those of a result.
    """
    allowed = ", ".join(f"'{status}'" for status in sources(event))
    # Released or expired, a job that was to be canceled is: it then has a reason of its own.
    status = sql_after(event)
    return text(f"""
        WITH moved AS (
            UPDATE jobs SET
                status = {status},
                status_reason = CASE {status} WHEN 'canceled' THEN {CANCELED} ELSE {reason} END,
                finished_at = CASE WHEN {status} IN ('succeeded', 'failed', 'canceled')
                    THEN clock_timestamp() END,
                file_bytes = CASE WHEN {status} IN ('failed', 'canceled') THEN {KEPT}
                    ELSE {file_bytes} END,
                {sets}
            {which} AND jobs.status IN ({allowed})
            RETURNING jobs.*
        ), noted AS (
            INSERT INTO job_events (job_id, type, data)
            SELECT id, 'status', jsonb_build_object(
                'status', status, 'status_reason', status_reason, 'attempt', attempt)
            FROM moved
        )
        SELECT {columns}, pg_notify('{CHANNEL}', id::text) FROM moved AS jobs
    """)


def cancel(which: str) -> TextClause:
    """SQL by which an owner cancels the jobs that `which` selects."""
    return befall(
        Event.CANCEL,
        which,
        """cancel_requested_at = COALESCE(cancel_requested_at, now()),
        checkpoint_sha256 = CASE status WHEN 'running' THEN checkpoint_sha256 END""",
        reason="'Its owner wants it no more.'",
    )
