"""What holds on a whole polytope: its worst point by search, and a proof that there is none.

Both look at the convex hull of K corner images, at the *margin* of one class: its logit minus the
greatest other one. `worst_point` looks for the least margin and so shows violations; that it finds
none proves nothing. `certify` bounds the margin from below on simplices that together are the
hull. It proves the hull of the images that it is given: of the float corners, or of the 8-bit
ones that a user downloads, whose rounded mixtures lie in neither.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core import bounds
from core.interpolate import chunk, probability_of, simplex_weights
from core.program import UnsupportedNetwork, read
from core.taps import Tap, matmul_precision

STARTS, STEPS = 64, 100
# Of corners, midpoints and the centroid so many at most are looked at for those to start from.
LOOKED = 1024
# Of the simplex, whose edges are sqrt(2) long: steps begin across it and end at a 500th of that.
FIRST_STEP, LAST_STEP = 0.5, 1e-3
# Every so many steps those within such a part of a step of each other become one.
MEETINGS, MET = 10, 0.25
# Bytes that bounding one batch of simplices may take.
MEMORY = 2**31
# Where not even so much of the way from the centroid to a corner can be proved, the hull cannot be.
PROBE = 1e-3
# Simplices bounded together, at most: more gain nothing on a CPU and see the clock less often.
BATCH = 16
# Points between the corners where the network is compared with what was read of it.
BETWEEN = 8
# Weights that differ by less are not halved: their binary fractions come to an end.
LEAST_EDGE = 2.0**-40


@dataclass(frozen=True)
class WorstPoint:
    """The point of a polytope with the least margin that a search has seen.

    `weights` [K] are float64, `image` [C, H, W] is their mixture of the corners. `margin` is of
    the float32 logits, negative where the network takes the image for another class, `label`;
    `probability` is that of the class that the polytope should have.
    """

    weights: Tensor
    image: Tensor
    margin: float
    label: int
    probability: float


@dataclass(frozen=True)
class Certificate:
    """What is proved of a polytope, in exact arithmetic (`core.bounds` says of what network).

    `certified`: every point has the class, by a margin of at least `bound`. `refuted`: the mixture
    `weights` [K] has not, by a plain forward pass in float32. `unknown`: for `reason`; of the
    polytope's volume `certified_fraction` is proved. `bound` is below all margins in every case,
    None where not even that much is known. `subsimplices` counts those that were bounded. A float32
    evaluation of logits, added up in whatever order, is nowhere off by more than `float32_error`:
    with `holds_in_float32` that leaves every point its class.
    """

    outcome: Literal["certified", "refuted", "unknown"]
    bound: float | None
    subsimplices: int
    certified_fraction: float
    seconds: float
    weights: Tensor | None = None
    reason: str | None = None
    float32_error: float | None = None

    @property
    def holds_in_float32(self) -> bool | None:
        """None where nothing is certified."""
        if self.bound is None or self.float32_error is None:
            return None
        return self.bound > 2 * self.float32_error  # both logits may be off


@matmul_precision(tf32=False)
def worst_point(
    tap: Tap,
    corners: Tensor,
    label: int,
    *,
    starts: int = STARTS,
    steps: int = STEPS,
    seed: int = 0,
    mixes: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> WorstPoint:
    """Projected gradient descent of the margin of `label` over mixtures of `corners` [K, C, H, W].

    It starts from all corners, all midpoints of two, the centroid, and uniform draws up to
    `starts`; where there are more than that, from those with the least margins. So no corner has
    a margin below what is found. With `mixes` (`core.taps.mixes`) the first layer is computed for
    the corners only. `on_step` is called after each step.
    """
    corners = corners.detach()

    def look(weights: Tensor) -> tuple[Tensor, Tensor]:
        """Margins [N] and their gradients [N, K]."""
        leaf = weights.detach().to(corners.dtype).requires_grad_()
        with torch.enable_grad():
            if mixes:
                logits = tap.observe_mixtures(corners, leaf)[1]
            else:
                logits = tap.logits(_mixtures(leaf, corners))
            found = margins_of(logits, label)
            (gradient,) = torch.autograd.grad(found.sum(), leaf)
        return found.detach(), gradient.double()

    def look_at_all(weights: Tensor) -> tuple[Tensor, Tensor]:
        parts = weights.split(chunk(corners[0]))
        found, gradients = zip(*map(look, parts), strict=True)
        return torch.cat(found), torch.cat(gradients)

    begin = _starts(len(corners), starts, seed).to(corners.device)
    if len(begin) > starts:
        found, _ = look_at_all(begin)
        begin = begin[found.argsort(stable=True)[:starts].sort().values]
        on_step()
    best = _descend(look_at_all, begin, steps, on_step)
    # Kernels for few images round unlike those for many: what is told is true of this image alone.
    image = _mixtures(best[None], corners)
    with torch.no_grad():
        logits = tap.logits(image)
    return WorstPoint(
        weights=best,
        image=image[0],
        margin=float(margins_of(logits, label)),
        label=int(logits.argmax()),
        probability=float(probability_of(label, logits)),
    )


@torch.no_grad()
@matmul_precision(tf32=False)
def certify(
    tap: Tap,
    corners: Tensor,
    label: int,
    *,
    candidate: Tensor | None = None,
    max_seconds: float = 10.0,
    max_subsimplices: int = 100_000,
    on_step: Callable[[], None] = lambda: None,
) -> Certificate:
    """Proves or refutes that all mixtures of `corners` [K, C, H, W] get `label`.

    Branch and bound: of the simplices that are not proved the one with the least bound is bisected
    at its longest edge, a batch at a time, until none is left, a point refutes it, or the time or
    the number of simplices is used up. Points tried are the weights `candidate` [K] of a worst
    point, the corners, and centres on the way. The clock decides nothing but where that ends;
    a batch under way is finished.
    """
    return _Search(tap, corners, label, max_seconds, max_subsimplices, on_step).run(candidate)


def _starts(corners: int, least: int, seed: int) -> Tensor:
    """Barycentric weights [N, K] in float64, N >= `least`; at most that, or LOOKED."""
    rng = np.random.default_rng([seed, 2])
    vertices = torch.eye(corners, dtype=torch.float64)
    first, second = torch.triu_indices(corners, corners, 1)
    if (room := max(least, LOOKED) - corners - 1) < len(first):
        some = torch.from_numpy(np.sort(rng.choice(len(first), room, replace=False)))
        first, second = first[some], second[some]
    midpoints = (vertices[first] + vertices[second]) / 2
    given = torch.cat([vertices, midpoints, vertices.mean(0, keepdim=True)])
    drawn = simplex_weights("uniform", max(0, least - len(given)), corners, rng)
    return torch.cat([given, torch.from_numpy(drawn)])


def _descend(
    look: Callable[[Tensor], tuple[Tensor, Tensor]],
    weights: Tensor,
    steps: int,
    on_step: Callable[[], None],
) -> Tensor:
    """Of the ways from `weights` [N, K] downhill the place [K] where it is lowest.

    Ways that have met, to within a part of a step, go on as one: the better.
    """
    least, where = math.inf, weights[0]
    decay = (LAST_STEP / FIRST_STEP) ** (1 / max(1, steps - 1))
    for step in range(steps + 1):
        found, gradient = look(weights)
        best = int(found.argmin())
        if float(found[best]) < least:
            least, where = float(found[best]), weights[best]
        # Along the simplex, and of length 1 whatever the network's scale.
        gradient = gradient - gradient.mean(1, keepdim=True)
        gradient = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-30)
        length = FIRST_STEP * decay**step
        before = weights
        # Once more, since on a face most of the first may point out of it.
        moved = project_to_simplex(before - length * gradient) - before
        moved = moved * (length / moved.norm(dim=1, keepdim=True).clamp(min=1e-9))
        weights = project_to_simplex(before + moved)
        on_step()
        if torch.equal(weights, before):  # held at corners and faces: so would shorter steps be
            break
        if step % MEETINGS == 0:
            weights = weights[_apart(weights, found, length * MET)]
    return where


def _apart(weights: Tensor, found: Tensor, radius: float) -> list[int]:
    """Of `weights` [N, K] the best by `found` [N] of all that lie within `radius` of each other."""
    near = (torch.cdist(weights, weights) < radius).tolist()
    kept: list[int] = []
    for i in found.argsort(stable=True).tolist():
        if not any(near[i][other] for other in kept):
            kept.append(i)
    return sorted(kept)


def _between(corners: int) -> Tensor:
    """Weights [N, K] of points between all corners, and between every corner and the next."""
    drawn = simplex_weights("uniform", BETWEEN, corners, np.random.default_rng(3))
    vertices = torch.eye(corners, dtype=torch.float64)
    return torch.cat([torch.from_numpy(drawn), (vertices + vertices.roll(1, 0)) / 2])


def project_to_simplex(points: Tensor) -> Tensor:
    """The nearest barycentric weights [N, K] to `points` [N, K], exactly: by sorting.

    They are relu(points - t), t being such that they add up to 1 (Held, Wolfe, Crowder 1974).
    """
    falling = points.sort(dim=1, descending=True).values
    count = torch.arange(1, points.shape[1] + 1, device=points.device)
    threshold = (falling.cumsum(1) - 1) / count
    support = (falling > threshold).sum(1, keepdim=True)
    return (points - threshold.gather(1, support - 1)).clamp(min=0)


def _mixtures(weights: Tensor, corners: Tensor) -> Tensor:
    mixed: Tensor = torch.tensordot(weights.to(corners.dtype), corners, dims=1)
    return mixed


def margins_of(logits: Tensor, label: int) -> Tensor:
    """[N] in float64: logit `label` minus the greatest other one."""
    wide = logits.double()
    others = wide.index_fill(1, torch.tensor([label], device=wide.device), -math.inf)
    return wide[:, label] - others.amax(1)


class _Search:
    """The state of one branch and bound.

    `open` is a heap of simplices that are not proved: bound, number, depth, weights [K, K] of the
    vertices. Halves have binary fractions as weights, so that these are exact.
    """

    def __init__(
        self,
        tap: Tap,
        corners: Tensor,
        label: int,
        max_seconds: float,
        max_subsimplices: int,
        on_step: Callable[[], None],
    ) -> None:
        self.began = time.perf_counter()
        self.tap, self.corners, self.label = tap, corners.detach(), label
        self.max_seconds, self.max_subsimplices = max_seconds, max_subsimplices
        self.on_step = on_step
        self.wide = self.corners.to("cpu", torch.float64)
        centred = (self.wide - self.wide.mean(0)).flatten(1)
        self.gram = centred @ centred.T
        self.open: list[tuple[float, int, int, Tensor]] = []
        self.count, self.proved, self.least_proved = 0, 0.0, math.inf

    def run(self, candidate: Tensor | None) -> Certificate:
        root = torch.eye(len(self.wide), dtype=torch.float64)
        centroid = root.mean(0, keepdim=True)
        points = [root, centroid]
        if candidate is not None:
            points.append(candidate.to(root)[None])
        if (found := self._refuting(torch.cat(points))) is not None:
            return self._end("refuted", weights=found)
        try:
            images = _mixtures(torch.cat([*points, _between(len(self.wide))]), self.wide)
            shape = tuple(self.wide.shape[1:])
            self.program = read(self.tap.normalize, self.tap.network, shape, images)
        except UnsupportedNetwork as error:
            return self._end("unknown", reason=str(error))
        size = self._bytes()
        if size > MEMORY:
            return self._end(
                "unknown",
                reason=f"Bounding a simplex of {len(root)} corners on this network takes "
                f"{size / 2**30:.1f} GiB, more than the {MEMORY / 2**30:.0f} that it may.",
            )
        way = torch.cat([centroid, centroid + PROBE * (root[:1] - centroid)])
        if self._bounds(way[None])[0] <= 0:
            return self._end(
                "unknown",
                reason="The bounds are too loose for this network: they prove nothing even of a "
                f"{1 / PROBE:.0f}th of the way from the centroid to a corner.",
            )
        self._bound(root[None], [0], [-math.inf])
        for batch in self._batches():
            simplices = torch.stack([simplex for *_, simplex in batch])
            found = self._refuting(simplices.mean(1))
            halves = None if found is not None else self._bisect(simplices)
            if halves is None:
                self.open += batch
                if found is not None:
                    return self._end("refuted", weights=found)
                return self._end(
                    "unknown",
                    reason="A point's margin is lost in rounding: no simplex around it can be "
                    "halved exactly any more.",
                )
            self._bound(
                halves,
                depths=[depth + 1 for _, _, depth, _ in batch for _ in range(2)],
                inherited=[bound for bound, *_ in batch for _ in range(2)],
            )
            self.on_step()
        if not self.open:
            return self._end("certified")
        spent = "time" if self._seconds() >= self.max_seconds else "number of simplices"
        return self._end("unknown", reason=f"The {spent} that was allowed is used up.")

    def _batches(self) -> Iterator[list[tuple[float, int, int, Tensor]]]:
        """Open simplices to divide, those of least bound first, ever more at a time."""
        room = max(1, min(BATCH, MEMORY // self._bytes()) // 2)
        most = min(self.max_subsimplices, MEMORY // (8 * self.gram.numel()))
        wanted = 1
        while self.open and self._seconds() < self.max_seconds:
            size = min(wanted, len(self.open), (most - self.count) // 2)
            if size < 1:
                return
            yield [heapq.heappop(self.open) for _ in range(size)]
            wanted = min(2 * wanted, room)

    def _bound(self, simplices: Tensor, depths: Sequence[int], inherited: Sequence[float]) -> None:
        """Bounds `simplices` [N, K, K] and keeps those that are not proved.

        What held of the larger simplex, the bound `inherited`, holds of its halves.
        """
        found = self._bounds(simplices)
        for simplex, depth, *both in zip(simplices, depths, found, inherited, strict=True):
            self.count += 1
            if (bound := max(both)) > 0:
                self.proved += 2.0**-depth
                self.least_proved = min(self.least_proved, bound)
            else:
                heapq.heappush(self.open, (bound, self.count, depth, simplex))

    def _bounds(self, simplices: Tensor) -> list[float]:
        vertices = bounds.mix(self.wide, simplices)
        room = MEMORY // 64
        return bounds.margin_bounds(self.program, vertices, self.label, coefficients=room).tolist()

    def _bisect(self, simplices: Tensor) -> Tensor | None:
        """Both halves of each of `simplices` [N, K, K], in turn.

        None if one is a point, or if a midpoint is none in float64: its halves would not be all of
        the simplex.
        """
        n, k, _ = simplices.shape
        products = simplices @ self.gram @ simplices.mT
        squares = products.diagonal(dim1=1, dim2=2)
        lengths = squares[:, :, None] + squares[:, None] - 2 * products
        longest = lengths.triu(1).flatten(1).argmax(1)
        one, other = longest // k, longest % k
        rows = torch.arange(n)
        if bool((simplices[rows, one] - simplices[rows, other]).abs().amax(1).lt(LEAST_EDGE).any()):
            return None
        both = simplices[rows, one] + simplices[rows, other]
        # A sum is exact if and only if each part is what is left without the other.
        left = both - simplices[rows, one], both - simplices[rows, other]
        if not (left[0].equal(simplices[rows, other]) and left[1].equal(simplices[rows, one])):
            return None
        middle = both / 2
        halves = simplices.repeat_interleave(2, 0)
        halves[2 * rows, one] = middle
        halves[2 * rows + 1, other] = middle
        return halves

    def _refuting(self, weights: Tensor) -> Tensor | None:
        """The worst of the points `weights` [N, K], if the network takes it for another class."""
        points = weights.to(self.corners.device)
        margins = torch.cat(
            [
                margins_of(self.tap.logits(_mixtures(part, self.corners)), self.label)
                for part in points.split(chunk(self.corners[0]))
            ]
        )
        return weights[margins.argmin()] if bool((margins < 0).any()) else None

    def _bytes(self) -> int:
        """What bounding one simplex takes, about: both bounds of all steps, and of a few twice."""
        k = len(self.wide)
        return 8 * (2 * k * self.program.floats + 16 * k * self.program.widest)

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def _end(
        self,
        outcome: Literal["certified", "refuted", "unknown"],
        weights: Tensor | None = None,
        reason: str | None = None,
    ) -> Certificate:
        least = min([self.least_proved, *(bound for bound, *_ in self.open)])
        error = None
        if outcome == "certified":
            root = bounds.mix(self.wide, torch.eye(len(self.wide), dtype=torch.float64)[None])
            enclosures = bounds.forward(self.program, root)
            error = float(bounds.float32_error(self.program, enclosures).max())
        return Certificate(
            outcome=outcome,
            bound=least if math.isfinite(least) else None,
            subsimplices=self.count,
            certified_fraction=1.0 if outcome == "certified" else self.proved,
            seconds=self._seconds(),
            weights=weights,
            reason=reason,
            float32_error=error,
        )
