"""Claims in their order, patch sets that come and go, and what retention deletes.

The rest of the queue is in test_life.
"""

from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, Row, insert, text

from core.spec import SCHEMA_VERSION
from store import blobs, queue, retention, workers
from store.lifecycle import Status
from store.queue import Claimed, Finished
from store.settings import Settings
from store.tables import ApiKey, Job

from .conftest import CORNER, PHOTOS, result

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


def test_priority_orders_a_keys_own_jobs_and_goes_before_nobody_elses(
    connection: Connection,
) -> None:
    mine, yours = key(connection), key(connection)
    old = queued(connection, mine, 2)
    low, high = (queued(connection, yours, 1, priority=p) for p in (0, 100))
    assert ids(claim(connection, 1)) == old[:1]
    assert ids(claim(connection, 1)) == high  # who has none in flight
    assert set(ids(claim(connection, 2))) == {old[1], *low}


def test_kinds_go_by_the_turns_of_their_keys_and_a_keys_own_by_priority(
    connection: Connection,
) -> None:
    mine, yours = key(connection), key(connection)
    queued(connection, mine, 1, batch_key="kind")
    queued(connection, mine, 1, batch_key="second", priority=1)
    queued(connection, yours, 1, batch_key="third", priority=100)
    order = [kind.batch_key for kind in queue.kinds(connection)]
    assert order == ["second", "third", "kind"]
    queued(connection, yours, 1, batch_key="second", priority=-7)
    assert queue.kinds(connection)[0].first == {mine: 1, yours: -7}
    # Who has rows in flight waits for those who have none.
    assert claim(connection, 1)
    latest = key(connection)
    queued(connection, mine, 1, batch_key="own", priority=100)
    queued(connection, latest, 1, batch_key="fourth", priority=-100)
    order = [kind.batch_key for kind in queue.kinds(connection)]
    assert order.index("fourth") < order.index("own")


def test_keys_share_rows_whatever_the_size_of_their_jobs(connection: Connection) -> None:
    large, small = key(connection), key(connection)
    queued(connection, large, 50, corners=40)
    queued(connection, small, 100, corners=5)
    rows = {large: 0, small: 0}
    for each in claim(connection, 100, rows=160):
        rows[each.key_id] += 40 if each.key_id == large else 5
    assert rows == {large: 80, small: 80}


def test_a_job_that_gave_way_comes_after_equals_that_have_waited_for_it(
    connection: Connection,
) -> None:
    mine, yours = key(connection), key(connection)
    queued(connection, mine, 1)
    connection.commit()
    (job,) = claim(connection, 1)
    theirs = queued(connection, yours, 1)
    connection.commit()
    queue.release(connection, [job.lease], "Gave way.")
    assert ids(claim(connection, 1)) == theirs


def test_a_job_of_a_newer_form_or_that_could_not_be_read_is_left_alone(
    connection: Connection,
) -> None:
    mine = key(connection)
    newer = queued(connection, mine, 1, schema_version=SCHEMA_VERSION + 1, priority=9)
    unread = queued(connection, mine, 1, priority=5)
    assert [kind.batch_key for kind in queue.kinds(connection)] == ["kind"]
    assert queue.kinds(connection, unread) == []
    ours = queued(connection, mine, 1)
    assert queue.kinds(connection, unread)[0].first == {mine: 0}
    (taken,) = queue.claim(
        connection,
        batch_key="kind",
        rows=99,
        jobs=9,
        at_least_one=True,
        worker_id=uuid4(),
        lease=LEASE,
        unread=unread,
    )
    assert taken.lease.job_id == ours[0]
    left = connection.scalars(text("SELECT id FROM jobs WHERE status = 'queued'")).all()
    assert set(left) == {*newer, *unread}


def vanish(connection: Connection, job: Claimed) -> int:
    """Its worker vanishes; the job's crashes."""
    gone = "UPDATE jobs SET lease_expires_at = '-infinity' WHERE id = :id"
    connection.execute(text(gone), {"id": job.lease.job_id})
    assert queue.expire(connection, 3, LEASE) == 1
    crashes = "SELECT crashes FROM jobs WHERE id = :id"
    return int(connection.scalar(text(crashes), {"id": job.lease.job_id}) or 0)


