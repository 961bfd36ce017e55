"""Layers that are affine in the image, and the polytope of pixels that collide there.

At such a layer f'(x) = A x + b, so the images that share the target's activations f(t) there are
exactly those that solve linear constraints. Pixels are flattened, [d] in float64, and in [0, 1].
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, sparse
from torch import Tensor, nn

from core.course import follow
from core.errors import CoreError
from core.objective import Target, residual
from core.program import affine_script, is_affine
from core.taps import Activation, Clip, Tap, tappable, true_name

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]

# Weights that a linear program may have. A dense layer of 3072 pixels and 512 units has 1.6 million
# and takes 12 s a corner; ImageNet's first convolutions have 20 to 170 million.
NONZEROS = 2_000_000
# The smaller of pixels and units: dense matrices of this side squared are factored, 128 MB each.
SIDE = 4096
# Values of f' that one forward pass of basis images makes: 32 MB.
CHUNK = 2**22


class NotAffine(CoreError):
    """The layer is not affine in the image, so its collisions are no polytope of pixels."""

    code = "not_affine"


class TooLarge(CoreError):
    """The layer is too large for a linear program."""

    code = "too_large"


class OutOfTime(CoreError):
    """The exact solver did not end in the time that it was given."""

    code = "timeout"


class Stopped(CoreError):
    """The exact solver was told to stop."""

    code = "stopped"


@dataclass(frozen=True)
class Clock:
    """When to give up: at `deadline`, on `time.monotonic`, or as soon as `should_stop` says so."""

    deadline: float = math.inf
    should_stop: Callable[[], bool] = lambda: False

    @classmethod
    def within(cls, seconds: float, should_stop: Callable[[], bool] = lambda: False) -> Self:
        return cls(time.monotonic() + seconds, should_stop)

    def check(self) -> None:
        """Raises OutOfTime or Stopped."""
        if self.should_stop():
            raise Stopped()
        if time.monotonic() > self.deadline:
            raise OutOfTime()


ENDLESS = Clock()


@dataclass(frozen=True)
class AffineMap:
    """f'(x) = `matrix` [U, d] x + `offset` [U], normalisation folded in; `shape` is an image's."""

    matrix: sparse.csr_array
    offset: Floats
    shape: tuple[int, ...]

    def __call__(self, pixels: Floats) -> Floats:
        """f' [U] of `pixels` [d]."""
        pre: Floats = self.matrix @ pixels + self.offset
        return pre

    def images(self, pixels: Floats) -> Tensor:
        """`pixels` [K, d] as images [K, C, H, W] in float32; none leaves [0, 1]."""
        return torch.from_numpy(pixels.astype(np.float32)).view(-1, *self.shape)


