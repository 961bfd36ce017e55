"""Who waits for which job: one LISTEN per process wakes them all, and none holds a connection.

Those whom a notice wakes have the same question, which is asked once for them all.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from store import notices

_log = structlog.get_logger(__name__)

# Should a notice get lost with its connection, a waiter still looks this often.
PATIENCE = 10.0
# An answer is as good as new for so long, unless there was a notice.
_FRESH = 1.0

T = TypeVar("T")


class _Asked(NamedTuple):
    at: float
    answer: asyncio.Task[Any]


class Hub:
    """Of one process. `run` is its task."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._waiters: dict[UUID | None, set[asyncio.Event]] = defaultdict(set)
        self._asked: dict[UUID | None, dict[Hashable, _Asked]] = defaultdict(dict)

    @contextmanager
    def waiter(self, job_id: UUID | None) -> Iterator["Waiter"]:
        """Hears of every change of the job from here on; with None, of every job's."""
        bell = asyncio.Event()
        self._waiters[job_id].add(bell)
        try:
            yield Waiter(bell)
        finally:
            self._waiters[job_id].discard(bell)
            if not self._waiters[job_id]:
                del self._waiters[job_id]
                self._asked.pop(job_id, None)

    async def ask(
        self, job_id: UUID | None, what: Hashable, question: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """What `question` answers, asked once by all of a job's waiters who call it `what`.

        The answer is of after the job's last notice; with None, of after any job's.
        """
        now = asyncio.get_running_loop().time()
        asked = self._asked[job_id].get(what)
        if asked is None or (asked.answer.done() and asked.at + _FRESH < now):
            asked = _Asked(now, asyncio.create_task(question()))
            asked.answer.add_done_callback(_heard)
            self._asked[job_id][what] = asked
        # Who leaves does not take the answer away from the others.
        answer: T = await asyncio.shield(asked.answer)
        return answer

    async def until(
        self, done: Callable[[], Awaitable[bool]], *, job_id: UUID | None, seconds: float
    ) -> None:
        """Asks `done` now and whenever the job changes, until it is or the time is over."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        with self.waiter(job_id) as waiter:
            while not await done() and (left := end - loop.time()) > 0:
                await waiter.wait(left)

    async def run(self) -> None:
        """Listens until it is canceled, over restarts of Postgres."""
        while True:
            try:
                async for job_id in notices.listen(self._engine):
                    self._wake(job_id)
            except SQLAlchemyError as error:
                _log.warning("listening failed", error=str(error))
            except Exception:  # everybody's waiting hangs on this one task
                _log.exception("listening failed")
            await asyncio.sleep(1)

    def _wake(self, job_id: UUID | None) -> None:
        """Those who wait for this job and for any; with None, when something was missed, all."""
        ids = [None, job_id] if job_id is not None else list(self._waiters)
        for known in ids:  # what was asked before
            self._asked.pop(known, None)
        for bell in [bell for known in ids for bell in self._waiters.get(known, ())]:
            bell.set()


def _heard(answer: asyncio.Task[Any]) -> None:
    """An error is for those who asked; where all of them left it is nobody's."""
    if not answer.cancelled():
        answer.exception()


class Waiter:
    """One who waits."""

    def __init__(self, bell: asyncio.Event) -> None:
        self._bell = bell

    async def wait(self, seconds: float) -> None:
        """Until something happened since the last `wait`, or so many seconds passed."""
        try:
            async with asyncio.timeout(min(seconds, PATIENCE)):
                await self._bell.wait()
        except TimeoutError:
            pass
        self._bell.clear()
