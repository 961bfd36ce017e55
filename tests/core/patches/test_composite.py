"""The composition against equation 5 in a double loop and against the direct [W, H, W] softmax."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.errors import InvalidSpec
from core.patches.composite import Patches
from core.patches.windows import GEOMETRIES, Windows

GRIDS = {
    "stride divides": Windows((12, 15), window=6, stride=3, surround=2),
    "stride leaves a rest": Windows((13, 11), window=5, stride=3, surround=2),
    "odd sources": Windows((9, 10), window=3, stride=2, surround=1),
    "one window": Windows((7, 7), window=7, stride=4, surround=0),
    "no surroundings": Windows((11, 8), window=4, stride=4, surround=0),
    "sources beyond the image": Windows((5, 6), window=4, stride=1, surround=9),
    "single pixels": Windows((3, 4), window=1, stride=1, surround=0),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def patches_of(grid: Windows, dtype: torch.dtype = torch.float64, channels: int = 3) -> Patches:
    m = grid.source_size
    drawn = torch.rand(grid.count, channels, m, m, generator=seeded(1), dtype=torch.float64)
    return Patches(drawn.to(dtype), grid)


def drawn_for(patches: Patches, rows: int = 2, scale: float = 2.0) -> Tensor:
    """Parameters [K, W, m, m] that have nothing to do with the start."""
    shape = (rows, patches.windows.count, *patches.sources.shape[2:])
    drawn = torch.randn(shape, generator=seeded(2), dtype=torch.float64) * scale
    return drawn.to(patches.sources)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def source_pixel(grid: Windows, window: int, y: int, x: int) -> tuple[int, int] | None:
    """Which pixel of the window's source lies over (y, x) of the image."""
    first_y, first_x = grid.positions[window]
    u, v = int(y - first_y + grid.surround), int(x - first_x + grid.surround)
    m = grid.window + 2 * grid.surround
    return (u, v) if 0 <= u < m and 0 <= v < m else None


def direct(grid: Windows, values: Tensor, empty: float) -> Tensor:
    """`values` [..., W, m, m] where they lie over the image, [..., W, H, W], `empty` elsewhere."""
    height, width = grid.image
    spread = torch.full((*values.shape[:-2], height, width), empty, dtype=values.dtype)
    for w, y, x in product(range(grid.count), range(height), range(width)):
        if pixel := source_pixel(grid, w, y, x):
            spread[..., w, y, x] = values[(..., w, *pixel)]
    return spread


def direct_variation(grid: Windows, weights: Tensor) -> Tensor:
    """R(P) [K] of `weights` [K, W, H, W], where both neighbours are of the source."""
    m = grid.source_size
    inside = direct(grid, torch.ones(grid.count, m, m), 0.0) > 0
    down = (weights[..., 1:, :] - weights[..., :-1, :]).abs() * (inside[:, 1:] & inside[:, :-1])
    right = (weights[..., 1:] - weights[..., :-1]).abs() * (inside[..., 1:] & inside[..., :-1])
    return down.sum((1, 2, 3)) + right.sum((1, 2, 3))


@every_grid
def test_every_pixel_is_in_a_window_and_every_window_in_the_image(grid):
    within = np.zeros(grid.image, int)
    for y, x in grid.positions:
        assert 0 <= y <= grid.image[0] - grid.window and 0 <= x <= grid.image[1] - grid.window
        within[y : y + grid.window, x : x + grid.window] += 1
    assert within.min() >= 1
    assert len({tuple(first) for first in grid.positions}) == grid.count


@every_grid
def test_coverage_counts_the_sources_over_each_pixel(grid):
    counted = [
        sum(source_pixel(grid, w, y, x) is not None for w in range(grid.count))
        for y, x in product(*map(range, grid.image))
    ]
    assert grid.coverage.ravel().tolist() == counted


def test_the_geometries_of_text_and_code_have_as_many_windows_as_the_paper_says():
    text, code = (Windows((224, 224), *GEOMETRIES[name]) for name in ("text", "code"))
    assert (text.count, text.source_size) == (17 * 17, 64)
    assert (code.count, code.source_size) == (25 * 25, 112)
    assert code.positions[25].tolist() == [7, 0] and code.positions[-1].tolist() == [168, 168]


def test_a_stride_that_leaves_a_rest_gets_one_more_row_and_column_at_the_border():
    squeezenet = Windows((227, 227), *GEOMETRIES["code"])
    assert squeezenet.count == 26 * 26
    assert np.unique(squeezenet.positions).tolist() == [*range(0, 169, 7), 171]


