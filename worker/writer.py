"""The thread that writes to the store what its worker has found, while the device goes on.

A store that does not answer is asked again until it does: leases tell whether what we bring is
still wanted.
"""

import json
import queue as queues
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import numpy as np
import structlog
import tenacity
from numpy.typing import NDArray
from safetensors.torch import save, save_file
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import (
    DataError,
    IntegrityError,
    InternalError,
    ProgrammingError,
    SQLAlchemyError,
)
from torch import Tensor

from core import artifacts, images
from core.job import Job
from core.outcome import Outcome
from store import blobs, queue
from store.queue import Finished, Lease
from store.settings import Settings
from worker.heartbeat import Heartbeat
from worker.timing import Stages

log = structlog.get_logger(__name__)
T = TypeVar("T")
Found = tuple[Lease, Job, Outcome, Mapping[str, bytes]]

# Checkpoints that are larger stay on the worker's volume.
INLINE = 64 * 2**20
# Results that share a transaction: its cost is then next to nothing, and little waits for it.
TOGETHER = 16
TOGETHER_BYTES = 64 * 2**20
# Results that wait to be written: memory is bounded, and the device seldom waits.
BACKLOG = 256


class Lost(Exception):
    """The lease under which this was to be written is no longer ours."""


def _is_lasting(error: BaseException) -> bool:
    """Whether asking again would bring the same answer."""
    return isinstance(error, (DataError, IntegrityError, InternalError, ProgrammingError)) or (
        not isinstance(error, SQLAlchemyError)
    )


