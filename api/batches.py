"""Batches: submit up to ten thousand jobs at once, watch them as one, read what came out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import APIRouter, BackgroundTasks, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from pydantic_core import from_json
from sqlalchemy.ext.asyncio import AsyncConnection

from api import batch_results, bodies
from api.batch_schemas import EXAMPLES, Batch, Batches, BatchRequest, GridBatch, ItemsBatch
from api.bodies import Sent
from api.deps import Decoder, KeyId, Parts, Reading, Services, Writing
from api.errors import (
    BatchNotCompleted,
    FieldError,
    IdempotencyKeyReused,
    Invalid,
    NotFound,
    QuotaExceeded,
    TooManyQueuedJobs,
    UnsupportedMediaType,
    responses,
)
from api.intake import Intake, NoItemAccepted, TooManyItems
from api.items import TooManySpecs
from api.jobs import IdempotencyKey, WithLabel
from api.openapi import body, ref
from api.schemas import Cursor
from api.submission import created_before, media_type_of
from store import batches, overview

router = APIRouter(prefix="/batches", tags=["batches"])
LINES = ("application/jsonl", "application/x-ndjson")
_LINES = "A `BatchItem` a line."
# How often a batch that is waited for is looked at, at most, while its jobs end.
_PAUSE = 0.5
BatchId = Annotated[UUID, Path(description="A batch's id.")]


class UnknownBatch(NotFound):
    """There is no such batch, or it is not yours."""

    code, title = "unknown_batch", "No such batch"


class UnknownBatchType(UnsupportedMediaType):
    """Send `application/json`, or `application/jsonl` with an item a line."""


def _described(description: str, media_type: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": {"type": "string"}}}
    return {200: {"description": description, "content": content}}


async def _read(request: Sent, decoding: Decoder, parts: Parts) -> Intake:
    """The items in the body, checked; only a key's owner gets so far as to send them."""
    intake = Intake(parts.settings, decoding)
    media_type = media_type_of(request)
    if media_type in LINES:
        await intake.add_lines(request.stream())
    elif media_type == "application/json":
        asked = await asyncio.to_thread(_parse, await request.body())
        await intake.add_all(asked)
    else:
        raise UnknownBatchType
    return intake


def _parse(content: bytes) -> ItemsBatch | GridBatch:
    try:
        given = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        message = f"The body is no JSON: {error}."
        raise Invalid(errors=[FieldError(loc="body", message=message)]) from error
    model = GridBatch if isinstance(given, dict) and "grid" in given else ItemsBatch
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise Invalid.of(error, model, "body") from error


