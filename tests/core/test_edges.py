"""Walks along edges against closed forms, dense samples, a second count of pieces, and the
straightness of every piece; and kinks that are wrong on purpose."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core import edges
from core.edges import walk
from core.program import Program, read

SHAPE = (2, 8, 9)
PLAIN = nn.Identity()


class Mixed(nn.Module):
    """Clips at both ends, windows that overlap and are padded, branches that meet by cat and add,
    and numbers that are clipped or pooled twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 3, 1)
        self.right = nn.Conv2d(4, 3, 3, padding=1)
        self.hidden = nn.Linear(6 * 4 * 5, 12)
        self.again = nn.Linear(12, 12)
        self.last = nn.Linear(12, 4)
        for parameter in self.parameters():
            parameter.data.mul_(3)
        self.eval().requires_grad_(False).double()

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu6(self.first(images)), 3, 2, padding=1)
        x = torch.cat([functional.relu(self.left(x)), self.right(x)], 1)
        x = functional.hardtanh(x, 0.0, 4.0) + functional.max_pool2d(x, 3, stride=1, padding=1)
        x = functional.relu(self.hidden(x.flatten(1)))
        return self.last(x + functional.relu6(self.again(x)))


def dense(*sizes: int, seed: int = 0, gain: float = 1.5) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    for parameter in network.parameters():
        parameter.data.mul_(gain)
    return network.eval().requires_grad_(False).double()


def images(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).double()


def program_of(network: nn.Module, shape: tuple[int, ...] = SHAPE) -> Program:
    return read(PLAIN, network, shape)


def along(places: Tensor, ends: Tensor) -> Tensor:
    """The images at `places` [N] of the line between `ends` [2, C, H, W]."""
    return torch.tensordot(torch.stack([1 - places, places], 1), ends, dims=1)


def margins(logits: Tensor, label: int) -> Tensor:
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.amax(1)


def sampled(network: nn.Module, ends: Tensor, count: int = 20_001) -> Tensor:
    """Logits [N, classes] at equal distances along the line."""
    places = torch.linspace(0, 1, count).double()
    return torch.cat([network(along(part, ends)) for part in places.split(500)])


# What is found


@pytest.mark.parametrize(
    "network", [dense(144, 60, 60, 4), Mixed(0), Mixed(1)], ids=["dense", "mixed", "other"]
)
def test_no_sample_is_lower_and_samples_come_close(network):
    program, inside = program_of(network), 0
    for seed in range(2, 5):
        ends = images(2, seed=seed)
        samples = sampled(network, ends)
        for label in range(4):
            found = walk(program, ends, label)
            assert (found.fraction, found.expected_seconds) == (1.0, None)
            seen = margins(samples, label)
            least, steepest = float(seen.min()), float(seen.diff().abs().max())
            assert least - steepest <= found.least_margin <= least + 1e-11
            (logits,) = network(torch.tensordot(found.weights[None], ends, dims=1))
            assert found.label == int(logits.argmax())
            assert float(margins(logits[None], label)) == pytest.approx(found.least_margin)
            inside += 0 < float(found.weights[0]) < 1
    # Else the ends would have told it all.
    assert inside > 0


@pytest.fixture
def looked_at(monkeypatch) -> list[Tensor]:
    """Fills with the images that a walk evaluates."""
    seen: list[Tensor] = []

    def remember(program: Program, images: Tensor) -> list[Tensor]:
        seen.append(images)
        return evaluate(program, images)

    evaluate = edges.evaluate
    monkeypatch.setattr(edges, "evaluate", remember)
    return seen


