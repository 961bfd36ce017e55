"""The windows that cover a seed image, and what a job of patches needs for them. Without torch."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidSpec
from core.spec import CollisionSpec

# Window, stride and surroundings in pixels of an image of 224: those of the paper's text, and those
# of its authors' code. There surroundings are half a window, so we take that for the text as well.
GEOMETRIES = {"text": (32, 12, 16), "code": (56, 7, 28)}
# Control parameters of a job: three times those of five corners by the authors' code.
MAX_PARAMETERS = 2**27


@dataclass(frozen=True)
class Windows:
    """Windows of `window` px a side, one every `stride` px of an `image` (H, W), and their sources.

    Sources reach `surround` px further on each side; what of them lies past the image is left out.
    Where the stride does not end at the border, one more row or column of windows does, so that
    every pixel is in a window.

    Raises:
        InvalidSpec: the window does not fit into the image, or windows leave pixels uncovered.
    """

    image: tuple[int, int]
    window: int
    stride: int
    surround: int

    def __post_init__(self) -> None:
        height, width = self.image
        if not 1 <= self.window <= min(self.image):
            raise InvalidSpec(
                f"Windows of {self.window} px do not fit into an image of {height} x {width} px; "
                f"take 1 to {min(self.image)} px."
            )
        if not 1 <= self.stride <= self.window:
            raise InvalidSpec(
                f"Windows of {self.window} px, one every {self.stride} px, do not cover the image; "
                f"take a stride of 1 to {self.window} px."
            )
        if self.surround < 0:
            raise InvalidSpec(f"Surroundings of {self.surround} px: give 0 or more.")

    @classmethod
    def of_job(cls, spec: CollisionSpec, *, window: int, image: tuple[int, ...]) -> "Windows":
        """Those of a job of patches of `window` px on a network that takes `image` [C, H, W].

        Raises:
            InvalidSpec: as above; the network takes grey images; there are too many parameters.
        """
        channels, height, width = image
        if channels != 3:
            raise InvalidSpec("Patches are of colour images, and this network takes grey ones.")
        made = cls((height, width), window, spec.patches.stride, spec.patches.surround)
        parameters = spec.corners * made.parameters
        if parameters > MAX_PARAMETERS:
            raise InvalidSpec(
                f"{made.count} windows with sources of {made.source_size} px make {parameters:,} "
                f"control parameters, over {MAX_PARAMETERS:,}; take fewer corners, a larger stride "
                "or smaller surroundings."
            )
        return made

    @property
    def source_size(self) -> int:
        """m, the pixels a side of a source."""
        return self.window + 2 * self.surround

    @cached_property
    def count(self) -> int:
        """W, how many windows there are."""
        height, width = map(len, map(self._starts, self.image))
        return height * width

    @property
    def parameters(self) -> int:
        """Control parameters of a corner: one for each pixel of each source."""
        return self.count * self.source_size**2

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[W, 2]: row and column of each window's first pixel, row by row of windows."""
        corners = np.meshgrid(*map(self._starts, self.image), indexing="ij")
        return np.stack(corners, -1).reshape(-1, 2)

    @property
    def coverage(self) -> NDArray[np.int64]:
        """[H, W]: how many sources lie over each pixel."""
        sides = []
        for size in self.image:
            first = self._starts(size)[:, None] - self.surround
            pixels = np.arange(size)
            sides.append(((first <= pixels) & (pixels < first + self.source_size)).sum(0))
        return np.outer(*sides)

    def _starts(self, size: int) -> NDArray[np.int64]:
        """Where windows begin along a side of `size` px."""
        last = size - self.window
        return np.unique(np.append(np.arange(0, last, self.stride), last))
