"""The pictures of a result, as PNG files. Torch-free, and safe in any thread.

Two things that threads would share are left alone: pyplot, and matplotlib's parser of mathtext (so
a class may be called "$5 bill", too). Images are drawn as their 8-bit files show them.
"""

import io
import textwrap
from collections import Counter
from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from core.images import to_8bit
from core.result import CornerResult, Result, Seen

if TYPE_CHECKING:
    from core.engine import Group

Pixels = NDArray[np.floating[Any]]

DPI = 72  # a point is a pixel, so every length below is in pixels
FONT, LINE, CHARACTER = 13, 18, 7.2  # the last is the width of an average one
MIN_WIDTH, MAX_WIDTH, MAX_PITCH = 1000, 1600, 280
MARGIN, APART, GAP = 20, 36, 14
CURVES_SIZE = 1400, 500

CORNERS_SHOWN, CORNER_COLUMNS = 32, 6
SNAPSHOT_ROWS, SNAPSHOT_COLUMNS = 8, 8
COLOURS = matplotlib.color_sequences["petroff10"]
SOURCE_COLOUR, TARGET_COLOUR = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
TEXT_COLOUR, RULE_COLOUR = "#222222", "#CCCCCC"


@dataclass(frozen=True)
class _Cell:
    """An image [C, H, W] and the lines written around it."""

    image: Pixels
    heading: str = ""
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    beside: str = ""
    colour: str = TEXT_COLOUR


