"""Prioritized DCI: neighbours by projections on random lines (Li and Malik, arXiv:1703.00440).

A simple index sorts the N points by their projection on a random unit vector; m of them make a
composite index, of which there are L. Algorithm 2 of the paper walks outwards from the query's
projections with a priority queue that always visits the projection nearest to the query's; a point
that all m simple indices of a composite index have visited is a candidate there. Each composite
index stops at `retrieve` candidates (the paper's k0); the paper's other limit, of k1 visits, is
left out here. The union of the candidates is what the caller ranks by true distances.

Nothing is visited one by one here, and the candidates are the same. The queue visits in the order
of |p_j - q_j|, so a point is complete when the queue's frontier reaches its distance
max_j |p_j - q_j|, and what was visited within a radius are m windows of sorted projections. So a
radius is sought whose windows hold enough, and a point is a candidate if it lies in all of them.
Where distances are equal, the paper leaves the order open; here visits are ordered by distance,
then by point.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from core.errors import CoreError, InvalidSpec
from core.patches.sets import sync, write_whole

FORMAT = 1

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

# Points of a window that one step holds.
_WINDOW = 1 << 14

# A window of more than 1/4 of the points is slower to follow, its points being scattered over the
# other lines' projections, than all points are to go through in a row.
_FOLLOW = 4

# Points by whose distances a first radius is chosen.
_SAMPLE = 4096


class UnreadableIndex(CoreError):
    """The index cannot be read, or another version wrote it."""

    code = "unreadable_index"


class PrioritizedDCI:
    """The index of N points in R^D.

    `directions` [L, m, D] are unit vectors, `projections` [L, m, N] the points' projections on
    them by point, and `order` [L, m, N] the points of each simple index by projection.
    """

    def __init__(
        self, directions: Floats, projections: NDArray[np.float32], order: NDArray[Any]
    ) -> None:
        self.directions = directions
        self.projections = projections
        self.order = order
        sample = np.linspace(0, self.points - 1, min(self.points, _SAMPLE)).astype(np.int64)
        self._sample = np.asarray(projections[:, :, sample])

    @property
    def composite(self) -> int:
        """L."""
        return int(self.directions.shape[0])

    @property
    def simple(self) -> int:
        """m."""
        return int(self.directions.shape[1])

    @property
    def dimensions(self) -> int:
        """D."""
        return int(self.directions.shape[2])

    @property
    def points(self) -> int:
        """N."""
        return int(self.projections.shape[2])

    @property
    def bytes_per_point(self) -> int:
        """What a point takes in the index; the directions are shared."""
        entry = self.projections.itemsize + self.order.itemsize
        return self.composite * self.simple * int(entry)

    def candidates(
        self,
        queries: NDArray[Any],
        *,
        retrieve: int,
        exclude: NDArray[np.bool_] | None = None,
    ) -> Iterator[Ids]:
        """The candidates for each of `queries` [Q, D], of all composite indices: ascending ids.

        Each composite index gives its first `retrieve` candidates. Points that `exclude` [N] marks
        are visited and not retrieved. A query is searched for when its candidates are asked for:
        among many points that takes seconds.

        Raises, when candidates are asked for:
            InvalidSpec: the queries' size is not the points', a query is not finite, `retrieve` is
                not positive, or `exclude` is not one mark for each point.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise InvalidSpec(
                f"Queries of the shape {queries.shape} do not fit an index of vectors of "
                f"{self.dimensions} numbers."
            )
        if retrieve < 1:
            raise InvalidSpec("A search must retrieve at least one point.")
        if exclude is not None and exclude.shape != (self.points,):
            raise InvalidSpec(
                f"The points to exclude are marked for {exclude.shape}, not for {self.points}."
            )
        for query in queries:
            projected = project(query[None], self.directions)[..., 0]
            yield self._search(projected, retrieve, exclude)

    def _search(
        self, query: NDArray[np.float32], retrieve: int, exclude: NDArray[np.bool_] | None
    ) -> Ids:
        """The candidates for a projected query [L, m]."""
        found: list[Ids] = []
        composites = np.arange(self.composite)
        radius = self._likely(query, retrieve)
        while len(composites):
            start, end = self._windows(composites, query[composites], radius)
            done = np.isinf(radius)
            for i, composite in enumerate(composites.tolist()):
                ids = self._complete(
                    composite, query[composite], radius[i], start[i], end[i], retrieve, exclude
                )
                done[i] |= len(ids) == retrieve
                if done[i]:
                    found.append(ids)
            composites = composites[~done]
            twice = 2 * (end - start).sum(1)[~done]
            radius = self._radius(composites, query[composites], twice)
        return np.unique(np.concatenate(found))

    def _likely(self, query: NDArray[np.float32], retrieve: int) -> NDArray[np.float32]:
        """Radii [L] that hold `retrieve` points of a composite index, in all likelihood.

        Some points' distances tell: only the time depends on them, not what is found.
        """
        sampled = self._sample.shape[2]
        expected = min(retrieve, self.points) * sampled / self.points
        rank = int(expected + 1.5 * math.sqrt(expected) + 2)
        if rank > sampled:
            return np.full(self.composite, np.inf, np.float32)
        away = np.abs(self._sample - query[..., None]).max(1)
        return np.partition(away, rank - 1)[:, rank - 1]

    def _complete(
        self,
        composite: int,
        centre: NDArray[np.float32],
        radius: np.float32,
        start: Ids,
        end: Ids,
        retrieve: int,
        exclude: NDArray[np.bool_] | None,
    ) -> Ids:
        """The first `retrieve` points in all windows [start, end) [m]."""
        # Any one window has all of the points; the narrowest comes first, and each further line
        # sorts out some of what is left.
        lines = np.argsort(end - start, kind="stable").tolist()
        first, last = int(start[lines[0]]), int(end[lines[0]])
        scanned = (last - first) * _FOLLOW > self.points
        if scanned:
            first, last = 0, self.points
        projections, order = (
            np.asarray(array[composite]) for array in (self.projections, self.order)
        )
        kept: Ids = np.empty(0, np.int64)
        kept_distance = np.empty(0, np.float32)
        for at in range(first, last, _WINDOW):
            end_at = min(at + _WINDOW, last)
            ids = np.arange(at, end_at)
            if not scanned:
                ids = order[lines[0], at:end_at].astype(np.int64)
            distance = np.zeros(len(ids), np.float32)
            for line in lines:
                away = np.abs(projections[line].take(ids) - centre[line])
                inside = np.flatnonzero(away <= radius)
                ids = ids[inside]
                distance = np.maximum(distance[inside], away[inside])
            if exclude is not None:
                ids, distance = ids[~exclude[ids]], distance[~exclude[ids]]
            kept = np.concatenate([kept, ids])
            kept_distance = np.concatenate([kept_distance, distance])
            # Sorting is worth its time where many are dropped, and at the end.
            if len(kept) > (retrieve if end_at == last else 2 * retrieve):
                nearest = np.lexsort((kept, kept_distance))[:retrieve]
                kept, kept_distance = kept[nearest], kept_distance[nearest]
                radius = kept_distance[-1]  # nothing farther comes in any more
        return kept

    def _radius(
        self, composites: Ids, centres: NDArray[np.float32], visits: Ids
    ) -> NDArray[np.float32]:
        """The distances [P] of the `visits`-th [P] to `centres` [P, m]; infinite past the last."""
        # Floats that are not negative are in the order of their bits, so that halving an interval
        # of integers 31 times finds the very float.
        low = np.zeros(len(centres), np.int32)
        high = np.full(len(centres), np.array(np.inf, np.float32).view(np.int32))
        while (low < high).any():
            middle = low + (high - low) // 2
            start, end = self._windows(composites, centres, middle.view(np.float32))
            enough = (end - start).sum(1) >= visits
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle + 1)
        return high.view(np.float32)

    def _windows(
        self, composites: Ids, centres: NDArray[np.float32], radius: NDArray[np.float32]
    ) -> tuple[Ids, Ids]:
        """Where, in each simple index, |p - centre| <= radius: from `start` to `end`, [P, m]."""
        radius = radius[:, None]
        with np.errstate(over="ignore"):
            below = np.nextafter(-radius, np.float32(-np.inf), dtype=np.float32)
        bounds = np.stack([below, radius])  # [2, P, 1]
        simple = np.arange(self.simple)
        base = (composites[:, None] * self.simple + simple) * self.points
        order, projections = self.order.reshape(-1), self.projections.reshape(-1)
        # How many p have p - centre <= bound. Differences as they are rounded, so that a window's
        # end and a point's distance never disagree.
        low = np.zeros((2, *centres.shape), np.int64)
        high = np.full_like(low, self.points)
        for _ in range(self.points.bit_length()):
            middle = (low + high) // 2
            at = base + np.minimum(middle, self.points - 1)
            value = projections.take(base + order.take(at))
            inside = (value - centres <= bounds) & (middle < high)
            low = np.where(inside, middle + 1, low)
            high = np.where(inside, high, middle)
        start, end = low
        return start, np.maximum(start, end)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The index in the folder `path`, its large arrays memory-mapped.

        Raises:
            UnreadableIndex: there is none, a file is damaged, or another version wrote it.
        """
        try:
            version = json.loads((path / "dci.json").read_text())["format"]
            if version != FORMAT:
                raise UnreadableIndex(
                    f"The index in {path} has format {version!r}, not {FORMAT}; build it again."
                )
            directions = np.load(path / "directions.npy", allow_pickle=False)
            projections, order = (
                np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("projections", "order")
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UnreadableIndex(f"The index in {path} cannot be read: {error}.") from error
        if not directions.shape[:2] == projections.shape[:2] == order.shape[:2] or (
            projections.shape != order.shape
        ):
            raise UnreadableIndex(f"The files of the index in {path} are not of one index.")
        return cls(directions, projections, order)


def draw(dimensions: int, *, simple: int, composite: int, seed: int) -> Floats:
    """Random directions [L, m, D]: `composite` indices of `simple` lines each, in R^D."""
    drawn = np.random.default_rng(seed).normal(size=(composite, simple, dimensions))
    directions: Floats = drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
    return directions


def project(vectors: NDArray[Any], directions: Floats) -> NDArray[np.float32]:
    """The projections [L, m, n] of `vectors` [n, D] on `directions` [L, m, D]."""
    # In float64 before they are rounded: how BLAS orders a sum depends on where in a block a
    # vector stands, and equal vectors should have equal projections.
    with np.errstate(invalid="ignore", over="ignore"):
        projected = np.tensordot(directions, np.asarray(vectors, np.float64), (2, 1))
        rounded = projected.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise InvalidSpec("A vector has a number that is not finite, or too large.")
    return rounded


def write(
    path: Path, directions: Floats, points: int, lines: Iterable[NDArray[np.float32]]
) -> None:
    """Writes an index to the folder `path`: three `.npy` files, and `dci.json` at the end.

    `lines` has the projections [N] of all `points` on each of `directions` [L, m, D], in order. No
    more than one of them, and its order, is in memory.
    """
    header = path / "dci.json"
    header.unlink(missing_ok=True)  # until the arrays are whole, there is no index
    with (path / "directions.npy").open("wb") as file:
        np.save(file, directions, allow_pickle=False)
        sync(file)
    order_type = np.int32 if points < 2**31 else np.int64
    with (path / "projections.npy").open("wb") as stored, (path / "order.npy").open("wb") as order:
        shape = (*directions.shape[:2], points)
        for file, dtype in ((stored, np.float32), (order, order_type)):
            described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, described)
        for line in lines:
            stored.write(line.data)
            order.write(np.argsort(line, kind="stable").astype(order_type).data)
        sync(stored)
        sync(order)
    write_whole(header, json.dumps({"format": FORMAT}).encode())