@pytest.mark.parametrize(
    "settings, what",
    [
        (((20, 30), 21, 3, 0), "do not fit"),
        (((30, 20), 21, 3, 0), "do not fit"),
        (((20, 20), 0, 1, 0), "do not fit"),
        (((20, 20), 5, 0, 0), "do not cover"),
        (((20, 20), 5, 6, 4), "do not cover"),
        (((20, 20), 5, 5, -1), "0 or more"),
    ],
)
def test_windows_that_cannot_cover_an_image_are_refused(settings, what):
    with pytest.raises(InvalidSpec, match=what):
        Windows(*settings)


@every_grid
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_start_is_equation_5(grid, dtype, near):
    patches = patches_of(grid, dtype)
    sources, half = patches.sources.double().numpy(), grid.source_size / 2
    expected = np.zeros((3, *grid.image))
    for y, x in product(*map(range, grid.image)):
        total = 0.0
        for w in range(grid.count):
            if pixel := source_pixel(grid, w, y, x):
                u, v = pixel
                weight = (1 - abs(u + 0.5 - half) / half) * (1 - abs(v + 0.5 - half) / half)
                expected[:, y, x] += weight * sources[w, :, u, v]
                total += weight
        expected[:, y, x] /= total
    images = patches.images(patches.start(2))
    assert images.shape == (2, 3, *grid.image) and images.dtype == dtype
    assert np.abs(images.numpy() - expected).max() < near


def test_rows_that_start_alike_move_apart():
    patches = patches_of(GRIDS["stride divides"])
    parameters = patches.start(3)
    parameters[1, 0, 0, 0] += 1
    assert torch.equal(parameters[0], parameters[2])
    assert (parameters[1] != parameters[0]).sum() == 1


