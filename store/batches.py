"""Batches: jobs submitted together, counted, canceled and read together.

Functions take a connection and never commit.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.spec import SCHEMA_VERSION, CollisionSpec
from store import removal, specs
from store.images import Stored
from store.lifecycle import FINAL, Status
from store.moves import cancel as cancel_sql
from store.specs import DETAILS, SPEC, Written

# What the event loop turns into parameters in one go: some 10 ms.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Item:
    """A job of a batch, checked. Items that share a spec share the object: it is written once."""

    index: int
    custom_id: str | None
    spec: CollisionSpec
    source: Stored
    target: Stored
    priority: int
    labels: tuple[str, ...]
    deadline_seconds: float
    file_bytes: int  # at most, of its result


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch and how its jobs stand. `errors` is None in lists, where only their number is."""

    id: UUID
    seq: int
    created_at: datetime
    cancel_requested_at: datetime | None
    labels: list[str]
    total: int
    refused: int
    errors: list[dict[str, Any]] | None
    counts: Mapping[Status, int]

    @property
    def completed(self) -> bool:
        """Whether no job is left to run."""
        live = (Status.QUEUED, Status.RUNNING, Status.CANCELING)
        return not any(self.counts[status] for status in live)


_INSERT = text("""
    INSERT INTO batches (id, key_id, labels, total, errors, bytes)
    VALUES (:id, :key_id, CAST(:labels AS text[]), :total, CAST(:errors AS jsonb), :bytes)
""")
# In order of index, which is then the order of age. Of specs and labels only the different ones
# come, and each job says which it has. They come as one text: in an array every quotation mark
# would be escaped, in Python, on the event loop.
_INSERT_JOBS = text("""
    WITH spec AS (
        SELECT * FROM unnest(
            CAST(:specs AS text[]), CAST(:models AS text[]), CAST(:corners AS int[]),
            CAST(:batch_keys AS text[]), CAST(:patch_sets AS text[])
        ) WITH ORDINALITY AS spec (sha256, model, corners, batch_key, patch_set, number)
    ), new AS (
        INSERT INTO jobs (id, key_id, batch_id, batch_index, custom_id, request_id, priority,
            labels, deadline_seconds, spec_sha256, file_bytes, schema_version, model, corners,
            batch_key, patch_set,
            source_name, source_sha256, target_name, target_sha256)
        SELECT gen_random_uuid(), :key_id, :batch_id, item.index, item.custom_id, :request_id,
            item.priority,
            ARRAY(SELECT jsonb_array_elements_text(labels.list)),
            item.deadline_seconds, spec.sha256, item.file_bytes, :schema_version, spec.model,
            spec.corners, spec.batch_key, spec.patch_set,
            item.source_name, item.source_sha256, item.target_name, item.target_sha256
        FROM unnest(
            CAST(:indices AS int[]), CAST(:custom_ids AS text[]), CAST(:spec_numbers AS int[]),
            CAST(:priorities AS int[]), CAST(:labels_numbers AS int[]),
            CAST(:deadlines AS float8[]), CAST(:file_bytes AS bigint[]),
            CAST(:source_names AS text[]),
            CAST(:sources AS text[]), CAST(:target_names AS text[]), CAST(:targets AS text[])
        ) AS item (index, custom_id, spec_number, priority, labels_number, deadline_seconds,
            file_bytes, source_name, source_sha256, target_name, target_sha256)
        JOIN spec ON spec.number = item.spec_number
        JOIN jsonb_array_elements(CAST(:labels AS jsonb)) WITH ORDINALITY AS labels (list, number)
            ON labels.number = item.labels_number
        ORDER BY item.index
        RETURNING id, status, attempt
    )
    INSERT INTO job_events (job_id, type, data)
    SELECT id, 'status',
        jsonb_build_object('status', status, 'status_reason', NULL, 'attempt', attempt)
    FROM new
""")


