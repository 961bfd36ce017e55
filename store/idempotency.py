"""What a client's `Idempotency-Key` has created: said twice, done once."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection


class Known(NamedTuple):
    """What the key stands for."""

    created_id: UUID
    body_sha256: str


_TAKE = text("""
    INSERT INTO idempotency_keys (key_id, value, body_sha256, created_id)
    VALUES (:key_id, :value, :body_sha256, :created_id) ON CONFLICT DO NOTHING
""")
# A statement of its own: only now does it see what the request it waited for has committed.
_KNOWN = text("""
    SELECT created_id, body_sha256, EXISTS (SELECT FROM jobs WHERE id = created_id)
        OR EXISTS (SELECT FROM batches WHERE id = created_id) AS still
    FROM idempotency_keys WHERE key_id = :key_id AND value = :value FOR UPDATE
""")
_RETAKE = text("""
    UPDATE idempotency_keys
    SET body_sha256 = :body_sha256, created_id = :created_id, created_at = now()
    WHERE key_id = :key_id AND value = :value
""")


async def take(
    connection: AsyncConnection,
    *,
    key_id: UUID,
    value: str,
    body_sha256: str,
    created_id: UUID,
) -> Known | None:
    """Reserves the key for `created_id`; or what it stands for already, and then create nothing.

    A request with the same key that is under way is waited for. A key whose job or batch was
    deleted is free again.
    """
    params = {"key_id": key_id, "value": value, "body_sha256": body_sha256}
    params["created_id"] = created_id
    if (await connection.execute(_TAKE, params)).rowcount:
        return None
    found = (await connection.execute(_KNOWN, params)).one_or_none()
    if found is not None and found.still:
        return Known(found.created_id, found.body_sha256)
    await connection.execute(_RETAKE if found is not None else _TAKE, params)
    return None
