"""The losses against numbers worked out by hand, and their gradient against two others."""

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.objective import (
    Losses,
    RowTensors,
    Target,
    l_neg,
    l_pos,
    plain,
    residual,
    violation,
)
from core.taps import Clip, MaxPool

Floats = NDArray[np.float64]

EXACT: dict[str, Any] = {"rtol": 1e-14, "atol": 0}
RELU, RELU6 = Clip(), Clip(6.0)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def target(*values: float, clip: Clip = RELU) -> Target:
    return Target(row(*values)[0], clip)


def units(*chosen: int, of: int) -> Tensor:
    mask = torch.zeros(1, of, dtype=torch.bool)
    mask[0, list(chosen)] = True
    return mask


def assert_equals(value: Tensor, *wanted: float) -> None:
    torch.testing.assert_close(value, torch.tensor(wanted, dtype=torch.float64), **EXACT)


# By hand. Units 0 and 1 are active (0 counts), 2 and 3 inactive.

T = target(0.2, 0.0, -0.1, -0.3)
X = row(0.5, -0.2, 0.05, -0.4)


def test_l_pos_sums_squares_over_active_units() -> None:
    assert_equals(l_pos(X, T), 0.3**2 + 0.2**2)


@pytest.mark.parametrize(
    ("chosen", "absolute", "hinge"),
    [
        ((3,), -0.4 + 0.05, -0.4 + 0.05),
        ((2,), 0.05 + 0.4, 0.05 + 0.0),
        ((2, 3), 0.05 - 0.4, 0.05 - 0.4),
        ((), 0.05 + 0.4, 0.05),
        ((0, 1), 0.05 + 0.4, 0.05),  # active units have no bound to be pushed past
    ],
)
def test_l_neg_pushes_the_chosen_units_and_holds_the_others(
    chosen: tuple[int, ...], absolute: float, hinge: float
) -> None:
    assert_equals(l_neg(X, T, units(*chosen, of=4), "absolute"), absolute)
    assert_equals(l_neg(X, T, units(*chosen, of=4), "hinge"), hinge)


def test_violation_counts_inactive_units_that_came_up_and_no_others() -> None:
    assert_equals(violation(X, T), 0.05**2)


def test_plain_is_the_squared_distance_of_activations() -> None:
    assert_equals(plain(X, T), 0.3**2 + 0.0**2 + 0.05**2)


def test_residual_is_relative_to_the_targets_activations() -> None:
    two = target(0.2, 0.0, -0.1, 1.5)
    assert two.energy == pytest.approx(0.2**2 + 1.5**2, rel=1e-14)
    wanted = math.sqrt(0.3**2 + 0.05**2 + 1.5**2) / math.sqrt(0.2**2 + 1.5**2)
    assert_equals(residual(X, two), wanted)


def test_every_row_has_its_own_loss() -> None:
    rows = torch.cat([X, T.pre[None], X * 2])
    chosen = torch.cat([units(2, of=4), units(3, of=4), units(of=4)])
    assert_equals(l_pos(rows, T), 0.3**2 + 0.2**2, 0.0, 0.8**2 + 0.4**2)
    assert_equals(l_neg(rows, T, chosen, "absolute"), 0.05 + 0.4, 0.1 - 0.3, 0.1 + 0.8)
    assert_equals(violation(rows, T), 0.05**2, 0.0, 0.1**2)
    assert_equals(plain(rows, T), 0.3**2 + 0.05**2, 0.0, 0.8**2 + 0.1**2)


# By hand, ReLU6: unit 0 is above 6, unit 1 exactly at it, 2 active, 3 inactive.

T6 = target(7.3, 6.0, 5.0, -1.0, clip=RELU6)
X6 = row(6.6, 5.2, 4.3, 0.4)


def test_relu6_units_from_6_up_are_saturated_not_active() -> None:
    assert T6.active.tolist() == [False, False, True, False]
    assert T6.side.tolist() == [-1, -1, 0, 1]
    assert T6.bound.tolist() == [6, 6, 0, 0]
    just_below = Target(torch.tensor([math.nextafter(6.0, 0)], dtype=torch.float64), RELU6)
    assert just_below.active.tolist() == [True]
    assert just_below.side.tolist() == [0]


def test_relu_has_no_saturated_units() -> None:
    high = target(6.0, 7.3, 1e30)
    assert high.active.tolist() == [True, True, True]
    assert high.side.tolist() == [0, 0, 0]
    assert high.bound.tolist() == [0, 0, 0]


