"""Images that users gave: whose they are, and which may be used."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from store import blobs, removal


@dataclass(frozen=True)
class Picture:
    """An image that was checked, on its way into the store."""

    sha256: str
    name: str
    media_type: str
    width: int
    height: int
    content: bytes


class Stored(NamedTuple):
    """An image that is in the store: its short name, and its hash."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Image:
    """An image as a key sees it."""

    sha256: str
    name: str
    media_type: str
    size: int
    width: int
    height: int
    created_at: datetime


_PUT = text("""
    INSERT INTO images (key_id, sha256, name, width, height, inline)
    SELECT :key_id, new.*, :inline FROM unnest(
        CAST(:sha256 AS text[]), CAST(:name AS text[]), CAST(:width AS int[]),
        CAST(:height AS int[])
    ) AS new (sha256, name, width, height)
    ORDER BY sha256
    ON CONFLICT DO NOTHING RETURNING sha256
""")
_KEEP = text("""
    UPDATE images SET inline = false
    WHERE key_id = :key_id AND sha256 = ANY(CAST(:sha256 AS text[])) AND inline
""")
# Locked, so that who deletes them waits for the job that names them.
_NAMES = text("""
    SELECT sha256, name FROM images
    WHERE key_id = :key_id AND sha256 = ANY(CAST(:hashes AS text[]))
    ORDER BY sha256 FOR KEY SHARE
""")
_GET = text("""
    SELECT sha256, name, media_type, size, width, height, created_at
    FROM images JOIN blobs USING (sha256)
    WHERE key_id = :key_id AND sha256 = :sha256
""")
_READ = text("""
    SELECT name, media_type, bytes FROM images JOIN blobs USING (sha256)
    WHERE key_id = :key_id AND sha256 = :sha256
""")


async def put(
    connection: AsyncConnection, key_id: UUID, pictures: Iterable[Picture], *, inline: bool
) -> set[str]:
    """Stores images for a key; the hashes of those that it did not have.

    Those that come `inline` with a job go with the last job that uses them.
    """
    unique = {picture.sha256: picture for picture in pictures}
    if not unique:
        return set()
    await connection.execute(
        *blobs.put((picture.media_type, picture.content) for picture in unique.values())
    )
    columns: dict[str, Sequence[Any]] = {
        column: [getattr(picture, column) for picture in unique.values()]
        for column in ("sha256", "name", "width", "height")
    }
    new = await connection.execute(_PUT, {"key_id": key_id, "inline": inline, **columns})
    if not inline:
        await connection.execute(_KEEP, {"key_id": key_id, "sha256": list(unique)})
    return set(new.scalars())


async def names(connection: AsyncConnection, key_id: UUID, hashes: Iterable[str]) -> dict[str, str]:
    """The names of those of these images that the key may use."""
    wanted = list(set(hashes))
    if not wanted:
        return {}
    found = await connection.execute(_NAMES, {"key_id": key_id, "hashes": wanted})
    return {row.sha256: row.name for row in found}


async def get(connection: AsyncConnection, key_id: UUID, sha256: str) -> Image | None:
    """An image of this key, without its bytes."""
    row = (await connection.execute(_GET, {"key_id": key_id, "sha256": sha256})).mappings().first()
    return None if row is None else Image(**row)


async def delete(
    connection: AsyncConnection, key_id: UUID, sha256: str, keep: timedelta
) -> bool | None:
    """Deletes an image of this key; False where its jobs use it, None where there is none."""
    return await connection.run_sync(removal.delete_image, key_id, sha256, keep)


async def read(
    connection: AsyncConnection, key_id: UUID, sha256: str
) -> tuple[str, str, bytes] | None:
    """Name, media type and bytes of an image of this key."""
    row = (await connection.execute(_READ, {"key_id": key_id, "sha256": sha256})).first()
    return None if row is None else (row.name, row.media_type, bytes(row.bytes))
