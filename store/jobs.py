"""What the API does to jobs: submit, read, list, cancel, delete, and what watchers get.

Functions take a connection and never commit. Whatever is asked of another key's job finds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.spec import CollisionSpec
from store import removal, specs
from store.images import Stored
from store.lifecycle import FINAL, Status
from store.moves import cancel as cancel_sql
from store.specs import DETAILS, SIZE, SPEC
from store.workers import FRESH

# Counting stops here: a position in the tens of thousands says enough.
MAX_POSITION = 10_000
# Of specs, on a page of a list.
PAGE_BYTES = 2**22
_FINAL = ", ".join(f"'{status}'" for status in sorted(FINAL))


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job on its way into the queue; its images must be stored."""

    id: UUID
    key_id: UUID
    spec: CollisionSpec
    source: Stored
    target: Stored
    priority: int
    labels: Sequence[str]
    deadline_seconds: float
    file_bytes: int  # at most, of its result
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as its owner sees it."""

    id: UUID
    seq: int
    batch_id: UUID | None
    custom_id: str | None
    status: Status
    status_reason: str | None
    priority: int
    labels: list[str]
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_seconds: float
    spec: dict[str, Any]
    source_sha256: str
    source_name: str
    target_sha256: str
    target_name: str
    attempt: int
    progress: dict[str, Any] | None
    error: dict[str, Any] | None
    queue_position: int | None
    details: dict[str, Any] | None  # its `Result` without the corners
    corners: list[dict[str, Any]] | None
    files: list[str] | None  # names of artifacts


class Standing(NamedTuple):
    """Where a job stands, and which pictures were asked for."""

    status: Status
    figures: bool
    snapshots: int


class JobEvent(NamedTuple):
    """What happened to a job."""

    id: int
    type: str
    data: dict[str, Any]


class File(NamedTuple):
    """A file of a job."""

    sha256: str
    media_type: str


_SUBMIT = text("""
    WITH new AS (
        INSERT INTO jobs (id, key_id, request_id, priority, labels, deadline_seconds,
            spec_sha256, spec_bytes, file_bytes, schema_version, model, corners, batch_key,
            patch_set, source_sha256, source_name, target_sha256, target_name)
        VALUES (:id, :key_id, :request_id, :priority, CAST(:labels AS text[]), :deadline_seconds,
            :spec_sha256, :spec_bytes, :file_bytes, :schema_version, :model, :corners,
            :batch_key, :patch_set,
            :source_sha256, :source_name, :target_sha256, :target_name)
        RETURNING id, status, attempt
    )
    INSERT INTO job_events (job_id, type, data)
    SELECT id, 'status',
        jsonb_build_object('status', status, 'status_reason', NULL, 'attempt', attempt)
    FROM new
""")
# Reads no more rows than it must to know.
_FULL = text("""
    SELECT EXISTS (
        SELECT FROM jobs WHERE key_id = :key_id AND status = 'queued' OFFSET :offset
    )
