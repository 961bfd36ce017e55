"""Jobs: submit, read, wait, list, cancel, delete, watch, and fetch what came out."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks, Header, Query, Request, Response

from api import submission
from api.deps import KeyId, Parts, Reading, Writing
from api.errors import (
    IdempotencyKeyReused,
    JobNotFinal,
    QuotaExceeded,
    TooManyQueuedJobs,
    UnknownJob,
    responses,
)
from api.openapi import body, ref
from api.order import in_order
from api.schemas import EXAMPLE, PRINTABLE, Cursor, Job, JobId, JobPart, JobRequest, Jobs, JobUrls
from core.result import Result
from core.spec import CollisionSpec
from store import jobs
from store.lifecycle import FINAL, Status

_FILE = {"type": "string", "format": "binary"}
router = APIRouter(prefix="/jobs", tags=["jobs"])
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="The same key and body give the same job, however often they are sent.",
    ),
]

WithLabel = Annotated[
    str | None,
    Query(
        max_length=64,
        pattern=PRINTABLE,
        description="Only those with it; a batch's label is one of its jobs, too.",
    ),
]


@router.post(
    "",
    status_code=202,
    response_model=Job,
    responses=responses(IdempotencyKeyReused, QuotaExceeded, TooManyQueuedJobs, *submission.RAISES),
    openapi_extra=body(
        {
            "application/json": JobRequest,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"job": ref(JobPart), "source": _FILE, "target": _FILE},
                    "required": ["job"],
                    "additionalProperties": False,
                },
                "encoding": {"job": {"contentType": "application/json"}},
            },
        },
        {"digits": {"summary": "A 3 that is to look like a 7", "value": EXAMPLE}},
    ),
)
async def submit(
    key_id: KeyId,
    asked: submission.ReadSubmission,
    connection: Writing,
    parts: Parts,
    request: Request,
    response: Response,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Submits a job."""
    job_id, new = await submission.submit(
        connection,
        asked,
        key_id=key_id,
        settings=parts.settings,
        quota=parts.quota,
        idempotency_key=idempotency_key,
        request_id=request.state.request_id,
    )
    job = await jobs.get(connection, key_id=key_id, job_id=job_id)
    if job is None:
        raise UnknownJob
    response.headers["Location"] = f"/v1/jobs/{job_id}"
    response.headers["Retry-After"] = "1"
    if new:
        background.add_task(parts.doorbell.ring)  # after the commit: a worker must find the job
    else:
        response.headers["Idempotency-Replayed"] = "true"
    return shown(job)


@router.get("", response_model=Jobs)
async def page(
    key_id: KeyId,
    connection: Reading,
    status: Annotated[Status | None, Query(description="Only those that stand so.")] = None,
    batch: Annotated[UUID | None, Query(description="Only those of this batch.")] = None,
    label: WithLabel = None,
    cursor: Annotated[Cursor | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Any:
    """Lists jobs, the newest first, without their results.

    A page may have fewer than `limit` where their specs are long: there are more while there is a
    `next_cursor`.
    """
    found, more = await jobs.page(
        connection,
        key_id=key_id,
        limit=limit,
        before=None if cursor is None else int(cursor),
        status=status,
        batch_id=batch,
        label=label,
    )
    shown_jobs = [shown(job) for job in found]
    return {"jobs": shown_jobs, "next_cursor": str(found[-1].seq) if more else None}


@router.get("/{job_id}", response_model=Job, responses=responses(UnknownJob))
async def get(
    job_id: JobId,
    key_id: KeyId,
    parts: Parts,
    wait: Annotated[
        float, Query(ge=0, le=60, description="Seconds to wait for the job to end.")
    ] = 0,
) -> Any:
    """Reads a job, at once or when it has ended."""

    async def look() -> bool:
        async with parts.read(key_id) as connection:
            standing = await jobs.standing(connection, key_id=key_id, job_id=job_id)
        return standing is None or standing.status in FINAL

    async def ended() -> bool:
        return await parts.hub.ask(job_id, key_id, look)

    if wait:
        async with parts.waits.of(key_id):
            await parts.hub.until(ended, job_id=job_id, seconds=wait)
        await parts.check(key_id)
    async with parts.read(key_id) as connection:
        job = await jobs.get(connection, key_id=key_id, job_id=job_id)
    if job is None:
        raise UnknownJob
    return shown(job)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    response_model=Job,
    responses=responses(UnknownJob) | {200: {"model": Job, "description": "It had ended."}},
)
async def cancel(job_id: JobId, key_id: KeyId, connection: Writing, response: Response) -> Any:
    """Cancels a job: at once where it waits, else within seconds."""
    changed = await jobs.cancel(connection, key_id=key_id, job_id=job_id)
    job = await jobs.get(connection, key_id=key_id, job_id=job_id)
    if job is None:
        raise UnknownJob
    if not changed and job.status in FINAL:
        response.status_code = 200
    return shown(job)


@router.delete("/{job_id}", status_code=204, responses=responses(UnknownJob, JobNotFinal))
async def delete(job_id: JobId, key_id: KeyId, connection: Writing, parts: Parts) -> None:
    """Deletes a job that has ended, with all its files and the images that came with it.

    What other jobs use as well stays theirs.
    """
    keep = parts.settings.keep_unreferenced_blobs
    if await jobs.delete(connection, key_id=key_id, job_id=job_id, keep=keep):
        return
    if await jobs.standing(connection, key_id=key_id, job_id=job_id) is None:
        raise UnknownJob
    raise JobNotFinal


def shown(job: jobs.Job) -> dict[str, Any]:
    """A job as `schemas.Job` has it; in a list `schemas.ListedJob` leaves the result out."""
    url, files = f"/v1/jobs/{job.id}", job.files or []
    urls: dict[str, Any] = {"self": url, "cancel": f"{url}/cancel", "events": f"{url}/events"}
    if job.status == Status.SUCCEEDED:
        urls["corners"] = [f"{url}/corners/{i}.png" for i in range(job.spec["corners"])]
    named = {name.replace(".", "_"): f"{url}/{name}" for name in files}
    urls |= {name: there for name, there in named.items() if name in JobUrls.model_fields}
    answer = {name: getattr(job, name) for name in _AS_THEY_ARE}
    answer["progress"] = None if job.status in FINAL else job.progress
    answer["spec"] = in_order(job.spec, CollisionSpec)
    answer["source"] = {"sha256": job.source_sha256, "name": job.source_name}
    answer["target"] = {"sha256": job.target_sha256, "name": job.target_name}
    result = job.details and in_order(job.details | {"corners": job.corners}, Result)
    return answer | {"result": result, "urls": urls}


_AS_THEY_ARE = [name for name in Job.model_fields if name in jobs.Job.__dataclass_fields__]
