"""The paper's experiments on photographs: corners by pixels and by patches, VGG-16 at FC-6.

They run on any other network as well. Numbers of tables and figures follow our reading of the
paper; the title of each tells what it runs.
"""

import hashlib
import json as jsonlib
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.progress import Progress

from core import complaints, figures, images, job
from core.errors import InvalidImage, InvalidSpec, ModelUnavailable
from core.figures import Strip
from core.outcome import run_alone
from core.patches import sets
from core.regions import SIGMA, find_regions
from core.result import Result
from core.spec import CollisionSpec
from polycollide import local, results
from polycollide.listing import aside, console, listing, show_json
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
from polycollide.settings import merge

FC6 = "vgg16", "classifier.0"
PAPERS = {"pixels": "paper-vgg16-pixels", "patches": "paper-vgg16-patches-text"}
OURS = {"pixels": "hull", "patches": "patches"}
PAIRS = 4  # the paper's Table 4 has as many
SEED = 0  # of the order in which images are drawn
COLUMNS = 5  # a table has a column for each of so many pairs, of more only their means
MIXTURES = 6


@dataclass(frozen=True)
class Asked:
    """What the user says: pairs, or a folder and how many to draw; settings; where results go."""

    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    folder: Path | None = None
    count: int | None = None
    named: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    out: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Pair:
    """A source and a target, as `images.read` takes them, and what to call the two."""

    source: str
    target: str
    name: str


@dataclass(frozen=True)
class Found:
    """The result of one pair, its images as the network takes them, and where its files are."""

    pair: Pair
    source: images.Loaded
    target: images.Loaded
    result: Result
    folder: Path | None

    def array(self, file: str, name: str) -> NDArray[Any]:
        """An array of one of its files."""
        assert self.folder
        with np.load(self.folder / file) as arrays:
            array: NDArray[Any] = arrays[name]
            return array


@dataclass(frozen=True)
class Experiment:
    """What a table or figure of the paper shows.

    `title` has a place for the parametrization, which picks the preset; `settings` go over that.
    `rows` are the table's for a parametrization. `pictures` by the names of their files: the rows
    that a pair has in each, and what to read below. `needs` is a setting without which there is
    nothing to show. With `own_class` the target is of the source's own class.
    """

    title: str
    parametrization: str
    rows: Callable[[str], list[Row]]
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, tuple[Callable[[Found], list[Strip]], str]] = field(default_factory=dict)
    needs: str | None = None
    own_class: bool = False


def reproduce(name: str, asked: Asked, device: torch.device) -> None:
    """Runs an experiment on every pair, prints its table and draws its pictures.

    A pair whose result is in `asked.out` already, by the same settings, is not run again.
    """
    experiment = EXPERIMENTS[name]
    over = _over(asked)
    spec = _spec(name, experiment, over)
    if experiment.pictures and not asked.out:
        raise InvalidSpec(f"{name} is a picture; say where it goes with --out DIR.")
    patch_set = sets.open_set(spec.patches.set or "") if spec.parametrization == "patches" else None
    sha256 = patch_set.sha256 if patch_set else None
    subject = _open(spec, device, chosen="model" in over)
    pairs = _pairs(subject, experiment, asked)
    found = []
    try:
        for i, pair in enumerate(pairs, 1):
            now = f"{i} of {len(pairs)}: {pair.source} to {pair.target}"
            aside.print(now, highlight=False, soft_wrap=True)
            found.append(_collide(subject, spec, pair, asked.out, sha256))
    except KeyboardInterrupt:
        left = "; the same command goes on with the pairs that are left" if asked.out else ""
        aside.print(f"Stopped{left}.")
        raise typer.Exit(128 + signal.SIGINT) from None
    title = _title(name, experiment, spec, asked)
    if asked.json:
        results = {f.pair.name: f.result.model_dump(mode="json") for f in found}
        show_json(jsonlib.dumps(results, indent=2))
    else:
        _show(title, experiment.rows(spec.parametrization), found)
    for file, (strips, told) in experiment.pictures.items():
        assert asked.out
        rows = [strip for one in found for strip in strips(one)]
        (asked.out / file).write_bytes(figures.draw_strips(rows, [f"{title}.", told]))
        aside.print(asked.out / file, highlight=False, soft_wrap=True)


