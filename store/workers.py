"""Workers and what they can serve. Functions take a connection and never commit."""

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text


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
    connection.execute(text("DELETE FROM workers WHERE slot = :slot"), {"slot": slot})
    connection.execute(
        text("INSERT INTO workers (id, slot, device) VALUES (:id, :slot, :device)"),
        {"id": worker_id, "slot": slot, "device": device},
    )


def heartbeat(
    connection: Connection, worker_id: UUID, *, slot: str, device: str, steps_per_second: float
) -> bool:
    """Says that a worker lives; whether it is to drain. Enters it again where it was removed."""
    beat = text("""
        INSERT INTO workers (id, slot, device, steps_per_second)
        VALUES (:id, :slot, :device, :steps_per_second)
        ON CONFLICT (id) DO UPDATE SET heartbeat_at = clock_timestamp(),
            steps_per_second = excluded.steps_per_second
        RETURNING draining
    """)
    worker = {"id": worker_id, "slot": slot, "device": device}
    return bool(connection.scalar(beat, worker | {"steps_per_second": steps_per_second}))


def drain(connection: Connection, slot: str) -> None:
    """Tells the worker in a slot to hand back what it has."""
    connection.execute(
        text("UPDATE workers SET draining = true WHERE slot = :slot"), {"slot": slot}
    )


def leave(connection: Connection, slot: str) -> None:
    """Strikes a slot out that has ended in good order."""
    connection.execute(text("DELETE FROM workers WHERE slot = :slot"), {"slot": slot})
    connection.execute(text("DELETE FROM models WHERE slot = :slot"), {"slot": slot})


def live(connection: Connection, within: float = 10.0) -> int:
    """How many workers were heard of in the last seconds."""
    alive = text("""
        SELECT count(*) FROM workers WHERE NOT draining
        AND heartbeat_at > clock_timestamp() - make_interval(secs => :within)
    """)
    return int(connection.scalar(alive, {"within": within}) or 0)


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
