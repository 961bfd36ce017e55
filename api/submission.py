"""How a job comes in: its body read and checked without a connection, then written in one go."""

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Annotated, TypeVar
from uuid import UUID, uuid4

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.datastructures import UploadFile

from api import bodies, pictures
from api.bodies import Sent
from api.deps import Decoder, Parts
from api.errors import (
    ApiError,
    FieldError,
    IdempotencyKeyReused,
    Invalid,
    MalformedBody,
    SameImage,
    TooManyQueuedJobs,
    UnknownImage,
    UnsupportedMediaType,
)
from api.pictures import Known
from api.quota import Quota
from api.schemas import JobPart, JobRequest
from api.turns import Turn
from store import catalog, idempotency, images, jobs
from store.images import Picture, Stored
from store.settings import Settings

M = TypeVar("M", bound=BaseModel)
# Parsing more than this would keep other requests waiting for too long.
_LONG = 2**18


@dataclass(frozen=True)
class Submission:
    """A job whose body was read, and whose images were checked."""

    request: JobRequest | JobPart
    source: Picture | Known
    target: Picture | Known

    @property
    def sha256(self) -> str:
        """The same for bodies that ask for the same thing, in later versions, too."""
        body = self.request.model_dump(
            mode="json", exclude={"source", "target"}, exclude_defaults=True
        )
        body |= {"source": self.source.sha256, "target": self.target.sha256}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


async def _read(request: Sent, decoding: Decoder, parts: Parts) -> Submission:
    """The job in the body; only a key's owner gets so far as to send one."""
    media_type = media_type_of(request)
    if media_type == "application/json":
        asked: JobRequest | JobPart = await parse(JobRequest, await request.body(), "body")
        return await _resolve(asked, {}, decoding)
    if media_type != "multipart/form-data":
        raise UnsupportedMediaType
    # Text parts are as long as the body may be: images may come in them.
    limit = parts.settings.max_body_bytes
    async with request.form(max_files=2, max_fields=1, max_part_size=limit) as form:
        text, files = form.get("job"), dict[str, UploadFile]()
        for name in ("source", "target"):
            if isinstance(file := form.get(name), UploadFile):
                files[name] = file
        if not isinstance(text, str) or len(files) + 1 != len(form.multi_items()):
            raise Invalid(errors=[FieldError(loc="body", message=_PARTS)])
        asked = await parse(JobPart, text.encode(errors="replace"), "body", "job")
        return await _resolve(asked, files, decoding)


_PARTS = "The parts are `job`, which is text, and `source`, `target` or both, which are files."
ReadSubmission = Annotated[Submission, Depends(_read, scope="function")]


async def submit(
    connection: AsyncConnection,
    submission: Submission,
    *,
    key_id: UUID,
    settings: Settings,
    quota: Quota,
    idempotency_key: str | None,
    request_id: str | None,
) -> tuple[UUID, bool]:
    """Writes the job and its images; its id, and whether it is new."""
    job_id, asked = uuid4(), submission.request
    known_id = await created_before(
        connection, key_id, idempotency_key, sha256=submission.sha256, new_id=job_id
    )
    if known_id is not None:
        return known_id, False
    known = await catalog.read(
        connection,
        [asked.spec],
        max_parameters=settings.max_parameters,
        max_result_bytes=settings.max_result_bytes,
    )
    known.check(asked.spec)
    limit = settings.max_queued_jobs
    if not await jobs.has_room(connection, key_id=key_id, jobs=1, limit=limit):
        raise TooManyQueuedJobs
    pictures = [i for i in (submission.source, submission.target) if isinstance(i, Picture)]
    more = sum(len(picture.content) for picture in pictures) + known.file_bytes(asked.spec)
    await quota.take(connection, key_id, more + len(asked.spec.model_dump_json()))
    source, target = await _store(connection, key_id, submission)
    grace = settings.deadline_grace.total_seconds()
    await jobs.submit(
        connection,
        jobs.NewJob(
            id=job_id,
            key_id=key_id,
            spec=asked.spec,
            source=source,
            target=target,
            priority=asked.priority,
            labels=asked.labels,
            deadline_seconds=asked.deadline_seconds or asked.spec.max_seconds + grace,
            file_bytes=known.file_bytes(asked.spec),
            request_id=request_id,
        ),
    )
    return job_id, True


async def created_before(
    connection: AsyncConnection,
    key_id: UUID,
    idempotency_key: str | None,
    *,
    sha256: str,
    new_id: UUID,
) -> UUID | None:
    """What a request with this Idempotency-Key created; None where that will be `new_id`.

    Raises IdempotencyKeyReused where its body was another one.
    """
    if idempotency_key is None:
        return None
    known = await idempotency.take(
        connection,
        key_id=key_id,
        value=idempotency_key,
        body_sha256=sha256,
        created_id=new_id,
    )
    if known is not None and known.body_sha256 != sha256:
        raise IdempotencyKeyReused
    return known.created_id if known else None


def media_type_of(request: Request) -> str:
    """What the request says that its body is, without parameters."""
    message = Message()
    message["Content-Type"] = request.headers.get("content-type", "")
    return message.get_content_type()


async def parse(model: type[M], body: bytes, *location: str) -> M:
    """A body as `model`. Raises Invalid with locations below `location`."""
    try:
        if len(body) > _LONG:
            return await asyncio.to_thread(model.model_validate_json, body, strict=True)
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise Invalid.of(error, model, *location) from error


async def _resolve(
    asked: JobRequest | JobPart, files: dict[str, UploadFile], decoding: Turn
) -> Submission:
    found: dict[str, Picture | Known] = {}
    for name, reference in (("source", asked.source), ("target", asked.target)):
        if (reference is None) == (name not in files):
            message = "Give this image once: by a reference, or as a file."
            raise Invalid(errors=[FieldError(loc=f"body.{name}", message=message)])
        if reference is not None:
            found[name] = await pictures.resolve(reference, name, decoding)
        else:
            own_name = pictures.short_name(files[name].filename)
            found[name] = await pictures.check(own_name, files[name], decoding)
    # Of patches, corners can be found that collide with their source.
    if found["source"].sha256 == found["target"].sha256 and asked.spec.patch_set is None:
        raise SameImage
    return Submission(asked, found["source"], found["target"])


async def _store(
    connection: AsyncConnection, key_id: UUID, submission: Submission
) -> tuple[Stored, Stored]:
    both = (submission.source, submission.target)
    pictures = [image for image in both if isinstance(image, Picture)]
    await images.put(connection, key_id, pictures, inline=True)
    hashes = [image.sha256 for image in both if isinstance(image, Known)]
    names = await images.names(connection, key_id, hashes)
    return stored(submission.source, names), stored(submission.target, names)


def stored(image: Picture | Known, names: Mapping[str, str]) -> Stored:
    """An image by what it is called in the store; `names` are those of known ones, by hash.

    Raises UnknownImage.
    """
    if isinstance(image, Picture):
        return Stored(image.name, image.sha256)
    if image.sha256 not in names:
        raise UnknownImage(f"You have no image {image.sha256}; send it first.")
    return Stored(names[image.sha256], image.sha256)


RAISES: tuple[type[ApiError], ...] = (
    *bodies.RAISES,
    Invalid,
    MalformedBody,
    SameImage,
    UnknownImage,
    UnsupportedMediaType,
)