def test_crashes_are_forgotten_once_a_checkpoint_gets_further_than_ever(
    connection: Connection,
) -> None:
    queued(connection, key(connection), 1)
    connection.execute(text("UPDATE jobs SET batch_key = 'kind'"))

    def again() -> Claimed:
        connection.execute(text("UPDATE jobs SET batch_key = 'kind'"))  # it may be alone by now
        (job,) = claim(connection, 1)
        return job

    assert vanish(connection, again()) == 1
    job = again()
    assert queue.keep_checkpoint(connection, job.lease, b"100", 100, inline=True)
    assert vanish(connection, job) == 1
    # Back to where it was is no progress, nor is a job that had to begin anew.
    job = again()
    assert queue.keep_checkpoint(connection, job.lease, b"100", 100, inline=True)
    assert queue.keep_checkpoint(connection, job.lease, b"50", 50, inline=True)
    assert vanish(connection, job) == 2
    job = again()
    assert queue.keep_checkpoint(connection, job.lease, b"101", 101, inline=True)
    assert vanish(connection, job) == 1


def test_jobs_on_an_accelerator_that_failed_go_back_and_fail_after_the_last_attempt(
    connection: Connection,
) -> None:
    (job_id,) = queued(connection, key(connection), 1)
    row = text("SELECT status, status_reason, batch_key, error FROM jobs")
    for attempt in (1, 2, 3):
        connection.execute(text("UPDATE jobs SET batch_key = 'kind'"))
        (job,) = claim(connection, 1)
        queue.crash(connection, [job.lease], 3, "CUDA error: illegal")
        found = connection.execute(row).one()
        if attempt < 3:
            assert found.status == "queued"
            told = f"accelerator failed (CUDA error: illegal), for the {attempt}. time of 3"
            assert told in found.status_reason
            assert (found.batch_key == f"{queue.ALONE}{job_id}") == (attempt == 2)
    assert (found.status, found.error["code"]) == ("failed", "worker_lost")
    assert "CUDA error: illegal" in found.error["message"]


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
    assert queue.extend(connection, [job.lease], LEASE) == {
        job.lease.token: (Status.RUNNING, False)
    }
    assert connection.scalar(text("SELECT count(*) FROM corners")) == 0


GRACE = timedelta(minutes=10)


def reported(connection: Connection) -> list[Row[tuple[object, ...]]]:
    """All of `patch_sets`."""
    return list(connection.execute(text("SELECT * FROM patch_sets ORDER BY slot, name")))


def stranded(connection: Connection) -> int:
    return queue.strand(connection, queue.kinds(connection), GRACE)


def pass_minutes(connection: Connection, minutes: int) -> None:
    """Time passes for whoever waits for what no worker has."""
    later = "UPDATE unserved_kinds SET since = since - make_interval(mins => :minutes)"
    connection.execute(text(later), {"minutes": minutes})


def test_a_slot_reports_its_patch_sets_and_what_is_unchanged_is_not_written(
    connection: Connection,
) -> None:
    def report() -> list[Row[tuple[object, ...]]]:
        workers.report_patch_sets(connection, "one", [PHOTOS, PHOTOS | {"name": "birds"}])
        workers.report_patch_sets(connection, "two", [PHOTOS])
        connection.commit()
        return reported(connection)

    _, own, other = before = report()
    assert {name: value for name, value in own._asdict().items() if name in PHOTOS} == PHOTOS
    places = [("one", "birds"), ("one", "photos"), ("two", "photos")]
    assert [(row.slot, row.name) for row in before] == places
    assert report() == before  # their times, too
    rebuilt = PHOTOS | {"sha256": "b" * 64, "images": 9, "index": "ivf-pq"}
    workers.report_patch_sets(connection, "one", [rebuilt])
    after = reported(connection)
    assert [(row.slot, row.sha256, row.images) for row in after] == [
        ("one", "b" * 64, 9),
        ("two", "a" * 64, 6),
    ]
    assert after[0].index == "ivf-pq" and after[0].reported_at > own.reported_at
    assert after[1] == other


