"""The units that corners push away, beside a ranking by every exact gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from core import units
from core.errors import InvalidSpec
from core.models import ASSETS, Model
from core.objective import Target
from core.spec import CollisionSpec
from core.taps import Tap, open_tap
from core.units import choose_units

Floats = NDArray[np.float64]

PAIRS = [(6, 14), (0, 3), (9, 1)]  # a 3 and a 7, a 0 and a 1, a 4 and a 0


def spec(**settings: Any) -> CollisionSpec:
    return CollisionSpec(**({"model": "any", "layer": "any"} | settings))


def tap_of(model: Model, layer: str, digits: Tensor) -> Tap:
    return open_tap(model.classifier.normalize, model.classifier.network, layer, digits[:1])


def target_of(tap: Tap, image: Tensor) -> Target:
    return Target(tap(image[None])[0], tap.layer.activation)


@pytest.fixture
def fc1(mlp: Model, digits: Tensor) -> Tap:
    return tap_of(mlp, "fc1", digits)


@pytest.fixture
def goal(fc1: Tap, digits: Tensor) -> Target:
    return target_of(fc1, digits[14])


@pytest.fixture
def inactive(digits: Tensor) -> list[int]:
    """The units of fc1 that are inactive for the target, in float64 numpy."""
    w = load_file(ASSETS / "mnist-mlp.safetensors")
    pre = digits[14].flatten().double().numpy() @ w["fc1.weight"].double().numpy().T
    return [int(u) for u in np.flatnonzero(pre + w["fc1.bias"].double().numpy() < 0)]


# First, random, listed


def test_first_takes_the_first_inactive_units(
    fc1: Tap, goal: Target, digits: Tensor, inactive: list[int]
) -> None:
    chosen = choose_units(fc1, goal, digits[6], spec(units="first", corners=7))
    assert chosen == [(unit,) for unit in inactive[:7]]


def test_random_takes_different_inactive_units_by_the_seed_alone(
    fc1: Tap, goal: Target, digits: Tensor, inactive: list[int]
) -> None:
    def draw(seed: int, source: int = 6) -> list[tuple[int, ...]]:
        settings = spec(units="random", corners=20, seed=seed)
        return choose_units(fc1, goal, digits[source], settings)

    chosen = draw(1)
    assert draw(1, source=3) == chosen
    assert draw(2) != chosen
    assert len(set(chosen)) == 20
    assert {unit for (unit,) in chosen} <= set(inactive)
    assert chosen != sorted(chosen)


def test_random_leaves_no_inactive_unit_out(
    fc1: Tap, goal: Target, digits: Tensor, inactive: list[int]
) -> None:
    drawn = set()
    for seed in range(40):  # each unit is missed with probability below 1e-3
        drawn |= set(
            choose_units(fc1, goal, digits[6], spec(units="random", corners=50, seed=seed))
        )
    assert drawn == {(unit,) for unit in inactive}


def test_a_list_is_taken_as_it_is_sets_included(
    fc1: Tap, goal: Target, digits: Tensor, inactive: list[int]
) -> None:
    a, b, c, d = inactive[3], inactive[0], inactive[-1], inactive[10]
    settings = spec(units=[a, [b, c], [d]], corners=3)
    assert choose_units(fc1, goal, digits[6], settings) == [(a,), (b, c), (d,)]


def test_active_units_are_refused_by_number_and_value(
    fc1: Tap, goal: Target, digits: Tensor, inactive: list[int]
) -> None:
    active = next(unit for unit in range(256) if unit not in inactive)
    for listed in ([inactive[0], active], [inactive[0], [inactive[1], active]]):
        with pytest.raises(
            InvalidSpec, match=rf"^Unit {active} is active for the target .f' = \d"
        ) as caught:
            choose_units(fc1, goal, digits[6], spec(units=listed, corners=2))
        assert f"{float(goal.pre[active]):.3g}" in str(caught.value)


def test_units_out_of_range_are_refused(fc1: Tap, goal: Target, digits: Tensor) -> None:
    with pytest.raises(InvalidSpec, match=r"no unit 256: the layer has 256, from 0\."):
        choose_units(fc1, goal, digits[6], spec(units=[256], corners=1))
    with pytest.raises(InvalidSpec, match="no unit 2147483647"):
        choose_units(fc1, goal, digits[6], spec(units=[[0, 2**31 - 1]], corners=1))


@pytest.mark.parametrize("how", ["first", "random", "reachable"])
def test_more_corners_than_inactive_units_are_refused_naming_the_most(
    mlp: Model, digits: Tensor, how: str
) -> None:
    tap = tap_of(mlp, "fc1", digits)
    pre = torch.ones(256)
    pre[[4, 100, 250]] = -1.0
    goal = Target(pre, tap.layer.activation)
    with pytest.raises(InvalidSpec, match=r"'fc1' has 3 inactive units .* at most 3\."):
        choose_units(tap, goal, digits[0], spec(units=how, corners=4))
    most = choose_units(tap, goal, digits[0], spec(units=how, corners=3))
    assert sorted(most) == [(4,), (100,), (250,)]


def test_a_unit_at_0_is_active_and_cannot_be_chosen(fc1: Tap, digits: Tensor) -> None:
    pre = torch.full((256,), -1.0)
    pre[0] = 0.0
    goal = Target(pre, fc1.layer.activation)
    assert choose_units(fc1, goal, digits[0], spec(corners=2)) == [(1,), (2,)]
    with pytest.raises(InvalidSpec, match="Unit 0 is active"):
        choose_units(fc1, goal, digits[0], spec(units=[0], corners=1))


# Reachable


def projected(step: Floats, source: Tensor, pixel_range: str) -> Floats:
    """Steps [U, D], those that would leave [0, 1] left out."""
    pixels = source.flatten().double().numpy()
    if pixel_range == "free":
        return step
    blocked = ((pixels == 0) & (step < 0)) | ((pixels == 1) & (step > 0))
    return np.where(blocked, 0, step)


def best(steps: Floats, source: Tensor, pixel_range: str, goal: Target) -> list[tuple[int, ...]]:
    """All inactive units, the longest projected step first."""
    reach = np.linalg.norm(projected(steps, source, pixel_range), axis=1)
    ranked = np.argsort(-reach, kind="stable")
    return [(int(unit),) for unit in ranked if float(goal.pre[unit]) < 0]


@pytest.mark.parametrize("pixel_range", ["valid", "free"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_reachable_ranks_fc1_as_all_exact_gradients_do(
    fc1: Tap, digits: Tensor, source: int, target: int, pixel_range: str
) -> None:
    goal = target_of(fc1, digits[target])
    weight = load_file(ASSETS / "mnist-mlp.safetensors")["fc1.weight"].double().numpy()
    wanted = best(-weight, digits[source], pixel_range, goal)
    settings = spec(units="reachable", corners=40, pixel_range=pixel_range)
    assert choose_units(fc1, goal, digits[source], settings) == wanted[:40]
    other = best(-weight, digits[source], {"valid": "free", "free": "valid"}[pixel_range], goal)
    assert other[:40] != wanted[:40]


@pytest.mark.parametrize("pixel_range", ["valid", "free"])
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_reachable_ranks_deeper_layers_as_the_jacobian_does(
    cnn: Model, digits: Tensor, layer: str, pixel_range: str
) -> None:
    tap, source = tap_of(cnn, layer, digits), digits[6]
    goal = target_of(tap, digits[14])
    jacobian = torch.autograd.functional.jacobian(lambda x: tap(x[None])[0], source)
    wanted = best(-jacobian.flatten(1).double().numpy(), source, pixel_range, goal)
    settings = spec(units="reachable", corners=5, pixel_range=pixel_range)
    assert choose_units(tap, goal, source, settings) == wanted[:5]


class FourPixels(nn.Module):
    """Four units of four pixels, behind ReLU6; the first two pixels are black, the others white."""

    source = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4, bias=False), nn.ReLU6()
        self.fc.weight.data = torch.tensor(
            [
                [9.0, 9.0, 0.0, 0.0],  # lowered by darker black, which valid pixels cannot
                [-3.0, 0.0, 0.0, 0.0],  # lowered by brighter black
                [5.0, 0.0, 0.0, 4.0],  # lowered by darker white by 4, and by darker black
                [2.0, 0.0, 0.0, 7.0],  # saturated: raised by brighter black by 2 alone
            ]
        )
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x.flatten(1)))


@pytest.mark.parametrize(
    ("pixel_range", "ranking"), [("valid", [2, 1, 3, 0]), ("free", [0, 3, 2, 1])]
)
def test_reachable_lowers_inactive_units_and_raises_saturated_ones(
    pixel_range: str, ranking: list[int]
) -> None:
    source = FourPixels.source
    tap = open_tap(nn.Identity(), FourPixels(), "fc", source[None])
    goal = Target(torch.tensor([-1.0, -1.0, -1.0, 8.0]), tap.layer.activation)
    settings = spec(units="reachable", corners=4, pixel_range=pixel_range)
    assert choose_units(tap, goal, source, settings) == [(unit,) for unit in ranking]
    assert choose_units(tap, goal, source, spec(corners=4)) == [(0,), (1,), (2,), (3,)]


# Max pools


class Plane(nn.Module):
    """A pool of pairs behind a ReLU: the unit of each pixel is the pixel less a half. The last of
    seven pixels is in no pair."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(x - 0.5)).flatten(1)


