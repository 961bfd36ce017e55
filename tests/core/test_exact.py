"""Polytopes worked out by hand, and the shipped digits beside other solvers."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import optimize
from torch import Tensor, nn

from core.errors import InvalidSpec
from core.exact import (
    Conflict,
    InfeasibleBudget,
    dimension,
    find_corners,
    least_budget,
    nearest,
    random_objectives,
    sweep_budgets,
    unbounded,
    unit_objectives,
)
from core.models import ASSETS, Model, Normalize
from core.polytope import (
    AffineMap,
    Clock,
    LayerPolytope,
    NotAffine,
    OutOfTime,
    Stopped,
    TooLarge,
    affine_map,
    collision_error,
)
from core.taps import Tap, open_tap, seems_affine

Floats = NDArray[np.float64]
ROOT = Path(__file__).parents[2]

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-8}


def linear(
    weight: list[list[float]], bias: list[float], clip: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """A network of 1 x 1 x d images whose first layer has these weights."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(len(weight[0]), len(bias)), clip(), nn.Linear(len(bias), 2)
    )
    network[1].weight.data, network[1].bias.data = torch.tensor(weight), torch.tensor(bias)
    return network.eval().requires_grad_(False)


def polytope_of(
    network: nn.Module, source: list[float], target: list[float], **options: Any
) -> LayerPolytope:
    pair = torch.tensor([source, target]).view(2, 1, 1, -1)
    tap = open_tap(nn.Identity(), network, "1", pair[:1])
    return LayerPolytope.of(affine_map(tap, pair), tap.layer.activation, *pair, **options)


@pytest.fixture
def segment() -> LayerPolytope:
    """x + y = 1.4 and x <= y: the segment from (0.7, 0.7) to (0.4, 1), seen from (1, 0)."""
    network = linear([[1.0, 1.0], [1.0, -1.0]], [-1.0, 0.0])
    return polytope_of(network, [1.0, 0.0], [0.6, 0.8])


# The shipped digits: a 3 (6) and a 7 (14) at mnist-mlp's first layer


@pytest.fixture(scope="module")
def fc1(mlp: Model, digits: Tensor) -> Tap:
    return open_tap(mlp.classifier.normalize, mlp.classifier.network, "fc1", digits[:1])


@pytest.fixture(scope="module")
def affine(fc1: Tap, digits: Tensor) -> AffineMap:
    return affine_map(fc1, digits)


@pytest.fixture(scope="module")
def seven(fc1: Tap, affine: AffineMap, digits: Tensor) -> LayerPolytope:
    return LayerPolytope.of(affine, fc1.layer.activation, digits[6], digits[14])


@pytest.fixture(scope="module")
def program(digits: Tensor) -> dict[str, Any]:
    """The constraints of `seven` as scipy takes them, from the weights' file."""
    state = load_file(ASSETS / "mnist-mlp.safetensors")
    weight, bias = (state[f"fc1.{name}"].double().numpy() for name in ("weight", "bias"))
    pre = weight @ digits[14].flatten().double().numpy() + bias
    on = pre > 0
    return {
        "A_eq": weight[on],
        "b_eq": pre[on] - bias[on],
        "A_ub": weight[~on],
        "b_ub": -bias[~on],
        "method": "highs-ipm",
    }


@pytest.fixture(scope="module")
def inactive(seven: LayerPolytope) -> list[tuple[int, ...]]:
    return [(int(unit),) for unit in np.flatnonzero(~seven.equal)]


@pytest.fixture(scope="module")
def corners(seven: LayerPolytope, inactive: list[tuple[int, ...]]) -> Floats:
    return find_corners(seven, unit_objectives(seven, inactive[:5]))


# The affine map


def test_the_map_folds_normalisation_convolution_and_batchnorm_into_one() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
    for values in (norm.weight, norm.running_mean, norm.running_var):
        assert values is not None
        values.data.uniform_(0.5, 2)
    network = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    network.eval().requires_grad_(False)
    normalize = Normalize("BGR", scale=255.0, mean=(104.0, 117.0, 123.0), std=(57.0, 58.0, 59.0))
    images = torch.rand(2, 3, 8, 8)
    affine = affine_map(open_tap(normalize, network, "1", images[:1]), images)
    assert affine.matrix.nnz <= 27 * 64

    x = torch.rand(3, 8, 8, dtype=torch.float64)
    gain, offset = (v.double() for v in (normalize.gain, normalize.offset))
    wide = F.conv2d(
        (x.flip(0) * gain + offset)[None], conv.weight.double(), conv.bias.double(), 2, 1
    )
    assert norm.running_mean is not None and norm.running_var is not None
    wide = F.batch_norm(
        wide,
        *(v.double() for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)),
    )
    np.testing.assert_allclose(affine(x.flatten().numpy()), wide.flatten().numpy(), atol=1e-10)