async def create(
    connection: AsyncConnection,
    *,
    key_id: UUID,
    labels: Sequence[str],
    items: Sequence[Item],
    errors: Sequence[Mapping[str, Any]],
    request_id: str | None = None,
    batch_id: UUID | None = None,
) -> UUID:
    """Writes a batch and its jobs, queued; their images must be stored. Its id."""
    batch_id = batch_id or uuid4()
    written = await _put_specs(connection, items)
    told = json.dumps(list(errors))
    sizes = {spec.sha256: spec.size for spec in written.values()}
    await connection.execute(
        _INSERT,
        {
            "id": batch_id,
            "key_id": key_id,
            "labels": list(labels),
            "total": len(items) + len(errors),
            "errors": told,
            "bytes": sum(sizes.values()) + len(told),
        },
    )
    same: dict[str, Any] = {"key_id": key_id, "batch_id": batch_id, "request_id": request_id}
    same["schema_version"] = SCHEMA_VERSION
    remaining = iter(items)
    while chunk := list(islice(remaining, _CHUNK)):
        await connection.execute(_INSERT_JOBS, same | _columns(chunk, written))
    return batch_id


async def _put_specs(connection: AsyncConnection, items: Sequence[Item]) -> dict[int, Written]:
    """Stores the specs of items; by the spec's `id`, under what name."""
    remaining = iter({id(item.spec): item.spec for item in items}.items())
    written: dict[int, Written] = {}
    while chunk := dict(islice(remaining, _CHUNK)):
        written |= zip(chunk, await specs.put(connection, chunk.values()), strict=True)
    return written


def _columns(items: Sequence[Item], written: Mapping[int, Written]) -> dict[str, Any]:
    specs = {id(item.spec): item.spec for item in items}
    spec_numbers = {key: number for number, key in enumerate(specs, start=1)}
    labels = list(dict.fromkeys(item.labels for item in items))
    labels_numbers = {value: number for number, value in enumerate(labels, start=1)}
    return {
        "specs": [written[key].sha256 for key in specs],
        "models": [spec.model for spec in specs.values()],
        "corners": [spec.corners for spec in specs.values()],
        "batch_keys": [spec.batch_key for spec in specs.values()],
        "patch_sets": [spec.patch_set for spec in specs.values()],
        "labels": json.dumps(labels),
        "indices": [item.index for item in items],
        "custom_ids": [item.custom_id for item in items],
        "spec_numbers": [spec_numbers[id(item.spec)] for item in items],
        "priorities": [item.priority for item in items],
        "labels_numbers": [labels_numbers[item.labels] for item in items],
        "deadlines": [item.deadline_seconds for item in items],
        "file_bytes": [item.file_bytes for item in items],
        "source_names": [item.source.name for item in items],
        "sources": [item.source.sha256 for item in items],
        "target_names": [item.target.name for item in items],
        "targets": [item.target.sha256 for item in items],
    }


_COUNTS = text("""
    SELECT batch_id, status, count(*) FROM jobs
    WHERE batch_id = ANY(CAST(:ids AS uuid[])) GROUP BY batch_id, status
""")
_HEAD = """SELECT id, seq, created_at, cancel_requested_at, labels, total,
    jsonb_array_length(errors) AS refused"""
_GET = text(f"""
    {_HEAD}, errors FROM batches WHERE id = :id AND key_id = :key_id
""")
_PAGE = text(f"""
    {_HEAD}, NULL AS errors FROM batches
    WHERE key_id = :key_id AND (CAST(:before AS bigint) IS NULL OR seq < :before)
    AND labels @> CAST(:labels AS text[])
    ORDER BY seq DESC LIMIT :limit
""")


async def get(connection: AsyncConnection, *, key_id: UUID, batch_id: UUID) -> Batch | None:
    """A batch with its counts; None unless it is this key's."""
    found = await connection.execute(_GET, {"id": batch_id, "key_id": key_id})
    batches = await _counted(connection, found.mappings().all())
    return batches[0] if batches else None


