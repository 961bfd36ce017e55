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

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from core.errors import CoreError
from core.models import Normalize

UNIT, UNIT_32 = 2.0**-53, 2.0**-24
# Far above what underflow can lose in a sum, far below anything that matters.
TINY = 1e-290
# Numbers in a tensor of coefficients for many units: larger ones come as fresh pages each time,
# which takes twice as long as computing with them.
CHUNK = 2**21


class UnsupportedNetwork(CoreError):
    """The network does something that no relaxation is known for."""

    code = "unsupported_network"


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


@dataclass(frozen=True)
class Affine:
    """`linear(*xs) + bias` of a batch [N, ...], and what bounding it takes.

    `absolute` is `linear` with the absolute values of its weights; `bias_size` no less than the
    sizes of what was added up to the bias. An output is a sum of `terms` products, counting the
    roundings that made the weights. `transpose` takes gradients at the output to the inputs.
    """

    linear: Callable[..., Tensor]
    absolute: Callable[..., Tensor]
    transpose: Callable[[Tensor], Sequence[Tensor]]
    terms: int
    bias: Tensor
    bias_size: Tensor


@dataclass(frozen=True)
class Step:
    """One operation of the network, `operation` being its key in FORWARD and BACKWARD.

    `inputs` are indices of earlier steps; step 0 is the image. `shape` and `shapes` are of one
    output and of the inputs, without the batch. Of `affine`, `apply` and `high` each operation has
    its own: `apply` moves numbers about unchanged, or picks the greatest with their indices;
    `high` is where a clipping function ends.
    """

    name: str
    operation: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    affine: Affine | None = None
    apply: Callable[..., Any] | None = None
    windows: Tensor | None = None
    high: float = math.inf


@dataclass(frozen=True)
class Program:
    """A network as a list of steps, each after its inputs; the last gives the logits."""

    steps: tuple[Step, ...]

    @cached_property
    def refined(self) -> dict[int, int]:
        """Fully connected layers that `forward` refines, each with the second affine step before.

        From one affine step to the next, backward bounds are what forward bounds are. The logits
        are left to `margin_bounds`.
        """
        affine = [i for i, step in enumerate(self.steps) if step.affine is not None]
        return {
            i: before
            for before, i in zip(affine[1:], affine[3:-1], strict=False)
            if len(self.steps[i].shape) == 1
        }

    @property
    def floats(self) -> int:
        """Numbers in one image's activations, all steps together."""
        return sum(math.prod(step.shape) for step in self.steps)

    @property
    def widest(self) -> int:
        """Numbers in the largest activation."""
        return max(math.prod(step.shape) for step in self.steps)

    @property
    def terms(self) -> int:
        """More than any sum of products has here, forward or backward."""
        products = (step.affine.terms for step in self.steps if step.affine)
        return max(self.widest, *products, 0) + 4 * len(self.steps)


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
    passed = _transposed(step.apply, step.shapes)(coefficients.flatten(0, 1))
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


# Reading a network


@dataclass(frozen=True)
class Call:
    """A call that the trace met: of `module`, or of a function with `args` after its inputs."""

    step: Step
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def options(self, *names: str) -> dict[str, Any]:
        """What was given of the settings `names`, which stand in the function's order."""
        if self.module is not None:
            return {
                name: getattr(self.module, name) for name in names if hasattr(self.module, name)
            }
        options = dict(zip(names, self.args, strict=False)) | self.kwargs
        options.pop("inplace", None)
        self.demand(set(options) <= set(names) and len(self.args) <= len(names))
        return options

    def demand(self, known: bool) -> None:
        if not known:
            raise UnsupportedNetwork(
                f"No relaxation is known for {self.step.name}, {self.step.operation} with these "
                "settings, so nothing can be proved about this network."
            )

    def affine(
        self,
        linear: Callable[..., Tensor],
        terms: int,
        *,
        absolute: Callable[..., Tensor] | None = None,
        transpose: Callable[[Tensor], Sequence[Tensor]] | None = None,
        bias: Tensor | None = None,
        bias_size: Tensor | None = None,
    ) -> Step:
        """Without `absolute` the weights of `linear` are their own absolute values."""
        offset = torch.zeros((), dtype=torch.float64) if bias is None else bias
        affine = Affine(
            linear=linear,
            absolute=absolute or linear,
            transpose=transpose or _transposed(linear, self.step.shapes),
            terms=terms,
            bias=offset,
            bias_size=offset.abs() if bias_size is None else bias_size,
        )
        return replace(self.step, operation="affine", affine=affine)

    def rearrange(self, apply: Callable[..., Tensor]) -> Step:
        return replace(self.step, operation="rearrange", apply=apply)


