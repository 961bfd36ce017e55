"""From what the engine moves to images: here the pixels themselves."""

import torch
from torch import Tensor

# The least and the greatest value: of all rows, or of each.
Bounds = tuple[float, float] | tuple[Tensor, Tensor]


class Pixels:
    """The parameters of a row are its image, [C, H, W] in [0, 1]."""

    def start(self, source: Tensor, corners: int) -> Tensor:
        """Parameters [K, C, H, W] whose images are all `source` [C, H, W]."""
        return source.expand(corners, *source.shape).clone()

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    def project_(self, parameters: Tensor, bounds: Bounds) -> None:
        """Clamps in place, every row to its own range where `bounds` are tensors [R, 1, 1, 1]."""
        torch.clamp(parameters, *bounds, out=parameters)