def test_the_patch_sets_of_a_slot_go_with_its_worker(connection: Connection) -> None:
    for slot in ("left", "taken over", "silent", "well"):
        workers.register(connection, uuid4(), slot, "cpu")
        workers.report_patch_sets(connection, slot, [PHOTOS])
    workers.leave(connection, "left")
    workers.register(connection, uuid4(), "taken over", "cpu")
    connection.execute(
        text("UPDATE workers SET heartbeat_at = now() - interval '2 days' WHERE slot = 'silent'")
    )
    retention.sweep(connection, Settings(mode="local"))
    assert [row.slot for row in reported(connection)] == ["well"]


def test_a_job_fails_when_no_worker_has_had_its_patch_set_for_the_grace(
    connection: Connection,
) -> None:
    mine = key(connection)
    gone, other = "kind of photos", "kind of birds"
    lost = queued(connection, mine, 2, batch_key=gone, patch_set="photos")
    kept = queued(connection, mine, 1, batch_key=other, patch_set="birds")
    kept += queued(connection, mine, 1)
    workers.register(connection, uuid4(), "one", "cpu")
    near = [PHOTOS | {"name": "birds"}, PHOTOS | {"name": "photos2"}]
    workers.report_patch_sets(connection, "one", near)
    assert [kind.patch_set for kind in queue.kinds(connection)] == ["photos", "birds", None]
    assert stranded(connection) == 0
    pass_minutes(connection, 9)
    assert stranded(connection) == 0
    pass_minutes(connection, 2)
    assert stranded(connection) == 2
    rows = {row.id: row for row in connection.execute(text("SELECT * FROM jobs"))}
    for job in lost:
        error = rows[job].error
        assert rows[job].status == Status.FAILED and rows[job].finished_at is not None
        assert error["code"] == "patch_set_missing" and rows[job].status_reason == error["message"]
        assert "There is no patch set 'photos'; did you mean 'photos2'" in error["message"]
        assert "build it again" in error["message"] and "submit the job again" in error["message"]
    assert {rows[job].status for job in kept} == {Status.QUEUED}
    assert stranded(connection) == 0


MODEL = {
    **{"name": "m", "weights": [], "input_shape": [1, 2, 3], "classes": None},
    **{"origin": "own", "ready": True},
}


def test_a_job_fails_when_no_worker_has_had_its_model_for_the_grace(
    connection: Connection,
) -> None:
    (lost,) = queued(connection, key(connection), 1)
    workers.register(connection, uuid4(), "one", "cpu")
    assert stranded(connection) == 0
    pass_minutes(connection, 11)
    assert stranded(connection) == 0  # who has not told yet may have it
    workers.report_models(connection, "one", [MODEL | {"name": "m2"}])
    assert stranded(connection) == 0
    pass_minutes(connection, 9)
    assert stranded(connection) == 0
    pass_minutes(connection, 2)
    assert stranded(connection) == 1
    error = connection.scalar(text("SELECT error FROM jobs WHERE id = :id"), {"id": lost})
    assert error["code"] == "model_missing"
    assert "There is no model 'm'; did you mean 'm2'" in error["message"]


def test_a_job_fails_when_no_worker_has_its_model_and_its_patch_set_together(
    connection: Connection,
) -> None:
    queued(connection, key(connection), 1, patch_set="photos")
    for slot, models, sets in (("model", [MODEL], []), ("set", [MODEL | {"name": "o"}], [PHOTOS])):
        workers.register(connection, uuid4(), slot, "cpu")
        workers.report_models(connection, slot, models)
        workers.report_patch_sets(connection, slot, sets)
    assert stranded(connection) == 0
    pass_minutes(connection, 11)
    assert stranded(connection) == 1
    error = connection.scalar(text("SELECT error FROM jobs"))
    assert error["code"] == "patch_set_missing"
    assert "No running worker that has patch set 'photos' has model 'm' as well" in error["message"]


