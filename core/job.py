"""One job from its settings and two images to its result; the command line and workers share it."""

import copy
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core import certify, exact, images, interpolate, models
from core.engine import CONVERGED, REASONS, Engine, Group
from core.errors import InvalidSpec, UnknownName
from core.hull import Hull
from core.models import Model
from core.objective import Losses, Target, l_neg, l_pos, residual, violation
from core.result import (
    Certificate,
    CornerResult,
    Exact,
    LayerResult,
    Provenance,
    Result,
    Seen,
    Worst,
)
from core.spec import CollisionSpec, Relative, Threshold
from core.taps import (
    Tap,
    is_affine,
    is_cut,
    matmul_precision,
    mixes,
    open_tap,
    tappable,
    true_name,
)
from core.units import choose_units


@dataclass(frozen=True)
class Subject:
    """A network opened at a layer: what all jobs of one batch key share.

    `tap` measures in float32, `working_tap` optimises in the job's precision. Two unrelated images
    differ by `natural` in pixels (and what that was taken of) and by `feature_distance` at the
    layer, on average.
    """

    model: Model
    tap: Tap
    working_tap: Tap
    cut: bool
    mixes: bool
    natural: tuple[float, str]
    feature_distance: float

    @classmethod
    def open(cls, spec: CollisionSpec, device: torch.device) -> "Subject":
        """Loads the network of `spec` and opens its layer.

        Raises:
            UnknownName, ModelUnavailable, UntappableLayer: as `models.load` and `open_tap` do.
        """
        return cls.of(models.load(spec.model, weights=spec.weights, device=device), spec)

    @classmethod
    @matmul_precision(tf32=False)
    def of(cls, model: Model, spec: CollisionSpec) -> "Subject":
        """As `open`, for a network that is loaded already."""
        network = model.classifier.network
        references = reference_images(model).to(next(network.parameters()).device)
        tap = open_tap(model.classifier.normalize, network, spec.layer, references[:1])
        working = tap
        if spec.precision == "bf16":
            cast = copy.deepcopy(network).to(torch.bfloat16)
            working = Tap(tap.normalize, cast, tap.layer, torch.bfloat16)
        return cls(
            model=model,
            tap=tap,
            working_tap=working,
            cut=is_cut(tap, references[:1], references[1:2]),
            mixes=mixes(tap, references[:3]),
            natural=interpolate.natural_distance(references),
            feature_distance=_feature_distance(tap, references),
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.classifier.parameters()).device

    def engine(self, spec: CollisionSpec, on_step: Callable[[], None] = lambda: None) -> Engine:
        """A new engine for jobs with this batch key."""
        tf32 = spec.precision == "tf32"
        return Engine(self.working_tap, spec.optimizer, tf32=tf32, on_step=on_step)


@dataclass(frozen=True)
class Job:
    """A job ready for the engine: what `measure` needs again is kept beside its `group`."""

    spec: CollisionSpec
    source: images.Loaded
    target: images.Loaded
    goal: Target
    units: list[tuple[int, ...]] | None
    seen_source: Seen
    seen_target: Seen
    group: Group
    polytope: exact.LayerPolytope | None = None


@dataclass(frozen=True)
class Outcome:
    """A result and the arrays behind it: `corners` [K, C, H, W] in float32, and raw `samples`.

    `worst` [C, H, W] is the image of the polytope's worst point, where that was looked for.
    """

    result: Result
    corners: NDArray[np.float32]
    samples: interpolate.Samples | None
    worst: NDArray[np.float32] | None


@dataclass(frozen=True)
class LayerInfo:
    """A layer that a model can be opened at, in plain values.

    `names` are all that `open_tap` takes for it; `name`, the first, is how we call it.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    units: int
    cut: bool
    affine: bool


def describe(model: Model) -> Iterator[LayerInfo]:
    """Every layer that `model` can be opened at, in the order of its forward pass.

    Large models take seconds a layer; each is given as soon as it is known.
    """
    references = reference_images(model).to(next(model.classifier.parameters()).device)
    normalize, network = model.classifier.normalize, model.classifier.network
    for layer in tappable(network, normalize(references[:1])):
        yield _describe(Tap(normalize, network, layer), references)


@torch.no_grad()
@matmul_precision(tf32=False)
def _describe(tap: Tap, references: Tensor) -> LayerInfo:
    name = true_name(tap.network, tap.normalize(references[:1]), tap.layer)
    return LayerInfo(
        name=name,
        names=tuple(dict.fromkeys([name, tap.layer.names[-1]])),
        shape=tap.layer.shape,
        units=tap.layer.units,
        cut=is_cut(tap, references[:1], references[1:2]),
        affine=is_affine(tap, references[:2]),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left."""
    told = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # of the CPU's
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