def bend(network: nn.Module, seen: list[Tensor], seed: int = 4) -> tuple[float, int]:
    """How far from straight the logits are between places that a walk looked at; their number."""
    ends = images(2, seed=seed)
    found = walk(program_of(network), ends, 0)
    assert found.fraction == 1
    line = (ends[1] - ends[0]).flatten()
    every = (torch.cat(seen).flatten(1) - ends[0].flatten()) @ line / (line @ line)
    places = every.sort().values
    places = places[places.diff(prepend=places.new_full((1,), -1)) > 1e-12]
    worst = 0.0
    for part in (0.21, 0.5, 0.83):
        between = places[:-1] + part * places.diff()
        logits = network(along(places, ends))
        straight = logits[:-1] + part * logits.diff(dim=0)
        worst = max(worst, float((network(along(between, ends)) - straight).abs().max()))
    return worst, found.pieces


@pytest.mark.parametrize("seed", range(3))
def test_every_piece_is_straight(looked_at, seed):
    off, pieces = bend(Mixed(seed), looked_at)
    assert off < 1e-9
    assert pieces > 200


# Kinks that are wrong on purpose: each must show.


def _no_kinks(step, inner, places, tolerance):
    return places[:0]


def _without_high(step, inner, places, tolerance):
    return edges._clip_kinks(SimpleNamespace(high=math.inf), inner, places, tolerance)


def _only_rising(step, inner, places, tolerance):
    return edges._clip_kinks(step, torch.cummax(inner, 0).values, places, tolerance)


def _half_way(kinks):
    def wrong(step, inner, places, tolerance):
        exact = kinks(step, inner, places, tolerance)
        after = torch.searchsorted(places, exact).clamp(1, len(places) - 1)
        return (places[after - 1] + places[after]) / 2

    return wrong


def _from_end_to_end(step, inner, places, tolerance):
    """Where the lines of the first and the last greatest entry cross: a third may lie above."""
    first, last = step.apply(inner[:-1])[1].flatten(2), step.apply(inner[1:])[1].flatten(2)
    flat = inner.flatten(2)
    gaps = [side.gather(2, last) - side.gather(2, first) for side in (flat[:-1], flat[1:])]
    part = gaps[0] / (gaps[0] - gaps[1])
    kinks = places[:-1, None, None] + part * places.diff()[:, None, None]
    return kinks[first != last]


@pytest.mark.parametrize(
    ("operation", "kinks"),
    [
        ("clip", _no_kinks),
        ("clip", _without_high),
        ("clip", _only_rising),
        ("clip", _half_way(edges._clip_kinks)),
        ("max_pool", _no_kinks),
        ("max_pool", _half_way(edges._max_pool_kinks)),
        ("max_pool", _from_end_to_end),
    ],
)
def test_a_wrong_kink_shows(monkeypatch, looked_at, operation, kinks):
    monkeypatch.setitem(edges.KINKS, operation, kinks)
    off, _ = bend(Mixed(0), looked_at)
    assert off > 1e-6


# How many pieces


@pytest.mark.parametrize("high", [math.inf, 6.0])
def test_the_pieces_of_one_hidden_layer_are_those_of_its_sorted_roots(high):
    network = dense(144, 80, 3, gain=2.0)
    if math.isfinite(high):
        network[2] = nn.ReLU6()
    ends = images(2, seed=1)
    start, end = network[1](ends.flatten(1))
    roots = torch.cat([(level - start) / (end - start) for level in (0.0, high)])
    within = roots[(roots > 0) & (roots < 1)]
    found = walk(program_of(network), ends, 0)
    assert found.pieces == len(within) + 1 > 40
    places = torch.cat([within, torch.tensor([0.0, 1.0])])
    least = float(margins(network(along(places, ends)), 0).min())
    assert found.least_margin == pytest.approx(least, abs=1e-11)


