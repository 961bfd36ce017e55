"""One kind of jobs on a worker: its network, its engine, and as many rows as are worth it.

Anything that goes wrong in a step halves the rows: what is taken out waits, in the state it had,
and goes on later. So memory that runs out costs time but no job, and a job that breaks every step
it takes part in ends alone. Jobs of patches take more memory than their rows tell: they count as
many rows as it is worth.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import structlog
import torch
from torch import Tensor

from core.capacity import rows_worth
from core.engine import SMALL_IMAGE, Group, UnfitState
from core.job import Job, Subject, is_accelerator_lost
from core.memory import free
from core.spec import CollisionSpec

log = structlog.get_logger(__name__)

State = Mapping[str, Tensor]
THREADS = torch.get_num_threads()
# Strides without trouble after which twice as many rows are tried again.
RECOVERY = 100
# Of the memory that is free when it opens, what the rows of a station may take.
SHARE = 0.4


class Interrupted(Exception):
    """A step was broken off, since a job in it is no longer wanted."""


@dataclass(frozen=True)
class Broken:
    """A job that fails in whatever company, and why."""

    key: str
    error: Exception


class Station:
    """Jobs of one batch key. `admit` them, `advance` all, take them out by `withdraw`."""

    def __init__(
        self,
        subject: Subject,
        spec: CollisionSpec,
        on_step: Callable[[], None],
        promised: int = 0,
    ) -> None:
        """`promised` are the bytes that jobs elsewhere may still take."""
        self.subject = subject
        subject.footprint.checkpoints = True
        # Small images gain nothing from several cores at once, but other threads need one.
        small = math.prod(subject.model.input_shape) <= SMALL_IMAGE
        self.threads = 1 if small else THREADS
        torch.set_num_threads(self.threads)
        self._budget = max(1.0, SHARE * (free(subject.device) - promised))
        self.capacity = rows_worth(subject, spec, self._budget)
        self.limit = self.capacity
        log.info("a network is open", model=spec.model, layer=spec.layer, rows=self.capacity)
        self.spent = 0.0  # seconds of this worker's time, for the turns between kinds
        self._engine = subject.engine(spec, on_step)
        self._waiting: deque[tuple[Group, State | None]] = deque()
        # What each job takes, in bytes and as rows: its own, or as many as would take its memory.
        self._taken: WeakKeyDictionary[Group, int] = WeakKeyDictionary()
        self._weights: WeakKeyDictionary[Group, int] = WeakKeyDictionary()
        self._quiet = 0

    @property
    def rows(self) -> int:
        """In flight, in the engine or waiting for it."""
        return sum(self._weights[group] for group in self._groups)

    @property
    def room(self) -> int:
        """Rows to be claimed; none where so few are free that claiming them costs more."""
        left = self.limit - self.rows
        if left < self.limit // 4:
            return 0
        # What comes is taken to be like the heaviest of what is here.
        return int(left / max((self._weights[g] / g.spec.rows for g in self._groups), default=1))

    @property
    def promised(self) -> int:
        """Bytes that its jobs may take beyond those that they hold between two strides."""
        taken = [self._taken[group] for group in self._groups]
        most = min(sum(taken), max([math.ceil(self._budget), *taken]))
        return max(0, most - self._engine.held)

    def runs(self, group: Group) -> bool:
        """Whether a job is in the engine."""
        return any(group is other for other in self._engine.groups)

    def admit(self, job: Job, state: State | None) -> None:
        """Lets a job join, where `state` left it."""
        group = job.group
        windows = group.patches.windows if group.patches else None
        taken = self.subject.footprint.steps(group.spec, windows)
        self._taken[group] = taken
        self._weights[group] = max(group.spec.rows, math.ceil(self.capacity * taken / self._budget))
        self._waiting.append((group, state))

    def advance(self) -> tuple[list[Group], list[Broken]]:
        """Takes all rows a stride further; who is finished, and who cannot go on.

        Raises what `is_accelerator_lost` tells: then nobody can.
        """
        refused = self._fill()
        failed: Exception | None = None
        try:
            finished = self._engine.advance()
        except Interrupted:  # a failed stride has moved no row
            return [], refused
        except Exception as error:
            failed = error
        if failed and is_accelerator_lost(failed):
            raise failed
        if failed:  # outside of the except, whose traceback holds what memory is to be freed
            return [], [*refused, *self._halve(failed)]
        self._quiet += 1
        if self._quiet > RECOVERY and self.limit < self.capacity:
            self._quiet, self.limit = 0, min(2 * self.limit, self.capacity)
        return finished, refused

    def withdraw(self, group: Group) -> State | None:
        """Takes a job out, finished or not; its state, null where it has not begun."""
        for entry in self._waiting:
            if entry[0] is group:
                self._waiting.remove(entry)
                return entry[1]
        if not self.runs(group):
            self._engine.admit(group)  # only to be asked for its state
        return self._engine.withdraw(group.key)

    def stop(self, group: Group) -> None:
        """Ends a job in the engine with what it has found."""
        self._engine.stop(group.key)

    def state_of(self, group: Group) -> State:
        """Where a job in the engine stands."""
        return self._engine.state_of(group.key)

    @property
    def _groups(self) -> list[Group]:
        return [*self._engine.groups, *(group for group, _ in self._waiting)]

    def _fill(self) -> list[Broken]:
        """Admits what there is room for; who cannot be."""
        rows = sum(self._weights[group] for group in self._engine.groups)
        while self._waiting:
            group, state = self._waiting[0]
            rows += self._weights[group]
            if rows > self.limit and rows > self._weights[group]:
                break
            self._waiting.popleft()
            try:
                self._admit(group, state)
            except Exception as error:
                if is_accelerator_lost(error):
                    raise
                return [Broken(group.key, error)]
        return []

    def _admit(self, group: Group, state: State | None) -> None:
        try:
            self._engine.admit(group, state)
        except UnfitState:  # of another version, or another kind of device
            log.warning("a checkpoint does not fit: the job begins anew", group=group.key)
            self._engine.admit(group)

    def shrink(self) -> bool:
        """Takes half of the jobs out of the engine, to wait; whether there was any."""
        groups = self._engine.groups
        rows = sum(self._weights[group] for group in groups)
        self._quiet, self.limit = 0, max(1, rows // 2)
        for group in groups[len(groups) // 2 :]:
            self._waiting.append((group, self._engine.withdraw(group.key)))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return bool(groups)

    def _halve(self, error: Exception) -> list[Broken]:
        groups = self._engine.groups
        if len(groups) > 1:
            log.warning("a step failed: half of the jobs wait", jobs=len(groups), error=repr(error))
            self.shrink()
            return []
        for group in groups:
            self._engine.withdraw(group.key)
        return [Broken(group.key, error) for group in groups]
