"""From what the engine moves to images: here the pixels themselves."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# The least and the greatest value: of all rows, or of each.
Bounds = tuple[float, float] | tuple[Tensor, Tensor]


class Parametrization(Protocol):
    """How the parameters [R, ...] of one job's rows make their images [R, C, H, W]."""

    def start(self, corners: int) -> Tensor:
        """The parameters [K, ...] that all rows begin with."""
        ...

    def images(self, parameters: Tensor) -> Tensor:
        """Differentiable, and each image by its own row alone."""
        ...

    def images_and_variation(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """And R(P) [R], the total variation of section 4.1."""
        ...


@dataclass(frozen=True)
class Pixels:
    """The parameters of a row are its image, [C, H, W]; it begins as `source`."""

    source: Tensor

    def start(self, corners: int) -> Tensor:
        return self.source.expand(corners, *self.source.shape).clone()

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    def images_and_variation(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return parameters, parameters.new_zeros(len(parameters))


def project_(pixels: Tensor, bounds: Bounds) -> None:
    """Clamps in place, every row to its own range where `bounds` are tensors [R, 1, 1, 1]."""
    torch.clamp(pixels, *bounds, out=pixels)
