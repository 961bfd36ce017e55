"""Bounds against what they must enclose: dense samples, closed forms, exact fractions, and rules
that are wrong on purpose."""

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from core import bounds, program
from core.bounds import Enclosure, float32_error, mix
from core.models import Normalize
from core.program import READERS, Affine, UnsupportedNetwork, read

SHAPE = (2, 6, 7)
CORNERS = 4


class Everything(nn.Module):
    """Each operation that has a rule, twice around: branches, pools, shared and in-place calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.clip = nn.ReLU6()
        self.pool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.left = nn.Conv2d(4, 3, 1)
        self.right = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.late = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.average = nn.AvgPool2d(2, stride=1, padding=1)
        self.hard = nn.Hardtanh(0.0, 2.0)
        self.adaptive = nn.AdaptiveAvgPool2d((2, 2))
        self.dropout = nn.Dropout()
        self.hidden = nn.Linear(6 * 4 + 6, 9)
        self.again = nn.Linear(9, 9)
        self.last = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.clip(self.norm(self.first(images))))
        branches = torch.cat(
            [self.relu(self.left(x)), functional.relu(self.late(self.right(x)))], 1
        )
        x = self.hard(self.average(branches))
        x = x + functional.max_pool2d(x, 3, stride=1, padding=1)
        x = torch.cat([torch.flatten(self.adaptive(x), 1), x.mean((2, 3))], dim=1)
        x = self.dropout(functional.relu(self.hidden(x)))
        x = x + self.relu(self.again(x))
        return self.last(x.view(x.size(0), -1))


NORMALIZE = Normalize("BGR", scale=2.0, mean=(0.3, 0.6), std=(0.5, 0.9))


def everything(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = Everything()
    for parameter in network.parameters():
        parameter.data.mul_(2.5)
    norm = network.norm
    # Gains of both signs, and numbers that reach the clip at 6.
    norm.weight.data = torch.tensor([2.0, -3.0, 4.0, -0.5])
    norm.bias.data = torch.tensor([3.0, 3.0, 0.5, 1.0])
    norm.running_mean.copy_(torch.tensor([0.3, -0.4, 0.8, 0.1]))
    norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 0.25]))
    network.late.weight.data = torch.tensor([-1.0, 0.5, -0.7])
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=range(3))
def network(request) -> nn.Module:
    return everything(request.param)


def corners_of(seed: int, width: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(1, *SHAPE, generator=generator)
    return (base + width * (torch.rand(CORNERS, *SHAPE, generator=generator) - 0.5)).double()


def simplices(seed: int) -> Tensor:
    """[S, K, K]: the whole one, a half, and small ones within."""
    rng = np.random.default_rng(seed)
    whole = torch.eye(CORNERS, dtype=torch.float64)
    half = whole.clone()
    half[1] = (half[0] + half[1]) / 2
    inner = torch.from_numpy(rng.dirichlet(np.ones(CORNERS), (2, CORNERS)))
    return torch.cat([whole[None], half[None], inner])


def points(seed: int) -> Tensor:
    """Barycentric weights [N, K]: vertices, points of edges, and of the interior."""
    rng = np.random.default_rng(seed)
    ends = np.eye(CORNERS)
    edges = [
        ends[i] * t + ends[j] * (1 - t)
        for i in range(CORNERS)
        for j in range(i)
        for t in (0.1, 0.5, 0.8)
    ]
    drawn = [rng.dirichlet(np.full(CORNERS, a), 60) for a in (0.3, 1.0)]
    return torch.from_numpy(np.concatenate([ends, edges, *drawn]))


def activations(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the network itself gives at each operation, in float64, by the steps' names."""
    whole = copy.deepcopy(nn.Sequential(NORMALIZE, network)).double()
    seen = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            value = func(*args, **kwargs or {})
            first = value[0] if isinstance(value, tuple) else value
            seen[f"{func.__name__.split('.')[0].removesuffix('_')}_{len(seen)}"] = first.clone()
            return value

    with Record():
        output = whole(images)
    return seen | {"output": output}


