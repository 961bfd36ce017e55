"""A step of the composition at the authors' geometry against the direct [W, H, W] formulation.

A step is the images of five corners and the gradient of their 625 x 112 x 112 control parameters
each, for a gradient that comes from a network. The direct formulation has one parameter a window
for each pixel of the image, minus infinity where no source lies, and lets autograd differentiate
softmax and sum: for all pixels at once, or a few rows of pixels after the other, which is the best
that we could make of it on a CPU (einsum and bmm take twice as long as the sums, or longer).

Memory is the peak of the resident set of a process that makes the inputs and takes one step, less
what it had when torch was loaded: parameters, sources, gradient and all that comes in between.
"""

import multiprocessing
import resource
from collections.abc import Callable
from functools import partial

import torch
from timing import Report, alternate, console, quick_asked, table, verdict
from torch import Tensor

from core.patches.composite import Patches
from core.patches.windows import GEOMETRIES, Windows

CORNERS = 5
ROWS = 2  # of pixels at a time: 1, 4 and 8 take as long
AUTHORS = Windows((224, 224), *GEOMETRIES["code"])

Step = Callable[[], tuple[Tensor, Tensor]]  # images [K, 3, H, W], the gradient of parameters


def composition(*, varied: bool = False) -> Step:
    """With the gradient of R(P) besides where `varied`."""
    patches = made()
    parameters, push = patches.start(CORNERS).requires_grad_(), pushed()

    def step() -> tuple[Tensor, Tensor]:
        if varied:
            images, variation = patches.images_and_variation(parameters)
            outputs, pushes = [images, variation], [push, push.new_ones(CORNERS)]
        else:
            images = patches.images(parameters)
            outputs, pushes = [images], [push]
        return images.detach(), *torch.autograd.grad(outputs, parameters, pushes)

    return step


def direct(*, rows: int) -> Step:
    """So many `rows` of pixels at a time."""
    patches, push = made(), pushed()
    start = patches.start(1)[0]
    shape = AUTHORS.count, *AUTHORS.image
    parameters = torch.full((CORNERS, *shape), -torch.inf)
    sources = torch.zeros(3, *shape)
    for w, (inside, on) in enumerate(patches.places):
        parameters[:, w][on] = start[w][inside]
        sources[:, w][on] = patches.sources[w][inside]
    del patches, start

    def part(leaf: Tensor, sources: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
        leaf = leaf.detach().requires_grad_()
        weights = leaf.softmax(1)
        images = torch.stack([(weights * channel).sum(1) for channel in sources], 1)
        return images.detach(), *torch.autograd.grad(images, leaf, push)

    def step() -> tuple[Tensor, Tensor]:
        if rows == AUTHORS.image[0]:
            return part(parameters, sources, push)
        images, gradient = torch.empty_like(push), torch.empty_like(parameters)
        for first in range(0, AUTHORS.image[0], rows):
            at = (..., slice(first, first + rows), slice(None))
            images[at], gradient[at] = part(parameters[at], sources[at], push[at])
        return images, gradient

    return step


def made() -> Patches:
    m = AUTHORS.source_size
    return Patches(torch.rand(AUTHORS.count, 3, m, m, generator=seeded(1)), AUTHORS)


def pushed() -> Tensor:
    """What a network would send back, [K, 3, H, W]."""
    return torch.randn(CORNERS, 3, *AUTHORS.image, generator=seeded(2))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(own: Step, other: Step) -> None:
    """That both do the same."""
    (images, gradient), (direct_images, direct_gradient) = own(), other()
    torch.testing.assert_close(images, direct_images, rtol=1e-4, atol=1e-5)
    for w, (inside, on) in enumerate(made().places):
        torch.testing.assert_close(
            gradient[:, w][inside], direct_gradient[:, w][on], rtol=1e-3, atol=1e-5
        )


def peak(step_of: Callable[[], Step]) -> float:
    """Megabytes that a step and its inputs add to a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_peak, (step_of, torch.get_num_threads()))


def _peak(step_of: Callable[[], Step], threads: int) -> float:
    torch.set_num_threads(threads)
    torch.rand(8).requires_grad_().exp().sum().backward()
    before = _resident()
    step_of()()
    return _resident() - before


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def main() -> None:
    quick = quick_asked(__doc__)
    versions = {
        "all at once": partial(direct, rows=AUTHORS.image[0]),
        f"{ROWS} rows of pixels at a time": partial(direct, rows=ROWS),
    }

    headings = "", "direct", "composition", "direct / composition", "target", ""
    memory = table("Memory of a step", *headings)
    own = peak(composition)
    for name, version in versions.items():
        other = peak(version)
        sizes = f"{other:.0f} MB", f"{own:.0f} MB", f"{other / own:.2f}"
        memory.add_row(name, *sizes, *verdict(other / own, (">=", 3)))
    console.print(memory)

    times = Report("Time of a step", "direct", "composition")
    step = composition()
    for name, version in versions.items():
        directly = version()
        check(step, directly)
        turns = alternate(directly, step, turns=2 if quick else 5, warm_up=0)
        times.add(name, *turns, (">=", 2))
        del directly
    times.show()

    variation = Report("Time of a step with R(P)", "with", "without")
    turns = alternate(composition(varied=True), step, turns=3 if quick else 10)
    variation.add("composition", *turns)
    variation.show()


if __name__ == "__main__":
    main()
