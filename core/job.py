"""A job from its settings and two images to what the engine takes; the network that it is about."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core import certify, images, interpolate, models
from core.engine import CONVERGED, Engine, Group
from core.errors import InvalidSpec, UnknownName
from core.hull import Hull
from core.memory import Footprint
from core.models import Model
from core.objective import Losses, Target
from core.patches.composite import Patches
from core.patches.library import Library
from core.patches.neighbours import Neighbours
from core.patches.sets import PatchSet
from core.patches.windows import Windows
from core.polytope import LayerPolytope, affine_map
from core.program import is_affine, proves_cut, proves_mixing
from core.result import Seen
from core.spec import CollisionSpec, Relative, Threshold
from core.taps import (
    Tap,
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
    layer, on average; by `logit_distance` in their logits, at most. `cut` is what was tested on
    sample images, `cut_proved` what follows from the network's operations.
    """

    model: Model
    tap: Tap
    working_tap: Tap
    cut: bool
    cut_proved: bool
    mixes: bool
    natural: tuple[float, str]
    feature_distance: float
    logit_distance: float

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
        first, shape = tappable(network, tap.normalize(references[:1]))[0], model.input_shape
        cut, cut_proved = _cut(tap, references)
        feature_distance, logit_distance = _distances(tap, references)
        return cls(
            model=model,
            tap=tap,
            working_tap=working,
            cut=cut,
            cut_proved=cut_proved,
            mixes=mixes(tap, references[:3]) and proves_mixing(tap, first, shape),
            natural=interpolate.natural_distance(tuple(references.shape[1:])),
            feature_distance=feature_distance,
            logit_distance=logit_distance,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.classifier.parameters()).device

    @cached_property
    def footprint(self) -> Footprint:
        """What its jobs take."""
        image = reference_images(self.model)[:1].to(self.device)
        return Footprint(self.tap, self.working_tap, image)

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
    polytope: LayerPolytope | None = None
    patch_set_sha256: str | None = None
    supplier: str | None = None  # the image of the set that most windows have their patches of