@torch.no_grad()
def affine_map(tap: Tap, probes: Tensor, clock: Clock = ENDLESS) -> AffineMap:
    """The affine map from pixels to f', read off the images of a basis in float64.

    That it is affine is proved from what the network computes. `probes` [N, C, H, W] are two images
    or more; the map is compared with the tap on each.

    Raises:
        NotAffine: the layer is not proved to be affine in the image, or is a max pool.
        TooLarge: the map is too large for a linear program.
    """
    if not isinstance(tap.layer.activation, Clip) or not is_affine(tap, probes[:2]):
        raise _not_affine(tap, probes)
    shape, pixels, units = tuple(probes.shape[1:]), probes[0].numel(), tap.layer.units
    _refuse_if_too_large(tap, probes)
    both = copy.deepcopy(nn.ModuleList([tap.normalize, tap.network])).double().cpu()
    both.to(memory_format=torch.contiguous_format)
    wide, images = _WideTap(both[0], both[1], tap.layer, torch.float64), probes.double().cpu()
    course, _ = follow(wide, images[:2].contiguous(), both)
    if course.script != affine_script(wide, shape):
        raise _not_affine(tap, probes)
    offset = wide(torch.zeros(1, *shape, dtype=torch.float64))
    columns = []
    for part in torch.arange(pixels).split(max(1, CHUNK // units)):
        clock.check()
        basis = torch.zeros(len(part), pixels, dtype=torch.float64)
        basis[torch.arange(len(part)), part] = 1
        block = (wide(basis.view(-1, *shape)) - offset).numpy()
        # What is left of a difference of equals is rounding, not a weight.
        block[np.abs(block) < 1e-13 * np.abs(block).max(initial=1e-300)] = 0
        columns.append(sparse.csc_array(block.T))
    affine = AffineMap(sparse.hstack(columns).tocsr(), offset[0].numpy(), shape)
    for image, pre in zip(images, wide(images).numpy(), strict=True):
        missed = affine(image.flatten().numpy()) - pre
        if linalg.norm(missed) > 1e-9 * linalg.norm(pre):
            raise _not_affine(tap, probes)
    return affine


@dataclass(frozen=True)
class LayerPolytope:
    """The images that share the target's activations: `matrix` x = `limit` where `equal`, else <=.

    Rows are units, [U, d] and [U], each over the `lengths` [U] of its weights: a constraint is
    missed by as much as an image is away from it, whatever the scale of the weights. Those of
    saturated units (f' >= 6 of ReLU6) have changed their sign. Pixels are in [`lower`, `upper`]: in
    [0, 1], and within the budget of the source's.
    """

    affine: AffineMap
    matrix: sparse.csr_array
    lengths: Floats
    limit: Floats
    equal: Booleans
    source: Floats
    target: Floats
    budget: float | None = None

    @classmethod
    def of(
        cls,
        affine: AffineMap,
        activation: Activation,
        source: Tensor,
        target: Tensor,
        *,
        budget: float | None = None,
        null_space: bool = False,
    ) -> Self:
        """The polytope of `target` around `source`, both [C, H, W].

        Units with 0 < f'(t) < 6 are active: equalities. With `null_space` every unit is one: these
        are the collisions of Ozbulak et al. (2022), t + the null space of the matrix.
        """
        assert isinstance(activation, Clip)  # `affine_map` takes no pool
        from_pixels, to_pixels = (i.double().cpu().flatten().numpy() for i in (source, target))
        pre = affine(to_pixels)
        saturated = pre >= activation.high
        equal = np.full(len(pre), True) if null_space else (pre > 0) & ~saturated
        sign = np.where(saturated & ~equal, -1.0, 1.0)
        bound = np.where(equal, pre, np.where(saturated, activation.high, 0.0))
        lengths = np.asarray(sparse.linalg.norm(affine.matrix, axis=1), np.float64)
        lengths[lengths == 0] = 1.0  # f' of such a unit is the same everywhere
        matrix = sparse.csr_array(sparse.diags_array(sign / lengths) @ affine.matrix)
        limit = sign * (bound - affine.offset) / lengths
        return cls(affine, matrix, lengths, limit, equal, from_pixels, to_pixels, budget)

    def within(self, budget: float | None) -> Self:
        """The same with another budget: how far each pixel may be from the source's."""
        return replace(self, budget=budget)

    @property
    def lower(self) -> Floats:
        reach = math.inf if self.budget is None else self.budget
        return np.maximum(self.source - reach, 0)

    @property
    def upper(self) -> Floats:
        reach = math.inf if self.budget is None else self.budget
        return np.minimum(self.source + reach, 1)

    def excess(self, pixels: Floats) -> float:
        """How far `pixels` [d] are from the worst of the constraints that they break; 0 inside."""
        past = self.matrix @ pixels - self.limit
        past = np.where(self.equal, np.abs(past), past)
        beyond = np.maximum(self.lower - pixels, pixels - self.upper)
        return max(0.0, float(past.max()), float(beyond.max()))


@torch.no_grad()
def collision_error(tap: Tap, polytope: LayerPolytope, images: Tensor) -> tuple[Floats, Floats]:
    """How well `images` [K, C, H, W] collide with the target in the tap's own float32.

    ||f(x) - f(t)|| / ||f(t)|| [K], and the greatest |f'(x) - f'(t)| over active units [K].
    """
    target = polytope.affine.images(polytope.target)
    goal = Target(tap(target.to(images.device))[0], tap.layer.activation)
    pre = tap(images)
    off = (pre - goal.pre).abs() * torch.from_numpy(polytope.equal).to(pre.device)
    return residual(pre, goal).double().cpu().numpy(), off.amax(1).double().cpu().numpy()


class _Read(Exception):
    """Ends a forward pass that need not go on."""


class _WideTap(Tap):
    """A tap that gives f' in float64."""

    def __call__(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def stop(pre: Tensor) -> Tensor:
            seen.append(pre)
            raise _Read

        with suppress(_Read):
            self._forward(images, {self.layer.call: stop})
        return seen[0].flatten(1)


def _not_affine(tap: Tap, probes: Tensor) -> NotAffine:
    normalized = tap.normalize(probes[:1])
    names = [
        repr(true_name(tap.network, normalized, layer))
        for layer in tappable(tap.network, normalized)
        if isinstance(layer.activation, Clip)
        and is_affine(Tap(tap.normalize, tap.network, layer), probes[:2])
        and layer != tap.layer
    ]
    advice = f"take {' or '.join(names)}" if names else "this network has no layer that is"
    reason = "is not affine in the image, so its exact collisions are no polytope of pixels"
    if not isinstance(tap.layer.activation, Clip):
        reason = "is a max pool, and the exact solver takes a ReLU's layer, affine in the image"
    return NotAffine(f"Layer {tap.layer.name!r} {reason}; {advice}.")


def _refuse_if_too_large(tap: Tap, probes: Tensor) -> None:
    """Counts the weights of a few random pixels, before anything is computed."""
    pixels, units = probes[0].numel(), tap.layer.units
    places = torch.randint(pixels, (16,), generator=torch.Generator().manual_seed(0))
    images = torch.zeros(len(places) + 1, pixels, device=probes.device)
    images[torch.arange(len(places)), places] = 1
    pre = tap(images.view(-1, *probes.shape[1:]))
    change = (pre[:-1] - pre[-1]).abs()
    nonzeros = int((change > 1e-5 * change.max()).sum(1).double().mean() * pixels)
    if nonzeros > NONZEROS or min(pixels, units) > SIDE:
        raise TooLarge(
            f"Layer {tap.layer.name!r} maps {pixels} pixels to {units} units with about "
            f"{nonzeros:.2g} weights, too many for a linear program (at most {NONZEROS:.2g}, and "
            f"{SIDE} pixels or units); take a smaller network, or the optimiser."
        )
