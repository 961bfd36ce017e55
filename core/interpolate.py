"""Measuring a polytope: distances, samples of its interior, and the ball beside it."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from core.objective import Target, l_pos, residual, violation
from core.result import Ball, InterpolationResult, Polytope
from core.taps import Tap

Floats = NDArray[np.float64]

# Pixel values that one forward pass of measurement takes: 27 images of 224 x 224 x 3. On a CPU no
# more than ROWS images, since its cache holds what a small network makes of so many.
CHUNK, ROWS = 2**22, 384
# Points of the unit ball, which jobs of the same seed share, are kept up to so many values: 10 700
# of MNIST. Of so many sets at most.
KEPT, SETS = 2**23, 4
QUANTILES = (0.01, 0.05, 0.5)


@dataclass(frozen=True)
class Looked:
    """What the network makes of N images; `residual` is ||f(x) - f(t)|| / ||f(t)||."""

    probability: Floats
    label: NDArray[np.int64]
    residual: Floats
    l_pos: Floats
    violation: Floats


@dataclass(frozen=True)
class Samples:
    """Points of the polytope: barycentric weights [N, K], and how they look as float and 8-bit."""

    weights: Floats
    floats: Looked
    rounded: Looked

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """By the names they have in `samples.npz`."""
        named = {"": self.floats, "_8bit": self.rounded}
        looked = {
            f"{n}{suffix}": v for suffix, part in named.items() for n, v in vars(part).items()
        }
        return {"weights": self.weights, **looked}


def simplex_weights(sampler: str, samples: int, corners: int, rng: np.random.Generator) -> Floats:
    """Barycentric weights [N, K].

    `uniform` is Dirichlet(1, ..., 1). `paper` draws each weight uniformly from what the earlier
    ones left and gives the rest to the last: means 1/2, 1/4, ..., the last two alike.
    """
    if sampler == "uniform":
        return rng.dirichlet(np.ones(corners), samples)
    shares = rng.random((samples, corners))
    shares[:, -1] = 1.0
    left = np.cumprod(1 - shares[:, :-1], axis=1)
    return shares * np.hstack([np.ones((samples, 1)), left])


def pairwise_distance(images: Tensor) -> Floats:
    """Euclidean distances [K, K] on [0, 1] pixels."""
    flat = images.flatten(1).double()
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(flat, flat, compute_mode=exact).cpu().numpy()


def mean_of_pairs(distances: Floats) -> float:
    """The mean over pairs of different images of a symmetric [K, K] matrix; 0 for one image."""
    pairs = distances[np.triu_indices(len(distances), 1)]
    return float(pairs.mean()) if len(pairs) else 0.0


@cache
def _natural_distances() -> dict[int, tuple[tuple[int, int], float, str]]:
    """The references by their channels: (H, W), mean distance, and what it was taken of."""
    text = resources.files("core").joinpath("assets/natural_distance.json").read_text()
    return {
        entry["shape"][0]: (tuple(entry["shape"][1:]), entry["distance"], entry["of"])
        for entry in json.loads(text)
    }


@cache
def natural_distance(shape: tuple[int, ...]) -> tuple[float, str]:
    """Mean distance between random images of `shape` (C, H, W), and what it was taken of.

    There is one reference in colour, the paper's, and one in grey. At other sizes it is scaled with
    the square root of the number of pixels, as the distance of resized photographs is: that of 113
    ones differs per pixel by 3 % between 64 and 299 pixels a side. (Resizing blurs digits: theirs
    is 9 % less than so scaled.)
    """
    channels, height, width = shape
    (rows, columns), distance, of = _natural_distances()[channels]
    if (height, width) == (rows, columns):
        return distance, of
    factor = math.sqrt(height * width / (rows * columns))
    return factor * distance, f"{of}, times {factor:.4g} for {height} x {width}"


def measure_polytope(corners: Tensor, natural: tuple[float, str]) -> Polytope:
    """Distances between `corners` [K, C, H, W], and beside the `natural_distance`."""
    distances = pairwise_distance(corners)
    mean = mean_of_pairs(distances)
    return Polytope(
        mean_pairwise_distance=mean,
        pairwise_distance=distances.tolist(),
        natural_distance=natural[0],
        natural_distance_of=natural[1],
        spread=mean / natural[0],
    )


def clopper_pearson(hits: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval, from quantiles of the beta distribution."""
    tail = (1 - confidence) / 2
    low = special.betaincinv(hits, samples - hits + 1, tail) if hits else 0.0
    high = special.betaincinv(hits + 1, samples - hits, 1 - tail) if hits < samples else 1.0
    return float(low), float(high)