@pytest.mark.parametrize("clip", [RELU, RELU6])
def test_a_unit_at_exactly_0_is_active(clip: Clip) -> None:
    zeros = Target(torch.tensor([0.0, -0.0, -1e-30]), clip)
    assert zeros.active.tolist() == [True, True, False]
    assert zeros.side.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("chosen", "absolute", "hinge"),
    [
        ((0,), -0.6 + 0.8 + 0.4, -0.6 + 0.8 + 0.4),  # unit 0 is pushed up: 6 - f'
        ((1,), 0.8 + 0.6 + 0.4, 0.8 + 0.0 + 0.4),  # unit 0 is free above 6
        ((3,), 0.4 + 0.6 + 0.8, 0.4 + 0.0 + 0.8),
        ((0, 3), -0.6 + 0.4 + 0.8, -0.6 + 0.4 + 0.8),
    ],
)
def test_l_neg_pushes_saturated_units_up(
    chosen: tuple[int, ...], absolute: float, hinge: float
) -> None:
    close = {"rtol": 1e-14, "atol": 1e-15}
    for negative, wanted in (("absolute", absolute), ("hinge", hinge)):
        got = l_neg(X6, T6, units(*chosen, of=4), negative)  # type: ignore[arg-type]
        torch.testing.assert_close(got, torch.tensor([wanted], dtype=torch.float64), **close)


def test_l_pos_leaves_saturated_units_out() -> None:
    assert_equals(l_pos(X6, T6), (5.0 - 4.3) ** 2)


def test_violation_counts_saturated_units_that_sank_below_6() -> None:
    close = {"rtol": 1e-14, "atol": 1e-15}
    wanted = torch.tensor([0.8**2 + 0.4**2], dtype=torch.float64)
    torch.testing.assert_close(violation(X6, T6), wanted, **close)


def test_plain_and_residual_clip_at_6_on_both_sides() -> None:
    squared = (5.2 - 6) ** 2 + (4.3 - 5) ** 2 + 0.4**2
    torch.testing.assert_close(plain(X6, T6), row(squared)[0], rtol=1e-14, atol=0)
    assert T6.energy == pytest.approx(36 + 36 + 25, rel=1e-15)
    torch.testing.assert_close(
        residual(X6, T6), row(math.sqrt(squared / 97))[0], rtol=1e-14, atol=0
    )


def test_a_point_of_the_polytope_has_no_loss_but_what_the_chosen_unit_gives() -> None:
    member = row(900.0, 6.0, 5.0, -77.0)
    for loss in (l_pos, violation, plain, residual):
        assert_equals(loss(member, T6), 0.0)
    assert_equals(l_neg(member, T6, units(3, of=4), "hinge"), -77.0)
    assert_equals(l_neg(member, T6, units(3, of=4), "absolute"), -77.0 + 894.0)


# The gradient, beside autograd and finite differences of formulas written a second time here


