"""Regions are found where corners were made to differ, and nowhere else."""

import numpy as np
import pytest

from core.regions import REGIONS, Region, find_regions, low_pass


def flat(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, np.float32)


def overlap(a: Region, b: Region) -> bool:
    return abs(a.top - b.top) < a.height and abs(a.left - b.left) < a.width


def test_a_gaussian_of_4_pixels_is_left_of_a_point() -> None:
    point = np.zeros((1, 1, 81, 81), np.float32)
    point[..., 40, 40] = 1
    at = np.arange(81) - 40
    expected = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 4**2)) / (2 * np.pi * 4**2)
    assert low_pass(point)[0, 0] == pytest.approx(expected, abs=2e-6)


def test_patches_are_found_where_they_were_pasted_the_strongest_first() -> None:
    rng = np.random.default_rng(0)
    corners = flat(5, 3, 120, 200)  # windows of 24 x 40
    pasted = {(8, 10): 0.4, (80, 150): 0.3, (60, 20): 0.2}
    for (top, left), strength in pasted.items():
        shades = strength * np.linspace(-1, 1, 5)[rng.permutation(5)]
        corners[:, :, top : top + 24, left : left + 40] += shades[:, None, None, None]
    # Louder than any patch, but too fine to pass: it stays where nothing was pasted.
    corners[:, :, :, 90:110] += rng.choice([-0.45, 0.45], (5, 3, 120, 20))
    found = find_regions(corners)
    assert [(round(r.top / 4), round(r.left / 4)) for r in found[:3]] == [
        (round(top / 4), round(left / 4)) for top, left in pasted
    ]
    assert {(r.height, r.width) for r in found} == {(24, 40)}
    shares = [r.share for r in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1
    assert not any(overlap(a, b) for i, a in enumerate(found) for b in found[:i])


def test_a_share_is_that_of_the_variance_of_the_low_passed_corners() -> None:
    corners = np.random.default_rng(1).random((3, 3, 65, 70))
    (first, *others) = find_regions(corners)
    assert len(others) == REGIONS - 1
    smooth = low_pass(corners)
    variance = ((smooth - smooth.mean(0)) ** 2).mean(0).sum(0)
    inside = {
        (top, left): variance[top : top + 13, left : left + 14].sum()
        for top in range(65 - 13 + 1)
        for left in range(70 - 14 + 1)
    }
    assert max(inside, key=inside.__getitem__) == (first.top, first.left)
    for region in (first, *others):
        expected = inside[region.top, region.left] / variance.sum()
        assert region.share == pytest.approx(expected, rel=1e-12)


def test_a_region_at_the_edge_of_the_image_lies_inside() -> None:
    corners = flat(2, 1, 64, 64)
    corners[0, :, 52:, 52:] = 1
    (region, *_) = find_regions(corners)
    assert (region.top + region.height, region.left + region.width) == (64, 64)
    part = region.of(corners[0])
    assert part.shape == (1, 12, 12)
    assert (part == 1).all()


@pytest.mark.parametrize("corners", [1, 5])
def test_corners_that_look_alike_have_no_regions(corners: int) -> None:
    same = np.repeat(np.random.default_rng(0).random((1, 3, 80, 80)), corners, axis=0)
    assert find_regions(same) == []
    faint = same + np.linspace(0, 1 / 255, corners)[:, None, None, None]
    assert find_regions(faint) == []


def test_one_difference_gives_one_region() -> None:
    corners = flat(2, 3, 100, 100)
    corners[0, :, 40:60, 40:60] = 1
    (region,) = find_regions(corners)
    assert (region.top, region.left, region.height, region.width) == (40, 40, 20, 20)