def to_8bit_(images: Tensor) -> Tensor:
    """Turns images into what an 8-bit file holds of them, again in [0, 1]. In place."""
    return images.mul_(255).round_().clamp_(0, 255).div_(255)


def probability_of(label: int, logits: Tensor) -> Tensor:
    """The softmax of `logits` [N, classes] at `label`, [N] in float64."""
    wide = logits.double()
    return (wide - wide[:, label, None]).exp_().sum(1).reciprocal_()


@torch.no_grad()
def sample_polytope(
    tap: Tap,
    target: Target,
    label: int,
    corners: Tensor,
    weights: Floats,
    *,
    mixes: bool,
    on_chunk: Callable[[], None] = lambda: None,
) -> Samples:
    """Looks at the mixtures `weights` [N, K] of `corners` [K, C, H, W].

    With `mixes` (`core.taps.mixes`) the first layer is computed for the corners only.
    """
    points = torch.from_numpy(weights).to(corners)

    def images(part: slice) -> Tensor:
        mixed: Tensor = torch.tensordot(points[part], corners, dims=1)
        return mixed

    def float_forward(part: slice) -> tuple[Tensor, Tensor]:
        if mixes:
            return tap.observe_mixtures(corners, points[part])
        return tap.observe(images(part))

    def rounded_forward(part: slice) -> tuple[Tensor, Tensor]:
        return tap.observe(to_8bit_(images(part)))

    def look(forward: Callable[[slice], tuple[Tensor, Tensor]]) -> Looked:
        columns = []
        for part in _parts(len(points), corners[0]):
            columns.append(_look(*forward(part), target, label))
            on_chunk()
        probability, labels, *losses = torch.cat(columns, 1).cpu().numpy()
        return Looked(probability, labels.astype(np.int64), *losses)

    return Samples(weights, look(float_forward), look(rounded_forward))


def summarize(
    samples: Samples,
    sampler: str,
    label: int,
    random_residual: float,
    thresholds: tuple[float, float],
) -> InterpolationResult:
    """The numbers of a result; `random_residual` is that of unrelated images, as in `Looked`.

    `thresholds` are those of L_pos and violation that corners have to meet.
    """

    def of(looked: Looked) -> dict[str, object]:
        hits = int((looked.label == label).sum())
        over = np.maximum(looked.l_pos / thresholds[0], looked.violation / thresholds[1])
        return {
            "accuracy": hits / len(looked.label),
            "accuracy_interval": clopper_pearson(hits, len(looked.label)),
            "mean_probability": float(looked.probability.mean()),
            "min_probability": float(looked.probability.min()),
            "probability_quantiles": dict(
                zip(map(str, QUANTILES), np.quantile(looked.probability, QUANTILES), strict=True)
            ),
            "relative_residual": float(looked.residual.mean()),
            "max_relative_residual": float(looked.residual.max()),
            "under_thresholds": float((over < 1).mean()),
            "max_over_threshold": float(over.max()),
            "residual_to_random": float(looked.residual.mean()) / random_residual
            if random_residual
            else None,
        }

    rounded = {f"{name}_8bit": value for name, value in of(samples.rounded).items()}
    return InterpolationResult.model_validate(
        {"samples": len(samples.weights), "sampler": sampler, **of(samples.floats), **rounded}
    )


