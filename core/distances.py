"""How different corners look, where Euclidean distance alone does not show it.

Noise that nobody sees may be as long as the step from one thing to another. SSIM and LPIPS are
measures of what people see; the low-pass share tells how much of a difference is coarse.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from core import models
from core.errors import ModelUnavailable
from core.interpolate import chunk, pairwise_distance
from core.regions import low_pass

Floats = NDArray[np.float64]

# SSIM's window reaches so far to each side of a pixel.
REACH = 5
# It takes 0.1 us a value on a CPU. So many at a time stay in its cache; more than these in all,
# 60 corners of 224 x 224 x 3, would keep a GPU waiting for half a minute and more.
SSIM_CHUNK, SSIM_MOST = 2**15, 2**28
LPIPS_LEAST = 31  # pixels a side, or nothing is left behind AlexNet's second pooling


def beyond_l2(corners: Tensor, on_chunk: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What `Polytope` tells of `corners` [K, C, H, W] beside their Euclidean distances.

    `on_chunk` is called now and then, for whoever watches whether this goes on.
    """
    found: dict[str, Floats | None] = {
        "ssim": ssim(corners, on_chunk),
        "low_pass_share": low_pass_share(corners),
        "perceptual": None,
    }
    missing = None
    try:
        found["perceptual"] = perceptual_distance(corners, on_chunk)
    except ModelUnavailable as error:
        missing = str(error)
    matrices = {name: _listed(matrix) for name, matrix in found.items()}
    means = {f"mean_{name}": _mean(matrix) for name, matrix in found.items()}
    return matrices | means | {"perceptual_missing": missing}


def ssim(images: Tensor, on_chunk: Callable[[], None] = lambda: None) -> Floats | None:
    """The structural similarity [K, K] of `images` [K, C, H, W], the mean over channels.

    As Wang et al. (2004) define it: a Gaussian window of 11 x 11 with sigma 1.5, L = 1, the mean
    over places where the whole window fits. None where it fits nowhere, or the images are many.
    """
    k, channels, height, width = images.shape
    first, second = np.triu_indices(k, 1)
    if min(height, width) <= 2 * REACH or len(first) * images[0].numel() > SSIM_MOST:
        return None
    pixels = images.double().cpu().numpy()
    result = np.eye(k)
    size = max(1, SSIM_CHUNK // images[0].numel())
    for start in range(0, len(first), size):
        i, j = first[start : start + size], second[start : start + size]
        # Pairs and channels stand one below the other in one tall image, since a call for each
        # pair of digits would take four times as long; windows that fit into one see no other.
        _, local = structural_similarity(
            *(pixels[which].reshape(-1, width) for which in (i, j)),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        whole = local.reshape(-1, channels, height, width)[..., REACH:-REACH, REACH:-REACH]
        result[i, j] = result[j, i] = whole.mean((1, 2, 3))
        on_chunk()
    return result


def low_pass_share(images: Tensor) -> Floats:
    """||L d|| / ||d|| [K, K] of the differences d of `images` [K, C, H, W], NaN where d is 0.

    L is `core.regions.low_pass`: from 0, for what alternates from pixel to pixel, to 1.
    """
    distance = pairwise_distance(images)
    coarse = pairwise_distance(torch.from_numpy(low_pass(images.cpu().numpy())))
    return np.divide(coarse, distance, out=np.full_like(distance, np.nan), where=distance > 0)


@torch.no_grad()
def perceptual_distance(images: Tensor, on_chunk: Callable[[], None] = lambda: None) -> Floats:
    """LPIPS [K, K] by AlexNet of `images` [K, C, H, W] in [0, 1], grey ones or of three channels.

    Raises:
        ModelUnavailable: it cannot be had here, or not for images of this size.
    """
    if min(images.shape[2:]) < LPIPS_LEAST:
        raise ModelUnavailable(f"LPIPS takes images of {LPIPS_LEAST} pixels a side and more.")
    metric, places = _lpips(images.device), []
    for part in images.split(chunk(images[0])):
        places.append(_place(metric, part))
        on_chunk()
    return pairwise_distance(torch.cat(places)) ** 2


def _place(metric: Any, images: Tensor) -> Tensor:
    """Where `images` [N, C, H, W] lie, [N, D], so that LPIPS is the squared Euclidean distance."""
    from lpips import normalize_tensor

    features = metric.net(metric.scaling_layer(2 * images.expand(-1, 3, -1, -1) - 1))
    # A head is a weighted sum over channels of squared differences, and its mean over places.
    return torch.cat(
        [
            (normalize_tensor(f) * (head.model[-1].weight / f[0, 0].numel()).sqrt()).flatten(1)
            for f, head in zip(features, metric.lins, strict=True)
        ],
        dim=1,
    )


@lru_cache(1)
def _lpips(device: torch.device) -> Any:
    """`lpips.LPIPS` with its own heads on torchvision's AlexNet, both from this machine.

    Raises:
        ModelUnavailable: with what to do about it.
    """
    try:
        import lpips
    except ImportError as error:
        raise ModelUnavailable(
            "LPIPS is not installed: in the checkout, pip install '.[perceptual]'."
        ) from error
    if not next(entry.ready for entry in models.listed() if entry.name == "alexnet"):
        raise ModelUnavailable(
            "LPIPS needs AlexNet's weights, which no job fetches for it: `polycollide layers "
            "--model alexnet` puts them on this machine."
        )
    alexnet = models.load("alexnet").classifier.network.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of how lpips asks for an empty AlexNet
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # Layer 3 of AlexNet's `features` is layer 3 of its second slice.
    names = metric.net.state_dict()
    metric.net.load_state_dict(
        {name: alexnet[f"features.{name.partition('.')[2]}"] for name in names}
    )
    return metric.to(device).requires_grad_(False)


def _listed(matrix: Floats | None) -> list[list[float | None]] | None:
    if matrix is None:
        return None
    rounded = np.round(matrix, 6).tolist()  # of 256 corners these are as long as all the rest
    return [[None if np.isnan(value) else value for value in row] for row in rounded]


def _mean(matrix: Floats | None) -> float | None:
    """Over pairs of different images, as far as they have a value; None where none has."""
    if matrix is None:
        return None
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    known = pairs[~np.isnan(pairs)]
    return float(known.mean()) if len(known) else None
