"""What became of a job: its corners and the polytope between them measured; and a job run alone."""

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core import certify, distances, edges, exact, images, interpolate
from core.engine import REASONS, STRIDE, Group
from core.errors import CoreError
from core.job import Job, Subject, chosen_mask, prepare
from core.objective import l_neg, l_pos, residual, violation
from core.patches.library import Library
from core.polytope import Clock, Stopped, collision_error
from core.program import UnsupportedNetwork, read
from core.regions import LEAST_SIDE, find_regions
from core.result import (
    Certificate,
    CornerResult,
    Edges,
    Exact,
    LayerResult,
    Provenance,
    Result,
    Worst,
)
from core.spec import CollisionSpec
from core.taps import matmul_precision, pins

ROUNDING = 1e-5  # of a spread: the engine adds up in float32, results in float64


class NotFinite(CoreError):
    """A measure is no number: the network's activations overflow float32."""

    code = "not_finite"


@dataclass(frozen=True)
class Outcome:
    """A result and the arrays behind it: `corners` [K, C, H, W] in float32, and raw `samples`.

    `worst` [C, H, W] is the image of the polytope's worst point, where that was looked for.
    """

    result: Result
    corners: NDArray[np.float32]
    samples: interpolate.Samples | None
    worst: NDArray[np.float32] | None


@matmul_precision(tf32=False)
def measure(subject: Subject, job: Job, on_chunk: Callable[[], None] = lambda: None) -> Outcome:
    """Measures the corners that the engine found, and the polytope between them.

    The exact solver's are found first. `on_chunk` is called between forward passes, for whoever
    watches whether this goes on.

    Raises:
        InfeasibleBudget, OutOfTime, SolverFailed: as `exact.find_corners` does.
        NotFinite: the network's activations overflow, so that a measure is no number.
    """
    solved = _solve(subject, job, on_chunk) if job.polytope else None
    began = time.perf_counter()
    spec, goal, label, corners = job.spec, job.goal, job.seen_target.label, job.group.corners
    samples, interpolation, ball, worst = None, None, None, None
    if spec.interpolation.samples:
        rng = np.random.default_rng([spec.seed, 1])
        sampler = spec.interpolation.sampler
        weights = interpolate.simplex_weights(
            sampler, spec.interpolation.samples, len(corners), rng
        )
        samples = interpolate.sample_polytope(
            subject.tap, goal, label, corners, weights, mixes=subject.mixes, on_chunk=on_chunk
        )
        unrelated = subject.feature_distance / goal.energy**0.5
        thresholds = job.group.l_pos_threshold, job.group.violation_threshold
        interpolation = interpolate.summarize(samples, sampler, label, unrelated, thresholds)
    if spec.ball_samples:
        clip = spec.pixel_range == "valid"
        ball = interpolate.measure_ball(
            subject.tap,
            label,
            corners,
            spec.ball_samples,
            clip=clip,
            seed=spec.seed,
            on_chunk=on_chunk,
        )
    if spec.worst_starts:
        worst = certify.worst_point(
            subject.tap,
            corners,
            label,
            starts=spec.worst_starts,
            seed=spec.seed,
            mixes=subject.mixes,
            on_step=on_chunk,
        )
    corner_results = _corner_results(subject, job)
    cut = subject.cut and _is_cut(subject, job)
    polytope = interpolate.measure_polytope(corners, subject.natural)
    collides = bool(job.group.converged.all())
    reached = polytope.spread >= (1 - ROUNDING) * spec.hull.goal if job.group.hull else None
    result = Result(
        converged=collides and reached is not False,
        collides=collides,
        goal_reached=reached,
        steps=min(job.group.age, spec.max_steps),
        seconds=job.group.seconds,
        measuring_seconds=0.0,
        cut=cut,
        cut_proved=cut and subject.cut_proved,
        warnings=_warnings(subject, job, solved, cut),
        notes=[*job.source.notes, *job.target.notes],
        missing=dict(_missing(job)),
        layer=LayerResult(
            name=subject.tap.layer.name,
            shape=list(subject.tap.layer.shape),
            units=subject.tap.layer.units,
            active=int(goal.positive.sum()),
        ),
        source=job.seen_source,
        target=job.seen_target,
        corners=corner_results,
        polytope=polytope.model_copy(update=distances.beyond_l2(corners, on_chunk)),
        interpolation=interpolation,
        ball=ball,
        worst=_worst(subject, label, worst) if worst else None,
        certificate=_certify(subject, job, worst, on_chunk) if spec.certify else None,
        exact=solved,
        provenance=_provenance(subject, job),
    )
    if where := next(_not_finite(result.model_dump(), ""), None):
        raise NotFinite(
            f"{subject.model.name} gives numbers at {subject.tap.layer.name!r} or behind it that "
            f"float32 does not hold ({where}); give another layer, or scale its weights down."
        )
    seconds = {"measuring_seconds": time.perf_counter() - began}
    return Outcome(
        result.model_copy(update=seconds),
        corners.cpu().numpy(),
        samples,
        worst.image.cpu().numpy() if worst else None,
    )