""")
_OWN_COLUMNS = f"""id, seq, batch_id, custom_id, status, priority, labels, created_at, queued_at,
    started_at, finished_at, deadline_seconds, {SPEC} AS spec, source_sha256, source_name,
    target_sha256, target_name, attempt, progress, error"""
_REASON = f"""
    CASE WHEN status <> 'queued' THEN status_reason
    WHEN NOT EXISTS (SELECT FROM workers WHERE NOT draining AND {FRESH})
        THEN 'No worker is running.'
    WHEN NOT EXISTS (
        SELECT FROM models JOIN workers USING (slot)
        WHERE models.name = jobs.model AND NOT draining AND {FRESH}
    ) THEN format('No running worker serves model ''%s''.', jobs.model)
    WHEN NOT EXISTS (
        SELECT FROM workers
        WHERE workers.schema_version >= jobs.schema_version AND NOT draining AND {FRESH}
    ) THEN 'Its settings are of a newer form than running workers read; it waits for a newer one.'
    WHEN jobs.patch_set IS NOT NULL AND NOT EXISTS (
        SELECT FROM models JOIN patch_sets USING (slot) JOIN workers USING (slot)
        WHERE models.name = jobs.model AND patch_sets.name = jobs.patch_set
        AND NOT draining AND {FRESH}
    ) THEN format('No running worker that serves the model has patch set ''%s''.', jobs.patch_set)
    ELSE COALESCE(status_reason, 'Waits for its turn.') END AS status_reason"""
# Of its key those of a higher priority and the older ones of the same: two ranges of an index. Of
# each other key as many, by turns, and one more where that is older.
_POSITION = f"""
    CASE WHEN status = 'queued' THEN (
        WITH RECURSIVE own AS (
            SELECT LEAST({MAX_POSITION}, (
                SELECT count(*) FROM (
                    SELECT FROM jobs AS other WHERE other.status = 'queued'
                    AND other.key_id = jobs.key_id AND other.priority > jobs.priority
                    LIMIT {MAX_POSITION}
                ) AS higher
            ) + (
                SELECT count(*) FROM (
                    SELECT FROM jobs AS other WHERE other.status = 'queued'
                    AND other.key_id = jobs.key_id AND other.priority = jobs.priority
                    AND other.seq < jobs.seq LIMIT {MAX_POSITION}
                ) AS older
            )) AS place
        ), key AS (
            (SELECT key_id FROM jobs AS other WHERE status = 'queued' ORDER BY key_id LIMIT 1)
            UNION ALL
            SELECT (SELECT key_id FROM jobs AS other WHERE status = 'queued'
                    AND other.key_id > key.key_id ORDER BY key_id LIMIT 1)
            FROM key WHERE key.key_id IS NOT NULL
        )
        SELECT LEAST({MAX_POSITION}, place + (
            SELECT count(*) FROM (
                SELECT FROM key CROSS JOIN LATERAL (
                    SELECT seq, row_number() OVER (ORDER BY priority DESC, seq) AS place
                    FROM (
                        SELECT priority, seq FROM jobs AS other
                        WHERE other.status = 'queued' AND other.key_id = key.key_id
                        ORDER BY priority DESC, seq LIMIT own.place + 1
                    ) AS theirs
                ) AS before
                WHERE key.key_id <> jobs.key_id
                AND (before.place <= own.place OR before.seq < jobs.seq)
                LIMIT {MAX_POSITION}
            ) AS others
        )) FROM own
    ) END AS queue_position"""
_GET = text(f"""
    SELECT {_OWN_COLUMNS}, {_REASON}, {_POSITION}, {DETAILS} AS details,
        CASE WHEN status = 'succeeded' THEN (
            SELECT jsonb_agg(corners.details ORDER BY index) FROM corners WHERE job_id = jobs.id
        ) END AS corners,
        (SELECT array_agg(name) FROM artifacts WHERE job_id = jobs.id) AS files
    FROM jobs LEFT JOIN metrics ON metrics.job_id = jobs.id
    WHERE id = :id AND key_id = :key_id
""")
# The sizes of specs first: a page ends before it is too long, but holds one job at least.
_LIST = f"""
    WITH page AS (
        SELECT found.id, sum(found.size) OVER (ORDER BY found.seq DESC) - found.size AS before
        FROM (
            SELECT id, seq, {SIZE} AS size
            FROM jobs WHERE {{conditions}} ORDER BY seq DESC LIMIT :limit
        ) AS found
    )
    SELECT {_OWN_COLUMNS}, {_REASON}, NULL AS queue_position, NULL AS details, NULL AS corners,
        (SELECT array_agg(name) FROM artifacts WHERE job_id = jobs.id) AS files,
        (SELECT count(*) FROM page) AS found
    FROM jobs WHERE id IN (SELECT id FROM page WHERE before < {PAGE_BYTES}) ORDER BY seq DESC
"""
_CONDITIONS = {
    "before": "seq < :before",
    "status": "status = :status",
    "batch_id": "batch_id = :batch_id",
    "labels": "labels @> CAST(:labels AS text[])",
}
# Ids rather than a subquery: the planner then knows whether two indexes find so few that it is
# worth it, and a label that no batch has costs what it did.
_OR_BATCH = " OR batch_id = ANY(CAST(:batches AS uuid[]))"
_LABELED = text("""
    SELECT id FROM batches WHERE key_id = :key_id AND labels @> CAST(:labels AS text[])
""")
_STANDING = text(f"""
    SELECT status, CAST({SPEC}->>'figures' AS boolean), CAST({SPEC}->>'snapshots' AS int)
    FROM jobs WHERE id = :id AND key_id = :key_id
""")
_CANCEL = cancel_sql("WHERE id = :id AND key_id = :key_id")
_LOCK = text(f"""
    SELECT id FROM jobs WHERE id = :id AND key_id = :key_id AND status IN ({_FINAL}) FOR UPDATE
""")
_EVENTS = text("""
    SELECT id, type, data FROM job_events
    WHERE job_id = :job_id AND id > :after ORDER BY id LIMIT :limit
""")
_CORNER = text("""
    SELECT sha256, media_type FROM corners JOIN blobs ON sha256 = png_sha256
    WHERE job_id = :job_id AND index = :index
""")
_FILE = text("""
    SELECT sha256, media_type FROM artifacts JOIN blobs USING (sha256)
    WHERE job_id = :job_id AND name = :name
