"""What goes when jobs, batches or images are deleted, and when: their rows at once, with the images
that came with them; the bytes that nobody else uses within the next hours.

A blob may be part of somebody's open transaction, who found it there and takes it for safe for an
hour (`blobs.put`). So it becomes due in an hour, and the sweep takes it unless it has a use again.
Functions take a connection and never commit.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from store.blobs import UNREFERENCED

_USED = """EXISTS (
        SELECT FROM jobs WHERE source_sha256 = images.sha256 AND key_id = images.key_id
    ) OR EXISTS (
        SELECT FROM jobs WHERE target_sha256 = images.sha256 AND key_id = images.key_id)"""
_NAMED = text("""
    WITH mine AS (SELECT * FROM jobs WHERE id = ANY(CAST(:ids AS uuid[])))
    SELECT key_id, source_sha256 FROM mine UNION SELECT key_id, target_sha256 FROM mine
""")
_FILES = text("""
    SELECT png_sha256 FROM corners WHERE job_id = ANY(CAST(:ids AS uuid[]))
    UNION SELECT sha256 FROM artifacts WHERE job_id = ANY(CAST(:ids AS uuid[]))
    UNION SELECT checkpoint_sha256 FROM jobs
    WHERE id = ANY(CAST(:ids AS uuid[])) AND checkpoint_sha256 IS NOT NULL
""")
_DELETE = text("DELETE FROM jobs WHERE id = ANY(CAST(:ids AS uuid[]))")
_MINE = """(key_id, sha256) IN (
    SELECT * FROM unnest(CAST(:keys AS uuid[]), CAST(:hashes AS text[])))"""
# First the lock, which a submission that names the image has to wait for or is waited for; then,
# in a statement of its own, a look at what jobs there are by now.
_LOCK = f"""
    SELECT key_id, sha256 FROM images WHERE {{which}} AND NOT ({_USED})
    ORDER BY key_id, sha256 {{limit}} FOR UPDATE {{skip}}
"""
_LOCK_INLINE = text(_LOCK.format(which=f"inline AND {_MINE}", limit="", skip=""))
_LOCK_OLD = text(
    _LOCK.format(
        which="created_at < clock_timestamp() - :keep", limit="LIMIT :limit", skip="SKIP LOCKED"
    )
)
_LOCK_ONE = text("""
    SELECT key_id, sha256 FROM images WHERE key_id = :key_id AND sha256 = :sha256 FOR UPDATE
""")
_FORGET = text(f"DELETE FROM images WHERE {_MINE} AND NOT ({_USED}) RETURNING sha256")
_EXPIRE = text(f"""
    UPDATE blobs SET last_used_at = due.at FROM (
        SELECT sha256, clock_timestamp() - :keep + interval '1 hour' AS at FROM blobs
        WHERE sha256 = ANY(CAST(:hashes AS text[])) AND {UNREFERENCED}
        ORDER BY sha256 FOR UPDATE
    ) AS due
    WHERE blobs.sha256 = due.sha256 AND last_used_at > due.at
""")


def delete_jobs(connection: Connection, ids: Sequence[UUID], keep: timedelta) -> None:
    """Deletes jobs, which are locked and have ended, with all that is theirs alone.

    `keep` is how long blobs stay that nobody refers to.
    """
    named = connection.execute(_NAMED, {"ids": list(ids)}).all()
    files = connection.scalars(_FILES, {"ids": list(ids)}).all()
    connection.execute(_DELETE, {"ids": list(ids)})
    pairs = {"keys": [key for key, _ in named], "hashes": [sha256 for _, sha256 in named]}
    _forget(connection, connection.execute(_LOCK_INLINE, pairs).all())
    _expire(connection, [*files, *pairs["hashes"]], keep)


def delete_image(connection: Connection, key_id: UUID, sha256: str, keep: timedelta) -> bool | None:
    """Deletes an image of a key; False where jobs of the key use it, None where there is none."""
    found = connection.execute(_LOCK_ONE, {"key_id": key_id, "sha256": sha256}).all()
    if not found:
        return None
    gone = _forget(connection, found)
    _expire(connection, gone, keep)
    return bool(gone)


def delete_old_images(connection: Connection, age: timedelta, limit: int, keep: timedelta) -> int:
    """Deletes images of such an age that no job of their keys uses; how many."""
    found = connection.execute(_LOCK_OLD, {"keep": age, "limit": limit}).all()
    gone = _forget(connection, found)
    _expire(connection, gone, keep)
    return len(gone)


def _forget(connection: Connection, found: Iterable[Sequence[object]]) -> list[str]:
    keys, hashes = zip(*found, strict=True) if found else ((), ())
    gone = connection.scalars(_FORGET, {"keys": list(keys), "hashes": list(hashes)})
    return list(gone)


def _expire(connection: Connection, hashes: Iterable[str], keep: timedelta) -> None:
    connection.execute(_EXPIRE, {"hashes": sorted(set(hashes)), "keep": keep})
