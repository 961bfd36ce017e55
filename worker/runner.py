"""The loop from claim to result, in the pool's child: claims jobs, runs their engines, ends them.

This loop owns the engines. A *claimer* talks to the store ahead of it, *measurers* look at what
has converged, an *artist* draws it, and a *writer* brings it to the store, so that no step waits
for SQL. Each is a thread, and so is the heartbeat; the artist is a process. On a CPU measurers take
every core but one, and the loop helps them when they fall behind: more threads than cores would
only get in each other's way.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import structlog
import tenacity
import torch
from pydantic import ValidationError
from safetensors.torch import load
from sqlalchemy.exc import SQLAlchemyError

from core import artifacts, images, models
from core.engine import Group
from core.errors import CoreError, ModelUnavailable, UnknownName
from core.job import Job, is_accelerator_lost, is_out_of_memory, prepare
from core.memory import MemoryBusy
from core.outcome import PICTURES, Outcome, measure
from core.patches.library import Library
from core.patches.neighbours import IndexFailed
from core.patches.sets import PatchSetBusy
from core.spec import CollisionSpec
from store import queue, workers
from store.database import connect
from store.queue import ALONE, Claimed, Kind, Lease
from store.settings import Settings
from worker.artist import Artist, Pictures
from worker.bench import Bench
from worker.describe import report
from worker.heartbeat import Heartbeat
from worker.patches import PatchSets
from worker.plan import Holding, Running, able, choose, give_way
from worker.station import Interrupted, State, Station
from worker.timing import Stages
from worker.writer import Writer, checkpoint_path

log = structlog.get_logger(__name__)

# Rows that are claimed of a kind before anybody knows how many are worth it.
FIRST_ROWS = 64
PATIENCE = 0.1  # seconds until an empty queue is looked at again, while other jobs run
TRIES = 5
UNNAMED = 3600.0  # seconds that a checkpoint's file may lie about without a job
ROUND = 0.5  # seconds between two looks at deadlines, checkpoints and snapshots
FULL_PATIENCE = 1.0  # seconds until the queue is looked at again where there are no places
AGAIN = 60.0  # seconds until a network is tried again that could not be loaded
LAST_WRITES = 30.0  # seconds that the writer gets where the accelerator is lost
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ENDED = "Handed back by a worker that ended; it goes on where it stood."
OUT_OF_MEMORY = "The device's memory does not hold this job; ask for fewer corners."


class Dropped(Exception):
    """The job is no longer wanted here."""


@dataclass(frozen=True)
class Fresh:
    """A job that was just claimed, with its images' bytes and where an earlier attempt got."""

    claimed: Claimed
    source: bytes
    target: bytes
    state: State | None


@dataclass
class Held:
    """A job in a station."""

    claimed: Claimed
    job: Job
    station: Station
    began: float  # earlier attempts included
    came: float = field(default_factory=time.monotonic)
    kept: float = field(default_factory=time.monotonic)  # when its last checkpoint was
    shown: int = 0  # steps of its last snapshot
    tries: int = 0  # to measure it, with ever more memory freed

    @property
    def token(self) -> UUID:
        """Of its lease: the job itself may come here twice, when a lease was lost."""
        return self.claimed.lease.token


