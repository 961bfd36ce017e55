"""What the API does to jobs, on the real Postgres."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID, uuid4

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from core.spec import CollisionSpec
from store import blobs, idempotency, images, jobs, keys, notices
from store.images import Picture, Stored
from store.jobs import NewJob

T = TypeVar("T")
SPEC = CollisionSpec(model="mnist-mlp", layer="fc1")
PICTURES = [Picture(blobs.digest(c), c.decode(), "image/png", 1, 1, c) for c in (b"s", b"t")]
Run = Callable[[Callable[[AsyncEngine], Awaitable[T]]], T]


@pytest.fixture
def run(database: str) -> Run[object]:
    """Runs with an engine on this test's database."""

    def with_engine(do: Callable[[AsyncEngine], Awaitable[T]]) -> T:
        async def inner() -> T:
            engine = create_async_engine(make_url(database).set(drivername="postgresql+psycopg"))
            try:
                return await do(engine)
            finally:
                await engine.dispose()

        return asyncio.run(inner())

    return with_engine  # type: ignore[return-value]


async def submitted(connection: AsyncConnection, key_id: UUID, priority: int = 0) -> UUID:
    await images.put(connection, key_id, PICTURES, inline=True)
    source, target = (Stored(picture.name, picture.sha256) for picture in PICTURES)
    job = NewJob(
        id=uuid4(),
        key_id=key_id,
        spec=SPEC,
        source=source,
        target=target,
        priority=priority,
        labels=["a"],
        deadline_seconds=60,
        file_bytes=1000,
        request_id=None,
    )
    await jobs.submit(connection, job)
    return job.id


def test_whoever_listens_hears_of_a_change_after_its_commit(run: Run[None]) -> None:
    async def do(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            key_id = await keys.local(connection)
            job_id = await submitted(connection, key_id)
        heard = notices.listen(engine)
        assert await anext(heard) is None
        async with engine.begin() as connection:
            assert await jobs.cancel(connection, key_id=key_id, job_id=job_id)
            soon = asyncio.ensure_future(anext(heard))
            await asyncio.sleep(0.2)
            assert not soon.done()
        assert await asyncio.wait_for(soon, 5) == job_id
        await heard.aclose()  # type: ignore[attr-defined]

    run(do)


def test_a_cancel_happens_once_and_is_noted_once(run: Run[None]) -> None:
    async def do(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            key_id = await keys.local(connection)
            job_id = await submitted(connection, key_id)

        async def cancel() -> bool:
            async with engine.begin() as connection:
                return await jobs.cancel(connection, key_id=key_id, job_id=job_id)

        assert sorted(await asyncio.gather(*(cancel() for _ in range(5)))) == [False] * 4 + [True]
        async with engine.begin() as connection:
            news = await jobs.events(connection, job_id=job_id, after=0, limit=10)
            assert [event.data["status"] for event in news] == ["queued", "canceled"]
            assert not await jobs.cancel(connection, key_id=uuid4(), job_id=job_id)

    run(do)


def test_the_second_of_two_submissions_at_once_waits_and_replays(run: Run[None]) -> None:
    async def do(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            key_id = await keys.local(connection)

        async def submit() -> UUID:
            async with engine.begin() as connection:
                job_id = await submitted(connection, key_id)
                known = await idempotency.take(
                    connection,
                    key_id=key_id,
                    value="k",
                    body_sha256="b",
                    created_id=job_id,
                )
                await asyncio.sleep(0.1)
                return job_id if known is None else known.created_id

        ids = await asyncio.gather(*(submit() for _ in range(5)))
        assert len(set(ids)) == 1

    run(do)


def test_places_count_only_what_goes_first(run: Run[None]) -> None:
    async def do(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            key_id = await keys.local(connection)
            ids = [await submitted(connection, key_id, p) for p in (0, 0, 9, -9)]
            found = [await jobs.get(connection, key_id=key_id, job_id=job_id) for job_id in ids]
            assert [job.queue_position for job in found if job] == [1, 2, 0, 3]
            room = {"key_id": key_id, "limit": 5}
            assert await jobs.has_room(connection, jobs=1, **room)
            assert not await jobs.has_room(connection, jobs=2, **room)

    run(do)


def test_counting_places_stops_at_ten_thousand(run: Run[None]) -> None:
    async def do(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            key_id = await keys.local(connection)
            first = await submitted(connection, key_id)
            await connection.execute(
                text("""
                INSERT INTO jobs (id, key_id, priority, labels, deadline_seconds, spec_sha256,
                    model, corners, batch_key, source_sha256, source_name, target_sha256,
                    target_name)
                SELECT gen_random_uuid(), key_id, priority, labels, deadline_seconds, spec_sha256,
                    model, corners, batch_key, source_sha256, source_name, target_sha256,
                    target_name
                FROM jobs, generate_series(1, 20000)
                """)
            )
            last = await submitted(connection, key_id)
            await connection.execute(text("ANALYZE jobs"))
            position = [
                (await jobs.get(connection, key_id=key_id, job_id=i)).queue_position
                for i in (first, last)
            ]
            assert position == [0, jobs.MAX_POSITION]

    run(do)


def test_old_images_stay_and_new_ones_are_told_apart(run: Run[None]) -> None:
    async def do(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            key_id = await keys.local(connection)
            assert len(await images.put(connection, key_id, PICTURES, inline=True)) == 2
            assert await images.put(connection, key_id, PICTURES[:1], inline=False) == set()
            hashes = [picture.sha256 for picture in PICTURES]
            assert await images.names(connection, key_id, [*hashes, "0" * 64]) == {
                hashes[0]: "s",
                hashes[1]: "t",
            }
            assert await images.names(connection, uuid4(), hashes) == {}
            assert await images.put(connection, key_id, [], inline=False) == set()

    run(do)