def draw_result(source: Pixels, target: Pixels, corners: Pixels, result: Result) -> bytes:
    """The paper's Figure 2: source, corners and target, and what the network takes them for.

    `source` and `target` are [C, H, W], `corners` [K, C, H, W]: what `result` tells of.
    """
    known = {seen.label: seen.class_ for seen in (*result.corners, result.source, result.target)}
    shown = [
        _corner_cell(image, corner, result.target.label, known)
        for image, corner in zip(corners[:CORNERS_SHOWN], result.corners, strict=False)
    ]
    rows = -(-len(shown) // CORNER_COLUMNS)
    columns = -(-len(shown) // rows)
    apart = f"{np.linalg.norm(source - target):.2f}"
    ends = [
        _Cell(image, name, _lines(seen.class_, _percent(seen.probability)), (below,), colour=colour)
        for image, name, seen, below, colour in (
            (source, "source", result.source, f"ΔT {apart}", SOURCE_COLOUR),
            (target, "target", result.target, f"ΔS {apart}", TARGET_COLOUR),
        )
    ]
    grid = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    notes = [_shown(shown, corners), _clipping(corners)]
    return _sheet(ends[0], grid, ends[1], [*_findings(result), *notes])


def draw_snapshots(source: Pixels, target: Pixels, group: "Group", corners: Pixels) -> bytes:
    """Appendix C: the way from `source` to each of `corners` [K, C, H, W], one in each row."""
    noted = zip(group.snapshots.steps, group.snapshots.values, strict=True)
    # At step 0 each corner is the source; after its last step it is what `corners` holds.
    between = [(step, images) for step, images in noted if 0 < step < group.steps.max()]
    count = min(len(between), group.spec.snapshots, SNAPSHOT_COLUMNS - 1)
    chosen = np.linspace(-1, len(between), count + 2)[1:-1].round().astype(int)
    columns = [(f"step {between[i][0]:,}", between[i][1].numpy()) for i in chosen]
    columns.append(("final", corners))
    grid = [
        [
            _Cell(
                images[k],
                heading="" if k else heading,
                below=(f"step {group.steps[k]:,}",) if images is corners else (),
                beside="" if column else f"corner {k}",
            )
            for column, (heading, images) in enumerate(columns)
        ]
        for k in range(min(len(corners), SNAPSHOT_ROWS))
    ]
    ends = (
        _Cell(source, "source", colour=SOURCE_COLOUR),
        _Cell(target, "target", colour=TARGET_COLOUR),
    )
    return _sheet(ends[0], grid, ends[1], [_shown(grid, corners), _clipping(corners)])


def draw_curves(group: "Group", result: Result) -> bytes:
    """L_pos and violation of each corner against steps, with the thresholds they had to pass."""
    kept = np.array([(corner.l_pos, corner.violation) for corner in result.corners])  # [K, 2]
    kept_steps = [corner.steps for corner in result.corners]
    noted = [values.numpy() for values in group.curves.values]
    curves = np.reshape(noted, (-1, *kept.shape))  # [N, K, 2]
    few = len(kept) <= len(COLOURS)
    colours = COLOURS if few else [SOURCE_COLOUR] * len(kept)
    thresholds = group.l_pos_threshold, group.violation_threshold

    figure = _figure(*CURVES_SIZE, layout="constrained")
    panels = zip(figure.subplots(1, 2), ("L_pos", "violation"), thresholds, strict=True)
    for i, (axes, name, threshold) in enumerate(panels):
        for k, colour in zip(range(len(kept)), colours, strict=False):
            look = {"color": colour, "alpha": 1.0 if few else 0.4}
            axes.plot(group.curves.steps, curves[:, k, i], **look, label=f"corner {k}")
            axes.plot(kept_steps[k], kept[k, i], "o", **look, markersize=6, clip_on=False)
        _scale(axes, np.array([*curves[..., i].flat, *kept[:, i], threshold]))
        axes.set_xlim(0, max([10, *group.curves.steps, *kept_steps]))
        tested = np.isfinite(threshold)
        axes.set_title(name if tested else f"{name} (not tested)", loc="left", fontsize=FONT)
        if tested:
            axes.axhline(threshold, color=TEXT_COLOUR, linestyle="--", linewidth=1)
            place = {"xy": (0, threshold), "xycoords": axes.get_yaxis_transform()}
            place |= {"xytext": (5, 3), "textcoords": "offset points"}
            axes.annotate(f"threshold {threshold:.3g}", **place, fontsize=FONT)
    figure.supxlabel("step (a dot: the state that was kept)", fontsize=FONT)
    if few:
        lines = figure.axes[0].get_legend_handles_labels()
        place = {"loc": "outside lower center", "ncols": len(kept)}
        figure.legend(*lines, **place, frameon=False, fontsize=FONT)
    return _png(figure)


def _scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """A logarithmic axis of whole decades around `values`, with a place for 0 if one of them is."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0] if finite.any() else np.ones(1)
    low, high = np.floor(np.log10(positive.min())), np.ceil(np.log10(positive.max()))
    bottom, top = 10.0**low, 10.0 ** max(high, low + 1)
    if (finite == 0).any():
        axes.set_yscale("symlog", linthresh=bottom, linscale=0.5)
        bottom *= -0.2
    else:
        axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(which="both", labelsize=FONT, color=RULE_COLOUR)
    axes.tick_params(which="minor", length=0)
    axes.grid(color=RULE_COLOUR, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE_COLOUR)


def _corner_cell(image: Pixels, corner: CornerResult, target: int, known: dict[int, str]) -> _Cell:
    whose = "" if corner.label == target else "target "
    below = [f"ΔS {corner.distance_to_source:.2f}   ΔT {corner.distance_to_target:.2f}"]
    if corner.label_8bit != corner.label:
        below.append(f"as PNG: {known.get(corner.label_8bit, f'class {corner.label_8bit}')}")
    return _Cell(
        image,
        heading=f"corner {corner.index}" + ("" if corner.converged else "*"),
        above=_lines(corner.class_, whose + _percent(corner.probability)),
        below=_lines(*below),
    )


def _findings(result: Result) -> list[str]:
    """What the caption of `draw_result` says, one sentence or two to a line."""
    spec, polytope, inside = result.provenance.spec, result.polytope, result.interpolation
    total = len(result.corners)
    failed = Counter(corner.reason for corner in result.corners if not corner.converged)
    status = f"{spec.model}, {spec.layer}: {total - failed.total()} of {total} corners converged"
    status += " (by L_pos alone)" if spec.violation_threshold is None else ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in failed.items())
    status += f"; not those with * ({reasons})." if failed else "."
    lines = [f"{status} At most {result.steps:,} steps."]
    if total == 1:
        lines.append("One corner spans no polytope: no spread, nothing to interpolate.")
    else:
        lines.append(
            f"Spread {polytope.spread:.3g}: corners lie {polytope.mean_pairwise_distance:.2f} apart "
            f"on average, {polytope.natural_distance_of} {polytope.natural_distance:.2f}."
        )
        if inside:
            accuracy, accuracy_8bit = (
                f"{_percent(hits)} ({_percent(low)} to {_percent(high)})"
                for hits, (low, high) in (
                    (inside.accuracy, inside.accuracy_interval),
                    (inside.accuracy_8bit, inside.accuracy_interval_8bit),
                )
            )
            lines.append(
                f"Of {inside.samples:,} interpolations, {accuracy} are taken for the target's "
                f"class; rounded to 8 bits, {accuracy_8bit}. In brackets: 95 % intervals."
            )
    lines.append("ΔS, ΔT: Euclidean distance to source and target, pixels in [0, 1].")
    return lines


def _shown(shown: Sized, corners: Sized) -> str:
    return f"Shown: {len(shown)} of {len(corners)} corners." if len(shown) < len(corners) else ""


def _clipping(images: Pixels) -> str:
    low, high = images.min(), images.max()
    if low >= 0 and high <= 1:
        return ""
    return f"Pixels lie outside [0, 1] ({low:.2f} to {high:.2f}): drawn clipped, as in the PNGs."


def _percent(probability: float) -> str:
    """With one decimal, but never 0 or 100 for what is only near."""
    if 0 < probability < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= probability < 1 else f"{100 * probability:.1f} %"


def _lines(*lines: str) -> tuple[str, ...]:
    """Each cut to the width of a corner's cell."""
    return tuple(line if len(line) <= 25 else line[:24] + "…" for line in lines)


def _sheet(source: _Cell, grid: list[list[_Cell]], target: _Cell, caption: list[str]) -> bytes:
    """`grid` between `source` and `target`, which stand apart at half its height."""
    across = len(grid[0]) + 2
    pitch = min(MAX_PITCH, (MAX_WIDTH - 2 * (MARGIN + APART)) // across)
    width = max(MIN_WIDTH, across * pitch + 2 * (MARGIN + APART))
    scale = (pitch - GAP) / max(source.image.shape[1:])
    scale = scale if scale < 1 else int(scale)
    height, breadth = (round(side * scale) for side in source.image.shape[1:])
    inset = (pitch - breadth) // 2
    left = (width - across * pitch) // 2 + inset

    bottom, tops = MARGIN, []
    for row in grid:
        level = [*row, source, target] if len(grid) == 1 else row
        tops.append(bottom + LINE * max(bool(cell.heading) + len(cell.above) for cell in level))
        bottom = tops[-1] + height + LINE * max(len(cell.below) for cell in level) + GAP
    middle = (tops[0] + tops[-1]) // 2
    placed = [
        (source, left - APART, middle),
        *((cell, left + pitch * j, top) for row, top in zip(grid, tops, strict=True) for j, cell in enumerate(row, 1)),
        (target, left + pitch * (across - 1) + APART, middle),
    ]
    characters = int((width - 2 * MARGIN) / CHARACTER)
    lines = [line for text in caption for line in textwrap.wrap(text, characters)]

    figure = _figure(width, bottom + LINE * len(lines) + MARGIN)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(figure.bbox.height, 0))
    axes.axis("off")
    for cell, x, y in placed:
        _draw(axes, cell, x, y, breadth, height)
    _write(axes, MARGIN, bottom, lines, va="top")
    return _png(figure)


def _draw(axes: Axes, cell: _Cell, x: int, y: int, width: int, height: int) -> None:
    """`cell` with its image at `x`, `y` (from the top) on axes whose unit is a pixel."""
    rgb = np.broadcast_to(to_8bit(cell.image).transpose(1, 2, 0), (*cell.image.shape[1:], 3))
    how = "nearest" if height >= len(rgb) else "antialiased"
    axes.imshow(rgb, extent=(x, x + width, y + height, y), interpolation=how, aspect="auto")
    ...


def _figure(width: int, height: int, layout: Literal["constrained"] | None = None) -> Figure:
    return Figure((width / DPI, height / DPI), dpi=DPI, layout=layout)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
