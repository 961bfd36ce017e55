"""What goes over the wire: requests, checked to the letter, and answers."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Path
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from core.images import sample_names
from core.result import Result
from core.spec import CollisionSpec
from store.lifecycle import Status


class Request(BaseModel):
    """An unknown field, or one of another type, is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class AsStored:
    """JSON that is as this type says, and is not checked: what the store keeps, say."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        self._source = source
        return core_schema.any_schema()

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # With all its definitions, which the schema around it does not have.
        return handler(TypeAdapter(self._source).core_schema)


_SAMPLES = "|".join(sample_names())
# Checked by hand, for the sake of better messages; the pattern tells clients what is what.
ImageRef = Annotated[
    str,
    Field(
        description="`sample:<name>`, `sha256:<hash>` of an image sent before, or `base64:<data>`.",
        json_schema_extra={
            "pattern": rf"^(sample:({_SAMPLES})|sha256:[0-9a-f]{{64}}|base64:[A-Za-z0-9+/]+=?=?)$"
        },
        examples=["sample:mnist/3-0"],
    ),
]
# Printable: no control characters, no separators of lines.
PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=PRINTABLE)]
Labels = Annotated[list[Label], Field(max_length=16, examples=[["mnist", "trial 3"]])]
Priority = Annotated[int, Field(ge=-100, le=100, description="Higher goes first.")]
Deadline = Annotated[
    float | None,
    Field(
        gt=0,
        le=30 * 86400,
        allow_inf_nan=False,
        description="From the start of an attempt until the job fails; null: what the spec allows "
        "the optimisation, and an hour.",
    ),
]

EXAMPLE: dict[str, Any] = {
    "source": "sample:mnist/3-0",
    "target": "sample:mnist/7-0",
    "spec": {"model": "mnist-mlp", "layer": "fc1", "corners": 5},
    "labels": ["first try"],
}


class JobRequest(Request):
    """A job to submit."""

    source: ImageRef
    target: ImageRef
    spec: CollisionSpec
    priority: Priority = 0
    labels: Labels = []
    deadline_seconds: Deadline = None


class JobPart(Request):
    """A job of which images may come as files of the same request."""

    source: ImageRef | None = None
    target: ImageRef | None = None
    spec: CollisionSpec
    priority: Priority = 0
    labels: Labels = []
    deadline_seconds: Deadline = None


class ImageName(BaseModel):
    """An image by its hash, with the name it was given."""

    sha256: str
    name: str


class Progress(BaseModel):
    """How far an attempt is."""

    steps: int
    rows_left: int
    worst_l_pos: float | None
    steps_per_second: float | None
    eta: float | None = Field(description="Seconds.")


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


def _once() -> Any:
    """A field that is absent until there is something to say."""
    return Field(default=None, exclude_if=lambda value: value is None)


class JobUrls(BaseModel):
    """Where to go from here; files once there are any."""

    self: str
    cancel: str
    events: str
    corners: list[str] | None = _once()
    corners_npz: str | None = _once()
    samples_npz: str | None = _once()
    snapshots_npz: str | None = _once()
    figure_png: str | None = _once()
    snapshots_png: str | None = _once()
    curves_png: str | None = _once()
    hull_png: str | None = _once()
    regions_png: str | None = _once()
    worst_png: str | None = _once()


class ListedJob(BaseModel):
    """A job and where it stands."""

    id: UUID
    status: Status
    status_reason: str | None
    spec: Annotated[CollisionSpec, AsStored()]
    source: ImageName
    target: ImageName
    labels: list[str]
    priority: int
    batch_id: UUID | None
    custom_id: str | None
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_seconds: float
    queue_position: int | None = Field(
        description="How many go before it, 10 000 at most; null in lists and once it runs."
    )
    attempt: int
    progress: Annotated[Progress | None, AsStored()] = Field(description="Null once it has ended.")
    error: Annotated[JobError | None, AsStored()]
    urls: JobUrls


class Job(ListedJob):
    """A job, where it stands, and what it found."""

    result: Annotated[Result | None, AsStored()] = Field(description="Null until it has succeeded.")


class Jobs(BaseModel):
    """Jobs, the newest first."""

    jobs: list[ListedJob]
    next_cursor: str | None


class Image(BaseModel):
    """An image that this key may use."""

    sha256: str
    media_type: str
    size: int
    width: int
    height: int
    name: str
    created_at: datetime
    url: str


JobId = Annotated[UUID, Path(description="A job's id.")]
Cursor = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
