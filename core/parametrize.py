"""From what the engine moves to images: here the pixels themselves."""

import torch
from torch import Tensor


class Pixels:
    """The parameters of a row are its image, [C, H, W] in [0, 1]."""

    def start(self, source: Tensor, corners: int) -> Tensor:
        """Parameters [K, C, H, W] whose images are all `source` [C, H, W]."""
        return source.expand(corners, *source.shape).clone()

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    def project_(self, parameters: Tensor, low: Tensor, high: Tensor) -> None:
        """Clamps every row to its own range, `low` and `high` [R, 1, 1, 1], in place."""
        torch.clamp(parameters, low, high, out=parameters)
