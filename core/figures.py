"""The pictures of a result, as PNG files. Torch-free, and safe in any thread.

Two things that threads would share are left alone: pyplot, and matplotlib's parser of mathtext (so
a class may be called "$5 bill", too). Images are drawn as their 8-bit files show them.
"""

import io
import textwrap
from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from core.images import to_8bit
from core.regions import LEAST_SIDE, SIGMA, Region, find_regions
from core.result import CornerResult, Result, claims

if TYPE_CHECKING:
    from core.engine import Group

Pixels = NDArray[np.floating[Any]]
Numbers = NDArray[np.floating[Any]]

DPI = 72  # a point is a pixel, so every length below is in pixels
FONT, LINE, LETTER = 13, 18, 7.2  # size, height of a line, width of an average letter
MIN_WIDTH, MAX_WIDTH = 1000, 1600
MIN_PITCH, MAX_PITCH = 140, 280
MAX_HEIGHT = 1440  # of the images alone, where the least pitch allows it
MARGIN, APART, GAP = 20, 36, 14
CURVES_SIZE = 1400, 500
HULL_SIZE = 900, 780
CORNERS_SHOWN, CORNER_COLUMNS = 32, 6
SNAPSHOT_ROWS, SNAPSHOT_COLUMNS = 8, 7
STRIPS, STRIP_IMAGES = 20, 10
LETTERS = 24  # in a line of a corner's cell, at 8 cells across
COLOURS = matplotlib.color_sequences["petroff10"]
SOURCE_COLOUR, TARGET_COLOUR = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
RULE_COLOUR = "#CCCCCC"
REGION_COLOURS = "#FFD60A", "#FF2D95", "#00E5FF", "#5CFF3B"  # rare in photographs


@dataclass(frozen=True)
class _Cell:
    """An image [C, H, W], if any, and the lines around it; the first above is the heading.

    `boxes` are regions of the image, drawn in REGION_COLOURS.
    """

    image: Pixels | None
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    colour: str = RULE_COLOUR
    boxes: Sequence[Region] = ()


@dataclass(frozen=True)
class Strip:
    """A row of `draw_strips`: N `images` [C, H, W] between the source and target of a `result`.

    None leaves a gap. `above` are N headings, `below` the lines under each. `boxes` are regions of
    every image.
    """

    source: Pixels
    target: Pixels
    result: Result
    images: Sequence[Pixels | None]
    above: Sequence[str]
    below: Sequence[tuple[str, ...]]
    boxes: Sequence[Region] = ()


@dataclass(frozen=True)
class Course:
    """How K rows of a job went, without torch, so that another process can draw it.

    `curves` [N, K, 2] are L_pos and violation at `curve_steps`, `thresholds` what they had to
    pass; `snapshots` [M, K, C, H, W] the images that the result keeps, at `snapshot_steps`;
    `steps` [K] the last of each row.
    """

    steps: NDArray[np.int64]
    thresholds: tuple[float, float]
    curve_steps: Sequence[int]
    curves: NDArray[np.floating[Any]]
    snapshot_steps: Sequence[int]
    snapshots: Pixels

    @classmethod
    def of(cls, group: "Group") -> "Course":
        """What the engine has noted of a job."""
        way = group.on_the_way
        curves, snapshots = (
            np.reshape([value.numpy() for value in values], (-1, len(group.steps), *rest))
            for values, rest in (
                (group.curves.values, (2,)),
                ([group.snapshots.values[i] for i in way], group.source.shape),
            )
        )
        return cls(
            steps=group.steps,
            thresholds=(group.l_pos_threshold, group.violation_threshold),
            curve_steps=group.curves.steps,
            curves=curves,
            snapshot_steps=[group.snapshots.steps[i] for i in way],
            snapshots=snapshots,
        )


