"""The doorbell: one message a ring where Redis is there, and no harm where it is not."""

import asyncio
import json
import time

from pydantic import SecretStr
from redis import Redis

from api.doorbell import Doorbell
from polycollide import stack
from store.settings import DRAIN_TASK, QUEUE, Settings


def test_a_ring_is_a_message_that_a_worker_understands(redis: stack.Redis) -> None:
    settings = Settings(mode="local", redis_url=SecretStr(redis.url))
    with Redis.from_url(redis.url) as server:
        server.flushdb()

        async def ring() -> None:
            doorbell = Doorbell(settings)
            await doorbell.ring(3)
            await doorbell.close()

        asyncio.run(ring())
        messages = [json.loads(message) for message in server.lrange(QUEUE, 0, -1)]
    assert len(messages) == 3
    assert {message["headers"]["task"] for message in messages} == {DRAIN_TASK}
    # No clock decides whether a worker hears it.
    assert not any(message["headers"]["expires"] for message in messages)
    assert all(message["headers"]["ignore_result"] for message in messages)


def test_rings_that_come_together_become_few(redis: stack.Redis) -> None:
    settings = Settings(mode="local", redis_url=SecretStr(redis.url))
    with Redis.from_url(redis.url) as server:
        server.flushdb()

        async def ring() -> None:
            doorbell = Doorbell(settings)
            for _ in range(1000):
                await doorbell.ring()
            await doorbell.close()

        asyncio.run(ring())
        assert 1 <= server.llen(QUEUE) <= 3


def test_a_dead_or_deaf_redis_delays_nobody() -> None:
    async def ring(url: str) -> float:
        doorbell = Doorbell(Settings(mode="local", redis_url=SecretStr(url)))
        began = time.monotonic()
        for _ in range(100):
            await doorbell.ring()
        took = time.monotonic() - began
        await doorbell.close()
        assert time.monotonic() - began < 60
        return took

    async def deaf() -> float:
        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await ring(f"redis://127.0.0.1:{port}/0")

    # One that waited for its bell would take 2 s of each of a hundred.
    assert asyncio.run(ring("redis://127.0.0.1:1/0")) < 10
    assert asyncio.run(deaf()) < 10
