"""The thread that writes to the store what its worker has found, while the device goes on.

A store that does not answer is asked again until it does: leases tell whether what we bring is
still wanted.
"""

import queue as queues
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import numpy as np
import structlog
import tenacity
from numpy.typing import NDArray
from safetensors.torch import save
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError
from torch import Tensor

from core import artifacts, images
from core.job import Job, Outcome
from store import blobs, queue
from store.queue import Finished, Lease
from store.settings import Settings
from worker.timing import Stages

log = structlog.get_logger(__name__)
T = TypeVar("T")

# Checkpoints that are larger stay on the worker's volume.
INLINE = 64 * 2**20
# Results that share a transaction: its cost is then next to nothing, and little waits for it.
TOGETHER = 16
# Results that wait to be written: memory is bounded, and the device seldom waits.
BACKLOG = 256
GIVE_UP_AFTER = 600.0


def _is_lasting(error: BaseException) -> bool:
    """Whether asking again would bring the same answer."""
    return isinstance(error, (DataError, IntegrityError, ProgrammingError)) or not isinstance(
        error, SQLAlchemyError
    )


class Writer(threading.Thread):
    """Takes results and other news; calls `on_end` with the id of each job that is done with."""

    def __init__(
        self,
        database: Engine,
        settings: Settings,
        on_end: Callable[[UUID], None],
        stages: Stages,
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._database, self._settings = database, settings
        self._on_end, self._stages = on_end, stages
        self._todo: queues.Queue[tuple[Lease, Job, Outcome] | Callable[[], None]]
        self._todo = queues.Queue(BACKLOG)

    @property
    def busy(self) -> bool:
        """Whether anything is still to be written."""
        return self._todo.unfinished_tasks > 0

    def join_all(self) -> None:
        """Waits until everything is written."""
        self._todo.join()

    def succeed(self, lease: Lease, job: Job, outcome: Outcome) -> None:
        """A result."""
        self._todo.put((lease, job, outcome))

    def fail(self, lease: Lease, code: str, message: str) -> None:
        """A job without a result."""
        self._todo.put(lambda: self._fail(lease, code, message))

    def release(self, lease: Lease, reason: str) -> None:
        """A job to be handed back."""

        def hand_back() -> None:
            self._ask(lambda connection: queue.release(connection, [lease], reason))
            self._on_end(lease.job_id)

        self._todo.put(hand_back)

    def checkpoint(self, lease: Lease, state: Mapping[str, Tensor]) -> None:
        """Where a job stands; `state` is on the CPU and nobody else's."""
        self._todo.put(lambda: self._checkpoint(lease, state))

    def snapshot(self, lease: Lease, steps: int, corners: NDArray[np.float32]) -> None:
        """A picture of `corners` [K, C, H, W] on their way, side by side."""
        strip = np.concatenate(list(corners), axis=2)

        def keep() -> None:
            png = images.to_png(strip)
            self._ask(lambda connection: queue.keep_snapshot(connection, lease, steps, png))

        self._todo.put(keep)

    def run(self) -> None:
        while True:
            tasks = [self._todo.get()]
            while len(tasks) < TOGETHER and not callable(tasks[-1]):
                try:
                    tasks.append(self._todo.get_nowait())
                except queues.Empty:
                    break
            try:
                self._succeed([task for task in tasks if not callable(task)])
                if callable(tasks[-1]):
                    tasks[-1]()
            except Exception:  # leases that nobody renews run out: nothing is lost
                log.exception("could not be written")
            for _ in tasks:
                self._todo.task_done()

    def _succeed(self, done: list[tuple[Lease, Job, Outcome]]) -> None:
        finished = []
        for lease, job, outcome in done:
            try:
                with self._stages("encode"):
                    finished.append(_encode(lease, job, outcome))
            except Exception as error:
                log.exception("could not be encoded", job=str(lease.job_id))
                self._fail(lease, "internal_error", f"The result could not be drawn: {error}")
        self._store(finished)

    def _store(self, finished: list[Finished]) -> None:
        if not finished:
            return
        try:
            self._ask(lambda connection: queue.succeed(connection, finished))
        except Exception as error:
            if len(finished) > 1:
                for each in finished:
                    self._store([each])
                return
            log.exception("a result was refused", job=str(finished[0].lease.job_id))
            first = str(error).splitlines()[0]
            self._fail(
                finished[0].lease, "internal_error", f"The store refused the result: {first}"
            )
            return
        for each in finished:
            log.info("finished", job=str(each.lease.job_id))
            self._on_end(each.lease.job_id)

    def _fail(self, lease: Lease, code: str, message: str) -> None:
        self._ask(lambda connection: queue.fail(connection, lease, code, message))
        log.info("failed", job=str(lease.job_id), code=code, reason=message)
        self._on_end(lease.job_id)

    def _checkpoint(self, lease: Lease, state: Mapping[str, Tensor]) -> None:
        content = save(dict(state))
        inline = len(content) <= INLINE
        if not inline:
            path = checkpoint_path(self._settings.checkpoint_dir, blobs.digest(content))
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(content)
            part.replace(path)
        self._ask(
            lambda connection: queue.keep_checkpoint(connection, lease, content, inline=inline)
        )

    def _ask(self, action: Callable[[Connection], T]) -> T:
        """`action` in a transaction of its own, again and again while the store is away."""

        def once() -> T:
            with self._database.begin() as connection:
                return action(connection)

        # A new one each time: it counts its attempts.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: not _is_lasting(error)),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            stop=tenacity.stop_after_delay(GIVE_UP_AFTER),
            reraise=True,
        )
        with self._stages("write"):
            return retrying(once)


def checkpoint_path(folder: Path, sha256: str) -> Path:
    """Where a large checkpoint lies on its worker's volume."""
    return folder / f"{sha256}.safetensors"


def _encode(lease: Lease, job: Job, outcome: Outcome) -> Finished:
    files = artifacts.encode(job, outcome)
    pngs = [files.pop(f"corner-{i}.png") for i in range(len(outcome.corners))]
    return Finished(lease, outcome.result.model_dump(mode="json"), pngs, files)