async def page(
    connection: AsyncConnection,
    *,
    key_id: UUID,
    limit: int,
    before: int | None = None,
    label: str | None = None,
) -> list[Batch]:
    """Up to `limit` batches of a key, the newest first, those older than `before` (a `seq`)."""
    labels = [] if label is None else [label]
    params = {"key_id": key_id, "before": before, "labels": labels, "limit": limit}
    found = await connection.execute(_PAGE, params)
    return await _counted(connection, found.mappings().all())


async def _counted(connection: AsyncConnection, heads: Sequence[RowMapping]) -> list[Batch]:
    counts = {head["id"]: dict.fromkeys(Status, 0) for head in heads}
    for batch_id, status, count in await connection.execute(_COUNTS, {"ids": list(counts)}):
        counts[batch_id][Status(status)] = count
    return [Batch(**head, counts=counts[head["id"]]) for head in heads]


_EXISTS = text("SELECT EXISTS (SELECT FROM batches WHERE id = :id AND key_id = :key_id)")
_IN_PROGRESS = text("""
    SELECT EXISTS (
        SELECT FROM jobs
        WHERE batch_id = :id AND status IN ('queued', 'running', 'canceling')
    )
""")


async def exists(connection: AsyncConnection, *, key_id: UUID, batch_id: UUID) -> bool:
    """Whether this key has such a batch."""
    return bool(await connection.scalar(_EXISTS, {"id": batch_id, "key_id": key_id}))


async def in_progress(connection: AsyncConnection, batch_id: UUID) -> bool:
    """Whether a job of the batch is left to run."""
    return bool(await connection.scalar(_IN_PROGRESS, {"id": batch_id}))


def _listed(statuses: Iterable[Status]) -> str:
    return ", ".join(f"'{status}'" for status in statuses)


_REQUEST_CANCEL = text("""
    UPDATE batches SET cancel_requested_at = COALESCE(cancel_requested_at, now())
    WHERE id = :id AND key_id = :key_id RETURNING id
""")
_CANCEL_JOBS = cancel_sql("""
    FROM (SELECT id FROM jobs WHERE batch_id = :id ORDER BY id FOR UPDATE) AS own
    WHERE jobs.id = own.id""")


async def cancel(connection: AsyncConnection, *, key_id: UUID, batch_id: UUID) -> bool:
    """Cancels whatever is left of a batch; False unless it is this key's. Once more is no error."""
    ours = await connection.scalar(_REQUEST_CANCEL, {"id": batch_id, "key_id": key_id})
    if ours is not None:
        await connection.execute(_CANCEL_JOBS, {"id": batch_id})
    return ours is not None


_LOCK = text("SELECT id FROM batches WHERE id = :id AND key_id = :key_id FOR UPDATE")
_LOCK_JOBS = text("""
    SELECT id, finished_at IS NOT NULL AS ended FROM jobs WHERE batch_id = :id
    ORDER BY id FOR UPDATE
""")
_DELETE = text("DELETE FROM batches WHERE id = :id")


async def delete(
    connection: AsyncConnection, *, key_id: UUID, batch_id: UUID, keep: timedelta
) -> bool | None:
    """Deletes a batch with its jobs, and all that is theirs alone; False while one has not ended,
    None unless it is this key's.

    `keep` is how long blobs stay that nobody refers to.
    """
    if await connection.scalar(_LOCK, {"id": batch_id, "key_id": key_id}) is None:
        return None
    jobs = (await connection.execute(_LOCK_JOBS, {"id": batch_id})).all()
    if not all(job.ended for job in jobs):
        return False
    await connection.run_sync(removal.delete_jobs, [job.id for job in jobs], keep)
    await connection.execute(_DELETE, {"id": batch_id})
    return True


# Pages, not a cursor: a client that reads slowly then holds neither a connection nor a snapshot.
# What is final does not change, so that pages fit together.
_FINISHED = f"""
    WHERE jobs.batch_id = :id AND jobs.batch_index > :after AND jobs.status IN ({_listed(FINAL)})
    ORDER BY jobs.batch_index LIMIT :limit"""