@cache
def _reference_files(mode: str) -> list[tuple[str, bytes]]:
    folder = "mnist/" if mode == "L" else "photos/"
    names = [name for name in images.sample_names() if name.startswith(folder)]
    return [images.read(f"sample:{name}") for name in names]


def reference_images(model: Model) -> Tensor:
    """[N, C, H, W]: the sample images of the model's kind, fitted to it."""
    files = _reference_files(model.preprocessing.mode)
    loaded = [images.load(name, data, model.preprocessing) for name, data in files]
    return torch.from_numpy(np.stack([image.pixels for image in loaded]))


@matmul_precision(tf32=False)
def prepare(
    subject: Subject, spec: CollisionSpec, source: images.Loaded, target: images.Loaded, key: str
) -> Job:
    """Checks the images and settings against the network and builds the engine's group.

    A job for the exact solver needs no engine, and passes through one at once.

    Raises:
        InvalidSpec: the images are the same, the target is not of the class that the spec names,
            the units do not fit the target, or the network gives numbers that are not finite.
        UnknownName: the spec names a class that the network does not have.
        NotAffine, TooLarge: the exact solver cannot take the layer.
    """
    tap = subject.tap
    pair = torch.from_numpy(np.stack([source.pixels, target.pixels])).to(subject.device)
    if torch.equal(pair[0], pair[1]):
        raise InvalidSpec("Source and target are the same image; give two different ones.")
    with torch.no_grad():
        pre, logits = tap.observe(pair)
    for name, *values in zip(("source", "target"), pre, logits, strict=True):
        if not all(value.isfinite().all() for value in values):
            raise InvalidSpec(
                f"{subject.model.name} gives numbers that are not finite for the {name} image; "
                "its weights are damaged or do not belong to it."
            )
    seen_source, seen_target = (_seen(subject.model, row) for row in logits)
    if spec.target_class is not None:
        _check_class(subject.model, spec.target_class, seen_target)
    goal = Target(pre[1], tap.layer.clip)
    if not (goal.pre[goal.active] > 0).any():
        raise InvalidSpec(
            f"The target activates no unit of layer {tap.layer.name!r} below saturation, so there "
            "is nothing to collide with; give another target or layer."
        )
    units = None if spec.objective == "plain" else choose_units(tap, goal, pair[0], spec)
    if units is None:
        losses = Losses.of_plain(goal, spec.corners, alpha=spec.alpha)
    else:
        losses = Losses.of_corners(
            goal,
            _chosen(units, goal),
            alpha=spec.alpha,
            beta=_beta(spec, goal),
            negative=spec.negative,
        )
    group = Group(
        key=key,
        spec=spec,
        source=pair[0],
        losses=losses,
        hull=_hull(subject, spec, goal, logits[1:]) if spec.objective == "hull" else None,
        l_pos_threshold=_absolute(spec.l_pos_threshold, goal),
        violation_threshold=_absolute(spec.violation_threshold, goal),
    )
    polytope = None
    if spec.solver == "exact":
        affine = exact.affine_map(tap, pair)
        polytope = exact.LayerPolytope.of(affine, tap.layer.clip, *pair, budget=spec.source_budget)
        group.score[:], group.reason[:] = 0.0, CONVERGED
    return Job(spec, source, target, goal, units, seen_source, seen_target, group, polytope)


