"""What the API refuses, and how it says so: RFC 9457 problems, for every status from 400 up.

A subclass's docstring is its message. A route declares the ones that it can raise:
`responses=responses(UnknownJob, JobNotFinal)`.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, TypedDict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from core.complaints import complaints
from core.errors import CoreError

MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """What is wrong with one field."""

    loc: str = Field(description="Where, such as `body.spec.corners`.")
    message: str


class Problem(BaseModel):
    """Why a request was refused (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="A sentence that a person can act on.")
    code: str = Field(description="The same for every problem of this kind; for programs.")
    errors: list[FieldError] | None = None


class ApiError(Exception):
    """The request could not be answered."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal server error"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, detail: str | None = None, *, errors: list[FieldError] | None = None
    ) -> None:
        self.detail = detail or " ".join((type(self).__doc__ or "").split())
        self.errors = errors
        super().__init__(self.detail)

    def response(self) -> Response:
        """This error as the client sees it."""
        return problem(
            self.status,
            self.code,
            self.title,
            self.detail,
            errors=self.errors,
            headers=self.headers,
        )


class Unauthorized(ApiError):
    """Send `Authorization: Bearer pc_...` with a key that has not been revoked."""

    status, code, title = 401, "unauthorized", "No valid API key"
    headers = {"WWW-Authenticate": 'Bearer realm="polycollide"'}  # noqa: RUF012 - a constant


class ForeignPage(ApiError):
    """Without keys, only requests to localhost that no page of another site made are answered."""

    status, code, title = 403, "foreign_page", "Not from here"


class NotFound(ApiError):
    """There is no such page."""

    status, code, title = 404, "not_found", "Not found"


class UnknownJob(NotFound):
    """There is no such job, or it is not yours."""

    code, title = "unknown_job", "No such job"


class NoSuchFile(NotFound):
    """The job has no such file."""

    code, title = "no_such_file", "No such file"


class NoSuchImage(NotFound):
    """You have no such image."""

    code, title = "no_such_image", "No such image"


class JobNotFinal(ApiError):
    """The job has not ended; cancel it first, and wait until it has."""

    status, code, title = 409, "job_not_final", "The job has not ended"


class ImageInUse(ApiError):
    """Jobs of yours use this image; delete them first."""

    status, code, title = 409, "image_in_use", "The image is in use"


class BatchNotCompleted(ApiError):
    """Jobs of the batch have not ended; cancel it first, and wait until they have."""

    status, code, title = 409, "batch_not_completed", "The batch has not ended"


class QuotaExceeded(ApiError):
    """Your key would keep more bytes than it may; delete jobs, batches or images first."""

    status, code, title = 403, "quota_exceeded", "Quota exceeded"


class MalformedBody(ApiError):
    """The body is not what its content type says."""

    status, code, title = 400, "malformed_body", "Malformed body"


class BodyTooLarge(ApiError):
    """The body is larger than this service takes."""

    status, code, title = 413, "body_too_large", "Body too large"


class UnsupportedMediaType(ApiError):
    """Send `application/json` or `multipart/form-data`."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class Invalid(ApiError):
    """The request has fields that cannot be used; `errors` lists them."""

    status, code, title = 422, "invalid_request", "Invalid request"

    @classmethod
    def of(cls, error: ValidationError, model: type[BaseModel], *location: str) -> "Invalid":
        """What pydantic has against a `model`, below `location`."""
        return cls(errors=field_errors(error, model, *location))


class UnknownImage(Invalid):
    """You have no such image; send it first."""

    code, title = "unknown_image", "Unknown image"


class SameImage(Invalid):
    """Source and target are the same image; a collision needs two."""

    code, title = "same_image", "The same image twice"


class IdempotencyKeyReused(Invalid):
    """This Idempotency-Key was sent before, with another body; choose a new one."""

    code, title = "idempotency_key_reused", "Idempotency key reused"


class TooManyQueuedJobs(ApiError):
    """Too many of your jobs are waiting; submit more when some of them have run."""

    status, code, title = 429, "too_many_queued_jobs", "Too many queued jobs"
    headers = {"Retry-After": "30"}  # noqa: RUF012 - a constant


class Unavailable(ApiError):
    """The database does not answer; try again in a moment."""

    status, code, title = 503, "unavailable", "Unavailable"
    headers = {"Retry-After": "2"}  # noqa: RUF012 - a constant


class _Example(TypedDict):
    summary: str
    value: dict[str, Any]


def problem(
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    errors: list[FieldError] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem as a response."""
    content = Problem(title=title, status=status, detail=detail, code=code, errors=errors)
    return JSONResponse(
        content.model_dump(exclude_none=True), status, headers=headers, media_type=MEDIA_TYPE
    )


def responses(*errors: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that can raise these."""
    found: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        answer = found.setdefault(error.status, {"description": error.title, "content": {}})
        kind = answer["content"].setdefault(
            MEDIA_TYPE, {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
        )
        content = Problem(
            title=error.title, status=error.status, detail=error().detail, code=error.code
        )
        kind["examples"][error.code] = _Example(
            summary=error.title, value=content.model_dump(exclude_none=True)
        )
        if error.headers:
            answer["headers"] = {name: {"schema": {"type": "string"}} for name in error.headers}
    return found


def field_errors(
    error: ValidationError, model: type[BaseModel], *location: str
) -> list[FieldError]:
    """What pydantic has against a `model`, without the values that caused it."""
    return [
        FieldError(loc=_joined(*location, *complaint.loc), message=complaint.message)
        for complaint in complaints(error, model)
    ]


def _joined(*location: str | int) -> str:
    return ".".join(map(str, location))


def install(app: FastAPI) -> None:
    """Turns whatever a route raises into a problem."""
    app.add_exception_handler(ApiError, _own)
    app.add_exception_handler(CoreError, _core)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    for error in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(error, _unavailable)


async def _own(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _core(_: Request, error: Exception) -> Response:
    assert isinstance(error, CoreError)
    return problem(422, error.code, Invalid.title, str(error))


async def _validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = [FieldError(loc=_joined(*e["loc"]), message=e["msg"]) for e in error.errors()[:50]]
    return Invalid(errors=wrong).response()


_BY_STATUS: dict[int, type[ApiError]] = {400: MalformedBody, 404: NotFound, 413: BodyTooLarge}


async def _http(request: Request, error: Exception) -> Response:
    """What FastAPI and Starlette raise themselves."""
    assert isinstance(error, HTTPException)
    if error.status_code in _BY_STATUS:
        said = error.detail if error.status_code == 413 else None
        return _BY_STATUS[error.status_code](said).response()
    status, headers = HTTPStatus(error.status_code), dict(error.headers or {})
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed(request))
    code = status.name.lower()
    return problem(status, code, status.phrase, status.description, headers=headers)


def _allowed(request: Request) -> list[str]:
    """Every method that this path has; Starlette names those of one route alone."""

    def answers(method: str) -> bool:
        scope = dict(request.scope) | {"method": method}
        return any(route.matches(scope)[0] == Match.FULL for route in request.app.router.routes)

    return [method for method in _METHODS if answers(method)]


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


async def _unavailable(_: Request, error: Exception) -> Response:
    return Unavailable().response()