@pytest.mark.parametrize(
    ("lines", "pieces"),
    [
        # -4t meets t - 1 at 1/5; that meets 2.5t - 2 at 2/3; that meets 7t - 6 at 8/9.
        ([(0.0, -4.0), (-1.0, 0.0), (-2.0, 0.5), (-6.0, 1.0)], 4),
        # The third is the greatest nowhere, the fourth at the end alone.
        ([(0.0, -2.0), (-2.0, 0.0), (-1.1, -1.1), (-3.0, 0.0)], 2),
        # At the start the first two differ by rounding.
        ([(1 + 1e-14, 1.0), (1.0, 1 + 1e-6), (0.0, 0.0), (0.5, 0.6)], 1),
    ],
)
def test_the_pieces_of_a_window_are_those_of_its_upper_envelope(lines, pieces):
    network = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2)).double()
    network.requires_grad_(False)
    ends = torch.tensor(lines, dtype=torch.float64).T.reshape(2, 1, 2, 2)
    assert walk(program_of(network, (1, 2, 2)), ends, 0).pieces == pieces


def test_pools_of_zeros_have_no_kinks():
    """What a clip makes 0 is greatest nowhere and everywhere."""
    network = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2)).double()
    network.requires_grad_(False)
    # Each is above 0 on a part of its own: 0.75 to 1, 0 to 0.25, and nowhere.
    ends = torch.tensor([[[-3.0, 1.0, -1, -1]], [[1.0, -3.0, -1, -2]]]).double().view(2, 1, 2, 2)
    assert walk(program_of(network, (1, 2, 2)), ends, 0).pieces == 3


def test_what_is_0_but_for_rounding_has_no_kinks():
    network = dense(144, 40, 3)
    half = network[1].weight.data[:, :72]
    network[1].weight.data = torch.cat([half, -half], 1)
    network[1].bias.data.zero_()
    ends = images(2, (1, 8, 9)).expand(2, 2, 8, 9)
    assert network[1](ends.flatten(1)).count_nonzero() > 0
    assert walk(program_of(network), ends, 0).pieces == 1


def signs(network: nn.Module, ends: Tensor, places: np.ndarray) -> np.ndarray:
    """[N, units]: which units of the two hidden layers of mnist-mlp are above 0, by numpy."""
    first, second = (
        (layer.weight.double().numpy().T, layer.bias.double().numpy())
        for layer in (network.fc1, network.fc2)
    )
    start, end = ends.double().flatten(1).numpy()
    one = (start + places[:, None] * (end - start)) @ first[0] + first[1]
    two = np.maximum(one, 0) @ second[0] + second[1]
    return np.concatenate([one, two], 1) > 0


def bisected(network: nn.Module, ends: Tensor) -> int:
    """Pieces of the line: units that change sign in the least intervals of a bisection.

    Where signs are the same at both ends of an interval they are so within.
    """
    places = np.linspace(0, 1, 513)
    left, right = places[:-1], places[1:]
    for _ in range(28):
        changed = (signs(network, ends, left) != signs(network, ends, right)).any(1)
        left, right = left[changed], right[changed]
        middle = (left + right) / 2
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    return 1 + int((signs(network, ends, left) != signs(network, ends, right)).sum())


@pytest.mark.parametrize("pair", [(6, 14), (2, 9), (6, 7)])
def test_edges_between_digits_have_as_many_pieces_as_a_bisection_counts(mlp, digits, pair):
    network, ends = mlp.classifier.network, digits[list(pair)]
    program = read(mlp.classifier.normalize, network, (1, 28, 28))
    assert walk(program, ends, 3).pieces == bisected(network, ends) > 50


def test_pieces_and_least_margin_do_not_hang_on_the_stretches(monkeypatch):
    program, corners = program_of(Mixed(0)), images(2)
    whole = walk(program, corners, 1)
    for most in (3, 17):
        monkeypatch.setattr(edges, "MOST", most)
        found = walk(program, corners, 1)
        assert found.pieces == whole.pieces
        assert found.least_margin == pytest.approx(whole.least_margin, abs=1e-11)


# Violations