def test_the_map_of_a_shipped_layer_is_its_weights(affine: AffineMap) -> None:
    state = load_file(ASSETS / "mnist-mlp.safetensors")
    np.testing.assert_allclose(affine.matrix.toarray(), state["fc1.weight"].double(), atol=1e-14)
    np.testing.assert_array_equal(affine.offset, state["fc1.bias"].double())


def test_a_layer_that_is_not_affine_is_refused_naming_those_that_are(
    mlp: Model, digits: Tensor
) -> None:
    tap = open_tap(mlp.classifier.normalize, mlp.classifier.network, "fc2", digits[:1])
    with pytest.raises(NotAffine, match=r"^Layer 'fc2' is not affine .*; take 'fc1'\.$"):
        affine_map(tap, digits[:2])


def test_a_layer_that_bends_elsewhere_than_between_the_probes_is_refused() -> None:
    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.where(x > 0.5, 0.0, 0.5 - x)

    network = nn.Sequential(Bent(), nn.Flatten(), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    probes = 0.6 + 0.4 * torch.rand(2, 1, 2, 2)
    with pytest.raises(NotAffine, match=r"this network has no layer that is\.$"):
        affine_map(open_tap(nn.Identity(), network, "1", probes[:1]), probes)


def test_a_layer_that_bends_in_the_box_but_at_no_probe_is_refused() -> None:
    """A ReLU with a bias of 1 and weights of -0.02: one-pixel images leave it on."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(100, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    network[1].weight.data.fill_(-0.02)
    network[1].bias.data.fill_(1.0)
    network.requires_grad_(False)
    probes = 0.3 * torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    tap = open_tap(nn.Identity(), network, "3", probes[:1])
    assert seems_affine(tap, probes)
    with pytest.raises(NotAffine, match=r"^Layer '3' is not affine .*; take '1'\.$"):
        affine_map(tap, probes)
    assert (tap(torch.ones(1, 1, 10, 10)) - network[3].bias).abs().max() < 1e-6  # all is off


@pytest.mark.parametrize(
    "begin",
    [
        lambda x: (x - 0.1307) / 0.3081,
        lambda x: 1 - x.flip(3) * 2,
        lambda x: F.avg_pool2d(1 * x, 1).contiguous(),
    ],
)
def test_what_is_affine_by_its_operations_is_taken(begin: Any) -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return begin(x)

    network = nn.Sequential(Own(), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    network.requires_grad_(False)
    probes = torch.rand(2, 1, 2, 2)
    tap = open_tap(nn.Identity(), network, "2", probes[:1])
    found = affine_map(tap, probes)(probes[0].flatten().double().numpy())
    np.testing.assert_allclose(found, tap(probes[:1])[0].numpy(), atol=1e-6)


def test_a_first_convolution_of_imagenet_is_refused_before_it_starts() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).requires_grad_(False)
    images = torch.rand(2, 3, 224, 224)
    tap = open_tap(nn.Identity(), network, "0", images[:1])
    said = r"150528 pixels to 788544 units with about [2-3](\.\d)?e\+07 weights"
    with pytest.raises(TooLarge, match=said):
        affine_map(tap, images, Clock.within(0))


# The polytope


def test_excess_is_the_worst_of_all_constraints(segment: LayerPolytope) -> None:
    def excess(*pixels: float) -> float:
        return segment.excess(np.array(pixels))

    assert excess(0.6, 0.8) < 1e-7  # of float32's 0.6
    assert excess(0.7, 0.7) < 1e-7
    assert excess(0.8, 0.6) == pytest.approx(0.2 / math.sqrt(2))  # x <= y
    assert excess(0.5, 0.8) == pytest.approx(0.1 / math.sqrt(2))  # x + y = 1.4
    assert excess(0.3, 1.1) == pytest.approx(0.1)  # y <= 1
    assert segment.within(0.5).excess(np.array([0.6, 0.8])) == pytest.approx(0.3)


def test_units_at_zero_are_inactive() -> None:
    network = linear([[1.0, 0.0], [0.0, 1.0]], [0.0, -0.5])
    polytope = polytope_of(network, [1.0, 1.0], [0.25, 0.5])
    assert polytope.equal.tolist() == [True, False]
    assert polytope.excess(np.array([0.25, 0.0])) == 0


def test_the_target_is_in_its_polytope_without_a_budget(
    fc1: Tap, affine: AffineMap, digits: Tensor
) -> None:
    for source, target in itertools.pairwise(digits):
        polytope = LayerPolytope.of(affine, fc1.layer.activation, source, target)
        assert polytope.excess(target.flatten().double().numpy()) < 1e-12


# Corners


def test_a_corner_is_where_its_unit_is_least(segment: LayerPolytope) -> None:
    (corner,) = find_corners(segment, unit_objectives(segment, [(1,)]))
    np.testing.assert_allclose(corner, [0.4, 1.0], atol=1e-6)


def test_saturated_units_of_relu6_are_free_above_6_and_pushed_up() -> None:
    # 10 x >= 6, y = 0.5, x + z <= 1: from x = 0.6 to x = 1
    weight = [[10.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]
    network = linear(weight, [0.0, 0.0, -1.0], nn.ReLU6)
    polytope = polytope_of(network, [0.0, 0.0, 0.0], [0.75, 0.5, 0.25])
    assert polytope.excess(np.array([0.6, 0.5, 0.0])) < 1e-7
    assert polytope.excess(np.array([0.5, 0.5, 0.0])) == pytest.approx(0.1)
    up, down, both = find_corners(polytope, unit_objectives(polytope, [(0,), (2,), (0, 2)]))
    np.testing.assert_allclose(up, [1, 0.5, 0], **CLOSE)
    np.testing.assert_allclose(down, [0.6, 0.5, 0], **CLOSE)
    np.testing.assert_allclose(both, [1, 0.5, 0], **CLOSE)  # 10 x counts more than x
    np.testing.assert_allclose(nearest(polytope, polytope.source).pixels, [0.6, 0.5, 0], **CLOSE)


def test_corners_are_as_low_as_another_solver_finds_them(
    seven: LayerPolytope,
    inactive: list[tuple[int, ...]],
    corners: Floats,
    program: dict[str, Any],
) -> None:
    for (unit,), corner in zip(inactive[:3], corners, strict=False):
        row = seven.affine.matrix[[unit]].toarray()[0]
        least = optimize.linprog(row, bounds=(0, 1), **program)
        assert row @ corner == pytest.approx(least.fun, abs=1e-7)


def test_corners_collide_in_float32_with_all_their_mixtures_and_lie_far_apart(
    fc1: Tap, affine: AffineMap, seven: LayerPolytope, corners: Floats
) -> None:
    images = affine.images(corners)
    assert images.min() >= 0 and images.max() <= 1
    weights = np.random.default_rng(0).dirichlet(np.ones(5), 50).astype(np.float32)
    mixtures = torch.tensordot(torch.from_numpy(weights), images, dims=1)
    for some in (images, mixtures):
        relative, active = collision_error(fc1, seven, some)
        assert relative.max() < 1e-5 and active.max() < 1e-5
    apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(corners, 2)]
    assert np.mean(apart) > 0.9 * 10.19


def test_collision_error_measures_a_known_miss(
    fc1: Tap, seven: LayerPolytope, digits: Tensor
) -> None:
    relative, active = collision_error(fc1, seven, digits[[6, 14]])
    pre = fc1(digits[[6, 14]])
    f = pre.relu()
    assert relative[0] == pytest.approx(float((f[0] - f[1]).norm() / f[1].norm()), rel=1e-5)
    assert active[0] == pytest.approx(float((pre[0] - pre[1])[pre[1] > 0].abs().max()), rel=1e-6)
    assert relative[1] == active[1] == 0


@pytest.mark.parametrize("scale", [2.0**-23, 2.0**23])
def test_corners_do_not_depend_on_the_scale_of_weights(
    mlp: Model,
    digits: Tensor,
    seven: LayerPolytope,
    inactive: list[tuple[int, ...]],
    corners: Floats,
    scale: float,
) -> None:
    """fc1 times s and fc2 over s are the same function; powers of two round nothing."""
    network = copy.deepcopy(mlp.classifier.network)
    for parameter in network.fc1.parameters():
        parameter.data *= scale
    network.fc2.weight.data /= scale
    scaled = open_tap(mlp.classifier.normalize, network, "fc1", digits[:1])
    activation = scaled.layer.activation
    polytope = LayerPolytope.of(affine_map(scaled, digits), activation, digits[6], digits[14])
    assert np.array_equal(polytope.equal, seven.equal)
    again = find_corners(polytope, unit_objectives(polytope, inactive[:2]))
    assert np.array_equal(again, corners[:2])
    assert nearest(polytope, polytope.source).distance == nearest(seven, seven.source).distance
    assert dimension(polytope) == dimension(seven)
    budget = 0.6
    with pytest.raises(InfeasibleBudget) as refused:
        find_corners(polytope.within(budget), unit_objectives(polytope, inactive[:1]))
    with pytest.raises(InfeasibleBudget) as expected:
        find_corners(seven.within(budget), unit_objectives(seven, inactive[:1]))
    assert str(refused.value) == str(expected.value)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3, 1e7])
def test_a_segments_corners_do_not_depend_on_the_scale_of_weights(scale: float) -> None:
    weight, bias = [[scale, scale], [scale, -scale]], [-scale, 0.0]
    polytope = polytope_of(linear(weight, bias), [1.0, 0.0], [0.6, 0.8])
    (corner,) = find_corners(polytope, unit_objectives(polytope, [(1,)]))
    np.testing.assert_allclose(corner, [0.4, 1.0], atol=1e-6)
    np.testing.assert_allclose(nearest(polytope, polytope.source).pixels, [0.7, 0.7], atol=1e-6)
    assert unbounded(polytope, [(1,)]) == [True]
    assert dimension(polytope).dimension == 1


def test_a_corner_is_the_same_whatever_else_is_asked_for(
    seven: LayerPolytope, inactive: list[tuple[int, ...]], corners: Floats
) -> None:
    seen = []
    again = find_corners(
        seven,
        unit_objectives(seven, [inactive[3], inactive[1]]),
        on_corner=lambda index, corner: seen.append((index, corner)),
    )
    assert np.array_equal(again, corners[[3, 1]])
    assert [index for index, _ in seen] == [0, 1]
    assert np.array_equal(seen[1][1], again[1])


def test_a_convolution_with_more_units_than_pixels_leaves_the_target_alone(
    cnn: Model, digits: Tensor
) -> None:
    tap = open_tap(cnn.classifier.normalize, cnn.classifier.network, "conv1", digits[:1])
    affine = affine_map(tap, digits[:2])
    assert affine.matrix.nnz == 16 * (28 * 28 * 9 - 4 * 28 * 3 + 4)  # less what padding takes
    polytope = LayerPolytope.of(affine, tap.layer.activation, digits[6], digits[14])
    units = [(int(np.flatnonzero(~polytope.equal)[0]),)]
    (corner,) = find_corners(polytope, unit_objectives(polytope, units))
    np.testing.assert_allclose(corner, polytope.target, **CLOSE)
    size = dimension(polytope)
    assert (size.rank, size.equations, size.dimension) == (784, 0, 0)
    assert unbounded(polytope, units) == [False]


def test_active_units_have_no_corner(segment: LayerPolytope) -> None:
    with pytest.raises(InvalidSpec, match="Unit 0 has the target's f' in the whole polytope"):
        unit_objectives(segment, [(1,), (1, 0)])


# The nearest point


def test_the_nearest_point_of_a_segment_is_its_end(segment: LayerPolytope) -> None:
    found = nearest(segment, segment.source)
    np.testing.assert_allclose(found.pixels, [0.7, 0.7], atol=1e-6)
    assert found.distance == pytest.approx(math.sqrt(0.3**2 + 0.7**2), abs=1e-6)
    assert nearest(segment, segment.target).distance < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_point_is_slsqp_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(7, 12)), rng.normal(size=7)
    source, target = rng.random((2, 12))
    polytope = polytope_of(
        linear(weight.tolist(), bias.tolist()), source.tolist(), target.tolist(), budget=0.9
    )
    rows = polytope.matrix.toarray()
    on, limit = polytope.equal, polytope.limit
    assert 0 < on.sum() < 7
    constraints: list[Any] = [
        {"type": "eq", "fun": lambda x: rows[on] @ x - limit[on]},
        {"type": "ineq", "fun": lambda x: limit[~on] - rows[~on] @ x},
    ]
    other = optimize.minimize(
        lambda x: ((x - polytope.source) ** 2).sum() / 2,
        polytope.target,
        jac=lambda x: x - polytope.source,
        bounds=list(zip(polytope.lower, polytope.upper, strict=True)),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert other.success
    found = nearest(polytope, polytope.source)
    assert polytope.excess(found.pixels) < 1e-8
    np.testing.assert_allclose(found.pixels, other.x, atol=1e-5)
    assert found.bound == pytest.approx(found.distance, abs=1e-7)


def test_no_point_is_nearer_than_the_bound(seven: LayerPolytope, corners: Floats) -> None:
    found = nearest(seven, seven.source)
    assert seven.excess(found.pixels) < 1e-8
    assert found.distance - found.bound < 1e-6
    # What is nearest makes an obtuse angle with all else of a convex set.
    for other in (*corners, seven.target):
        assert (seven.source - found.pixels) @ (other - found.pixels) < 1e-6


# Budgets


def test_a_budget_too_small_is_refused_with_the_least_and_what_conflicts(
    segment: LayerPolytope,
) -> None:
    least = least_budget(segment)
    assert least.budget == pytest.approx(0.7, abs=1e-7)
    np.testing.assert_allclose(least.pixels, [0.7, 0.7], atol=1e-6)
    # y = (1.4 + (y - x)) / 2: half of what either constraint gives way
    wanted = {("unit", (0,)): 0.5, ("unit", (1,)): 0.5, ("pixel", (0, 0, 1)): 1.0}
    assert {(c.kind, c.index): c.multiplier for c in least.conflicts} == pytest.approx(wanted)
    with pytest.raises(
        InfeasibleBudget, match=r"within 0\.5 .* at least 0\.7001.* units 0, 1 .*\(0, 0, 1\)\.$"
    ) as caught:
        find_corners(segment.within(0.5), unit_objectives(segment, [(1,)]))
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.least == least.budget and error.conflicts == least.conflicts
        assert str(error) == str(caught.value)
    with pytest.raises(InfeasibleBudget):
        nearest(segment.within(0.5), segment.source)
    with pytest.raises(InfeasibleBudget):
        dimension(segment.within(0.5))


def test_the_budget_that_a_refusal_names_is_enough(segment: LayerPolytope) -> None:
    objectives = unit_objectives(segment, [(1,)])
    with pytest.raises(InfeasibleBudget, match=r"allow at least 0\.7001\."):
        find_corners(segment.within(0.2), objectives)
    (corner,) = find_corners(segment.within(0.7001), objectives)
    assert segment.within(0.7001).excess(corner) < 1e-8
    assert nearest(segment.within(0.7001), corner).distance < 1e-8


def test_the_least_budget_is_where_another_solver_s_feasibility_ends(
    seven: LayerPolytope, program: dict[str, Any]
) -> None:
    least = least_budget(seven).budget

    def feasible(budget: float) -> bool:
        box = seven.within(budget)
        bounds = np.stack([box.lower, box.upper], axis=1)
        return optimize.linprog(np.zeros(784), bounds=bounds, **program).status == 0

    assert not feasible(least - 1e-4)
    assert feasible(least + 1e-4)


def test_nearest_works_up_to_the_least_budget(seven: LayerPolytope) -> None:
    tight = seven.within(least_budget(seven).budget + 5e-5)
    found = nearest(tight, tight.source)
    assert tight.excess(found.pixels) < 1e-8
    assert found.distance - found.bound < 1e-4


def test_a_larger_budget_lets_corners_lie_farther_apart(
    seven: LayerPolytope, inactive: list[tuple[int, ...]]
) -> None:
    objectives = unit_objectives(seven, inactive[:2])
    curve = dict(sweep_budgets(seven, objectives, [0.6, 0.8, None]))
    assert curve[0.6] is None
    assert curve[0.8] is not None and curve[None] is not None
    assert np.abs(curve[0.8] - seven.source).max() < 0.8 + 1e-8
    for objective, near, far in zip(objectives, curve[0.8], curve[None], strict=True):
        assert objective @ far < objective @ near - 0.1
    assert np.linalg.norm(curve[None][0] - curve[None][1]) > np.linalg.norm(
        curve[0.8][0] - curve[0.8][1]
    )


# Dimension, directions, null space


def test_the_dimension_of_independent_equations_is_the_paper_s_bound(seven: LayerPolytope) -> None:
    size = dimension(seven)
    weight = seven.affine.matrix.toarray()
    assert size.active == int(seven.equal.sum())
    assert size.rank == np.linalg.matrix_rank(weight[seven.equal])
    assert size.dimension == size.equations == size.paper == 784 - size.active


def test_dependent_equations_and_stuck_inequalities_are_not_counted_twice() -> None:
    # x0 = 0.5 twice over, by two active units; x1 = 0.25 by two inactive ones; x2 = 1 = x3, since
    # their sum is 2; x4 is free; x5 = 0.5 by an active unit with a small weight.
    weight = np.zeros((7, 6))
    weight[0, 0], weight[1, 0] = 1, 2
    weight[2, 1], weight[3, 1] = 1, -1
    weight[4, [2, 3]] = 1
    weight[5, 4], weight[6, 5] = 1, 0.01
    network = linear(weight.tolist(), [0.0, 0.0, -0.25, 0.25, -1.0, -2.0, 0.0])
    polytope = polytope_of(network, [0.5] * 6, [0.5, 0.25, 1.0, 1.0, 0.5, 0.5])
    size = dimension(polytope)
    assert (size.pixels, size.active, size.paper) == (6, 4, 2)
    assert (size.rank, size.equations) == (3, 3)
    assert (size.stuck_pixels, size.stuck_units, size.dimension) == (2, 2, 1)


def test_a_unit_is_unbounded_only_where_no_other_holds_it() -> None:
    weight, bias = [[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]], [-1.0, 0.0, -0.5]
    pair: Any = ([1.0, 0.0, 0.5], [0.6, 0.8, 0.1])
    free = polytope_of(linear(weight, bias), *pair, budget=0.01)
    assert unbounded(free, [(1,), (2,), (1, 2)]) == [True, True, True]
    held = polytope_of(linear([*weight, [-1.0, 0.0, 0.0]], [*bias, 0.2]), *pair)  # x >= 0.2
    assert unbounded(held, [(1,), (2,), (3,), (1, 3)]) == [False, True, False, False]


def test_null_space_collisions_keep_every_unit_and_are_nearest_by_projection() -> None:
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(4, 10)), rng.normal(size=4)
    target, source = 0.5 + 0.1 * rng.normal(size=(2, 10))
    polytope = polytope_of(
        linear(weight.tolist(), bias.tolist()), source.tolist(), target.tolist(), null_space=True
    )
    rows = polytope.matrix.toarray()
    move = polytope.source - polytope.target
    projected = polytope.target + move - np.linalg.pinv(rows) @ (rows @ move)
    assert projected.min() > 0 and projected.max() < 1  # so that the box is no constraint
    np.testing.assert_allclose(nearest(polytope, polytope.source).pixels, projected, **CLOSE)
    assert dimension(polytope).dimension == 6
    corners = find_corners(polytope, random_objectives(polytope, 3, seed=0))
    for corner in corners:
        np.testing.assert_allclose(rows @ corner, rows @ polytope.target, **CLOSE)
    # A vertex of a 6-dimensional polytope in a box has 6 pixels at the box's bounds.
    assert (np.minimum(corners, 1 - corners) < 1e-9).sum(1).tolist() == [6, 6, 6]
    with pytest.raises(InvalidSpec):
        unit_objectives(polytope, [(0,)])


# Giving up


def test_solvers_end_when_the_time_is_over_or_they_are_told_to(
    seven: LayerPolytope, inactive: list[tuple[int, ...]]
) -> None:
    objectives = unit_objectives(seven, inactive[:1])
    with pytest.raises(OutOfTime):
        find_corners(seven, objectives, clock=Clock.within(0))
    asked = itertools.count()
    with pytest.raises(Stopped):  # on the fifth question, in the middle of a linear program
        find_corners(seven, objectives, clock=Clock(should_stop=lambda: next(asked) == 4))
    assert next(asked) == 5
    with pytest.raises(OutOfTime):
        nearest(seven, seven.source, clock=Clock.within(0.01))


def test_conflicts_and_errors_have_codes() -> None:
    error = InfeasibleBudget(0.1, 0.25, [Conflict("unit", (7,), 1.0)])
    assert error.code == "infeasible_budget"
    assert (NotAffine.code, TooLarge.code, OutOfTime.code) == ("not_affine", "too_large", "timeout")


def test_the_solver_prints_nothing() -> None:
    code = (
        "import numpy as np; from scipy import sparse; from core import exact; "
        "ones = np.ones(1); "
        "found, _ = exact._linear_program(cost=ones, matrix=sparse.csr_array(ones[None]), "
        "limit=ones, equal=ones > 0, lower=0 * ones, upper=ones, clock=exact.ENDLESS); "
        "print(found[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert (done.stdout, done.stderr) == ("1.0\n", "")
