"""Claims in their order, and what retention deletes; the rest of the queue is in test_life."""

from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, insert, text

from store import blobs, queue, retention, workers
from store.lifecycle import Status
from store.queue import Claimed, Finished
from store.settings import Settings
from store.tables import ApiKey, Job

from .conftest import CORNER, result

LEASE = timedelta(minutes=1)


def key(connection: Connection) -> UUID:
    key_id = uuid4()
    connection.execute(insert(ApiKey), {"id": key_id, "name": "n", "prefix": str(key_id)})
    return key_id


def queued(connection: Connection, key_id: UUID, count: int, **more: object) -> list[UUID]:
    connection.execute(*blobs.put([("image/png", b"source"), ("image/png", b"target")]))
    images = {
        "source_sha256": blobs.digest(b"source"),
        "source_name": "s",
        "target_sha256": blobs.digest(b"target"),
        "target_name": "t",
    }
    usual = {"labels": [], "spec": {}, "model": "m", "corners": 5, "batch_key": "kind"}
    rows = [
        {"id": uuid4(), "key_id": key_id, "deadline_seconds": 9, **usual, **images, **more}
        for _ in range(count)
    ]
    connection.execute(insert(Job), rows)
    return [row["id"] for row in rows]


def claim(
    connection: Connection, jobs: int, *, rows: int = 1000, at_least_one: bool = False
) -> list[Claimed]:
    return queue.claim(
        connection,
        batch_key="kind",
        rows=rows,
        jobs=jobs,
        at_least_one=at_least_one,
        worker_id=uuid4(),
        lease=LEASE,
    )


def ids(claimed: list[Claimed]) -> list[UUID]:
    return [each.lease.job_id for each in claimed]


def test_priority_goes_before_age(connection: Connection) -> None:
    mine = key(connection)
    old = queued(connection, mine, 3)
    urgent = queued(connection, mine, 2, priority=5)
    assert ids(claim(connection, 3)) == [old[0], *urgent]


def test_keys_take_turns_however_long_the_queue_of_one(connection: Connection) -> None:
    first, second = key(connection), key(connection)
    queued(connection, first, 100)
    late = queued(connection, second, 3)
    taken = claim(connection, 6)
    assert set(late) <= set(ids(taken))
    # Who has jobs running waits for those who have none.
    third = key(connection)
    latest = queued(connection, third, 2)
    assert set(ids(claim(connection, 2))) == set(latest)


def test_a_job_without_room_is_not_overtaken(connection: Connection) -> None:
    mine = key(connection)
    large = queued(connection, mine, 1, corners=50)
    queued(connection, mine, 3)
    assert claim(connection, 3, rows=20) == []
    assert ids(claim(connection, 3, rows=20, at_least_one=True)) == large


def test_two_workers_at_once_never_get_the_same_job(engine: Engine) -> None:
    with engine.begin() as connection:
        queued(connection, key(connection), 20)
    with engine.begin() as one, engine.begin() as other:
        first = claim(one, 10)
        second = claim(other, 20)  # does not wait for the first
    assert len(first) == 10
    assert not set(ids(first)) & set(ids(second))


def test_a_worker_that_returns_to_its_slot_frees_what_its_predecessor_held(
    connection: Connection,
) -> None:
    queued(connection, key(connection), 2)
    first, second = uuid4(), uuid4()
    workers.register(connection, first, "box:1:0", "cpu")
    lost = queue.claim(
        connection,
        batch_key="kind",
        rows=9,
        jobs=1,
        at_least_one=False,
        worker_id=first,
        lease=LEASE,
    )
    assert queue.expire(connection, 3, LEASE) == 0
    workers.register(connection, second, "box:1:0", "cpu")
    assert queue.expire(connection, 3, LEASE) == 1
    assert queue.extend(connection, [lost[0].lease], LEASE) == {}
    assert workers.live(connection) == 1


def test_results_that_fail_to_be_written_leave_nothing_behind(connection: Connection) -> None:
    queued(connection, key(connection), 1)
    (job,) = claim(connection, 1)
    twice = result(CORNER, CORNER)  # two corners with one number
    with pytest.raises(Exception, match="pk_corners"), connection.begin_nested():
        queue.succeed(connection, [Finished(job.lease, twice, [b"0", b"1"])])
    assert queue.extend(connection, [job.lease], LEASE) == {job.lease.token: Status.RUNNING}
    assert connection.scalar(text("SELECT count(*) FROM corners")) == 0


def age(connection: Connection, days: int) -> None:
    """Everything that has a time becomes older."""
    for table, column in (
        ("jobs", "finished_at"),
        ("job_events", "created_at"),
        ("blobs", "last_used_at"),
        ("workers", "heartbeat_at"),
    ):
        statement = f"UPDATE {table} SET {column} = {column} - make_interval(days => :days)"
        connection.execute(text(statement), {"days": days})


def test_retention_deletes_what_is_past_its_time_and_nothing_else(connection: Connection) -> None:
    mine = key(connection)
    done, waiting = *queued(connection, mine, 1), *queued(connection, mine, 1)
    (job,) = claim(connection, 1)
    assert queue.keep_checkpoint(connection, job.lease, b"state", inline=True)
    queue.keep_snapshot(connection, job.lease, 10, b"snapshot")
    queue.succeed(
        connection, [Finished(job.lease, result(CORNER), [b"corner"], {"samples.npz": b"npz"})]
    )
    connection.execute(*blobs.put([("image/png", b"nobody's")]))
    workers.register(connection, uuid4(), "gone", "cpu")
    settings = Settings(mode="local")

    def left() -> set[bytes]:
        return {bytes(b) for b in connection.scalars(text("SELECT bytes FROM blobs"))}

    everything = left()
    retention.sweep(connection, settings)
    assert left() == everything
    age(connection, 30)
    retention.sweep(connection, settings)
    retention.sweep(connection, settings)  # what the first one has let go
    assert everything - left() == {b"state", b"snapshot", b"nobody's"}
    assert connection.scalar(text("SELECT count(*) FROM workers")) == 0
    events = connection.execute(text("SELECT DISTINCT job_id FROM job_events")).all()
    assert events == []
    statuses = dict(connection.execute(text("SELECT id, status FROM jobs")).all())
    assert statuses == {done: "succeeded", waiting: "queued"}


def test_a_blob_that_is_stored_again_is_not_swept(connection: Connection) -> None:
    connection.execute(*blobs.put([("image/png", b"old")]))
    age(connection, 30)
    connection.execute(*blobs.put([("image/png", b"old")]))
    retention.sweep(connection, Settings(mode="local"))
    assert connection.scalar(text("SELECT count(*) FROM blobs")) == 1