""")
_BYTES = text("SELECT bytes FROM blobs WHERE sha256 = :sha256")


async def submit(connection: AsyncConnection, job: NewJob) -> None:
    """Writes a job, queued."""
    (written,) = await specs.put(connection, [job.spec])
    await connection.execute(
        _SUBMIT,
        {
            "id": job.id,
            "key_id": job.key_id,
            "request_id": job.request_id,
            "priority": job.priority,
            "labels": list(job.labels),
            "deadline_seconds": job.deadline_seconds,
            "spec_sha256": written.sha256,
            "spec_bytes": written.size,
            "file_bytes": job.file_bytes,
            "schema_version": job.spec.schema_version,
            "model": job.spec.model,
            "corners": job.spec.corners,
            "batch_key": job.spec.batch_key,
            "patch_set": job.spec.patch_set,
            "source_sha256": job.source.sha256,
            "source_name": job.source.name,
            "target_sha256": job.target.sha256,
            "target_name": job.target.name,
        },
    )


async def has_room(connection: AsyncConnection, *, key_id: UUID, jobs: int, limit: int) -> bool:
    """Whether a key may have so many more jobs waiting, of `limit`."""
    if jobs > limit:
        return False
    return not await connection.scalar(_FULL, {"key_id": key_id, "offset": limit - jobs})


async def get(connection: AsyncConnection, *, key_id: UUID, job_id: UUID) -> Job | None:
    """A job with its place in the queue or its result; None unless it is this key's."""
    found = await connection.execute(_GET, {"id": job_id, "key_id": key_id})
    row = found.mappings().one_or_none()
    return None if row is None else Job(**row)


async def page(
    connection: AsyncConnection,
    *,
    key_id: UUID,
    limit: int,
    before: int | None = None,
    status: Status | None = None,
    batch_id: UUID | None = None,
    label: str | None = None,
) -> tuple[list[Job], bool]:
    """Up to `limit` jobs of a key, the newest first, those older than `before` (a `seq`), and
    whether there are more.

    Without their results and places in the queue. A label is a job's own, or that of its batch.
    """
    given: dict[str, Any] = {"before": before, "status": status, "batch_id": batch_id}
    given["labels"] = None if label is None else [label]
    params = {name: value for name, value in given.items() if value is not None}
    conditions = ["key_id = :key_id", *(_CONDITIONS[name] for name in params)]
    if label is not None:
        labeled = {"key_id": key_id, "labels": [label]}
        if batches := (await connection.scalars(_LABELED, labeled)).all():
            conditions[-1] = f"({conditions[-1]}{_OR_BATCH})"
            params["batches"] = batches
    statement = text(_LIST.format(conditions=" AND ".join(conditions)))
    params |= {"key_id": key_id, "limit": limit + 1}
    rows = [dict(row) for row in (await connection.execute(statement, params)).mappings()]
    found = max((row.pop("found") for row in rows), default=0)
    jobs = [Job(**row) for row in rows[:limit]]
    return jobs, found > len(jobs)


async def standing(connection: AsyncConnection, *, key_id: UUID, job_id: UUID) -> Standing | None:
    """Where a job stands; None unless it is this key's."""
    params = {"id": job_id, "key_id": key_id}
    found = (await connection.execute(_STANDING, params)).one_or_none()
    return None if found is None else Standing(Status(found[0]), found[1], found[2])


async def cancel(connection: AsyncConnection, *, key_id: UUID, job_id: UUID) -> bool:
    """Cancels a job; whether that changed anything."""
    moved = await connection.execute(_CANCEL, {"id": job_id, "key_id": key_id})
    return bool(moved.all())


async def delete(
    connection: AsyncConnection, *, key_id: UUID, job_id: UUID, keep: timedelta
) -> bool:
    """Deletes a job that has ended, and all that is its alone; whether there was one.

    `keep` is how long blobs stay that nobody refers to.
    """
    ended = (await connection.scalars(_LOCK, {"id": job_id, "key_id": key_id})).all()
    if ended:
        await connection.run_sync(removal.delete_jobs, ended, keep)
    return bool(ended)


async def events(
    connection: AsyncConnection, *, job_id: UUID, after: int, limit: int
) -> list[JobEvent]:
    """What happened to a job after the event `after`, the oldest first."""
    params = {"job_id": job_id, "after": after, "limit": limit}
    return [JobEvent(*row) for row in await connection.execute(_EVENTS, params)]


async def corner(connection: AsyncConnection, *, job_id: UUID, index: int) -> File | None:
    """The image of a corner."""
    found = (await connection.execute(_CORNER, {"job_id": job_id, "index": index})).one_or_none()
    return None if found is None else File(*found)


async def file(connection: AsyncConnection, *, job_id: UUID, name: str) -> File | None:
    """An artifact by its name."""
    found = (await connection.execute(_FILE, {"job_id": job_id, "name": name})).one_or_none()
    return None if found is None else File(*found)


async def read(connection: AsyncConnection, sha256: str) -> bytes | None:
    """The bytes of a file."""
    found = await connection.scalar(_BYTES, {"sha256": sha256})
    return None if found is None else bytes(found)