def draw(
    source: Pixels,
    target: Pixels,
    corners: Pixels,
    result: Result,
    course: Course,
    sampled: tuple[Numbers, Numbers] | None,
) -> dict[str, bytes]:
    """All pictures of a result, by the names of their files.

    `sampled` are the weights [N, K] of points of the polytope, and their probabilities [N].
    """
    pictures = {"figure.png": draw_result(source, target, corners, result)}
    if course.curve_steps:
        pictures["curves.png"] = draw_curves(course, result)
    if sampled and len(corners) > 1:
        pictures["hull.png"] = draw_hull(*sampled, result)
    if min(corners.shape[2:]) >= LEAST_SIDE and (regions := find_regions(corners)):
        pictures["regions.png"] = draw_regions(source, target, corners, regions)
    if course.snapshot_steps:
        pictures["snapshots.png"] = draw_snapshots(source, target, course, corners)
    return pictures


def draw_result(source: Pixels, target: Pixels, corners: Pixels, result: Result) -> bytes:
    """The paper's Figure 2: source, corners and target, and what the network takes them for.

    `source` and `target` are [C, H, W], `corners` [K, C, H, W]: what `result` tells of.
    """
    pairs = zip(corners[:CORNERS_SHOWN], result.corners, strict=False)
    shown = [_corner_cell(image, corner, result) for image, corner in pairs]
    rows = -(-len(shown) // CORNER_COLUMNS)
    columns = -(-len(shown) // rows)
    first, last = (
        _cut(name, seen.class_, _percent(seen.probability))
        for name, seen in (("source", result.source), ("target", result.target))
    )
    apart = f"{np.linalg.norm(source - target):.2f}"
    return _sheet(
        [shown[i : i + columns] for i in range(0, len(shown), columns)],
        [*_findings(result), _shown(shown, corners)],
        ends=(
            _Cell(source, first, below=(f"ΔT {apart}",), colour=SOURCE_COLOUR),
            _Cell(target, last, below=(f"ΔS {apart}",), colour=TARGET_COLOUR),
        ),
    )


def draw_snapshots(source: Pixels, target: Pixels, course: Course, corners: Pixels) -> bytes:
    """Appendix C: the way from `source` to each of `corners` [K, C, H, W], one in each row.

    A row has a gap from where its corner stood still: it would show the final image again.
    """
    columns = _columns(course.snapshot_steps)
    rows = [
        [
            _Cell(
                course.snapshots[i, k] if course.snapshot_steps[i] < course.steps[k] else None,
                () if k else (f"step {course.snapshot_steps[i]:,}",),
            )
            for i in columns
        ]
        + [_Cell(corner, () if k else ("final",), below=(f"step {course.steps[k]:,}",))]
        for k, corner in enumerate(corners[:SNAPSHOT_ROWS])
    ]
    fewer = ""
    if len(columns) < len(course.snapshot_steps):
        fewer = f"Shown: {len(columns)} of {len(course.snapshot_steps)} snapshots."
    return _sheet(
        rows,
        [_shown(rows, corners), fewer],
        ends=(
            _Cell(source, ("source",), colour=SOURCE_COLOUR),
            _Cell(target, ("target",), colour=TARGET_COLOUR),
        ),
        names=[f"corner {k}" for k in range(len(rows))],
    )


def _columns(steps: Sequence[int]) -> list[int]:
    """Which of the snapshots at `steps` a picture has room for, evenly spaced."""
    most = min(len(steps), SNAPSHOT_COLUMNS)
    spaced: list[int] = np.linspace(0, len(steps) - 1, most).round().astype(int).tolist()
    return spaced


def draw_regions(
    source: Pixels, target: Pixels, corners: Pixels, regions: Sequence[Region]
) -> bytes:
    """The paper's Figure 8(b): boxes around `regions` of `corners` [K, C, H, W], each in a colour
    of its own, and below what is in them.
    """
    shown = corners[:CORNER_COLUMNS]
    rows = [[_Cell(corner, (f"corner {k}",), boxes=regions) for k, corner in enumerate(shown)]]
    for region, colour in zip(regions, REGION_COLOURS, strict=False):
        rows.append([_Cell(region.of(corner), colour=colour) for corner in shown])
    shares = ", ".join(_percent(region.share) for region in regions)
    of_pixels = _percent(regions[0].height * regions[0].width / corners[0, 0].size)
    return _sheet(
        rows,
        [
            f"Boxes: where the {len(corners)} corners differ most after a Gaussian of {SIGMA:g} "
            f"pixels, enlarged below. They hold {shares} of what variance it leaves between "
            f"corners, each on {of_pixels} of the pixels.",
            _shown(shown, corners),
        ],
        ends=(
            _Cell(source, ("source",), colour=SOURCE_COLOUR, boxes=regions),
            _Cell(target, ("target",), colour=TARGET_COLOUR, boxes=regions),
        ),
        names=["corners", *(f"region {i}" for i in range(len(regions)))],
    )


def draw_strips(strips: Sequence[Strip], caption: Sequence[str]) -> bytes:
    """Several results in one picture, each with its source and its target in one row."""
    most = max(len(strip.images) for strip in strips)
    letters = min(LETTERS, 8 * LETTERS // (min(most, STRIP_IMAGES) + 2))
    grid: list[list[_Cell]] = []
    for i, strip in enumerate(strips[:STRIPS]):
        ends = [
            _Cell(
                image,
                (name,),
                _cut(seen.class_, _percent(seen.probability), letters=letters),
                colour,
                strip.boxes,
            )
            for name, image, seen, colour in (
                ("source", strip.source, strip.result.source, SOURCE_COLOUR),
                ("target", strip.target, strip.result.target, TARGET_COLOUR),
            )
        ]
        named = list(zip(strip.images, strip.above, strip.below, strict=True))[:STRIP_IMAGES]
        cells = [
            _Cell(image, (name,), _cut(*lines, letters=letters), boxes=strip.boxes)
            for image, name, lines in named
        ]
        row = [ends[0], *cells, ends[1]]
        repeated = i and strip.above == strips[i - 1].above
        grid.append([replace(cell, above=()) for cell in row] if repeated else row)
    cut = []
    if len(strips) > STRIPS:
        cut.append(f"{STRIPS} of {len(strips)} rows")
    if most > STRIP_IMAGES:
        cut.append(f"{STRIP_IMAGES} of {most} images in a row")
    return _sheet(grid, [*caption, f"Shown: {', '.join(cut)}." if cut else ""])


def corner_strip(
    source: Pixels,
    target: Pixels,
    corners: Pixels,
    result: Result,
    boxes: Sequence[Region] = (),
) -> Strip:
    """`corners` [K, C, H, W], what each is taken for, and the probability of the target's class."""
    names = [f"corner {c.index}" + ("" if c.converged else "*") for c in result.corners]
    below = [(c.class_, f"target {_percent(c.probability)}") for c in result.corners]
    return Strip(source, target, result, list(corners), names, below, boxes)


def mixture_strip(
    source: Pixels, target: Pixels, mixtures: Pixels, probability: Numbers, result: Result
) -> Strip:
    """Points of the polytope [N, C, H, W], and of each the `probability` [N] of the target."""
    names = [f"mixture {i}" for i in range(len(mixtures))]
    below = [(f"target {_percent(share)}",) for share in probability]
    return Strip(source, target, result, list(mixtures), names, below)


def snapshot_strips(
    source: Pixels,
    target: Pixels,
    snapshots: Pixels,
    steps: Sequence[int],
    corners: Pixels,
    result: Result,
) -> list[Strip]:
    """Appendix C, a row a corner: `snapshots` [M, K, C, H, W] at `steps`, and `corners`; with gaps
    as `draw_snapshots` has them.
    """
    spaced = _columns(steps)
    names = [*(f"step {steps[i]:,}" for i in spaced), "final"]
    strips = []
    for corner, image in zip(result.corners, corners, strict=True):
        way = [snapshots[i, corner.index] if steps[i] < corner.steps else None for i in spaced]
        below = [*[()] * len(spaced), (f"corner {corner.index}", f"step {corner.steps:,}")]
        strips.append(Strip(source, target, result, [*way, image], names, below))
    return strips


def draw_curves(course: Course, result: Result) -> bytes:
    """L_pos and violation of each corner against steps, with the thresholds they had to pass."""
    kept = np.array([(corner.l_pos, corner.violation) for corner in result.corners])  # [K, 2]
    kept_steps = [corner.steps for corner in result.corners]
    names = [f"corner {corner.index}" for corner in result.corners]
    few = len(names) <= len(COLOURS)
    colours = COLOURS[: len(names)] if few else [SOURCE_COLOUR] * len(names)
    width, alpha = (1.5, 1.0) if few else (0.8, 0.4)

    figure = Figure((CURVES_SIZE[0] / DPI, CURVES_SIZE[1] / DPI))
    figure.set_layout_engine("constrained", w_pad=MARGIN / 2 / DPI, h_pad=MARGIN / 2 / DPI)
    curves = course.curves
    panels = zip(figure.subplots(1, 2), ("L_pos", "violation"), course.thresholds, strict=True)
    for i, (axes, name, threshold) in enumerate(panels):
        axes.set_prop_cycle(color=colours)
        lines = axes.plot(course.curve_steps, curves[..., i], linewidth=width, alpha=alpha)
        axes.scatter(kept_steps, kept[:, i], c=colours, alpha=alpha, zorder=3, clip_on=False)
        tested = "not tested"
        if np.isfinite(threshold):
            tested = f"dashed: threshold {threshold:.4g}"
            axes.axhline(threshold, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{name} ({tested})", loc="left", fontsize=FONT)
        axes.set_xlabel("step (dots: the states that were kept)", fontsize=FONT)
        axes.set_xlim(0, 1.02 * max(10, *course.curve_steps, *kept_steps))
        _scale(axes, np.hstack([curves[..., i].ravel(), kept[:, i], threshold]))
    if few:
        place: Any = {"loc": "outside lower center", "ncols": len(names)}
        figure.legend(lines, names, frameon=False, fontsize=FONT, **place)
    return _png(figure)


def draw_hull(weights: Numbers, probability: Numbers, result: Result) -> bytes:
    """The polytope in the plane, its K corners on a circle: each point lies where its weights [K]
    put it, coloured by the probability [N] of the target's class; the worst point, and the proof.
    """
    angles = np.pi / 2 - 2 * np.pi * np.arange(weights.shape[1]) / weights.shape[1]
    places = np.stack([np.cos(angles), np.sin(angles)], 1)  # [K, 2]
    figure = Figure((HULL_SIZE[0] / DPI, HULL_SIZE[1] / DPI))
    axes = figure.add_axes((0.06, 0.17, 0.74, 0.81), xlim=(-1.25, 1.25), ylim=(-1.1, 1.25))
    axes.set_aspect("equal")
    axes.axis("off")
    axes.fill(*places.T, facecolor="none", edgecolor=RULE_COLOUR, linewidth=2)
    order = np.argsort(-probability, kind="stable")  # the least of all on top
    x, y = (weights[order] @ places).T
    shown = axes.scatter(x, y, c=probability[order], s=14, cmap="viridis", vmin=0, vmax=1)
    for k, place in enumerate(places[:CORNERS_SHOWN]):
        axes.annotate(f"corner {k}", place, 1.14 * place, ha="center", va="center", fontsize=FONT)
    if worst := result.worst:
        x, y = np.array(worst.weights) @ places
        axes.scatter(x, y, marker="*", s=320, color=TARGET_COLOUR, edgecolor="white", zorder=4)
        axes.annotate("worst", (x, y), (0, 12), textcoords="offset points", fontsize=FONT)
    bar = figure.colorbar(shown, cax=figure.add_axes((0.85, 0.22, 0.025, 0.7)))
    bar.set_label("probability of the target's class", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    letters = int((HULL_SIZE[0] - 2 * MARGIN) / LETTER)
    lines = [line for text in _claims(result) for line in textwrap.wrap(text, letters)]
    for i, line in enumerate(lines):
        y = 0.16 - LINE * (i + 1) / HULL_SIZE[1]
        figure.text(MARGIN / HULL_SIZE[0], y, line, parse_math=False, fontsize=FONT)
    return _png(figure)


def _claims(result: Result) -> list[str]:
    """What a result says of all points between its corners."""
    lines = [f"{name}: {text}." for name, text in claims(result)]
    if inside := result.interpolation:
        share = _with_interval(inside.accuracy, inside.accuracy_interval)
        lines.insert(0, f"Sampled: {share} of {inside.samples:,} points have the target's class.")
    return lines


def _scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """A logarithmic axis of whole decades around `values`, with a place for 0 if one of them is."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = np.log10([positive.min(), positive.max()]) if positive.size else (0.0, 0.0)
    bottom, top = 10.0 ** np.floor(low), 10.0 ** max(np.ceil(high), np.floor(low) + 1)
    if (values == 0).any():
        axes.set_yscale("symlog", linthresh=bottom, linscale=0.5)
        bottom = -0.2 * bottom
    else:
        axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=8, integer=True, steps=[1, 2, 5, 10])
    axes.minorticks_off()
    axes.tick_params(labelsize=FONT, color=RULE_COLOUR)
    axes.grid(color=RULE_COLOUR, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE_COLOUR)


def _corner_cell(image: Pixels, corner: CornerResult, result: Result) -> _Cell:
    whose = "" if corner.label == result.target.label else "target "
    below = [f"ΔS {corner.distance_to_source:.2f}, ΔT {corner.distance_to_target:.2f}"]
    if corner.label_8bit != corner.label:
        known = {seen.label: seen.class_ for seen in (result.source, result.target)}
        below.append(f"as PNG: {known.get(corner.label_8bit, f'class {corner.label_8bit}')}")
    name = f"corner {corner.index}" + ("" if corner.converged else "*")
    above = _cut(name, corner.class_, whose + _percent(corner.probability))
    return _Cell(image, above, _cut(*below))


def _findings(result: Result) -> list[str]:
    """What the caption of `draw_result` says of corners and polytope, line by line."""
    spec, polytope, inside = result.provenance.spec, result.polytope, result.interpolation
    failed = Counter(corner.reason for corner in result.corners if not corner.converged)
    total = len(result.corners)
    status = f"{total - failed.total()} of {total} corners converged"
    status += " (by L_pos alone)" if spec.violation_threshold is None else ""
    if failed:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in failed.items())
        status += f", those with * did not ({reasons})"
    elif result.goal_reached is False:
        ended = ", ".join(dict.fromkeys(corner.reason for corner in result.corners))
        status += f", but the spread is short of its goal of {spec.hull.goal:g} ({ended})"
    lines = [
        f"{spec.model}, {spec.layer}: {status}; {result.steps:,} steps.",
        f"Spread {polytope.spread:.3g}: corners lie {polytope.mean_pairwise_distance:.2f} apart on "
        f"average, {polytope.natural_distance_of} {polytope.natural_distance:.2f}.",
    ]
    if total == 1:
        lines[1] = "One corner spans no polytope: no spread, and nothing to interpolate."
    elif inside:
        exact = _with_interval(inside.accuracy, inside.accuracy_interval)
        rounded = _with_interval(inside.accuracy_8bit, inside.accuracy_interval_8bit)
        lines.append(
            f"Of {inside.samples:,} interpolations ({inside.sampler} sampler) {exact} are taken "
            f"for the target's class; {rounded} once rounded to 8 bits."
        )
    explained = "ΔS, ΔT: Euclidean distance to source and target, pixels in [0, 1]."
    claimed = [f"{name}: {text}." for name, text in claims(result)]
    return [*lines, *claimed, explained, *result.warnings]


def _shown(shown: Sized, corners: Sized) -> str:
    return f"Shown: {len(shown)} of {len(corners)} corners." if len(shown) < len(corners) else ""


def _clipped(images: list[Pixels]) -> str:
    # To four digits, for a sum of weights may exceed 1 by a rounding.
    extremes = [(image.min(), image.max()) for image in images]
    low, high = np.round([np.min(extremes), np.max(extremes)], 4)
    if low >= 0 and high <= 1:
        return ""
    return f"Pixels lie outside [0, 1] ({low:.4g} to {high:.4g}): drawn clipped, as in the PNGs."


def _with_interval(share: float, interval: tuple[float, float]) -> str:
    low, high = map(_percent, interval)
    return f"{_percent(share)} (95 % interval {low} to {high})"


def _percent(share: float) -> str:
    """With one decimal, but neither 0 nor 100 for what only comes near."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def _cut(*lines: str, letters: int = LETTERS) -> tuple[str, ...]:
    """`lines`, each cut to the width of a corner's cell."""
    return tuple(line if len(line) <= letters else line[: letters - 1] + "…" for line in lines)


def _sheet(
    grid: list[list[_Cell]],
    caption: list[str],
    *,
    ends: tuple[_Cell, _Cell] | None = None,
    names: Sequence[str] = (),
) -> bytes:
    """`grid`, its rows called `names`; between `ends`, source and target, at half its height.

    Without them each row has its own, the last of which stand one below the other.
    """
    before = 1 if ends else 0
    across = max(map(len, grid)) + 2 * before
    pitch = max(MIN_PITCH, min(MAX_PITCH, MAX_HEIGHT // len(grid)))
    pitch = min(pitch, (MAX_WIDTH - 2 * (MARGIN + APART)) // across)
    page_width = max(MIN_WIDTH, across * pitch + 2 * (MARGIN + APART))
    shape = next(c.image.shape[1:] for row in grid for c in row if c.image is not None)
    scale = (pitch - GAP) / max(shape)
    scale = scale if scale < 1 else int(scale)  # so that pixels stay squares of one size
    height, width = (max(1, round(side * scale)) for side in shape)
    left = (page_width - across * pitch) // 2 + (pitch - width) // 2

    placed, tops, y = list[tuple[_Cell, int, int]](), list[int](), MARGIN
    for row in grid:
        tops.append(y + LINE * max(len(cell.above) for cell in row))
        columns = [*range(before, before + len(row))]
        if not ends:
            columns[-1] = across - 1
        placed += [(cell, left + pitch * j, tops[-1]) for j, cell in zip(columns, row, strict=True)]
        y = tops[-1] + height + LINE * max(len(cell.below) for cell in row) + 2 * GAP
    if ends:
        middle = (tops[0] + tops[-1]) // 2
        places = left - APART, left + pitch * (across - 1) + APART
        placed += [(cell, x, middle) for cell, x in zip(ends, places, strict=True)]
    letters = int((page_width - 2 * MARGIN) / LETTER)
    shown = [cell.image for cell, _, _ in placed if cell.image is not None]
    caption = [*caption, _clipped(shown)]
    lines = [line for text in caption for line in textwrap.wrap(text, letters)]
    page_height = y + LINE * len(lines) + MARGIN

    figure = Figure((page_width / DPI, page_height / DPI))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, page_width), ylim=(page_height, 0))
    axes.axis("off")
    for cell, x, top in placed:
        _draw(axes, cell, x, top, width, height)
    for name, top in zip(names, tops, strict=False):
        where = left + pitch - 8, top + height / 2 - LINE
        _write(axes, *where, [name], ha="right", va="center", rotation=90)
    _write(axes, MARGIN, y, lines)
    return _png(figure)


def _draw(axes: Axes, cell: _Cell, x: int, y: int, width: int, height: int) -> None:
    """`cell`, the top left of its image at `x`, `y`, on axes whose unit is a pixel."""
    centre, above = x + width / 2, y - 5 - LINE * len(cell.above)
    _write(axes, centre, above, cell.above[:1], ha="center", weight="bold")
    _write(axes, centre, above + LINE, cell.above[1:], ha="center")
    _write(axes, centre, y + height + 3, cell.below, ha="center")
    if cell.image is None:
        return
    rows, columns = cell.image.shape[1:]
    rgb = np.broadcast_to(to_8bit(cell.image).transpose(1, 2, 0), (rows, columns, 3))
    how = "nearest" if height >= rows else "antialiased"
    axes.imshow(rgb, extent=(x, x + width, y + height, y), aspect="auto", interpolation=how)
    frame = (x - 1, y - 1), width + 2, height + 2
    axes.add_patch(Rectangle(*frame, fill=False, linewidth=2, edgecolor=cell.colour))
    down, across = height / rows, width / columns
    for box, colour in zip(cell.boxes, REGION_COLOURS, strict=False):
        corner = x + box.left * across, y + box.top * down
        size = box.width * across, box.height * down
        axes.add_patch(Rectangle(corner, *size, fill=False, linewidth=3, edgecolor=colour))


def _write(axes: Axes, x: float, y: float, lines: Sequence[str], **style: Any) -> None:
    """`lines` downwards from `y`; what is not plain stays as it is."""
    for i, line in enumerate(lines, 1):
        axes.text(x, y + LINE * i - 4, line, parse_math=False, fontsize=FONT, **style)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