# Sizes first: a page ends before it holds more bytes, but has one result at least. What older code
# has written has no size; so much have a hundred corners.
_UNMEASURED = 2**19
_RESULTS = text(f"""
    WITH page AS (
        SELECT next.*, sum(size) OVER (ORDER BY batch_index) - size AS before FROM (
            SELECT jobs.id, jobs.batch_index, CASE WHEN metrics.job_id IS NULL THEN 0
                ELSE COALESCE(metrics.size, {_UNMEASURED}) END AS size
            FROM jobs LEFT JOIN metrics ON metrics.job_id = jobs.id {_FINISHED}
        ) AS next
    )
    SELECT jobs.batch_index, json_build_object(
        'index', jobs.batch_index, 'custom_id', jobs.custom_id, 'job_id', jobs.id,
        'status', jobs.status, 'error', jobs.error, 'result',
        {DETAILS} || jsonb_build_object('corners', (
            SELECT jsonb_agg(details ORDER BY index) FROM corners WHERE job_id = jobs.id))
    )::text
    FROM page JOIN jobs USING (id) LEFT JOIN metrics ON metrics.job_id = jobs.id
    WHERE before < :most ORDER BY jobs.batch_index
""")


def _sentences(field: str) -> str:
    """A list of sentences in `details`, one after the other."""
    return (
        f"(SELECT string_agg(each, '; ') FROM jsonb_array_elements_text(details->'{field}') each)"
    )


# A column and what it holds, of a table with a row for each finished job.
TABLE_COLUMNS = {
    "index": "jobs.batch_index",
    "custom_id": "jobs.custom_id",
    "job_id": "jobs.id",
    "status": "jobs.status",
    "error_code": "jobs.error->>'code'",
    "error_message": "jobs.error->>'message'",
    "model": "jobs.model",
    "layer": f"{SPEC}->>'layer'",
    "corners": "jobs.corners",
    "seed": f"({SPEC}->>'seed')::bigint",
    "converged": "metrics.converged",
    "steps": "metrics.steps",
    "seconds": "metrics.seconds",
    "mean_pairwise_distance": "(details->'polytope'->>'mean_pairwise_distance')::float8",
    "spread": "metrics.spread",
    "mean_ssim": "(details->'polytope'->>'mean_ssim')::float8",
    "mean_low_pass_share": "(details->'polytope'->>'mean_low_pass_share')::float8",
    "mean_perceptual": "(details->'polytope'->>'mean_perceptual')::float8",
    "accuracy": "metrics.accuracy",
    "accuracy_8bit": "metrics.accuracy_8bit",
    "mean_probability": "(details->'interpolation'->>'mean_probability')::float8",
    "mean_probability_8bit": "(details->'interpolation'->>'mean_probability_8bit')::float8",
    "min_probability": "metrics.min_probability",
    "worst_margin": "(details->'worst'->>'margin')::float8",
    "worst_margin_8bit": "(details->'worst'->>'margin_8bit')::float8",
    "certificate": "details->'certificate'->>'outcome'",
    "labels": "jobs.labels",
    "warnings": _sentences("warnings"),
    "notes": _sentences("notes"),
}
_TABLE = text(f"""
    SELECT {", ".join(f"{value} AS {name}" for name, value in TABLE_COLUMNS.items())}
    FROM jobs LEFT JOIN metrics ON metrics.job_id = jobs.id {_FINISHED}
""")


async def results(
    connection: AsyncConnection, batch_id: UUID, *, after: int = -1, limit: int, most: int
) -> list[tuple[int, str]]:
    """Up to `limit` finished jobs behind index `after`: each its index and its line of JSON.

    Fewer, but one, where their results have more than `most` bytes.
    """
    params = {"id": batch_id, "after": after, "limit": limit, "most": most}
    return [(row[0], row[1]) for row in await connection.execute(_RESULTS, params)]


async def table(
    connection: AsyncConnection, batch_id: UUID, *, after: int = -1, limit: int
) -> list[dict[str, Any]]:
    """Up to `limit` finished jobs behind index `after`, each with what has a column of its own."""
    params = {"id": batch_id, "after": after, "limit": limit}
    found = await connection.execute(_TABLE, params)
    return [dict(row) for row in found.mappings()]
