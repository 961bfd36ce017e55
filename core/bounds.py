"""Affine bounds on everything that a network computes on a simplex of images.

A function that is affine on a simplex is its values at the K vertices. So two tensors
[S, K, ...], `lower` and `upper`, enclose an activation on each of S simplices: at the point with
barycentric weights w it lies between `sum_k w_k lower_k` and `sum_k w_k upper_k`. Two passes use
that. The forward pass encloses every step. The backward pass starts from a difference of logits
and replaces each step by an affine function of its inputs, on the right side of it, until only the
image is left; it keeps what the forward pass forgets, that two units depend on the same image.

What is proved: a statement on the network with its float32 weights, evaluated in exact real
arithmetic on images that are mixtures, in exact arithmetic, of the corners. The bounds are computed
in float64 and widened by what rounding can have cost: with u = 2^-53, a sum of n products comes
out within gamma_n = n u / (1 - n u) of the sum of the products' sizes, in whatever order it is
added (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). So this runs on the CPU, whose
kernels for float64 are sums of products. How far a float32 evaluation may stray from exact
arithmetic is another matter: `float32_error`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from core.program import Program, Step, transposed

UNIT, UNIT_32 = 2.0**-53, 2.0**-24
# Far above what underflow can lose in a sum, far below anything that matters.
TINY = 1e-290
# Numbers in a tensor of coefficients for many units: larger ones come as fresh pages each time,
# which takes twice as long as computing with them.
CHUNK = 2**21


@dataclass(frozen=True)
class Enclosure:
    """Affine bounds of one activation on S simplices, by their values at the K vertices.

    Both are [S, K, ...], `lower <= upper`.
    """

    lower: Tensor
    upper: Tensor

    def size(self) -> Tensor:
        """[S, ...]: no absolute value in the simplex is larger."""
        return torch.maximum(self.lower.abs(), self.upper.abs()).amax(1)

    def range(self) -> tuple[Tensor, Tensor]:
        """Least and greatest value in the simplex, [S, ...] each."""
        return self.lower.amin(1), self.upper.amax(1)


def margin_bounds(
    program: Program, vertices: Enclosure, label: int, *, coefficients: int = 2**27
) -> Tensor:
    """[S]: on each simplex, logit `label` exceeds every other by no less than this.

    `vertices` are those of `mix`. Each difference of logits gets the better of its forward and its
    backward bound; backward takes so many simplices at a time that its coefficients are not more
    than `coefficients` numbers, and is left out where one has more. NaN, from numbers that
    overflow, becomes minus infinity.
    """
    enclosures = forward(program, vertices)
    logits = enclosures[-1]
    differences = logits.lower[..., label, None] - logits.upper
    differences = torch.nextafter(differences, torch.full_like(differences, -math.inf))
    bounds = differences.amin(1)
    bounds[:, label] = math.inf
    bounds.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    simplices = (bounds <= 0).any(1).nonzero()[:, 0]
    rivals = (bounds <= 0).any(0).nonzero()[:, 0]
    size = coefficients // (max(1, len(rivals)) * program.widest)
    for part in simplices.split(size) if size else ():
        inside = [Enclosure(e.lower[part], e.upper[part]) for e in enclosures]
        start = functional.one_hot(rivals, bounds.shape[1]).to(bounds).neg()
        start[:, label] = 1
        start = start.expand(len(part), -1, -1)
        better = backward(program, inside, start, len(program.steps) - 1).amin(2)
        at = part[:, None], rivals
        bounds[at] = torch.maximum(bounds[at], better.nan_to_num(nan=-math.inf))
    return bounds.amin(1)


def mix(corners: Tensor, weights: Tensor) -> Enclosure:
    """The mixtures `weights` [S, K, C] of `corners` [C, ...], as vertices of S simplices.

    The weights are taken as exact; what rounding the mixture costs is in the enclosure.
    """
    flat = corners.flatten(1)
    centre, size = weights @ flat, weights.abs() @ flat.abs()
    radius = _gamma(2 * len(corners) + 16) * size + TINY
    shape = (*weights.shape[:2], *corners.shape[1:])
    return _outward(centre.view(shape), radius.view(shape))


def forward(program: Program, vertices: Enclosure) -> list[Enclosure]:
    """An enclosure of every step, the image's first."""
    enclosures = [vertices]
    for index, step in enumerate(program.steps[1:], 1):
        inputs = [enclosures[i] for i in step.inputs]
        enclosures.append(FORWARD[step.operation](step, inputs))
        if index in program.refined:
            enclosures[index] = _refine(program, enclosures, index)
    return enclosures