def spike(width: float) -> nn.Module:
    """Margin 1 for class 0, but for a spike down to -1 around 0.3 in the first pixel."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    network[1].weight.data.zero_()[:, 0] = 1 / width
    network[1].bias.data = torch.tensor([1.0, 0.0, -1.0]).double() - 0.3 / width
    network[3].weight.data = torch.tensor([[-2.0, 4.0, -2.0], [0, 0, 0]]).double()
    network[3].bias.data = torch.tensor([1.0, 0.0]).double()
    return network.requires_grad_(False)


@pytest.mark.parametrize("width", [1e-4, 1e-7])
def test_a_violation_that_samples_miss_is_found(width):
    network, ends = spike(width), torch.zeros(2, 1, 2, 2).double()
    ends[1, 0, 0, 0] = 1
    assert float(margins(sampled(network, ends, 2000), 0).min()) > 0
    found = walk(program_of(network, (1, 2, 2)), ends, 0)
    assert found.least_margin == pytest.approx(-1, abs=1e-6)
    assert found.weights.tolist() == pytest.approx([0.7, 0.3])
    assert (found.label, found.pieces) == (1, 4)


def test_weights_are_those_of_all_corners():
    corners = torch.zeros(4, 1, 2, 2).double()
    corners[:, 0, 0, 0] = torch.tensor([0.35, 0.4, 0.2, 0.36])
    found = walk(program_of(spike(1e-3), (1, 2, 2)), corners, 0)
    assert found.least_margin == pytest.approx(-1, abs=1e-9)
    assert found.weights.count_nonzero() == 2 and found.weights[2] > 0
    mixed = float(found.weights @ corners[:, 0, 0, 0])
    assert mixed == pytest.approx(0.3)


def test_corners_that_are_one_image_have_no_edges():
    found = walk(program_of(Mixed(0)), images(1).expand(3, -1, -1, -1), 0)
    assert (found.pieces, found.fraction, found.expected_seconds) == (0, 1.0, None)


# Time


def ticking(monkeypatch) -> None:
    """A clock that goes on by a second whenever it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(edges, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def test_what_time_leaves_unwalked_is_told_and_how_long_all_would_take(monkeypatch):
    monkeypatch.setattr(edges, "MOST", 8)
    program, corners = program_of(Mixed(0)), images(3)
    ticking(monkeypatch)
    whole = walk(program, corners, 1)
    part = walk(program, corners, 1, max_seconds=whole.seconds // 4)
    assert 0.1 < part.fraction < 0.4
    assert 0.1 < part.pieces / whole.pieces < 0.4
    assert whole.seconds / 2 < part.expected_seconds < 2 * whole.seconds
    assert part.least_margin >= whole.least_margin
    assert part.seconds <= whole.seconds // 4 + 3


def test_without_time_only_midpoints_are_looked_at(looked_at):
    ends = images(2)
    found = walk(program_of(Mixed(0)), ends, 1, max_seconds=0.0)
    assert (found.pieces, found.fraction, found.expected_seconds) == (0, 0.0, None)
    assert found.weights.tolist() == [0.5, 0.5]
    middle = Mixed(0)(ends.mean(0, keepdim=True))
    assert found.least_margin == pytest.approx(float(margins(middle, 1)))


def test_the_edge_whose_midpoint_is_worst_is_walked_first(monkeypatch):
    corners = torch.zeros(3, 1, 2, 2).double()
    corners[:, 0, 0, 0] = torch.tensor([0.9, 0.35, 0.25])
    ticking(monkeypatch)
    found = walk(program_of(spike(0.2), (1, 2, 2)), corners, 0, max_seconds=6)
    # The lines are 0.55, 0.65 and 0.1 long; the last one's midpoint is the spike's end.
    assert 0 < found.fraction < 0.1 / 1.3 + 1e-6


def test_each_batch_is_told(looked_at):
    told = []
    walk(program_of(Mixed(0)), images(2), 0, on_step=lambda: told.append(1))
    assert len(told) == len(looked_at) - 1  # one is for what rounding may cost
    assert sum(map(len, looked_at)) > 200
