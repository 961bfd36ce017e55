"""Batches against a real Postgres: written at once, counted, canceled, read in order."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from core.spec import CollisionSpec
from store import batches, blobs, queue
from store.batches import Item
from store.images import Stored
from store.lifecycle import Status
from store.specs import SPEC as SPEC_OF

pytestmark = pytest.mark.anyio
SPEC = CollisionSpec(model="mnist-mlp", layer="fc1", corners=2)
RESULT = {
    "converged": True,
    "steps": 12,
    "seconds": 0.5,
    "warnings": ["No cut.", "No TF32."],
    "notes": [],
    "polytope": {"mean_pairwise_distance": 2.5, "spread": 0.25, "mean_ssim": 0.4},
    "interpolation": {
        "accuracy": 1.0,
        "accuracy_8bit": 0.75,
        "mean_probability": 0.9,
        "mean_probability_8bit": 0.8,
        "min_probability": 0.5,
    },
    "worst": {"margin": 1.5, "margin_8bit": -0.5},
    "certificate": {"outcome": "unknown"},
}
CORNER = {
    "converged": True,
    "label": 7,
    "probability": 0.9,
    "l_pos": 1.0,
    "violation": 0.0,
    "relative_residual": 0.1,
    "distance_to_source": 1.0,
    "distance_to_target": 2.0,
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url(database: str):
    return make_url(database).set(drivername="postgresql+psycopg")


@pytest.fixture
async def connection(url) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


async def a_key(connection: AsyncConnection, name: str = "someone") -> UUID:
    key_id = uuid4()
    await connection.execute(
        text("INSERT INTO api_keys (id, name, prefix) VALUES (:id, :name, :name)"),
        {"id": key_id, "name": name},
    )
    return key_id


async def images(connection: AsyncConnection) -> tuple[Stored, Stored]:
    await connection.execute(*blobs.put([(blobs.PNG, b"three"), (blobs.PNG, b"seven")]))
    return Stored("3.png", blobs.digest(b"three")), Stored("7.png", blobs.digest(b"seven"))


async def a_batch(
    connection: AsyncConnection, key_id: UUID, number: int = 3, errors=(), **changes
) -> UUID:
    source, target = await images(connection)
    item = {"spec": SPEC, "source": source, "target": target, "priority": 0, "labels": ()}
    item |= {"deadline_seconds": 60.0, "file_bytes": 0} | changes
    refused = {error["index"] for error in errors}
    indices = [index for index in range(number + len(errors)) if index not in refused]
    items = [Item(index=index, custom_id=f"item {index}", **item) for index in indices]
    return await batches.create(
        connection, key_id=key_id, labels=["ours"], items=items, errors=errors, request_id="r"
    )


def claim(url, jobs: int = 1) -> list[queue.Claimed]:
    """What a worker does, in a transaction of its own."""
    engine = create_engine(url)
    with engine.begin() as connection:
        claimed = queue.claim(
            connection,
            batch_key=SPEC.batch_key,
            rows=1000,
            jobs=jobs,
            at_least_one=True,
            worker_id=uuid4(),
            lease=timedelta(seconds=30),
        )
    engine.dispose()
    return claimed


def succeed(url, claimed: queue.Claimed) -> None:
    engine = create_engine(url)
    corners = [CORNER | {"index": index} for index in range(2)]
    with engine.begin() as connection:
        finished = queue.Finished(claimed.lease, RESULT | {"corners": corners}, [b"a", b"b"])
        assert queue.succeed(connection, [finished])
    engine.dispose()


async def test_a_batch_is_read_as_it_was_written(connection):
    key_id = await a_key(connection)
    error = {"index": 1, "custom_id": None, "code": "invalid_image", "message": "It is none."}
    batch_id = await a_batch(connection, key_id, 2, [error], labels=("a", "b"), priority=7)
    batch = await batches.get(connection, key_id=key_id, batch_id=batch_id)
    assert (batch.labels, batch.total, batch.refused, batch.errors) == (["ours"], 3, 1, [error])
    assert batch.counts == dict.fromkeys(Status, 0) | {Status.QUEUED: 2}
    assert not batch.completed
    jobs = (
        await connection.execute(text(f"SELECT *, {SPEC_OF} AS given FROM jobs ORDER BY seq"))
    ).all()
    assert [(job.batch_index, job.custom_id) for job in jobs] == [(0, "item 0"), (2, "item 2")]
    assert all(CollisionSpec.model_validate(job.given) == SPEC for job in jobs)
    for job in jobs:
        assert (job.priority, job.labels, job.deadline_seconds) == (7, ["a", "b"], 60)
        assert (job.model, job.corners, job.batch_key) == ("mnist-mlp", 2, SPEC.batch_key)
        assert (job.source_name, job.source_sha256) == ("3.png", blobs.digest(b"three"))
        assert (job.target_name, job.target_sha256) == ("7.png", blobs.digest(b"seven"))
        assert (job.batch_id, job.key_id, job.request_id) == (batch_id, key_id, "r")


async def test_every_job_of_a_batch_begins_with_an_event(connection):
    batch_id = await a_batch(connection, await a_key(connection), 3)
    told = await connection.execute(
        text("SELECT data FROM job_events JOIN jobs ON jobs.id = job_id WHERE batch_id = :id"),
        {"id": batch_id},
    )
    queued = {"status": "queued", "status_reason": None, "attempt": 0}
    assert list(told.scalars()) == [queued] * 3


async def test_specs_and_labels_go_to_the_right_jobs_across_chunks(connection):
    key_id = await a_key(connection)
    source, target = await images(connection)
    specs = [SPEC.model_copy(update={"seed": seed}) for seed in range(3)]
    items = [
        Item(index, None, specs[index % 3], source, target, 0, (f"l{index % 7}", "x"), 1.0, 0)
        for index in range(1100)
    ]
    await batches.create(connection, key_id=key_id, labels=[], items=items, errors=[])
    rows = await connection.execute(
        text(
            f"""SELECT batch_index, ({SPEC_OF}->>'seed')::int, labels, custom_id
                FROM jobs ORDER BY seq"""
        )
    )
    expected = [(index, index % 3, [f"l{index % 7}", "x"], None) for index in range(1100)]
    assert [tuple(row) for row in rows] == expected


async def test_text_that_looks_like_sql_is_text(connection):
    nasty = ("'; DROP TABLE jobs; --", 'a"b,c', "{x}", "\\", "NULL", "$1", ":id", "%s")
    key_id = await a_key(connection)
    batch_id = await a_batch(connection, key_id, 1, labels=nasty)
    table = await batches.table(connection, batch_id, limit=10)
    assert table == []
    await batches.cancel(connection, key_id=key_id, batch_id=batch_id)
    table = await batches.table(connection, batch_id, limit=10)
    assert [row["labels"] for row in table] == [list(nasty)]


async def test_no_labels_are_no_labels(connection):
    await a_batch(connection, await a_key(connection), 1)
    assert await connection.scalar(text("SELECT labels FROM jobs")) == []


async def test_a_batch_is_seen_by_its_key_alone(connection):
    key_id, other = await a_key(connection), await a_key(connection, "other")
    batch_id = await a_batch(connection, key_id)
    assert await batches.get(connection, key_id=other, batch_id=batch_id) is None
    assert not await batches.cancel(connection, key_id=other, batch_id=batch_id)
    assert await batches.page(connection, key_id=other, limit=10) == []
    batch = await batches.get(connection, key_id=key_id, batch_id=batch_id)
    assert batch.counts[Status.QUEUED] == 3 and batch.cancel_requested_at is None


async def test_pages_go_from_the_newest_to_the_oldest(connection):
    key_id = await a_key(connection)
    ids = [await a_batch(connection, key_id, number) for number in (1, 2, 3)]
    first = await batches.page(connection, key_id=key_id, limit=2)
    assert [batch.id for batch in first] == [ids[2], ids[1]]
    assert [batch.counts[Status.QUEUED] for batch in first] == [3, 2]
    assert first[0].errors is None
    rest = await batches.page(connection, key_id=key_id, limit=2, before=first[-1].seq)
    assert [batch.id for batch in rest] == [ids[0]]


async def test_canceling_ends_what_waits_and_tells_what_runs(connection, url):
    key_id = await a_key(connection)
    batch_id = await a_batch(connection, key_id, 4)
    other = await a_batch(connection, key_id, 1)
    await connection.commit()
    done, running = claim(url, 2)
    succeed(url, done)
    assert await batches.in_progress(connection, batch_id)
    assert await batches.cancel(connection, key_id=key_id, batch_id=batch_id)
    await connection.commit()
    batch = await batches.get(connection, key_id=key_id, batch_id=batch_id)
    assert {status: count for status, count in batch.counts.items() if count} == {
        Status.SUCCEEDED: 1,
        Status.CANCELING: 1,
        Status.CANCELED: 2,
    }
    assert batch.cancel_requested_at is not None and not batch.completed
    assert await batches.in_progress(connection, batch_id)
    events = await connection.execute(
        text("SELECT data->>'status' FROM job_events WHERE job_id = :id ORDER BY id"),
        {"id": running.lease.job_id},
    )
    assert list(events.scalars()) == ["queued", "running", "canceling"]
    kept = await batches.get(connection, key_id=key_id, batch_id=other)
    assert kept.counts[Status.QUEUED] == 1
    await connection.commit()
    succeed_canceled(url, running)
    assert not await batches.in_progress(connection, batch_id)
    await batches.cancel(connection, key_id=key_id, batch_id=batch_id)
    again = await batches.get(connection, key_id=key_id, batch_id=batch_id)
    assert again.completed and again.cancel_requested_at == batch.cancel_requested_at
    assert again.counts[Status.SUCCEEDED] == 1 and again.counts[Status.CANCELED] == 3


def succeed_canceled(url, claimed: queue.Claimed) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        finished = queue.Finished(claimed.lease, RESULT | {"corners": []}, [])
        assert not queue.succeed(connection, [finished])
    engine.dispose()


async def test_canceling_wakes_those_who_wait_for_a_job(connection, database):
    key_id = await a_key(connection)
    batch_id = await a_batch(connection, key_id, 2)
    await connection.commit()
    ids = set((await connection.execute(text("SELECT id::text FROM jobs"))).scalars())
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as listener:
        await listener.execute(f"LISTEN {queue.CHANNEL}")
        await batches.cancel(connection, key_id=key_id, batch_id=batch_id)
        await connection.commit()
        told = {note.payload async for note in listener.notifies(timeout=10, stop_after=2)}
    assert told == ids


async def test_canceling_and_claiming_at_once_leaves_each_job_in_one_place(connection, url):
    key_id = await a_key(connection)
    batch_id = await a_batch(connection, key_id, 200)
    await connection.commit()
    claims = [asyncio.to_thread(claim, url, 20) for _ in range(5)]

    async def cancel():
        await batches.cancel(connection, key_id=key_id, batch_id=batch_id)
        await connection.commit()

    *claimed, _ = await asyncio.gather(*claims, cancel())
    batch = await batches.get(connection, key_id=key_id, batch_id=batch_id)
    taken = {job.lease.job_id for jobs in claimed for job in jobs}
    assert batch.counts[Status.QUEUED] == batch.counts[Status.RUNNING] == 0
    assert batch.counts[Status.CANCELING] == len(taken)
    assert batch.counts[Status.CANCELED] == 200 - len(taken)


async def test_results_come_in_order_of_index_and_only_of_finished_jobs(connection, url):
    key_id = await a_key(connection)
    batch_id = await a_batch(connection, key_id, 4)
    await connection.commit()
    first, second, third = claim(url, 3)
    succeed(url, third)
    succeed(url, first)
    lines = await batches.results(connection, batch_id, limit=10, most=2**20)
    assert [index for index, _ in lines] == [0, 2]
    line = json.loads(lines[1][1])
    assert line == {
        "index": 2,
        "custom_id": "item 2",
        "job_id": str(third.lease.job_id),
        "status": "succeeded",
        "error": None,
        "result": RESULT | {"corners": [CORNER | {"index": 0}, CORNER | {"index": 1}]},
    }
    (row,) = await batches.table(connection, batch_id, after=0, limit=10)
    assert row == {
        "index": 2,
        "custom_id": "item 2",
        "job_id": third.lease.job_id,
        "status": "succeeded",
        "error_code": None,
        "error_message": None,
        "model": "mnist-mlp",
        "layer": "fc1",
        "corners": 2,
        "seed": 0,
        "converged": True,
        "steps": 12,
        "seconds": 0.5,
        "spread": 0.25,
        "mean_ssim": 0.4,
        "mean_low_pass_share": None,
        "mean_perceptual": None,
        "accuracy": 1.0,
        "accuracy_8bit": 0.75,
        "mean_pairwise_distance": 2.5,
        "mean_probability": 0.9,
        "mean_probability_8bit": 0.8,
        "min_probability": 0.5,
        "worst_margin": 1.5,
        "worst_margin_8bit": -0.5,
        "certificate": "unknown",
        "labels": [],
        "warnings": "No cut.; No TF32.",
        "notes": None,
    }
    assert second.lease.job_id not in {row["job_id"]}


async def test_results_come_in_pages(connection):
    key_id = await a_key(connection)
    batch_id = await a_batch(connection, key_id, 5)
    await batches.cancel(connection, key_id=key_id, batch_id=batch_id)
    first = await batches.results(connection, batch_id, limit=3, most=2**20)
    rest = await batches.results(connection, batch_id, after=first[-1][0], limit=3, most=2**20)
    assert [index for index, _ in first + rest] == [0, 1, 2, 3, 4]
    assert {json.loads(line)["result"] for _, line in rest} == {None}
