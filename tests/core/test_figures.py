"""Pictures of real results: the MNIST samples and the shipped network, run once for this file."""

import copy
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from core import figures, images, job
from core.outcome import run_alone
from core.regions import find_regions
from core.spec import CollisionSpec

Pixels = NDArray[np.floating[Any]]

# Takes 70 steps and leaves pixels free, so that corners lose their class when clipped to a PNG.
SETTINGS = {
    "model": "mnist-mlp",
    "layer": "fc1",
    "beta": 1.0,
    "negative": "absolute",
    "pixel_range": "free",
    "optimizer": "gd",
    "learning_rate": 0.005,
    "l_pos_threshold": 5.0,
    "violation_threshold": None,
}


class Case:
    """One finished job with everything that the three pictures take."""

    def __init__(self, corners: int) -> None:
        spec = CollisionSpec.model_validate(SETTINGS | {"corners": corners})
        subject = job.Subject.open(spec, torch.device("cpu"))
        source, target = (
            images.load(*images.read(f"sample:mnist/{name}"), subject.model.preprocessing)
            for name in ("3-0", "7-0")
        )
        done, outcome = run_alone(subject, spec, source, target)
        self.source, self.target = source.pixels, target.pixels
        self.corners: Pixels = outcome.corners
        self.group, self.result = done.group, outcome.result

    def with_corners(self, count: int, **changes: Any) -> "Case":
        """The same with `count` corners, repeated or left out, and `changes` in each result."""
        other = copy.copy(self)
        which = np.arange(count) % len(self.corners)
        other.corners = self.corners[which]
        results = [
            self.result.corners[k].model_copy(update={"index": i, **changes})
            for i, k in enumerate(which)
        ]
        other.result = self.result.model_copy(update={"corners": results})
        other.group = copy.copy(self.group)
        other.group.curves, other.group.snapshots = (
            copy.copy(record) for record in (self.group.curves, self.group.snapshots)
        )
        for record in (other.group.curves, other.group.snapshots):
            record.values = [value[torch.from_numpy(which)] for value in record.values]
        other.group.steps = self.group.steps[which]
        return other

    @property
    def course(self) -> figures.Course:
        return figures.Course.of(self.group)

    def draw(self) -> tuple[bytes, bytes, bytes]:
        return self.draw_result(), self.draw_curves(), self.draw_snapshots()

    def draw_result(self) -> bytes:
        return figures.draw_result(self.source, self.target, self.corners, self.result)

    def draw_curves(self) -> bytes:
        return figures.draw_curves(self.course, self.result)

    def draw_snapshots(self) -> bytes:
        return figures.draw_snapshots(self.source, self.target, self.course, self.corners)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(corners=5)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the PNGs, in the order in which they are drawn."""
    made: list[Figure] = []
    png = figures._png

    def keep(figure: Figure) -> bytes:
        made.append(figure)
        return png(figure)

    monkeypatch.setattr(figures, "_png", keep)
    return made


def decoded(png: bytes) -> NDArray[np.uint8]:
    """[height, width, 3]"""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def cut_out(picture: NDArray[np.uint8], axes: Axes) -> Iterator[NDArray[np.uint8]]:
    """What `picture` shows where each image of `axes` lies."""
    for image in axes.images:
        left, right, bottom, top = (round(side) for side in image.get_extent())
        yield picture[top:bottom, left:right]


def magnified(image: Pixels, factor: int) -> NDArray[np.uint8]:
    """[H, W, 3] as its PNG shows it, each pixel a square."""
    rows = images.to_8bit(image).transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1)
    return np.broadcast_to(rows, (*rows.shape[:2], 3))


@pytest.mark.parametrize("corners", [1, 2, 5, 6, 20, 256])
def test_pictures_are_readable_at_full_size(case: Case, corners: int) -> None:
    for png in case.with_corners(corners).draw():
        height, width, _ = decoded(png).shape
        assert 1000 <= width <= 1600
        assert 150 <= height <= 2000


@pytest.mark.parametrize(("corners", "shown"), [(1, 1), (5, 5), (6, 6), (20, 20), (256, 32)])
def test_source_corners_and_target_are_drawn_once_each_and_in_this_order(
    case: Case, drawn: list[Figure], corners: int, shown: int
) -> None:
    case.with_corners(corners).draw_result()

    (axes,) = drawn[0].axes
    assert len(axes.images) == shown + 2
    columns = [image.get_extent()[0] for image in axes.images]
    assert len(set(columns)) <= 8
    headings = [f"corner {k}" for k in range(shown)]
    assert [text for text in texts(axes) if text.startswith("corner ")] == headings
    place = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert place["source"] < min(place[heading] for heading in headings)
    assert place["target"] > max(place[heading] for heading in headings)
    assert ("Shown: 32 of 256 corners." in texts(axes)) == (corners == 256)


def test_nothing_is_written_over_anything_else(case: Case, drawn: list[Figure]) -> None:
    name = "American Staffordshire Terrier, known under several other names"
    for count in (1, 6, 20):
        crowded = case.with_corners(count, class_=name, label_8bit=4, converged=False)
        crowded.draw_result()
        crowded.draw_snapshots()
        figures.draw_strips([strip_of(crowded)] * count, ["One line.", "And another one. " * 20])
    for figure in drawn:
        axes = figure.axes[0]
        artists: list[Any] = [*(text for text in axes.texts if text.get_text()), *axes.images]
        boxes = [artist.get_window_extent().padded(-1.5) for artist in artists]
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0
            assert box.y1 <= figure.bbox.y1
            assert not any(box.overlaps(other) for other in boxes[:i])


def test_each_pixel_of_a_small_image_becomes_a_square_as_bright_as_in_its_png(
    case: Case, drawn: list[Figure]
) -> None:
    picture = decoded(case.draw_result())

    found = list(cut_out(picture, drawn[0].axes[0]))
    factor = len(found[0]) // 28
    assert factor >= 4
    for image in (case.source, *case.corners, case.target):
        assert any(np.array_equal(part, magnified(image, factor)) for part in found)


def test_photographs_keep_their_colours_and_shape(case: Case, drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    wide = rng.random((3, 3, 150, 227))
    picture = decoded(figures.draw_result(wide[0], wide[1], wide[2:], case.with_corners(1).result))
    assert {part.shape for part in cut_out(picture, drawn[0].axes[0])} == {(150, 227, 3)}
    for image in wide:
        parts = cut_out(picture, drawn[0].axes[0])
        assert any(np.array_equal(part, magnified(image, 1)) for part in parts)

    large = np.ones((7, 3, 454, 454)) * np.linspace(0, 1, 454)
    large[:, 2] = np.arange(454) % 2 / 2  # stripes, too fine for the picture: their mean shows
    picture = decoded(
        figures.draw_result(large[0], large[1], large[2:], case.with_corners(5).result)
    )
    for part in cut_out(picture, drawn[1].axes[0]):
        assert part.shape[0] == part.shape[1] < 227
        ramp = np.linspace(0, 255, part.shape[1])
        assert np.abs(part[..., :2] - ramp[:, None]).max() <= 3
        assert np.abs(part[:, 3:-3, 2].astype(int) - 64).max() <= 16


def test_the_caption_says_when_pixels_lie_outside_their_range(
    case: Case, drawn: list[Figure]
) -> None:
    assert case.corners.min() < -0.1
    case.draw_result()
    case.draw_snapshots()
    for figure in drawn:
        (said,) = [text for text in texts(figure.axes[0]) if "outside [0, 1]" in text]
        assert f"({case.corners.min():.4g} to " in said
        assert "clipped" in said

    bright = copy.copy(case)
    bright.corners = case.corners.clip(0, 1) * np.float32(1.5)
    bright.draw_result()
    assert "outside [0, 1] (0 to 1." in "".join(texts(drawn[-1].axes[0]))

    tame = copy.copy(case)
    tame.corners = case.corners.clip(0, 1) + np.float32(1e-6)
    tame.draw_result()
    assert "outside" not in "".join(texts(drawn[-1].axes[0]))


def test_a_corner_tells_its_class_probability_distances_and_state(
    case: Case, drawn: list[Figure]
) -> None:
    result = case.result
    case.draw_result()
    said = texts(drawn[0].axes[0])
    for image, corner in zip(case.corners, result.corners, strict=True):
        to_source = np.sqrt(((image - case.source) ** 2).sum())
        to_target = np.sqrt(((image - case.target) ** 2).sum())
        at = said.index(f"corner {corner.index}")
        assert said[at + 1 : at + 3] == ["7", ">99.9 %"]
        assert said[at + 3] == f"ΔS {to_source:.2f}, ΔT {to_target:.2f}"
        # Clipped to a PNG it is no 7 any more, and the picture shows the PNG.
        name = "3" if corner.label_8bit == 3 else f"class {corner.label_8bit}"
        assert said[at + 4] == f"as PNG: {name}"

    lost = case.with_corners(2, label=5, class_="5", probability=0.24, label_8bit=5)
    lost.draw_result()
    said = texts(drawn[1].axes[0])
    assert said[said.index("corner 1") :][1:3] == ["5", "target 24.0 %"]
    assert "as PNG" not in "".join(said)


def test_the_caption_tells_spread_accuracy_and_convergence(case: Case, drawn: list[Figure]) -> None:
    result = case.result
    assert result.interpolation is not None
    changes = {"accuracy": 0.875, "accuracy_interval": (0.8591, 0.8897)}
    failed = [result.corners[0].model_copy(update={"converged": False, "reason": "max_steps"})]
    update = {
        "interpolation": result.interpolation.model_copy(update=changes),
        "corners": [*failed, *result.corners[1:]],
        "warnings": ["Layer 'fc1' is no cut."],
    }
    figures.draw_result(case.source, case.target, case.corners, result.model_copy(update=update))
    said = texts(drawn[0].axes[0])
    caption = " ".join(said)
    assert "4 of 5 corners converged (by L_pos alone)" in caption
    assert "max_steps: 1" in caption
    assert [text for text in said if text.endswith("*")] == ["corner 0*"]
    assert f"Spread {result.polytope.spread:.3g}" in caption
    assert "87.5 % (95 % interval 85.9 % to 89.0 %)" in caption
    assert "0.0 % (95 % interval 0.0 % to 0.2 %) once rounded to 8 bits" in caption
    assert "Layer 'fc1' is no cut." in caption

    figures.draw_result(
        case.source,
        case.target,
        case.corners,
        result.model_copy(update={"interpolation": None}),
    )
    assert "interpolations" not in " ".join(texts(drawn[1].axes[0]))


def test_one_corner_is_not_said_to_span_a_polytope(case: Case, drawn: list[Figure]) -> None:
    case.with_corners(1).draw_result()
    caption = " ".join(texts(drawn[0].axes[0]))
    assert "spans no polytope" in caption
    assert "Spread" not in caption
    assert "95 %" not in caption


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0 %"),
        (1e-9, "<0.1 %"),
        (0.0005, "0.1 %"),
        (0.2396, "24.0 %"),
        (0.9994, "99.9 %"),
        (0.99999, ">99.9 %"),
        (1.0, "100.0 %"),
    ],
)
def test_only_certainty_is_called_100_or_0_percent(share: float, text: str) -> None:
    assert figures._percent(share) == text


def test_curves_are_what_the_group_noted_and_end_at_what_was_kept(
    case: Case, drawn: list[Figure]
) -> None:
    case.draw_curves()
    curves = torch.stack(case.group.curves.values).numpy()
    for i, axes in enumerate(drawn[0].axes):
        assert axes.get_yscale() == "log"
        lines = axes.lines[:5]
        for k, line in enumerate(lines):
            assert np.array_equal(line.get_xdata(), case.group.curves.steps)
            assert np.array_equal(line.get_ydata(), curves[:, k, i])
        kept = [(c.steps, (c.l_pos, c.violation)[i]) for c in case.result.corners]
        assert np.allclose(np.asarray(axes.collections[0].get_offsets()), kept)
        low, high = axes.get_ylim()
        assert low <= curves[..., i].min()
        assert curves[..., i].max() <= high


def test_thresholds_are_drawn_where_there_are_any(case: Case, drawn: list[Figure]) -> None:
    case.draw_curves()
    left, right = drawn[0].axes
    assert case.group.violation_threshold == np.inf
    assert [line.get_ydata() for line in left.lines[5:]] == [[5.0, 5.0]]
    assert len(right.lines) == 5
    assert left.get_title("left") == "L_pos (dashed: threshold 5)"
    assert right.get_title("left") == "violation (not tested)"

    both = case.with_corners(5)
    both.group.violation_threshold = 1e-4
    both.draw_curves()
    _, right = drawn[1].axes
    assert [line.get_ydata() for line in right.lines[5:]] == [[1e-4, 1e-4]]
    assert right.get_ylim()[0] <= 1e-4


@pytest.mark.parametrize("corners", [1, 10, 11, 256])
def test_there_is_a_legend_as_long_as_colours_can_be_told_apart(
    case: Case, drawn: list[Figure], corners: int
) -> None:
    case.with_corners(corners).draw_curves()
    (figure,) = drawn
    names = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert names == ([f"corner {k}" for k in range(corners)] if corners <= 10 else [])
    colours = {str(line.get_color()) for line in figure.axes[0].lines[:corners]}
    assert len(colours) == (corners if corners <= 10 else 1)


def with_curves(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    other = case.with_corners(5)
    other.group.curves.values = list(change(torch.stack(case.group.curves.values)))
    other.group.curves.steps = case.group.curves.steps[: len(other.group.curves.values)]
    return other


def zero_from_the_second_check(values: torch.Tensor) -> torch.Tensor:
    values[1:, 2:] = 0
    return values


def infinite_then_nothing(values: torch.Tensor) -> torch.Tensor:
    values[3:, 1], values[4:, 1] = torch.inf, torch.nan
    return values


@pytest.mark.parametrize(
    "change",
    [
        zero_from_the_second_check,
        infinite_then_nothing,
        torch.zeros_like,
        lambda values: torch.full_like(values, torch.nan),
        lambda values: torch.full_like(values, 1e38),
        lambda values: values[:1],
    ],
)
def test_odd_curves_are_drawn_without_a_warning(  # warnings are errors here
    case: Case, drawn: list[Figure], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    odd = with_curves(case, change)
    height, width, _ = decoded(odd.draw_curves()).shape
    assert (width, height) == figures.CURVES_SIZE
    for i, axes in enumerate(drawn[0].axes):
        values = torch.stack(odd.group.curves.values)[..., i]
        low, high = axes.get_ylim()
        finite = values[values.isfinite()]
        assert ((low <= finite) & (finite <= high)).all()
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert ("0" in labels) == bool((finite == 0).any())
        within = [low <= tick <= high for tick in axes.get_yticks()]
        assert sum(within) >= 2


def test_a_job_stopped_before_its_first_check_has_pictures(case: Case) -> None:
    stopped = case.with_corners(5, steps=0)
    stopped.group.steps = np.zeros(5, np.int64)
    for record in (stopped.group.curves, stopped.group.snapshots):
        record.steps, record.values = [], []
    for png in stopped.draw():
        assert decoded(png).shape[1] >= 1000


def snapshots_of(case: Case, steps: list[int], wanted: int) -> Case:
    """With a flat image at each step, brighter from step to step and corner to corner."""
    other = case.with_corners(5)
    other.group.spec = other.group.spec.model_copy(update={"snapshots": wanted})
    other.group.snapshots.steps = steps
    offsets = torch.arange(5).view(-1, 1, 1, 1).expand(5, 1, 28, 28)
    other.group.snapshots.values = [(15 * i + offsets) / 255 for i in range(len(steps))]
    return other


@pytest.mark.parametrize(
    ("noted", "wanted", "columns"),
    [
        (range(0, 70, 10), 6, [10, 20, 30, 40, 50, 60]),
        (range(0, 71, 10), 6, [10, 20, 30, 40, 50, 60]),  # 70 is the last step of all
        (range(0, 70, 10), 3, [20, 40, 60]),
        (range(0, 70, 5), 6, [10, 20, 30, 40, 50, 60]),
        (range(0, 70, 5), 64, [5, 15, 25, 35, 45, 55, 65]),  # 7 of 13
        (range(0, 70, 20), 6, [20, 40, 60]),
        (range(0), 0, []),
    ],
)
def test_snapshots_are_evenly_chosen_and_followed_by_the_final_corner(
    case: Case, drawn: list[Figure], noted: range, wanted: int, columns: list[int]
) -> None:
    assert case.group.steps.max() == 70
    picture = decoded(snapshots_of(case, list(noted), wanted).draw_snapshots())

    (axes,) = drawn[0].axes
    headings = ["final", "source", *(f"step {step}" for step in columns), "target"]
    bold = [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"]
    assert sorted(bold) == sorted(headings)
    assert len(axes.images) == 5 * (len(columns) + 1) + 2
    parts = list(cut_out(picture, axes))
    for k in range(5):
        row = parts[k * (len(columns) + 1) :][: len(columns) + 1]
        for step, part in zip(columns, row[:-1], strict=True):
            assert (part == 15 * noted.index(step) + k).all()
        assert np.array_equal(row[-1], magnified(case.corners[k], len(row[-1]) // 28))


def test_a_corner_that_stood_still_is_not_shown_twice(case: Case, drawn: list[Figure]) -> None:
    early = snapshots_of(case, list(range(0, 70, 10)), 6)
    early.group.steps = np.array([30, 70, 70, 10, 70])
    early.draw_snapshots()
    (axes,) = drawn[0].axes
    assert len(axes.images) == (2 + 6 + 6 + 0 + 6) + 5 + 2
    assert {f"step {step}" for step in range(10, 70, 10)} <= set(texts(axes))  # headings stay
    course = early.course
    results = [
        corner.model_copy(update={"steps": int(steps)})
        for corner, steps in zip(case.result.corners, early.group.steps, strict=True)
    ]
    strips = figures.snapshot_strips(
        *(case.source, case.target, course.snapshots, course.snapshot_steps, case.corners),
        case.result.model_copy(update={"corners": results}),
    )
    assert [sum(image is not None for image in strip.images) for strip in strips] == [3, 7, 7, 1, 7]
    figures.draw_strips(strips, [])
    assert len(drawn[1].axes[0].images) == (3 + 7 + 7 + 1 + 7) + 2 * 5


def test_pictures_of_the_way_are_snapshots_that_the_result_keeps(case: Case) -> None:
    for wanted, kept in ((3, [20, 40, 60]), (6, [10, 20, 30, 40, 50, 60]), (0, [])):
        some = snapshots_of(case, list(range(0, 90, 10)), wanted)  # the last corner came at 70
        assert some.course.snapshot_steps == kept
        assert len(some.course.snapshots) == len(kept)


def test_at_most_8_corners_are_followed_and_the_others_counted(
    case: Case, drawn: list[Figure]
) -> None:
    case.with_corners(20).draw_snapshots()
    said = texts(drawn[0].axes[0])
    assert [text for text in said if text.startswith("corner")] == [f"corner {k}" for k in range(8)]
    assert "Shown: 8 of 20 corners." in said


def test_256_corners_take_seconds(case: Case) -> None:
    many = case.with_corners(256)
    steps = 1000
    many.group.curves.steps = list(range(0, 10 * steps, 10))
    many.group.curves.values = list(torch.rand(steps, 256, 2, dtype=torch.float64))
    began = time.process_time()
    many.draw()
    assert time.process_time() - began < 30


def test_a_class_may_be_called_anything(
    case: Case, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("mathtext's parser is shared by all threads")

    monkeypatch.setattr(MathTextParser, "parse", refuse)
    name = r"$5_bill$ \frac{1"
    case.with_corners(5, class_=name).draw()
    assert texts(drawn[0].axes[0]).count(name) == 5


def photographed(count: int) -> tuple[Pixels, Pixels, Pixels]:
    """A source, a target and corners of 90 x 140 pixels, noise that differs in two places."""
    rng = np.random.default_rng(0)
    source, target = 0.1 * rng.random((2, 3, 90, 140))
    corners = np.repeat(source[None], count, axis=0)
    for strength, top, left in ((0.8, 54, 20), (0.6, 9, 84)):
        shades = strength * rng.permutation(np.linspace(0, 1, count))
        corners[:, :, top : top + 18, left : left + 28] += shades[:, None, None, None]
    return source, target, corners


def boxes(axes: Axes, colour: str) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of the frames of a colour."""
    found = [p for p in axes.patches if isinstance(p, Rectangle)]
    edges = [(p, to_hex(p.get_edgecolor()).upper()) for p in found]
    return [
        (round(p.get_x()), round(p.get_y()), round(p.get_width()), round(p.get_height()))
        for p, edge in edges
        if edge == colour
    ]


