"""Files: pictures and arrays, answered once and cached for good by their hash."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Header, Path, Response

from api.deps import KeyId, Reading
from api.errors import ApiError, NoSuchFile, UnknownJob, responses
from api.schemas import JobId
from core.spec import MAX_CORNERS
from store import jobs
from store.jobs import File, Standing
from store.lifecycle import FINAL, Status

router = APIRouter(prefix="/jobs", tags=["jobs"])

IfNoneMatch = Annotated[str | None, Header(description="ETags that the client has.")]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_HEADERS = {
    name: {"schema": {"type": "string"}}
    for name in ("ETag", "Cache-Control", "Content-Disposition")
}
_RAISES = (UnknownJob, NoSuchFile)
Route = TypeVar("Route", bound=Callable[..., Any])


def serves(
    router: APIRouter, path: str, *media_types: str, raises: Iterable[type[ApiError]]
) -> Callable[[Route], Route]:
    """A route that answers with a file: to GET, and to HEAD without the file."""
    content = dict.fromkeys(media_types, _BINARY)
    known: dict[int | str, dict[str, Any]] = {
        200: {"description": "The file.", "content": content, "headers": _HEADERS},
        304: {"description": "The client has it."},
    }
    known |= responses(*raises)

    def add(route: Route) -> Route:
        # The server leaves the body out by itself. One operation of two methods would have one id.
        router.head(path, response_class=Response, include_in_schema=False)(route)
        return router.get(path, response_class=Response, responses=known)(route)

    return add


def unchanged(sha256: str, known: str | None) -> bool:
    """Whether the client has the file already."""
    tags = [tag.strip().removeprefix("W/") for tag in (known or "").split(",")]
    return f'"{sha256}"' in tags or "*" in tags


def answer(file: File, content: bytes | None, *, name: str) -> Response:
    """A file that never changes; without `content`, that the client has it."""
    headers = {
        "ETag": f'"{file.sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name, safe='')}",
    }
    if content is None:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=file.media_type, headers=headers)


@serves(router, "/{job_id}/corners/{index}.png", "image/png", raises=_RAISES)
async def corner(
    job_id: JobId,
    index: Annotated[int, Path(ge=0, lt=MAX_CORNERS)],
    key_id: KeyId,
    connection: Reading,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A corner, as the 8-bit image that was measured."""
    standing = await _standing(connection, key_id, job_id)
    file = await jobs.corner(connection, job_id=job_id, index=index)
    return await _file(connection, standing, file, f"{job_id}-{index}.png", if_none_match)


@serves(router, "/{job_id}/snapshots/{steps}.png", "image/png", raises=_RAISES)
async def snapshot(
    job_id: JobId,
    steps: Annotated[int, Path(ge=0, lt=2**31)],
    key_id: KeyId,
    connection: Reading,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The corners as they were after so many steps."""
    standing = await _standing(connection, key_id, job_id)
    file = await jobs.file(connection, job_id=job_id, name=f"snapshots/{steps}.png")
    return await _file(connection, standing, file, f"{job_id}-at-{steps}.png", if_none_match)


@serves(router, "/{job_id}/{stem}.npz", "application/zip", raises=_RAISES)
async def arrays(
    job_id: JobId,
    stem: Literal["corners", "samples", "snapshots"],
    key_id: KeyId,
    connection: Reading,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The corners, samples of their polytope, or corners on their way, for `numpy.load`."""
    standing = await _standing(connection, key_id, job_id)
    file = await jobs.file(connection, job_id=job_id, name=f"{stem}.npz")
    return await _file(connection, standing, file, f"{job_id}-{stem}.npz", if_none_match)


@serves(router, "/{job_id}/{stem}.png", "image/png", raises=_RAISES)
async def picture(
    job_id: JobId,
    stem: Literal["figure", "snapshots", "curves", "hull", "regions", "worst"],
    key_id: KeyId,
    connection: Reading,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A picture of the result, or the worst point of the polytope that was found."""
    standing = await _standing(connection, key_id, job_id)
    file = await jobs.file(connection, job_id=job_id, name=f"{stem}.png")
    return await _file(connection, standing, file, f"{job_id}-{stem}.png", if_none_match)


async def _standing(connection: Reading, key_id: UUID, job_id: UUID) -> Standing:
    found = await jobs.standing(connection, key_id=key_id, job_id=job_id)
    if found is None:
        raise UnknownJob
    return found


async def _file(
    connection: Reading, standing: Standing, file: File | None, name: str, known: str | None
) -> Response:
    if file is None:
        raise NoSuchFile(_why(standing, name))
    if unchanged(file.sha256, known):
        return answer(file, None, name=name)
    content = await jobs.read(connection, file.sha256)
    if content is None:
        raise NoSuchFile
    return answer(file, content, name=name)


def _why(standing: Standing, name: str) -> str:
    if standing.status not in FINAL:
        return f"The job has not ended, it is {standing.status}; this file comes with its result."
    if standing.status != Status.SUCCEEDED:
        return f"The job has no result: it {_ENDED[standing.status]}."
    if name.endswith(".png") and not name.endswith("-worst.png") and not standing.figures:
        return "No pictures were drawn; set `figures` in the spec."
    return "The job has no such file."


_ENDED = {Status.FAILED: "failed", Status.CANCELED: "was canceled"}
