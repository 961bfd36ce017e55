"""What workers do to jobs: claim them, vouch for them, end them or hand them back.

Every write names the lease it is made under; a lease that is no longer ours matches no row, and
then nothing happens. Times are the database's. Functions take a connection and never commit.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from core.errors import UnknownName
from core.spec import SCHEMA_VERSION
from store import blobs
from store.lifecycle import Event, Status
from store.moves import CHANNEL, KEPT, befall
from store.overview import LIVE
from store.specs import SPEC

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
    """Jobs that wait for the same engine; `first` has the priority of each key's first one."""

    batch_key: str
    model: str
    patch_set: str | None
    first: Mapping[UUID, int]


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


# What this version of a worker can read, and has not failed to.
_READABLE = "schema_version <= :version AND id <> ALL(CAST(:unread AS uuid[]))"
_BUSY = """
    SELECT key_id, sum(corners) AS rows FROM jobs
    WHERE status IN ('running', 'canceling') GROUP BY key_id"""
# Walks from kind to kind and in each from key to key along the index, instead of reading all that
# wait. A key's kinds wait for the rows that it has in flight, and for those that go before.
_KINDS = text(f"""
    WITH RECURSIVE pair AS (
        (SELECT batch_key, key_id FROM jobs WHERE status = 'queued'
         ORDER BY batch_key, key_id LIMIT 1)
        UNION ALL
        SELECT next.* FROM pair CROSS JOIN LATERAL (
            SELECT batch_key, key_id FROM jobs
            WHERE status = 'queued' AND (batch_key, key_id) > (pair.batch_key, pair.key_id)
            ORDER BY batch_key, key_id LIMIT 1
        ) AS next
    ), head AS (
        SELECT own.* FROM pair CROSS JOIN LATERAL (
            SELECT batch_key, key_id, model, patch_set, priority, seq, corners, queued_at
            FROM jobs
            WHERE status = 'queued' AND batch_key = pair.batch_key AND key_id = pair.key_id
            AND {_READABLE}
            ORDER BY priority DESC, seq LIMIT 1
        ) AS own
    )
    SELECT batch_key, key_id, model, patch_set, priority FROM head
    LEFT JOIN ({_BUSY}) AS busy USING (key_id)
    ORDER BY COALESCE(busy.rows, 0) + sum(corners) OVER (
        PARTITION BY key_id ORDER BY priority DESC, seq) - corners, queued_at, seq
""")


def _readable(unread: Iterable[UUID]) -> dict[str, Any]:
    return {"version": SCHEMA_VERSION, "unread": list(unread)}


def kinds(connection: Connection, unread: Iterable[UUID] = ()) -> list[Kind]:
    """The kinds of jobs that wait, by the turns of their keys; not those of a newer form of
    settings, nor `unread` jobs.
    """
    found: dict[str, Kind] = {}
    for row in connection.execute(_KINDS, _readable(unread)):
        named = Kind(row.batch_key, row.model, row.patch_set, {})
        kind = found.setdefault(row.batch_key, named)
        found[row.batch_key] = replace(kind, first={**kind.first, row.key_id: row.priority})
    return list(found.values())


