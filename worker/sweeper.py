"""Deletes what retention lets go, in a process of its own: leases do not wait for it.

Run as `python -m worker.sweeper`. Any number may run: an advisory lock lets one act at a time.
"""

import math
import signal
import threading
import time
from contextlib import suppress

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from store import retention
from store.database import connect
from store.logs import configure
from store.settings import Settings, settings

log = structlog.get_logger(__name__)

EVERY = 600.0  # seconds from one sweep to the next
TURN = 2.0  # between two looks at the clock


class Sweeper:
    """`turn` after `turn`, each a pass in a transaction of its own, until a sweep is through."""

    def __init__(self, database: Engine, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._ended = -math.inf
        self._left: list[tuple[str, retention.Place]] = []
        self._begun = False

    def turn(self) -> bool:
        """A pass, if one is due and no other sweeper is at it; whether there is more to do."""
        if not self._begun and time.monotonic() - self._ended < EVERY:
            return False
        with self._database.begin() as connection:
            if not retention.lock_sweeping(connection):
                return False
            if not self._begun:
                deleted = retention.sweep(connection, self._settings)
                full = [
                    setting
                    for setting, rows in deleted.items()
                    if rows >= (retention.JOBS if setting == "keep_jobs" else retention.LIMIT)
                ]
                if not full:
                    self._begun = True
                    self._left = [(table, retention.Place()) for table in retention.WALKED]
            else:
                table, place = self._left.pop()
                rows, further = retention.walk(connection, table, self._settings, place)
                deleted = {table: rows}
                if further:
                    self._left.append((table, further))
        if any(deleted.values()):
            log.info("swept", **deleted)
        if self._begun and not self._left:
            self._begun, self._ended = False, time.monotonic()
        return self._begun or time.monotonic() - self._ended >= EVERY


def main() -> None:
    """Turns until it is told to end."""
    configure(settings().mode)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    sweeper = Sweeper(connect(settings()), settings())
    more = False
    while not ended.wait(0 if more else TURN):
        try:
            more = sweeper.turn()
        except SQLAlchemyError as error:
            more = False
            log.warning("a pass failed", error=str(error).splitlines()[0])
        if pulse := settings().pulse_file:
            with suppress(OSError):  # who checks it will notice; jobs should not
                pulse.touch()


if __name__ == "__main__":
    main()
