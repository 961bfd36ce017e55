"""What the service answers. Fields that a newer server adds are ignored."""

from datetime import datetime
from typing import Any, Generic, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from polycollide.errors import JobFailed

FINAL = frozenset({"succeeded", "failed", "canceled"})
T = TypeVar("T")


class Answer(BaseModel):
    """Immutable, and tolerant of what it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Picture(Answer):
    """One of a job's two images."""

    sha256: str
    name: str | None = None


class Progress(Answer):
    """How far a running job is."""

    steps: int = 0
    rows_left: int | None = None
    worst_l_pos: float | None = None
    steps_per_second: float | None = None
    eta: float | None = Field(None, description="Seconds.")


class Failure(Answer):
    """Why a job failed."""

    code: str
    message: str


class Job(Answer):
    """A job as it was when the service was asked.

    `result` is what `polycollide run` writes as result.json: `job.result["converged"]`,
    `job.result["interpolation"]["accuracy"]`. It is None until the job has succeeded, and in lists.
    """

    id: str
    status: str
    status_reason: str | None = None
    spec: dict[str, Any] = Field(default_factory=dict, repr=False)
    source: Picture | None = None
    target: Picture | None = None
    labels: list[str] = []
    priority: int = 0
    batch_id: str | None = None
    custom_id: str | None = None
    created_at: datetime | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    deadline_seconds: float | None = None
    queue_position: int | None = None
    attempt: int = 0
    progress: Progress | None = None
    result: dict[str, Any] | None = Field(None, repr=False)
    error: Failure | None = None
    urls: dict[str, Any] = Field(default_factory=dict, repr=False)

    @property
    def done(self) -> bool:
        """Whether the job has come to an end, a good one or not."""
        return self.status in FINAL

    @property
    def succeeded(self) -> bool:
        """Whether it has a result."""
        return self.status == "succeeded"

    def check(self) -> Self:
        """This job; raises JobFailed where it ended without a result.

        >>> result = client.wait(job).check().result  # doctest: +SKIP
        """
        if self.done and not self.succeeded:
            raise JobFailed(self)
        return self


class Refused(Answer):
    """An item of a batch that was not accepted."""

    index: int
    custom_id: str | None = None
    code: str
    message: str


class Batch(Answer):
    """Jobs that were submitted together. `errors` lists the items that were refused."""

    id: str
    status: str
    created_at: datetime | None = None
    labels: list[str] = []
    request_counts: dict[str, int] = {}
    errors: list[Refused] = []
    urls: dict[str, Any] = Field(default_factory=dict, repr=False)

    @property
    def done(self) -> bool:
        """Whether no job of it is left to run."""
        return self.status == "completed"


class ItemResult(Answer):
    """One finished job of a batch: a line of results.jsonl, whatever else is in it."""

    model_config = ConfigDict(extra="allow")

    index: int
    custom_id: str | None = None
    job_id: str
    status: str
    error: Failure | None = None
    result: dict[str, Any] | None = Field(None, repr=False)

    @property
    def succeeded(self) -> bool:
        """Whether it has a result."""
        return self.status == "succeeded"


class Event(Answer):
    """Something that happened to a job: `event` is "status", "progress" or "snapshot"."""

    id: str = ""
    event: str = "message"
    data: dict[str, Any] = {}

    @property
    def final(self) -> bool:
        """Whether none comes after it."""
        return self.event == "status" and self.data.get("status") in FINAL


class Layer(Answer):
    """A layer that can be tapped."""

    name: str
    kind: str | None = None
    shape: list[int] = []
    units: int | None = None
    cut: bool | None = None
    cut_proved: bool | None = None


class Model(Answer):
    """A network that workers can serve; `layers` only where it was asked for by name."""

    name: str
    weights: list[str] = []
    input_shape: list[int] | None = None
    classes: int | None = None
    origin: str | None = None
    ready: bool | None = None
    layers_known: bool | None = None
    layers: list[Layer] | None = None
    class_names: list[str] | None = None


class Models(Answer):
    """All of them."""

    models: list[Model]


class PatchSet(Answer):
    """A patch set that workers have; `differs` where others have another one under its name."""

    name: str
    sha256: str
    images: int
    patches: int
    size: int
    stride: int
    resize: int
    index: str
    workers: int
    differs: bool


class PatchSets(Answer):
    """All of them."""

    patch_sets: list[PatchSet]


class Uploaded(Answer):
    """An image that the service has."""

    sha256: str


class Page(Answer, Generic[T]):
    """A part of a list, and where the next part begins."""

    listed: list[T] = Field(validation_alias=AliasChoices("jobs", "batches"))
    next_cursor: str | None = None
