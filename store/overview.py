"""How the service stands: what waits, what runs, who works, what workers can serve.

Functions take a connection and never commit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import UnknownName
from store.lifecycle import FINAL, Status
from store.workers import FRESH


@dataclass(frozen=True, slots=True)
class Model:
    """A network that some live worker serves.

    `classes` and `layers` are only read for one model by name; layers are unknown until a worker
    has opened the network.
    """

    name: str
    weights: list[str]
    input_shape: list[int]
    class_count: int | None
    origin: str
    ready: bool
    layers_known: bool
    classes: list[str] | None
    layers: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class PatchSet:
    """A patch set that live workers have.

    Where they have different ones under this name (`differs`) it is the one reported last, and
    `workers` counts those that have this very one.
    """

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


@dataclass(frozen=True, slots=True)
class Queue:
    """What is under way. `age` is that of the job that waits longest, in seconds."""

    queued: int
    age: float
    running: int
    canceling: int
    workers: int
    steps_per_second: float
    counters: Mapping[str, int]


LIVE = f"slot IN (SELECT slot FROM workers WHERE NOT draining AND {FRESH})"
# Without a name the long columns stay where they are: a thousand classes a network are 30 KB.
_MODELS = text(f"""
    SELECT name, weights, input_shape, jsonb_array_length(classes) AS class_count, origin, ready,
        layers IS NOT NULL AS layers_known,
        CASE WHEN CAST(:name AS text) IS NOT NULL THEN classes END AS classes,
        CASE WHEN CAST(:name AS text) IS NOT NULL THEN layers END AS layers
    FROM models WHERE {LIVE} AND (CAST(:name AS text) IS NULL OR name = :name)
    ORDER BY name, reported_at DESC
""")
_NAMES = text(f"SELECT DISTINCT name FROM models WHERE {LIVE}")


async def models(connection: AsyncConnection) -> list[Model]:
    """What live workers serve, by name; the latest report wins, and one that is ready is enough."""
    reports = (await connection.execute(_MODELS, {"name": None})).mappings()
    return [_merged(list(of_one)) for _, of_one in groupby(reports, lambda row: row["name"])]


async def model(connection: AsyncConnection, name: str) -> Model:
    """A model with its classes and layers. Raises UnknownName unless a live worker serves it."""
    reports = (await connection.execute(_MODELS, {"name": name})).mappings().all()
    if not reports:
        raise UnknownName("model", name, (await connection.execute(_NAMES)).scalars())
    return _merged(reports)


def _merged(reports: Sequence[RowMapping]) -> Model:
    """One model of what several slots report, the latest first.

    What only a loaded network tells comes from whichever has loaded the same weights.
    """
    latest = dict(reports[0])
    same = [report for report in reports if report["weights"] == latest["weights"]]
    for column in ("class_count", "classes", "layers"):
        latest[column] = next((r[column] for r in same if r[column] is not None), None)
    latest["layers_known"] = any(report["layers_known"] for report in same)
    latest["ready"] = any(report["ready"] for report in reports)
    return Model(**latest)


_PATCH_SETS = text(f"""
    SELECT DISTINCT ON (name) name, sha256, images, patches, size, stride, resize, index,
        count(*) OVER (PARTITION BY name, sha256) AS workers,
        min(sha256) OVER (PARTITION BY name) <> max(sha256) OVER (PARTITION BY name) AS differs
    FROM patch_sets WHERE {LIVE} AND (CAST(:name AS text) IS NULL OR name = :name)
    ORDER BY name, reported_at DESC
""")
_PATCH_SET_NAMES = text(f"SELECT DISTINCT name FROM patch_sets WHERE {LIVE}")


async def patch_sets(connection: AsyncConnection) -> list[PatchSet]:
    """What live workers have, by name."""
    found = (await connection.execute(_PATCH_SETS, {"name": None})).mappings()
    return [PatchSet(**row) for row in found]


async def patch_set(connection: AsyncConnection, name: str) -> PatchSet:
    """One of them. Raises UnknownName unless a live worker has it."""
    found = (await connection.execute(_PATCH_SETS, {"name": name})).mappings().one_or_none()
    if found is None:
        known = (await connection.execute(_PATCH_SET_NAMES)).scalars()
        raise UnknownName("patch set", name, known)
    return PatchSet(**found)


# By the partial indexes of what waits and what is leased: finished jobs are not touched.
_QUEUE = text(f"""
    SELECT waiting.*, leased.*, worker.*,
        COALESCE((SELECT jsonb_object_agg(name, value) FROM counters), '{{}}') AS counters
    FROM (
        SELECT count(*) AS queued, COALESCE(GREATEST(0,
            extract(epoch FROM clock_timestamp() - min(queued_at))), 0)::float8 AS age
        FROM jobs WHERE status = 'queued'
    ) AS waiting, (
        SELECT count(*) FILTER (WHERE status = 'running') AS running,
            count(*) FILTER (WHERE status = 'canceling') AS canceling
        FROM jobs WHERE status IN ('canceling', 'running')
    ) AS leased, (
        SELECT count(*) AS workers,
            COALESCE(sum(steps_per_second), 0)::float8 AS steps_per_second
        FROM workers WHERE {FRESH}
    ) AS worker
""")
# Reads an index from end to end: 0.1 s for a million jobs, so ask seldom.
_FINISHED = text(f"""
    SELECT status, count(*) FROM jobs
    WHERE status IN ({", ".join(f"'{status}'" for status in sorted(FINAL))}) GROUP BY status
""")


async def queue(connection: AsyncConnection) -> Queue:
    """What is under way; cheap however many jobs have finished."""
    return Queue(**(await connection.execute(_QUEUE)).mappings().one())


async def finished(connection: AsyncConnection) -> dict[Status, int]:
    """How many jobs ended in each final status."""
    counts = dict.fromkeys(sorted(FINAL), 0)
    for status, count in await connection.execute(_FINISHED):
        counts[Status(status)] = count
    return counts


async def workers(connection: AsyncConnection) -> int:
    """How many live workers take jobs."""
    live = text(f"SELECT count(*) FROM workers WHERE NOT draining AND {FRESH}")
    return int(await connection.scalar(live) or 0)


async def revision(connection: AsyncConnection) -> str:
    """Where the schema stands: Alembic's revision, empty in a database without any."""
    if await connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return ""
    return await connection.scalar(text("SELECT version_num FROM alembic_version")) or ""
