"""Images composed of natural patches: equation 5, and weights that a job can move from there.

Windows on a regular grid cover the seed image. Each has a *source*: its nearest neighbour among the
patches of other images with the surroundings of that, so m x m pixels that lie over the window and
around it. An output pixel is a convex combination of the source pixels that lie over it, by a
softmax over their control parameters, of which each source pixel has one for all its channels.

All goes window by window, in pieces that stay in a cache: beside parameters [K, W, m, m] and their
gradient, nothing is larger than the K images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from core.patches.windows import Windows

_Index = tuple[EllipsisType, slice, slice]


class Patches:
    """The parameters of a row are control parameters [W, m, m], one per source pixel.

    `sources` [W, C, m, m] in [0, 1], in the order of `windows.positions`, are shared by all rows.
    Images stay in the range of the sources, so nothing need be clamped. `places` are, for each
    source, which of its pixels are inside the image and which of the image they lie on; parameters
    of the others are inert, of weight 0 and gradient 0.
    """

    def __init__(self, sources: Tensor, windows: Windows) -> None:
        m = windows.source_size
        assert sources.shape == (windows.count, sources.shape[1], m, m)
        self.sources, self.windows = sources, windows
        self.places = [_place(first, windows) for first in windows.positions.tolist()]

    def start(self, corners: int) -> Tensor:
        """Parameters [K, W, m, m] whose images are all equation 5's.

        They are the logarithms of bilinear weights, which fall from 1 at a source's centre to 0 at
        its border. Pixels are where their centres are, so none of them lies on the border.
        """
        count, m = self.windows.count, self.windows.source_size
        centres = torch.arange(m, dtype=self.sources.dtype, device=self.sources.device) + 0.5
        side = (torch.minimum(centres, m - centres) * (2 / m)).log()
        return (side[:, None] + side).expand(corners, count, m, m).clone()

    def images(self, parameters: Tensor) -> Tensor:
        """[K, C, H, W]; once differentiable."""
        return self._compose(parameters, varied=False)[0]

    def total_variation(self, parameters: Tensor) -> Tensor:
        """R(P) [K]: what softmax weights differ by from one source pixel to the next, summed.

        As in the authors' code, these are absolute differences to the next row and to the next
        column. They are taken inside each source; the code also counts the step from a source's
        outermost weights to the 0 around it.
        """
        return self._compose(parameters, varied=True)[1]

    def images_and_variation(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """`images` and `total_variation` in less time than one after the other."""
        return self._compose(parameters, varied=True)

    @torch.no_grad()
    def weights(self, parameters: Tensor) -> Tensor:
        """The softmax weights [K, W, m, m], 0 past the image."""
        weights = torch.zeros_like(parameters)
        most, total, _ = self._sums(parameters)
        for piece, into in zip(self._pieces(parameters), weights.unbind(1), strict=True):
            into[piece.inside] = piece.weight(most, total)
        return weights

    def _compose(self, parameters: Tensor, *, varied: bool) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = _Compose.apply(parameters, self, varied)
        return both

    def _pieces(self, parameters: Tensor) -> Iterator["_Piece"]:
        every = zip(parameters.unbind(1), self.sources, self.places, strict=True)
        for own, source, (inside, on) in every:
            yield _Piece(own[inside], source[inside], inside, on)

    def _sums(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pixel: the greatest parameter, the sum of exponentials past it, the image."""
        k, (height, width) = len(parameters), self.windows.image
        most = parameters.new_full((k, height, width), -torch.inf)
        for piece in self._pieces(parameters):
            here = most[piece.on]
            torch.maximum(here, piece.parameters, out=here)
        total = torch.zeros_like(most)
        images = parameters.new_zeros(k, self.sources.shape[1], height, width)
        for piece in self._pieces(parameters):
            weight = (piece.parameters - most[piece.on]).exp_()
            total[piece.on].add_(weight)
            images[piece.on].addcmul_(weight[:, None], piece.source)
        return most, total, images.div_(total[:, None])


@dataclass(frozen=True)
class _Piece:
    """What one window adds: `parameters` [K, h, w] and `source` [C, h, w], h and w at most m.

    They are the part of its source `inside` the image, and lie `on` these pixels.
    """

    parameters: Tensor
    source: Tensor
    inside: _Index
    on: _Index

    def weight(self, most: Tensor, total: Tensor) -> Tensor:
        """Its softmax weights [K, h, w]."""
        return (self.parameters - most[self.on]).exp_().div_(total[self.on])


class _Compose(Function):
    """Images [K, C, H, W] and, where `varied`, R(P) [K] (else zeros) of parameters [K, W, m, m].

    If d loss / d weights is q, then d loss / d parameters is weight (q - mean), with the mean of q
    over the sources of each pixel. Weights are computed again in `backward`: to keep them would
    take as much memory as the parameters do.
    """

    @staticmethod
    def forward(
        ctx: Any, parameters: Tensor, patches: Patches, varied: bool
    ) -> tuple[Tensor, Tensor]:
        most, total, images = patches._sums(parameters)
        mean = torch.zeros_like(total)
        if varied:
            for piece in patches._pieces(parameters):
                weight = piece.weight(most, total)
                mean[piece.on].addcmul_(weight, _slope(weight))
        ctx.patches = patches
        ctx.save_for_backward(parameters, most, total, images, mean)
        ctx.set_materialize_grads(False)
        # |x| is x times its slope, so R(P) is the sum of all weights times theirs.
        return images, mean.sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_image: Tensor | None, by_variation: Tensor | None
    ) -> tuple[Tensor, None, None]:
        parameters, most, total, images, mean_slope = ctx.saved_tensors
        mean = torch.zeros_like(total)
        if by_image is not None:
            mean += (by_image * images).sum(1)
        if by_variation is not None:
            by_variation = by_variation[:, None, None]
            mean.addcmul_(by_variation, mean_slope)
        gradient = torch.zeros_like(parameters)
        for piece, into in zip(ctx.patches._pieces(parameters), gradient.unbind(1), strict=True):
            weight = piece.weight(most, total)
            q = -mean[piece.on]
            if by_image is not None:
                for channel, source in zip(by_image[piece.on].unbind(1), piece.source, strict=True):
                    q.addcmul_(channel, source)
            if by_variation is not None:
                q.addcmul_(by_variation, _slope(weight))
            torch.mul(weight, q, out=into[piece.inside])
        return gradient, None, None


def _place(first: list[int], windows: Windows) -> tuple[_Index, _Index]:
    """`inside` and `on` of a piece whose window begins at the pixel `first`."""
    inside, on = [], []
    for start, size in zip(first, windows.image, strict=True):
        begin = start - windows.surround
        low, high = max(begin, 0), min(begin + windows.source_size, size)
        inside.append(slice(low - begin, high - begin))
        on.append(slice(low, high))
    return (..., inside[0], inside[1]), (..., on[0], on[1])


def _slope(weight: Tensor) -> Tensor:
    """The gradient [K, h, w] of the total variation of `weight` [K, h, w]."""
    slope = torch.zeros_like(weight)
    for axis in (1, 2):
        rise = weight.diff(dim=axis).sign_()
        slope.narrow(axis, 1, rise.shape[axis]).add_(rise)
        slope.narrow(axis, 0, rise.shape[axis]).sub_(rise)
    return slope
