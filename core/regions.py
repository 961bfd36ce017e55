"""Where corners differ as things do and not as noise does: after a low-pass, window by window.

Torch-free, since pictures are drawn from it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]
Pixels = NDArray[np.floating[Any]]

SIGMA = 4.0  # of the Gaussian, in pixels
LEAST_SIDE = 64  # of an image whose result shows regions
REGIONS, ACROSS = 4, 5  # at most so many windows; a side of the image holds so many
# Windows are left out with less than this share of the first one's variance, or a standard
# deviation below half a grey level, which no 8-bit image shows.
LEAST, VISIBLE = 0.1, 0.5 / 255


@dataclass(frozen=True)
class Region:
    """A window of an image, in pixels, with its `share` of the variance between the corners."""

    top: int
    left: int
    height: int
    width: int
    share: float

    def of(self, image: Pixels) -> Pixels:
        """The part of `image` [C, H, W] inside."""
        return image[:, self.top : self.top + self.height, self.left : self.left + self.width]


def low_pass(images: Pixels) -> Floats:
    """What a Gaussian leaves of `images` [..., H, W].

    Continued past their borders by their mirror image, edge pixels twice: so a constant stays what
    it is, and no norm grows.
    """
    return ndimage.gaussian_filter(images.astype(np.float64), SIGMA, mode="reflect", axes=(-2, -1))


@lru_cache(maxsize=8)
def gaussian(side: int, sigma: float) -> Floats:
    """A Gaussian of `sigma` pixels on a line of `side`, as `low_pass` has it: symmetric [n, n]."""
    made: Floats = ndimage.gaussian_filter1d(np.eye(side), sigma, mode="reflect")
    return made


def find_regions(corners: Pixels) -> list[Region]:
    """Up to REGIONS windows in which `corners` [K, C, H, W] differ most, the first most of all.

    They are ranked by the variance over the corners of what `low_pass` leaves, summed over
    channels and window, and chosen greedily; none overlaps another.
    """
    variance = low_pass(corners).var(0).sum(0)  # [H, W]
    height, width = (max(1, side // ACROSS) for side in variance.shape)
    rows = sliding_window_view(variance, height, 0).sum(-1)
    inside = sliding_window_view(rows, width, 1).sum(-1)  # of the window with this top and left
    least = max(LEAST * inside.max(), VISIBLE**2 * height * width * corners.shape[1])
    found: list[Region] = []
    while len(found) < REGIONS and inside.max() >= least:
        top, left = map(int, np.unravel_index(inside.argmax(), inside.shape))
        share = float(inside[top, left] / variance.sum())
        found.append(Region(top, left, height, width, share))
        above, before = max(0, top - height + 1), max(0, left - width + 1)
        inside[above : top + height, before : left + width] = 0  # these would overlap
    return found