def test_a_job_whose_network_no_worker_can_load_fails_after_the_grace_and_not_before(
    connection: Connection,
) -> None:
    queued(connection, key(connection), 1)
    for slot in ("one", "two"):
        workers.register(connection, uuid4(), slot, "cpu")
        workers.report_models(connection, slot, [MODEL])

    def refuse(slot: str) -> None:
        (job,) = claim(connection, 1)
        queue.refuse(connection, job.lease, slot, "kind", f"{slot}: put m.pth there.")

    refuse("one")
    assert stranded(connection) == 0
    pass_minutes(connection, 11)
    assert stranded(connection) == 0  # the other may
    refuse("two")
    assert stranded(connection) == 0
    pass_minutes(connection, 9)
    # Whoever tries again does not set the clock back.
    (job,) = claim(connection, 1)
    assert stranded(connection) == 0
    queue.refuse(connection, job.lease, "two", "kind", "two: put m.pth there.")
    assert connection.scalar(text("SELECT status_reason FROM jobs")) == "two: put m.pth there."
    pass_minutes(connection, 2)
    queue.accept(connection, "one", "kind")
    assert stranded(connection) == 0  # it can after all
    refuse("one")
    assert stranded(connection) == 0
    pass_minutes(connection, 11)
    assert stranded(connection) == 1
    error = connection.scalar(text("SELECT error FROM jobs"))
    assert error["code"] == "model_unavailable" and "put m.pth there" in error["message"]


def test_workers_that_start_again_lose_no_job(connection: Connection) -> None:
    queued(connection, key(connection), 1, patch_set="photos")
    workers.register(connection, uuid4(), "without", "cpu")
    assert stranded(connection) == 0
    pass_minutes(connection, 9)
    # Back in time, the set is as good as new.
    workers.register(connection, uuid4(), "with", "cpu")
    workers.report_patch_sets(connection, "with", [PHOTOS])
    assert stranded(connection) == 0
    workers.drain(connection, "with")
    assert stranded(connection) == 0
    pass_minutes(connection, 9)
    assert stranded(connection) == 0
    # Where no worker is left, nobody can tell, however long it takes.
    workers.leave(connection, "with")
    workers.leave(connection, "without")
    assert stranded(connection) == 0
    pass_minutes(connection, 60)
    assert stranded(connection) == 0
    workers.register(connection, uuid4(), "without", "cpu")
    assert stranded(connection) == 0


def sweep(connection: Connection, settings: Settings) -> None:
    """All that is due, walks in steps of one row included."""
    retention.sweep(connection, settings)
    for table in retention.WALKED:
        place: retention.Place | None = retention.Place()
        while place:
            _, place = retention.walk(connection, table, settings, place)


def age(connection: Connection, days: int) -> None:
    """Everything that has a time becomes older."""
    for table, column in (
        ("jobs", "finished_at"),
        ("job_events", "created_at"),
        ("blobs", "last_used_at"),
        ("specs", "last_used_at"),
        ("batches", "created_at"),
        ("images", "created_at"),
        ("workers", "heartbeat_at"),
    ):
        statement = f"UPDATE {table} SET {column} = {column} - make_interval(days => :days)"
        connection.execute(text(statement), {"days": days})


def test_retention_deletes_what_is_past_its_time_and_nothing_else(connection: Connection) -> None:
    mine = key(connection)
    done, waiting = *queued(connection, mine, 1), *queued(connection, mine, 1)
    (job,) = claim(connection, 1)
    assert queue.keep_checkpoint(connection, job.lease, b"state", 10, inline=True)
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
    sweep(connection, settings)
    assert left() == everything
    age(connection, 30)
    sweep(connection, settings)
    sweep(connection, settings)  # what the first one has let go
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
    sweep(connection, Settings(mode="local"))
    assert connection.scalar(text("SELECT count(*) FROM blobs")) == 1


