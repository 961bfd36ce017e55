"""Whole MNIST jobs at the paper's setting: corners, and jobs, together or one by one.

The plain loop (`subjects.HandLoop` with one row) stops each corner at its own threshold, looked at
as often as the engine looks. Times run from images in memory to finished corners and leave out the
metrics, which the last table splits.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from subjects import mnist_mlp, one_corner_after_another
from timing import Report, alternate, clocked, console, duration, quick_asked, table

from core import certify, figures, images, interpolate, job, outcome
from core.spec import CollisionSpec
from polycollide import local
from polycollide.reproduce import digit_pairs

TOGETHER = 64
SPEC = CollisionSpec(preset="paper-mnist")
THRESHOLD = 5.0  # the preset's, of L_pos
Pair = tuple[images.Loaded, images.Loaded]


def one_job(subject: job.Subject, pairs: list[Pair], turns: int) -> None:
    """A job of five corners in the engine against the corners one after another, per pair."""
    forward = mnist_mlp().forward
    report = Report("One job of five corners", "by hand", "engine")
    seconds = []
    for source, target in pairs:

        def by_hand(source: images.Loaded = source, target: images.Loaded = target) -> None:
            both = (torch.from_numpy(image.pixels) for image in (source, target))
            one_corner_after_another(forward, *both, SPEC, THRESHOLD)

        def engine(source: images.Loaded = source, target: images.Loaded = target) -> None:
            solve(subject, [prepare(subject, (source, target))])

        seconds.append(alternate(by_hand, engine, turns=turns))
    times = np.array(seconds)  # [pairs, 2, turns]
    # Few pairs take most of the time, so the typical job stands beside the sum that is judged.
    report.add(f"mean of {len(pairs)} pairs", *times.sum(0), (">=", 3.0), per=len(pairs))
    report.add("each pair by itself", *np.median(times, axis=2).T)
    report.show()


def many_jobs(subject: job.Subject, pairs: list[Pair], turns: int) -> None:
    """Jobs in one engine against an engine for each; once from images, once from prepared jobs."""
    report = Report(f"{len(pairs)} jobs of five corners, each", "one by one", "together")

    def one_by_one() -> None:
        for pair in pairs:
            solve(subject, [prepare(subject, pair)])

    def together() -> None:
        solve(subject, [prepare(subject, pair) for pair in pairs])

    report.add("from images", *alternate(one_by_one, together, turns=turns), per=len(pairs))
    waiting: list[job.Job] = []

    def steps(size: int) -> Callable[[], None]:
        def run() -> None:
            for first in range(0, len(pairs), size):
                solve(subject, waiting[first : first + size])

        return run

    seconds = np.empty((2, turns))
    for turn in range(turns):
        for i, size in enumerate((1, len(pairs))):
            waiting = [prepare(subject, pair) for pair in pairs]
            seconds[i, turn] = clocked(steps(size))
    report.add("the engine alone", *seconds, (">=", 5.0), per=len(pairs))
    report.show()


def prepare(subject: job.Subject, pair: Pair) -> job.Job:
    return job.prepare(subject, SPEC, *pair, key="job")


def solve(subject: job.Subject, jobs: list[job.Job]) -> None:
    """Runs `jobs` in one engine until all have finished."""
    engine = subject.engine(SPEC)
    for each in jobs:
        engine.admit(each.group)
    finished = 0
    while finished < len(jobs):
        finished += len(engine.advance())


# The parts of a job: what is called, and where. Parts inside another are taken off it.
PARTS: dict[str, tuple[object, str]] = {
    "prepare": (job, "prepare"),
    "optimise": (job.Engine, "advance"),
    "interpolation": (interpolate, "sample_polytope"),
    "ball": (interpolate, "measure_ball"),
    "worst point": (certify, "worst_point"),
    "corners": (outcome, "_corner_results"),
    "weights, summary": (interpolate, "summarize"),
    "distances": (interpolate, "measure_polytope"),
    "rest of the result": (outcome, "measure"),
    "figure.png": (figures, "draw_result"),
    "curves.png": (figures, "draw_curves"),
    "hull.png": (figures, "draw_hull"),
    "snapshots.png": (figures, "draw_snapshots"),
    "files": (local, "write"),
}


class Split:
    """Seconds by part, a part inside another counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[part][-1] += took - self.inner.pop()
                self.inner[-1] += took

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the parts of the jobs that are run inside."""
        with ExitStack() as stack:
            for part, (owner, name) in PARTS.items():
                timed = self.timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    def next_job(self) -> None:
        for part in PARTS:
            self.seconds[part].append(0.0)


def full_jobs(subject: job.Subject, pairs: list[Pair]) -> None:
    """Jobs with all metrics, pictures and files: medians of each part of their time."""
    split = Split()
    with tempfile.TemporaryDirectory() as folder, split.watching():
        for pair in (pairs[0], *pairs):
            split.next_job()
            local.write(Path(folder), *outcome.run_alone(subject, SPEC, *pair))
    lines = {part: float(np.median(seconds[1:])) for part, seconds in split.seconds.items()}
    whole = sum(lines.values())
    made = table(f"A job with everything, medians of {len(pairs)}", "part", "time", "share")
    for part, seconds in lines.items():
        made.add_row(part, duration(seconds), f"{seconds / whole:.0%}")
    made.add_row("sum", duration(whole), "", style="bold")
    console.print(made)


def main() -> None:
    quick = quick_asked(__doc__)
    net = mnist_mlp()
    subject = net.subject(SPEC)
    pairs = [(net.loaded(s), net.loaded(t)) for s, t in digit_pairs(TOGETHER)]
    one_job(subject, pairs[: 4 if quick else 16], turns=3 if quick else 11)
    many_jobs(subject, pairs, turns=3 if quick else 11)
    full_jobs(subject, pairs[: 3 if quick else 16])


if __name__ == "__main__":
    main()
