"""Bytes by their hash: how to store many at once, from either kind of connection."""

import hashlib
from collections.abc import Iterable
from typing import Any

from sqlalchemy import TextClause, text

PNG, NPZ, SAFETENSORS = "image/png", "application/zip", "application/octet-stream"

# In order of hashes, so that two writers of the same blobs wait for each other but never in a
# circle. Storing again renews `last_used_at`, which keeps the sweep of unreferenced blobs away; a
# blob of the last hour is safe as it is, and popular samples are not waited for.
_PUT = text("""
    INSERT INTO blobs (sha256, media_type, size, bytes)
    SELECT sha256, media_type, length(bytes), bytes
    FROM unnest(
        CAST(:sha256 AS text[]), CAST(:media_type AS text[]), CAST(:bytes AS bytea[])
    ) AS new (sha256, media_type, bytes)
    WHERE NOT EXISTS (
        SELECT 1 FROM blobs WHERE blobs.sha256 = new.sha256
        AND last_used_at > now() - interval '1 hour')
    ORDER BY sha256
    ON CONFLICT (sha256) DO UPDATE SET last_used_at = now()
""")

# Of a row of `blobs`: nobody needs it. Each condition has an index.
UNREFERENCED = """
    NOT EXISTS (SELECT FROM images WHERE images.sha256 = blobs.sha256)
    AND NOT EXISTS (SELECT FROM jobs WHERE source_sha256 = blobs.sha256)
    AND NOT EXISTS (SELECT FROM jobs WHERE target_sha256 = blobs.sha256)
    AND NOT EXISTS (SELECT FROM jobs WHERE checkpoint_sha256 = blobs.sha256)
    AND NOT EXISTS (SELECT FROM corners WHERE png_sha256 = blobs.sha256)
    AND NOT EXISTS (SELECT FROM artifacts WHERE artifacts.sha256 = blobs.sha256)"""


def digest(content: bytes) -> str:
    """A blob's name: SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def put(blobs: Iterable[tuple[str, bytes]]) -> tuple[TextClause, dict[str, Any]]:
    """A statement and its parameters that store (media type, bytes), each once."""
    unique = {digest(content): (media_type, content) for media_type, content in blobs}
    columns = {
        "sha256": list(unique),
        "media_type": [media_type for media_type, _ in unique.values()],
        "bytes": [content for _, content in unique.values()],
    }
    return _PUT, columns
