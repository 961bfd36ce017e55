"""Nearest patches by faiss beside exact search: building, memory, time of a query, recall@1.

Photographs of a folder that no user has (POLYCOLLIDE_DATA), every eleventh held out: queries are
patches at random places of those. The number of patches is reached by a smaller stride, so that
neighbours lie closer than in a set of as many patches of more photographs, and are harder to tell
apart. What the paper's 37 011 074 patches would take is extrapolated, with the arithmetic.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from subjects import DATA
from timing import Report, alternate, clocked, console, duration, quartiles, table, verdict

from core.patches import faiss_process, neighbours, sets
from core.patches.neighbours import Faiss, InvertedFile, Neighbours
from core.patches.sets import Geometry, PatchSet

PAPER = 37_011_074, 128_066  # patches of the paper, and images
HELD_OUT = 11
AIMS = {"bytes": ("<=", 64.0), "recall": (">=", 0.9), "seconds": ("<=", 0.05)}


@dataclass(frozen=True)
class Measured:
    """What one set took."""

    patches: PatchSet
    seconds: dict[str, float]  # of building, by what was done
    resident: float  # bytes of the index in faiss's process, a patch
    alone: list[float]  # seconds of queries, one by one
    searching: float  # seconds of a query in faiss, projection included: without its ranking
    recall: float


def photographs(folder: Path) -> tuple[Path, Path]:
    """Two folders of links: the photographs of the sets, and those held out."""
    places = folder / "seen", folder / "held"
    for place in places:
        place.mkdir()
    for i, file in enumerate(sorted((DATA / "photos").glob("*.jpg"))):
        (places[i % HELD_OUT == 0] / file.name).symlink_to(file.resolve())
    return places


def draw(held: PatchSet, count: int) -> NDArray[np.uint8]:
    """Patches at random places of the photographs held out, [count, 32, 32, 3]."""
    most = len(held.pixels), *[held.geometry.resize - held.geometry.size + 1] * 2
    return held.read(np.random.default_rng(0).integers(0, most, (count, 3)))


def stride_for(count: int, photos: int) -> int:
    """The stride that comes nearest to so many patches."""
    return max(1, round((224 - 32) / (math.sqrt(count / photos) - 1)))


def build(
    folder: Path, name: str, stride: int, exact_up_to: int, backend: str = "faiss"
) -> tuple[PatchSet, dict[str, float]]:
    """A set of the photographs, and the seconds that each part of building took."""
    began: dict[str, float] = {}
    patches = sets.build(
        *(folder / "seen", name, Geometry(stride=stride)),
        neighbours.indexer(backend, exact_up_to=exact_up_to),
        root=folder / "sets",
        report=lambda what, done, total: began.setdefault(what, time.perf_counter()) and None,
    )
    times = [*began.values(), time.perf_counter()]
    return patches, dict(zip(began, np.diff(times), strict=True))


def measure(folder: Path, count: int, queries: NDArray[np.uint8], turns: int) -> Measured:
    """Builds a set of about `count` patches and searches it, beside exact search."""
    stride = stride_for(count, len(list((folder / "seen").iterdir())))
    patches, seconds = build(folder, f"indexed-{stride}", stride, 0)
    everything, _ = build(folder, f"exact-{stride}", stride, 10**12)
    with Neighbours(patches) as indexed, Neighbours(everything) as exact:
        assert isinstance(indexed.index, InvertedFile)
        truth = exact.nearest(queries)[1]
        recall = float((indexed.nearest(queries)[1] == truth).mean())
        resident = _resident(indexed.index.faiss) - _resident_without()
        alone = [clocked(lambda q=q: indexed.nearest(q[None])) for q in queries]
        flat = queries.reshape(len(queries), -1)
        nobody = np.empty(0, dtype=np.int64)
        searching = [
            clocked(lambda q=q: indexed.index.candidates(q[None], 1, nobody)) for q in flat
        ]
        report = Report(f"{len(patches)} patches, stride {stride}", "exact", "ivf-pq")
        some = queries[: max(1, len(queries) // 4)]
        times = alternate(
            *(lambda: exact.nearest(some), lambda: indexed.nearest(some)), turns=turns, warm_up=0
        )
        report.add(f"a query of {len(some)} at once", *times, per=len(some))
        report.show()
    return Measured(
        *(patches, seconds, resident / len(patches), alone, float(np.median(searching)), recall)
    )


def judge(measured: Measured) -> None:
    """One set's figures beside the aims."""
    patches = measured.patches
    made = table(f"{len(patches)} patches", "", "found", "aim", "")
    for what, seconds in measured.seconds.items():
        made.add_row(f"building: {what}", duration(seconds))
    disk = sum(patches.manifest.files.values()) / len(patches)
    pixels = patches.manifest.files[sets.PIXELS] / len(patches)
    made.add_row("bytes a patch on disk, images among them", f"{disk:.1f}, {pixels:.1f}")
    made.add_row(
        "bytes a patch in memory",
        f"{measured.resident:.1f}",
        *verdict(measured.resident, AIMS["bytes"]),
    )
    median = float(np.median(measured.alone))
    alone = quartiles(measured.alone, duration)
    made.add_row("a query alone", alone, *verdict(median, AIMS["seconds"]))
    made.add_row("  of that, faiss", duration(measured.searching))
    made.add_row("recall@1", f"{measured.recall:.3f}", *verdict(measured.recall, AIMS["recall"]))
    console.print(made)


