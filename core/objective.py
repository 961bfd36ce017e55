"""The losses of section 2 on pre-activations f', and their gradient in closed form.

A *flat* unit is one that the target's activations do not depend on while it stays past its bound:
below 0 (inactive), above 6 for ReLU6 (saturated), or below the maximum of its windows in a max
pool. All are one inequality: `side` (f' - bound) <= 0, with `side` +1 or -1, and 0 for active
units. f' is [R, U]: R rows, U units; f is [R, V], V = U but for pools.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor

from core.taps import Activation, Pieces


@dataclass(frozen=True)
class Target:
    """The target's pre-activations `pre` [U] behind `activation`."""

    pre: Tensor
    activation: Activation

    @cached_property
    def _pieces(self) -> Pieces:
        return self.activation.pieces(self.pre)

    @property
    def active(self) -> Tensor:
        """[U] bool: the units that must keep their value, f'(t) >= 0 (the paper's) for a ReLU."""
        return self._pieces.active

    @property
    def side(self) -> Tensor:
        """[U]: 1 for units that are free below their bound, -1 for those above it, else 0."""
        return self._pieces.side

    @property
    def bound(self) -> Tensor:
        """[U]: where the unit's flat piece begins; 0 for active units."""
        return self._pieces.bound

    @property
    def positive(self) -> Tensor:
        """[U] bool: active units that are not 0, where a ReLU's flat piece begins; n_p of them."""
        return self.active & (self.pre != 0)

    @cached_property
    def energy(self) -> float:
        """||f(t)||^2, the unit of relative thresholds."""
        return float(self.activation(self.pre).square().sum())


def l_pos(pre: Tensor, target: Target) -> Tensor:
    """L_pos [R]: the sum of (f' - f'(t))^2 over active units."""
    return ((pre - target.pre).square() * target.active).sum(1)


def l_neg(
    pre: Tensor, target: Target, chosen: Tensor, negative: Literal["absolute", "hinge"]
) -> Tensor:
    """L_neg [R]: `chosen` [R, U] units pushed past their bound, the other flat ones held to it."""
    past = target.side * (pre - target.bound)
    others = past.abs() if negative == "absolute" else past.relu()
    return torch.where(chosen, past, others).sum(1)


def violation(pre: Tensor, target: Target) -> Tensor:
    """[R]: the sum of relu(f' - bound)^2 over flat units (relu(6 - f')^2 for saturated ones)."""
    return (target.side * (pre - target.bound)).relu().square().sum(1)


def plain(pre: Tensor, target: Target) -> Tensor:
    """Equation 1 [R]: ||f(x) - f(t)||^2."""
    return target.activation(pre).sub_(target.activation(target.pre)).square_().sum(1)


def residual(pre: Tensor, target: Target) -> Tensor:
    """[R]: ||f(x) - f(t)||, relative to ||f(t)||."""
    return plain(pre, target).sqrt_().div_(math.sqrt(target.energy))


@dataclass
class RowTensors:
    """A dataclass whose tensors all have one entry a row, [R, ...]; what is no tensor is shared."""

    def select(self, rows: Tensor | slice) -> Self:
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, RowTensors):
                changed[f.name] = value.select(rows)
            elif isinstance(value, Tensor):
                changed[f.name] = value[rows]
        return replace(self, **changed)

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        changed: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(part, f.name) for part in parts]
            if isinstance(values[0], RowTensors):
                changed[f.name] = type(values[0]).stack(values)
            elif isinstance(values[0], Tensor):
                changed[f.name] = torch.cat(values)
        return replace(parts[0], **changed)


@dataclass
class Losses(RowTensors):
    """The losses of many rows as coefficients, all [R, U]; rows of different jobs side by side.

    A row's loss is the sum over units of
    `pull`/2 (f' - `target`)^2 + `push` |f' - `bound`| + `drift` (f' - `bound`),
    or, where `plain` is set, `pull`/2 ||f - f(t)||^2 with f = plain(f') and f(t) = plain(`target`).
    """

    target: Tensor
    bound: Tensor
    side: Tensor
    active: Tensor
    pull: Tensor
    push: Tensor
    drift: Tensor
    plain: Activation | None = None

    @classmethod
    def of_corners(
        cls,
        target: Target,
        chosen: Tensor,
        *,
        alpha: float,
        beta: float,
        negative: Literal["absolute", "hinge"],
    ) -> Self:
        """alpha L_pos + beta L_neg; `chosen` [K, U] are the units that each corner pushes away."""
        side = target.side.expand_as(chosen)
        others = (side != 0) & ~chosen
        push, drift = beta * others, beta * side * chosen
        if negative == "hinge":  # relu(y) = (|y| + y) / 2
            push, drift = push / 2, drift + side * push / 2
        pull = 2 * alpha * target.active.expand_as(chosen)
        return cls(*_rows(target, len(chosen)), pull, push, drift)

    @classmethod
    def of_plain(cls, target: Target, corners: int, *, alpha: float) -> Self:
        """alpha times equation 1, the same for every corner."""
        rows = _rows(target, corners)
        none = torch.zeros_like(rows[0])
        return cls(*rows, none + 2 * alpha, none, none, target.activation)

    def gradient(self, pre: Tensor) -> Tensor:
        """d loss / d f' [R, U]; the subgradient `drift` at f' = bound."""
        if self.plain:
            return self.plain.gradient(pre, self.target).mul_(self.pull)
        away = torch.addcmul(self.drift, self.push, (pre - self.bound).sign_())
        return away.addcmul_(self.pull, pre - self.target)

    def l_pos(self, pre: Tensor) -> Tensor:
        return (pre - self.target).square_().mul_(self.active).sum(1)

    def violation(self, pre: Tensor) -> Tensor:
        return (pre - self.bound).mul_(self.side).relu_().square_().sum(1)


def _rows(target: Target, corners: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The target's pre, bound, side and active as float32 [K, U], alike for every corner."""

    def rows(value: Tensor) -> Tensor:
        return value.float().expand(corners, -1)

    return rows(target.pre), rows(target.bound), rows(target.side), rows(target.active)
