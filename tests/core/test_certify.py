"""Worst points against brute force, certificates against hulls whose truth is known."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core import certify as certifying
from core import program
from core.certify import certify, margins_of, project_to_simplex, worst_point
from core.interpolate import chunk
from core.models import Model
from core.taps import Tap, open_tap

LAYERS = {"mnist-mlp": "fc2", "mnist-cnn": "fc1"}


def tap_of(network: nn.Module, name: str = "1", shape: tuple[int, ...] = (1, 2, 2)) -> Tap:
    network.eval().requires_grad_(False)
    return open_tap(nn.Identity(), network, name, torch.rand(1, *shape))


def model_tap(model: Model, digits: Tensor) -> Tap:
    network = model.classifier.network
    return open_tap(model.classifier.normalize, network, LAYERS[model.name], digits[:1])


def margins(tap: Tap, images: Tensor, label: int) -> Tensor:
    logits = tap.logits(images).double()
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.amax(1)


def tent(*firsts: float, gain: float = 1.0, other: float = 0.3) -> tuple[Tap, Tensor]:
    """A network with margin relu(p) + gain relu(-p) - other for class 0, p being the first pixel.

    And corners whose first pixels are `firsts`.
    """
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    network[1].weight.data = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    network[1].bias.data.zero_()
    network[3].weight.data = torch.tensor([[1.0, gain], [0, 0]])
    network[3].bias.data = torch.tensor([0.0, other])
    corners = torch.zeros(len(firsts), 1, 2, 2)
    corners[:, 0, 0, 0] = torch.tensor(firsts)
    return tap_of(network), corners


def close_to(image: Tensor, count: int, width: float) -> Tensor:
    """Corners [K, C, H, W] around `image` [C, H, W], in the valid range."""
    noise = torch.randn(count, *image.shape, generator=torch.Generator().manual_seed(0))
    return (image + width * noise).clamp(0, 1)


# The worst point


def test_projection_onto_the_simplex_is_nearest():
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(0, 2, (50, 4)))
    projected = project_to_simplex(points)
    assert torch.allclose(projected.sum(1), torch.ones(50).double())
    assert (projected >= 0).all()
    # Nearest in a convex set: no other of its points lies on the side of what was projected.
    inside = torch.from_numpy(rng.dirichlet(np.ones(4) * 0.5, 500))
    inside = torch.cat([inside, torch.eye(4).double()])
    towards = (points - projected)[:, None] * (inside[None] - projected[:, None])
    assert float(towards.sum(2).max()) < 1e-12


def test_what_is_in_the_simplex_stays():
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(6), 20))
    assert torch.allclose(project_to_simplex(weights), weights, atol=1e-15)


def test_a_violation_between_good_corners_is_found():
    tap, corners = tent(-1, 2)
    found = worst_point(tap, corners, 0)
    assert found.margin == pytest.approx(-0.3, abs=1e-2)
    assert found.label == 1
    assert found.probability == pytest.approx(1 / (1 + math.exp(-found.margin)), rel=1e-6)


def test_the_worst_point_is_no_better_than_any_of_a_fine_grid():
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    tap, corners = tap_of(network), torch.rand(3, 1, 2, 2) * 6
    label = int(tap.logits(corners[:1]).argmax())
    steps = range(101)
    grid = [(i, j, 100 - i - j) for i, j in itertools.product(steps, steps) if i + j <= 100]
    mixed = torch.tensordot(torch.tensor(grid) / 100, corners, dims=1)
    found = worst_point(tap, corners, label)
    assert found.margin <= float(margins(tap, mixed, label).min()) + 1e-3


def test_the_worst_point_tells_of_its_own_image(mlp, digits):
    tap = model_tap(mlp, digits)
    corners = digits[[6, 7, 15]]
    found = worst_point(tap, corners, 3, seed=4)
    assert found.weights.shape == (3,)
    assert float(found.weights.sum()) == pytest.approx(1)
    mixed = torch.tensordot(found.weights.float(), corners, dims=1)
    assert torch.equal(found.image, mixed)
    assert found.margin == float(margins(tap, found.image[None], 3))
    assert found.label == int(tap.logits(found.image[None]).argmax())
    again = worst_point(tap, corners, 3, seed=4)
    assert torch.equal(again.weights, found.weights)


def test_the_worst_point_of_one_corner_is_the_corner(mlp, digits):
    tap = model_tap(mlp, digits)
    found = worst_point(tap, digits[6:7], 3)
    assert torch.equal(found.image, digits[6])
    assert found.weights.tolist() == [1]


def test_starts_are_all_corners_all_midpoints_the_centroid_and_draws():
    starts = certifying._starts(5, 64, seed=0)
    assert len(starts) == 64
    assert torch.equal(starts[:5], torch.eye(5).double())
    rows = {tuple(row) for row in starts.tolist()}
    pairs = itertools.combinations(range(5), 2)
    assert all(tuple(0.5 * (k in pair) for k in range(5)) in rows for pair in pairs)
    assert (0.2,) * 5 in rows
    assert len(rows) == 64
    assert len(certifying._starts(20, 64, seed=0)) == 20 + 190 + 1


def test_of_very_many_midpoints_a_part_is_looked_at_and_all_corners():
    starts = certifying._starts(256, 64, seed=0)
    assert len(starts) == certifying.LOOKED
    assert torch.equal(starts[:256], torch.eye(256).double())
    assert len({tuple(row.nonzero().flatten().tolist()) for row in starts}) == len(starts)
    assert torch.equal(certifying._starts(256, 64, seed=0), starts)
    assert len(certifying._starts(256, 4096, seed=0)) == 4096


def test_a_search_goes_on_from_no_more_starts_than_were_asked_for_the_worst(mlp, digits):
    tap, sizes = model_tap(mlp, digits), []
    corners = torch.cat([digits, digits.flip(3)])[:30]  # 466 corners, midpoints and centroid
    handle = tap.network.fc3.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = worst_point(tap, corners, 3, starts=16, steps=5)
    handle.remove()
    each = chunk(corners[0])
    assert sizes[:2] == [each, 466 - each]
    assert max(sizes[2:]) == 16
    with torch.no_grad():
        assert found.margin <= float(margins_of(tap.logits(corners), 3).min()) + 1e-5


def test_each_step_is_told(mlp, digits):
    told = []
    worst_point(model_tap(mlp, digits), digits[:2], 0, steps=7, on_step=lambda: told.append(1))
    assert len(told) == 8  # the starts, and seven steps from them


# Certificates


@pytest.mark.parametrize("name", LAYERS)
def test_a_hull_of_one_class_is_certified(request, digits, name):
    model = request.getfixturevalue(name.removeprefix("mnist-"))
    tap, corners = model_tap(model, digits), close_to(digits[6], 5, 0.05)
    found = certify(tap, corners, 3, max_seconds=60)
    assert found.outcome == "certified"
    assert found.certified_fraction == 1
    assert found.reason is None and found.weights is None
    # What is proved lies below what is seen, but for the rounding of two logits.
    assert 0 < found.bound <= worst_point(tap, corners, 3).margin + 2 * found.float32_error


def test_bisection_proves_what_the_root_does_not(cnn, digits):
    tap, corners = model_tap(cnn, digits), close_to(digits[6], 3, 0.3)
    worst = worst_point(tap, corners, 3).margin
    found = certify(tap, corners, 3, max_seconds=60)
    assert found.outcome == "certified"
    assert found.subsimplices > 1
    assert 0 < found.bound <= worst + 2 * found.float32_error


@pytest.mark.parametrize("limit", [{"max_seconds": 0.0}, {"max_subsimplices": 5}])
def test_what_is_not_finished_is_unknown_and_its_bound_holds(cnn, digits, limit):
    tap, corners = model_tap(cnn, digits), close_to(digits[6], 5, 0.3)
    worst = worst_point(tap, corners, 3).margin
    assert worst > 0
    found = certify(tap, corners, 3, **limit)
    assert found.outcome == "unknown"
    assert 0 <= found.certified_fraction < 1
    assert found.bound <= 0 < worst
    assert "used up" in found.reason


@pytest.mark.parametrize("firsts", [(-1, 1), (-1, 3), (-1, 3, 2)])
def test_a_hull_across_the_boundary_is_refuted_by_a_point_that_a_plain_forward_confirms(firsts):
    """Its corners have the class, and the centroid of two of them too."""
    tap, corners = tent(*firsts)
    found = certify(tap, corners, 0)
    assert found.outcome == "refuted"
    assert float(found.weights.sum()) == pytest.approx(1)
    mixed = torch.tensordot(found.weights.float(), corners, dims=1)
    assert int(tap.logits(mixed[None]).argmax()) == 1
    assert found.certified_fraction < 1


def test_a_worst_point_found_before_refutes_at_once(mlp, digits):
    tap = model_tap(mlp, digits)
    corners = digits[[6, 7, 14]]
    worst = worst_point(tap, corners[:2], 3)
    assert worst.margin > 0
    worst = worst_point(tap, corners, 3)
    found = certify(tap, corners, 3, candidate=worst.weights)
    assert (found.outcome, found.subsimplices) == ("refuted", 0)


def test_corners_of_another_class_refute(mlp, digits):
    found = certify(model_tap(mlp, digits), digits[[6, 14]], 3)
    assert found.outcome == "refuted"
    assert found.weights.tolist() == [0, 1]


def test_one_corner_is_its_own_hull(mlp, digits):
    tap = model_tap(mlp, digits)
    found = certify(tap, digits[6:7], 3)
    assert found.outcome == "certified"
    assert found.bound == pytest.approx(float(margins(tap, digits[6:7], 3)), abs=1e-4)


def test_a_tie_is_neither_proved_nor_refuted():
    tap, corners = tent(1, other=1.0)
    found = certify(tap, corners, 0)
    assert found.outcome == "unknown"
    assert found.certified_fraction == 0


def test_a_network_without_relaxation_is_unknown_by_name():
    network = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid())
    network[2].weight.data = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
    network[2].bias.data = torch.tensor([1.0, 0])
    found = certify(tap_of(network), torch.rand(3, 1, 2, 2), 0)
    assert found.outcome == "unknown"
    assert found.certified_fraction == 0
    assert "sigmoid" in found.reason


def test_a_network_that_would_take_too_much_memory_is_refused(monkeypatch, mlp, digits):
    monkeypatch.setattr(certifying, "MEMORY", 2**10)
    found = certify(model_tap(mlp, digits), digits[[6, 7]], 3)
    assert found.outcome == "unknown"
    assert "GiB" in found.reason


def test_hopeless_bounds_are_given_up_at_once():
    # 1 + 1e5 (relu(p) - relu(p)): always 1, but each relu has a bound of its own.
    tap, corners = tent(-1, 1, 3e-4, gain=-1e5, other=-1)
    tap.network[1].weight.data[1, 0] = 1.0
    tap.network[3].weight.data[0, 0] = 1e5
    found = certify(tap, corners, 0)
    assert (found.outcome, found.subsimplices, found.certified_fraction) == ("unknown", 0, 0)
    assert found.bound is None
    assert "too loose" in found.reason


def test_the_same_hull_gives_the_same_certificate(cnn, digits):
    tap, corners = model_tap(cnn, digits), close_to(digits[6], 3, 0.3)
    first, second = (certify(tap, corners, 3, max_seconds=60) for _ in range(2))
    assert (first.bound, first.subsimplices) == (second.bound, second.subsimplices)


# The network that is proved is the network


class Bump(nn.Module):
    """The margin of class 0 is 1, and -1 at a first pixel of 0.3, where `bumps` says so."""

    def __init__(self, bumps):
        super().__init__()
        self.bumps = bumps
        self.first, self.bends = nn.Linear(4, 3), nn.Linear(3, 2)
        self.first.weight.data = torch.tensor([[1.0, 0, 0, 0]] * 3)
        self.first.bias.data = -torch.tensor([0.2985, 0.3, 0.3015])
        self.bends.weight.data = -torch.tensor([[1.0, -2, 1], [0, 0, 0]]) * 2 / 0.0015
        self.flat = nn.Linear(3, 2)
        self.flat.weight.data.zero_()
        self.bends.bias.data = self.flat.bias.data = torch.tensor([1.0, 0])
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.relu(self.first(x.flatten(1)))
        if self.bumps(x):
            return self.bends(h)
        return self.flat(h)


def between_0_and_1(bumps) -> tuple[Tap, Tensor]:
    corners = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2).clone()
    network = Bump(bumps).eval().requires_grad_(False)
    return open_tap(nn.Identity(), network, "relu", corners[:1]), corners


def test_a_bump_that_only_real_tensors_meet_is_seen():
    tap, corners = between_0_and_1(lambda x: isinstance(x, Tensor))
    mixed = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert tap.logits(mixed).argmax(1).tolist() == [0, 1, 0]
    assert certify(tap, corners, 0, max_seconds=30).outcome == "refuted"
    flat, corners = between_0_and_1(lambda x: not isinstance(x, Tensor))
    assert certify(flat, corners, 0).outcome == "certified"


def near(value: float) -> bool:
    return 0.2985 < value < 0.3015


def tries(x: Tensor) -> bool:
    try:
        return near(float(x.mean()))
    except RuntimeError:
        return False


def tries_unseen(x: Tensor) -> bool:
    try:
        return near(x.mean().tolist())
    except (RuntimeError, NotImplementedError):
        return False


@pytest.mark.parametrize(
    "bumps",
    [
        lambda x: near(float(x.mean())),
        lambda x: near(x.mean()),
        lambda x: near(x.mean().item()),
        lambda x: near(x.numpy().mean()),
        lambda x: near(np.mean(x.tolist())),
        lambda x: torch.equal(x, torch.full_like(x, 0.3)),
        lambda x: len(x[(x - 0.3).abs() < 0.0015]) > 0,
        lambda x: x.device.type == "cpu" and near(x.numpy().mean()),
        lambda x: type(x) is Tensor and near(float(x.mean())),
        tries,
        tries_unseen,
        lambda x: x.dtype == torch.float32,
        lambda x: len(x) == 1,
    ],
)
def test_a_network_whose_course_is_not_the_same_for_every_image_is_not_certified(bumps):
    tap, corners = between_0_and_1(bumps)
    found = certify(tap, corners, 0)
    assert found.outcome in ("unknown", "refuted")
    if found.outcome == "unknown":
        assert "nothing can be proved" in found.reason


def test_what_was_read_is_compared_with_the_network_on_the_hull(monkeypatch):
    """A reader that is wrong between the corners, where random images are not."""
    tap, corners = between_0_and_1(lambda x: True)
    corners = 2 + corners  # random images are in [0, 1]
    assert certify(tap, corners, 0).outcome == "certified"
    real = program.evaluate

    def wrong(read, images):
        values = real(read, images)
        return [*values[:-1], values[-1] + (images.flatten(1)[:, :1] > 1.5)]

    monkeypatch.setattr(program, "evaluate", wrong)
    found = certify(tap, corners, 0)
    assert found.outcome == "unknown" and "computes something else" in found.reason


def test_reading_in_one_thread_leaves_networks_in_others_alone(cnn, digits):
    """fx patches torch's modules for all threads."""
    ended = threading.Event()
    failed = []

    def use() -> None:
        while not ended.is_set():
            try:
                cnn.classifier(digits[:1])
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(5):
            program.read(cnn.classifier.normalize, cnn.classifier.network, (1, 28, 28))
    finally:
        ended.set()
        thread.join()
    assert not failed


@pytest.mark.parametrize(("bound", "holds"), [(0.388, False), (1.02, False), (1.03, True)])
def test_a_bound_holds_in_float32_where_it_is_over_twice_the_error(bound, holds):
    proved = certifying.Certificate("certified", bound, 1, 1.0, 0.1, float32_error=0.513)
    assert proved.holds_in_float32 is holds
    unknown = certifying.Certificate("unknown", bound, 1, 0.5, 0.1)
    assert unknown.holds_in_float32 is None


def test_a_midpoint_that_float64_does_not_have_is_refused():
    tap, corners = tent(1, 2)
    search = certifying._Search(tap, corners, 0, 1.0, 10, lambda: None)
    exact = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]], dtype=torch.float64)
    assert search._bisect(exact)[0].tolist() == [[0.625, 0.375], [0.25, 0.75]]
    least = 2.0**-53
    inexact = torch.tensor([[[1.0, 0.0], [least, 1 - least]]], dtype=torch.float64)
    assert float(inexact.sum(2).sub(1).abs().max()) == 0
    assert search._bisect(inexact) is None
