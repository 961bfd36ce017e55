"""What workers do to jobs: claim them, vouch for them, end them or hand them back.

Every write names the lease it is made under; a lease that is no longer ours matches no row, and
then nothing happens. Times are the database's. Functions take a connection and never commit.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from core.errors import UnknownName
from store import blobs
from store.lifecycle import Event, Status
from store.moves import CHANNEL, KEPT, befall
from store.overview import LIVE
from store.specs import SPEC
from store.workers import FRESH

ALONE = "alone:"  # begins the batch key of a job that shares its worker with no other
# A job whose worker vanished this often is suspected, and its neighbours are not to suffer.
SUSPECT_AFTER = 2


@dataclass(frozen=True)
class Lease:
    """The right to write to a job."""

    job_id: UUID
    token: UUID


@dataclass(frozen=True)
class Claimed:
    """A job as its worker gets it."""

    lease: Lease
    key_id: UUID
    attempt: int
    batch_key: str
    spec: dict[str, Any]
    source: tuple[str, str]  # name, SHA-256
    target: tuple[str, str]
    deadline_seconds: float
    checkpoint_sha256: str | None
    request_id: str | None


@dataclass(frozen=True)
class Kind:
    """Jobs that wait for the same engine; `priority` and `seq` are those of the first of them."""

    batch_key: str
    model: str
    patch_set: str | None
    priority: int
    seq: int


@dataclass(frozen=True)
class Finished:
    """A result on its way into the store: what `succeed` writes of a job, in one transaction.

    `result` is the `Result` as JSON has it; `pngs` are its corners, `files` the rest by name.
    """

    lease: Lease
    result: Mapping[str, Any]
    pngs: Sequence[bytes]
    files: Mapping[str, bytes] = field(default_factory=dict)


_GIVEN = "CAST(:reason AS text)"
_HELD = """
    FROM (
        SELECT jobs.id FROM jobs
        JOIN unnest(CAST(:ids AS uuid[]), CAST(:tokens AS uuid[])) AS lease (id, token)
        ON jobs.id = lease.id AND jobs.lease_token = lease.token
        ORDER BY jobs.id FOR UPDATE OF jobs
    ) AS held
    WHERE jobs.id = held.id"""
_UNLEASE = "lease_token = NULL, lease_expires_at = NULL"


def _held(leases: Iterable[Lease]) -> dict[str, Any]:
    held = list(leases)
    return {"ids": [lease.job_id for lease in held], "tokens": [lease.token for lease in held]}


# Walks from kind to kind along the index instead of reading all that wait.
_KINDS = text("""
    WITH RECURSIVE kind AS (
        SELECT min(batch_key) AS batch_key FROM jobs WHERE status = 'queued'
        UNION ALL
        SELECT (SELECT min(batch_key) FROM jobs
                WHERE status = 'queued' AND batch_key > kind.batch_key)
        FROM kind WHERE kind.batch_key IS NOT NULL
    )
    SELECT head.* FROM kind CROSS JOIN LATERAL (
        SELECT batch_key, model, patch_set, priority, seq FROM jobs
        WHERE status = 'queued' AND batch_key = kind.batch_key
        ORDER BY priority DESC, seq LIMIT 1
    ) AS head
    ORDER BY head.priority DESC, head.seq
