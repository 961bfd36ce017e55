"""Which flat units each corner pushes away."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import InvalidSpec
from core.objective import Target
from core.spec import CollisionSpec
from core.taps import MaxPool, Tap

Integers = NDArray[np.int64]

# `reachable` takes the exact gradient of every flat unit where those are few and the image is small
# (so many gradient values at most, 5000 units of MNIST). Else it estimates every unit's gradient by
# small steps in random directions, and takes exact gradients of the best few for each corner.
EXACT = 2**22
PROBES, STEP, SHORTLIST = 32, 1e-3, 4


def choose_units(
    tap: Tap, target: Target, source: Tensor, spec: CollisionSpec
) -> list[tuple[int, ...]]:
    """The units of each of the K corners, all of them flat for the target.

    `source` is [C, H, W].

    Raises:
        InvalidSpec: there are fewer flat units than corners, or a listed unit is not flat.
    """
    flat = target.side.nonzero().flatten().cpu().numpy()
    if isinstance(spec.units, list):
        listed = [tuple(u) if isinstance(u, list) else (u,) for u in spec.units]
        for unit in sorted({unit for units in listed for unit in units}):
            _refuse_unless_flat(unit, target)
        return listed
    if not len(flat):
        raise InvalidSpec(
            f"Every unit of layer {tap.layer.name!r} is active for this target, so corners have "
            "none to push away; take another target or layer, or objective plain."
        )
    if spec.corners > len(flat):
        raise InvalidSpec(
            f"Layer {tap.layer.name!r} has {len(flat)} inactive units for this target, too few for "
            f"{spec.corners} corners; ask for at most {len(flat)}."
        )
    if spec.units == "random":
        flat = np.random.default_rng([spec.seed, 0]).permutation(flat)
    elif spec.units == "reachable":
        flat = flat[_most_reachable(tap, target, source, flat, spec)]
    if isinstance(tap.layer.activation, MaxPool):
        # Behind a ReLU, those that the source leaves at 0 have nowhere to go, and no gradient.
        with torch.no_grad():
            stuck = (tap(source[None])[0] == 0).cpu().numpy()
        flat = flat[np.argsort(stuck[flat], kind="stable")]
    return [(int(unit),) for unit in flat[: spec.corners]]


def _refuse_unless_flat(unit: int, target: Target) -> None:
    if unit >= len(target.pre):
        raise InvalidSpec(f"There is no unit {unit}: the layer has {len(target.pre)}, from 0.")
    if not target.side[unit]:
        reason = f"active for the target (f' = {float(target.pre[unit]):.3g})"
        if not target.active[unit]:
            reason = "in no window of the pool"
        raise InvalidSpec(
            f"Unit {unit} is {reason}, so a corner cannot push it away; list inactive units."
        )


def _most_reachable(
    tap: Tap, target: Target, source: Tensor, flat: Integers, spec: CollisionSpec
) -> Integers:
    """Places in `flat`, in the order of how far a gradient step from the source lowers the unit."""
    shortlist = np.arange(len(flat))
    if len(flat) * source.numel() > EXACT:
        shortlist = _shortlist(tap, source, flat, spec)
    units = torch.from_numpy(flat[shortlist]).to(source.device)
    reach = torch.cat([_reach(tap, target, source, part, spec) for part in units.split(PROBES)])
    return shortlist[np.argsort(-reach.cpu().numpy(), kind="stable")]


def _shortlist(tap: Tap, source: Tensor, flat: Integers, spec: CollisionSpec) -> Integers:
    """Places in `flat` of the units with the longest gradients, by estimate."""
    generator = torch.Generator().manual_seed(spec.seed)
    directions = torch.randn(PROBES, *source.shape, generator=generator).to(source)
    with torch.no_grad():
        moved = tap(source + STEP * directions) - tap(source[None])
    estimate = moved[:, flat].square().mean(0).cpu().numpy()
    return np.argsort(-estimate, kind="stable")[: SHORTLIST * spec.corners]


def _reach(tap: Tap, target: Target, source: Tensor, units: Tensor, spec: CollisionSpec) -> Tensor:
    """For each of `units` the length of the gradient step past its bound that pixels can take."""
    leaf = source.expand(len(units), *source.shape).clone().requires_grad_()
    pre = tap(leaf)
    past = torch.zeros_like(pre)
    past[torch.arange(len(units)), units] = -target.side[units]
    (step,) = torch.autograd.grad(pre, leaf, past)
    if spec.pixel_range == "valid":  # black cannot get darker, nor white brighter
        step = step.masked_fill(((source <= 0) & (step < 0)) | ((source >= 1) & (step > 0)), 0)
    reach: Tensor = step.flatten(1).norm(dim=1)
    return reach
