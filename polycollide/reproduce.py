"""The paper's experiments by one command each: its rows beside ours."""

import dataclasses
import json as jsonlib
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from core import exact, images, interpolate, job
from core.errors import InvalidSpec, UnknownName
from core.outcome import measure
from core.result import Result
from core.spec import CollisionSpec
from polycollide import photographs
from polycollide.listing import aside, console, listing, show_json
from polycollide.local import in_one_sentence, pick_device
from polycollide.photographs import EXPERIMENTS, Asked
from polycollide.rows import (
    BALL,
    EIGHT_BITS,
    FLOATS,
    Ours,
    Row,
    converged,
    interpolated,
    mean,
    of_corners,
)

CERTIFIED = "certified"
TABLE_1 = "table1"
PAIRS = 20
# Seed of the shuffle that picks digit pairs.
PAIRS_SEED = 0
# "free" comes near the paper's distance: pixels may leave [0, 1], and beta is as large as alpha.
SETTINGS: dict[str, dict[str, Any]] = {
    "paper-mnist": {},
    "free, beta 1": {"pixel_range": "free", "beta": 1.0, "learning_rate": 0.005},
    "equation 1": {"objective": "plain", "corners": 1},
    "defaults": {"preset": None, "model": "mnist-mlp", "layer": "fc1"},
}


def run(experiment: str, *, asked: Asked, beyond: bool, device: str | None) -> None:
    """Runs `experiment` and prints it."""
    with in_one_sentence():
        if experiment == TABLE_1:
            if dataclasses.replace(asked, count=None, json=False) != Asked():
                raise InvalidSpec("table1 takes --pairs, --beyond, --json and --device alone.")
            table1(asked.count or PAIRS, beyond, asked.json, pick_device(device))
            return
        if experiment not in EXPERIMENTS:
            raise UnknownName("experiment", experiment, [TABLE_1, *EXPERIMENTS])
        if beyond:
            raise InvalidSpec("Only table1 goes beyond the paper; leave --beyond out.")
        photographs.reproduce(experiment, asked, pick_device(device))


def table1(pairs: int, beyond: bool, json: bool, device: torch.device) -> None:
    """MNIST, first hidden layer: the paper's setting over many pairs of digits."""
    settings, rows = (BEYOND, BEYOND_ROWS) if beyond else (SETTINGS, TABLE1)
    results = {name: _results(name, given, pairs, device) for name, given in settings.items()}
    if json:
        lists = {n: [r.model_dump(mode="json") for r in rs] for n, rs in results.items()}
        show_json(jsonlib.dumps(lists, indent=2))
        return
    where = "five corners" if beyond else "mnist-mlp, layer fc1, five corners"
    console.print(f"Table 1: {pairs} pairs of digits, {where}")
    table = listing("", "paper", *results)
    for row in rows:
        table.add_row(row.name, row.paper, *(row.ours(rs) for rs in results.values()))
    console.print(table)
    if beyond:
        console.print(BEYOND_NOTE, highlight=False, soft_wrap=True)
        _budgets(min(pairs, BUDGET_PAIRS), device)
        return
    console.print(
        "Means over pairs and their standard deviation; 95 % Clopper-Pearson intervals over the\n"
        "samples of all pairs. equation 1 has one corner, so its mixtures are that corner.\n"
        "defaults must meet thresholds of L_pos and of violation, the others L_pos under 5.\n"
        "The paper gives neither alpha, beta, rate nor pixel range for MNIST: paper-mnist has\n"
        "valid pixels and a beta with which all these pairs converge.",
        highlight=False,
        soft_wrap=True,
    )


def digit_pairs(pairs: int) -> list[tuple[str, str]]:
    """Sample names of digits of different classes, the first of a seeded shuffle."""
    digits = [name for name in images.sample_names() if name.startswith("mnist/")]
    every = [(s, t) for s, t in permutations(digits, 2) if s.split("-")[0] != t.split("-")[0]]
    order = np.random.default_rng(PAIRS_SEED).permutation(len(every))
    return [every[i] for i in order[:pairs]]


