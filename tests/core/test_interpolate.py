"""Samples and measures beside closed forms, scipy, and a forward pass in float64 numpy."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import special, stats
from scipy.spatial import distance
from torch import Tensor, nn

from core import images, interpolate
from core.interpolate import (
    Looked,
    Samples,
    clopper_pearson,
    mean_of_pairs,
    measure_ball,
    measure_polytope,
    natural_distance,
    pairwise_distance,
    sample_polytope,
    simplex_weights,
    summarize,
    to_8bit_,
    unit_ball,
)
from core.models import ASSETS, Model
from core.objective import Target
from core.taps import Tap, open_tap

Floats = NDArray[np.float64]

MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist" / "test.npz"
needs_mnist = pytest.mark.skipif(not MNIST.is_file(), reason=f"there is no {MNIST}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Weights


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["uniform", "paper"]),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(0, 2**32),
)
def test_weights_are_not_negative_and_sum_to_1(
    sampler: str, samples: int, corners: int, seed: int
) -> None:
    weights = simplex_weights(sampler, samples, corners, np.random.default_rng(seed))
    assert weights.shape == (samples, corners)
    assert weights.dtype == np.float64
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=0, atol=1e-12)


N = 100_000


@pytest.mark.parametrize("corners", [2, 3, 5, 10])
def test_the_uniform_sampler_has_the_moments_and_marginals_of_dirichlet_1(corners: int) -> None:
    weights = simplex_weights("uniform", N, corners, np.random.default_rng(1))
    mean, variance = 1 / corners, (corners - 1) / (corners**2 * (corners + 1))
    error = math.sqrt(variance / N)
    np.testing.assert_allclose(weights.mean(0), mean, rtol=0, atol=5 * error)
    covariance = np.cov(weights.T)
    np.testing.assert_allclose(np.diag(covariance), variance, rtol=0.05)
    off = covariance[~np.eye(corners, dtype=bool)]
    np.testing.assert_allclose(off, -variance / (corners - 1), rtol=0.1)
    for column in weights[:5000].T:
        assert stats.kstest(column, stats.beta(1, corners - 1).cdf).pvalue > 1e-4


@pytest.mark.parametrize("corners", [2, 3, 5, 10])
def test_the_papers_sampler_halves_what_is_left(corners: int) -> None:
    """Each weight is uniform in what the earlier ones left: E w = 2^-i, E w^2 = 3^-i."""
    weights = simplex_weights("paper", N, corners, np.random.default_rng(2))
    power = np.array([*range(1, corners), corners - 1])
    mean, square = 0.5**power, (1 / 3.0) ** power
    error = np.sqrt((square - mean**2) / N)
    assert (np.abs(weights.mean(0) - mean) < 5 * error).all()
    np.testing.assert_allclose((weights**2).mean(0), square, rtol=0.15)
    left = 1.0 - np.cumsum(weights, 1)
    shares = weights[:5000, 0], weights[:5000, 1] / (1.0 if corners == 2 else left[:5000, 0])
    for share in shares:
        assert stats.kstest(share, "uniform").pvalue > 1e-4


def test_the_paper_weights_of_five_corners_have_the_means_we_report() -> None:
    weights = simplex_weights("paper", N, 5, np.random.default_rng(3))
    np.testing.assert_allclose(weights.mean(0), [0.5, 0.25, 0.125, 0.0625, 0.0625], atol=5e-3)


@pytest.mark.parametrize("sampler", ["uniform", "paper"])
def test_one_corner_has_weight_1_and_a_seed_gives_its_weights_again(sampler: str) -> None:
    assert (simplex_weights(sampler, 7, 1, np.random.default_rng(0)) == 1).all()
    first, again, other = (
        simplex_weights(sampler, 7, 4, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# Distances


@pytest.mark.parametrize("corners", [1, 2, 7, 40])
def test_pairwise_distances_equal_scipys(corners: int) -> None:
    images = torch.rand(corners, 2, 9, 5, generator=generator())
    images[-1] = images[0] + 1e-4  # near ones are exact too
    got = pairwise_distance(images)
    flat = images.flatten(1).double().numpy()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, distance.squareform(distance.pdist(flat)), rtol=1e-12, atol=0)
    mean = distance.pdist(flat).mean() if corners > 1 else 0.0
    assert mean_of_pairs(got) == pytest.approx(mean, rel=1e-12)


def test_a_polytope_is_measured_beside_the_natural_distance() -> None:
    corners = torch.rand(5, 1, 4, 4, generator=generator())
    flat = corners.flatten(1).double().numpy()
    got = measure_polytope(corners, (2.5, "toy images"))
    assert got.mean_pairwise_distance == pytest.approx(distance.pdist(flat).mean(), rel=1e-12)
    assert got.spread == pytest.approx(distance.pdist(flat).mean() / 2.5, rel=1e-12)
    assert (got.natural_distance, got.natural_distance_of) == (2.5, "toy images")
    np.testing.assert_allclose(got.pairwise_distance, distance.cdist(flat, flat), rtol=1e-12)
    assert json.loads(got.model_dump_json())["pairwise_distance"][0][0] == 0


def test_one_corner_or_five_alike_have_no_spread() -> None:
    image = torch.rand(1, 1, 4, 4, generator=generator())
    for corners in (image, image.expand(5, -1, -1, -1)):
        assert measure_polytope(corners, (2.5, "")).spread == 0


def test_the_reference_is_the_papers_in_colour_and_mnists_in_grey() -> None:
    digits = natural_distance((1, 28, 28))
    assert digits == (pytest.approx(10.21, rel=0.01), "MNIST test images")  # the paper's 10.21
    photos, of = natural_distance((3, 224, 224))
    assert photos * 255 == pytest.approx(37538.22, abs=0.02)
    assert of == "ImageNet images (the paper's 37538.22 for 224 x 224 on the 0-255 scale)"


@pytest.mark.parametrize(
    ("shape", "factor", "told"),
    [
        ((3, 227, 227), 227 / 224, "times 1.013 for 227 x 227"),
        ((3, 56, 224), 0.5, "times 0.5 for 56 x 224"),
        ((1, 32, 32), 32 / 28, "times 1.143 for 32 x 32"),
    ],
)
def test_at_other_sizes_the_reference_grows_with_the_root_of_the_pixels_and_says_so(
    shape: tuple[int, int, int], factor: float, told: str
) -> None:
    own, of = natural_distance((3, 224, 224) if shape[0] == 3 else (1, 28, 28))
    distance, named = natural_distance(shape)
    assert distance == pytest.approx(factor * own, rel=1e-12)
    assert named == f"{of}, {told}"


def test_the_distance_of_resized_photographs_does_grow_so() -> None:
    names = [name for name in images.sample_names() if name.startswith("photos/")]
    each = []
    for side in (64, 224, 299):
        shape = images.Preprocessing("RGB", size=(side, side))
        files = [images.load(*images.read(f"sample:{name}"), shape).pixels for name in names]
        apart = pairwise_distance(torch.from_numpy(np.stack(files)))
        each.append(mean_of_pairs(apart) / natural_distance((3, side, side))[0])
    assert max(each) / min(each) < 1.05


@needs_mnist
def test_the_natural_distance_of_mnist_is_that_of_random_test_images() -> None:
    pixels = np.load(MNIST)["images"].reshape(10_000, -1) / 255
    pairs = np.random.default_rng(0).permutation(10_000).reshape(2, -1)
    apart = np.linalg.norm(pixels[pairs[0]] - pixels[pairs[1]], axis=1)
    shipped, _ = natural_distance((1, 28, 28))
    assert abs(apart.mean() - shipped) < 4 * apart.std() / math.sqrt(len(apart))


# The interval


@pytest.mark.parametrize("confidence", [0.95, 0.99, 0.5])
@pytest.mark.parametrize(
    ("hits", "samples"),
    [
        (0, 1),
        (1, 1),
        (0, 10),
        (10, 10),
        (3, 10),
        (57, 113),
        (0, 2000),
        (1999, 2000),
        (2000, 2000),
        (3, 100_000),
        (100_000, 100_000),
    ],
)
def test_clopper_pearson_equals_scipys_exact_interval(
    hits: int, samples: int, confidence: float
) -> None:
    got = clopper_pearson(hits, samples, confidence)
    wanted = stats.binomtest(hits, samples).proportion_ci(confidence, "exact")
    assert got == pytest.approx((wanted.low, wanted.high), rel=1e-9, abs=1e-12)
    if confidence == 0.95:
        assert clopper_pearson(hits, samples) == got


def test_all_hits_of_n_have_the_interval_of_the_textbook() -> None:
    assert clopper_pearson(2000, 2000) == (pytest.approx(0.025 ** (1 / 2000), rel=1e-12), 1.0)
    assert clopper_pearson(0, 2000) == (0.0, pytest.approx(1 - 0.025 ** (1 / 2000), rel=1e-9))


# The ball


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (3, 2, 2), (1, 28, 28)])
def test_radii_in_the_ball_are_those_of_a_uniform_point(shape: tuple[int, int, int]) -> None:
    """(r / R)^d is uniform in [0, 1]."""
    radius, d = 3.0, math.prod(shape)
    centre = torch.rand(shape, generator=generator(1)) * 0.01
    points = centre + radius * unit_ball(shape, 4000, generator())
    assert points.shape == (4000, *shape)
    lengths = (points.double() - centre.double()).flatten(1).norm(dim=1).numpy()
    volumes = (lengths / radius) ** d
    assert volumes.max() <= 1 + 1e-4
    assert stats.kstest(volumes, "uniform").pvalue > 1e-3
    assert volumes.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 4000))


def test_in_high_dimension_the_ball_is_its_surface() -> None:
    centre = torch.rand(3, 224, 224, generator=generator(1))
    points = centre + 5.0 * unit_ball(centre.shape, 8, generator())
    lengths = (points - centre).double().flatten(1).norm(dim=1)
    assert float(lengths.max()) < 5.001
    assert float(lengths.min()) > 4.999  # (4.999 / 5)^150528 is 1e-13
    flat = (points - centre).double().flatten(1) / lengths[:, None]
    cosines = (flat @ flat.T)[~torch.eye(8, dtype=torch.bool)]
    assert float(cosines.abs().max()) < 6 / math.sqrt(150_528)


def test_directions_in_the_ball_are_alike_on_all_axes() -> None:
    """A uniform point of a ball has mean 0 and covariance R^2 / (d + 2) on every axis."""
    n, radius = 40_000, 2.0
    moved = radius * unit_ball((3, 1, 1), n, generator()).flatten(1).double().numpy()
    variance = radius**2 / 5
    np.testing.assert_allclose(moved.mean(0), 0, atol=5 * math.sqrt(variance / n))
    np.testing.assert_allclose(np.cov(moved.T), variance * np.eye(3), atol=0.02 * radius**2)
    for axis in np.vstack([np.eye(3), np.ones((1, 3)) / math.sqrt(3)]):
        cosine = (moved @ axis) / np.linalg.norm(moved, axis=1)
        # Archimedes: the height of a point of a sphere is uniform.
        assert stats.kstest(cosine[:5000], stats.uniform(-1, 2).cdf).pvalue > 1e-3


class HalfSpace(nn.Module):
    """Two pixels' worth of nothing: label 0 where `normal` . x > `offset`, with a ReLU on the way.

    What it was given is kept in `seen`.
    """

    def __init__(self, normal: Tensor, offset: float) -> None:
        super().__init__()
        self.fc = nn.Linear(len(normal), 2)
        self.fc.weight.data = torch.stack([normal, -normal])
        self.fc.bias.data = torch.tensor([-offset, offset])
        self.seen: list[Tensor] = []
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        past = self.fc(x.flatten(1)).relu() @ torch.tensor([1.0, -1.0])
        return torch.stack([past, torch.zeros_like(past)], 1)


def cap(distance: float, radius: float, d: int) -> float:
    """The share of a ball past a plane at `distance` from its centre."""
    share = 1 - (distance / radius) ** 2
    return float(special.betainc((d + 1) / 2, 0.5, share)) / 2


CORNERS = torch.tensor([[1.0, 0.0, 0, 0], [0, 2.0, 0, 0], [0, 0, 3.0, 0]]).view(3, 1, 2, 2) / 4
CENTRE = CORNERS.mean(0)
RADIUS = math.sqrt((2 / 3) ** 2 + (2 / 3) ** 2 + 1) / 4  # to the first corner, the nearest


@pytest.mark.parametrize("chunk", [2**22, 4 * 301])
@pytest.mark.parametrize("beyond", [0.0, 0.1, 0.25])
def test_the_ball_collides_as_often_as_its_part_beyond_a_plane_is_large(
    monkeypatch: pytest.MonkeyPatch, beyond: float, chunk: int
) -> None:
    monkeypatch.setattr(interpolate, "CHUNK", chunk)
    normal = torch.tensor([0.5, -0.5, 0.5, 0.5])
    network = HalfSpace(normal, float(CENTRE.flatten() @ normal) + beyond)
    tap = open_tap(nn.Identity(), network, "fc", CENTRE[None])
    wanted = cap(beyond, RADIUS, 4)
    network.seen.clear()
    got = measure_ball(tap, 0, CORNERS, 5000, clip=False, seed=1)
    assert got.radius == pytest.approx(RADIUS, rel=1e-6)
    assert got.samples == 5000
    assert got.accuracy == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 5000))
    hits = round(got.accuracy * 5000)
    interval = stats.binomtest(hits, 5000).proportion_ci(0.95, "exact")
    assert got.accuracy_interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert got.clipped is False
    assert got.largest_radius == pytest.approx(RADIUS, rel=1e-2)  # 0.9 ** 4 of it is 0.66
    assert got.mean_radius == pytest.approx(0.8 * RADIUS, rel=0.02)  # d / (d + 1)
    opposite = measure_ball(tap, 1, CORNERS, 5000, clip=False, seed=1)
    assert opposite.accuracy == pytest.approx(1 - got.accuracy)
    assert max(map(len, network.seen)) == min(interpolate.ROWS, chunk // 4)


def test_only_a_clipped_ball_is_held_to_valid_pixels_and_a_seed_gives_it_again() -> None:
    network = HalfSpace(torch.tensor([1.0, 0, 0, 0]), 0.2)
    tap = open_tap(nn.Identity(), network, "fc", CENTRE[None])

    def points(seed: int, *, clip: bool) -> Tensor:
        network.seen.clear()
        measure_ball(tap, 0, CORNERS, 300, clip=clip, seed=seed)
        return torch.cat(network.seen)

    free = points(1, clip=False)
    assert len(free) == 300
    assert float(free.min()) < 0
    assert float((free - CENTRE).flatten(1).norm(dim=1).max()) <= RADIUS * (1 + 1e-6)
    assert torch.equal(points(1, clip=False), free)
    assert torch.equal(points(1, clip=True), free.clamp(0, 1))
    assert not torch.equal(points(2, clip=False), free)
    clipped = measure_ball(tap, 0, CORNERS, 300, clip=True, seed=1)
    away = (free.clamp(0, 1) - CENTRE).flatten(1).norm(dim=1).double()
    told = clipped.least_radius, clipped.mean_radius, clipped.largest_radius
    assert told == pytest.approx((float(away.min()), float(away.mean()), float(away.max())))
    assert clipped.clipped and told[1] < 0.95 * float((free - CENTRE).flatten(1).norm(dim=1).mean())


def test_points_kept_for_the_next_job_are_those_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    network = HalfSpace(torch.tensor([1.0, 0, 0, 0]), 0.2)
    tap = open_tap(nn.Identity(), network, "fc", CENTRE[None])
    told: list[int] = []

    def points() -> Tensor:
        network.seen.clear()
        measure_ball(tap, 0, CORNERS, 900, clip=True, seed=5, on_chunk=lambda: told.append(0))
        return torch.cat(network.seen)

    interpolate._kept_unit_ball.cache_clear()
    kept = points()
    assert len(told) == 3
    assert torch.equal(points(), kept)
    assert interpolate._kept_unit_ball.cache_info()[:2] == (1, 1)
    monkeypatch.setattr(interpolate, "KEPT", 0)
    assert torch.equal(points(), kept)


def test_a_probability_is_that_of_softmax_however_far_apart_the_logits_are() -> None:
    logits = torch.randn(50, 10, generator=generator()) * 30
    logits[0, 3], logits[1, 3] = 5000.0, -5000.0
    wanted = special.softmax(logits.double().numpy(), 1)[:, 3]
    np.testing.assert_allclose(interpolate.probability_of(3, logits), wanted, rtol=1e-12)


# Rounding


def test_8_bits_are_numpys_rounding() -> None:
    pixels = torch.rand(3, 1, 40, 40, generator=generator()) * 1.4 - 0.2
    pixels[0, 0, 0, :7] = torch.tensor([-0.0, 0.5, 1.5, 2.5, 254.5, 255.4, -0.4]) / 255
    got = to_8bit_(pixels.clone())
    wanted = np.clip(np.rint(pixels.numpy() * np.float32(255)), 0, 255) / np.float32(255)
    assert np.array_equal(got.numpy(), wanted)
    assert torch.equal(to_8bit_(got.clone()), got)
    assert set((got * 255).round().flatten().int().tolist()) == set(range(256))


# Samples of the polytope


@dataclass
class Mnist:
    """A polytope of digits, and what float64 numpy says of its mixtures."""

    tap: Tap
    target: Target
    corners: Tensor
    weights: Floats
    label: int = 7

    def look(self, images: Floats) -> Looked:
        w = load_file(ASSETS / "mnist-mlp.safetensors")
        h, pre = images.reshape(len(images), -1), {}
        for layer in ("fc1", "fc2", "fc3"):
            weight, bias = (w[f"{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
            pre[layer] = h @ weight.T + bias
            h = np.maximum(pre[layer], 0)
        goal = np.maximum(self.target.pre.double().numpy(), 0)
        here, there = pre[self.tap.layer.name], self.target.pre.double().numpy()
        return Looked(
            special.softmax(pre["fc3"], 1)[:, self.label],
            pre["fc3"].argmax(1),
            np.linalg.norm(np.maximum(here, 0) - goal, axis=1) / np.linalg.norm(goal),
            ((here - there)[:, there >= 0] ** 2).sum(1),
            (np.maximum(here[:, there < 0], 0) ** 2).sum(1),
        )

    def images(self) -> Floats:
        return np.einsum("nk,kchw->nchw", self.weights, self.corners.double().numpy())

    def sample(self, *, mixes: bool = False) -> Samples:
        return sample_polytope(
            self.tap, self.target, self.label, self.corners, self.weights, mixes=mixes
        )


@pytest.fixture(params=["fc1", "fc2"])
def mnist(request: pytest.FixtureRequest, mlp: Model, digits: Tensor) -> Mnist:
    """Between a dim 7, a 9 and a 3, where labels differ and rounding counts."""
    tap = open_tap(mlp.classifier.normalize, mlp.classifier.network, request.param, digits[:1])
    target = Target(tap(digits[14:15])[0], tap.layer.activation)
    corners = torch.stack([digits[14] * 0.011, digits[18] * 0.017, digits[6] * 0.013])
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    return Mnist(tap, target, corners, weights)


def assert_looks(got: Looked, wanted: Looked, *, close: float = 1e-5) -> None:
    np.testing.assert_allclose(got.probability, wanted.probability, rtol=close)
    for name in ("residual", "l_pos", "violation"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=close, atol=1e-6)
    assert got.label.tolist() == wanted.label.tolist()
    assert (got.probability.dtype, got.label.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("mixes", [True, False])
def test_samples_look_as_a_forward_in_float64_numpy_says(mnist: Mnist, mixes: bool) -> None:
    samples = mnist.sample(mixes=mixes)
    wanted = mnist.look(mnist.images())
    assert_looks(samples.floats, wanted)
    rounded = mnist.look(np.rint(mnist.images() * 255) / 255)
    assert_looks(samples.rounded, rounded)
    # Rounding these dim images moves them much further than the error allowed above.
    assert np.abs(rounded.residual / wanted.residual - 1).max() > 3e-4
    assert np.abs(rounded.probability / wanted.probability - 1).max() > 3e-3
    assert samples.weights is mnist.weights


def test_samples_of_bright_digits_have_all_kinds_of_labels(mnist: Mnist) -> None:
    mnist.corners = mnist.corners / mnist.corners.amax((1, 2, 3), keepdim=True)
    samples = mnist.sample()
    wanted = mnist.look(mnist.images())
    assert len(set(wanted.label.tolist())) >= 3
    assert_looks(samples.floats, wanted, close=1e-4)


def test_weights_are_of_the_corners_in_their_order(mnist: Mnist) -> None:
    mnist.weights = np.eye(3)
    assert_looks(mnist.sample().floats, mnist.look(mnist.corners.double().numpy()))


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("per_pass", [1, 7, 50])
def test_chunks_change_nothing(
    mnist: Mnist, monkeypatch: pytest.MonkeyPatch, mixes: bool, per_pass: int
) -> None:
    whole = mnist.sample(mixes=mixes)
    sizes = []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(len(args[0]))

    monkeypatch.setattr(interpolate, "CHUNK", 784 * per_pass + 783)
    handle = mnist.tap.network.fc3.register_forward_pre_hook(count)  # type: ignore[union-attr]
    try:
        parts = mnist.sample(mixes=mixes)
    finally:
        handle.remove()
    full, rest = divmod(50, per_pass)
    assert sizes == 2 * ([per_pass] * full + [rest] * (rest > 0))
    assert_looks(parts.floats, whole.floats)
    assert_looks(parts.rounded, whole.rounded)


def test_images_larger_than_a_chunk_pass_one_by_one(
    mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mnist.sample()
    monkeypatch.setattr(interpolate, "CHUNK", 1)
    assert_looks(mnist.sample().floats, whole.floats)


def test_observing_many_images_in_chunks_equals_observing_them_at_once(
    mnist: Mnist, digits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mnist.tap.observe(digits)
    monkeypatch.setattr(interpolate, "CHUNK", 784 * 6)
    for part, all_at_once in zip(interpolate.observe(mnist.tap, digits), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-5, atol=1e-5)


def test_arrays_are_named_for_samples_npz(mnist: Mnist) -> None:
    samples = mnist.sample()
    arrays = samples.arrays()
    names = ["probability", "label", "residual", "l_pos", "violation"]
    assert list(arrays) == ["weights", *names, *(f"{name}_8bit" for name in names)]
    assert arrays["weights"] is samples.weights
    for name in names:
        assert arrays[name] is getattr(samples.floats, name)
        assert arrays[f"{name}_8bit"] is getattr(samples.rounded, name)


# Their summary


def looked(seed: int, hits: int, n: int = 200) -> Looked:
    rng = np.random.default_rng(seed)
    label = np.where(np.arange(n) < hits, 7, rng.integers(0, 7, n))
    losses = (rng.random(n) * 3 for _ in range(3))
    return Looked(rng.random(n), rng.permutation(label), *losses)


@pytest.mark.parametrize("hits", [(0, 200), (200, 0), (150, 149)])
def test_a_summary_has_numpys_numbers_for_floats_and_8_bits(hits: tuple[int, int]) -> None:
    floats, rounded = (looked(seed, count) for seed, count in enumerate(hits))
    samples = Samples(np.full((200, 4), 0.25), floats, rounded)
    got: dict[str, Any] = summarize(samples, "paper", 7, 1.7, (2.0, 2.5)).model_dump()
    wanted: dict[str, Any] = {"samples": 200, "sampler": "paper"}
    for suffix, part, count in (("", floats, hits[0]), ("_8bit", rounded, hits[1])):
        interval = stats.binomtest(count, 200).proportion_ci(0.95, "exact")
        ordered = np.sort(part.probability)
        places = {q: q * 199 for q in (0.01, 0.05, 0.5)}  # between which order statistics
        wanted |= {
            f"accuracy{suffix}": count / 200,
            f"accuracy_interval{suffix}": pytest.approx((interval.low, interval.high), rel=1e-9),
            f"mean_probability{suffix}": pytest.approx(part.probability.sum() / 200),
            f"min_probability{suffix}": ordered[0],
            f"probability_quantiles{suffix}": pytest.approx(
                {str(q): np.interp(at, np.arange(200), ordered) for q, at in places.items()}
            ),
            f"relative_residual{suffix}": pytest.approx(part.residual.sum() / 200),
            f"residual_to_random{suffix}": pytest.approx(part.residual.sum() / 200 / 1.7),
            f"max_relative_residual{suffix}": np.sort(part.residual)[-1],
            f"under_thresholds{suffix}": sum(
                each < 2.0 and other < 2.5
                for each, other in zip(part.l_pos, part.violation, strict=True)
            )
            / 200,
            f"max_over_threshold{suffix}": max(part.l_pos.max() / 2, part.violation.max() / 2.5),
        }
    assert got == wanted


def test_without_a_threshold_of_violation_samples_are_judged_by_l_pos_alone() -> None:
    one = looked(0, 200)
    got = summarize(Samples(np.full((200, 4), 0.25), one, one), "uniform", 7, 1.0, (2.0, math.inf))
    assert got.under_thresholds == (one.l_pos < 2).mean() == got.under_thresholds_8bit
    assert got.max_over_threshold == one.l_pos.max() / 2
