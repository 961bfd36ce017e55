"""What happens to a job, as server-sent events."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.deps import KeyId, Parts, Reading
from api.errors import UnknownJob, responses
from api.schemas import JobId
from store import jobs, keys
from store.jobs import JobEvent, Standing
from store.lifecycle import FINAL

router = APIRouter(prefix="/jobs", tags=["jobs"])
_AT_ONCE = 100


async def _exists(job_id: JobId, key_id: KeyId, connection: Reading) -> None:
    if await jobs.standing(connection, key_id=key_id, job_id=job_id) is None:
        raise UnknownJob


async def _place(key_id: KeyId, parts: Parts) -> AsyncIterator[None]:
    async with parts.waits.of(key_id):
        yield


@router.get(
    "/{job_id}/events",
    response_class=EventSourceResponse,
    responses=responses(UnknownJob),
    # In dependencies: once the stream has begun it is too late for a 404 or 429.
    dependencies=[Depends(_exists, scope="function"), Depends(_place, scope="request")],
)
async def watch(
    job_id: JobId,
    key_id: KeyId,
    parts: Parts,
    last_event_id: Annotated[
        int, Header(ge=0, lt=2**63, description="Tells what happened after this event.")
    ] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """Tells what happened and happens to a job, until it has ended."""
    loop = asyncio.get_running_loop()
    end = loop.time() + parts.settings.watch_for.total_seconds()

    async def look() -> tuple[Standing | None, list[JobEvent]]:
        async with parts.read(key_id) as connection:
            if not await keys.is_open(connection, key_id):  # it may have been revoked by now
                return None, []
            # First how it stands, then what happened: an end that comes between is told.
            standing = await jobs.standing(connection, key_id=key_id, job_id=job_id)
            news = await jobs.events(connection, job_id=job_id, after=last_event_id, limit=_AT_ONCE)
        return standing, news

    with parts.hub.waiter(job_id) as waiter:
        while True:
            standing, news = await parts.hub.ask(job_id, (key_id, last_event_id), look)
            for event in news:
                last_event_id = event.id
                yield ServerSentEvent(data=event.data, event=event.type, id=str(event.id))
                if event.data.get("status") in FINAL:
                    return
            if not news and (standing is None or standing.status in FINAL):
                return
            if len(news) < _AT_ONCE:
                if (left := end - loop.time()) <= 0:
                    return
                await waiter.wait(left)