def run_alone(
    subject: Subject,
    spec: CollisionSpec,
    source: images.Loaded,
    target: images.Loaded,
    on_progress: Callable[[Group], None] = lambda group: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Job, Outcome]:
    """One job alone. When told to stop it keeps, and measures, what it has found."""
    with Library() as library:
        job = prepare(subject, spec, source, target, "job", library)
    engine = subject.engine(spec)
    engine.admit(job.group)
    while not engine.advance():
        on_progress(job.group)
        if should_stop():
            engine.stop(job.group.key)
            break
    on_progress(job.group)
    return job, measure(subject, job)


def _solve(subject: Subject, job: Job, on_chunk: Callable[[], None]) -> Exact:
    """Gives `job` the corners of its polytope."""
    assert job.polytope
    began = time.perf_counter()
    watch = _Watch(on_chunk)
    clock = Clock.within(job.spec.max_seconds, watch)
    polytope, group, units = job.polytope, job.group, job.units or []
    try:
        if units:
            objectives = exact.unit_objectives(polytope, units)
        else:
            objectives = exact.random_objectives(polytope, job.spec.corners, job.spec.seed)
        corners = exact.find_corners(polytope, objectives, clock=clock)
        size = exact.dimension(polytope, clock=clock)
        unbounded = exact.unbounded(polytope, units, clock=clock)
        to_source, to_target = (
            exact.nearest(polytope, image, clock=clock).distance
            for image in (polytope.source, polytope.target)
        )
    except Stopped:
        raise watch.error or Stopped() from None
    group.corners = polytope.affine.images(corners).to(group.corners)
    group.seconds = time.perf_counter() - began
    errors, _ = collision_error(subject.tap, polytope, group.corners)
    return Exact(
        source_budget=polytope.budget,
        dimension=size.dimension,
        dimension_paper=size.paper,
        unbounded=unbounded,
        least_distance_to_source=to_source,
        least_distance_to_target=to_target,
        collision_error=float(errors.max()),
    )


