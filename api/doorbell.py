"""Rings workers through Redis when jobs wait. A ring may be late or lost: it never carries a job.

One ring is on its way at most; those that come meanwhile become one.
"""

import asyncio

import redis
import structlog
from celery import Celery

from store.settings import DRAIN_TASK, QUEUE, Settings

_log = structlog.get_logger(__name__)

# Rings that nobody hears do not pile up. They are bounded by number, not by an age at which they
# expire, since the clocks of two machines may disagree.
UNHEARD = 64


class Doorbell:
    """Of one process."""

    def __init__(self, settings: Settings) -> None:
        url = settings.redis_url.get_secret_value()
        self._celery = Celery("polycollide", broker=url)
        # Where Redis hangs, a ring gives up before the next one matters.
        patience = {"socket_timeout": 2, "socket_connect_timeout": 2}
        self._redis = redis.Redis.from_url(url, **patience)
        self._celery.conf.update(
            task_ignore_result=True,
            task_serializer="json",
            task_default_queue=QUEUE,
            broker_connection_timeout=2,
            broker_transport_options=patience | {"max_retries": 0},
        )
        self._wanted = 0
        self._ringing: asyncio.Task[None] | None = None

    async def ring(self, times: int = 1) -> None:
        """Rings soon, and returns at once."""
        self._wanted = max(self._wanted, times)
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.create_task(self._ring())

    async def close(self) -> None:
        """Waits for the ring that is on its way."""
        if self._ringing is not None:
            await self._ringing
        await asyncio.to_thread(self._celery.close)
        self._redis.close()

    async def _ring(self) -> None:
        while self._wanted:
            times, self._wanted = self._wanted, 0
            try:
                await asyncio.to_thread(self._send, times)
            except Exception as error:  # whatever Redis or its client has: jobs wait in Postgres
                _log.warning("doorbell failed", error=repr(error))
            # In a storm of submissions most of the rings would only cost time: 1 ms each.
            await asyncio.sleep(0.02)

    def _send(self, times: int) -> None:
        for _ in range(min(times, UNHEARD - self._redis.llen(QUEUE))):
            self._celery.send_task(DRAIN_TASK, ignore_result=True, retry=False)
