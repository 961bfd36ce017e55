"""Prioritized DCI: neighbours by projections on random lines (Li and Malik, arXiv:1703.00440).

A simple index sorts the N points by their projection on a random unit vector; m of them make a
composite index, of which there are L. Algorithm 2 of the paper walks outwards from the query's
projections with a priority queue that always visits the projection nearest to the query's; a point
that all m simple indices of a composite index have visited is a candidate there. Each composite
index stops at `retrieve` candidates (the paper's k0) or `visit` visits (k1), and the union of the
candidates is ranked by true distances.

Nothing is visited one by one here, and the candidates are the same. The queue visits in the order
of |p_j - q_j|, so a point is complete when the queue's frontier reaches its distance
max_j |p_j - q_j|, and what was visited within a radius are m windows of sorted projections. So a
radius is sought whose windows hold enough, and a point is a candidate if it lies in all of them.
Where distances are equal, the paper leaves the order open; here visits are ordered by distance,
then by point, then by simple index.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from core.errors import CoreError, InvalidSpec

FORMAT = 1

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

# (query [D], ids [C]) -> the Euclidean distances [C] of those points to the query.
Distances = Callable[[NDArray[Any], Ids], Floats]

# What one step holds: 32 MB of vectors in float64 where they are projected, 1 MB where they are
# compared (which a processor's cache takes), 16384 points of a window, 64 queries' windows.
_PROJECTED = 1 << 22
_COMPARED = 1 << 18
_WINDOW = 1 << 14
_QUERIES = 64

# A window of more than 1/8 of the points is slower to follow, its points being scattered over the
# other lines' projections, than all points are to scan in a row.
_FOLLOW = 8

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

    @classmethod
    def build(
        cls,
        vectors: NDArray[Any] | Iterable[NDArray[Any]],
        *,
        simple: int,
        composite: int,
        seed: int,
    ) -> Self:
        """The index of `vectors` [N, D], or of blocks [n, D] that follow each other.

        `composite` indices of `simple` indices each. The vectors are read once, a part at a time;
        what is kept, and held meanwhile, is `bytes_per_point`.

        Raises:
            InvalidSpec: there are no vectors, they are not all of one size, or not finite.
        """
        if simple < 1 or composite < 1:
            raise InvalidSpec("An index needs at least one simple and one composite index.")
        directions: Floats = np.empty((composite, simple, 0))
        parts: list[NDArray[np.float32]] = []
        for block in _blocks(vectors):
            if not parts:
                drawn = np.random.default_rng(seed).normal(size=(composite, simple, block.shape[1]))
                directions = drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
            parts.append(_project(block, directions))
        if not parts:
            raise InvalidSpec("An index of no points cannot be built.")
        parts.reverse()
        points = sum(part.shape[2] for part in parts)
        projections = np.empty((composite, simple, points), np.float32)
        filled = 0
        while parts:  # each part goes as it is copied: there is no second copy of them all
            part = parts.pop()
            projections[:, :, filled : filled + part.shape[2]] = part
            filled += part.shape[2]
        order = np.empty(projections.shape, np.int32 if points < 2**31 else np.int64)
        for index in np.ndindex(composite, simple):
            order[index] = np.argsort(projections[index], kind="stable")
        return cls(directions, projections, order)

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

    def query(
        self,
        queries: NDArray[Any],
        k: int,
        *,
        distances: NDArray[Any] | Distances,
        retrieve: int,
        visit: int | None = None,
        exclude: NDArray[np.bool_] | None = None,
    ) -> tuple[Ids, Floats]:
        """The `k` candidates nearest to each of `queries` [Q, D]: ids and distances, [Q, k].

        Distances are Euclidean and ascend; equal ones are in the order of ids. `distances` are
        the vectors [N, D] that were indexed, or a function that gives distances to them.
        `retrieve`, `visit` and `exclude` are those of `candidates`. Where `visit` ended the search
        before `k` candidates, -1 and infinity fill the row.

        Raises:
            InvalidSpec: `k` is more than `retrieve` or than the points there are, or a size is
                wrong.
        """
        available = self.points if exclude is None else int(np.count_nonzero(~exclude))
        if not 1 <= k <= min(retrieve, available):
            raise InvalidSpec(
                f"{k} neighbours cannot be chosen: there are {available} points, of which "
                f"{retrieve} are retrieved."
            )
        if not callable(distances) and distances.shape != (self.points, self.dimensions):
            raise InvalidSpec(
                f"The vectors to compare with are {distances.shape}, but the index is of "
                f"{(self.points, self.dimensions)}."
            )
        measure = distances if callable(distances) else _euclidean(distances)
        found = np.full((len(queries), k), -1, np.int64)
        far = np.full((len(queries), k), np.inf)
        near = self.candidates(queries, retrieve=retrieve, visit=visit, exclude=exclude)
        for row, (query, ids) in enumerate(zip(queries, near, strict=True)):
            measured = measure(query, ids)
            # `ids` ascend, and equal distances stay in that order.
            nearest = np.argsort(measured, kind="stable")[:k]
            found[row, : len(nearest)] = ids[nearest]
            far[row, : len(nearest)] = measured[nearest]
        return found, far

    def candidates(
        self,
        queries: NDArray[Any],
        *,
        retrieve: int,
        visit: int | None = None,
        exclude: NDArray[np.bool_] | None = None,
    ) -> list[Ids]:
        """The candidates for each of `queries` [Q, D], of all composite indices: ascending ids.

        Each composite index gives its first `retrieve` candidates, or those that its first `visit`
        visits complete. Points that `exclude` [N] marks are visited and not retrieved.

        Raises:
            InvalidSpec: the queries' size is not the points', a query is not finite, a budget is
                not positive, or `exclude` is not one mark for each point.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise InvalidSpec(
                f"Queries of the shape {queries.shape} do not fit an index of vectors of "
                f"{self.dimensions} numbers."
            )
        if retrieve < 1 or (visit is not None and visit < 1):
            raise InvalidSpec("A search must retrieve and visit at least one point.")
        if exclude is not None and exclude.shape != (self.points,):
            raise InvalidSpec(
                f"The points to exclude are marked for {exclude.shape}, not for {self.points}."
            )
        found: list[Ids] = []
        for start in range(0, len(queries), _QUERIES):
            projected = _project(queries[start : start + _QUERIES], self.directions)
            found += self._search(np.moveaxis(projected, 2, 0), retrieve, visit, exclude)
        return found

    def _search(
        self,
        queries: NDArray[np.float32],
        retrieve: int,
        visit: int | None,
        exclude: NDArray[np.bool_] | None,
    ) -> list[Ids]:
        """The candidates for projected queries [Q, L, m]."""
        found: list[list[Ids]] = [[] for _ in queries]
        rows, composites = (axis.ravel() for axis in np.indices(queries.shape[:2]))
        limit = np.full(len(rows), np.inf, np.float32)
        if visit is not None:
            limit = self._radius(composites, queries[rows, composites], visit)
        radius = np.minimum(limit, self._likely(queries, retrieve).ravel())
        while len(rows):
            centre = queries[rows, composites]
            start, end = self._windows(composites, centre, radius)
            done = radius == limit
            for i, composite in enumerate(composites.tolist()):
                ids, distance = self._complete(
                    composite, centre[i], radius[i], start[i], end[i], retrieve, exclude
                )
                if visit is not None and radius[i] == limit[i]:
                    ids = self._in_time(
                        composite, centre[i], radius[i], start[i], end[i], visit, ids, distance
                    )
                done[i] |= len(ids) == retrieve
                if done[i]:
                    found[rows[i]].append(ids)
            rows, composites, limit = rows[~done], composites[~done], limit[~done]
            twice = 2 * (end - start).sum(1)[~done]
            radius = np.minimum(limit, self._radius(composites, centre[~done], twice))
        return [np.unique(np.concatenate(ids)) for ids in found]

    def _likely(self, queries: NDArray[np.float32], retrieve: int) -> NDArray[np.float32]:
        """Radii [Q, L] that hold `retrieve` points of a composite index, in all likelihood.

        Some points' distances tell: only the time depends on them, not what is found.
        """
        sampled = self._sample.shape[2]
        expected = min(retrieve, self.points) * sampled / self.points
        rank = int(expected + 1.5 * math.sqrt(expected) + 2)
        if rank > sampled:
            return np.full(queries.shape[:2], np.inf, np.float32)
        radius = np.empty(queries.shape[:2], np.float32)
        for row, centre in enumerate(queries):
            away = np.abs(self._sample - centre[..., None]).max(1)
            radius[row] = np.partition(away, rank - 1)[:, rank - 1]
        return radius

    def _complete(
        self,
        composite: int,
        centre: NDArray[np.float32],
        radius: np.float32,
        start: Ids,
        end: Ids,
        retrieve: int,
        exclude: NDArray[np.bool_] | None,
    ) -> tuple[Ids, NDArray[np.float32]]:
        """The first `retrieve` points in all windows [start, end) [m], and their distances."""
        # Any one window has all of the points; the narrowest comes first, and each further line
        # sorts out some of what is left.
        lines = np.argsort(end - start, kind="stable").tolist()
        first, last = int(start[lines[0]]), int(end[lines[0]])
        scanned = (last - first) * _FOLLOW > self.points
        if scanned:
            first, last = 0, self.points
        projections = self.projections[composite]
        kept: Ids = np.empty(0, np.int64)
        kept_distance = np.empty(0, np.float32)
        for at in range(first, last, _WINDOW):
            block = slice(at, min(at + _WINDOW, last))
            if scanned:
                distance = np.abs(projections[:, block] - centre[:, None]).max(0)
                inside = np.flatnonzero(distance <= radius)
                ids, distance = inside + at, distance[inside]
            else:
                ids = self.order[composite, lines[0], block].astype(np.int64)
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
            if len(kept) > retrieve:
                nearest = np.lexsort((kept, kept_distance))[:retrieve]
                kept, kept_distance = kept[nearest], kept_distance[nearest]
                radius = kept_distance[-1]  # nothing farther comes in any more
        return kept, kept_distance

    def _in_time(
        self,
        composite: int,
        centre: NDArray[np.float32],
        radius: np.float32,
        start: Ids,
        end: Ids,
        visit: int,
        ids: Ids,
        distance: NDArray[np.float32],
    ) -> Ids:
        """Those of `ids` that the first `visit` visits complete.

        `radius` is where the last of these visits lies, so only among the visits at exactly that
        distance does it matter which come first.
        """
        before = np.nextafter(radius, np.float32(-1), dtype=np.float32)
        at = np.array([composite])
        inner_start, inner_end = (
            side[0] for side in self._windows(at, centre[None], np.array([before]))
        )
        visited_before = int((inner_end - inner_start).sum())
        last = np.sort(
            np.concatenate(
                [
                    part
                    for j, order in enumerate(self.order[composite])
                    for part in (order[start[j] : inner_start[j]], order[inner_end[j] : end[j]])
                ]
            )
        )
        turn = np.searchsorted(last, ids, side="right")
        return ids[(distance < radius) | (turn <= visit - visited_before)]

    def _radius(
        self, composites: Ids, centres: NDArray[np.float32], visits: int | Ids
    ) -> NDArray[np.float32]:
        """The distance [P] of the `visits`-th visit to `centres` [P, m]; infinite past the last."""
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

    def save(self, path: Path) -> None:
        """Writes the index to the folder `path`: three `.npy` files, and `dci.json` at the end."""
        path.mkdir(parents=True, exist_ok=True)
        header = path / "dci.json"
        header.unlink(missing_ok=True)  # until the arrays are whole, there is no index
        for name in ("directions", "projections", "order"):
            np.save(path / f"{name}.npy", getattr(self, name), allow_pickle=False)
        header.write_text(json.dumps({"format": FORMAT}))

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