@dataclass(frozen=True)
class LayerInfo:
    """A layer that a model can be opened at, in plain values.

    `names` are all that `open_tap` takes for it; `name`, the first, is how we call it. `kind` is
    the activation's: relu, relu6 or max_pool. `affine` is proved, `cut` is, or tested on images.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    units: int
    cut: bool
    cut_proved: bool
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
    cut, cut_proved = _cut(tap, references)
    return LayerInfo(
        name=name,
        names=tuple(dict.fromkeys([name, tap.layer.names[-1]])),
        kind=tap.layer.activation.kind,
        shape=tap.layer.shape,
        units=tap.layer.units,
        cut=cut,
        cut_proved=cut_proved,
        affine=is_affine(tap, references[:2]),
    )


def _cut(tap: Tap, references: Tensor) -> tuple[bool, bool]:
    """Whether the layer is a cut, and whether that is proved; else all of `references` try it."""
    proved = proves_cut(tap, tuple(references.shape[1:]))
    cut = is_cut(tap, references[:1], references[1:2] if proved else references[1:])
    return cut, cut and proved


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left."""
    # Of the CPU's allocator; of CUDA and its libraries, beside torch's own allocator.
    ways = ("allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    told = isinstance(error, RuntimeError) and any(way in str(error) for way in ways)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def is_accelerator_lost(error: BaseException | None) -> bool:
    """Whether the accelerator has failed, other than for want of memory: after most of its errors
    this process gets nothing but errors from it, whatever is asked.
    """
    signs = ("CUDA error", "CUDA driver error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "HIP error")
    while error is not None:
        told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
        if (told or isinstance(error, torch.AcceleratorError)) and not is_out_of_memory(error):
            return True
        error = error.__cause__
    return False


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
    subject: Subject,
    spec: CollisionSpec,
    source: images.Loaded,
    target: images.Loaded,
    key: str,
    library: Library | None = None,
    on_part: Callable[[], object] = lambda: None,
    promised: int | None = None,
) -> Job:
    """Checks the images and settings against the network and builds the engine's group.

    A job for the exact solver needs no engine, and passes through one at once. `library` has the
    sets that jobs of patches name; `on_part` is called as the search for patches goes on. Other
    jobs of this process may still take `promised` bytes; null without any.

    Raises:
        InvalidSpec: the images are the same, the target is not of the class that the spec names,
            the units do not fit the target, or the network gives numbers that are not finite.
        UnknownName: the spec names a class that the network does not have.
        TooLittleMemory, MemoryBusy: as `Footprint.check` does.
        NotAffine, TooLarge: the exact solver cannot take the layer.
        UnknownName, PatchSetBusy, PatchSetUnusable, TooFewPatches: of the patch set.
    """
    tap = subject.tap
    pair = torch.from_numpy(np.stack([source.pixels, target.pixels])).to(subject.device)
    # Patches of other images begin as none of both: they can collide with the source itself.
    if torch.equal(pair[0], pair[1]) and spec.parametrization != "patches":
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
    goal = Target(pre[1], tap.layer.activation)
    if not math.isfinite(goal.energy):
        raise InvalidSpec(
            f"The target's activations at layer {tap.layer.name!r} are so large that their squares "
            "overflow float32; give another layer, or scale the network's weights down."
        )
    if not goal.positive.any():
        raise InvalidSpec(
            f"The target activates no unit of layer {tap.layer.name!r} below saturation, so there "
            "is nothing to collide with; give another target or layer."
        )
    neighbours, windows = None, None
    if spec.parametrization == "patches":
        assert library
        neighbours = library.neighbours(spec.patches.set or "")
        size = neighbours.patches.geometry.size
        windows = Windows.of_job(spec, window=size, image=source.pixels.shape)
    subject.footprint.check(spec, windows, promised=promised)
    without = spec.objective == "plain" or spec.solver == "null_space"
    units = None if without else choose_units(tap, goal, pair[0], spec)
    if units is None:
        losses = Losses.of_plain(goal, spec.corners, alpha=spec.alpha)
    else:
        losses = Losses.of_corners(
            goal,
            chosen_mask(units, goal),
            alpha=spec.alpha,
            beta=_beta(spec, goal),
            negative=spec.negative,
        )
    patches, supplier = None, None
    if neighbours and windows:
        addresses = nearest_patches(neighbours, windows, spec, source, on_part)
        taken = np.bincount(addresses[:, 0])
        if 2 * taken.max() > len(addresses):
            supplier = neighbours.patches.manifest.images[int(taken.argmax())].name
        patches = compose(neighbours.patches, addresses, windows, subject.device)
    group = Group(
        key=key,
        spec=spec,
        source=pair[0],
        losses=losses,
        hull=_hull(subject, spec, goal, logits[1:]) if spec.objective == "hull" else None,
        l_pos_threshold=_absolute(spec.l_pos_threshold, goal),
        violation_threshold=_absolute(spec.violation_threshold, goal),
        patches=patches,
        gamma=_gamma(spec, goal, patches) if patches else 0.0,
    )
    polytope = None
    if spec.solver != "gradient":
        polytope = LayerPolytope.of(
            affine_map(tap, pair),
            tap.layer.activation,
            *pair,
            budget=spec.source_budget,
            null_space=spec.solver == "null_space",
        )
        group.score[:], group.reason[:] = 0.0, CONVERGED
    return Job(
        *(spec, source, target, goal, units, seen_source, seen_target, group, polytope),
        patch_set_sha256=neighbours.patches.sha256 if neighbours else None,
        supplier=supplier,
    )


def nearest_patches(
    neighbours: Neighbours,
    windows: Windows,
    spec: CollisionSpec,
    source: images.Loaded,
    on_part: Callable[[], object] = lambda: None,
) -> NDArray[np.int64]:
    """The address [W, 3] of the nearest patch of each window of the source.

    Unless the spec says so, none is the source's own, in whatever file the set has that picture.
    """
    n = neighbours.patches.geometry.size
    pixels = images.to_8bit(source.pixels).transpose(1, 2, 0)
    cut = np.stack([pixels[y : y + n, x : x + n] for y, x in windows.positions])
    own = () if spec.patches.source else neighbours.patches.like(source)
    found, _ = neighbours.nearest(cut, exclude=own, on_part=on_part)
    return found[:, 0]


def compose(
    patch_set: PatchSet, addresses: NDArray[np.int64], windows: Windows, device: torch.device
) -> Patches:
    """Over each window the patch at its address [W, 3], with surroundings."""
    sources = patch_set.read(addresses, windows.surround).transpose(0, 3, 1, 2)
    return Patches(torch.from_numpy(sources).to(device).float() / 255, windows)


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


def chosen_mask(units: list[tuple[int, ...]], goal: Target) -> Tensor:
    """The units of each corner as a mask [K, U]."""
    chosen = torch.zeros(len(units), len(goal.pre), dtype=torch.bool)
    for corner, own in enumerate(units):
        chosen[corner, list(own)] = True
    return chosen.to(goal.pre.device)


def _beta(spec: CollisionSpec, goal: Target) -> float:
    if not isinstance(spec.beta, Relative):
        return spec.beta
    typical = float(goal.pre[goal.positive].square().mean().sqrt())
    return spec.beta.relative * spec.alpha * typical


def _gamma(spec: CollisionSpec, goal: Target, patches: Patches) -> float:
    if not isinstance(spec.gamma, Relative):
        return spec.gamma
    at_start = float(patches.total_variation(patches.start(1)))
    return spec.gamma.relative * spec.alpha * goal.energy / at_start if at_start else 0.0


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


def _distances(tap: Tap, references: Tensor) -> tuple[float, float]:
    """||f(a) - f(b)||, the mean over pairs of the images, and that of logits, the greatest."""
    pre, logits = interpolate.observe(tap, references)
    features = interpolate.pairwise_distance(tap.layer.activation(pre))
    return interpolate.mean_of_pairs(features), float(interpolate.pairwise_distance(logits).max())
