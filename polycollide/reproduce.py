"""The paper's experiments by one command each: its rows beside ours."""

import json as jsonlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table

from core import images, job
from core.errors import UnknownName
from core.interpolate import clopper_pearson
from core.result import Result
from core.spec import CollisionSpec
from polycollide.local import aside, console, in_one_sentence, percent, pick_device

# Seed of the shuffle that picks digit pairs.
PAIRS_SEED = 0
# "free": pixels may leave [0, 1], and alpha = beta, which is what brings the paper's distance.
SETTINGS: dict[str, dict[str, Any]] = {
    "paper-mnist": {},
    "free, beta 1": {"pixel_range": "free", "beta": 1.0, "learning_rate": 0.005},
    "equation 1": {"objective": "plain", "corners": 1},
}


@dataclass(frozen=True)
class Row:
    """One line of the table: what the paper states, if anything, and ours from all results."""

    name: str
    paper: str
    ours: Callable[[list[Result]], str]


def run(experiment: str, *, pairs: int, json: bool, device: str | None) -> None:
    """Runs `experiment` and prints it."""
    with in_one_sentence():
        if experiment not in EXPERIMENTS:
            raise UnknownName("experiment", experiment, EXPERIMENTS)
        EXPERIMENTS[experiment](pairs, json, pick_device(device))


def table1(pairs: int, json: bool, device: torch.device) -> None:
    """MNIST, first hidden layer: the paper's setting over many pairs of digits."""
    results = {name: _results(name, pairs, device) for name in SETTINGS}
    if json:
        lists = {n: [r.model_dump(mode="json") for r in rs] for n, rs in results.items()}
        print(jsonlib.dumps(lists, indent=2))
        return
    table = Table("", "paper", *results, title=f"Table 1: {pairs} pairs of digits, mnist-mlp, fc1")
    for row in TABLE1:
        table.add_row(row.name, row.paper, *(row.ours(rs) for rs in results.values()))
    console.print(table)
    console.print(
        "Means over pairs ± their standard deviation; fractions with 95 % Clopper-Pearson intervals "
        "over all samples of all pairs. Equation 1 has one corner, so nothing to interpolate.\n"
        "The paper gives neither alpha, beta and rate for MNIST nor its pixel range: paper-mnist "
        "has the ratio of its VGG-16 settings and valid pixels."
    )


def digit_pairs(pairs: int) -> list[tuple[str, str]]:
    """Sample names of digits of different classes, the first of a seeded shuffle."""
    digits = [name for name in images.sample_names() if name.startswith("mnist/")]
    every = [(s, t) for s, t in permutations(digits, 2) if s.split("-")[0] != t.split("-")[0]]
    order = np.random.default_rng(PAIRS_SEED).permutation(len(every))
    return [every[i] for i in order[:pairs]]


def _results(name: str, pairs: int, device: torch.device) -> list[Result]:
    setting = {"preset": "paper-mnist", "snapshots": 0, **SETTINGS[name]}
    spec = CollisionSpec.model_validate(setting)
    subject = job.Subject.open(spec, device)

    def load(sample: str) -> images.Loaded:
        return images.load(*images.read(f"sample:{sample}"), subject.model.preprocessing)

    jobs = {
        f"{s} {t}": job.prepare(subject, spec, load(s), load(t), f"{s} {t}")
        for s, t in digit_pairs(pairs)
    }
    engine = subject.engine(spec)
    for prepared in jobs.values():
        engine.admit(prepared.group)
    results: dict[str, Result] = {}
    with Progress(console=aside, transient=True) as bar:
        task = bar.add_task(name, total=len(jobs))
        while len(results) < len(jobs):
            for group in engine.advance():
                results[group.key] = job.measure(subject, jobs[group.key]).result
                bar.advance(task)
    return [results[key] for key in jobs]


def _mean(of: Callable[[Result], float], digits: int = 2) -> Callable[[list[Result]], str]:
    def text(results: list[Result]) -> str:
        values = [of(r) for r in results]
        return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

    return text


def _of_corners(field: str) -> Callable[[Result], float]:
    return lambda result: float(np.mean([getattr(corner, field) for corner in result.corners]))


def _fraction(of: Callable[[Result], tuple[float, int]]) -> Callable[[list[Result]], str]:
    """A fraction pooled over results, of which `of` gives each one's fraction and samples."""

    def text(results: list[Result]) -> str:
        counts = [of(r) for r in results]
        hits = round(sum(fraction * samples for fraction, samples in counts))
        samples = sum(samples for _, samples in counts)
        return percent(hits / samples, clopper_pearson(hits, samples))

    return text


def _interpolated(field: str) -> Callable[[Result], float]:
    def value(result: Result) -> float:
        assert result.interpolation
        return float(getattr(result.interpolation, field))

    return value


def _interpolated_fraction(field: str) -> Callable[[list[Result]], str]:
    value = _interpolated(field)
    return _fraction(lambda r: (value(r), r.interpolation.samples if r.interpolation else 0))


TABLE1 = [
    Row("pairs converged", "", lambda rs: f"{sum(r.converged for r in rs)} of {len(rs)}"),
    Row("steps", "", _mean(lambda r: r.steps, 0)),
    Row("mean pairwise distance", "1.28", _mean(lambda r: r.polytope.mean_pairwise_distance)),
    Row("between MNIST images", "10.21", _mean(lambda r: r.polytope.natural_distance)),
    Row("spread", "0.125", _mean(lambda r: r.polytope.spread, 3)),
    Row("interpolations collide", "100 %", _interpolated_fraction("accuracy")),
    Row("in 8 bits", "", _interpolated_fraction("accuracy_8bit")),
    Row("mean probability", "", _mean(_interpolated("mean_probability"), 4)),
    Row("in 8 bits", "", _mean(_interpolated("mean_probability_8bit"), 4)),
    Row("the target's probability", "", _mean(lambda r: r.target.probability, 4)),
    Row("relative residual", "", _mean(_interpolated("relative_residual"), 3)),
    Row("violation", "", _mean(_of_corners("violation"))),
    Row("distance to source", "", _mean(_of_corners("distance_to_source"))),
    Row("distance to target", "", _mean(_of_corners("distance_to_target"))),
    Row(
        "ball collides",
        "",
        _fraction(lambda r: (r.ball.accuracy, r.ball.samples) if r.ball else (0, 0)),
    ),
]

EXPERIMENTS = {"table1": table1}
