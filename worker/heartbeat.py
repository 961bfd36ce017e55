"""The thread that vouches for a worker's jobs, as long as they get somewhere.

It renews the leases of all jobs that its worker holds while steps or chunks of measurement follow
each other; a step that hangs keeps the thread alive but not the leases, and in the end the process
is killed, so that its pool starts a fresh one. It carries news both ways: progress to the store,
cancellations and the order to drain from it.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from store import queue, workers
from store.lifecycle import Status
from store.queue import Lease
from store.settings import Settings

log = structlog.get_logger(__name__)


class Heartbeat(threading.Thread):
    """Shared with the worker's loop: what it holds and reports, and what it is to hear.

    The loop calls `alive` after every step; `hold` and `drop` as jobs come and go. It reads
    `canceled`, `kept` (to end with what they have) and `lost` (tokens of leases: a job may come
    twice), and `draining`.
    """

    def __init__(
        self, database: Engine, settings: Settings, worker_id: UUID, slot: str, device: str
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._database, self._settings = database, settings
        self._worker_id, self._slot, self.device = worker_id, slot, device
        self._lock = threading.Lock()
        self._held: dict[UUID, Lease] = {}
        self._news: dict[Lease, Mapping[str, Any]] = {}
        self._claims = 0
        self._last_step = time.monotonic()
        self._parent = os.getppid()
        self.steps_per_second = 0.0
        self.canceled: set[UUID] = set()
        self.kept: set[UUID] = set()
        self.lost: set[UUID] = set()
        self.draining = False
        self.opening = False  # a network or an index: for once, nothing has to follow upon anything

    def alive(self) -> None:
        """Something was done."""
        self._last_step = time.monotonic()

    def hold(self, lease: Lease) -> None:
        """A job is ours now."""
        with self._lock:
            self._claims += 1
            if not self._held:
                self.alive()
            self._held[lease.token] = lease

    def drop(self, lease: Lease) -> None:
        """A job is ours no more."""
        with self._lock:
            self._held.pop(lease.token, None)
            for known in (self.canceled, self.kept, self.lost):
                known.discard(lease.token)

    def drop_all(self) -> None:
        """Nothing is ours any more."""
        with self._lock:
            for known in (self._held, self.canceled, self.kept, self.lost):
                known.clear()

    def holds(self) -> list[Lease]:
        """What is ours now."""
        with self._lock:
            return list(self._held.values())

    def tell(self, lease: Lease, progress: Mapping[str, Any]) -> None:
        """How far a job is, for the next beat."""
        with self._lock:
            self._news[lease] = progress

    def run(self) -> None:
        while True:
            time.sleep(self._settings.heartbeat.total_seconds())
            if os.getppid() != self._parent:
                log.error("the parent is gone: this worker ends")
                os.kill(os.getpid(), signal.SIGKILL)
            with self._lock:
                expected = bool(self._held) and not self.opening
            stalled = time.monotonic() - self._last_step
            if expected and stalled > self._settings.stall_after.total_seconds():
                log.error("no step for too long: this worker ends", seconds=round(stalled))
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                self._beat()
            except SQLAlchemyError as error:
                log.warning("the store does not answer", error=str(error).splitlines()[0])
            except Exception:  # this thread must outlive whatever happens to it
                log.exception("a beat failed")

    def _beat(self) -> None:
        with self._lock:
            held, news, claims = dict(self._held), self._news, self._claims
            self._news = {}
        with self._database.begin() as connection:
            self.draining = self.draining or workers.heartbeat(
                connection,
                self._worker_id,
                slot=self._slot,
                device=self.device,
                steps_per_second=self.steps_per_second,
                fresh_for=self._settings.fresh_for,
            )
            known = queue.extend(connection, held.values(), self._settings.lease) if held else {}
        with self._lock:
            ours = self._held.keys() & held.keys()
            self.lost |= ours - known.keys()
            self.canceled |= {t for t in ours & known.keys() if known[t][0] == Status.CANCELING}
            self.kept |= {t for t in ours & known.keys() if known[t][1]}
        if news and held:  # apart, since leases matter more
            with self._database.begin() as connection:
                queue.report_progress(connection, news)
        if claims:  # last, and by itself: all workers wait for the one row
            with self._database.begin() as connection:
                queue.count(connection, "claims", claims)
            with self._lock:
                self._claims -= claims