def excess(network: nn.Module, width: float = 1.0, seed: int = 0) -> float:
    """By how much the truth leaves its bounds at most, at the same barycentric weights."""
    corners, own = corners_of(seed, width), simplices(seed)
    program = read(NORMALIZE, network, SHAPE)
    vertices = mix(corners, own)
    enclosures = bounds.forward(program, vertices)
    inside = points(seed)
    worst = -math.inf
    truths = [
        activations(network, torch.tensordot(inside @ simplex, corners, dims=1)) for simplex in own
    ]
    for step, enclosure in zip(program.steps[1:], enclosures[1:], strict=True):
        truth = torch.stack([true[step.name] for true in truths])
        lower = torch.einsum("nk,sk...->sn...", inside, enclosure.lower)
        upper = torch.einsum("nk,sk...->sn...", inside, enclosure.upper)
        worst = max(worst, float(torch.maximum(lower - truth, truth - upper).max()))
    classes = truth.shape[-1]
    start = torch.eye(classes).double()[0] - torch.eye(classes).double()
    start = torch.cat([start[1:], -start[1:]]).expand(len(own), -1, -1)
    for stop in (0, 5):
        found = bounds.backward(program, enclosures, start, len(program.steps) - 1, stop)
        lower = torch.einsum("nk,srk->snr", inside, found)
        worst = max(worst, float((lower - torch.einsum("snc,src->snr", truth, start)).max()))
    for label in range(classes):
        found = bounds.margin_bounds(program, vertices, label)
        margins = truth[..., label, None] - truth
        margins[..., label] = math.inf
        worst = max(worst, float((found - margins.amin((1, 2))).max()))
    return worst


# Sampled truth and what mixes bounds round to about 1e-14; a shortcut is off by 1e-3 and more.
ROUNDING = 1e-10


@pytest.mark.parametrize("width", [0.01, 0.3, 1.0, 4.0])
def test_every_activation_and_margin_is_within_its_affine_bounds(network, width):
    assert excess(network, width) < ROUNDING


def test_bounds_of_smaller_simplices_come_to_the_truth(network):
    program, corners = read(NORMALIZE, network, SHAPE), corners_of(0, 1.0)
    centre = corners.mean(0)
    (logits,) = activations(network, centre[None])["output"]
    gaps = []
    for size in (1.0, 1e-2, 1e-4):
        vertices = mix(centre + size * (corners - centre), torch.eye(CORNERS).double()[None])
        rivals = [
            float(bounds.margin_bounds(program, vertices, label)) for label in range(len(logits))
        ]
        true = [
            float(logits[i] - torch.cat([logits[:i], logits[i + 1 :]]).max())
            for i in range(len(logits))
        ]
        gaps.append(max(t - r for t, r in zip(true, rivals, strict=True)))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-2


# Rules that are wrong on purpose: an unsound shortcut in any one of them must show.


def _any_sign(step, inputs):
    """The weights' signs are not looked at."""
    lower = step.affine.linear(*(e.lower.flatten(0, 1) for e in inputs)) + step.affine.bias
    upper = step.affine.linear(*(e.upper.flatten(0, 1) for e in inputs)) + step.affine.bias
    shape = inputs[0].lower.shape[:2]
    return Enclosure(lower.unflatten(0, shape), upper.unflatten(0, shape))


def _relu_of_lowers(step, inputs):
    sound = bounds._forward_clip(step, inputs)
    return Enclosure(inputs[0].lower.clamp(0, step.high), sound.upper)


def _clamp_of_uppers(step, inputs):
    sound = bounds._forward_clip(step, inputs)
    return Enclosure(sound.lower, inputs[0].upper.clamp(0, step.high))


def _entry_of_each_vertex(step, inputs):
    sound = bounds._forward_max_pool(step, inputs)
    lower = step.apply(inputs[0].lower.flatten(0, 1))[0].view_as(sound.lower)
    return Enclosure(lower, sound.upper)


def _entry_from_above(step, inputs):
    sound = bounds._forward_max_pool(step, inputs)
    return Enclosure(sound.lower, bounds._at(inputs[0].upper, bounds._selected(step, inputs[0])))


def _back(rule: Callable[..., Any], passed=lambda p: p, constant=lambda c: c) -> Callable[..., Any]:
    def wrong(*args):
        parts, added, size = rule(*args)
        return [passed(part) for part in parts], constant(added), size

    return wrong