""")


def kinds(connection: Connection) -> list[Kind]:
    """The kinds of jobs that wait, the most urgent first."""
    return [Kind(*row) for row in connection.execute(_KINDS)]


# Of each key the first of its jobs, then of all those the first by priority, by turn and by age;
# a key that has jobs running waits for as many turns. The lock skips what another worker takes.
_CLAIM = befall(
    Event.CLAIM,
    """
    FROM (
        SELECT id FROM jobs WHERE status = 'queued' AND id IN (
            WITH RECURSIVE key AS (
                (SELECT key_id FROM jobs WHERE status = 'queued' AND batch_key = :batch_key
                 ORDER BY key_id LIMIT 1)
                UNION ALL
                SELECT (SELECT key_id FROM jobs
                        WHERE status = 'queued' AND batch_key = :batch_key
                        AND key_id > key.key_id ORDER BY key_id LIMIT 1)
                FROM key WHERE key.key_id IS NOT NULL
            ), busy AS (
                SELECT key_id, count(*) AS jobs FROM jobs
                WHERE status IN ('running', 'canceling') GROUP BY key_id
            ), turns AS (
                SELECT own.*, COALESCE(busy.jobs, 0) + row_number() OVER (
                    PARTITION BY own.key_id ORDER BY own.priority DESC, own.seq) AS turn
                FROM key
                CROSS JOIN LATERAL (
                    SELECT id, key_id, priority, seq, corners FROM jobs
                    WHERE status = 'queued' AND batch_key = :batch_key AND key_id = key.key_id
                    ORDER BY priority DESC, seq LIMIT :jobs
                ) AS own
                LEFT JOIN busy ON busy.key_id = own.key_id
            ), filled AS (
                SELECT id, turn, priority, seq, sum(corners) OVER place AS rows,
                    row_number() OVER place AS place
                FROM turns WINDOW place AS (ORDER BY priority DESC, turn, seq)
            )
            SELECT id FROM filled WHERE rows <= :rows OR (place = 1 AND :at_least_one)
            ORDER BY priority DESC, turn, seq LIMIT :jobs
        )
        FOR UPDATE SKIP LOCKED
    ) AS chosen
    WHERE jobs.id = chosen.id""",
    """attempt = attempt + 1,
    started_at = COALESCE(started_at, clock_timestamp()),
    lease_token = gen_random_uuid(),
    lease_expires_at = clock_timestamp() + :lease,
    worker_id = :worker_id,
    progress = NULL""",
    reason="NULL",
    columns=f"""id, seq, key_id, lease_token, attempt, batch_key, {SPEC} AS spec,
        source_name, source_sha256, target_name, target_sha256, deadline_seconds,
        checkpoint_sha256, request_id""",
)


def claim(
    connection: Connection,
    *,
    batch_key: str,
    rows: int,
    jobs: int,
    at_least_one: bool,
    worker_id: UUID,
    lease: timedelta,
) -> list[Claimed]:
    """Takes up to `jobs` waiting jobs of a kind, of at most `rows` corners together.

    By priority first, then keys take turns, then by age. A job without room is not skipped for a
    smaller one behind it, and with `at_least_one` it is taken all the same. Empty also where
    another worker was quicker.
    """
    params = {"batch_key": batch_key, "rows": rows, "jobs": jobs, "at_least_one": at_least_one}
    taken = connection.execute(_CLAIM, params | {"worker_id": worker_id, "lease": lease})
    claimed = [
        (
            job.seq,
            Claimed(
                lease=Lease(job.id, job.lease_token),
                key_id=job.key_id,
                attempt=job.attempt,
                batch_key=job.batch_key,
                spec=job.spec,
                source=(job.source_name, job.source_sha256),
                target=(job.target_name, job.target_sha256),
                deadline_seconds=job.deadline_seconds,
                checkpoint_sha256=job.checkpoint_sha256,
                request_id=job.request_id,
            ),
        )
        for job in taken
    ]
    return [job for _, job in sorted(claimed, key=lambda pair: pair[0])]


def read_blobs(connection: Connection, hashes: Iterable[str]) -> dict[str, bytes]:
    """The blobs with these hashes, those that there are."""
    found = connection.execute(
        text("SELECT sha256, bytes FROM blobs WHERE sha256 = ANY(CAST(:hashes AS text[]))"),
        {"hashes": list(set(hashes))},
    )
    return {row.sha256: bytes(row.bytes) for row in found}


_EXTEND = text(f"""
    UPDATE jobs SET lease_expires_at = clock_timestamp() + :lease
    {_HELD} RETURNING jobs.lease_token, jobs.status
""")
_PROGRESS = text(f"""
    WITH told AS (
        UPDATE jobs SET progress = news.progress
        FROM jsonb_to_recordset(CAST(:news AS jsonb)) AS news (id uuid, token uuid, progress jsonb)
        WHERE jobs.id = news.id AND jobs.lease_token = news.token
        RETURNING jobs.id, jobs.progress
    ), noted AS (
        INSERT INTO job_events (job_id, type, data) SELECT id, 'progress', progress FROM told
    )
    SELECT pg_notify('{CHANNEL}', id::text) FROM told
""")


def extend(connection: Connection, leases: Iterable[Lease], lease: timedelta) -> dict[UUID, Status]:
    """Renews leases; the status of each job that is still ours, by the lease's token."""
    held = connection.execute(_EXTEND, _held(leases) | {"lease": lease})
    return {row.lease_token: Status(row.status) for row in held}


def report_progress(connection: Connection, news: Mapping[Lease, Mapping[str, Any]]) -> None:
    """Tells how far jobs are."""
    rows = [
        {"id": str(lease.job_id), "token": str(lease.token), "progress": progress}
        for lease, progress in sorted(news.items(), key=lambda item: item[0].job_id)
    ]
    connection.execute(_PROGRESS, {"news": json.dumps(rows)})