TARGET = torch.tensor([[[0.9, 0.7, 0.2, 0.3, 0.6, 0.8, 0.9]]])  # wins: 0, 5; 2 and 3 are 0
BRIGHT = torch.tensor([[[0.9, 0.4, 0.9, 0.9, 0.9, 0.9, 0.9]]])  # unit 1 is 0, and has no gradient


@pytest.fixture
def plane() -> Tap:
    return open_tap(nn.Identity(), Plane(), "pool", TARGET[None])


@pytest.mark.parametrize("how", ["first", "random", "reachable"])
def test_losers_of_a_pool_are_taken_and_last_those_that_the_source_leaves_at_0(
    plane: Tap, how: str
) -> None:
    goal = target_of(plane, TARGET)
    for seed in range(4):
        settings = spec(units=how, corners=2, seed=seed)
        assert choose_units(plane, goal, BRIGHT, settings) == [(4,), (1,)]
    with pytest.raises(InvalidSpec, match=r"'pool' has 2 inactive units .* at most 2\."):
        choose_units(plane, goal, BRIGHT, spec(units=how, corners=3))


def test_the_first_losers_that_can_move_come_in_their_order(plane: Tap) -> None:
    goal, white = target_of(plane, TARGET), torch.ones(1, 1, 7)
    assert choose_units(plane, goal, white, spec(corners=2)) == [(1,), (4,)]


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        (0, r"active for the target .f' = 0.4."),
        (3, r"active for the target .f' = 0."),
        (6, "in no window of the pool"),
    ],
)
def test_units_that_a_pool_does_not_free_below_a_bound_are_refused(
    plane: Tap, unit: int, reason: str
) -> None:
    goal = target_of(plane, TARGET)
    with pytest.raises(InvalidSpec, match=f"^Unit {unit} is {reason}, so a corner cannot"):
        choose_units(plane, goal, BRIGHT, spec(units=[unit], corners=1))


