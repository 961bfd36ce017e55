"""What people ask about the service itself: its models, patch sets, health and numbers.

`router` belongs under `/v1`; `root` holds the paths that stand outside of it and need no key.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from alembic.script import ScriptDirectory
from fastapi import APIRouter, Depends, Path, Request, Response
from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncConnection

from api.cached import Cached
from api.deps import KeyId, Parts, Reading, Services
from api.errors import NotFound, responses
from api.schemas import PRINTABLE
from core.errors import UnknownName
from store import overview, usage
from store.lifecycle import FINAL, Status

T = TypeVar("T")
router = APIRouter(tags=["models"])
root = APIRouter(tags=["operations"])


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelSummary(_Out):
    """A network that a running worker serves."""

    name: str
    weights: list[str]
    input_shape: list[int] = Field(description="[channels, height, width]")
    classes: int | None = Field(description="How many; null until a worker has loaded it.")
    origin: str
    ready: bool = Field(description="Whether its weights are at hand.")
    layers_known: bool
    url: str


class Models(_Out):
    models: list[ModelSummary]


class Layer(_Out):
    """A layer that a job can name."""

    name: str
    kind: str | None = Field(description="Its activation: relu, relu6 or max_pool.")
    shape: list[int]
    units: int
    cut: bool | None = Field(description="Whether its activations decide the logits.")
    cut_proved: bool | None = Field(
        None, description="Whether that is proved; else it was tested on a few images."
    )


class ModelDetails(ModelSummary):
    class_names: list[str] | None
    layers: list[Layer] | None = Field(description="Null until a worker has loaded the network.")


class PatchSet(_Out):
    """A set of natural image patches that running workers have, for `parametrization: patches`."""

    name: str
    sha256: str = Field(description="Of its geometry and images; results name it.")
    images: int
    patches: int
    size: int = Field(description="Pixels of a patch's side, and so of a job's windows.")
    stride: int
    resize: int = Field(description="Pixels of an image's side.")
    index: str = Field(description="How it is searched.")
    workers: int = Field(description="How many running workers have it.")
    differs: bool = Field(
        description="Whether other workers have another set under this name: shown is the one "
        "that was reported last, and a result names the one that it was made of."
    )
    url: str


class PatchSets(_Out):
    patch_sets: list[PatchSet]


class Usage(_Out):
    """Bytes that a key keeps. What others keep as well counts for each."""

    images: int
    specs: int
    results: int = Field(description="Of jobs that have not ended, what they may come to.")
    total: int
    limit: int = Field(description="What is over it is refused: delete first.")


class Alive(_Out):
    status: Literal["ok"] = "ok"


class Checks(_Out):
    database: Literal["ok", "unavailable"]
    migrations: Literal["ok", "behind", "newer", "unknown"] = Field(
        alias="schema", description="`newer`: of a later version, which this one gets along with."
    )
    redis: Literal["ok", "unavailable"]
    workers: int | None = Field(description="Null where the database does not say.")


class Readiness(_Out):
    """`degraded`: jobs are accepted, but start later than they could."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: Checks


class UnknownModel(NotFound):
    """No running worker serves a model of this name."""

    code, title = "unknown_model", "No such model"


class UnknownPatchSet(NotFound):
    """No running worker has a patch set of this name."""

    code, title = "unknown_patch_set", "No such patch set"


@router.get("/models")
async def list_models(_: KeyId, connection: Reading) -> Models:
    """The networks that running workers serve."""
    found = await overview.models(connection)
    return Models(models=[ModelSummary(**_summary(model)) for model in found])


@router.get("/models/{name}", responses=responses(UnknownModel))
async def get_model(
    name: Annotated[str, Path(max_length=200, pattern=PRINTABLE)], _: KeyId, connection: Reading
) -> ModelDetails:
    """A network with its classes and the layers that a job can name."""
    try:
        model = await overview.model(connection, name)
    except UnknownName as error:
        raise UnknownModel(str(error)) from None
    layers = None if model.layers is None else [_layer(layer) for layer in model.layers]
    return ModelDetails(**_summary(model), class_names=model.classes, layers=layers)


@router.get("/usage", tags=["usage"])
async def get_usage(key_id: KeyId, connection: Reading, parts: Parts) -> Usage:
    """How much your key keeps, and how much it may."""
    kept = await usage.of(connection, key_id)
    return Usage(**kept._asdict(), total=kept.total, limit=parts.settings.max_key_bytes)


@router.get("/patch-sets")
async def list_patch_sets(_: KeyId, connection: Reading) -> PatchSets:
    """The patch sets that running workers have."""
    return PatchSets(patch_sets=[_shown(each) for each in await overview.patch_sets(connection)])


@router.get("/patch-sets/{name}", responses=responses(UnknownPatchSet))
async def get_patch_set(
    name: Annotated[str, Path(max_length=200, pattern=PRINTABLE)], _: KeyId, connection: Reading
) -> PatchSet:
    """A patch set by its name."""
    try:
        return _shown(await overview.patch_set(connection, name))
    except UnknownName as error:
        raise UnknownPatchSet(str(error)) from None