def _over(asked: Asked) -> dict[str, Any]:
    """What the user sets."""
    try:
        return merge(asked.named, asked.settings)
    except ValueError as error:
        raise InvalidSpec(str(error)) from error


def _spec(name: str, experiment: Experiment, over: dict[str, Any]) -> CollisionSpec:
    """The preset, the paper's at FC-6 and elsewhere ours, and what is set over it."""
    where = {"model": FC6[0]} | over
    if where["model"] == FC6[0]:
        where = {"layer": FC6[1]} | where
    elif "layer" not in where:
        raise InvalidSpec(
            f"Name a layer, too: --layer LAYER, from `polycollide layers --model {where['model']}`."
        )
    presets = PAPERS if (where["model"], where["layer"]) == FC6 else OURS
    preset = {"preset": presets[experiment.parametrization]}
    try:
        spec = CollisionSpec.model_validate(preset | experiment.settings | where)
    except ValidationError as error:
        told = complaints.sentence(error, CollisionSpec)
        if told.startswith("Patches come from"):  # none is named
            told = (
                "Corners by patches need a patch set: `polycollide patches build FOLDER --name "
                "NAME`, then --set patches.set=NAME."
            )
        raise InvalidSpec(told) from error
    if experiment.needs and not attrgetter(experiment.needs)(spec):
        raise InvalidSpec(f"{name} needs {experiment.needs}; set it to 1 or more.")
    if experiment.needs == "snapshots" and spec.solver != "gradient":
        raise InvalidSpec(
            f"{name} shows corners step by step, and solver {spec.solver} takes no steps; leave "
            "it out."
        )
    return spec


def _open(spec: CollisionSpec, device: torch.device, *, chosen: bool) -> job.Subject:
    """The network; where it is not here and the user has not `chosen` it, with another way out."""
    try:
        return job.Subject.open(spec, device)
    except ModelUnavailable as error:
        if chosen:
            raise
        raise ModelUnavailable(
            f"{str(error).rstrip('.')}; or take another network, with --model NAME --layer LAYER "
            "(`polycollide models` and `polycollide layers` list them)."
        ) from error


def _pairs(subject: job.Subject, experiment: Experiment, asked: Asked) -> list[Pair]:
    """Those given, or else drawn; raises InvalidSpec where they do not fit the experiment."""
    if not (asked.sources or asked.targets):
        return _named(_drawn(subject, experiment, asked))
    if asked.folder or asked.count:
        raise InvalidSpec(
            "Give pairs by --source and --target, or have them drawn by --images and --pairs."
        )
    if len(asked.sources) != len(asked.targets):
        raise InvalidSpec("Give as many --target as --source; each two are a pair.")
    given, classes = list(zip(asked.sources, asked.targets, strict=True)), subject.model.classes
    for one in [*asked.sources, *asked.targets]:  # before the first of them takes an hour
        images.load(*images.read(one), subject.model.preprocessing)
    for source, target in given if experiment.own_class else []:
        first, last = (classes[_label(subject, one)] for one in (source, target))
        if first != last:
            raise InvalidSpec(
                f"This figure takes a target of the source's own class, but {subject.model.name} "
                f"takes {source} for {first!r} and {target} for {last!r}; give other pairs."
            )
    return _named(given)