def read(normalize: nn.Module, network: nn.Module, shape: tuple[int, ...]) -> Program:
    """The steps of a classifier of images of `shape` (C, H, W), on a float64 copy on the CPU.

    Raises:
        UnsupportedNetwork: it cannot be traced, or does something that no relaxation is known for.
    """
    whole = copy.deepcopy(nn.Sequential(normalize, network))
    whole.to("cpu", torch.float64).to(memory_format=torch.contiguous_format)
    whole.eval().requires_grad_(False)
    probe = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    try:
        traced = fx.GraphModule(whole, _Tracer().trace(whole))
        interpreter = fx.Interpreter(traced, garbage_collect_values=False)
        logits = interpreter.run(probe.clone())
    except Exception as error:  # what a network does when it is traced is anyone's guess
        raise UnsupportedNetwork(f"This network cannot be traced: {error}") from error
    program = _translate(traced, interpreter.env, shape)
    # The trace and the readers are trusted no further than this.
    if not (isinstance(logits, Tensor) and torch.allclose(_evaluate(program, probe), logits)):
        raise UnsupportedNetwork("This network, as it was traced, computes something else.")
    return program


def _evaluate(program: Program, images: Tensor) -> Tensor:
    """The logits [N, classes] of `images` [N, C, H, W], by the program."""
    values = [images]
    for step in program.steps[1:]:
        inputs = [values[i] for i in step.inputs]
        if step.affine is not None:
            values.append(step.affine.linear(*inputs) + step.affine.bias)
        elif step.apply is not None:
            moved = step.apply(*inputs)
            values.append(moved[0] if step.operation == "max_pool" else moved)
        else:
            values.append(inputs[0].clamp(0, step.high))
    return values[-1]


def _translate(
    traced: fx.GraphModule, values: dict[fx.Node, Any], shape: tuple[int, ...]
) -> Program:
    steps = [Step("image", "image", (), shape, ())]
    places: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            (result,) = node.args
            if not isinstance(result, fx.Node) or result not in places:
                raise UnsupportedNetwork("This network returns more than its logits.")
            return Program(tuple(steps[: places[result] + 1]))
        if not isinstance(values[node], Tensor) or node.op == "get_attr":
            continue
        if node.op == "placeholder":
            places[node] = 0
            continue
        call = _call(traced, node, values, places, steps)
        step = READERS[call.step.operation](call)
        if step is None:
            places[node] = call.step.inputs[0]
        else:
            places[node] = len(steps)
            steps.append(step)
    raise UnsupportedNetwork("This network returns nothing.")


def _call(
    traced: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    places: dict[fx.Node, int],
    steps: list[Step],
) -> Call:
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = type(module) if module is not None else node.target
    if kind not in OPERATIONS:
        what = getattr(kind, "__name__", kind)
        raise UnsupportedNetwork(
            f"No relaxation is known for {what} ({node.name}), so nothing can be proved about this "
            "network."
        )
    first = node.args[0] if node.args else None
    sources = list(first) if isinstance(first, (list, tuple)) else [first]
    args = node.args[1:]
    if OPERATIONS[kind] == "add":
        sources, args = list(node.args), ()
    inputs = tuple(places[s] for s in sources if isinstance(s, fx.Node) and s in places)
    call = Call(
        Step(
            name=node.name,
            operation=OPERATIONS[kind],
            inputs=inputs,
            shape=tuple(values[node].shape[1:]),
            shapes=tuple(steps[i].shape for i in inputs),
        ),
        module,
        tuple(_concrete(arg, values) for arg in args),
        {name: _concrete(value, values) for name, value in node.kwargs.items()},
    )
    call.demand(len(inputs) == len(sources) and len(values[node]) == 2)
    if call.step.operation not in VIEWS:
        call.demand(_is_sole_user(node, values))
    if module is not None:  # whose hooks may change what comes out
        call.demand(not module._forward_hooks and not module._forward_pre_hooks)
    return call