@every_grid
def test_images_variation_and_their_gradients_are_those_of_the_direct_formulation(grid):
    patches = patches_of(grid)
    parameters = drawn_for(patches).requires_grad_()
    weights = direct(grid, parameters, -torch.inf).softmax(1)
    sources = direct(grid, patches.sources.transpose(0, 1), 0.0)
    images = torch.einsum("kwyx,cwyx->kcyx", weights, sources)
    expected = images, direct_variation(grid, weights)
    found = patches.images_and_variation(parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(patches.images(parameters), images, rtol=1e-12, atol=1e-12)

    push = torch.randn(images.shape, generator=seeded(3), dtype=torch.float64)
    pull = torch.tensor([0.3, -2.0], dtype=torch.float64)
    both = (push, pull)
    (expected_both,) = torch.autograd.grad(expected, parameters, both, retain_graph=True)
    (of_both,) = torch.autograd.grad(found, parameters, both)
    torch.testing.assert_close(of_both, expected_both, rtol=1e-10, atol=1e-12)
    for name, at, away in (("images", 0, push), ("total_variation", 1, pull)):
        (alone,) = torch.autograd.grad(getattr(patches, name)(parameters), parameters, away)
        (expected_alone,) = torch.autograd.grad(expected[at], parameters, away, retain_graph=True)
        torch.testing.assert_close(alone, expected_alone, rtol=1e-10, atol=1e-12)


def test_gradients_are_finite_differences():
    patches = patches_of(Windows((5, 6), window=3, stride=2, surround=1))
    parameters = drawn_for(patches).requires_grad_()
    assert torch.autograd.gradcheck(patches.images_and_variation, parameters)


def test_a_second_derivative_is_refused():
    patches = patches_of(GRIDS["odd sources"])
    parameters = drawn_for(patches).requires_grad_()
    images = patches.images(parameters).square().sum()
    (gradient,) = torch.autograd.grad(images, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_grid
def test_the_weights_over_each_pixel_are_those_of_a_convex_combination(grid):
    patches = patches_of(grid)
    parameters = drawn_for(patches, scale=5.0)
    weights = patches.weights(parameters)
    assert weights.min() >= 0
    spread = direct(grid, weights, 0.0)
    torch.testing.assert_close(spread.sum(1), torch.ones_like(spread[:, 0]), rtol=0, atol=1e-12)
    # All weight lies over the image: none past it.
    torch.testing.assert_close(weights.sum(), spread.sum())
    sources = patches.sources.transpose(0, 1)
    images = patches.images(parameters)
    assert (images <= direct(grid, sources, -torch.inf).amax(1) + 1e-12).all()
    assert (images >= direct(grid, sources, torch.inf).amin(1) - 1e-12).all()


def test_images_of_black_and_white_sources_stay_in_range_without_clamping():
    patches = patches_of(GRIDS["sources beyond the image"], torch.float32)
    patches.sources.round_()
    images = patches.images(drawn_for(patches, rows=200, scale=30.0))
    assert images.min() == 0 and images.max() == 1


@every_grid
def test_total_variation_is_the_sum_over_neighbours_in_each_source(grid):
    patches = patches_of(grid)
    parameters = drawn_for(patches)
    weights = patches.weights(parameters).numpy()
    expected = np.zeros(len(weights))
    for w, y, x in product(range(grid.count), *map(range, grid.image)):
        here = source_pixel(grid, w, y, x)
        for next_y, next_x in ((y + 1, x), (y, x + 1)):
            there = source_pixel(grid, w, next_y, next_x)
            if here and there and next_y < grid.image[0] and next_x < grid.image[1]:
                expected += np.abs(weights[(slice(None), w, *there)] - weights[(..., w, *here)])
    np.testing.assert_allclose(patches.total_variation(parameters).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["stride leaves a rest", "sources beyond the image"])
def test_what_lies_past_the_image_is_inert(name):
    patches = patches_of(GRIDS[name])
    m = patches.windows.source_size
    parameters = drawn_for(patches).requires_grad_()
    over = direct_mask(patches.windows).expand_as(parameters)
    assert not over.all()
    elsewhere = torch.where(over, parameters.detach(), torch.nan).requires_grad_()
    nowhere = Patches(
        torch.where(over[0].unsqueeze(1).expand(-1, 3, m, m), patches.sources, torch.nan),
        patches.windows,
    )
    found, same = patches.images_and_variation(parameters), nowhere.images_and_variation(elsewhere)
    torch.testing.assert_close(found, same, rtol=0, atol=0)
    pushes = [torch.ones_like(value) for value in found]
    for values, leaf in ((found, parameters), (same, elsewhere)):
        (gradient,) = torch.autograd.grad(values, leaf, pushes)
        assert (gradient[~over] == 0).all() and gradient.isfinite().all()


def direct_mask(grid: Windows) -> Tensor:
    """[W, m, m] bool: the source pixels that lie over the image."""
    over = torch.zeros(grid.count, grid.source_size, grid.source_size, dtype=torch.bool)
    for w, y, x in product(range(grid.count), *map(range, grid.image)):
        if pixel := source_pixel(grid, w, y, x):
            over[(w, *pixel)] = True
    return over


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_large_parameters_give_finite_images_and_gradients(dtype, offset):
    patches = patches_of(GRIDS["stride leaves a rest"], dtype)
    # By 1e4 from pixel to pixel as well: no one number could be taken off all of them.
    parameters = (drawn_for(patches, scale=1e4) + offset).requires_grad_()
    found = patches.images_and_variation(parameters)
    (gradient,) = torch.autograd.grad(found, parameters, [torch.ones_like(v) for v in found])
    assert all(value.isfinite().all() for value in (*found, gradient))
    weights = direct(patches.windows, patches.weights(parameters.detach()), 0.0)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


def test_many_rows_are_the_same_as_each_alone():
    patches = patches_of(GRIDS["stride leaves a rest"], torch.float32)
    parameters = drawn_for(patches, rows=5).requires_grad_()
    push = torch.rand(5, 3, *patches.windows.image, generator=seeded(4))
    images, variation = patches.images_and_variation(parameters)
    (gradient,) = torch.autograd.grad([images, variation.sum()], parameters, [push, None])
    for k in range(5):
        own = parameters[k : k + 1].detach().requires_grad_()
        alone = patches.images_and_variation(own)
        (of_own,) = torch.autograd.grad([alone[0], alone[1].sum()], own, [push[k : k + 1], None])
        torch.testing.assert_close(alone[0], images[k : k + 1], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(alone[1], variation[k : k + 1], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(of_own, gradient[k : k + 1], rtol=1e-6, atol=1e-7)


def test_rows_that_are_a_slice_of_others_need_no_copy():
    patches = patches_of(GRIDS["stride divides"])
    wide = drawn_for(patches, rows=6)
    images = patches.images(wide[1::2])
    torch.testing.assert_close(images, patches.images(wide)[1::2], rtol=1e-12, atol=0)


def test_nothing_larger_than_the_parameters_is_made():
    patches = patches_of(Windows((96, 96), window=6, stride=3, surround=2), torch.float32)
    parameters = drawn_for(patches).requires_grad_()
    given = {tensor.untyped_storage().data_ptr() for tensor in (parameters, patches.sources)}
    sizes: dict[int, int] = {}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                storage = tensor.untyped_storage()
                at = storage.data_ptr()
                if at not in given:
                    sizes[at] = max(sizes.get(at, 0), storage.nbytes())
            return made

    with Sizes():
        images, variation = patches.images_and_variation(parameters)
        (gradient,) = torch.autograd.grad(images.sum() + variation.sum(), parameters)
    images_size, gradient_size = images.nbytes, sizes.pop(gradient.untyped_storage().data_ptr())
    assert gradient_size == parameters.nbytes
    # The direct formulation's tensors are 100 times as large as the parameters, these a quarter.
    assert images_size < parameters.nbytes / 3 and max(sizes.values()) == images_size
