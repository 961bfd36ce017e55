"""Specs by their hash: written once, presets applied, however many jobs ask for the same."""

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.spec import CollisionSpec
from store.blobs import digest

# A job's spec in any statement on `jobs`; what older code has submitted has it in the row.
SPEC = """COALESCE(jobs.spec,
    (SELECT specs.spec FROM specs WHERE specs.sha256 = jobs.spec_sha256))"""
# Bytes of it, without reading it.
SIZE = """COALESCE(pg_column_size(jobs.spec),
    (SELECT specs.size FROM specs WHERE specs.sha256 = jobs.spec_sha256))"""
# A result's own copy of its job's spec is left out where it is the same, and put back.
DETAILS = f"""CASE WHEN jsonb_typeof(metrics.details->'provenance') = 'object'
        AND metrics.details->'provenance'->'spec' IS NULL
    THEN jsonb_set(metrics.details, '{{provenance,spec}}', {SPEC}) ELSE metrics.details END"""
# As `blobs.put` does it, and for its reasons.
_PUT = text("""
    INSERT INTO specs (sha256, spec, size)
    SELECT sha256, CAST(spec AS jsonb), octet_length(spec)
    FROM unnest(CAST(:sha256 AS text[]), CAST(:spec AS text[])) AS new (sha256, spec)
    WHERE NOT EXISTS (
        SELECT 1 FROM specs WHERE specs.sha256 = new.sha256
        AND last_used_at > now() - interval '1 hour')
    ORDER BY sha256
    ON CONFLICT (sha256) DO UPDATE SET last_used_at = now()
""")


class Written(NamedTuple):
    """A spec in the store."""

    sha256: str
    size: int


async def put(connection: AsyncConnection, specs: Iterable[CollisionSpec]) -> list[Written]:
    """Stores specs, each once; their names there, in the same order."""
    written = [spec.model_dump_json() for spec in specs]
    unique = {digest(spec.encode()): spec for spec in written}
    await connection.execute(_PUT, {"sha256": list(unique), "spec": list(unique.values())})
    return [Written(digest(spec.encode()), len(spec.encode())) for spec in written]
