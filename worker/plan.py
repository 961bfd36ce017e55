"""Which kinds of jobs a worker takes next, and which jobs give way to others. Pure.

A kind is a batch key: jobs that share an engine. A worker runs a few kinds side by side and gives
each the same share of its time. Where more of them wait, those it has make room after a while, so
that a stream of one kind never keeps another out; and where other keys wait, long jobs go back to
the queue, with a checkpoint, so that no key keeps another out.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from store.queue import ALONE, Kind

MAX_KINDS = 3  # each holds a network in memory
TURN = 10.0  # seconds; long beside a switch, short beside a user's patience
LONG = 60.0  # seconds after which a job gives way to others; long beside a checkpoint and back


@dataclass(frozen=True)
class Running:
    """A kind that this worker runs: jobs of it in flight, room in rows, seconds since it began, and
    the rows that it may have.
    """

    jobs: int
    room: int
    age: float
    limit: int = 0


@dataclass(frozen=True)
class Holding:
    """A job that optimises here, by its lease's token: of so many rows, for `age` seconds."""

    token: UUID
    batch_key: str
    key_id: UUID
    rows: int
    age: float


def able(
    waiting: Sequence[Kind],
    models: Collection[str],
    patch_sets: Collection[str],
    refused: Collection[str] = (),
) -> list[Kind]:
    """Those kinds that a worker with these models and patch sets can run, and has not `refused`."""
    return [
        kind
        for kind in waiting
        if kind.model in models
        and (kind.patch_set is None or kind.patch_set in patch_sets)
        and kind.batch_key not in refused
    ]


def choose(
    waiting: Sequence[Kind], running: Mapping[str, Running], *, alone_waits: float = 0.0
) -> list[str]:
    """The batch keys to claim jobs of now, the most urgent first.

    `waiting` is in order of urgency. `alone_waits` are the seconds since a job that shares the
    worker with none began to wait: for one turn others go round it, then it has its own.
    """
    in_flight = {key for key, now in running.items() if now.jobs}
    if not waiting or any(key.startswith(ALONE) for key in in_flight):
        return []
    alone = [kind.batch_key for kind in waiting if kind.batch_key.startswith(ALONE)]
    if alone and alone_waits > TURN:
        return [] if in_flight else alone[:1]
    if waiting[0].batch_key in alone and not in_flight:
        return alone[:1]
    shared = [kind for kind in waiting if kind.batch_key not in alone]
    new = [kind for kind in shared if kind.batch_key not in in_flight]
    free = MAX_KINDS - len(in_flight)
    chosen = []
    for kind in shared:
        if kind.batch_key not in in_flight:
            if free > 0:
                free -= 1
                chosen.append(kind.batch_key)
            continue
        now = running[kind.batch_key]
        crowded = len(new) > MAX_KINDS - len(in_flight)
        outranked = crowded and _outranked(kind, new)
        if now.room > 0 and not outranked and not (crowded and now.age > TURN):
            chosen.append(kind.batch_key)
    return chosen


def _outranked(kind: Kind, others: Sequence[Kind]) -> bool:
    """Whether each key that waits for `kind` has something more urgent of its own among others."""
    return all(
        any(other.first.get(key, priority) > priority for other in others)
        for key, priority in kind.first.items()
    )


def give_way(
    waiting: Sequence[Kind],
    running: Mapping[str, Running],
    held: Sequence[Holding],
    *,
    places: int,
    alone_waits: float = 0.0,
) -> list[UUID]:
    """The jobs to be handed back now, with a checkpoint, so that others can run; a few at a time.

    Only those that have been here for long, and only for keys that have less here; but for a job
    that has waited to be alone, whoever it is of.
    """
    old = sorted((job for job in held if job.age > LONG), key=lambda job: -job.age)
    if not old:
        return []
    alone = [kind for kind in waiting if kind.batch_key.startswith(ALONE)]
    if any(job.batch_key.startswith(ALONE) for job in held):
        mine = {job.key_id for job in held}
        return [job.token for job in old if any(kind.first.keys() - mine for kind in waiting)]
    if alone and alone_waits > TURN:
        return [job.token for job in old]
    rows = Counter[UUID]()
    for job in held:
        rows[job.key_id] += job.rows
    in_flight = {job.batch_key for job in held}
    for kind in waiting:
        if kind in alone:
            continue
        least = min(rows[key] for key in kind.first)
        if kind.batch_key in in_flight:
            if places > 0 and running[kind.batch_key].room > 0:
                continue
            most = max(sum(rows.values()), running[kind.batch_key].limit)
            share = most / len(rows.keys() | kind.first.keys())
            # Of its own kind, or of any where there are no places.
            mates = [job for job in old if places <= 0 or job.batch_key == kind.batch_key]
            over = [job for job in mates if rows[job.key_id] > max(share, least)]
            if least < share and over:
                return [max(over, key=lambda job: rows[job.key_id]).token]
        elif len(in_flight) >= MAX_KINDS or places <= 0:
            over = [job for job in old if rows[job.key_id] > least]
            if over:
                kinds = [over[0].batch_key] if places > 0 else in_flight
                leaving = [job.token for job in over if job.batch_key in kinds]
                return leaving if places > 0 else leaving[:1]
    return []