def _shown(found: overview.PatchSet) -> PatchSet:
    return PatchSet(**asdict(found), url=f"/v1/patch-sets/{quote(found.name)}")


def _summary(model: overview.Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "weights": model.weights,
        "input_shape": model.input_shape,
        "classes": model.class_count,
        "origin": model.origin,
        "ready": model.ready,
        "layers_known": model.layers_known,
        "url": f"/v1/models/{quote(model.name)}",
    }


def _layer(layer: Mapping[str, Any]) -> Layer:
    return Layer(**{field: layer.get(field) for field in Layer.model_fields})


class Health:
    """What probes and scrapes ask of the servers behind us, each question once at a time."""

    def __init__(self, parts: Services) -> None:
        self._parts = parts
        self.revision = Cached(lambda: self._read(overview.revision))
        self.workers = Cached(lambda: self._read(overview.workers))
        self.redis = Cached(self._ping)
        self.queue = Cached(lambda: self._read(overview.queue), max_age=3)
        # An index is read from end to end for it: a second, where a busy disk has millions.
        self.finished = Cached(lambda: self._read(overview.finished), max_age=15, stale=True)

    async def _read(self, ask: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        async with self._parts.reading.connect() as connection:
            return await ask(connection)

    async def _ping(self) -> bool:
        url = self._parts.settings.redis_url.get_secret_value()
        async with Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1) as redis:
            # A read-only replica answers a ping, but nobody can ring there.
            return bool(await redis.set("polycollide:ready", 1, ex=60))


def _health(request: Request, parts: Parts) -> Health:
    state = request.app.state
    if not hasattr(state, "health"):
        state.health = Health(parts)
    health: Health = state.health
    return health


Checked = Annotated[Health, Depends(_health)]


@root.get("/livez")
async def livez() -> Alive:
    """Whether this process answers; it asks nobody else."""
    return Alive()


@root.get("/readyz", responses={503: {"model": Readiness, "description": "Cannot take jobs"}})
async def readyz(health: Checked, response: Response) -> Readiness:
    """Whether jobs can be submitted, and what stands in the way; within two seconds."""
    revision, workers, redis = await asyncio.gather(
        health.revision.get(), health.workers.get(), health.redis.get()
    )
    if revision is None:
        migrated: Literal["ok", "behind", "newer", "unknown"] = "unknown"
    else:
        head, known = await asyncio.to_thread(_revisions)
        migrated = "ok" if revision == head else "behind" if revision in known else "newer"
    checks = Checks(
        database="unavailable" if revision is None else "ok",
        schema=migrated,
        redis="ok" if redis else "unavailable",
        workers=workers,
    )
    if migrated not in ("ok", "newer"):  # migrations expand first
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Readiness(status="unavailable", checks=checks)
    return Readiness(status="ok" if redis else "degraded", checks=checks)


@cache
def _revisions() -> tuple[str | None, frozenset[str]]:
    """The revision that this code was written for, and all that led there; "" is none."""
    scripts = ScriptDirectory(str(files("migrations")))
    known = {script.revision for script in scripts.walk_revisions()}
    return scripts.get_current_head(), frozenset(known | {""})


@root.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, health: Checked) -> Response:
    """Numbers for Prometheus; none of them tells of a key."""
    queue, finished = await asyncio.gather(health.queue.get(), health.finished.get())
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    content = encode(_Scrape(queue, finished))
    return Response(content, headers={"Content-Type": media_type})


class _Scrape(Collector):
    """One scrape: the process's own numbers, then the service's as the database has them."""

    def __init__(self, queue: overview.Queue | None, finished: Mapping[Status, int] | None) -> None:
        self._queue, self._finished = queue, finished

    def collect(self) -> Iterator[Metric]:
        yield from REGISTRY.collect()
        answers = self._queue is not None and self._finished is not None
        yield _gauge("database_up", "Whether the database answers.", float(answers))
        if self._queue is not None:
            yield from _of_queue(self._queue)
            jobs = GaugeMetricFamily("polycollide_jobs", "Jobs by status.", labels=["status"])
            live = {
                status: getattr(self._queue, status) for status in Status if status not in FINAL
            }
            for status, count in (live | dict(self._finished or {})).items():
                jobs.add_metric([status], count)
            yield jobs


def _of_queue(queue: overview.Queue) -> Iterator[Metric]:
    yield _gauge("queue_depth", "Jobs that wait.", queue.queued)
    yield _gauge("queue_age_seconds", "How long the oldest job has waited.", queue.age)
    yield _gauge("workers", "Workers heard of in the last seconds.", queue.workers)
    yield _gauge("steps_per_second", "Optimisation steps of all workers.", queue.steps_per_second)
    counted = {"claims": "Jobs that workers took.", "lease_losses": "Leases that ran out."}
    for name, meaning in counted.items():
        count = queue.counters.get(name, 0)
        yield CounterMetricFamily(f"polycollide_{name}", meaning, value=count)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"polycollide_{name}", meaning, value=value)