def _not_finite(value: object, name: str) -> Iterator[str]:
    """The names of numbers, anywhere in `value`, that JSON cannot tell."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name
    parts: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    for part, inside in parts:
        yield from _not_finite(inside, f"{name}.{part}" if name else str(part))


class _Watch:
    """Asks `on_chunk` in the middle of the solver, which takes a boolean and no exception."""

    def __init__(self, on_chunk: Callable[[], None]) -> None:
        self._on_chunk = on_chunk
        self.error: BaseException | None = None

    def __call__(self) -> bool:
        try:
            self._on_chunk()
        except BaseException as error:
            self.error = error
            return True
        return False


def _worst(subject: Subject, label: int, found: certify.WorstPoint) -> Worst:
    """A worst point, beside what its 8-bit image is taken for."""
    _, logits = interpolate.observe(subject.tap, interpolate.to_8bit_(found.image[None].clone()))
    return Worst(
        weights=found.weights.tolist(),
        margin=found.margin,
        probability=found.probability,
        label=found.label,
        class_=subject.model.classes[found.label],
        margin_8bit=float(certify.margins_of(logits, label)),
        probability_8bit=float(interpolate.probability_of(label, logits)),
        label_8bit=int(logits.argmax()),
    )


def _certify(
    subject: Subject, job: Job, worst: certify.WorstPoint | None, on_chunk: Callable[[], None]
) -> Certificate:
    asked, corners, label = job.spec.certify, job.group.corners, job.seen_target.label
    assert asked
    if asked.hull == "8bit":
        corners = interpolate.to_8bit_(corners.clone())
    found = certify.certify(
        subject.tap,
        corners,
        label,
        candidate=worst.weights if worst else None,
        max_seconds=asked.seconds,
        max_subsimplices=asked.subsimplices,
        on_step=on_chunk,
    )
    walked = None
    if found.outcome == "unknown" and len(corners) > 1:
        walked = _walk(subject, corners, label, asked.seconds, on_chunk)
    if walked and walked.least_margin < 0:
        again = certify.certify(
            subject.tap, corners, label, candidate=walked.weights, max_seconds=0.0
        )
        if again.outcome == "refuted":
            found = replace(found, outcome="refuted", weights=again.weights, reason=None)
            walked = None
    weights = None if found.weights is None else found.weights.tolist()
    return Certificate(
        hull=asked.hull,
        **{**vars(found), "weights": weights},
        holds_in_float32=found.holds_in_float32,
        edges=Edges(**{**vars(walked), "weights": walked.weights.tolist()}) if walked else None,
    )


def _walk(
    subject: Subject, corners: Tensor, label: int, seconds: float, on_chunk: Callable[[], None]
) -> edges.Edges | None:
    """None where the network cannot be read."""
    try:
        shape = tuple(corners.shape[1:])
        program = read(subject.tap.normalize, subject.tap.network, shape, corners)
    except UnsupportedNetwork:
        return None
    return edges.walk(program, corners, label, max_seconds=seconds, on_step=on_chunk)


def _corner_results(subject: Subject, job: Job) -> list[CornerResult]:
    group, goal, corners = job.group, job.goal, job.group.corners
    pre, logits = interpolate.observe(subject.tap, corners)
    _, logits_8bit = interpolate.observe(subject.tap, interpolate.to_8bit_(corners.clone()))
    chosen = chosen_mask(job.units, goal) if job.units else torch.zeros_like(pre, dtype=torch.bool)
    to_source, to_target = (
        (corners - torch.from_numpy(image.pixels).to(corners)).flatten(1).norm(dim=1)
        for image in (job.source, job.target)
    )
    columns = {
        "l_pos": l_pos(pre, goal),
        "l_neg": l_neg(pre, goal, chosen, job.spec.negative),
        "violation": violation(pre, goal),
        "relative_residual": residual(pre, goal),
        "label": logits.argmax(1),
        "probability": interpolate.probability_of(job.seen_target.label, logits),
        "label_8bit": logits_8bit.argmax(1),
        "probability_8bit": interpolate.probability_of(job.seen_target.label, logits_8bit),
        "distance_to_source": to_source,
        "distance_to_target": to_target,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        CornerResult(
            index=i,
            unit=_unit(job.units[i]) if job.units else None,
            steps=int(group.steps[i]),
            converged=bool(group.converged[i]),
            reason=REASONS[group.reason[i]],
            class_=subject.model.classes[int(logits[i].argmax())],
            distance_ratio=float(to_source[i] / to_target[i]) if to_target[i] else None,
            **dict(zip(columns, row, strict=True)),
        )
        for i, row in enumerate(rows)
    ]


def _unit(units: tuple[int, ...]) -> int | list[int]:
    return units[0] if len(units) == 1 else list(units)


def _is_cut(subject: Subject, job: Job) -> bool:
    """Whether this job's own source and corners, pinned to its target, get the target's logits."""
    target = torch.from_numpy(job.target.pixels)[None].to(subject.device)
    pre, logits = interpolate.observe(subject.tap, target)
    source = torch.from_numpy(job.source.pixels)[None].to(subject.device)
    images = torch.cat([source, job.group.corners])
    parts = images.split(interpolate.chunk(images[0]))
    return all(pins(subject.tap, pre, logits, p, apart=subject.logit_distance) for p in parts)


def _warnings(subject: Subject, job: Job, solved: Exact | None, cut: bool) -> list[str]:
    warnings = []
    if job.seen_source.label == job.seen_target.label:
        warnings.append(
            f"The network takes the source for {job.seen_source.class_!r} already, as it does the "
            "target: that corners and mixtures have that class shows nothing."
        )
    if not cut:
        warnings.append(
            f"Layer {subject.tap.layer.name!r} is no cut: other paths lead around it, so sharing "
            "its activations does not decide the class."
        )
    if job.supplier and not job.spec.patches.source:
        warnings.append(
            f"Most windows have the nearest patch from one image, {job.supplier!r}: if it shows "
            "what the source shows, take it out of the patch set."
        )
    if solved and not solved.dimension:
        warnings.append("The exact polytope is the target alone: the layer leaves no other image.")
    if job.spec.objective == "plain" and job.spec.corners > 1:
        warnings.append("The plain objective has no units: all corners are the same image.")
    if job.units and len(set(map(frozenset, job.units))) < len(job.units):
        warnings.append("Some corners push the same units away: they are the same image.")
    if job.spec.precision == "tf32" and subject.device.type != "cuda":
        warnings.append("TF32 is a mode of NVIDIA GPUs: this job ran in fp32.")
    return warnings


PICTURES = "figure.png", "curves.png", "hull.png", "regions.png", "snapshots.png"


def _missing(job: Job) -> Iterator[tuple[str, str]]:
    """Files that `core.artifacts` will not make of the job, and why."""
    spec, group = job.spec, job.group
    stepped = bool(group.curves.steps)
    none = "The corners took no step."
    if not spec.interpolation.samples:
        yield "samples.npz", "interpolation.samples is 0."
    if not spec.worst_starts:
        yield "worst.png", "worst_starts is 0."
    unseen = ""
    if not spec.snapshots:
        unseen = "snapshots is 0, as it is for items of a batch that do not set it."
    elif not group.on_the_way:
        few = f"The corners took {STRIDE} steps at most, after which the first would be."
        unseen = few if stepped else none
    if unseen:
        yield "snapshots.npz", unseen
    if not spec.figures:
        for name in PICTURES:
            yield name, "figures is false, as it is for items of a batch that do not set it."
        return
    if not stepped:
        yield "curves.png", none
    if spec.corners == 1:
        yield "hull.png", "One corner spans no polytope."
    elif not spec.interpolation.samples:
        yield "hull.png", "interpolation.samples is 0."
    if min(job.source.pixels.shape[1:]) < LEAST_SIDE:
        yield "regions.png", f"Images with a side under {LEAST_SIDE} pixels have none."
    elif not find_regions(group.corners.cpu().numpy()):
        yield "regions.png", "The corners differ nowhere by what 8 bits show."
    if unseen:
        yield "snapshots.png", unseen


@cache
def _versions() -> dict[str, str]:
    packages = ("numpy", "polycollide", "torch", "torchvision")
    versions = {"python": platform.python_version()} | {p: metadata.version(p) for p in packages}
    return dict(sorted(versions.items()))


def _provenance(subject: Subject, job: Job) -> Provenance:
    device = subject.device
    cuda = device.type == "cuda"
    return Provenance(
        versions=_versions(),
        weights=subject.model.weights,
        weights_sha256=subject.model.weights_sha256,
        source_sha256=job.source.sha256,
        target_sha256=job.target.sha256,
        patch_set_sha256=job.patch_set_sha256,
        spec=job.spec,
        seed=job.spec.seed,
        device=torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})",
        precision="fp32" if job.spec.precision == "tf32" and not cuda else job.spec.precision,
    )