_CHECKPOINT = text(f"""
    UPDATE jobs SET checkpoint_sha256 = :sha256 {_HELD} RETURNING jobs.id
""")


def keep_checkpoint(connection: Connection, lease: Lease, state: bytes, *, inline: bool) -> bool:
    """Keeps where a job stands, in the store or, not `inline`, by its hash; whether it is ours."""
    sha256 = blobs.digest(state)
    if inline:
        connection.execute(*blobs.put([(blobs.SAFETENSORS, state)]))
    return bool(connection.execute(_CHECKPOINT, _held([lease]) | {"sha256": sha256}).all())


_SNAPSHOT = text(f"""
    WITH mine AS (
        UPDATE jobs SET progress = progress {_HELD} RETURNING jobs.id
    ), kept AS (
        INSERT INTO artifacts (job_id, name, sha256) SELECT id, :name, :sha256 FROM mine
        ON CONFLICT DO NOTHING
    ), noted AS (
        INSERT INTO job_events (job_id, type, data)
        SELECT id, 'snapshot', jsonb_build_object('steps', CAST(:steps AS int)) FROM mine
    )
    SELECT pg_notify('{CHANNEL}', id::text) FROM mine
""")


def keep_snapshot(connection: Connection, lease: Lease, steps: int, png: bytes) -> None:
    """Keeps a picture of the corners on their way, as `snapshots/<steps>.png`."""
    connection.execute(*blobs.put([(blobs.PNG, png)]))
    named = {"name": f"snapshots/{steps}.png", "sha256": blobs.digest(png), "steps": steps}
    connection.execute(_SNAPSHOT, _held([lease]) | named)


_SUCCEED = befall(
    Event.SUCCEED,
    _HELD,
    f"{_UNLEASE}, checkpoint_sha256 = NULL",
    reason="NULL",
    file_bytes=f"""{KEPT} + (
        SELECT bytes FROM unnest(CAST(:ids AS uuid[]), CAST(:bytes AS bigint[])) AS own (id, bytes)
        WHERE own.id = jobs.id)""",
)
# Many values of JSON travel as one: escaped one by one, for an array, they take far longer.
_CORNERS = text("""
    INSERT INTO corners (job_id, index, png_sha256, converged, label, probability, l_pos,
        violation, relative_residual, distance_to_source, distance_to_target, details)
    SELECT job_id, index, png_sha256, converged, label, probability, l_pos,
        violation, relative_residual, distance_to_source, distance_to_target, details
    FROM jsonb_to_recordset(CAST(:rows AS jsonb))
        AS new (job_id uuid, png_sha256 text, details jsonb),
    jsonb_to_record(details) AS corner (index smallint, converged boolean, label int,
        probability float8, l_pos float8, violation float8, relative_residual float8,
        distance_to_source float8, distance_to_target float8)
""")
_METRICS = text(f"""
    INSERT INTO metrics (job_id, converged, steps, seconds, spread, accuracy, accuracy_8bit,
        min_probability, size, details)
    SELECT job_id, (details->>'converged')::boolean, (details->>'steps')::int,
        (details->>'seconds')::float8, (details->'polytope'->>'spread')::float8,
        (details->'interpolation'->>'accuracy')::float8,
        (details->'interpolation'->>'accuracy_8bit')::float8,
        (details->'interpolation'->>'min_probability')::float8, new.size,
        CASE WHEN details->'provenance'->'spec' = {SPEC}
            THEN details #- '{{provenance,spec}}' ELSE details END
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS new (job_id uuid, details jsonb, size int)
    JOIN jobs ON jobs.id = new.job_id
""")
_ARTIFACTS = text("""
    INSERT INTO artifacts (job_id, name, sha256)
    SELECT * FROM unnest(CAST(:job_ids AS uuid[]), CAST(:names AS text[]), CAST(:hashes AS text[]))
    ON CONFLICT (job_id, name) DO UPDATE SET sha256 = excluded.sha256
""")


