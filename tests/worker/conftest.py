"""Services of real processes, one for each module: they take seconds to start."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from service import Service

from polycollide import stack

# News travels fast. Leases do not run out on a busy machine: `Service.run_out` ends them.
QUICK = {"lease": "PT10M", "heartbeat": "PT0.3S", "reconcile_every": "PT0.5S"}


@pytest.fixture(scope="module")
def whole(new_database: Callable[[], str], redis: stack.Redis) -> Iterator[Service]:
    """API and reconciler; workers are the module's."""
    import redis as client

    client.Redis.from_url(redis.url).flushall()
    with tempfile.TemporaryDirectory() as folder:
        made = Service(new_database(), redis.url, Path(folder), **QUICK)
        try:
            made.start_api()
            made.start_reconciler()
            yield made
        finally:
            made.stop()