def _drawn(subject: job.Subject, experiment: Experiment, asked: Asked) -> list[tuple[str, str]]:
    """Images of different classes, both ways round; or by `own_class` each image with itself.

    Images come in a shuffled order and are classified once, as far as it takes. More pairs begin
    with the same ones.
    """
    references, wanted = _references(asked.folder, asked.out), asked.count or PAIRS
    shuffled = [references[i] for i in np.random.default_rng(SEED).permutation(len(references))]
    labels, pairs = dict[str, int](), list[tuple[str, str]]()
    with Progress(console=aside, transient=True, disable=not aside.is_terminal) as bar:
        for new in bar.track(shuffled, description="drawing pairs"):
            try:
                label = _label(subject, new)
            except InvalidImage:
                continue
            others = [one for one, its in labels.items() if its != label]
            both = [pair for one in others for pair in ((one, new), (new, one))]
            pairs += [(new, new)] if experiment.own_class else both
            labels[new] = label
            if len(pairs) >= wanted:
                return pairs[:wanted]
    if not labels:
        raise InvalidSpec(
            f"There is no image below {str(asked.folder)!r}; give --images a folder with some."
        )
    if not pairs:
        raise InvalidSpec(
            "No two of these images are of different classes to the network; give others by "
            "--source and --target, or by --images."
        )
    aside.print(f"These images make {len(pairs)} pairs, not {wanted}.", highlight=False)
    return pairs


def _references(folder: Path | None, out: Path | None) -> list[str]:
    """Every file below `folder`, but for what lies in `out`; or else the packaged photographs."""
    if folder is None:
        return [f"sample:{name}" for name in images.sample_names() if name.startswith("photos/")]
    if not folder.is_dir():
        raise InvalidSpec(f"There is no folder {str(folder)!r}; give --images one with images.")
    within, results = folder.resolve(), out.resolve() if out else None
    if results == within:
        raise InvalidSpec("--out is the folder of --images; name another one, or one inside it.")
    if results and within not in results.parents:
        results = None
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if results not in file.resolve().parents)


def _label(subject: job.Subject, reference: str) -> int:
    """What the network takes an image for. Raises InvalidImage for what is none."""
    image = images.load(*images.read(reference), subject.model.preprocessing)
    with torch.no_grad():
        logits = subject.tap.logits(torch.from_numpy(image.pixels)[None].to(subject.device))
    return int(logits.argmax())


def _named(pairs: Iterable[tuple[str, str]]) -> list[Pair]:
    named: dict[str, Pair] = {}
    for source, target in pairs:
        plain = "-".join(PurePath(one).stem for one in (source, target))
        name, again = plain, 1
        while name in named:
            again += 1
            name = f"{plain}-{again}"
        named[name] = Pair(source, target, name)
    return list(named.values())


def _collide(
    subject: job.Subject,
    spec: CollisionSpec,
    pair: Pair,
    out: Path | None,
    patch_set_sha256: str | None,
) -> Found:
    source, target = (
        images.load(*images.read(one), subject.model.preprocessing)
        for one in (pair.source, pair.target)
    )
    folder = out / _settings_folder(spec) / pair.name if out else None
    if folder and (kept := _kept(folder)):
        is_of, wanted = kept.provenance, (subject.model.weights_sha256, patch_set_sha256)
        same = (is_of.source_sha256, is_of.target_sha256) == (source.sha256, target.sha256)
        same &= (is_of.weights_sha256, is_of.patch_set_sha256) == wanted
        if same and is_of.spec == spec:
            return Found(pair, source, target, kept, folder)
    if folder:  # before the work, not after it
        results.prepare(folder)
    with local.progress_bar(spec) as on_progress:
        done, outcome = run_alone(subject, spec, source, target, on_progress)
    if folder:
        local.write(folder, done, outcome)
    return Found(pair, source, target, outcome.result, folder)


def _settings_folder(spec: CollisionSpec) -> str:
    """Other settings have another folder, so that no result takes another's place."""
    sha256 = hashlib.sha256(spec.model_dump_json(exclude_defaults=True).encode()).hexdigest()
    return f"{spec.parametrization}-{spec.corners}-{sha256[:8]}"