def test_walks_of_any_stride_find_all_that_nobody_needs(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LIMIT", 2)
    mine = key(connection)
    queued(connection, mine, 1)
    connection.execute(*blobs.put([("image/png", bytes([i])) for i in range(7)]))
    connection.execute(
        text(
            "INSERT INTO specs (sha256, spec, size) SELECT i, '{}', 2 FROM generate_series(1, 5) i"
        )
    )
    connection.execute(text("UPDATE jobs SET spec_sha256 = '3'"))
    needed = connection.scalar(text("SELECT count(*) FROM blobs")) - 7
    age(connection, 30)
    sweep(connection, Settings(mode="local"))
    assert connection.scalar(text("SELECT count(*) FROM blobs")) == needed
    assert connection.scalars(text("SELECT sha256 FROM specs")).all() == ["3"]


def test_finished_jobs_stay_for_as_long_as_the_operator_says(connection: Connection) -> None:
    mine = key(connection)
    done, waiting = *queued(connection, mine, 1), *queued(connection, mine, 1)
    (job,) = claim(connection, 1)
    queue.succeed(connection, [Finished(job.lease, result(CORNER), [b"corner"])])
    batch = text("""
        INSERT INTO batches (id, key_id, labels, total, errors)
        VALUES (gen_random_uuid(), :key, '{}', 1, '[]') RETURNING id
    """)
    connection.execute(
        text("UPDATE jobs SET batch_id = :batch WHERE id = :id"),
        {"batch": connection.scalar(batch, {"key": mine}), "id": done},
    )

    def left() -> set[UUID]:
        return set(connection.scalars(text("SELECT id FROM jobs")))

    age(connection, 30)
    sweep(connection, Settings(mode="local"))
    assert left() == {done, waiting}
    sweep(connection, Settings(mode="local", keep_jobs=timedelta(days=31)))
    assert left() == {done, waiting}
    sweep(connection, Settings(mode="local", keep_jobs=timedelta(days=29)))
    assert left() == {waiting}
    assert connection.scalar(text("SELECT count(*) FROM batches")) == 0


def test_images_that_no_job_uses_go_in_the_end(connection: Connection) -> None:
    mine, other = key(connection), key(connection)
    queued(connection, mine, 1)
    used = connection.scalar(text("SELECT source_sha256 FROM jobs"))
    connection.execute(*blobs.put([("image/png", b"unused")]))
    add = text(
        "INSERT INTO images (key_id, sha256, name, width, height) VALUES (:k, :h, 'n', 1, 1)"
    )
    rows = [(mine, used), (other, used), (mine, blobs.digest(b"unused"))]
    connection.execute(add, [{"k": owner, "h": sha256} for owner, sha256 in rows])
    sweep(connection, Settings(mode="local"))
    assert connection.scalar(text("SELECT count(*) FROM images")) == 3
    age(connection, 31)
    sweep(connection, Settings(mode="local"))
    assert connection.execute(text("SELECT key_id, sha256 FROM images")).all() == [(mine, used)]


def test_pictures_on_the_way_count_until_they_are_deleted(connection: Connection) -> None:
    mine = key(connection)
    queued(connection, mine, 1)
    (job,) = claim(connection, 1)
    queue.keep_snapshot(connection, job.lease, 10, b"snapshot")
    queue.succeed(connection, [Finished(job.lease, result(CORNER), [b"corner"])])
    counted = text("SELECT file_bytes FROM jobs")
    before = connection.scalar(counted)
    age(connection, 30)
    sweep(connection, Settings(mode="local"))
    assert before - connection.scalar(counted) == len(b"snapshot")


def test_each_worker_says_for_how_long_it_is_fresh(connection: Connection) -> None:
    for seconds in (10, 60):
        workers.heartbeat(
            connection,
            uuid4(),
            slot=str(seconds),
            device="cpu",
            steps_per_second=0,
            fresh_for=timedelta(seconds=seconds),
        )
    workers.register(connection, uuid4(), "of an older version", "cpu")
    assert workers.live(connection) == 3
    connection.execute(text("UPDATE workers SET heartbeat_at = now() - interval '30 s'"))
    assert workers.live(connection) == 1