# Of each key the first of its jobs, by priority and age; then those of all keys by their turn,
# which is the rows that a key has in flight and in jobs that go before. So each has the same share
# of rows while others wait; of equals, who waits longer, since a job may have given way. The lock
# skips what another worker takes.
_CLAIM = befall(
    Event.CLAIM,
    f"""
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
            ), turns AS (
                SELECT own.*, COALESCE(busy.rows, 0) + sum(corners) OVER (
                    PARTITION BY own.key_id ORDER BY own.priority DESC, own.seq) - corners AS turn
                FROM key
                CROSS JOIN LATERAL (
                    SELECT id, key_id, priority, seq, corners, queued_at FROM jobs
                    WHERE status = 'queued' AND batch_key = :batch_key AND key_id = key.key_id
                    AND {_READABLE}
                    ORDER BY priority DESC, seq LIMIT :jobs
                ) AS own
                LEFT JOIN ({_BUSY}) AS busy ON busy.key_id = own.key_id
            ), filled AS (
                SELECT id, sum(corners) OVER place AS rows, row_number() OVER place AS place
                FROM turns WINDOW place AS (ORDER BY turn, queued_at, seq)
            )
            SELECT id FROM filled WHERE rows <= :rows OR (place = 1 AND :at_least_one)
            ORDER BY place LIMIT :jobs
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
    unread: Iterable[UUID] = (),
) -> list[Claimed]:
    """Takes up to `jobs` waiting jobs of a kind, of at most `rows` corners together.

    Keys take turns, so that each has as many rows in flight; a key's own jobs go by priority, then
    by age. A job without room is not skipped for a smaller one behind it, and with `at_least_one`
    it is taken all the same. Left alone are jobs of a newer form of settings, and `unread` ones.
    Empty also where another worker was quicker.
    """
    params = {"batch_key": batch_key, "rows": rows, "jobs": jobs, "at_least_one": at_least_one}
    params |= _readable(unread)
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
    {_HELD} RETURNING jobs.lease_token, jobs.status, jobs.keep
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


def extend(
    connection: Connection, leases: Iterable[Lease], lease: timedelta
) -> dict[UUID, tuple[Status, bool]]:
    """Renews leases; of each job that is still ours, by the lease's token, its status, and whether
    its owner wants no more of it than what it has found.
    """
    held = connection.execute(_EXTEND, _held(leases) | {"lease": lease})
    return {row.lease_token: (Status(row.status), row.keep) for row in held}


def report_progress(connection: Connection, news: Mapping[Lease, Mapping[str, Any]]) -> None:
    """Tells how far jobs are."""
    rows = [
        {"id": str(lease.job_id), "token": str(lease.token), "progress": progress}
        for lease, progress in sorted(news.items(), key=lambda item: item[0].job_id)
    ]
    connection.execute(_PROGRESS, {"news": json.dumps(rows)})


_CHECKPOINT = text(f"""
    UPDATE jobs SET checkpoint_sha256 = :sha256,
        crashes = CASE WHEN :steps > COALESCE(checkpoint_steps, 0) THEN 0 ELSE crashes END,
        checkpoint_steps = GREATEST(:steps, checkpoint_steps)
    {_HELD} RETURNING jobs.id
""")


def keep_checkpoint(
    connection: Connection, lease: Lease, state: bytes, steps: int, *, inline: bool
) -> bool:
    """Keeps where a job stands, in the store or, not `inline`, by its hash; whether it is ours.

    A job that gets further than ever is not to blame for what ended its workers before.
    """
    sha256 = blobs.digest(state)
    if inline:
        connection.execute(*blobs.put([(blobs.SAFETENSORS, state)]))
    params = _held([lease]) | {"sha256": sha256, "steps": steps}
    return bool(connection.execute(_CHECKPOINT, params).all())


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
    reason="CASE WHEN keep THEN 'Its owner ended it, and kept what it had found.' END",
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
    ) AS crashed
    WHERE jobs.id = crashed.id"""
_CRASHED = """
    FROM (
        SELECT jobs.id FROM jobs
        JOIN unnest(CAST(:ids AS uuid[]), CAST(:tokens AS uuid[])) AS lease (id, token)
        ON jobs.id = lease.id AND jobs.lease_token = lease.token
        WHERE (crashes + 1 < :max_crashes) = {again}
        ORDER BY jobs.id FOR UPDATE OF jobs
    ) AS crashed
    WHERE jobs.id = crashed.id"""


def _lose(which: str) -> TextClause:
    return befall(
        Event.LOSE,
        which.format(again="true"),
        f"""{_UNLEASE}, queued_at = clock_timestamp(), progress = NULL, crashes = crashes + 1,
        batch_key = CASE WHEN crashes + 1 >= {SUSPECT_AFTER}
            THEN '{ALONE}' || jobs.id ELSE batch_key END""",
        reason="""format('%s, for the %s. time of %s; it waits for another.',
            CAST(:what AS text), crashes + 1, CAST(:max_crashes AS int))""",
    )


def _give_up(which: str) -> TextClause:
    return befall(
        Event.GIVE_UP,
        which.format(again="false"),
        f"""{_UNLEASE}, crashes = crashes + 1,
        error = CASE jobs.status WHEN 'running' THEN
            jsonb_build_object('code', 'worker_lost', 'message', CAST(:reason AS text)) END""",
        reason=_GIVEN,
    )


_LOSE, _GIVE_UP = _lose(_EXPIRED), _give_up(_EXPIRED)
_LOSE_HELD, _GIVE_UP_HELD = _lose(_CRASHED), _give_up(_CRASHED)


def expire(connection: Connection, max_crashes: int, lease: timedelta) -> int:
    """Takes jobs from workers whose leases ran out: back to the queue, or failed after the last
    of `max_crashes` attempts. How many there were.

    A database that has started less than a `lease` ago is not yet in a position to tell.
    """
    params = {"max_crashes": max_crashes, "lease": lease}
    lost = connection.execute(_LOSE, params | {"what": "Its worker vanished"}).all()
    reason = (
        f"{max_crashes} workers vanished while they ran this job; it may need more memory than "
        "they have, or a step of it hangs."
    )
    given_up = connection.execute(_GIVE_UP, params | {"reason": reason}).all()
    count(connection, "lease_losses", len(lost) + len(given_up))
    return len(lost) + len(given_up)


def crash(connection: Connection, leases: Iterable[Lease], max_crashes: int, error: str) -> None:
    """Takes jobs from a worker that is about to end since its accelerator failed, as `expire` does
    from one that has vanished: any of them may be what made it fail.
    """
    params = _held(leases) | {"max_crashes": max_crashes}
    what = f"Its worker's accelerator failed ({error})"
    connection.execute(_LOSE_HELD, params | {"what": what})
    reason = (
        f"The accelerators of {max_crashes} workers failed while they ran this job, at last with: "
        f"{error}; submit it again with other settings, or tell whoever runs the workers."
    )
    connection.execute(_GIVE_UP_HELD, params | {"reason": reason})


_REFUSE = text("""
    INSERT INTO refusals (slot, batch_key, reason) VALUES (:slot, :batch_key, :reason)
    ON CONFLICT (slot, batch_key) DO UPDATE SET reason = excluded.reason
""")


def refuse(connection: Connection, lease: Lease, slot: str, batch_key: str, reason: str) -> None:
    """Hands a job back whose network the worker of a slot cannot load: others may."""
    connection.execute(_REFUSE, {"slot": slot, "batch_key": batch_key, "reason": reason})
    release(connection, [lease], reason)


def accept(connection: Connection, slot: str, batch_key: str) -> None:
    """Says that the worker of a slot can load after all what it has refused."""
    connection.execute(
        text("DELETE FROM refusals WHERE slot = :slot AND batch_key = :batch_key"),
        {"slot": slot, "batch_key": batch_key},
    )


_TRIED = text("""
    SELECT DISTINCT batch_key, model, patch_set FROM jobs WHERE status IN ('running', 'canceling')
""")
_SERVED = {
    "slots": text(f"SELECT slot FROM workers WHERE {LIVE}"),
    # Who has not reported any yet may have them all.
    "reporting": text(f"SELECT DISTINCT slot FROM models WHERE {LIVE}"),
    "models": text(f"SELECT slot, name FROM models WHERE name = ANY(:models) AND {LIVE}"),
    "patch_sets": text(f"SELECT slot, name FROM patch_sets WHERE {LIVE}"),
    "refusals": text(f"SELECT slot, batch_key, reason FROM refusals WHERE {LIVE} ORDER BY since"),
}
_UNSERVED = text("""
    WITH back AS (
        DELETE FROM unserved_kinds WHERE batch_key <> ALL(CAST(:keys AS text[]))
    ), noted AS (
        INSERT INTO unserved_kinds (batch_key) SELECT unnest(CAST(:keys AS text[]))
        ON CONFLICT DO NOTHING
    )
    SELECT batch_key FROM unserved_kinds
    WHERE batch_key = ANY(CAST(:keys AS text[])) AND since < clock_timestamp() - :grace
""")
_MODEL_NAMES = text(f"SELECT DISTINCT name FROM models WHERE {LIVE}")
_STRAND = befall(
    Event.STRAND,
    """
    FROM (
        SELECT id FROM jobs WHERE status = 'queued' AND batch_key = :batch_key
        ORDER BY id FOR UPDATE SKIP LOCKED
    ) AS stranded
    WHERE jobs.id = stranded.id""",
    """checkpoint_sha256 = NULL, error = jsonb_build_object(
        'code', CAST(:code AS text), 'message', CAST(:reason AS text))""",
    reason=_GIVEN,
)


class _Served:
    """What live workers serve, by slot."""

    def __init__(self, connection: Connection, models: Iterable[str]) -> None:
        asked = {"models": {"models": list(models)}}
        found = {
            name: connection.execute(query, asked.get(name, {})).all()
            for name, query in _SERVED.items()
        }
        self._slots = {row.slot for row in found["slots"]}
        self._silent = self._slots - {row.slot for row in found["reporting"]}
        self._models = {(row.slot, row.name) for row in found["models"]}
        self.sets = {(row.slot, row.name) for row in found["patch_sets"]}
        self._refusals = {(row.slot, row.batch_key): row.reason for row in found["refusals"]}

    def lack(self, kind: Kind) -> tuple[str, str] | None:
        """Why no worker runs a kind: a code, and the reason of one that refuses it. None where one
        may, or where none is there to tell.
        """
        open_it = {slot for slot in self._slots if (slot, kind.model) in self._models}
        have_set = {slot for slot in self._slots if (slot, kind.patch_set) in self.sets}
        able = open_it | self._silent
        if kind.patch_set is not None:
            able &= have_set
        reasons = [self._refusals.get((slot, kind.batch_key)) for slot in sorted(able)]
        if not self._slots or None in reasons:
            return None
        if reasons:
            return "model_unavailable", str(reasons[0])
        if not open_it | self._silent:
            return "model_missing", ""
        return "patch_set_missing", f"has model {kind.model!r} as well" if have_set else ""


def strand(connection: Connection, waiting: Sequence[Kind], grace: timedelta) -> int:
    """Fails jobs of these kinds whose model or patch set no live worker has had for a `grace`, or
    whose network none could load; how many.

    Only while there is a live worker: one that starts again loses no job.
    """
    # A worker that tries to load a network once more must not set the clock back.
    tried = [
        Kind(row.batch_key, row.model, row.patch_set, {}) for row in connection.execute(_TRIED)
    ]
    served = _Served(connection, {kind.model for kind in [*tried, *waiting]})
    lacking = {
        kind.batch_key: (kind, why) for kind in [*tried, *waiting] if (why := served.lack(kind))
    }
    stranded = 0
    due = connection.scalars(_UNSERVED, {"keys": list(lacking), "grace": grace}).all()
    for batch_key in due:
        kind, (code, more) = lacking[batch_key]
        if code == "model_unavailable":
            reason = f"No worker can load the job's network: {more}"
        elif code == "model_missing":
            unknown = UnknownName("model", kind.model, connection.scalars(_MODEL_NAMES))
            reason = f"{unknown} No running worker serves it: submit the job again when one does."
        elif more:
            reason = f"No running worker that has patch set {kind.patch_set!r} {more}: build it "
            reason += "there (`polycollide patches build`), then submit the job again."
        else:
            unknown = UnknownName(
                "patch set", str(kind.patch_set), {name for _, name in served.sets}
            )
            reason = f"{unknown} The workers have it no more: build it again "
            reason += "(`polycollide patches build`), then submit the job again."
        params = {"batch_key": batch_key, "code": code, "reason": reason}
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
