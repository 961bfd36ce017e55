"""How many bytes a key keeps, counted now and then, and what would be too many."""

import asyncio
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from api.errors import QuotaExceeded
from store import usage

# Seconds that a count is good for: one reads an index entry for each of a key's jobs.
MAX_AGE = 10.0
# Keys whose counts are remembered.
MAX_KEYS = 10_000


class Quota:
    """What each key keeps, as far as this process knows: its last count, and what came since."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[UUID, tuple[int, float]] = {}  # bytes, and until when

    async def take(self, connection: AsyncConnection, key_id: UUID, more: int) -> None:
        """Adds what a key is about to store. Raises QuotaExceeded, after counting afresh."""
        now = asyncio.get_running_loop().time()
        kept, until = self._known.get(key_id, (0, 0.0))
        if now > until or kept + more > self._limit:
            kept, until = (await usage.of(connection, key_id)).total, now + MAX_AGE
            if kept + more > self._limit:
                raise QuotaExceeded(
                    f"Your key keeps {_told(kept)}, results to come included, and this would add "
                    f"{_told(more)}; it may keep {_told(self._limit)}. Delete jobs, batches or "
                    "images first, or send fewer."
                )
        if len(self._known) >= MAX_KEYS:
            self._known.clear()
        self._known[key_id] = kept + more, until


def _told(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