class Runner:
    """What one child of a worker's pool does. `start` once, then `drain` whenever a bell rings."""

    def __init__(self, settings: Settings, slot: str) -> None:
        self._settings, self._slot, self._id = settings, slot, uuid4()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._database = connect(settings)
        self._bench = Bench(self._device)
        self._stations: dict[str, Station] = {}
        self._opened: dict[str, float] = {}  # since when a kind has had jobs here
        self._held: dict[UUID, Held] = {}
        self._listed = models.listed()
        self._servable = {model.name for model in self._listed}
        self._refused: dict[str, float] = {}  # kinds whose network could not be loaded, and when
        self._unread: set[UUID] = set()  # jobs whose settings could not be read
        self._alone_since: float | None = None  # since when a job waits that is to run alone
        self._giving_way: list[UUID] = []  # what the claimer has found to go back
        self._taking: Lease | None = None
        self._at_it = threading.Lock()
        self._patch_sets = PatchSets(self._database, slot)
        self._library = Library()  # the loop's own, with indices
        name = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        self._beat = Heartbeat(self._database, settings, self._id, slot, name)
        self._stages = Stages()
        self._writer = Writer(self._database, settings, self._beat, self._stages)
        self._claimer = ThreadPoolExecutor(1, thread_name_prefix="claimer")
        measurers = 1 if self._device.type == "cuda" else max(1, CORES - 1)
        self._measurers = ThreadPoolExecutor(measurers, thread_name_prefix="measurer")
        self._measuring: dict[Future[Outcome], Held] = {}
        self._artist = Artist()
        self._drawing: dict[Future[Pictures], tuple[Held, Outcome]] = {}
        self._steps, self._round_began = 0, time.monotonic()

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(SQLAlchemyError),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
    )
    def _register(self) -> None:
        patch_sets = self._patch_sets.look()
        with self._database.begin() as connection:
            workers.register(connection, self._id, self._slot, self._beat.device)
            # Together: who is there has then told of its sets, and others are refused.
            workers.report_patch_sets(connection, self._slot, patch_sets)
            workers.report_models(connection, self._slot, [report(each) for each in self._listed])
            queue.expire(connection, self._settings.max_crashes, self._settings.lease)
            wanted = queue.checkpoints(connection)
        kept = {checkpoint_path(self._settings.checkpoint_dir, sha256) for sha256 in wanted}
        for path in self._settings.checkpoint_dir.glob("*.safetensors"):
            # Another worker on this volume may be about to name a fresh one.
            if path not in kept and time.time() - path.stat().st_mtime > UNNAMED:
                path.unlink(missing_ok=True)

    def start(self) -> None:
        """Enters this worker in the store and starts its threads."""
        self._register()
        self._beat.start()
        self._patch_sets.start()
        self._writer.start()
        log.info("worker ready", slot=self._slot, device=self._beat.device)

    def close(self) -> None:
        """Waits until what is here has been handed back; ends the processes that search patches."""
        with self._at_it:
            self._library.close()

    def look(self) -> None:
        """Drains the queue if anything waits there that this worker can run, bell or no bell."""
        if self._beat.draining or self._at_it.locked():
            return
        with self._database.begin() as connection:
            waits = self._able(queue.kinds(connection, self._unread))
        if waits:
            self.drain()

    def drain(self) -> None:
        """Runs jobs until none is left, or until this worker is to end; one drains at a time."""
        with self._at_it:
            self._drain_or_break()

    def _drain_or_break(self) -> None:
        try:
            self._drain()
        except Exception as error:
            if is_accelerator_lost(error):
                self._abandon(error)
            log.exception("the loop broke")
            # Leases that nobody vouches for run out; whose fault it was, their count will tell.
            wait(self._measuring)
            for undrawn in self._drawing:
                undrawn.cancel()
            self._beat.drop_all()
            self._held.clear()
            self._measuring.clear()
            self._drawing.clear()
            self._stations.clear()

    def _drain(self) -> None:
        began = time.perf_counter()
        claim: Future[list[Fresh]] | None = None
        looked, more, idle, exhausted = 0.0, True, True, False
        while not self._beat.draining:
            if claim and claim.done():
                fresh, claim = claim.result(), None
                # Who looked while busy may have had no room for what waits.
                more, exhausted = bool(fresh), idle and not fresh
                with self._stages("prepare"):
                    while fresh:  # which holds no state any longer than it takes
                        self._take(fresh.pop(0))
            here = len(self._held) + len(self._measuring) + len(self._drawing)
            places, idle_now = self._settings.jobs_at_once - here, not here
            patience = PATIENCE if places > 0 else FULL_PATIENCE
            due = (more and places > 0) or idle_now or time.monotonic() - looked > patience
            if not claim and due and not (idle_now and exhausted):
                looked, idle = time.monotonic(), idle_now
                claim = self._claimer.submit(self._claim, self._view(), self._holding(), places)
            self._collect()
            self._obey()
            station = min(
                (s for s in self._stations.values() if s.rows), key=lambda s: s.spent, default=None
            )
            if len(self._measuring) > CORES and self._help():
                continue
            if station:
                self._advance(station)
            elif claim or here or self._writer.busy:
                awaited: list[Future[Any]] = [*self._measuring, *self._drawing]
                awaited += [claim] if claim else []
                with self._stages("idle"):
                    if awaited:
                        wait(awaited, timeout=PATIENCE, return_when=FIRST_COMPLETED)
                    else:
                        time.sleep(PATIENCE / 20)
            else:
                break
        self._hand_back(claim)
        self._beat.steps_per_second = 0.0
        log.info("drained", seconds=round(time.perf_counter() - began, 4), **self._stages.take())

    def _view(self) -> dict[str, Running]:
        """What runs here, for the claimer."""
        now = time.monotonic()
        jobs = [held.claimed.batch_key for held in self._held.values()]
        return {
            key: Running(
                jobs.count(key), station.room, now - self._opened.get(key, now), station.limit
            )
            for key, station in self._stations.items()
        }

    def _holding(self) -> list[Holding]:
        """What optimises here, for the claimer."""
        now = time.monotonic()
        return [
            Holding(
                held.token,
                held.claimed.batch_key,
                held.claimed.key_id,
                held.job.spec.corners,
                now - held.came,
            )
            for held in self._held.values()
        ]

    def _able(self, waiting: list[Kind]) -> list[Kind]:
        now = time.monotonic()
        refused = [key for key, at in self._refused.copy().items() if now - at < AGAIN]
        return able(waiting, self._servable, self._patch_sets.names, refused)

    def _claim(
        self, running: dict[str, Running], holding: list[Holding], places: int
    ) -> list[Fresh]:
        """In the claimer's thread: jobs for the room there is."""
        with self._stages("claim"):
            return self._claim_now(running, holding, places)

    def _alone_waits(self, kinds: list[Kind], running: dict[str, Running]) -> float:
        """Seconds since a job began to wait that is to run alone; others had their turn then."""
        waits = any(kind.batch_key.startswith(ALONE) for kind in kinds)
        runs = any(key.startswith(ALONE) and now.jobs for key, now in running.items())
        if not waits or runs:
            self._alone_since = None
            return 0.0
        self._alone_since = self._alone_since or time.monotonic()
        return time.monotonic() - self._alone_since

    def _claim_now(
        self, running: dict[str, Running], holding: list[Holding], places: int
    ) -> list[Fresh]:
        taken: list[Claimed] = []
        try:
            with self._database.begin() as connection:
                kinds = self._able(queue.kinds(connection, self._unread))
                alone_waits = self._alone_waits(kinds, running)
                self._giving_way += give_way(
                    kinds, running, holding, places=places, alone_waits=alone_waits
                )
                for key in choose(kinds, running, alone_waits=alone_waits):
                    now = running.get(key)
                    if len(taken) >= places:
                        break
                    taken += queue.claim(
                        connection,
                        batch_key=key,
                        rows=now.room if now else FIRST_ROWS,
                        jobs=places - len(taken),
                        at_least_one=now is None or not now.jobs,
                        worker_id=self._id,
                        lease=self._settings.lease,
                        unread=self._unread,
                    )
            for claimed in taken:
                self._beat.hold(claimed.lease)
            hashes = [h for c in taken for h in (c.source[1], c.target[1], c.checkpoint_sha256)]
            with self._database.begin() as connection:
                found = queue.read_blobs(connection, [h for h in hashes if h])
        except SQLAlchemyError as error:
            log.warning("nothing could be claimed", error=str(error).splitlines()[0])
            for claimed in taken:
                self._writer.release(claimed.lease, "Its images could not be read.")
            time.sleep(1)
            return []
        return [
            Fresh(c, found[c.source[1]], found[c.target[1]], self._saved(c, found)) for c in taken
        ]

    def _saved(self, claimed: Claimed, found: dict[str, bytes]) -> State | None:
        sha256 = claimed.checkpoint_sha256
        if sha256 is None:
            return None
        path = checkpoint_path(self._settings.checkpoint_dir, sha256)
        try:
            return load(found.get(sha256) or path.read_bytes())
        except Exception as error:
            log.warning("a checkpoint cannot be read: the job begins anew", error=repr(error))
            return None

    def _take(self, fresh: Fresh) -> None:
        """Opens a job's network, prepares the job and admits it."""
        claimed = fresh.claimed
        self._taking = claimed.lease
        if claimed.batch_key.startswith(queue.ALONE):
            while self._measuring or self._drawing:
                awaited: list[Future[Any]] = [*self._measuring, *self._drawing]
                wait(awaited)
                self._collect()
            self._writer.join_all()
        try:
            spec = CollisionSpec.stored(claimed.spec)
        except ValidationError as error:  # its form is newer than its number says
            self._unread.add(claimed.lease.job_id)
            log.warning("settings cannot be read", job=str(claimed.lease.job_id), error=str(error))
            reason = "A worker could not read its settings; it waits for one of a newer version."
            self._writer.release(claimed.lease, reason)
            return
        try:
            with self._opening():
                self._bench.load(spec)
        except (ModelUnavailable, UnknownName) as error:
            self._refused[claimed.batch_key] = time.monotonic()
            self._writer.refuse(claimed.lease, self._slot, claimed.batch_key, str(error))
            return
        except Exception as error:
            self._fail(claimed, error)
            return
        if self._refused.pop(claimed.batch_key, None):
            self._writer.accept(self._slot, claimed.batch_key)
        try:
            station = self._station(claimed.batch_key, spec)
            shape = station.subject.model.preprocessing
            if spec.patch_set is not None and not self._has(spec.patch_set, claimed):
                return
            job = prepare(
                station.subject,
                spec,
                images.load(claimed.source[0], fresh.source, shape),
                images.load(claimed.target[0], fresh.target, shape),
                key=str(claimed.lease.token),
                library=self._library,
                on_part=self._beat.alive,
                promised=self._promised if self._company else None,
            )
            if not station.rows:
                # Who was idle starts level with those who were not.
                others = [other.spent for other in self._stations.values() if other.rows]
                station.spent = max(station.spent, min(others, default=0.0))
                self._opened[claimed.batch_key] = time.monotonic()
            station.admit(job, fresh.state)
        except (PatchSetBusy, IndexFailed) as error:
            # The process that searched may have been killed; the next one need not be.
            if claimed.attempt < self._settings.max_crashes:
                self._writer.release(claimed.lease, str(error))
            else:
                self._fail(claimed, error)
            return
        except Exception as error:
            self._fail(claimed, error)
            return
        spent = float(fresh.state["clock"][1]) if fresh.state and "clock" in fresh.state else 0.0
        began = time.monotonic() - spent
        self._held[claimed.lease.token] = Held(claimed, job, station, began)
        self._taking = None
        log.info("began", job=str(claimed.lease.job_id), attempt=claimed.attempt)

    def _has(self, patch_set: str, claimed: Claimed) -> bool:
        """Loads a set's index; hands a job back whose set has gone since it was claimed."""
        try:
            with self._opening():
                self._library.neighbours(patch_set)
        except (PatchSetBusy, UnknownName) as error:
            self._writer.release(claimed.lease, str(error))
            return False
        return True

    def _station(self, batch_key: str, spec: CollisionSpec) -> Station:
        if batch_key not in self._stations:
            for idle in [key for key, other in self._stations.items() if not other.rows]:
                del self._stations[idle]
            with self._opening():
                subject = self._bench.subject(spec)
            self._stations[batch_key] = Station(subject, spec, self._on_step, self._promised)
        return self._stations[batch_key]

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """A network that is downloaded, or an index: no step, but it takes its time."""
        self._beat.opening = True
        try:
            yield
        finally:
            self._beat.opening = False
            self._beat.alive()

    def _on_step(self) -> None:
        self._beat.alive()
        self._steps += 1
        unwanted = self._beat.canceled | self._beat.lost
        if self._beat.draining or not unwanted.isdisjoint(self._held):
            raise Interrupted

    def _advance(self, station: Station) -> None:
        began = time.perf_counter()
        torch.set_num_threads(station.threads)
        with self._stages("optimise"):
            finished, broken = station.advance()
        for group in finished:
            self._finish(self._held[UUID(group.key)])
        for each in broken:
            self._fail(self._held.pop(UUID(each.key)).claimed, each.error)
        station.spent += time.perf_counter() - began

    def _finish(self, held: Held) -> None:
        """Has a job measured whose rows have all ended."""
        del self._held[held.token]
        if np.isfinite(held.job.group.score).any():
            self._measuring[self._measurers.submit(self._measure, held)] = held
            return
        message = "No corner ever had finite losses; give a smaller learning_rate."
        self._writer.fail(held.claimed.lease, "diverged", message)

    def _measure(self, held: Held) -> Outcome:
        """In a measurer's thread."""
        torch.set_num_threads(held.station.threads)
        with self._stages("measure"):
            return measure(held.station.subject, held.job, lambda: self._on_chunk(held))

    def _help(self) -> bool:
        """Measures a job, a quick one that no measurer has begun; whether there was one."""
        for future, held in self._measuring.items():
            if held.station.threads == 1 and future.cancel():
                del self._measuring[future]
                own: Future[Outcome] = Future()
                try:
                    own.set_result(self._measure(held))
                except Exception as error:
                    own.set_exception(error)
                self._measuring[own] = held
                return True
        return False

    def _collect(self) -> None:
        """Passes on what has been measured, and what has been drawn."""
        for measured in [future for future in self._measuring if future.done()]:
            held = self._measuring.pop(measured)
            error = measured.exception()
            if error is None:
                self._draw(held, measured.result())
            elif isinstance(error, Dropped):
                self._let_go(held)
            elif is_out_of_memory(error) and held.tries < TRIES and held.station.shrink():
                held.tries += 1
                self._measuring[self._measurers.submit(self._measure, held)] = held
            else:
                self._fail(held.claimed, error)
        for drawn in [future for future in self._drawing if future.done()]:
            held, outcome = self._drawing.pop(drawn)
            self._beat.alive()
            error = drawn.exception()
            if error:
                log.error("could not be drawn", job=str(held.claimed.lease.job_id), exc_info=error)
                self._writer.succeed(held.claimed.lease, held.job, _undrawn(outcome), {})
            else:
                self._writer.succeed(held.claimed.lease, held.job, outcome, drawn.result())

    def _draw(self, held: Held, outcome: Outcome) -> None:
        if held.job.spec.figures:
            drawn = self._artist.draw(artifacts.pictures(held.job, outcome))
            self._drawing[drawn] = held, outcome
        else:
            self._writer.succeed(held.claimed.lease, held.job, outcome, {})

    def _on_chunk(self, held: Held) -> None:
        self._beat.alive()
        if held.token in self._beat.canceled | self._beat.lost or self._beat.draining:
            raise Dropped
        if time.monotonic() - held.began > held.claimed.deadline_seconds:
            raise TimeoutError

    def _obey(self) -> None:
        """Lets go of what was canceled or lost, or gives way; now and then looks after each job."""
        for token in self._beat.canceled | self._beat.lost:
            if held := self._held.pop(token, None):
                self._let_go(held)
        while self._giving_way:
            if held := self._held.pop(self._giving_way.pop(), None):
                self._let_go(held, "Gave way to others that waited; it goes on where it stood.")
        for token in self._beat.kept & self._held.keys():
            held = self._held[token]
            # Corners that nobody has looked at yet are none.
            if held.station.runs(held.job.group) and np.isfinite(held.job.group.score).any():
                held.station.stop(held.job.group)
                self._finish(held)
        self._drop_undrawn(self._beat.canceled | self._beat.lost)
        now = time.monotonic()
        if now - self._round_began < ROUND:
            return
        self._beat.steps_per_second = self._steps / (now - self._round_began)
        self._steps, self._round_began = 0, now
        for held in list(self._held.values()):
            self._look_after(held, now)

    def _drop_undrawn(self, tokens: Set[UUID]) -> None:
        """Lets go of jobs whose pictures nobody has begun."""
        for future, (held, _) in list(self._drawing.items()):
            if held.token in tokens and future.cancel():
                del self._drawing[future]
                self._let_go(held)

    def _look_after(self, held: Held, now: float) -> None:
        lease, group = held.claimed.lease, held.job.group
        if now - held.began > held.claimed.deadline_seconds:
            del self._held[held.token]
            held.station.withdraw(group)
            self._fail(held.claimed, TimeoutError())
            return
        if now - held.began < 2 * ROUND or not held.station.runs(group):
            return
        self._beat.tell(lease, _progress(group, now - held.began))
        if group.snapshots.steps and group.snapshots.steps[-1] > held.shown:
            held.shown = group.snapshots.steps[-1]
            self._writer.snapshot(lease, held.shown, group.snapshots.values[-1].numpy())
        due = now - held.kept > self._settings.checkpoint_every.total_seconds()
        if due and not self._writer.keeps(lease):
            held.kept = now
            self._writer.checkpoint(lease, held.station.state_of(group), group.age)

    def _let_go(self, held: Held, reason: str = ENDED) -> None:
        """Gives a job back, with its state; one that was to be canceled then is, one lost is not
        ours to write to.
        """
        state = held.station.withdraw(held.job.group)
        if held.token in self._beat.lost:
            self._beat.drop(held.claimed.lease)
            return
        if state is not None and held.token not in self._beat.canceled:
            self._writer.checkpoint(held.claimed.lease, state, held.job.group.age)
        self._writer.release(held.claimed.lease, reason)

    def _hand_back(self, claim: Future[list[Fresh]] | None) -> None:
        """Gives back whatever is still here."""
        for fresh in claim.result() if claim else []:
            self._writer.release(fresh.claimed.lease, "Handed back by a worker that ended.")
        while self._measuring:  # what is collected may be measured again, with more memory
            wait(self._measuring)
            self._collect()
        self._drop_undrawn({held.token for held, _ in self._drawing.values()})
        while self._drawing:
            wait(self._drawing)
            self._collect()
        for held in self._held.values():
            self._let_go(held)
        self._held.clear()
        self._writer.join_all()

    @property
    def _company(self) -> bool:
        """Whether other jobs hold memory here."""
        return bool(self._held or self._measuring or self._drawing)

    @property
    def _promised(self) -> int:
        """Bytes that jobs here may take beyond those that they hold now."""
        measured = [held for future, held in self._measuring.items() if future.running()]
        return sum(station.promised for station in self._stations.values()) + sum(
            held.station.subject.footprint.measuring(held.job.spec) for held in measured
        )

    def _abandon(self, error: Exception) -> None:
        """Hands everything back and ends this process, whose pool starts one with an accelerator
        that works. What was on it may be at fault; what was not is not.
        """
        said = str(error).splitlines()[0][:200]
        log.error("the accelerator is lost: this worker ends", exc_info=error)
        self._claimer.shutdown()
        writes = threading.Thread(target=self._writer.join_all, daemon=True)
        writes.start()
        writes.join(LAST_WRITES)
        there = [*self._held.values(), *self._measuring.values()]
        there += [held for held, _ in self._drawing.values()]
        suspects = {held.token for held in there} | (
            {self._taking.token} if self._taking else set()
        )
        leases = self._beat.holds()
        try:
            with self._database.begin() as connection:
                blamed = [lease for lease in leases if lease.token in suspects]
                queue.crash(connection, blamed, self._settings.max_crashes, said)
                others = [lease for lease in leases if lease.token not in suspects]
                queue.release(connection, others, ENDED)
        except SQLAlchemyError as away:  # then the leases run out
            log.warning("the store does not answer", error=str(away).splitlines()[0])
        self._library.close()
        os.kill(os.getpid(), signal.SIGKILL)

    def _fail(self, claimed: Claimed, error: BaseException) -> None:
        if is_accelerator_lost(error):
            self._taking = claimed.lease  # which may stand nowhere else any more
            raise error
        busy = isinstance(error, MemoryBusy) or (is_out_of_memory(error) and self._company)
        if busy:  # it may fit when nobody else is here
            self._writer.release(claimed.lease, str(MemoryBusy()), alone=True)
            return
        if isinstance(error, CoreError):
            code, message = error.code, str(error)
        elif isinstance(error, TimeoutError):
            code = "timeout"
            message = f"The job took more than its {claimed.deadline_seconds:g} s."
        elif is_out_of_memory(error):
            code, message = "out_of_memory", OUT_OF_MEMORY
        else:
            log.error("a job failed", job=str(claimed.lease.job_id), exc_info=error)
            code, message = "internal_error", f"{type(error).__name__}: {error}"
        self._writer.fail(claimed.lease, code, message)


def _undrawn(outcome: Outcome) -> Outcome:
    notes = [*outcome.result.notes, "Its pictures could not be drawn."]
    undrawn = dict.fromkeys(PICTURES, "It could not be drawn.")
    missing = undrawn | outcome.result.missing
    update = {"notes": notes, "missing": missing}
    return replace(outcome, result=outcome.result.model_copy(update=update))


def _progress(group: Group, seconds: float) -> dict[str, float | int | None]:
    """What `progress` of a job tells; `eta` is in seconds, and a bound where rows converge."""
    rate = group.age / seconds
    worst = np.nanmax(group.latest[:, 0], initial=-np.inf)
    left = max(0, group.spec.max_steps - group.age)
    return {
        "steps": min(group.age, group.spec.max_steps),
        "rows_left": int(group.running.sum()),
        "worst_l_pos": float(worst) if np.isfinite(worst) else None,
        "steps_per_second": rate,
        "eta": left / rate if rate else None,
    }