@dataclass
class Case:
    """A random target of 40 units and 5 rows, in float64, away from every kink."""

    clip: Clip
    target: Floats
    pre: Floats
    chosen: NDArray[np.bool_]
    alpha: float = 1.7
    beta: float = 0.3

    @classmethod
    def draw(cls, clip: Clip) -> "Case":
        rng = np.random.default_rng(5)
        spread = 6.0
        t = rng.normal(1.0, spread, 40)
        t[:3] = 0.0, 6.0, -2.0
        pre = rng.normal(1.0, spread, (5, 40))
        for kink in (0.0, 6.0):
            pre[np.abs(pre - kink) < 0.01] = kink + 0.02
        chosen = np.zeros((5, 40), bool)
        flat = np.flatnonzero((t < 0) | (t >= clip.high))
        for corner in range(5):
            chosen[corner, rng.choice(flat, corner + 1, replace=False)] = True
        case = cls(clip, t, pre, chosen)
        # All kinds of units must be there, past their bound and not, chosen and not.
        kinds = {(float(s), bool(p > b), bool(c)) for s, b, p, c in case.each_flat()}
        assert len(kinds) == (4 if math.isinf(clip.high) else 8)
        return case

    def each_flat(self) -> list[tuple[float, float, float, bool]]:
        return [
            (side, bound, self.pre[r, u], self.chosen[r, u])
            for r in range(5)
            for u, (side, bound) in enumerate(self.flat())
            if side
        ]

    def flat(self) -> list[tuple[float, float]]:
        """(side, bound) of each unit, by the words of the paper."""
        return [
            (1.0, 0.0) if t < 0 else (-1.0, self.clip.high) if t >= self.clip.high else (0.0, 0.0)
            for t in self.target
        ]

    def loss(self, pre: Floats, objective: str) -> float:
        """Of all rows together, one unit after another."""
        total = 0.0
        for r in range(len(pre)):
            for u, (side, bound) in enumerate(self.flat()):
                x, t = pre[r, u], self.target[u]
                if objective == "plain":
                    f = min(max(x, 0.0), self.clip.high), min(max(t, 0.0), self.clip.high)
                    total += self.alpha * (f[0] - f[1]) ** 2
                elif side == 0:
                    total += self.alpha * (x - t) ** 2
                else:
                    past = side * (x - bound)
                    held = abs(past) if objective == "absolute" else max(past, 0.0)
                    total += self.beta * (past if self.chosen[r, u] else held)
        return total

    def torch_target(self, dtype: torch.dtype) -> Target:
        return Target(torch.from_numpy(self.target).to(dtype), self.clip)

    def losses(self, objective: str, dtype: torch.dtype = torch.float32) -> Losses:
        if objective == "plain":
            return Losses.of_plain(self.torch_target(dtype), 5, alpha=self.alpha)
        return Losses.of_corners(
            self.torch_target(dtype),
            torch.from_numpy(self.chosen),
            alpha=self.alpha,
            beta=self.beta,
            negative=objective,  # type: ignore[arg-type]
        )


OBJECTIVES = ["absolute", "hinge", "plain"]