@pytest.mark.parametrize(("count", "shown"), [(2, 2), (5, 5), (20, 6)])
def test_a_region_has_one_colour_and_stands_at_its_place_in_every_image(
    drawn: list[Figure], count: int, shown: int
) -> None:
    source, target, corners = photographed(count)
    regions = find_regions(corners)[:2]
    assert [(r.top, r.left, r.height, r.width) for r in regions] == [
        (54, 20, 18, 28),
        (9, 84, 18, 28),
    ]
    picture = decoded(figures.draw_regions(source, target, corners, regions))
    height, width, _ = picture.shape
    assert 1000 <= width <= 1600
    assert 300 <= height <= 2000
    (axes,) = drawn[0].axes
    frames = [[round(side) for side in image.get_extent()] for image in axes.images]
    whole, enlarged = frames[:shown] + frames[-2:], np.reshape(frames[shown:-2], (2, shown, 4))
    assert [text for text in texts(axes) if text.startswith("corner ")] == [
        f"corner {k}" for k in range(shown)
    ]
    assert [text for text in texts(axes) if text.startswith("region ")] == ["region 0", "region 1"]
    for region, colour, row in zip(regions, figures.REGION_COLOURS, enlarged, strict=False):
        scale = (whole[0][1] - whole[0][0]) / 140
        expected = [
            (left + region.left * scale, top + region.top * scale, 28 * scale, 18 * scale)
            for left, _, _, top in whole
        ]
        around = [(left - 1, top - 1, r - left + 2, b - top + 2) for left, r, b, top in row]
        found = boxes(axes, colour)
        assert np.abs(np.subtract(found[:shown] + found[-2:], expected)).max() <= 1
        assert found[shown:-2] == around
        # The line is there, in the picture, around what the corners differ by.
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        for left, top, across, down in found[:shown]:
            line = picture[top : top + down, left].astype(int)
            assert np.abs(line - rgb).max(1).mean() < 16
            assert np.abs(picture[top + down // 2, left + across // 2] - rgb).max() > 50
    for k, corner in enumerate(corners[:shown]):
        for region, row in zip(regions, enlarged, strict=True):
            left, right, bottom, top = row[k]
            part = picture[top + 2 : bottom - 2, left + 2 : right - 2].astype(float)
            wanted = images.to_8bit(region.of(corner)).mean((1, 2))
            assert part.mean((0, 1)) == pytest.approx(wanted, abs=3)
    assert ("Shown: 6 of 20 corners." in texts(axes)) == (count == 20)
    caption = " ".join(texts(axes))
    assert f"They hold {100 * regions[0].share:.1f} %, {100 * regions[1].share:.1f} % of" in caption
    assert "each on 4.0 % of the pixels" in caption


def test_regions_are_drawn_of_images_that_have_some(case: Case) -> None:
    source, target, corners = photographed(5)
    result = case.result
    course = replace(case.course, curve_steps=[], snapshot_steps=[])
    assert "regions.png" in figures.draw(source, target, corners, result, course, None)
    alike = np.repeat(source[None], 5, axis=0)
    assert "regions.png" not in figures.draw(source, target, alike, result, course, None)
    for height in (63, 64):  # pixels a side at least
        part = (pixels[..., :height, :] for pixels in (source, target, corners))
        drawn = figures.draw(*part, result, course, None)
        assert ("regions.png" in drawn) == (height == 64)


def strip_of(case: Case) -> figures.Strip:
    return figures.corner_strip(case.source, case.target, case.corners, case.result)


def test_strips_stand_one_below_the_other_each_between_its_source_and_target(
    case: Case, drawn: list[Figure]
) -> None:
    first, second = strip_of(case), strip_of(case.with_corners(3))
    second = replace(second, source=case.target, target=case.source)
    picture = decoded(figures.draw_strips([first, first, second], ["What it shows."]))
    height, width, _ = picture.shape
    assert 1000 <= width <= 1600
    assert 300 <= height <= 2000
    (axes,) = drawn[0].axes
    rows: dict[float, list[Any]] = {}
    for image in axes.images:
        rows.setdefault(image.get_extent()[3], []).append(image)
    assert list(rows) == sorted(rows)
    assert [len(row) for row in rows.values()] == [7, 7, 5]
    for place in (0, -1):
        assert len({row[place].get_extent()[0] for row in rows.values()}) == 1
    parts = iter(cut_out(picture, axes))
    for strip in (first, first, second):
        for image in (strip.source, *strip.images, strip.target):
            part = next(parts)
            assert np.array_equal(part, magnified(image, len(part) // 28))
    said = texts(axes)
    # Names that are those of the row above are not said again.
    assert [text for text in said if text.startswith("corner 1")] == ["corner 1"] * 2
    assert said.count("source") == 2
    assert "What it shows." in said
    # Under the sources a 3, under all else a 7, and whose probability that is.
    assert (said.count("3"), said.count("7")) == (3, 13 + 3)
    assert (said.count("target >99.9 %"), said.count(">99.9 %")) == (13, 6)


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (20, 20), (21, 20)])
def test_as_many_strips_are_drawn_as_can_be_seen(
    case: Case, drawn: list[Figure], count: int, shown: int
) -> None:
    height, width, _ = decoded(figures.draw_strips([strip_of(case)] * count, [])).shape
    assert width <= 1600 and height <= 4000
    (axes,) = drawn[0].axes
    assert len(axes.images) == 7 * shown
    assert all(image.get_extent()[1] - image.get_extent()[0] > 100 for image in axes.images)
    assert ("Shown: 20 of 21 rows." in texts(axes)) == (count == 21)


def test_a_strip_of_many_images_cuts_what_stands_below_them(
    case: Case, drawn: list[Figure]
) -> None:
    many = case.with_corners(12, class_="American Staffordshire Terrier")
    figures.draw_strips([strip_of(many)], [])
    (axes,) = drawn[0].axes
    assert texts(axes).count("American Staffo…") == 10
    assert "Shown: 10 of 12 images in a row." in texts(axes)
    assert len(axes.images) == 10 + 2


def test_boxes_are_in_all_images_of_a_strip(drawn: list[Figure], case: Case) -> None:
    source, target, corners = photographed(5)
    regions = find_regions(corners)[:2]
    strip = figures.corner_strip(source, target, corners, case.result, regions)
    figures.draw_strips([strip], [])
    (axes,) = drawn[0].axes
    for region, colour in zip(regions, figures.REGION_COLOURS, strict=False):
        found = boxes(axes, colour)
        assert len(found) == 7
        for (left, top, *_), image in zip(found, axes.images, strict=True):
            scale = (image.get_extent()[1] - image.get_extent()[0]) / 140
            assert left - image.get_extent()[0] == pytest.approx(region.left * scale, abs=1)
            assert top - image.get_extent()[3] == pytest.approx(region.top * scale, abs=1)


def test_the_way_to_each_corner_is_a_strip_that_ends_at_the_corner(case: Case) -> None:
    course = case.course
    steps, taken = [10, 20, 30], course.snapshots[:3]
    strips = figures.snapshot_strips(
        case.source, case.target, taken, steps, case.corners, case.result
    )
    assert len(strips) == 5
    for k, strip in enumerate(strips):
        assert list(strip.above) == ["step 10", "step 20", "step 30", "final"]
        assert np.array_equal(strip.images, [*taken[:, k], case.corners[k]])
    long = np.repeat(taken, 10, axis=0)
    (strip, *_) = figures.snapshot_strips(
        case.source, case.target, long, list(range(30)), case.corners, case.result
    )
    assert len(strip.images) == figures.SNAPSHOT_COLUMNS + 1
    assert (strip.above[0], strip.above[-2]) == ("step 0", "step 29")


def test_mixtures_are_told_by_the_probability_of_the_target(case: Case) -> None:
    shares = np.array([0.25, 1.0])
    strip = figures.mixture_strip(case.source, case.target, case.corners[:2], shares, case.result)
    assert [line for (line,) in strip.below] == ["target 25.0 %", "target 100.0 %"]


def test_threads_draw_what_one_thread_draws(case: Case) -> None:
    alone = case.draw()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: case.draw(), range(4)))
    assert together == [alone] * 4


def test_drawing_needs_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, core.figures; print({'torch', 'matplotlib.pyplot'}.intersection(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
