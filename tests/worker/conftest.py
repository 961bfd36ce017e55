"""Services of real processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from service import Service

from polycollide import stack


@pytest.fixture
def service(
    new_database: Callable[[], str], redis: stack.Redis, tmp_path: Path
) -> Iterator[Service]:
    """No process yet; leases are short, so that what vanishes is soon missed."""
    import redis as client

    client.Redis.from_url(redis.url).flushall()
    made = Service(
        new_database(),
        redis.url,
        tmp_path,
        lease="PT3S",
        heartbeat="PT0.3S",
        reconcile_every="PT0.5S",
    )
    yield made
    made.stop()