class Writer(threading.Thread):
    """Takes results and other news, and drops each lease from `beat` that is done with."""

    def __init__(
        self, database: Engine, settings: Settings, beat: Heartbeat, stages: Stages
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._database, self._settings = database, settings
        self._beat, self._stages = beat, stages
        self._checkpoints: dict[UUID, str] = {}  # the last one of each lease, to be replaced
        self._keeping: set[UUID] = set()  # leases with one that waits
        self._todo: queues.Queue[Found | Callable[[], None]]
        self._todo = queues.Queue(BACKLOG)

    @property
    def busy(self) -> bool:
        """Whether anything is still to be written."""
        return self._todo.unfinished_tasks > 0

    def join_all(self) -> None:
        """Waits until everything is written."""
        self._todo.join()

    def succeed(
        self, lease: Lease, job: Job, outcome: Outcome, pictures: Mapping[str, bytes]
    ) -> None:
        """A result, and what was drawn of it."""
        self._todo.put((lease, job, outcome, pictures))

    def fail(self, lease: Lease, code: str, message: str) -> None:
        """A job without a result."""
        self._todo.put(lambda: self._fail(lease, code, message))

    def release(self, lease: Lease, reason: str, *, alone: bool = False) -> None:
        """A job to be handed back, and run `alone` next time if that is asked."""

        def hand_back() -> None:
            self._ask(
                [lease],
                lambda connection: queue.release(connection, [lease], reason, alone=alone),
            )

        self._todo.put(lambda: self._end(lease, hand_back))

    def refuse(self, lease: Lease, slot: str, batch_key: str, reason: str) -> None:
        """A job to be handed back whose network the worker of a slot cannot load."""

        def hand_back() -> None:
            self._ask([lease], lambda each: queue.refuse(each, lease, slot, batch_key, reason))

        self._todo.put(lambda: self._end(lease, hand_back))

    def accept(self, slot: str, batch_key: str) -> None:
        """The network of what was refused can be loaded after all."""
        self._todo.put(lambda: self._ask([], lambda each: queue.accept(each, slot, batch_key)))

    def keeps(self, lease: Lease) -> bool:
        """Whether a checkpoint of the job still waits to be written."""
        return lease.token in self._keeping

    def checkpoint(self, lease: Lease, state: Mapping[str, Tensor], steps: int) -> None:
        """Where a job stands after `steps`; `state` is on the CPU and nobody else's."""
        self._keeping.add(lease.token)

        def keep() -> None:
            try:
                self._checkpoint(lease, state, steps)
            finally:
                self._keeping.discard(lease.token)

        self._todo.put(keep)

    def snapshot(self, lease: Lease, steps: int, corners: NDArray[np.float32]) -> None:
        """A picture of `corners` [K, C, H, W] on their way, side by side."""
        strip = np.concatenate(list(corners), axis=2)

        def keep() -> None:
            png = images.to_png(strip)
            self._ask(
                [lease], lambda connection: queue.keep_snapshot(connection, lease, steps, png)
            )

        self._todo.put(keep)

    def run(self) -> None:
        while True:
            self._write()

    def _write(self) -> None:
        """The next tasks; who waits for others after them holds nothing of these."""
        tasks = [self._todo.get()]
        while len(tasks) < TOGETHER and not callable(tasks[-1]):
            try:
                tasks.append(self._todo.get_nowait())
            except queues.Empty:
                break
        self._try(partial(self._succeed, [task for task in tasks if not callable(task)]))
        for task in tasks:
            if callable(task):
                self._try(task)
            self._todo.task_done()

    def _try(self, task: Callable[[], None]) -> None:
        """A task that fails fails alone; a lease that nobody renews then runs out."""
        try:
            task()
        except Lost:
            log.warning("what was to be written is no longer ours")
        except Exception:
            log.exception("could not be written")

    def _end(self, lease: Lease, last: Callable[[], None]) -> None:
        """The last write under a lease, after which nobody vouches for it, come what may."""
        try:
            last()
        finally:
            self._beat.drop(lease)
            if sha256 := self._checkpoints.pop(lease.token, None):
                self._forget(sha256)

    def _succeed(self, done: list[Found]) -> None:
        finished: list[Finished] = []
        size = 0
        for found in done:
            try:
                with self._stages("encode"):
                    encoded = _encode(*found)
            except Exception as error:
                log.exception("could not be encoded", job=str(found[0].job_id))
                self._fail(found[0], "internal_error", f"The result fits no file: {error}")
                continue
            finished.append(encoded)
            size += sum(map(len, [*encoded.pngs, *encoded.files.values()]))
            if size > TOGETHER_BYTES:
                self._store(finished)
                finished, size = [], 0
        self._store(finished)

    def _store(self, finished: list[Finished]) -> None:
        if not finished:
            return
        leases = [each.lease for each in finished]
        try:
            self._ask(leases, lambda connection: queue.succeed(connection, finished))
        except Lost:
            said = "lost"
        except Exception as error:
            if len(finished) > 1:
                for each in finished:
                    self._store([each])
                return
            log.exception("a result was refused", job=str(leases[0].job_id))
            reason = f"The store refused the result: {str(error).splitlines()[0]}"
            self._fail(leases[0], "internal_error", reason)
            return
        else:
            said = "finished"
        for lease in leases:
            self._end(lease, partial(log.info, said, job=str(lease.job_id)))

    def _fail(self, lease: Lease, code: str, message: str) -> None:
        # An exception may say anything; Postgres takes neither of these.
        said = message.encode(errors="replace").decode().replace("\0", "")

        def fail() -> None:
            self._ask([lease], lambda connection: queue.fail(connection, lease, code, said))
            log.info("failed", job=str(lease.job_id), code=code, reason=said)

        self._end(lease, fail)

    def _checkpoint(self, lease: Lease, state: Mapping[str, Tensor], steps: int) -> None:
        folder = self._settings.checkpoint_dir
        inline = sum(value.nbytes for value in state.values()) <= INLINE
        if inline:
            content = save(dict(state))
        else:  # by way of its file, since `save` holds all of it twice for a moment
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{lease.token}.part"
            save_file(dict(state), part)
            content = part.read_bytes()
            part.replace(checkpoint_path(folder, blobs.digest(content)))
        self._ask(
            [lease],
            lambda each: queue.keep_checkpoint(each, lease, content, steps, inline=inline),
        )
        before = self._checkpoints.get(lease.token)
        self._checkpoints[lease.token] = blobs.digest(content)
        if before:
            self._forget(before)

    def _forget(self, sha256: str) -> None:
        """Deletes a checkpoint that was replaced or whose job has ended, if nobody needs it."""
        try:
            with self._database.begin() as connection:
                unneeded = queue.forget_checkpoint(connection, sha256)
        except SQLAlchemyError:  # then retention does it
            return
        if unneeded:
            checkpoint_path(self._settings.checkpoint_dir, sha256).unlink(missing_ok=True)

    def _ask(self, leases: Sequence[Lease], action: Callable[[Connection], T]) -> T:
        """`action` in a transaction of its own, again and again while the store is away.

        Raises:
            Lost: meanwhile all of these leases were lost.
            SQLAlchemyError: the store refuses it, and will.
        """

        def once() -> T:
            if leases and all(lease.token in self._beat.lost for lease in leases):
                raise Lost
            self._beat.alive()
            with self._database.begin() as connection:
                return action(connection)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: not _is_lasting(error)),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        )
        with self._stages("write"):
            return retrying(once)


def checkpoint_path(folder: Path, sha256: str) -> Path:
    """Where a large checkpoint lies on its worker's volume."""
    return folder / f"{sha256}.safetensors"


def _encode(lease: Lease, job: Job, outcome: Outcome, pictures: Mapping[str, bytes]) -> Finished:
    files = {**artifacts.encode(job, outcome), **pictures}
    # Through JSON, which has no NaN: null stands for it.
    result = json.loads(outcome.result.model_dump_json())
    pngs = [files.pop(f"corner-{i}.png") for i in range(len(outcome.corners))]
    return Finished(lease, result, pngs, files)