def _back_swapped_sides(step, coefficients, inputs, output):
    parts, constant, size = bounds._backward_clip(step, -coefficients, inputs, output)
    return [-part for part in parts], -constant, size


def _back_cat_turned_round(step, coefficients, inputs, output):
    parts, constant, size = bounds._backward_rearrange(step, coefficients, inputs, output)
    same = len({part.shape for part in parts}) == 1
    return parts[::-1] if same else parts, constant, size


def _read_affine(
    reader: Callable[..., Any], change: Callable[[Affine], Affine]
) -> Callable[..., Any]:
    def wrong(call):
        step = reader(call)
        return replace(step, affine=change(step.affine))

    return wrong


def _without_bias(affine: Affine) -> Affine:
    return replace(affine, bias=torch.zeros_like(affine.bias))


def _absolute(affine: Affine) -> Affine:
    return replace(affine, linear=affine.absolute)


def _signed(affine: Affine) -> Affine:
    return replace(affine, absolute=affine.linear)


def _four_times(affine: Affine) -> Affine:
    linear = affine.linear
    return replace(affine, linear=lambda x: 4 * linear(x), absolute=lambda x: 4 * linear(x))


def _first_only(affine: Affine) -> Affine:
    return replace(affine, linear=lambda x, y: x, absolute=lambda x, y: x)


FORWARD_MUTANTS = {
    "weights of any sign": ("affine", _any_sign),
    "relu of lowers": ("clip", _relu_of_lowers),
    "clamping at vertices": ("clip", _clamp_of_uppers),
    "an entry of each vertex": ("max_pool", _entry_of_each_vertex),
    "one entry from above": ("max_pool", _entry_from_above),
}
BACKWARD_MUTANTS = {
    "no bias": ("affine", _back(bounds._backward_affine, constant=lambda c: 0 * c)),
    "weights turned": ("affine", _back(bounds._backward_affine, passed=torch.neg)),
    "lines without offset": ("clip", _back(bounds._backward_clip, constant=lambda c: 0 * c)),
    "lines on the wrong side": ("clip", _back_swapped_sides),
    "relu passed by": ("clip", lambda step, c, inputs, output: ([c], 0 * c.sum(), output.size())),
    "no excess": ("max_pool", _back(bounds._backward_max_pool, constant=lambda c: 0 * c)),
    "cat turned round": ("rearrange", _back_cat_turned_round),
}
READER_MUTANTS = {
    "linear without bias": ("linear", _without_bias),
    "linear, radius of signed weights": ("linear", _signed),
    "convolution without bias": ("convolution", _without_bias),
    "convolution, radius of signed weights": ("convolution", _signed),
    "batch norm without sign": ("batch_norm", _absolute),
    "batch norm without mean": ("batch_norm", _without_bias),
    "batch norm, radius of signed weights": ("batch_norm", _signed),
    "normalisation without mean": ("addcmul", _without_bias),
    "average without division": ("average_pool", _four_times),
    "adaptive average without division": ("adaptive_average_pool", _four_times),
    "mean without division": ("mean", _four_times),
    "add of one": ("add", _first_only),
}


def shows() -> bool:
    """Whether the samples see that something is wrong."""
    return any(
        excess(everything(seed), width) > 1e-6 for seed in range(3) for width in (1.0, 0.3, 4.0)
    )


@pytest.mark.parametrize("name", FORWARD_MUTANTS)
def test_a_wrong_forward_rule_shows(monkeypatch, name):
    monkeypatch.setitem(bounds.FORWARD, *FORWARD_MUTANTS[name])
    assert shows()


@pytest.mark.parametrize("name", BACKWARD_MUTANTS)
def test_a_wrong_backward_rule_shows(monkeypatch, name):
    monkeypatch.setitem(bounds.BACKWARD, *BACKWARD_MUTANTS[name])
    assert shows()


@pytest.mark.parametrize("name", READER_MUTANTS)
def test_a_wrong_reader_shows_and_is_refused_before(monkeypatch, name):
    operation, change = READER_MUTANTS[name]
    monkeypatch.setitem(READERS, operation, _read_affine(READERS[operation], change))
    if change is not _signed:
        with pytest.raises(UnsupportedNetwork, match="something else"):
            read(NORMALIZE, everything(0), SHAPE)
    monkeypatch.setattr(torch, "allclose", lambda *_: True)
    assert shows()