def _refine(program: Program, enclosures: Sequence[Enclosure], index: int) -> Enclosure:
    """The enclosure of step `index` [S, K, units], from backward where the next clamp bends it.

    Not back to the image, which would cost as much for each unit as for a logit: this far already
    it divided the sub-simplices that hulls of `mnist-cnn` need by four, further by little more.
    """
    plain = enclosures[index]
    low, top = plain.range()
    bends = (low < 0) & (top > 0)
    most = int(bends.sum(1).max())
    if not most:
        return plain
    # Of each simplex as many units; those that do not bend fill the places up.
    units = bends.to(torch.uint8).argsort(1, descending=True)[:, :most]
    one = functional.one_hot(units, low.shape[1]).to(low)
    size = max(1, CHUNK // (len(low) * program.widest))
    found = torch.cat(
        [
            backward(program, enclosures, start, index, program.refined[index])
            for start in torch.cat([one, -one], 1).split(size, 1)
        ],
        1,
    )
    lower, upper = found[:, :most].mT, -found[:, most:].mT
    at = units[:, None].expand(-1, lower.shape[1], -1)
    return Enclosure(
        plain.lower.scatter(2, at, _pick(plain.lower.gather(2, at), lower, better=torch.gt)),
        plain.upper.scatter(2, at, _pick(plain.upper.gather(2, at), upper, better=torch.lt)),
    )


def backward(
    program: Program, enclosures: Sequence[Enclosure], start: Tensor, index: int, stop: int = 0
) -> Tensor:
    """[S, R, K]: affine lower bounds of `start` [S, R, ...] times what step `index` gives.

    `enclosures` are those of `forward`, at least up to there; from step `stop` back, these end the
    way.
    """
    k = enclosures[0].lower.shape[1]
    # Coarse, but one for all; the factors leave room for what rounding makes of `error` itself.
    gamma = _gamma(4 * (program.terms + k) + 64)
    bounds, error = start.new_zeros(*start.shape[:2], k), start.new_zeros(start.shape[:2])
    waiting = {index: start}
    while waiting:
        index = max(waiting)
        coefficients, output = waiting.pop(index), enclosures[index]
        if index <= stop:
            size = output.size()
            bounds += _dot(coefficients.clamp(min=0), output.lower)
            bounds += _dot(coefficients.clamp(max=0), output.upper)
        else:
            step = program.steps[index]
            inputs = [enclosures[i] for i in step.inputs]
            rule = BACKWARD[step.operation]
            passed, constant, size = rule(step, coefficients, inputs, output)
            bounds += constant
            for i, part in zip(step.inputs, passed, strict=True):
                waiting[i] = waiting[i] + part if i in waiting else part
        error += gamma * _dot(coefficients.abs(), size[:, None])[..., 0]
    return bounds - 2 * error[..., None] - TINY


def float32_error(program: Program, enclosures: Sequence[Enclosure]) -> Tensor:
    """[S, classes]: how far a float32 evaluation of the logits may be from exact arithmetic.

    For any point of the simplices, mixed in float32 or rounded to it, if every sum of products is
    added in float32, in whatever order: no TF32, no transforms as in Winograd's convolutions.
    """
    corners = enclosures[0].lower.shape[1]
    errors = [enclosures[0].size() * _gamma(corners + 2, UNIT_32)]
    for step in program.steps[1:]:
        inputs = [errors[i] for i in step.inputs]
        if step.affine is not None:
            gamma = _gamma(step.affine.terms + 2, UNIT_32)
            sizes = [enclosures[i].size() for i in step.inputs]
            rounded = [e + gamma * (size + e) for e, size in zip(inputs, sizes, strict=True)]
            error = step.affine.absolute(*rounded) + gamma * step.affine.bias_size
        elif step.operation == "max_pool":
            assert step.apply is not None
            error = step.apply(inputs[0])[0]
        elif step.apply is not None:
            error = step.apply(*inputs)
        else:  # clipping brings no two numbers further apart
            error = inputs[0]
        errors.append(error * (1 + 1e-9))
    return errors[-1]


# Rules of the forward pass: (step, enclosures of its inputs) -> enclosure of its output.


def _forward_affine(step: Step, inputs: Sequence[Enclosure]) -> Enclosure:
    """Centre and radius: |W| takes each input's own deviation, whatever the weight's sign."""
    assert step.affine is not None
    gamma = _gamma(2 * step.affine.terms + 16)
    centres, radii = [], []
    for enclosure in inputs:
        centre = (enclosure.lower + enclosure.upper) / 2
        radius = torch.maximum(enclosure.upper - centre, centre - enclosure.lower)
        centres.append(centre.flatten(0, 1))
        radii.append((radius + gamma * (centre.abs() + radius)).flatten(0, 1))
    centre = step.affine.linear(*centres) + step.affine.bias
    radius = step.affine.absolute(*radii) + gamma * step.affine.bias_size + TINY
    shape = inputs[0].lower.shape[:2]
    return _outward(centre.unflatten(0, shape), radius.unflatten(0, shape))


def _forward_rearrange(step: Step, inputs: Sequence[Enclosure]) -> Enclosure:
    assert step.apply is not None
    lower = step.apply(*(e.lower.flatten(0, 1) for e in inputs))
    upper = step.apply(*(e.upper.flatten(0, 1) for e in inputs))
    shape = inputs[0].lower.shape[:2]
    return Enclosure(lower.unflatten(0, shape), upper.unflatten(0, shape))


def _forward_clip(step: Step, inputs: Sequence[Enclosure]) -> Enclosure:
    """Clamping to [0, high]: the least, on average, of three affine bounds on each side.

    Above, relu at the vertices: relu is convex, so by Jensen's inequality its mixtures stay under
    mixtures of it, and clamping is never above relu. Or a line over the clamp's graph, or one that
    is constant. Below, the same turned about: min(x, high) is concave and never above the clamp.
    """
    (inner,) = inputs
    above, below = _lines(inner, step.high)
    upper, lower = inner.upper.clamp(min=0), inner.lower.clamp(max=step.high)
    for line in above:
        upper = _pick(upper, line(inner.upper), better=torch.lt)
    for line in below:
        lower = _pick(lower, line(inner.lower), better=torch.gt)
    return Enclosure(lower, upper)


def _forward_max_pool(step: Step, inputs: Sequence[Enclosure]) -> Enclosure:
    """Above, the greatest upper bound at each vertex (a maximum is convex).

    Below, one entry for all vertices, the one that is greatest on average: any entry is under the
    maximum, but an entry of its own at each vertex need not be.
    """
    assert step.apply is not None
    (inner,) = inputs
    upper = step.apply(inner.upper.flatten(0, 1))[0].unflatten(0, inner.upper.shape[:2])
    return Enclosure(_at(inner.lower, _selected(step, inner)), upper)


FORWARD: dict[str, Callable[[Step, Sequence[Enclosure]], Enclosure]] = {
    "affine": _forward_affine,
    "rearrange": _forward_rearrange,
    "clip": _forward_clip,
    "max_pool": _forward_max_pool,
}

# Rules of the backward pass: (step, coefficients [S, R, ...] of its output, enclosures of its
# inputs and output) -> coefficients of each input, what to add at the vertices [S, R, K], and what
# to multiply the rounding error of |coefficients| with [S, ...].

Passed = tuple[Sequence[Tensor], Tensor, Tensor]


def _backward_affine(
    step: Step, coefficients: Tensor, inputs: Sequence[Enclosure], output: Enclosure
) -> Passed:
    assert step.affine is not None
    passed = step.affine.transpose(coefficients.flatten(0, 1))
    constant = _dot(coefficients, step.affine.bias.expand(1, 1, *step.shape))
    size = step.affine.absolute(*(e.size() for e in inputs)) + step.affine.bias_size
    return [part.unflatten(0, coefficients.shape[:2]) for part in passed], constant, size


def _backward_rearrange(
    step: Step, coefficients: Tensor, inputs: Sequence[Enclosure], output: Enclosure
) -> Passed:
    assert step.apply is not None
    passed = transposed(step.apply, step.shapes)(coefficients.flatten(0, 1))
    passed = [part.unflatten(0, coefficients.shape[:2]) for part in passed]
    return passed, coefficients.new_zeros(()), torch.zeros_like(output.lower[:, 0])


def _backward_clip(
    step: Step, coefficients: Tensor, inputs: Sequence[Enclosure], output: Enclosure
) -> Passed:
    """Where a coefficient is negative the clamp is replaced from above, else from below.

    By the line of `_lines` that is tighter in the middle, or by the bound of the forward pass,
    which ends the way back: where the pre-activation is nearly affine, that is the tighter one.
    """
    (inner,) = inputs
    above, below = _lines(inner, step.high)
    middle = ((inner.lower + inner.upper) / 2).mean(1)
    passed, constant = torch.zeros_like(coefficients), coefficients.new_zeros(())
    for part, lines, ends, better in (
        (coefficients.clamp(max=0), above, output.upper, torch.lt),
        (coefficients.clamp(min=0), below, output.lower, torch.gt),
    ):
        slope, offset = lines[0].slope, lines[0].offset
        for line in lines[1:]:
            use = better(line.slope * middle + line.offset, slope * middle + offset)
            slope = torch.where(use, line.slope, slope)
            offset = torch.where(use, line.offset, offset)
        end = better(ends.mean(1), slope * middle + offset)
        passed += part * torch.where(end, 0, slope)[:, None]
        constant = constant + _dot(part, torch.where(end[:, None], ends, offset[:, None]))
    return [passed], constant, 8 * (inner.size() + output.size())


def _backward_max_pool(
    step: Step, coefficients: Tensor, inputs: Sequence[Enclosure], output: Enclosure
) -> Passed:
    """From below, one entry. From above, that entry and what others may exceed it by, or the end.

    max_i x_i = x_j + relu(max_{i != j} x_i - x_j), and relu, convex, is bounded at the vertices.
    """
    (inner,) = inputs
    selected = _selected(step, inner)
    assert step.windows is not None
    windows = step.windows
    entries = inner.upper.flatten(3)[..., windows.clamp(min=0)]
    others = (windows >= 0) & (windows != selected.flatten(2)[:, None, ..., None])
    rival = entries.masked_fill(~others, -math.inf).amax(-1).view_as(output.upper)
    lower = _at(inner.lower, selected)
    excess = (rival - lower).clamp(min=0)
    excess = excess + 8 * UNIT * output.size()[:, None] * (excess > 0)
    # The end costs the slack between maximum and entry, the entry half of its own and the excess.
    own = _at(inner.upper, selected)
    end = (output.upper - (lower + own) / 2).mean(1) < excess.mean(1)
    negative = coefficients.clamp(max=0)
    constant = _dot(negative, torch.where(end[:, None], output.upper, excess))
    kept = torch.where(end[:, None], coefficients.clamp(min=0), coefficients)
    s, r, channels = kept.shape[:3]
    passed = kept.new_zeros(s, r, channels, math.prod(step.shapes[0][1:]))
    index = selected.flatten(2)[:, None].expand(s, r, -1, -1)
    passed.scatter_add_(3, index, kept.flatten(3))
    return (
        [passed.view(s, r, *step.shapes[0])],
        constant,
        4 * output.size() + 4 * _at(inner.size()[:, None], selected)[:, 0],
    )


BACKWARD: dict[str, Callable[[Step, Tensor, Sequence[Enclosure], Enclosure], Passed]] = {
    "affine": _backward_affine,
    "rearrange": _backward_rearrange,
    "clip": _backward_clip,
    "max_pool": _backward_max_pool,
}


# Helpers of the rules


@dataclass(frozen=True)
class _Line:
    """slope * x + offset, [S, ...] each, of one unit's pre-activation x."""

    slope: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """At the vertices: x is [S, K, ...]."""
        return self.slope[:, None] * x + self.offset[:, None]


def _lines(inner: Enclosure, high: float) -> tuple[list[_Line], list[_Line]]:
    """Lines above, and lines below, the clamp to [0, high] on the range of each unit.

    A line is above if it is so at both ends of the range and at `high`, the kink where the clamp
    turns down; below, at the ends and at 0, where it turns up. Each list ends with the constant.
    """
    low, top = inner.range()
    least, most = low.clamp(0, high), top.clamp(0, high)
    slack = 32 * UNIT * inner.size()

    def line(slope: Tensor, kink: float, sign: int) -> _Line:
        offset = sign * torch.maximum(sign * (least - slope * low), sign * (most - slope * top))
        if math.isfinite(kink):
            bend = torch.where((low < kink) & (kink < top), kink * (1 - slope), offset)
            offset = sign * torch.maximum(sign * offset, sign * bend)
        return _Line(slope, offset + sign * slack * (slope > 0))

    def slope(start: Tensor, end: Tensor) -> Tensor:
        rise, run = end.clamp(0, high) - start.clamp(0, high), end - start
        return torch.where(run > 0, rise / run.clamp(min=TINY), 0).clamp(0, 1)

    flat = torch.zeros_like(low)
    above = [line(slope(low, top.clamp(max=high)), high, 1), line(flat, high, 1)]
    below = [line(slope(low.clamp(min=0), top), 0.0, -1), line(flat, 0.0, -1)]
    return above, below


def _pick(values: Tensor, others: Tensor, *, better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of two bounds [S, K, ...], for each unit the one that is better on average."""
    return torch.where(better(others.mean(1), values.mean(1))[:, None], others, values)


def _selected(step: Step, inner: Enclosure) -> Tensor:
    """[S, C, H', W']: in each window the entry, as an index into H x W, of greatest mean."""
    assert step.apply is not None
    index: Tensor = step.apply(((inner.lower + inner.upper) / 2).mean(1))[1]
    return index


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Entries `index` [S, C, H', W'] of the last two dimensions of [S, K, C, H, W]."""
    wanted = index.flatten(2)[:, None].expand(-1, values.shape[1], -1, -1)
    entries: Tensor = values.flatten(3).gather(3, wanted).unflatten(3, index.shape[2:])
    return entries


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[S, R, K] of [S, R, ...] and [S or 1, K, ...]."""
    product: Tensor = left.flatten(2) @ right.flatten(2).mT
    return product


def _outward(centre: Tensor, radius: Tensor) -> Enclosure:
    """`centre` minus and plus `radius`, rounded away from it."""
    infinity = torch.full_like(centre, math.inf)
    return Enclosure(
        torch.nextafter(centre - radius, -infinity), torch.nextafter(centre + radius, infinity)
    )


def _gamma(terms: int, unit: float = UNIT) -> float:
    return terms * unit / (1 - terms * unit)
