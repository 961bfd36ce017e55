"""A result's files as bytes, with nothing written: the command line and workers share it."""

import io
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core import images
from core.interpolate import Samples
from core.job import Job
from core.outcome import Outcome

Arrays = dict[str, NDArray[Any]]
LOSSES = "residual", "l_pos", "violation"


def encode(done: Job, outcome: Outcome) -> dict[str, bytes]:
    """The files of `outcome` by name; the same outcome gives the same bytes.

    `corner-<k>.png`, `corners.npz`, and `worst.png`, `samples.npz` and `snapshots.npz` where there
    are any.
    """
    files = {f"corner-{k}.png": images.to_png(corner) for k, corner in enumerate(outcome.corners)}
    arrays = {"corners": outcome.corners}
    if outcome.worst is not None:
        arrays["worst"] = outcome.worst
        files["worst.png"] = images.to_png(outcome.worst)
    files["corners.npz"] = to_npz(arrays)
    if outcome.samples:
        files["samples.npz"] = to_npz(_samples(outcome.samples))
    if done.group.on_the_way:
        files["snapshots.npz"] = to_npz(_snapshots(done))
    return files


def pictures(done: Job, outcome: Outcome) -> Callable[[], dict[str, bytes]]:
    """What draws `outcome` when it is called, here or in another process: PNG files by name.

    `figure.png`, and where there are any, `curves.png`, `hull.png`, `regions.png` and
    `snapshots.png`.
    """
    from core import figures  # matplotlib takes half a second to import

    samples = outcome.samples
    return partial(
        figures.draw,
        done.source.pixels,
        done.target.pixels,
        outcome.corners,
        outcome.result,
        figures.Course.of(done.group),
        (samples.weights, samples.floats.probability) if samples else None,
    )


def to_npz(arrays: Arrays) -> bytes:
    """An `.npz` file; its entries bear zip's first date, so that equal arrays are equal files.

    Deflated at level 1: level 6 takes two to three times as long for 5 % less. The weights of
    samples are stored as they are, since random digits do not shrink.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            method = zipfile.ZIP_STORED if name == "weights" else zipfile.ZIP_DEFLATED
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
            place = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(place, entry.getvalue(), compress_type=method, compresslevel=1)
    return file.getvalue()


def _samples(samples: Samples) -> Arrays:
    """As they were computed: corners were mixed, and residuals taken, in float32."""
    narrow: dict[str, type] = dict.fromkeys(("weights", *LOSSES), np.float32)
    narrow["label"] = np.int32
    return {
        name: array.astype(narrow.get(name.removesuffix("_8bit"), array.dtype))
        for name, array in samples.arrays().items()
    }


def _snapshots(done: Job) -> Arrays:
    """`images` [M, K, C, H, W] at `steps` [M], those that `snapshots.png` is drawn of.

    From its step in `corner_steps` [K] on, a corner of them is no nearer to the one that was kept.
    """
    record, way = done.group.snapshots, done.group.on_the_way
    return {
        "steps": np.array([record.steps[i] for i in way]),
        "images": np.stack([record.values[i].numpy() for i in way]),
        "corner_steps": done.group.steps,
    }