@pytest.mark.parametrize(
    "operation, reader",
    [
        ("cat", lambda call: call.rearrange(lambda *xs: torch.cat(xs[::-1], 1))),
        ("clip", program._read_relu),
        ("reshape", lambda call: call.rearrange(lambda x: x.flatten(1).flip(1))),
    ],
)
def test_a_layer_misread_shows_and_is_refused_before(monkeypatch, operation, reader):
    monkeypatch.setitem(READERS, operation, reader)
    with pytest.raises(UnsupportedNetwork, match="something else"):
        read(NORMALIZE, everything(0), SHAPE)
    monkeypatch.setattr(torch, "allclose", lambda *_: True)
    assert shows()


@pytest.mark.parametrize("side", [0, 1])
def test_lines_without_their_kink_show(monkeypatch, side):
    """A line through the ends of a range alone cuts off the corner of the clamp."""

    def chords(inner, high):
        low, top = inner.range()
        clamped = [x.clamp(0, high) for x in (low, top)]
        slope = (clamped[1] - clamped[0]) / (top - low).clamp(min=1e-12)
        lines = list(lines_of(inner, high))
        lines[side] = [bounds._Line(slope, clamped[0] - slope * low)]
        return tuple(lines)

    lines_of = bounds._lines
    monkeypatch.setattr(bounds, "_lines", chords)
    assert shows()


# Closed forms


def exact(*values: Any) -> Enclosure:
    tensor = torch.tensor(values, dtype=torch.float64)[None]
    return Enclosure(tensor, tensor)


def clip(inner: Enclosure, high: float) -> Enclosure:
    step = program.Step("clip", "clip", (0,), (), (), high=high)
    return bounds.FORWARD["clip"](step, [inner])


def test_relu_is_its_own_upper_bound_at_the_vertices():
    found = clip(exact([-1.0, -3.0, 2.0], [3.0, 1.0, 5.0]), math.inf)
    assert found.upper.tolist() == [[[0, 0, 2], [3, 1, 5]]]
    assert torch.allclose(found.lower, torch.tensor([[[-1.0, 0, 2], [3, 0, 5]]]).double())


def test_relu6_is_six_half_way_between_0_and_12():
    found = clip(exact([0.0], [12.0]), 6.0)
    assert found.upper.mean() >= 6
    assert torch.allclose(found.lower, torch.tensor([[[0.0], [6.0]]]).double())


def test_relu6_from_both_sides_has_the_closest_lines():
    found = clip(exact([-3.0], [9.0]), 6.0)
    # Above: through (-3, 0) and (6, 6). Below: through (0, 0) and (9, 6), or min(x, 6): as high on
    # average as the line is.
    assert torch.allclose(found.upper, torch.tensor([[[0.0], [8.0]]]).double())
    assert found.lower.mean() == pytest.approx(2.0)


@pytest.mark.parametrize(
    "values, high", [((1.0, 5.0), 6.0), ((-2.0, -1.0), 6.0), ((7.0, 9.0), 6.0)]
)
def test_a_unit_on_one_piece_is_exact(values, high):
    found = clip(exact(*([v] for v in values)), high)
    wanted = torch.tensor(values).double().clamp(0, high)
    for side in (found.lower, found.upper):
        assert torch.allclose(side.flatten(), wanted, atol=1e-12)


def test_an_affine_network_is_bounded_exactly():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(60, 5))
    corners, program = corners_of(0, 1.0), read(nn.Identity(), network, SHAPE)
    logits = network.double()(corners).detach()
    margins = logits[:, 2, None] - logits[:, [0, 1, 3, 4]]
    found = bounds.margin_bounds(program, mix(corners, torch.eye(CORNERS).double()[None]), 2)
    assert float(found) == pytest.approx(float(margins.min()), abs=1e-12)


# Rounding


def _fractions(tensor: Tensor) -> Any:
    return np.vectorize(Fraction, otypes=[object])(tensor.double().numpy())


