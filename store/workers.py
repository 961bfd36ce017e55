"""Workers and what they can serve. Functions take a connection and never commit."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from core.spec import SCHEMA_VERSION

# Whether a worker is there: each says how often it will be heard of.
FRESH = "heartbeat_at + fresh_for > clock_timestamp()"


def register(connection: Connection, worker_id: UUID, slot: str, device: str) -> None:
    """Enters a worker in its slot; its predecessor there is dead, so are its leases."""
    connection.execute(
        text("""
            UPDATE jobs SET lease_expires_at = '-infinity'
            WHERE status IN ('running', 'canceling')
            AND worker_id IN (SELECT id FROM workers WHERE slot = :slot)
        """),
        {"slot": slot},
    )
    for table in ("workers", "patch_sets", "refusals"):
        connection.execute(text(f"DELETE FROM {table} WHERE slot = :slot"), {"slot": slot})
    connection.execute(
        text("""
            INSERT INTO workers (id, slot, device, schema_version)
            VALUES (:id, :slot, :device, :version)
        """),
        {"id": worker_id, "slot": slot, "device": device, "version": SCHEMA_VERSION},
    )


def heartbeat(
    connection: Connection,
    worker_id: UUID,
    *,
    slot: str,
    device: str,
    steps_per_second: float,
    fresh_for: timedelta,
) -> bool:
    """Says that a worker lives; whether it is to drain. Enters it again where it was removed."""
    beat = text("""
        INSERT INTO workers (id, slot, device, steps_per_second, fresh_for, schema_version)
        VALUES (:id, :slot, :device, :steps_per_second, :fresh_for, :version)
        ON CONFLICT (id) DO UPDATE SET heartbeat_at = clock_timestamp(),
            fresh_for = excluded.fresh_for, steps_per_second = excluded.steps_per_second
        RETURNING draining
    """)
    worker = {"id": worker_id, "slot": slot, "device": device, "fresh_for": fresh_for}
    worker |= {"version": SCHEMA_VERSION}
    return bool(connection.scalar(beat, worker | {"steps_per_second": steps_per_second}))


def drain(connection: Connection, slot: str) -> None:
    """Tells the worker in a slot to hand back what it has."""
    connection.execute(
        text("UPDATE workers SET draining = true WHERE slot = :slot"), {"slot": slot}
    )


def leave(connection: Connection, slot: str) -> None:
    """Strikes a slot out that has ended in good order."""
    for table in ("workers", "models", "patch_sets", "refusals"):
        connection.execute(text(f"DELETE FROM {table} WHERE slot = :slot"), {"slot": slot})


def live(connection: Connection) -> int:
    """How many live workers take jobs."""
    alive = text(f"SELECT count(*) FROM workers WHERE NOT draining AND {FRESH}")
    return int(connection.scalar(alive) or 0)


def slots_of(connection: Connection, host: str) -> list[tuple[str, bool]]:
    """The slots `host:...`, and whether each was heard of lately."""
    slots = text(f"SELECT slot, {FRESH} FROM workers WHERE starts_with(slot, :host)")
    rows = connection.execute(slots, {"host": f"{host}:"})
    return [(str(slot), bool(fresh)) for slot, fresh in rows]


def report_models(connection: Connection, slot: str, models: Sequence[dict[str, Any]]) -> None:
    """Writes down what a slot serves: name, weights, input_shape, classes, origin, ready.

    Layers that are known stay, as long as the weights are the same.
    """
    connection.execute(
        text("DELETE FROM models WHERE slot = :slot AND name <> ALL(CAST(:names AS text[]))"),
        {"slot": slot, "names": [model["name"] for model in models]},
    )
    connection.execute(
        text("""
            INSERT INTO models (slot, name, weights, input_shape, classes, origin, ready)
            SELECT :slot, name, weights, input_shape, classes, origin, ready
            FROM jsonb_to_recordset(CAST(:models AS jsonb)) AS model (name text, weights text[],
                input_shape jsonb, classes jsonb, origin text, ready boolean)
            ON CONFLICT (slot, name) DO UPDATE SET reported_at = now(),
                layers = CASE WHEN models.weights = excluded.weights THEN models.layers END,
                weights = excluded.weights, input_shape = excluded.input_shape,
                classes = COALESCE(excluded.classes, models.classes),
                origin = excluded.origin, ready = excluded.ready
        """),
        {"slot": slot, "models": json.dumps(list(models))},
    )


def report_patch_sets(connection: Connection, slot: str, sets: Sequence[dict[str, Any]]) -> None:
    """Writes down which patch sets a slot has: all columns but `reported_at`.

    What is written down already is left alone, so this may be called again and again.
    """
    connection.execute(
        text("DELETE FROM patch_sets WHERE slot = :slot AND name <> ALL(CAST(:names AS text[]))"),
        {"slot": slot, "names": [each["name"] for each in sets]},
    )
    connection.execute(
        text("""
            INSERT INTO patch_sets AS known
                (slot, name, sha256, images, patches, size, stride, resize, index)
            SELECT :slot, name, sha256, images, patches, size, stride, resize, index
            FROM jsonb_to_recordset(CAST(:sets AS jsonb)) AS new (name text, sha256 text,
                images int, patches bigint, size int, stride int, resize int, index text)
            ON CONFLICT (slot, name) DO UPDATE SET reported_at = now(),
                sha256 = excluded.sha256, images = excluded.images, patches = excluded.patches,
                size = excluded.size, stride = excluded.stride, resize = excluded.resize,
                index = excluded.index
            WHERE (known.sha256, known.index) <> (excluded.sha256, excluded.index)
        """),
        {"slot": slot, "sets": json.dumps(list(sets))},
    )


def report_layers(
    connection: Connection,
    slot: str,
    model: str,
    classes: Sequence[str],
    layers: Sequence[dict[str, Any]],
) -> None:
    """Adds what only a loaded network tells."""
    connection.execute(
        text("""
            UPDATE models SET classes = CAST(:classes AS jsonb), layers = CAST(:layers AS jsonb)
            WHERE slot = :slot AND name = :model
        """),
        {
            "slot": slot,
            "model": model,
            "classes": json.dumps(list(classes)),
            "layers": json.dumps(list(layers)),
        },
    )
