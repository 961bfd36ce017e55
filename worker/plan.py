"""Which kinds of jobs a worker takes next. Pure.

A kind is a batch key: jobs that share an engine. A worker runs a few kinds side by side and gives
each the same share of its time. Where more of them wait, those it has make room after a while, so
that a stream of one kind never keeps another out.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from store.queue import ALONE, Kind

MAX_KINDS = 3  # each holds a network in memory
TURN = 10.0  # seconds; long beside a switch, short beside a user's patience


@dataclass(frozen=True)
class Running:
    """A kind that this worker runs: jobs of it in flight, room in rows, seconds since it began."""

    jobs: int
    room: int
    age: float


def choose(
    waiting: Sequence[Kind],
    running: Mapping[str, Running],
    servable: Collection[str],
    patch_sets: Collection[str],
) -> list[str]:
    """The batch keys to claim jobs of now, the most urgent first.

    `waiting` is in order of urgency; `servable` and `patch_sets` name the models and the patch
    sets that this worker has.
    """
    waiting = [
        kind
        for kind in waiting
        if kind.model in servable and (kind.patch_set is None or kind.patch_set in patch_sets)
    ]
    if not waiting:
        return []
    in_flight = {key for key, now in running.items() if now.jobs}
    if any(key.startswith(ALONE) for key in in_flight):
        return []
    if waiting[0].batch_key.startswith(ALONE):
        return [] if in_flight else [waiting[0].batch_key]
    shared = [kind for kind in waiting if not kind.batch_key.startswith(ALONE)]
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
        outranked = crowded and new[0].priority > kind.priority
        if now.room > 0 and not outranked and not (crowded and now.age > TURN):
            chosen.append(kind.batch_key)
    return chosen