def _prepare(
    given: dict[str, Any], pairs: int, device: torch.device
) -> tuple[job.Subject, dict[str, job.Job]]:
    spec = CollisionSpec.model_validate({"preset": "paper-mnist", "snapshots": 0, **given})
    subject = job.Subject.open(spec, device)

    def load(sample: str) -> images.Loaded:
        return images.load(*images.read(f"sample:{sample}"), subject.model.preprocessing)

    return subject, {
        f"{s} {t}": job.prepare(subject, spec, load(s), load(t), f"{s} {t}")
        for s, t in digit_pairs(pairs)
    }


def _results(name: str, given: dict[str, Any], pairs: int, device: torch.device) -> list[Result]:
    subject, jobs = _prepare(given, pairs, device)
    spec = next(iter(jobs.values())).spec
    engine = subject.engine(spec)
    for prepared in jobs.values():
        engine.admit(prepared.group)
    results: dict[str, Result] = {}
    with Progress(console=aside, transient=True, disable=not aside.is_terminal) as bar:
        task = bar.add_task(name, total=len(jobs))
        while len(results) < len(jobs):
            for group in engine.advance():
                results[group.key] = measure(subject, jobs[group.key]).result
                bar.advance(task)
    return [results[key] for key in jobs]


def _budgets(pairs: int, device: torch.device) -> None:
    """Prints how far exact corners spread within a budget around the source."""
    _, jobs = _prepare(BEYOND["exact"], pairs, device)
    found: dict[float | None, list[tuple[float, float, float]]] = {b: [] for b in BUDGETS}
    with Progress(console=aside, transient=True, disable=not aside.is_terminal) as bar:
        task = bar.add_task("budgets", total=len(jobs) * len(BUDGETS))
        for done in jobs.values():
            polytope, natural = done.polytope, interpolate.natural_distance((1, 28, 28))[0]
            assert polytope
            assert done.units
            objectives = exact.unit_objectives(polytope, done.units)
            for budget, corners in exact.sweep_budgets(polytope, objectives, BUDGETS):
                bar.advance(task)
                if corners is None:
                    continue
                apart = interpolate.pairwise_distance(polytope.affine.images(corners))
                to_source, to_target = (
                    float(np.linalg.norm(corners - image, axis=1).mean())
                    for image in (polytope.source, polytope.target)
                )
                spread = interpolate.mean_of_pairs(apart) / natural
                found[budget].append((spread, to_source, to_target))
    console.print(f"Exact corners within a budget around the source, {pairs} pairs")
    table = listing("a pixel may move", "pairs left", "spread", "to source", "to target")
    for budget, rows in found.items():
        means = [f"{value:.2f}" for value in np.mean(rows, 0)] if rows else ["", "", ""]
        table.add_row(f"{budget:g}" if budget else "anywhere", f"{len(rows)} of {pairs}", *means)
    console.print(table)


TABLE1 = [
    Row("pairs converged", "", converged),
    Row("steps", "", mean(lambda r: r.steps, 0)),
    Row("distance apart", "1.28", mean(lambda r: r.polytope.mean_pairwise_distance)),
    Row("of MNIST images", "10.21", lambda rs: f"{rs[0].polytope.natural_distance:.2f}"),
    Row("spread", "0.125", mean(lambda r: r.polytope.spread, 3)),
    Row("colliding", "", FLOATS[0]),
    Row("  interval", "", FLOATS[1]),
    Row("  in 8 bits", "", EIGHT_BITS[0]),
    Row("  interval", "", EIGHT_BITS[1]),
    Row("probability", "", mean(interpolated("mean_probability"), 3)),
    Row("  in 8 bits", "", mean(interpolated("mean_probability_8bit"), 3)),
    Row("  of the target", "", mean(lambda r: r.target.probability, 3)),
    Row("residual", "", mean(interpolated("relative_residual"), 3)),
    Row("violation", "", mean(of_corners("violation"))),
    Row("to source", "", mean(of_corners("distance_to_source"))),
    Row("to target", "", mean(of_corners("distance_to_target"))),
    Row("ball colliding", "", BALL[0]),
    Row("  interval", "", BALL[1]),
]


