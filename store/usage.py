"""How many bytes a key keeps. Functions take a connection."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection


class Usage(NamedTuple):
    """Bytes: of images, of specs and what was refused, of results (at most, until they are there).

    What several keys have is counted for each of them.
    """

    images: int
    specs: int
    results: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


_COUNTS = """
    (SELECT COALESCE(sum(size), 0) FROM images JOIN blobs USING (sha256)
        WHERE images.key_id = {key})::bigint AS images,
    (COALESCE(job.specs, 0) + (
        SELECT COALESCE(sum(bytes), 0) FROM batches WHERE batches.key_id = {key}))::bigint AS specs,
    COALESCE(job.results, 0)::bigint AS results"""
_JOBS = """(
    SELECT sum(spec_bytes) AS specs, sum(file_bytes) AS results FROM jobs
    WHERE jobs.key_id = {key}) AS job"""
_OF = text(f"SELECT {_COUNTS} FROM {_JOBS}".format(key=":key_id"))
_BY_KEY = text(f"SELECT id, {_COUNTS} FROM api_keys, LATERAL {_JOBS}".format(key="api_keys.id"))


async def of(connection: AsyncConnection, key_id: UUID) -> Usage:
    """What a key keeps."""
    return Usage(*(await connection.execute(_OF, {"key_id": key_id})).one())


def by_key(connection: Connection) -> dict[UUID, Usage]:
    """What each key keeps."""
    return {row[0]: Usage(*row[1:]) for row in connection.execute(_BY_KEY)}