# Reachable where exact gradients of all units would take too long


@pytest.mark.parametrize("pixel_range", ["valid", "free"])
def test_a_shortlist_that_holds_all_units_ranks_them_exactly(
    fc1: Tap, digits: Tensor, goal: Target, monkeypatch: pytest.MonkeyPatch, pixel_range: str
) -> None:
    settings = spec(units="reachable", corners=60, pixel_range=pixel_range)
    wanted = choose_units(fc1, goal, digits[6], settings)
    monkeypatch.setattr(units, "EXACT", 0)
    assert choose_units(fc1, goal, digits[6], settings) == wanted


@pytest.mark.parametrize("pixel_range", ["valid", "free"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_shortlist_comes_close_to_the_best(
    fc1: Tap,
    digits: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    source: int,
    target: int,
    pixel_range: str,
) -> None:
    goal = target_of(fc1, digits[target])
    weight = load_file(ASSETS / "mnist-mlp.safetensors")["fc1.weight"].double().numpy()
    reach = np.linalg.norm(projected(-weight, digits[source], pixel_range), axis=1)

    def total(how: str, seed: int) -> float:
        settings = spec(units=how, corners=5, pixel_range=pixel_range, seed=seed)
        chosen = choose_units(fc1, goal, digits[source], settings)
        assert len(set(chosen)) == 5
        return float(sum(reach[unit] for (unit,) in chosen))

    most = total("reachable", 0)
    monkeypatch.setattr(units, "EXACT", 0)
    for seed in range(4):
        assert 0.9 * most < total("reachable", seed) <= most
        assert total("random", seed) < 0.9 * most


def test_a_shortlist_is_drawn_by_the_seed_and_leaves_the_global_generator_alone(
    fc1: Tap, digits: Tensor, goal: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "EXACT", 0)

    def draw(seed: int) -> list[tuple[int, ...]]:
        settings = spec(units="reachable", corners=5, seed=seed)
        return choose_units(fc1, goal, digits[6], settings)

    state = torch.get_rng_state()
    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(6)}) > 1
    assert torch.equal(torch.get_rng_state(), state)