def succeed(connection: Connection, finished: Sequence[Finished]) -> set[UUID]:
    """Ends jobs with their results, all that belongs to one or nothing; those that succeeded.

    The others were lost to another worker, or were to be canceled and now are.
    """
    # First what is large: the jobs' rows, for which the heartbeat waits, are locked but briefly.
    stored = [(blobs.PNG, png) for job in finished for png in job.pngs]
    files = [(job, name, content) for job in finished for name, content in job.files.items()]
    stored += [(_media_type(name), content) for _, name, content in files]
    connection.execute(*blobs.put(stored))
    sizes = [len(json.dumps(job.result)) for job in finished]
    contents = [
        size + sum(map(len, [*job.pngs, *job.files.values()]))
        for job, size in zip(finished, sizes, strict=True)
    ]
    held = _held(job.lease for job in finished)
    moved = connection.execute(_SUCCEED, held | {"bytes": contents}).all()
    succeeded = {job.id for job in moved if job.status == Status.SUCCEEDED}
    ours = [job for job in finished if job.lease.job_id in succeeded]
    if not ours:
        return succeeded
    files = [entry for entry in files if entry[0].lease.job_id in succeeded]
    corners = [
        {"job_id": str(job.lease.job_id), "png_sha256": blobs.digest(png), "details": corner}
        for job in ours
        for png, corner in zip(job.pngs, job.result["corners"], strict=True)
    ]
    connection.execute(_CORNERS, {"rows": json.dumps(corners)})
    metrics = [
        {
            "job_id": str(job.lease.job_id),
            "details": {name: v for name, v in job.result.items() if name != "corners"},
            "size": size,
        }
        for job, size in zip(finished, sizes, strict=True)
        if job.lease.job_id in succeeded
    ]
    connection.execute(_METRICS, {"rows": json.dumps(metrics)})
    connection.execute(
        _ARTIFACTS,
        {
            "job_ids": [job.lease.job_id for job, _, _ in files],
            "names": [name for _, name, _ in files],
            "hashes": [blobs.digest(content) for _, _, content in files],
        },
    )
    return succeeded


def _media_type(name: str) -> str:
    return blobs.PNG if name.endswith(".png") else blobs.NPZ


_FAIL = befall(
    Event.FAIL,
    _HELD,
    f"""{_UNLEASE}, checkpoint_sha256 = NULL,
    error = CASE jobs.status WHEN 'running' THEN
        jsonb_build_object('code', CAST(:code AS text), 'message', CAST(:reason AS text)) END""",
    reason=_GIVEN,
)


def fail(connection: Connection, lease: Lease, code: str, message: str) -> bool:
    """Ends a job without a result, and says why; whether it was still ours."""
    params = _held([lease]) | {"code": code, "reason": message}
    return bool(connection.execute(_FAIL, params).all())


_RELEASE = befall(
    Event.RELEASE,
    _HELD,
    f"""{_UNLEASE}, queued_at = clock_timestamp(), progress = NULL,
    batch_key = CASE WHEN CAST(:alone AS boolean) AND NOT starts_with(batch_key, '{ALONE}')
        THEN '{ALONE}' || jobs.id ELSE batch_key END""",
    reason=_GIVEN,
)


def release(
    connection: Connection, leases: Iterable[Lease], reason: str, *, alone: bool = False
) -> None:
    """Hands jobs back to the queue, where they may be for a worker `alone`; those that were to be
    canceled are.
    """
    connection.execute(_RELEASE, _held(leases) | {"reason": reason, "alone": alone})


_EXPIRED = """
    FROM (
        SELECT id FROM jobs
        WHERE status IN ('running', 'canceling') AND lease_expires_at < clock_timestamp()
        AND (pg_postmaster_start_time() < clock_timestamp() - CAST(:lease AS interval)
            OR lease_expires_at = '-infinity')
        AND (crashes + 1 < :max_crashes) = {again}
        ORDER BY id FOR UPDATE SKIP LOCKED
    ) AS expired
    WHERE jobs.id = expired.id"""
_LOSE = befall(
    Event.LOSE,
    _EXPIRED.format(again="true"),
    f"""{_UNLEASE}, queued_at = clock_timestamp(), progress = NULL, crashes = crashes + 1,
    batch_key = CASE WHEN crashes + 1 >= {SUSPECT_AFTER}
        THEN '{ALONE}' || jobs.id ELSE batch_key END""",
    reason="""format('Its worker vanished, for the %s. time of %s; it waits for another.',
        crashes + 1, CAST(:max_crashes AS int))""",
)
_GIVE_UP = befall(
    Event.GIVE_UP,
    _EXPIRED.format(again="false"),
    f"""{_UNLEASE}, crashes = crashes + 1,
    error = CASE jobs.status WHEN 'running' THEN
        jsonb_build_object('code', 'worker_lost', 'message', CAST(:reason AS text)) END""",
    reason=_GIVEN,
)


