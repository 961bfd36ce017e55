"""The sweeper, and that leases do not wait for anybody's counting."""

import itertools
import threading
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text

from store import blobs, queue, retention
from store.database import connect
from store.queue import Claimed
from store.settings import Settings
from worker.heartbeat import Heartbeat
from worker.sweeper import Sweeper

from .test_writer import claimed, engine, settings

__all__ = ["claimed", "engine", "settings"]


@pytest.fixture
def old(engine: Engine) -> int:
    """Seven blobs that nobody has needed for long."""
    with engine.begin() as connection:
        connection.execute(*blobs.put([("image/png", bytes([i])) for i in range(7)]))
        connection.execute(text("UPDATE blobs SET last_used_at = now() - interval '3 days'"))
    return 7


def test_a_sweep_is_of_short_passes_and_one_sweeper_is_at_it(
    engine: Engine, settings: Settings, old: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LIMIT", 3)
    own = Sweeper(engine, settings)

    def left() -> int:
        with engine.begin() as connection:
            return int(connection.scalar(text("SELECT count(*) FROM blobs")) or 0)

    with engine.begin() as connection:
        assert retention.lock_sweeping(connection)
        assert not own.turn()
    seen = [left()]
    while own.turn():
        seen.append(left())
    assert seen[0] == old and seen[-1] == 0
    assert max(a - b for a, b in itertools.pairwise(seen)) == 3
    assert not own.turn()  # for ten minutes


def test_leases_are_renewed_while_others_count(
    engine: Engine, settings: Settings, claimed: Claimed
) -> None:
    beat = Heartbeat(engine, settings, uuid4(), "slot", "cpu")
    beat.hold(claimed.lease)
    expiry = text("SELECT lease_expires_at FROM jobs")
    database = connect(settings)
    with engine.begin() as other:
        queue.count(other, "claims", 1)  # and holds the row
        with database.begin() as connection:
            before = connection.scalar(expiry)
        beating = threading.Thread(target=beat._beat)
        beating.start()
        end = threading.Event()
        for _ in range(200):
            with database.begin() as connection:
                renewed = connection.scalar(expiry) > before
            if renewed or end.wait(0.05):
                break
        assert renewed and beating.is_alive()
    beating.join()
    with database.begin() as connection:
        assert connection.scalar(text("SELECT value FROM counters WHERE name = 'claims'")) == 2
    database.dispose()
    beat._beat()
    with engine.begin() as connection:
        assert connection.scalar(text("SELECT value FROM counters WHERE name = 'claims'")) == 2
