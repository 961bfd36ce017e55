"""A database of each test's own, and a result as a worker brings it."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, make_url

CORNER = {
    "index": 0,
    "converged": True,
    "label": 1,
    "probability": 0.5,
    "l_pos": 1.0,
    "violation": 0.0,
    "relative_residual": 0.1,
    "distance_to_source": 1.0,
    "distance_to_target": 2.0,
}
# A patch set as a worker reports it.
PHOTOS = {
    "name": "photos",
    "sha256": "a" * 64,
    "images": 6,
    "patches": 1014,
    "size": 16,
    "stride": 4,
    "resize": 64,
    "index": "exact",
}


def result(*corners: dict[str, Any]) -> dict[str, Any]:
    """What `queue.succeed` reads of a result."""
    return {
        "converged": True,
        "steps": 10,
        "seconds": 0.1,
        "polytope": {"spread": 0.1},
        "interpolation": None,
        "corners": list(corners),
    }


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    own = create_engine(make_url(database).set(drivername="postgresql+psycopg"))
    yield own
    own.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as own:
        yield own