def _blocks(vectors: NDArray[Any] | Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Parts [n, D] of the vectors, small enough to be projected."""
    # What has a shape is one array, be it in memory or mapped from a file.
    arrays = [cast(NDArray[Any], vectors)] if hasattr(vectors, "shape") else vectors
    dimensions = None
    for array in arrays:
        if array.ndim != 2 or 0 in array.shape[1:]:
            raise InvalidSpec(f"Vectors to index are [N, D], but these are {array.shape}.")
        if array.shape[1] != (dimensions or array.shape[1]):
            raise InvalidSpec(
                f"A block has vectors of {array.shape[1]} numbers, the first had {dimensions}."
            )
        dimensions = array.shape[1]
        rows = max(1, _PROJECTED // dimensions)
        for start in range(0, len(array), rows):
            yield array[start : start + rows]


def _project(vectors: NDArray[Any], directions: Floats) -> NDArray[np.float32]:
    """The projections [L, m, n] of `vectors` [n, D] on `directions` [L, m, D]."""
    # In float64 before they are rounded: how BLAS orders a sum depends on where in a block a
    # vector stands, and equal vectors should have equal projections.
    with np.errstate(invalid="ignore", over="ignore"):
        projected = np.tensordot(directions, np.asarray(vectors, np.float64), (2, 1))
        rounded = projected.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise InvalidSpec("A vector has a number that is not finite, or too large.")
    return rounded


def _euclidean(vectors: NDArray[Any]) -> Distances:
    # In float32 where the numbers are bytes or floats of that size. The squares of 256 differences
    # of bytes add up without rounding there; what 256 make is added in float64.
    dimensions = vectors.shape[1]
    rows = max(1, _COMPARED // dimensions)
    parts = math.ceil(dimensions / 256)

    def distances(query: NDArray[Any], ids: Ids) -> Floats:
        dtype = np.result_type(vectors, query, np.float32)
        apart = np.zeros((rows, parts * 256), dtype)
        squared = np.empty(len(ids))
        for start in range(0, len(ids), rows):
            near = vectors[ids[start : start + rows]]
            np.subtract(near, query, out=apart[: len(near), :dimensions], dtype=dtype)
            split = apart[: len(near)].reshape(-1, parts, 256)
            squared[start : start + rows] = np.vecdot(split, split).sum(1, dtype=np.float64)
        return np.sqrt(squared)

    return distances