def _kept(folder: Path) -> Result | None:
    """The result that `local.write` has put there, result.json last."""
    try:
        return Result.model_validate_json((folder / "result.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _title(name: str, experiment: Experiment, spec: CollisionSpec, asked: Asked) -> str:
    kind, number = ("Table", name[5:]) if name.startswith("table") else ("Figure", name[3:])
    whose = "the paper's" if str(spec.preset).startswith("paper-vgg16") else "our"
    preset = f" (preset {spec.preset})" if spec.preset else ""
    title = f"{kind} {number}: {experiment.title.format(f'by {spec.parametrization}')}, on "
    title += f"{spec.model} at {spec.layer}, with {whose} settings{preset}"
    changes = [f"weights={asked.named['weights']}"] if "weights" in asked.named else []
    if changes := changes + [one for one in asked.settings if not one.startswith("patches.set=")]:
        title += f" but {', '.join(changes)}"
    return title if (spec.model, spec.layer) == FC6 else f"{title}: not the paper's VGG-16 at FC-6"


def _show(title: str, rows: list[Row], found: list[Found]) -> None:
    results = [one.result for one in found]
    columns = [results] if len(found) > 1 else []
    each = [[result] for result in results] if len(found) <= COLUMNS else []
    names = [*map(str, range(1, len(each) + 1)), *[f"all {len(found)}"] * len(columns)]
    console.print(title, highlight=False, soft_wrap=True)
    table = listing("", "paper", *names)
    for row in rows:
        table.add_row(row.name, row.paper, *map(row.ours, [*each, *columns]))
    console.print(table)
    notes = [NOTE]
    for number, one in enumerate(found if each else [], 1):
        seen = one.result.source.class_, one.result.target.class_
        names = [PurePath(reference).stem for reference in (one.pair.source, one.pair.target)]
        first, last = (f"{name} ({class_})" for name, class_ in zip(names, seen, strict=True))
        notes.append(f"{number}: {first} to {last}.")
    missing = results[0].polytope.perceptual_missing
    if missing and LPIPS in rows:
        notes.append(missing)
    console.print("\n".join(notes), highlight=False, soft_wrap=True)


NOTE = """\
Distances are Euclidean on 0-255 pixels, the paper's unit; results have them on [0, 1]. Of all
pairs: means and their standard deviation, 95 % Clopper-Pearson intervals over all samples."""


# Rows


def _in_0_255(of: Callable[[Result], float | None]) -> Ours:
    return mean(lambda result: None if (value := of(result)) is None else 255 * value, 0)


ENDS = [Row("pairs converged", "", converged), Row("steps", "", mean(lambda r: r.steps, 0))]
INSIDE = [
    Row("colliding", "", FLOATS[0]),
    Row("  interval", "", FLOATS[1]),
    Row("  in 8 bits", "", EIGHT_BITS[0]),
    Row("  interval", "", EIGHT_BITS[1]),
    Row("probability", "", mean(interpolated("mean_probability"), 3)),
    Row("  in 8 bits", "", mean(interpolated("mean_probability_8bit"), 3)),
    Row("  of the target", "", mean(lambda r: r.target.probability, 3)),
    Row("residual", "", mean(interpolated("relative_residual"), 3)),
]
LPIPS = Row("LPIPS", "", mean(lambda r: r.polytope.mean_perceptual))


def _apart(parametrization: str) -> list[Row]:
    """Distances and interpolations. The paper's are of corners by pixels."""
    by_pixels = parametrization == "pixels"
    apart = _in_0_255(lambda r: r.polytope.mean_pairwise_distance)
    return [
        *ENDS,
        Row("distance apart", "4907 to 9588" * by_pixels, apart),
        Row("  natural images", "37538", _in_0_255(lambda r: r.polytope.natural_distance)),
        Row("to source", "", _in_0_255(of_corners("distance_to_source"))),
        Row("to target", "", _in_0_255(of_corners("distance_to_target"))),
        Row("spread", "0.13 to 0.26" * by_pixels, mean(lambda r: r.polytope.spread, 3)),
        Row("SSIM", "", mean(lambda r: r.polytope.mean_ssim)),
        Row("low-pass share", "", mean(lambda r: r.polytope.mean_low_pass_share)),
        LPIPS,
        *INSIDE,
    ]


def _ball(parametrization: str) -> list[Row]:
    """The ball of Appendix B. The paper's is around corners by pixels."""
    by_pixels = parametrization == "pixels"
    radius = _in_0_255(lambda r: r.ball.radius if r.ball else None)
    return [
        *ENDS,
        Row("radius of the ball", "", radius),
        Row("colliding in it", "0.0 to 24.8 %" * by_pixels, BALL[0]),
        Row("  interval", "", BALL[1]),
        Row("in the polytope", "100 %" * by_pixels, FLOATS[0]),
        Row("  interval", "", FLOATS[1]),
    ]


# Pictures


def _corners(found: Found, *, boxed: bool = False) -> list[Strip]:
    corners = found.array("corners.npz", "corners")
    boxes = find_regions(corners) if boxed else []
    pixels = found.source.pixels, found.target.pixels
    return [figures.corner_strip(*pixels, corners, found.result, boxes)]


def _boxed(found: Found) -> list[Strip]:
    return _corners(found, boxed=True)


def _mixtures(found: Found) -> list[Strip]:
    corners = found.array("corners.npz", "corners")
    weights, probability = (
        found.array("samples.npz", name)[:MIXTURES] for name in ("weights", "probability")
    )
    mixtures = np.tensordot(weights, corners, 1)
    pixels = found.source.pixels, found.target.pixels
    return [figures.mixture_strip(*pixels, mixtures, probability, found.result)]


def _snapshots(found: Found) -> list[Strip]:
    corners = found.array("corners.npz", "corners")
    pixels = found.source.pixels, found.target.pixels
    if "snapshots.npz" in found.result.missing:  # the corners were there in a few steps
        return figures.snapshot_strips(*pixels, corners[:0, None], [], corners, found.result)
    taken, steps = (found.array("snapshots.npz", name) for name in ("images", "steps"))
    return figures.snapshot_strips(*pixels, taken, steps.tolist(), corners, found.result)


TOLD = (
    "Below: what the network takes an image for, and the probability of the target's class. "
    "Corners with * did not converge."
)
CORNERS = (_corners, TOLD)
BOXES = (
    _boxed,
    f"{TOLD} Boxes: where a pair's corners differ most after a Gaussian of {SIGMA:g} pixels.",
)
BETWEEN = (
    _mixtures,
    "Below: the probability of the target's class. Weights of the corners are random: the first of "
    "the interpolations that are measured.",
)
WAY = (_snapshots, "The corners on their way, a row for each.")

EXPERIMENTS = {
    "table2": Experiment("distances between corners {}", "pixels", _apart),
    "table3": Experiment("distances between corners {}", "patches", _apart),
    "table4": Experiment("the ball around corners {}", "pixels", _ball, needs="ball_samples"),
    "table5": Experiment("the ball around corners {}", "patches", _ball, needs="ball_samples"),
    "fig3": Experiment("corners {}", "pixels", _apart, pictures={"fig3.png": CORNERS}),
    "fig7": Experiment("corners {}", "patches", _apart, pictures={"fig7.png": CORNERS}),
    "fig8": Experiment(
        "corners {}, target of the source's own class",
        "patches",
        _apart,
        pictures={"fig8.png": CORNERS, "fig8b.png": BOXES},
        own_class=True,
    ),
    "fig9": Experiment(
        "interpolations between corners {}",
        "pixels",
        _apart,
        pictures={"fig9.png": BETWEEN},
        needs="interpolation.samples",
    ),
    "fig10": Experiment(
        "interpolations between corners {}",
        "patches",
        _apart,
        pictures={"fig10.png": BETWEEN},
        needs="interpolation.samples",
    ),
    "fig11": Experiment(
        "ten corners {}",
        "pixels",
        _apart,
        settings={"corners": 10},
        pictures={"fig11.png": CORNERS},
    ),
    "fig12": Experiment(
        "the way to corners {}",
        "pixels",
        _apart,
        pictures={"fig12.png": WAY},
        needs="snapshots",
    ),
}