def _concrete(argument: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(argument, lambda node: values[node])


def _storage(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


def _is_sole_user(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether nobody else sees what `node` overwrites, if it works in place, or a view of it."""
    seen: Any = node.args[0]
    while isinstance(seen, fx.Node) and _storage(values[seen]) == _storage(values[node]):
        if len(seen.users) > 1:
            return False
        seen = seen.args[0] if seen.args else None
    return True


class _Tracer(fx.Tracer):
    """Leaves whole whatever has a reader."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OPERATIONS or super().is_leaf_module(m, module_qualified_name)


def _transposed(
    linear: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]]
) -> Callable[[Tensor], Sequence[Tensor]]:
    """The transpose of a linear function of tensors of `shapes`, from its derivative."""

    def transpose(coefficients: Tensor) -> Sequence[Tensor]:
        zeros = [coefficients.new_zeros(len(coefficients), *shape) for shape in shapes]
        parts: Sequence[Tensor] = torch.func.vjp(linear, *zeros)[1](coefficients)
        return parts

    return transpose


# Readers: a call -> its step, or None where the output is the input.


def _read_linear(call: Call) -> Step:
    weight, bias = call.module.weight, call.module.bias
    return call.affine(
        lambda x: x @ weight.T,
        weight.shape[1],
        absolute=lambda x: x @ weight.abs().T,
        transpose=lambda c: [c @ weight],
        bias=bias,
    )


def _read_convolution(call: Call) -> Step:
    module, (shape,) = call.module, call.step.shapes
    call.demand(module.padding_mode == "zeros" and not isinstance(module.padding, str))
    weight, absolute = module.weight, module.weight.abs()
    settings = (module.stride, module.padding, module.dilation, module.groups)
    return call.affine(
        lambda x: functional.conv2d(x, weight, None, *settings),
        weight[0].numel(),
        absolute=lambda x: functional.conv2d(x, absolute, None, *settings),
        transpose=lambda c: [conv2d_input((len(c), *shape), weight, c, *settings)],
        bias=None if module.bias is None else module.bias.view(-1, 1, 1),
    )


def _read_batch_norm(call: Call) -> Step:
    module = call.module
    call.demand(module.running_mean is not None)
    gain = 1 / (module.running_var + module.eps).sqrt()
    shift = torch.zeros_like(gain)
    if module.affine:
        gain, shift = gain * module.weight, module.bias
    moved = module.running_mean * gain
    return _scale(call, gain.view(-1, 1, 1), shift - moved, shift.abs() + moved.abs())


def _read_normalize(call: Call) -> Step | None:
    module = call.module
    if module.identity and not module.reverse:
        return None
    order = (lambda x: x.flip(1)) if module.reverse else (lambda x: x)
    return _scale(call, module.gain, module.offset, module.offset.abs(), order)


def _scale(
    call: Call,
    gain: Tensor,
    bias: Tensor,
    bias_size: Tensor,
    order: Callable[[Tensor], Tensor] = lambda x: x,
) -> Step:
    """Channel by channel. Its constants are rounded up to six times."""
    return call.affine(
        lambda x: order(x) * gain,
        8,
        absolute=lambda x: order(x) * gain.abs(),
        bias=bias.view(-1, 1, 1),
        bias_size=bias_size.view(-1, 1, 1),
    )


def _read_add(call: Call) -> Step:
    call.demand(not call.kwargs and call.step.shapes == (call.step.shape,) * 2)
    return call.affine(operator.add, 2)


def _read_cat(call: Call) -> Step:
    dim = call.options("dim").get("dim", 0) % (len(call.step.shape) + 1)
    call.demand(dim > 0)
    return call.rearrange(lambda *xs: torch.cat(xs, dim))


def _read_reshape(call: Call) -> Step:
    """Whatever leaves the batch alone: the values stay in their order."""
    shape = call.step.shape
    return call.rearrange(lambda x: x.reshape(len(x), *shape))


def _read_average_pool(call: Call) -> Step:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    options = call.options(*names, "divisor_override")
    call.demand(options.pop("divisor_override", None) is None)
    terms = math.prod(call.step.shapes[0])
    return call.affine(lambda x: functional.avg_pool2d(x, **options), terms)


def _read_adaptive_average_pool(call: Call) -> Step:
    """A mean over windows; that they may overlap changes nothing."""
    options = call.options("output_size")
    terms = math.prod(call.step.shapes[0])
    return call.affine(lambda x: functional.adaptive_avg_pool2d(x, **options), terms)


def _read_mean(call: Call) -> Step:
    options = call.options("dim", "keepdim")
    dims = options.get("dim", 0)
    rank = len(call.step.shapes[0]) + 1
    dims = [dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
    call.demand(0 not in dims)
    keepdim = options.get("keepdim", False)
    return call.affine(lambda x: x.mean(dims, keepdim=keepdim), math.prod(call.step.shapes[0]))


def _read_relu(call: Call) -> Step:
    return replace(call.step, operation="clip")


def _read_clip(call: Call) -> Step:
    names = ("min_val", "max_val")
    options = call.options(*names)
    call.demand(options.get("min_val", -1) == 0 and options.get("max_val", 1) > 0)
    return replace(call.step, operation="clip", high=float(options["max_val"]))


def _read_relu6(call: Call) -> Step:
    return replace(call.step, operation="clip", high=6.0)


def _read_max_pool(call: Call) -> Step:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    options = call.options(*names)
    call.demand(not options.pop("return_indices", False))
    return replace(
        call.step,
        operation="max_pool",
        apply=lambda x: functional.max_pool2d(x, **options, return_indices=True),
        windows=_windows(call.step, **options),
    )


def _windows(
    step: Step,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """[H' W', entries]: what each window sees, as indices into H x W; -1 is padding."""
    (_, height, width), (_, rows, columns) = step.shapes[0], step.shape
    kernel, strides, paddings, dilations = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (kernel_size, stride or kernel_size, padding, dilation)
    )
    # In ceil mode the last windows reach past the padding.
    ends = [
        max(0, (windows - 1) * s + d * (k - 1) + 1 - size - pad)
        for windows, s, d, k, size, pad in zip(
            (rows, columns), strides, dilations, kernel, (height, width), paddings, strict=True
        )
    ]
    places = torch.arange(1.0, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    places = functional.pad(places, (paddings[1], ends[1], paddings[0], ends[0]))
    return functional.unfold(places, kernel, dilations, 0, strides)[0].T.long() - 1


def _read_nothing(call: Call) -> None:
    """In eval mode."""


def _read_dropout(call: Call) -> None:
    call.demand(call.module is not None or not call.options("p", "training").get("training", True))


READERS: dict[str, Callable[[Call], Step | None]] = {
    "linear": _read_linear,
    "convolution": _read_convolution,
    "batch_norm": _read_batch_norm,
    "normalize": _read_normalize,
    "relu": _read_relu,
    "relu6": _read_relu6,
    "clip": _read_clip,
    "max_pool": _read_max_pool,
    "average_pool": _read_average_pool,
    "adaptive_average_pool": _read_adaptive_average_pool,
    "mean": _read_mean,
    "add": _read_add,
    "cat": _read_cat,
    "reshape": _read_reshape,
    "identity": _read_nothing,
    "dropout": _read_dropout,
}

# Those whose result may be a view of the input; others that share its memory have written there.
VIEWS = {"reshape", "identity", "dropout", "normalize"}

# What a trace calls them: modules by type, functions, methods by name.
OPERATIONS: dict[Any, str] = {
    nn.Linear: "linear",
    nn.Conv2d: "convolution",
    nn.BatchNorm2d: "batch_norm",
    Normalize: "normalize",
    **dict.fromkeys((nn.ReLU, torch.relu, torch.relu_, functional.relu, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, functional.relu6), "relu6"),
    **dict.fromkeys((nn.Hardtanh, functional.hardtanh), "clip"),
    **dict.fromkeys((nn.MaxPool2d, functional.max_pool2d, torch.max_pool2d), "max_pool"),
    **dict.fromkeys((nn.AvgPool2d, functional.avg_pool2d), "average_pool"),
    nn.AdaptiveAvgPool2d: "adaptive_average_pool",
    functional.adaptive_avg_pool2d: "adaptive_average_pool",
    **dict.fromkeys((torch.mean, "mean"), "mean"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((torch.cat, torch.concat), "cat"),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten", "view", "reshape"), "reshape"),
    **dict.fromkeys((nn.Identity, "contiguous"), "identity"),
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout2d, functional.dropout, functional.dropout2d), "dropout"
    ),
}
