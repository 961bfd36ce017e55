"""What nobody else looks after: expired leases, unheard bells, jobs whose patch set is gone.

Run as `python -m worker.reconciler`. Any number may run: an advisory lock lets one act at a time.
"""

import math
import signal
import threading
import time
from contextlib import suppress

import redis
import structlog
from kombu.exceptions import OperationalError
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from store import queue, workers
from store.database import connect
from store.logs import configure
from store.settings import QUEUE, Settings, settings
from worker.app import drain

log = structlog.get_logger(__name__)


class Reconciler:
    """`turn` after `turn`, each in a transaction under the lock."""

    def __init__(self, database: Engine, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._redis = redis.Redis.from_url(
            settings.redis_url.get_secret_value(), socket_timeout=2, socket_connect_timeout=2
        )
        self._doubted = -math.inf

    def turn(self) -> None:
        """Does what is due; nothing while another reconciler is at it.

        Raises:
            SQLAlchemyError: the store is away.
            redis.RedisError, OperationalError (kombu's): the broker is.
        """
        with self._database.begin() as connection:
            if not queue.lock_reconciling(connection):
                return
            lease = self._settings.lease
            if self._trusts_leases() and (
                expired := queue.expire(connection, self._settings.max_crashes, lease)
            ):
                log.warning("leases ran out", jobs=expired)
            waiting, listeners = queue.kinds(connection), workers.live(connection)
            if stranded := queue.strand(connection, waiting, self._settings.patch_set_grace):
                log.warning("patch sets are gone for which jobs waited", jobs=stranded)
        if waiting:
            for _ in range(listeners - self._redis.llen(QUEUE)):
                drain.apply_async(retry=False)

    def doubt_leases(self) -> None:
        """The store was away: others who could not reach it get time to renew theirs."""
        self._doubted = time.monotonic()

    def _trusts_leases(self) -> bool:
        return time.monotonic() - self._doubted > self._settings.lease.total_seconds()


def main() -> None:
    """Turns until it is told to end."""
    configure(settings().mode)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    reconciler = Reconciler(connect(settings()), settings())
    while not ended.wait(settings().reconcile_every.total_seconds()):
        try:
            reconciler.turn()
        except (SQLAlchemyError, redis.RedisError, OperationalError) as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                reconciler.doubt_leases()
            log.warning("a turn failed", error=str(error).splitlines()[0])
        if pulse := settings().pulse_file:
            with suppress(OSError):  # who checks it will notice; jobs should not
                pulse.touch()


if __name__ == "__main__":
    main()