def _misses(seed: int) -> bool:
    """Whether bounds of a tiny network leave out what exact fractions say of a point.

    Its sums cancel, so that what is left is full of rounding.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(84, 6), nn.ReLU(), nn.Linear(6, 3))
    network.requires_grad_(False)
    scale = 2.0 ** torch.randint(0, 25, (6, 42))
    half = torch.randn(6, 42) * scale
    network[1].weight.copy_(torch.cat([half, -half], 1) + 0.1 * torch.rand(6, 84))
    half = torch.rand(1, 1, 6, 7)
    corners = torch.cat([half, half], 1)
    image = _fractions(corners).flatten()
    hidden = np.maximum(_fractions(network[1].weight) @ image + _fractions(network[1].bias), 0)
    logits = _fractions(network[3].weight) @ hidden + _fractions(network[3].bias)
    program = read(nn.Identity(), network, SHAPE)
    vertices = mix(corners.double(), torch.ones(1, 1, 1).double())
    last = bounds.forward(program, vertices)[-1]
    lower, upper = _fractions(last.lower[0, 0]), _fractions(last.upper[0, 0])
    margin = min(logits[0] - logits[1], logits[0] - logits[2])
    found = Fraction(float(bounds.margin_bounds(program, vertices, 0)))
    return bool((lower > logits).any() or (logits > upper).any() or found > margin)


def test_bounds_hold_in_exact_arithmetic():
    assert not any(_misses(seed) for seed in range(20))


def test_without_its_margin_rounding_shows(monkeypatch):
    monkeypatch.setattr(bounds, "_gamma", lambda *_: 0.0)
    assert any(_misses(seed) for seed in range(20))


def test_float32_strays_no_further_than_it_may(network):
    program, corners = read(NORMALIZE, network, SHAPE), corners_of(0, 1.0).float().double()
    enclosures = bounds.forward(program, mix(corners, torch.eye(CORNERS).double()[None]))
    allowed = float32_error(program, enclosures)
    images = torch.tensordot(points(0), corners, dims=1)
    true = activations(network, images)["output"]
    strayed = (network(NORMALIZE(images.float())) - true).abs()
    assert (strayed <= allowed).all()
    assert strayed.max() > 0


# Networks that cannot be read


class Shares(nn.Module):
    """What is clipped in place, through a view of it, is used again."""

    def __init__(self, *settings: bool) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, images: Tensor) -> Tensor:
        both = images + images
        return functional.relu(both.flatten(1), *self.settings) + both.flatten(1)


class Branches(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else images.flatten(1) + 1


def hooked() -> nn.Module:
    layer = nn.Conv2d(2, 2, 3)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return nn.Sequential(layer, nn.Flatten())


class Wild(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


@pytest.mark.parametrize(
    "network, named",
    [
        (nn.Sequential(nn.Flatten(), nn.Sigmoid()), "sigmoid"),
        (Wild(lambda x: torch.tanh(x).flatten(1)), "tanh"),
        (Wild(lambda x: x.flatten(1).softmax(1)), "softmax"),
        (Wild(lambda x: operator.mul(x, x).flatten(1)), "multiply"),
        (Wild(lambda x: (1 / x).flatten(1)), "reciprocal"),
        (Wild(lambda x: torch.add(x, x, alpha=2).flatten(1)), "add"),
        (Wild(lambda x: torch.cat([x, x]).flatten(1)), "cat"),
        (Wild(lambda x: functional.dropout(x).flatten(1)), "bernoulli|dropout|empty_like"),
        (Wild(lambda x: functional.hardtanh(x, -1, 1).flatten(1)), "hardtanh"),
        (Wild(lambda x: (x.flatten(1), x)), "more than its logits"),
        (Wild(lambda x: torch.ones(len(x), 3)), "does not depend on the image"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding_mode="reflect", padding=1)), "its logits"),
        (
            nn.Sequential(nn.Conv2d(2, 2, 3, padding_mode="reflect", padding=1), nn.Flatten()),
            "reflection_pad2d",
        ),
        (Shares(True), "reshape"),
        (Wild(lambda x: x.flatten(1).matmul(torch.rand(84, 3).to(x))), "rand"),
    ],
)
def test_a_network_that_is_not_understood_is_refused_by_name(network, named):
    with pytest.raises(UnsupportedNetwork, match=named):
        read(nn.Identity(), network, SHAPE)


def test_what_is_clipped_out_of_place_may_be_used_again():
    program = read(nn.Identity(), Shares(), SHAPE)
    assert program.steps[-1].shape == (84,)
