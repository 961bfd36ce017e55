"""The least margin on the edges between corners, exactly: what can be said of a hull that is
neither proved nor refuted.

On the line between two images a network whose steps are affine, clip or pick the greatest is
piecewise linear (Sotoudeh and Thakur, Computing Linear Restrictions of Neural Networks, 2019).
From step to step: as long as all that comes before is linear between two points, a unit that is
clipped, or a window that is pooled, bends where one line meets a level or another line. The edge
is cut there, and the network itself is evaluated at the new points, so that no error adds up. On a
piece that is left at the end every logit is linear, and the margin, the least of linear functions,
is concave: it is least at an end. So the least margin of all points looked at is that of the edge.

It is exact but for the rounding of float64, which is small and not bounded here: what is certified
comes from `core.certify`. Where a unit is 0 but for rounding it counts as on both sides; `pieces`
are those of the patterns of units and windows, and the logits may go straight on between two.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from core.certify import margins_of
from core.program import Program, Step, evaluate

# Of the products that were added up to a value: less is rounding. A sum of thousands is off by a
# 2^-50th of that, and what comes before it by some times as much.
ROUNDING = 2.0**-40
# Points of an edge, from 0 to 1, that are closer than this are one: pixels round to 2^-53.
APART = 2.0**-44
# Points in a stretch of an edge, at most: more gain nothing. Bytes that it may take. Numbers in the
# largest activation of one batch.
MOST, MEMORY, BATCH = 256, 2**30, 2**21
# Stretches grow while one takes no more of the time that is allowed: an unfinished one is lost.
SHARE = 0.1


@dataclass(frozen=True)
class Edges:
    """The least margin on the straight lines between every two of K corners.

    It is that of the mixture `weights` [K], float64, whose class is `label`. Of the lines' length
    `fraction` was walked, in `pieces` on which the network is linear; if that is less than all,
    `least_margin` is of this part and of the midpoints of all lines, and all would take about
    `expected_seconds` (None where not a single stretch was finished).
    """

    least_margin: float
    weights: Tensor
    label: int
    pieces: int
    fraction: float
    seconds: float
    expected_seconds: float | None


@torch.no_grad()
def walk(
    program: Program,
    corners: Tensor,
    label: int,
    *,
    max_seconds: float = math.inf,
    on_step: Callable[[], None] = lambda: None,
) -> Edges:
    """The least margin of `label` on the edges between `corners` [K, C, H, W], K > 1.

    Edges whose midpoint has the least margin come first. `on_step` is called after each batch of
    images, the clock is looked at before each but the first.
    """
    return _Walk(program, corners, label, max_seconds, on_step).run()


class _TimeUp(Exception):
    """What was allowed is used up."""


class _Walk:
    """The state of one walk.

    A place on edge `first, second` is t: the mixture (1 - t) first + t second. `most` points make
    a stretch at most, `length` is how far that is expected to reach.
    """

    def __init__(
        self,
        program: Program,
        corners: Tensor,
        label: int,
        max_seconds: float,
        on_step: Callable[[], None],
    ) -> None:
        self.began = time.perf_counter()
        self.program, self.label = program, label
        self.corners = corners.detach().to("cpu", torch.float64)
        self.max_seconds, self.on_step = max_seconds, on_step
        self.bends = [step for step in program.steps if step.operation in KINKS]
        self.tolerances = _tolerances(program, self.corners.mean(0, keepdim=True))
        self.most, self.length = 2, 1.0
        self.room = max(2, min(MOST, MEMORY // (8 * program.floats)))
        self.batch = max(1, min(self.room, BATCH // program.widest))
        self.least, self.weights, self.seen = math.inf, torch.empty(0), -1
        self.pieces, self.walked, self.walked_seconds = 0, 0.0, 0.0

    def run(self) -> Edges:
        first, second = torch.triu_indices(len(self.corners), len(self.corners), 1)
        lengths = (self.corners[first] - self.corners[second]).flatten(1).norm(dim=1)
        vertices, finished = torch.eye(len(self.corners), dtype=torch.float64), False
        with suppress(_TimeUp):
            middles = (vertices[first] + vertices[second]) / 2
            margins = torch.cat([margins for _, margins in self._look(middles)])
            for edge in margins.argsort(stable=True).tolist():
                if length := float(lengths[edge]):
                    self._walk(vertices[first[edge]], vertices[second[edge]], length)
            finished = True
        fraction = 1.0 if finished else self.walked / (float(lengths.sum()) or 1.0)
        return Edges(
            least_margin=self.least,
            weights=self.weights,
            label=self.seen,
            pieces=self.pieces,
            fraction=fraction,
            seconds=self._seconds(),
            expected_seconds=(
                self.walked_seconds / fraction if fraction > 0 and not finished else None
            ),
        )

    def _walk(self, first: Tensor, second: Tensor, length: float) -> None:
        """From corner to corner of an edge, stretch by stretch."""
        place = 0.0
        while place < 1:
            began = self._seconds()
            end = place + self.length if place + self.length < 1 - APART else 1.0
            points = self._stretch(first, second, place, end)
            reached = float(points[-1])
            # An end that is no kink lies inside of a piece, which the next stretch counts.
            self.pieces += len(points) - 1 - (reached == end < 1)
            self.walked += length * (reached - place)
            self.walked_seconds = self._seconds()
            if self.walked_seconds - began < SHARE * self.max_seconds:
                self.most = min(2 * self.most, self.room)
            self.length = (reached - place) / (len(points) - 1) * self.most
            place = reached

    def _stretch(self, first: Tensor, second: Tensor, start: float, end: float) -> Tensor:
        """Places from `start` on, in order, between which the network is linear.

        The last is `end`, or a kink before it where they were becoming more than `most`.
        """

        def look(places: Tensor, bends: Sequence[Step]) -> list[Tensor]:
            weights = torch.outer(1 - places, first) + torch.outer(places, second)
            batches = [
                [values[step.inputs[0]] for step in bends] for values, _ in self._look(weights)
            ]
            return [torch.cat(parts) for parts in zip(*batches, strict=True)]

        places = torch.tensor([start, end], dtype=torch.float64)
        inputs = look(places, self.bends)
        for number, (step, tolerance) in enumerate(zip(self.bends, self.tolerances, strict=True)):
            new = _apart(KINKS[step.operation](step, inputs.pop(0), places, tolerance), places)
            if not len(new):
                continue
            last = torch.cat([places, new]).sort().values[: self.most][-1]
            kept, new = places <= last, new[new <= last]
            looked = look(new, self.bends[number + 1 :])
            places, order = torch.cat([places[kept], new]).sort()
            inputs = [
                torch.cat([old[kept], more])[order]
                for old, more in zip(inputs, looked, strict=True)
            ]
        return places

    def _look(self, weights: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
        """What all steps give at the mixtures `weights` [N, K], and margins, batch by batch."""
        for part in weights.split(self.batch):
            if self.seen >= 0 and self._seconds() > self.max_seconds:
                raise _TimeUp
            values = evaluate(self.program, torch.tensordot(part, self.corners, dims=1))
            margins = margins_of(values[-1], self.label)
            best = int(margins.argmin())
            if float(margins[best]) < self.least:
                self.least, self.weights = float(margins[best]), part[best]
                self.seen = int(values[-1][best].argmax())
            yield values, margins
            self.on_step()

    def _seconds(self) -> float:
        return time.perf_counter() - self.began


def _tolerances(program: Program, images: Tensor) -> list[Tensor]:
    """For each step that bends, and each number that goes into it, what is 0 but for rounding.

    Of the greatest among `images` [N, C, H, W].
    """
    values, sizes = evaluate(program, images), [images.abs()]
    for step in program.steps[1:]:
        inputs = [sizes[i] for i in step.inputs]
        if step.affine is not None:
            summed = step.affine.absolute(*(values[i].abs() for i in step.inputs))
            sizes.append(summed + step.affine.bias_size)
        elif step.apply is not None:
            moved = step.apply(*inputs)
            sizes.append(moved[0] if step.operation == "max_pool" else moved)
        else:
            sizes.append(inputs[0])
    bends = [step for step in program.steps if step.operation in KINKS]
    return [ROUNDING * sizes[step.inputs[0]].amax(0) for step in bends]


def _apart(new: Tensor, places: Tensor) -> Tensor:
    """Of `new` in rising order those that are apart from each other and from `places`, in order."""
    new = new.sort().values
    new = new[new.diff(prepend=new.new_full((1,), -1.0)) > APART]
    after = torch.searchsorted(places, new).clamp(1, len(places) - 1)
    return new[(new - places[after - 1] > APART) & (places[after] - new > APART)]


# Where steps bend: (step, what goes into it [N, ...], at places [N], tolerance [...]) -> places, in
# any order. Between two places in turn all that goes in is linear.


def _clip_kinks(step: Step, inner: Tensor, places: Tensor, tolerance: Tensor) -> Tensor:
    """Where a unit passes 0 or `high`."""
    kinks = []
    for level in {0.0, step.high} - {math.inf}:
        above, below = inner > level + tolerance, inner < level - tolerance
        passes = (above[:-1] & below[1:]) | (below[:-1] & above[1:])
        at = passes.flatten(1).nonzero()[:, 0]
        start, end = inner[:-1][passes], inner[1:][passes]
        part = (level - start) / (end - start)
        kinks.append(places[at] + part * (places[at + 1] - places[at]))
    return torch.cat(kinks)


def _max_pool_kinks(step: Step, inner: Tensor, places: Tensor, tolerance: Tensor) -> Tensor:
    """Where another entry of a window becomes the greatest: the kinks of its upper envelope.

    From the entry that is greatest, of several the steepest, to the first that overtakes it, until
    that is greatest at the end.
    """
    assert step.apply is not None
    assert step.windows is not None
    picked = step.apply(inner)[1].flatten(2)
    at, channel, window = (picked[:-1] != picked[1:]).nonzero().T
    entries, channel = step.windows[window], channel[:, None]
    entries = torch.where(entries < 0, picked[at, channel[:, 0], window][:, None], entries)
    slack = tolerance.flatten(1)[channel, entries]
    start = inner.flatten(2)[at[:, None], channel, entries]
    end = inner.flatten(2)[at[:, None] + 1, channel, entries]
    slope = end - start
    first = start >= start.amax(1, keepdim=True) - slack
    last = end >= end.amax(1, keepdim=True) - 4 * slack
    greatest = slope.masked_fill(~first, -math.inf).argmax(1, keepdim=True)
    kinks = [places[:0]]
    for _ in range(entries.shape[1]):
        going = ~last.gather(1, greatest)[:, 0]
        at, start, slope, last, greatest = (x[going] for x in (at, start, slope, last, greatest))
        faster = slope - slope.gather(1, greatest)
        part = (start.gather(1, greatest) - start) / faster
        part, greatest = part.masked_fill(faster <= 0, math.inf).min(1, keepdim=True)
        kinks.append(places[at] + part[:, 0] * (places[at + 1] - places[at]))
    return torch.cat(kinks)


KINKS: dict[str, Callable[[Step, Tensor, Tensor, Tensor], Tensor]] = {
    "clip": _clip_kinks,
    "max_pool": _max_pool_kinks,
}
