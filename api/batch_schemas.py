"""What goes over the wire about batches."""

import math
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field, RootModel

from api.schemas import (
    EXAMPLE,
    PRINTABLE,
    AsStored,
    Deadline,
    ImageRef,
    JobRequest,
    Labels,
    Priority,
    Request,
)
from core.spec import Name

MAX_CUSTOM_ID = 200
CustomId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_CUSTOM_ID,
        pattern=PRINTABLE,
        description="A name of your own for it; no two of a batch have the same.",
    ),
]


class BatchItem(JobRequest):
    """A job of a batch. Unless its spec sets them, `figures` is false and `snapshots` is 0."""

    custom_id: CustomId | None = None


class _Common(Request):
    labels: Labels = Field([], description="Of the batch; items have their own.")
    priority: Priority = Field(0, description="Of items that have none of their own.")


class ItemsBatch(_Common):
    """Many jobs. Each item is judged by itself, and refusing one leaves the others in."""

    items: list[Annotated[BatchItem, AsStored()]] = Field(min_length=1)

    def __len__(self) -> int:
        return len(self.items)

    def each(self) -> list[Any]:
        """The items, unchecked."""
        return self.items


class Grid(Request):
    """Every source with every target, on every layer, with every one of the settings.

    `spec` is what all have in common. A pair of the same image is refused as an item.
    """

    sources: list[ImageRef] = Field(min_length=1)
    targets: list[ImageRef] = Field(min_length=1)
    layers: list[Name] | None = Field(None, min_length=1)
    settings: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="Fields of a spec; they win over those of `spec`."
    )
    spec: dict[str, Any] = Field({}, description="Fields of a spec.")


class GridBatch(_Common):
    """Jobs as the points of a grid, numbered from sources (slowest) to settings (fastest).

    Their custom_id is `source/target/layer/settings`, an index each, such as `0/3/0/1`.
    """

    grid: Grid
    deadline_seconds: Deadline = None

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self._axes())

    def each(self) -> Iterator[dict[str, Any]]:
        """The items, unchecked."""
        sources, targets, layers, settings = self._axes()
        for point in product(
            enumerate(sources), enumerate(targets), enumerate(layers), enumerate(settings)
        ):
            (_, source), (_, target), (_, layer), (_, setting) = point
            yield {
                "custom_id": "/".join(str(index) for index, _ in point),
                "source": source,
                "target": target,
                "spec": self.grid.spec | layer | setting,
                "deadline_seconds": self.deadline_seconds,
            }

    def _axes(self) -> tuple[list[str], list[str], list[dict[str, Any]], list[dict[str, Any]]]:
        grid = self.grid
        layers = [{}] if grid.layers is None else [{"layer": layer} for layer in grid.layers]
        return grid.sources, grid.targets, layers, grid.settings or [{}]


class BatchRequest(RootModel[ItemsBatch | GridBatch]):
    """Jobs to submit together: a list of items, or a grid."""


_DIGITS = [f"sample:mnist/{digit}-0" for digit in range(3)]
EXAMPLES: dict[str, dict[str, Any]] = {
    "items": {
        "summary": "Two jobs",
        "value": {
            "items": [
                EXAMPLE | {"custom_id": "three as seven"},
                EXAMPLE | {"custom_id": "again", "spec": {**EXAMPLE["spec"], "seed": 1}},
            ],
            "labels": ["pilot"],
        },
    },
    "grid": {
        "summary": "Three digits, each with each, on two layers",
        "value": {
            "grid": {
                "sources": _DIGITS,
                "targets": _DIGITS,
                "layers": ["fc1", "fc2"],
                "spec": {"model": "mnist-mlp"},
            }
        },
    },
}


class ItemError(BaseModel):
    """Why an item was not accepted."""

    index: int = Field(description="Of the item; in a body of lines the line, from 0.")
    custom_id: str | None
    code: str
    message: str


class RequestCounts(BaseModel):
    """How many items there were, were refused, and stand where."""

    total: int
    refused: int
    queued: int
    running: int
    canceling: int
    succeeded: int
    failed: int
    canceled: int


class BatchUrls(BaseModel):
    """Where to go from here."""

    self: str
    cancel: str
    jobs: str
    results_jsonl: str
    results_csv: str


class ListedBatch(BaseModel):
    """Jobs that were submitted together. `completed`: none of them is left to run."""

    id: UUID
    created_at: datetime
    labels: list[str]
    status: Literal["in_progress", "completed"]
    cancel_requested_at: datetime | None
    request_counts: RequestCounts
    urls: BatchUrls


class Batch(ListedBatch):
    """A batch, and the items of it that were refused."""

    errors: list[ItemError]


class Batches(BaseModel):
    """Batches, the newest first."""

    batches: list[ListedBatch]
    next_cursor: str | None


class ItemResult(BaseModel):
    """A line of results.jsonl: a job that has ended. `result` is its `Result`."""

    index: int
    custom_id: str | None
    job_id: UUID
    status: Literal["succeeded", "failed", "canceled"]
    error: dict[str, Any] | None
    result: dict[str, Any] | None
