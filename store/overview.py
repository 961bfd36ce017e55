"""How the service stands: what waits, what runs, who works, what workers can serve.

Functions take a connection and never commit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from store.lifecycle import FINAL, Status

# A worker that was not heard of for so long is taken for gone.
FRESH = "heartbeat_at > clock_timestamp() - interval '10 seconds'"


@dataclass(frozen=True, slots=True)
class Model:
    """A network that some live worker serves. `layers` is None until one has looked."""

    name: str
    weights: list[str]
    input_shape: list[int]
    classes: list[str] | None
    origin: str
    ready: bool
    layers: list[dict[str, Any]] | None
    reported_at: datetime


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


_MODELS = text(f"""
    SELECT name, weights, input_shape, classes, origin, ready, layers, reported_at FROM models
    WHERE slot IN (SELECT slot FROM workers WHERE NOT draining AND {FRESH})
    ORDER BY name, reported_at DESC
""")


async def models(connection: AsyncConnection) -> list[Model]:
    """What live workers serve, by name; the latest report wins, and one that is ready is enough."""
    reports: dict[str, list[RowMapping]] = {}
    for report in (await connection.execute(_MODELS)).mappings():
        reports.setdefault(report["name"], []).append(report)
    return [_merged(of_model) for of_model in reports.values()]


def _merged(reports: Sequence[RowMapping]) -> Model:
    latest = reports[0]
    same = [report for report in reports if report["weights"] == latest["weights"]]
    return Model(
        **latest
        | {
            "ready": any(report["ready"] for report in reports),
            "classes": next((r["classes"] for r in same if r["classes"] is not None), None),
            "layers": next((r["layers"] for r in same if r["layers"] is not None), None),
        }
    )


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


async def revision(connection: AsyncConnection) -> str | None:
    """Where the schema stands: Alembic's revision, None in a database that was never migrated."""
    if await connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    found: str | None = await connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found
