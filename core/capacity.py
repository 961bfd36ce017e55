"""How many rows at once are worth it on this machine, for a network opened at a layer."""

import time

import torch
from torch import Tensor

from core.job import Subject, is_out_of_memory, reference_images
from core.spec import CollisionSpec
from core.taps import matmul_precision

FIRST, MOST = 8, 4096
# What doubling must gain, and how often in a row it may fail to. Little, since what each step of an
# engine costs besides, however many its rows, is left out of the trial.
GAIN, PATIENCE = 1.03, 2
TURNS, TURNS_SECONDS = 3, 0.02  # the best of so many at least, and for so long
STEP_SECONDS, SECONDS = 1.0, 3.0  # the longest step, and the whole trial


def rows_worth(subject: Subject, spec: CollisionSpec, budget: float) -> int:
    """Rows beyond which an engine for `spec` gets no faster, or takes too much time or memory.

    Tries 8, 16, 32, ... rows for about three seconds, and leaves out those that make a step longer
    than a second or, as rows of pixels, take more than `budget` bytes.
    """
    references = reference_images(subject.model).to(subject.device)
    taken = subject.footprint.steps(spec) / spec.rows
    until = time.perf_counter() + SECONDS
    worth, best, wasted, rows = 1, 0.0, 0, FIRST
    while rows <= MOST and wasted < PATIENCE and rows * taken <= budget:
        images = references[torch.arange(rows) % len(references)]
        try:
            with matmul_precision(tf32=spec.precision == "tf32"):
                seconds = _trial(subject, images, until)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                break
            raise
        if seconds > STEP_SECONDS:
            break
        if rows / seconds > GAIN * best:
            worth, best, wasted = rows, rows / seconds, 0
        else:
            wasted += 1
        # Twice the rows may take twice as long, even once.
        if time.perf_counter() + 2 * seconds > until:
            break
        rows *= 2
    return worth


def _trial(subject: Subject, images: Tensor, until: float) -> float:
    """The fewest seconds that a step with `images` takes."""
    seconds = list[float]()
    first = time.perf_counter()
    while len(seconds) < TURNS or time.perf_counter() < first + TURNS_SECONDS:
        began = time.perf_counter()
        leaf = images.detach().requires_grad_()
        pre = subject.working_tap(leaf)
        torch.autograd.grad(pre.sum(), leaf)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds.append(time.perf_counter() - began)
        if time.perf_counter() + seconds[-1] > until:
            break
    return min(seconds)