@router.post(
    "",
    status_code=202,
    response_model=Batch,
    responses=responses(
        *bodies.RAISES,
        IdempotencyKeyReused,
        NoItemAccepted,
        QuotaExceeded,
        TooManyItems,
        TooManyQueuedJobs,
        TooManySpecs,
        UnknownBatchType,
    ),
    openapi_extra=body(
        {
            "application/json": {"schema": ref(BatchRequest), "examples": EXAMPLES},
            **{line: {"schema": {"type": "string", "description": _LINES}} for line in LINES},
        }
    ),
)
async def submit(
    key_id: KeyId,
    intake: Annotated[Intake, Depends(_read, scope="function")],
    connection: Writing,
    parts: Parts,
    request: Request,
    response: Response,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Submits many jobs at once."""
    batch_id = uuid4()
    known_id = await created_before(
        connection, key_id, idempotency_key, sha256=intake.sha256, new_id=batch_id
    )
    if known_id is None:
        await intake.write(
            connection,
            key_id=key_id,
            batch_id=batch_id,
            request_id=request.state.request_id,
            quota=parts.quota,
        )
        workers = await overview.workers(connection)
        background.add_task(parts.doorbell.ring, max(1, workers))  # after the commit
    else:
        batch_id = known_id
        response.headers["Idempotency-Replayed"] = "true"
    response.headers["Location"] = f"/v1/batches/{batch_id}"
    response.headers["Retry-After"] = "1"
    return await _shown(connection, key_id, batch_id)


@router.get("", response_model=Batches)
async def page(
    key_id: KeyId,
    connection: Reading,
    label: WithLabel = None,
    cursor: Annotated[Cursor | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Any:
    """Lists batches, the newest first, without the items that were refused."""
    before = None if cursor is None else int(cursor)
    found = await batches.page(
        connection, key_id=key_id, limit=limit + 1, before=before, label=label
    )
    more = str(found[limit - 1].seq) if len(found) > limit else None
    return {"batches": [shown(batch) for batch in found[:limit]], "next_cursor": more}


@router.get("/{batch_id}", response_model=Batch, responses=responses(UnknownBatch))
async def get(
    batch_id: BatchId,
    key_id: KeyId,
    parts: Parts,
    wait: Annotated[
        float, Query(ge=0, le=60, description="Seconds to wait for the last job to end.")
    ] = 0,
) -> Any:
    """Reads a batch, at once or when no job of it is left to run."""
    if wait:
        await _check(parts, key_id, batch_id)
        async with parts.waits.of(key_id):
            await _wait(parts, key_id, batch_id, wait)
        await parts.check(key_id)
    async with parts.read(key_id) as connection:
        return await _shown(connection, key_id, batch_id)


async def _wait(parts: Services, key_id: UUID, batch_id: UUID, seconds: float) -> None:
    """Until no job is left to run, looking when any job changes, but not too often."""
    loop = asyncio.get_running_loop()
    looked = float("-inf")

    async def look() -> bool:
        async with parts.read(key_id) as connection:
            return not await batches.in_progress(connection, batch_id)

    async def completed() -> bool:
        nonlocal looked
        await asyncio.sleep(looked + _PAUSE - loop.time())
        looked = loop.time()
        return await parts.hub.ask(None, batch_id, look)

    await parts.hub.until(completed, job_id=None, seconds=seconds)


@router.post(
    "/{batch_id}/cancel", status_code=202, response_model=Batch, responses=responses(UnknownBatch)
)
async def cancel(batch_id: BatchId, key_id: KeyId, connection: Writing) -> Any:
    """Cancels what is left of a batch: what waits at once, what runs within seconds."""
    if not await batches.cancel(connection, key_id=key_id, batch_id=batch_id):
        raise UnknownBatch
    return await _shown(connection, key_id, batch_id)


@router.delete("/{batch_id}", status_code=204, responses=responses(UnknownBatch, BatchNotCompleted))
async def delete(batch_id: BatchId, key_id: KeyId, connection: Writing, parts: Parts) -> None:
    """Deletes a batch that has ended: its jobs, their files, and the images that came with them.

    What other jobs use as well stays theirs.
    """
    keep = parts.settings.keep_unreferenced_blobs
    gone = await batches.delete(connection, key_id=key_id, batch_id=batch_id, keep=keep)
    if gone is None:
        raise UnknownBatch
    if not gone:
        raise BatchNotCompleted


@router.get(
    "/{batch_id}/results.jsonl",
    response_class=StreamingResponse,
    responses=responses(UnknownBatch) | _described("A line for each job.", "application/jsonl"),
)
async def results_jsonl(batch_id: BatchId, key_id: KeyId, parts: Parts) -> StreamingResponse:
    """The jobs that have ended, in order of their index: a JSON object a line.

    It has index, custom_id, job_id, status, error and result.
    """
    await _check(parts, key_id, batch_id)
    lines = batch_results.jsonl(partial(_page, parts, key_id), batch_id)
    return _download(lines, f"batch-{batch_id}.jsonl", "application/jsonl")


@router.get(
    "/{batch_id}/results.csv",
    response_class=StreamingResponse,
    responses=responses(UnknownBatch) | _described("A row for each job.", "text/csv"),
)
async def results_csv(batch_id: BatchId, key_id: KeyId, parts: Parts) -> StreamingResponse:
    """The jobs that have ended, in order of their index: a row each under a header.

    Labels are joined by semicolons. Text that a spreadsheet would take for a formula has an
    apostrophe before it.
    """
    await _check(parts, key_id, batch_id)
    rows = batch_results.table(partial(_page, parts, key_id), batch_id)
    return _download(rows, f"batch-{batch_id}.csv", "text/csv; charset=utf-8; header=present")


@asynccontextmanager
async def _page(parts: Services, key_id: UUID) -> AsyncIterator[AsyncConnection]:
    """A connection for a part of an answer; raises Unauthorized where the key was revoked."""
    await parts.check(key_id)
    async with parts.read(key_id) as connection:
        yield connection


def _download(content: AsyncIterator[str], name: str, media_type: str) -> StreamingResponse:
    headers = {
        "Content-Type": media_type,
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(content, headers=headers)


async def _check(parts: Services, key_id: UUID, batch_id: UUID) -> None:
    """Raises UnknownBatch."""
    async with parts.read(key_id) as connection:
        if not await batches.exists(connection, key_id=key_id, batch_id=batch_id):
            raise UnknownBatch


async def _shown(connection: AsyncConnection, key_id: UUID, batch_id: UUID) -> dict[str, Any]:
    """Raises UnknownBatch."""
    batch = await batches.get(connection, key_id=key_id, batch_id=batch_id)
    if batch is None:
        raise UnknownBatch
    return shown(batch)


def shown(batch: batches.Batch) -> dict[str, Any]:
    """A batch as `batch_schemas.Batch` has it."""
    url = f"/v1/batches/{batch.id}"
    return {
        "id": batch.id,
        "created_at": batch.created_at,
        "labels": batch.labels,
        "status": "completed" if batch.completed else "in_progress",
        "cancel_requested_at": batch.cancel_requested_at,
        "request_counts": {"total": batch.total, "refused": batch.refused, **batch.counts},
        "errors": batch.errors or [],
        "urls": {
            "self": url,
            "cancel": f"{url}/cancel",
            "jobs": f"/v1/jobs?batch={batch.id}",
            "results_jsonl": f"{url}/results.jsonl",
            "results_csv": f"{url}/results.csv",
        },
    }
