"""What couples the corners of a job that optimises its hull: points between them, and what drives
them apart.

Corners that collide one by one need not collide in between. So points of the polytope join the
rows of a job, with the losses of a corner that pushes nothing away, and their gradient reaches the
corners through their weights. What loss is left to spend goes into distance: the corners are driven
apart until their spread reaches a goal.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.certify import margins_of, project_to_simplex
from core.objective import Losses
from core.regions import gaussian
from core.spec import Hull as Settings

TINY = 1e-9  # keeps the direction between two equal corners finite
# Of `worst` points: how far one moves in a step, as a fraction of the simplex.
ASCENT = 0.1
# Corners that may grow before they collide quite reach a spread in half to two thirds of the steps;
# with 100 thresholds allowed at first, some no longer come back to one.
FIRST, SPARED = 10.0, 0.75
# Of the energy, what a margin of 0 costs. Ten times as much drowns the features: on SqueezeNet a
# residual of 0.34 became 0.54.
MINDED = 0.1
NARROW = 0.1  # pixels: a Gaussian that leaves all as it is


@dataclass(frozen=True)
class Hull:
    """The coupling of one job's K corners.

    `losses` are those of its P points, [P, U]. `natural` is the mean distance of unrelated images
    in pixels; `energy` that of the target's features, in which the other terms are weighed. By
    `margin` the target's logit of its `label` exceeds all others.
    """

    settings: Settings
    losses: Losses
    natural: float
    energy: float
    label: int
    margin: float
    seed: int
    max_steps: int

    @property
    def seeks(self) -> bool:
        """Whether the points move to where they collide least."""
        return self.settings.sampling == "worst"

    def weights(self, age: int, corners: int) -> Tensor:
        """Barycentric weights [P, K] of the points drawn at step `age`: the same each time."""
        rng = np.random.default_rng([self.seed, 2, age])
        drawn = rng.dirichlet(np.ones(corners), self.settings.points)
        return torch.from_numpy(drawn).float()

    def spread(self, corners: Tensor) -> Tensor:
        """The mean distance of `corners` [K, C, H, W] over the natural one, as a number."""
        if len(corners) < 2:
            return corners.new_zeros(())
        spread: Tensor = torch.pdist(corners.flatten(1)).mean() / self.natural
        return spread

    def shortfall(self, logits: Tensor) -> Tensor:
        """[N]: how much of the target's margin is missing, over how much may be."""
        return (1 - margins_of(logits, self.label) / self.margin) / (1 - self.settings.margin)

    def off_class(self, logits: Tensor) -> Tensor:
        """The gradient [N, classes] of what margins lack to their floor."""
        floor = self.settings.margin * self.margin
        others = logits.index_fill(1, torch.tensor([self.label], device=logits.device), -math.inf)
        lacking = (margins_of(logits, self.label) < floor).to(logits)
        pull = lacking * (MINDED * self.energy / (floor * len(logits)))
        away = torch.zeros_like(logits).scatter_(1, others.argmax(1, keepdim=True), pull[:, None])
        away[:, self.label] = -pull
        return away

    def drive(self, corners: Tensor, source: Tensor, age: int, worst: Tensor) -> Tensor:
        """The gradient [K, C, H, W] of the source term minus that of the spread, at step `age`.

        `worst` is the largest loss over its threshold, of corners and points. From SPARED of what
        is allowed on the spread counts less and less, and beyond not at all. Allowed are at first
        FIRST thresholds, and one in the second half of the steps: so corners collide, then grow.
        """
        s, k = self.settings, len(corners)
        home = (corners - source) * (2 * s.source * self.energy / (k * self.natural**2))
        if k < 2:
            return home
        flat, pairs = self._coarse(corners).flatten(1), k * (k - 1) / 2
        distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        allowed = max(1.0, FIRST ** (1 - 2 * age / self.max_steps))
        left = ((1 - worst / allowed) / (1 - SPARED)).clamp(0, 1)
        left = left * (self.spread(corners) < s.goal)
        inverse = (1 / (distances + TINY)).fill_diagonal_(0)
        apart = (inverse.sum(1, keepdim=True) * flat - inverse @ flat) / (pairs * self.natural)
        away = self._coarse(apart.view_as(corners))  # the filter is its own transpose
        driven: Tensor = home - (s.diversity * self.energy * left) * away
        return driven

    def _coarse(self, images: Tensor) -> Tensor:
        """What of `images` [K, C, H, W] counts for the spread that is driven at."""
        if self.settings.low_pass < NARROW:
            return images
        rows, columns = (
            torch.from_numpy(gaussian(side, self.settings.low_pass)).to(images)
            for side in images.shape[2:]
        )
        return rows @ images @ columns


def ascend(weights: Tensor, gradient: Tensor) -> Tensor:
    """`weights` [P, K] moved to where the loss, of which `gradient` is, grows; in the simplex."""
    step = ASCENT * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(TINY)
    return project_to_simplex(weights + step)