def extrapolate(measured: Measured) -> None:
    """What the paper's set would take, from one of ours."""
    patches, (count, images) = measured.patches, PAPER
    index, geometry, took = patches.manifest.index, patches.geometry, measured.seconds
    wide, n = index["dimensions"], len(patches)
    now, then = index["lists"], neighbours.list_count(count)
    reading = took["images"] / len(patches.manifest.images) * images
    work = (geometry.values + then) / (geometry.values + now)
    encoding = took["patches"] / n * count * work
    sample = faiss_process.COARSE_SAMPLES * then
    clustered = faiss_process.KMEANS_ITERATIONS * then
    training = took["training"] + sample * took["patches"] / n * (geometry.values + clustered) / (
        geometry.values + now
    )
    packing = took["packing"] / n * count
    fixed = wide * 4 * (then + geometry.values)
    scanned_now = n * index["probes"] / now
    scanned = count * neighbours.probe_count(then) / then
    searching = measured.searching * scanned / scanned_now
    ranking = float(np.median(measured.alone)) - measured.searching
    per_patch = index["codes"] + 8
    total = reading + training + encoding + packing
    size = (per_patch * count + fixed) / 1e9
    milliseconds = [1e3 * seconds for seconds in (measured.searching, ranking, searching + ranking)]
    photos = len(patches.manifest.images)
    d = geometry.values
    console.print(
        f"{count} patches of {images} images, {then} lists, from {n} of {photos} with {now}:",
        f"images    {took['images']:.1f} s / {photos} x {images} = {reading:.0f} s",
        f"training  {took['training']:.1f} s + {sample} x {took['patches']:.1f} s / {n} x "
        f"({d} + {clustered}) / ({d} + {now}) = {training:.0f} s",
        f"patches   {took['patches']:.1f} s / {n} x {count} x ({d} + {then}) / ({d} + {now}) = "
        f"{encoding:.0f} s",
        f"packing   {took['packing']:.2f} s / {n} x {count} = {packing:.0f} s",
        f"building  {total / 60:.0f} minutes",
        f"memory    {per_patch} x {count} + {fixed} = {size:.2f} GB, "
        f"{1e9 * size / count:.1f} bytes a patch",
        f"on disk   {geometry.image_bytes} x {images} = {geometry.image_bytes * images / 1e9:.1f} "
        "GB of images beside it",
        f"a query   {milliseconds[0]:.1f} ms x {scanned:.0f} / {scanned_now:.0f} codes + "
        f"{milliseconds[1]:.1f} ms of ranking = {milliseconds[2]:.0f} ms (the paper: 5 minutes); "
        f"images that memory does not hold add {neighbours.CANDIDATES} reads of the disk",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _resident(faiss: Faiss) -> int:
    """Bytes of memory that a process has to itself; 0 where the system does not tell."""
    status = Path(f"/proc/{faiss.process.pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _resident_without() -> int:
    """The same of a process that has done a little, but has no index to speak of."""
    sample = np.random.default_rng(0).standard_normal((256, 64), dtype=np.float32)
    with Faiss() as faiss:
        faiss.ask("train", sample, lists=1, codes=32, path=os.devnull)
        return _resident(faiss)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--patches", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3, help="of both kinds of search")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photographs(folder)
        held = sets.build(
            *(folder / "held", "held", Geometry(), neighbours.indexer()), root=folder / "sets"
        )
        queries = draw(held, options.queries)
        for count in options.patches:
            measured = measure(folder, count, queries, options.turns)
            judge(measured)
        extrapolate(measured)


if __name__ == "__main__":
    main()