def expire(connection: Connection, max_crashes: int, lease: timedelta) -> int:
    """Takes jobs from workers whose leases ran out: back to the queue, or failed after the last
    of `max_crashes` attempts. How many there were.

    A database that has started less than a `lease` ago is not yet in a position to tell.
    """
    params = {"max_crashes": max_crashes, "lease": lease}
    lost = connection.execute(_LOSE, params).all()
    reason = (
        f"{max_crashes} workers vanished while they ran this job; it may need more memory than "
        "they have, or a step of it hangs."
    )
    given_up = connection.execute(_GIVE_UP, params | {"reason": reason}).all()
    count(connection, "lease_losses", len(lost) + len(given_up))
    return len(lost) + len(given_up)


# No live worker at all says nothing of a set: then no clock runs.
_MISSING = text(f"""
    WITH missing AS (
        SELECT name FROM unnest(CAST(:names AS text[])) AS wanted (name)
        WHERE EXISTS (SELECT FROM workers WHERE NOT draining AND {FRESH})
        AND NOT EXISTS (SELECT FROM patch_sets WHERE patch_sets.name = wanted.name AND {LIVE})
    ), back AS (
        DELETE FROM missing_patch_sets WHERE name NOT IN (SELECT name FROM missing)
    ), noted AS (
        INSERT INTO missing_patch_sets (name) SELECT name FROM missing ON CONFLICT DO NOTHING
    )
    SELECT name FROM missing_patch_sets JOIN missing USING (name)
    WHERE since < clock_timestamp() - :grace
""")
_LIVE_SETS = text(f"SELECT DISTINCT name FROM patch_sets WHERE {LIVE}")
_STRAND = befall(
    Event.STRAND,
    """
    FROM (
        SELECT id FROM jobs
        WHERE status = 'queued' AND batch_key = ANY(CAST(:keys AS text[])) AND patch_set = :name
        ORDER BY id FOR UPDATE SKIP LOCKED
    ) AS stranded
    WHERE jobs.id = stranded.id""",
    """checkpoint_sha256 = NULL, error = jsonb_build_object(
        'code', 'patch_set_missing', 'message', CAST(:reason AS text))""",
    reason=_GIVEN,
)


def strand(connection: Connection, waiting: Iterable[Kind], grace: timedelta) -> int:
    """Fails jobs of these kinds whose patch set no live worker has had for a `grace`; how many.

    Only while there is a live worker: one that starts again loses no job.
    """
    keys: dict[str, list[str]] = {}
    for kind in waiting:
        if kind.patch_set is not None:
            keys.setdefault(kind.patch_set, []).append(kind.batch_key)
    stranded = 0
    for name in connection.scalars(_MISSING, {"names": list(keys), "grace": grace}).all():
        unknown = UnknownName("patch set", name, connection.scalars(_LIVE_SETS))
        reason = (
            f"{unknown} The workers have it no more: build it again (`polycollide patches build`), "
            "then submit the job again."
        )
        params = {"name": name, "keys": keys[name], "reason": reason}
        stranded += len(connection.execute(_STRAND, params).all())
    return stranded


def checkpoints(connection: Connection) -> set[str]:
    """The hashes of all checkpoints that some job may go on from."""
    named = text("SELECT checkpoint_sha256 FROM jobs WHERE checkpoint_sha256 IS NOT NULL")
    return set(connection.scalars(named))


def forget_checkpoint(connection: Connection, sha256: str) -> bool:
    """Deletes a checkpoint unless a job may go on from it; whether nobody needs it."""
    named = text("SELECT EXISTS (SELECT FROM jobs WHERE checkpoint_sha256 = :sha256)")
    if connection.scalar(named, {"sha256": sha256}):
        return False
    connection.execute(
        text("DELETE FROM blobs WHERE sha256 = :sha256 AND media_type = :media_type"),
        {"sha256": sha256, "media_type": blobs.SAFETENSORS},
    )
    return True


def lock_reconciling(connection: Connection) -> bool:
    """Takes the lock under which leases expire, for this transaction; whether it was free."""
    return bool(connection.scalar(text("SELECT pg_try_advisory_xact_lock(7265636)")))


def count(connection: Connection, name: str, more: int) -> None:
    """Adds to a counter."""
    if more:
        connection.execute(
            text("""
                INSERT INTO counters (name, value) VALUES (:name, :more)
                ON CONFLICT (name) DO UPDATE SET value = counters.value + excluded.value
            """),
            {"name": name, "more": more},
        )