def _claimed(of: Callable[[Result], object]) -> Ours:
    return lambda results: f"{sum(bool(of(r)) for r in results)} of {len(results)}"


def _proof_seconds(results: list[Result]) -> str:
    return f"{max(r.certificate.seconds for r in results if r.certificate):.2f}"


def _exact(field: str) -> Ours:
    def text(results: list[Result]) -> str:
        values = [getattr(r.exact, field) for r in results if r.exact]
        return f"{np.mean(values):.1f}±{np.std(values):.1f}" if values else ""

    return text


# The paper's setting beside ours, each with a proof; all columns but the last two are at fc1.
PROOF: dict[str, Any] = {"certify": {}}
ON_FC1: dict[str, Any] = {"model": "mnist-mlp", "layer": "fc1"}
BEYOND: dict[str, dict[str, Any]] = {
    "paper-mnist": PROOF,
    "hull": {"preset": "hull", **ON_FC1},
    "exact": {"preset": None, "solver": "exact", **ON_FC1, **PROOF},
    "hull fc2": {"preset": "hull", "model": "mnist-mlp", "layer": "fc2"},
    "hull cnn": {
        "preset": "hull",
        "model": "mnist-cnn",
        "layer": "fc1",
        "hull": {"goal": 0.33, "diversity": 1.0},
    },
}
BUDGETS, BUDGET_PAIRS = [0.6, 0.7, 0.8, 0.9, None], 5
BEYOND_ROWS = [
    Row("converged", "", converged),
    Row("steps", "", mean(lambda r: r.steps, 0)),
    Row("apart", "1.28", mean(lambda r: r.polytope.mean_pairwise_distance)),
    Row("spread", "0.125", mean(lambda r: r.polytope.spread)),
    Row("  least", "", lambda rs: f"{min(r.polytope.spread for r in rs):.2f}"),
    Row("in class %", "", lambda rs: FLOATS[0](rs).rstrip(" %")),
    Row("  at least", "", lambda rs: FLOATS[1](rs).split("-")[0]),
    Row("  in 8 bits", "", lambda rs: EIGHT_BITS[0](rs).rstrip(" %")),
    Row("  at least", "", lambda rs: EIGHT_BITS[1](rs).split("-")[0]),
    Row("worst too", "", _claimed(lambda r: r.worst and r.worst.label == r.target.label)),
    Row("  in 8 bits", "", _claimed(lambda r: r.worst and r.worst.label_8bit == r.target.label)),
    Row("  margin", "", mean(lambda r: r.worst.margin if r.worst else np.nan, 1)),
    Row("  P, least", "", lambda rs: f"{min(r.worst.probability for r in rs if r.worst):.3f}"),
    Row("certified", "", _claimed(lambda r: r.certificate and r.certificate.outcome == CERTIFIED)),
    Row("  seconds", "", _proof_seconds),
    Row("residual", "", mean(interpolated("relative_residual"))),
    Row("to source", "", mean(of_corners("distance_to_source"), 1)),
    Row("  possible", "", _exact("least_distance_to_source")),
    Row("to target", "", mean(of_corners("distance_to_target"), 1)),
]
BEYOND_NOTE = """\
Columns 1 to 3 are mnist-mlp at fc1; hull fc2 is its second layer, hull cnn is mnist-cnn at fc1.
Means over pairs and their standard deviation. in class: of all samples; at least: the lower
end of the 95 % Clopper-Pearson interval. worst: the least margin that a gradient search of the
polytope found. certified: every point between the float corners is proved to have the target's
class. possible: how near to the source the exact polytope comes."""