@torch.no_grad()
def measure_ball(
    tap: Tap,
    label: int,
    corners: Tensor,
    samples: int,
    *,
    clip: bool,
    seed: int,
    on_chunk: Callable[[], None] = lambda: None,
) -> Ball:
    """The ball of Appendix B around the centroid of `corners`, sampled uniformly.

    In so many dimensions nearly all of a ball is its surface: this is also the test on the sphere.
    Points that `clip` brings back to valid pixels come nearer, and the result says how near.
    """
    centre = corners.mean(0)
    radius = float((corners - centre).flatten(1).norm(dim=1).min())
    hits = torch.zeros((), dtype=torch.int64, device=corners.device)
    away = []
    for points in _unit_ball(centre, samples, seed):
        images = torch.add(centre, points, alpha=radius)
        logits = tap.logits(images.clamp_(0, 1) if clip else images)
        hits += (logits.argmax(1) == label).sum()
        away.append(images.sub_(centre).flatten(1).norm(dim=1))
        on_chunk()
    reached = torch.cat(away).double()
    return Ball(
        radius=radius,
        clipped=clip,
        least_radius=float(reached.min()),
        mean_radius=float(reached.mean()),
        largest_radius=float(reached.max()),
        samples=samples,
        accuracy=int(hits) / samples,
        accuracy_interval=clopper_pearson(int(hits), samples),
    )


def unit_ball(shape: Sequence[int], samples: int, generator: torch.Generator) -> Tensor:
    """[N, C, H, W] uniform in the ball of radius 1 around 0; `shape` is (C, H, W)."""
    device = generator.device
    points = torch.randn(samples, *shape, generator=generator, device=device)
    lengths = torch.rand(samples, generator=generator, device=device).pow_(1 / math.prod(shape))
    scale = lengths / points.flatten(1).norm(dim=1)
    return points.mul_(scale.view(-1, *[1] * len(shape)))


def _unit_ball(centre: Tensor, samples: int, seed: int) -> Iterable[Tensor]:
    """`samples` points of the unit ball in the space of `centre`, a chunk at a time."""
    sizes = tuple(part.stop - part.start for part in _parts(samples, centre))
    draw = _kept_unit_ball if samples * centre.numel() <= KEPT else _fresh_unit_ball
    return draw(tuple(centre.shape), sizes, seed, centre.device)


def _fresh_unit_ball(
    shape: tuple[int, ...], sizes: tuple[int, ...], seed: int, device: torch.device
) -> Iterator[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return (unit_ball(shape, size, generator) for size in sizes)


@lru_cache(SETS)
def _kept_unit_ball(
    shape: tuple[int, ...], sizes: tuple[int, ...], seed: int, device: torch.device
) -> list[Tensor]:
    return list(_fresh_unit_ball(shape, sizes, seed, device))


@torch.no_grad()
def observe(tap: Tap, images: Tensor) -> tuple[Tensor, Tensor]:
    """As `tap.observe`, for any number of images: f' [N, U] and logits [N, classes]."""
    seen = [tap.observe(images[part]) for part in _parts(len(images), images[0])]
    pre, logits = zip(*seen, strict=True)
    return torch.cat(pre), torch.cat(logits)


def _look(pre: Tensor, logits: Tensor, target: Target, label: int) -> Tensor:
    """[5, N]: probability, label, residual, L_pos and violation, as in `Looked`."""
    # Whole numbers up to 2^53 survive the trip as float64.
    losses = residual(pre, target), l_pos(pre, target), violation(pre, target)
    return torch.stack([probability_of(label, logits), logits.argmax(1), *losses])


def chunk(image: Tensor) -> int:
    """How many images like `image` [C, H, W] one forward pass of measurement takes."""
    rows = ROWS if image.device.type == "cpu" else CHUNK
    return max(1, min(rows, CHUNK // image.numel()))


def _parts(samples: int, image: Tensor) -> Iterator[slice]:
    """Chunks of `samples` images like `image` [C, H, W]."""
    size = chunk(image)
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