@pytest.fixture(params=[RELU, RELU6], ids=["relu", "relu6"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case.draw(request.param)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_equals_finite_differences(case: Case, objective: str) -> None:
    wanted, step = np.empty_like(case.pre), 1e-5
    for index in np.ndindex(*case.pre.shape):
        moved = [case.pre.copy() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        up, down = (case.loss(pre, objective) for pre in moved)
        wanted[index] = (up - down) / (2 * step)
    got = case.losses(objective).gradient(torch.from_numpy(case.pre).float())
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_equals_autograd_of_the_formulas(case: Case, objective: str) -> None:
    leaf = torch.from_numpy(case.pre).requires_grad_()
    t = torch.from_numpy(case.target)
    if objective == "plain":
        clipped = leaf.clamp(0, case.clip.high), t.clamp(0, case.clip.high)
        loss = case.alpha * ((clipped[0] - clipped[1]) ** 2).sum()
    else:
        side, bound = torch.tensor(case.flat(), dtype=torch.float64).T
        past = side * (leaf - bound)
        held = past.abs() if objective == "absolute" else past.clamp(min=0)
        loss = case.alpha * ((leaf - t)[:, side == 0] ** 2).sum()
        loss = loss + case.beta * torch.where(torch.from_numpy(case.chosen), past, held).sum()
    assert loss.item() == pytest.approx(case.loss(case.pre, objective), rel=1e-12)
    loss.backward()
    got = case.losses(objective).gradient(torch.from_numpy(case.pre).float())
    assert leaf.grad is not None
    torch.testing.assert_close(got.double(), leaf.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("objective", ["absolute", "hinge"])
def test_the_coefficients_spell_alpha_l_pos_plus_beta_l_neg(case: Case, objective: Any) -> None:
    losses, pre = case.losses(objective), torch.from_numpy(case.pre)
    spelled = (
        losses.pull.double() / 2 * (pre - losses.target) ** 2
        + losses.push.double() * (pre - losses.bound).abs()
        + losses.drift.double() * (pre - losses.bound)
    ).sum(1)
    goal, chosen = case.torch_target(torch.float64), torch.from_numpy(case.chosen)
    wanted = case.alpha * l_pos(pre, goal) + case.beta * l_neg(pre, goal, chosen, objective)
    torch.testing.assert_close(spelled, wanted, rtol=1e-6, atol=1e-5)
    assert float(spelled.sum()) == pytest.approx(case.loss(case.pre, objective), rel=1e-6)


def test_the_coefficients_of_plain_spell_alpha_times_equation_1(case: Case) -> None:
    losses, pre = case.losses("plain"), torch.from_numpy(case.pre)
    assert losses.plain == case.clip
    missed = losses.plain(pre) - losses.plain(losses.target)
    spelled = (losses.pull.double() / 2 * missed**2).sum(1)
    wanted = case.alpha * plain(pre, case.torch_target(torch.float64))
    torch.testing.assert_close(spelled, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_test_convergence_by_the_same_l_pos_and_violation(
    case: Case, objective: str
) -> None:
    losses, pre = case.losses(objective), torch.from_numpy(case.pre).float()
    goal = case.torch_target(torch.float32)
    torch.testing.assert_close(losses.l_pos(pre), l_pos(pre, goal), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.violation(pre), violation(pre, goal), rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_given_is_changed(case: Case, objective: str) -> None:
    losses, pre = case.losses(objective), torch.from_numpy(case.pre).float()
    before = pre.clone(), [tensor.clone() for tensor in tensors(losses)]
    for loss in (losses.gradient, losses.l_pos, losses.violation):
        loss(pre)
    assert torch.equal(pre, before[0])
    assert all(map(torch.equal, tensors(losses), before[1]))


@pytest.mark.parametrize("clip", [RELU, RELU6], ids=["relu", "relu6"])
@pytest.mark.parametrize("negative", ["absolute", "hinge"])
def test_at_a_bound_the_gradient_lies_between_those_of_both_sides(
    clip: Clip, negative: Any
) -> None:
    goal = Target(torch.tensor([-1.0, -1.0, 7.0, 7.0]), clip)
    chosen = torch.tensor([[True, False, False, False]])
    losses = Losses.of_corners(goal, chosen, alpha=1, beta=0.5, negative=negative)
    at = goal.bound[None]
    low, high = losses.gradient(at - 1e-3), losses.gradient(at + 1e-3)
    got = losses.gradient(at)
    assert got[0, 0] == 0.5
    assert torch.all(torch.minimum(low, high) <= got)
    assert torch.all(got <= torch.maximum(low, high))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plain_and_flat_pieces_give_no_gradient_inside_the_polytope(
    case: Case, objective: str
) -> None:
    """Except for the chosen units, and for |f'|, which punishes what is allowed."""
    inside = case.target.copy()
    for u, (side, bound) in enumerate(case.flat()):
        inside[u] = bound - 3 * side if side else inside[u]
    gradient = case.losses(objective).gradient(torch.from_numpy(inside).float().expand(5, -1))
    flat = np.array([side for side, _ in case.flat()])
    wanted = np.zeros((5, 40))
    if objective != "plain":
        wanted = case.beta * flat * case.chosen
    if objective == "absolute":
        wanted = wanted - case.beta * flat * ~case.chosen
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-6, atol=1e-6)


# Max pools, beside windows that are listed one by one

SHAPE = (2, 7, 9)
POOLS = {
    "2, stride 2": MaxPool(SHAPE, (2, 2), (2, 2)),
    "3, stride 2": MaxPool(SHAPE, (3, 3), (2, 2)),
    "3, stride 2, padded": MaxPool(SHAPE, (3, 3), (2, 2), (1, 1)),
    "2, stride 2, ceil": MaxPool(SHAPE, (2, 2), (2, 2), ceil_mode=True),
    "3, stride 2, padded, ceil": MaxPool(SHAPE, (3, 3), (2, 2), (1, 1), ceil_mode=True),
    "3, stride 1": MaxPool(SHAPE, (3, 3), (1, 1), (1, 1)),
    "2, stride 3": MaxPool(SHAPE, (2, 2), (3, 3)),
    "oblong": MaxPool(SHAPE, (1, 4), (3, 2), (0, 2)),
    "dilated": MaxPool(SHAPE, (3, 2), (1, 2), (1, 0), (2, 3)),
    "dilated, ceil": MaxPool(SHAPE, (2, 3), (3, 2), (1, 1), (3, 2), ceil_mode=True),
    "whole": MaxPool(SHAPE, (7, 9), (7, 9)),
}


def windows(pool: MaxPool) -> list[list[int]]:
    """The units that each window sees, by the definition in PyTorch's documentation."""
    channels, *sides = pool.shape
    places: list[list[list[int]]] = []  # of each axis: what each window sees of it
    for axis, side in enumerate(sides):
        reach = pool.dilation[axis] * (pool.kernel[axis] - 1) + 1
        steps = (side + 2 * pool.padding[axis] - reach) / pool.stride[axis]
        count = (math.ceil(steps) if pool.ceil_mode else math.floor(steps)) + 1
        if pool.ceil_mode and (count - 1) * pool.stride[axis] >= side + pool.padding[axis]:
            count -= 1  # a window must not begin in the padding on the right
        starts = [n * pool.stride[axis] - pool.padding[axis] for n in range(count)]
        own = [
            [start + i * pool.dilation[axis] for i in range(pool.kernel[axis])] for start in starts
        ]
        places.append([[place for place in seen if 0 <= place < side] for seen in own])
    return [
        [(c * sides[0] + y) * sides[1] + x for y in rows for x in columns]
        for c, rows, columns in itertools.product(range(channels), *places)
    ]


def pooled(pool: MaxPool, pre: Tensor) -> Tensor:
    """[R, V], differentiable."""
    return torch.stack([pre[:, seen].amax(1) for seen in windows(pool)], 1)


def draw(kind: str, rows: int = 1) -> Tensor:
    """[R, U] in float64; ties, and whole windows of the same, are many where it is not `real`."""
    rng = np.random.default_rng(11)
    pre = rng.normal(0, 3, (rows, math.prod(SHAPE)))
    if kind != "real":
        pre = np.round(pre / 2)
        pre[:, rng.random(pre.shape[1]) < 0.6] = -1
    return torch.from_numpy(np.maximum(pre, 0) if kind == "behind a relu" else pre)


KINDS = ["real", "tied", "behind a relu"]


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> MaxPool:
    found: MaxPool = POOLS[request.param]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_pools_winners_are_active_and_its_losers_free_below_their_least_maximum(
    pool: MaxPool, kind: str
) -> None:
    goal, seen_by = Target(draw(kind)[0], pool), [list[int]() for _ in range(math.prod(SHAPE))]
    maxima, first = [], set()
    for number, seen in enumerate(windows(pool)):
        values = [float(goal.pre[unit]) for unit in seen]
        maxima.append(max(values))
        first.add(seen[values.index(max(values))])
        for unit in seen:
            seen_by[unit].append(number)
    assert goal.activation(goal.pre).tolist() == maxima
    for unit, own in enumerate(seen_by):
        least = min((maxima[number] for number in own), default=math.inf)
        stuck = kind == "behind a relu" and least == 0
        wanted = (
            (True, 0, 0) if unit in first or stuck else (False, 1, least) if own else (False, 0, 0)
        )
        got = bool(goal.active[unit]), float(goal.side[unit]), float(goal.bound[unit])
        assert got == wanted, unit
        assert bool(goal.positive[unit]) == (wanted[0] and float(goal.pre[unit]) != 0)


def obeying(goal: Target, kind: str) -> Tensor:
    """[50, U]: random points at which flat units lie past their bound, or at it, and no unit that
    the pool does not see is where it was. Behind a ReLU none is under 0."""
    rng = np.random.default_rng(3)
    lowest = 0.0 if kind == "behind a relu" else -20.0
    down = torch.from_numpy(rng.random((50, len(goal.pre))) * (rng.random((50, 1)) < 0.9))
    low = goal.bound + (lowest - goal.bound) * down
    points = goal.pre + 0 * low
    points = torch.where(goal.side != 0, low, points)
    free = ~goal.active & (goal.side == 0)
    return torch.where(free, 100 * down, points)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_obeys_has_the_targets_pool_exactly(pool: MaxPool, kind: str) -> None:
    goal = Target(draw(kind)[0], pool)
    points = obeying(goal, kind)
    assert (points != goal.pre).any(0).sum() > (goal.side != 0).sum() / 2
    assert torch.equal(pooled(pool, points), pooled(pool, goal.pre[None]).expand(50, -1))
    for loss in (l_pos, violation, plain, residual):
        assert_equals(loss(points, goal), *[0.0] * 50)


def test_whoever_disobeys_in_one_unit_has_another_pool(pool: MaxPool) -> None:
    """Nothing more is asked than must be: shown where no two values are equal."""
    goal = Target(draw("real")[0], pool)
    truth = pooled(pool, goal.pre[None])
    for unit in range(len(goal.pre)):
        active, side = bool(goal.active[unit]), float(goal.side[unit])
        at = goal.pre if active else torch.where(goal.side != 0, goal.bound, goal.pre)
        up, down = (at.clone()[None] for _ in range(2))
        up[0, unit] += 1e-9
        down[0, unit] -= 1e-9
        assert torch.equal(pooled(pool, up), truth) == (side == 0 and not active)
        held = goal.pre.clone()[
            None
        ]  # losers where they were, so that none takes the winner's place
        held[0, unit] = down[0, unit]
        assert torch.equal(pooled(pool, held), truth) == (not active)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["real", "behind a relu"])
def test_a_pools_gradient_equals_autograd_of_the_formulas(
    pool: MaxPool, kind: str, objective: Any
) -> None:
    goal, alpha, beta = Target(draw(kind)[0], pool), 1.7, 0.3
    pre = torch.from_numpy(np.random.default_rng(4).normal(0, 3, (3, len(goal.pre))))
    flat = goal.side.nonzero().flatten()
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    for corner, unit in enumerate(flat[:: max(1, len(flat) // 3)][:3]):
        chosen[corner, unit] = True
    leaf = pre.clone().requires_grad_()
    if objective == "plain":
        losses = Losses.of_plain(goal, 3, alpha=alpha)
        loss = alpha * ((pooled(pool, leaf) - pooled(pool, goal.pre[None])) ** 2).sum()
    else:
        losses = Losses.of_corners(goal, chosen, alpha=alpha, beta=beta, negative=objective)
        past = (leaf - goal.bound)[:, flat]
        held = past.abs() if objective == "absolute" else past.clamp(min=0)
        loss = alpha * ((leaf - goal.pre)[:, goal.active] ** 2).sum()
        loss = loss + beta * torch.where(chosen[:, flat], past, held).sum()
    loss.backward()
    assert leaf.grad is not None
    got = losses.gradient(pre.float())
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), leaf.grad, rtol=2e-6, atol=2e-5)
    small = Target(goal.pre.float(), pool)
    for own, wanted in ((losses.l_pos, l_pos), (losses.violation, violation)):
        torch.testing.assert_close(own(pre.float()), wanted(pre.float(), small), rtol=1e-6, atol=0)
    distance = ((pooled(pool, pre) - pooled(pool, goal.pre[None])) ** 2).sum(1)
    torch.testing.assert_close(plain(pre, goal), distance, rtol=1e-12, atol=0)
    energy = float((pooled(pool, goal.pre[None]) ** 2).sum())
    assert goal.energy == pytest.approx(energy, rel=1e-12)


# Rows side by side


@dataclass
class Nested(RowTensors):
    losses: Losses
    number: Tensor
    shared: str


def tensors(value: RowTensors) -> list[Tensor]:
    parts = [getattr(value, f.name) for f in fields(value)]
    nested = [t for part in parts if isinstance(part, RowTensors) for t in tensors(part)]
    return [*nested, *(part for part in parts if isinstance(part, Tensor))]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stacked_rows_can_be_selected_again_bit_by_bit(case: Case, objective: str) -> None:
    other = case.losses(objective)
    other.bound = other.bound + 1
    first = Nested(case.losses(objective), torch.arange(5.0), "kept")
    second = Nested(other, torch.arange(5.0, 10), "kept")
    stacked = Nested.stack([first, second])
    assert [len(tensor) for tensor in tensors(stacked)] == [10] * len(tensors(first))
    assert stacked.shared == "kept"
    assert stacked.losses.plain == first.losses.plain
    for part, rows in ((first, torch.arange(5)), (second, torch.arange(5, 10))):
        again = stacked.select(rows)
        assert all(map(torch.equal, tensors(again), tensors(part)))
        assert (again.shared, again.losses.plain) == ("kept", part.losses.plain)
    assert stacked.select(torch.tensor([7, 2, 7])).number.tolist() == [7, 2, 7]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_two_jobs_have_the_gradients_they_have_alone(case: Case, objective: str) -> None:
    mirrored = Case(case.clip, case.target[::-1].copy(), case.pre, case.chosen, alpha=3, beta=9)
    pre = torch.from_numpy(case.pre).float()
    both = Losses.stack([case.losses(objective), mirrored.losses(objective)])
    together = both.gradient(torch.cat([pre, pre]))
    assert torch.equal(together[:5], case.losses(objective).gradient(pre))
    assert torch.equal(together[5:], mirrored.losses(objective).gradient(pre))
    assert not torch.equal(together[:5], together[5:])