@matmul_precision(tf32=False)
def measure(subject: Subject, job: Job, on_chunk: Callable[[], None] = lambda: None) -> Outcome:
    """Measures the corners that the engine found, and the polytope between them.

    The exact solver's are found first. `on_chunk` is called between forward passes, for whoever
    watches whether this goes on.

    Raises:
        InfeasibleBudget, OutOfTime, SolverFailed: as `exact.find_corners` does.
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
        interpolation = interpolate.summarize(samples, sampler, label, unrelated)
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
    result = Result(
        converged=bool(job.group.converged.all()),
        steps=min(job.group.age, spec.max_steps),
        seconds=job.group.seconds,
        measuring_seconds=0.0,
        cut=subject.cut,
        warnings=_warnings(subject, job),
        notes=[*job.source.notes, *job.target.notes],
        layer=LayerResult(
            name=subject.tap.layer.name,
            shape=list(subject.tap.layer.shape),
            units=subject.tap.layer.units,
            active=int((goal.pre > 0).sum()),
        ),
        source=job.seen_source,
        target=job.seen_target,
        corners=corner_results,
        polytope=interpolate.measure_polytope(corners, subject.natural),
        interpolation=interpolation,
        ball=ball,
        worst=_worst(subject, label, worst) if worst else None,
        certificate=_certify(subject, job, worst, on_chunk) if spec.certify else None,
        exact=solved,
        provenance=_provenance(subject, job),
    )
    seconds = {"measuring_seconds": time.perf_counter() - began}
    return Outcome(
        result.model_copy(update=seconds),
        corners.cpu().numpy(),
        samples,
        worst.image.cpu().numpy() if worst else None,
    )


def run(
    subject: Subject,
    spec: CollisionSpec,
    source: images.Loaded,
    target: images.Loaded,
    on_progress: Callable[[Group], None] = lambda group: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Job, Outcome]:
    """One job alone. When told to stop it keeps, and measures, what it has found."""
    job = prepare(subject, spec, source, target, key="job")
    engine = subject.engine(spec)
    engine.admit(job.group)
    while not engine.advance():
        on_progress(job.group)
        if should_stop():
            engine.stop(job.group.key)
            break
    on_progress(job.group)
    return job, measure(subject, job)


def _hull(subject: Subject, spec: CollisionSpec, goal: Target, logits: Tensor) -> Hull:
    """Points between corners push no unit away, and together weigh as much as the corners.

    `logits` [1, classes] are the target's.
    """
    count, beta, label = spec.hull.points, _beta(spec, goal), int(logits.argmax())
    none = torch.zeros(count, len(goal.pre), dtype=torch.bool, device=goal.pre.device)
    share = spec.corners / count
    losses = Losses.of_corners(
        goal, none, alpha=share * spec.alpha, beta=share * beta, negative=spec.negative
    )
    return Hull(
        settings=spec.hull,
        losses=losses,
        natural=subject.natural[0],
        energy=spec.alpha * goal.energy,
        label=label,
        margin=float(certify.margins_of(logits, label)),
        seed=spec.seed,
        max_steps=spec.max_steps,
    )


def _solve(subject: Subject, job: Job, on_chunk: Callable[[], None]) -> Exact:
    """Gives `job` the corners of its polytope."""
    assert job.polytope
    assert job.units
    began = time.perf_counter()
    watch = _Watch(on_chunk)
    clock = exact.Clock.within(job.spec.max_seconds, watch)
    polytope, group = job.polytope, job.group
    try:
        objectives = exact.unit_objectives(polytope, job.units)
        corners = exact.find_corners(polytope, objectives, clock=clock)
        size = exact.dimension(polytope, clock=clock)
        unbounded = exact.unbounded(polytope, job.units, clock=clock)
        to_source, to_target = (
            exact.nearest(polytope, image, clock=clock).distance
            for image in (polytope.source, polytope.target)
        )
    except exact.Stopped:
        raise watch.error or exact.Stopped() from None
    group.corners = polytope.affine.images(corners).to(group.corners)
    group.seconds = time.perf_counter() - began
    errors, _ = exact.collision_error(subject.tap, polytope, group.corners)
    return Exact(
        source_budget=polytope.budget,
        dimension=size.dimension,
        dimension_paper=size.paper,
        unbounded=unbounded,
        least_distance_to_source=to_source,
        least_distance_to_target=to_target,
        collision_error=float(errors.max()),
    )


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
    asked, corners = job.spec.certify, job.group.corners
    assert asked
    found = certify.certify(
        subject.tap,
        interpolate.to_8bit_(corners.clone()) if asked.hull == "8bit" else corners,
        job.seen_target.label,
        candidate=worst.weights if worst else None,
        max_seconds=asked.seconds,
        max_subsimplices=asked.subsimplices,
        on_step=on_chunk,
    )
    weights = None if found.weights is None else found.weights.tolist()
    return Certificate(hull=asked.hull, **{**vars(found), "weights": weights})


def _chosen(units: list[tuple[int, ...]], goal: Target) -> Tensor:
    """The units of each corner as a mask [K, U]."""
    chosen = torch.zeros(len(units), len(goal.pre), dtype=torch.bool)
    for corner, own in enumerate(units):
        chosen[corner, list(own)] = True
    return chosen.to(goal.pre.device)


def _beta(spec: CollisionSpec, goal: Target) -> float:
    if not isinstance(spec.beta, Relative):
        return spec.beta
    typical = float(goal.pre[goal.active].square().mean().sqrt())
    return spec.beta.relative * spec.alpha * typical


def _absolute(threshold: Threshold | None, goal: Target) -> float:
    if threshold is None:
        return math.inf
    return threshold.relative * goal.energy if isinstance(threshold, Relative) else threshold


def _seen(model: Model, logits: Tensor) -> Seen:
    label = int(logits.argmax())
    probability = float(logits.double().softmax(0)[label])
    return Seen(label=label, class_=model.classes[label], probability=probability)


def _check_class(model: Model, wanted: str, seen: Seen) -> None:
    if wanted not in (seen.class_, str(seen.label)):
        if wanted not in (*model.classes, *map(str, range(len(model.classes)))):
            raise UnknownName("class", wanted, model.classes)
        raise InvalidSpec(
            f"The target should be {wanted!r}, but {model.name} takes it for {seen.class_!r} "
            f"(probability {seen.probability:.2f}); give another target image."
        )


def _warnings(subject: Subject, job: Job) -> list[str]:
    warnings = []
    if job.seen_source.label == job.seen_target.label:
        warnings.append(
            f"The network takes the source for {job.seen_source.class_!r} already, as it does the "
            "target: that corners and mixtures have that class shows nothing."
        )
    if not subject.cut:
        warnings.append(
            f"Layer {subject.tap.layer.name!r} is no cut: other paths lead around it, so sharing "
            "its activations does not decide the class."
        )
    if job.spec.objective == "plain" and job.spec.corners > 1:
        warnings.append("The plain objective has no units: all corners are the same image.")
    if job.units and len(set(map(frozenset, job.units))) < len(job.units):
        warnings.append("Some corners push the same units away: they are the same image.")
    if job.spec.precision == "tf32" and subject.device.type != "cuda":
        warnings.append("TF32 is a mode of NVIDIA GPUs: this job ran in fp32.")
    return warnings


def _corner_results(subject: Subject, job: Job) -> list[CornerResult]:
    group, goal, corners = job.group, job.goal, job.group.corners
    pre, logits = interpolate.observe(subject.tap, corners)
    _, logits_8bit = interpolate.observe(subject.tap, interpolate.to_8bit_(corners.clone()))
    chosen = _chosen(job.units, goal) if job.units else torch.zeros_like(pre, dtype=torch.bool)
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
        "distance_ratio": to_source / to_target,
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
            **dict(zip(columns, row, strict=True)),
        )
        for i, row in enumerate(rows)
    ]


def _unit(units: tuple[int, ...]) -> int | list[int]:
    return units[0] if len(units) == 1 else list(units)


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
        spec=job.spec,
        seed=job.spec.seed,
        device=torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})",
        precision="fp32" if job.spec.precision == "tf32" and not cuda else job.spec.precision,
    )


def _feature_distance(tap: Tap, references: Tensor) -> float:
    """Mean ||f(a) - f(b)|| over pairs of the reference images."""
    pre, _ = interpolate.observe(tap, references)
    features = tap.layer.clip(pre)
    return interpolate.mean_of_pairs(interpolate.pairwise_distance(features))
