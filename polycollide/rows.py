"""Lines of the tables that stand beside the paper's: what it states, and ours from all results."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.interpolate import clopper_pearson
from core.result import Result

Ours = Callable[[list[Result]], str]
NONE = "-"  # for what no result has


@dataclass(frozen=True)
class Row:
    """One line of a table: what the paper states, if anything, and ours from all results."""

    name: str
    paper: str
    ours: Ours


def mean(of: Callable[[Result], float | None], digits: int = 2) -> Ours:
    """The mean over the results that have a value and, of several, the standard deviation."""

    def text(results: list[Result]) -> str:
        values = [value for result in results if (value := of(result)) is not None]
        if not values:
            return NONE
        deviation = f"±{np.std(values):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{deviation}"

    return text


def of_corners(field: str) -> Callable[[Result], float]:
    """The mean of a field over a result's corners."""
    return lambda result: float(np.mean([getattr(corner, field) for corner in result.corners]))


def interpolated(field: str) -> Callable[[Result], float | None]:
    """A field of `interpolation`, where there is one."""
    return lambda result: getattr(result.interpolation, field, None)


def converged(results: list[Result]) -> str:
    """How many results have converged."""
    return f"{sum(result.converged for result in results)} of {len(results)}"


def colliding(field: str) -> tuple[Ours, Ours]:
    """The fraction of samples, pooled over results, that get the target's label; its interval."""

    def counts(results: list[Result]) -> tuple[int, int]:
        part, name = field.split(".")
        sampled = [s for s in (getattr(r, part) for r in results) if s]
        hits = round(sum(getattr(s, name) * s.samples for s in sampled))
        return hits, sum(s.samples for s in sampled)

    def fraction(results: list[Result]) -> str:
        hits, samples = counts(results)
        return f"{100 * hits / samples:.1f} %" if samples else NONE

    def interval(results: list[Result]) -> str:
        hits, samples = counts(results)
        if not samples:
            return NONE
        low, high = clopper_pearson(hits, samples)
        return f"{100 * low:.2f}-{100 * high:.2f}"

    return fraction, interval


FLOATS, EIGHT_BITS, BALL = map(
    colliding, ("interpolation.accuracy", "interpolation.accuracy_8bit", "ball.accuracy")
)
