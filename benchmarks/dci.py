"""Prioritized DCI beside faiss and exact search, at equal recall: distances taken, time, memory.

Photographs, queries and sets are those of patches.py. For each recall@1, faiss gets the number of
probes and of candidates with which it is fastest, DCI the least number of candidates: then all
search in turn. What the paper's 37 011 074 patches would take is extrapolated, with the arithmetic.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from patches import PAPER, build, draw, photographs, stride_for
from timing import alternate, clocked, console, duration, quartiles, table

from core.patches import neighbours, sets
from core.patches.dci import project
from core.patches.neighbours import InvertedFile, Neighbours, RandomLines
from core.patches.sets import Geometry, PatchSet

RECALLS = 0.9, 0.95
CANDIDATES = 64, 256, 1024, 4096  # that faiss may give to be ranked by their pixels
NOBODY = np.empty(0, dtype=np.int64)

# Codes that faiss compares with a query, and the centres of lists before them.
SCANNED = """
import sys
import faiss
import numpy as np

path, queries, probes = sys.argv[1:]
index = faiss.read_index(path)
_, lists = index.quantizer.search(np.load(queries), int(probes))
sizes = np.array([index.invlists.list_size(i) for i in range(index.nlist)])
print(index.nlist + sizes[lists].sum(axis=1).mean())
"""


@dataclass(frozen=True)
class Way:
    """A way to search: an open set and the settings of its index."""

    found: Neighbours
    settings: tuple[int, ...] = ()  # probes and candidates, or candidates of a composite index

    def set(self) -> None:
        if isinstance(self.found.index, InvertedFile):
            self.found.index.probes, neighbours.CANDIDATES = self.settings
        elif isinstance(self.found.index, RandomLines):
            (self.found.index.retrieve,) = self.settings

    def distances(self, queries: NDArray[np.uint8]) -> NDArray[np.float64]:
        """To the nearest patch of each of `queries`, [Q]."""
        self.set()
        return self.found.nearest(queries)[1][:, 0]

    def pixel_distances(self, queries: NDArray[np.uint8]) -> float:
        """Patches whose pixels are compared with a query's, on average."""
        if self.found.patches.manifest.index["kind"] == "exact":
            return len(self.found.patches)
        self.set()
        found = self.found.index.candidates(queries.reshape(len(queries), -1), 1, NOBODY)
        return float(np.mean([np.count_nonzero(ids >= 0) for ids in found]))

    def code_distances(self, queries: NDArray[np.uint8], folder: Path) -> float:
        """Codes of faiss that are compared with a query's, on average."""
        if not isinstance(self.found.index, InvertedFile):
            return 0.0
        projected = self.found.index.projection(queries.reshape(len(queries), -1))
        np.save(folder / "queries.npy", projected)
        index = self.found.patches.folder / InvertedFile.FILE
        given = [index, folder / "queries.npy", self.settings[0]]
        command = [sys.executable, "-c", SCANNED, *map(str, given)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def tuned_faiss(
    found: Neighbours, recall_of: Callable[[Way], float], goal: float, queries: NDArray[np.uint8]
) -> Way | None:
    """The fastest of the least numbers of probes, one for each of CANDIDATES, with that recall."""
    lists = found.patches.manifest.index["lists"]
    ways = []
    counts = [round(2 ** (i / 2)) for i in range(2, int(2 * math.log2(lists)) + 1)]
    for candidates in CANDIDATES:

        def enough(probes: int, candidates: int = candidates) -> bool:
            return recall_of(Way(found, (probes, candidates))) >= goal

        if probes := least(counts, enough):
            ways.append(Way(found, (probes, candidates)))
    return min(ways, key=lambda way: clocked(lambda: way.distances(queries)), default=None)


def ranks(index: RandomLines, queries: NDArray[np.uint8], nearest: NDArray[np.int64]) -> list[int]:
    """How many candidates of a composite index lead to the nearest patches [Q, 3] of `queries`."""
    side, stride = index.patches.geometry.side, index.patches.geometry.stride
    image, row, column = (nearest // [1, stride, stride]).T
    projected = project(queries.reshape(len(queries), -1), index.dci.directions)
    found = []
    for i, patch in enumerate((image * side + row) * side + column):
        away = [
            np.abs(lines - centre[:, None]).max(axis=0)
            for lines, centre in zip(index.dci.projections, projected[..., i], strict=True)
        ]
        found.append(min(int((a <= a[patch]).sum()) for a in away))
    return found


def least(values: Sequence[int], enough: Callable[[int], bool]) -> int | None:
    """The least of ascending values that is enough, if what is more than enough is enough."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(values[middle]) else (middle + 1, high)
    return values[low] if low < len(values) else None


def measure(folder: Path, count: int, queries: NDArray[np.uint8], turns: int) -> None:
    """Builds three sets of about `count` patches and prints how they are searched."""
    stride = stride_for(count, len(list((folder / "seen").iterdir())))
    everything, _ = build(folder, f"exact-{stride}", stride, 10**12)
    by_faiss, faiss_seconds = build(folder, f"faiss-{stride}", stride, 0)
    by_dci, dci_seconds = build(folder, f"dci-{stride}", stride, 0, "dci")
    with Neighbours(everything) as exact, Neighbours(by_faiss) as ivf, Neighbours(by_dci) as lines:
        nearest, far = exact.nearest(queries)
        assert isinstance(lines.index, RandomLines)
        behind = ranks(lines.index, queries, nearest[:, 0])

        def recall_of(way: Way) -> float:
            return float((way.distances(queries) == far[:, 0]).mean())

        index = by_faiss.manifest.index
        ways: dict[str, Way | None] = {
            "exact": Way(exact),
            "faiss": Way(ivf, (index["probes"], neighbours.CANDIDATES)),
            "dci": Way(lines, (by_dci.manifest.index["retrieve"],)),
        }
        for goal in RECALLS:
            ways[f"faiss at {goal}"] = tuned_faiss(ivf, recall_of, goal, queries)
            needed = int(np.quantile(behind, goal, method="higher"))
            ways[f"dci at {goal}"] = Way(lines, (needed,))
        reached = {name: way for name, way in ways.items() if way}
        runs = [partial(way.distances, queries) for way in reached.values()]
        seconds = dict(zip(reached, alternate(*runs, turns=turns, warm_up=0), strict=True))
        made = table(
            f"{len(by_dci)} patches, stride {stride}, {len(queries)} queries",
            *("", "settings", "recall@1", "pixel distances", "code distances"),
            *("a query", "/ exact", "/ faiss"),
        )
        for name, way in reached.items():
            peer = name.replace("dci", "faiss")
            made.add_row(
                name,
                ", ".join(map(str, way.settings)),
                f"{recall_of(way):.3f}",
                f"{way.pixel_distances(queries):.0f}",
                f"{way.code_distances(queries, folder):.0f}",
                quartiles(seconds[name] / len(queries), duration),
                f"{np.median(seconds[name] / seconds['exact']):.3f}",
                f"{np.median(seconds[name] / seconds[peer]):.2f}" if peer in seconds else "",
            )
        console.print(made)
        for name, found, took in (("faiss", ivf, faiss_seconds), ("dci", lines, dci_seconds)):
            parts = ", ".join(f"{what} {duration(time)}" for what, time in took.items())
            console.print(
                f"{name}: {found.index.memory / len(by_dci):.1f} bytes a patch; built in "
                f"{duration(sum(took.values()))}: {parts}",
                highlight=False,
            )
        extrapolate(by_dci, lines, queries, dci_seconds)


def extrapolate(
    patches: PatchSet, lines: Neighbours, queries: NDArray[np.uint8], took: dict[str, float]
) -> None:
    """What the paper's set would take by DCI as it is set."""
    n, (count, images) = len(patches), PAPER
    now, then = patches.manifest.index["retrieve"], neighbours.retrieve_count(count)
    assert isinstance(lines.index, RandomLines)
    way = Way(lines, (now,))
    compared = way.pixel_distances(queries)
    whole = clocked(lambda: way.distances(queries)) / len(queries)
    flat = queries.reshape(len(queries), -1)
    walked = clocked(lambda: list(lines.index.candidates(flat, 1, NOBODY))) / len(queries)
    ranked = whole - walked
    projecting = took["patches"] / n * count
    sorting = took["sorting"] / (n * math.log2(n)) * count * math.log2(count)
    reading = took["images"] / len(patches.manifest.images) * images
    size = (lines.index.memory - lines.index.dci.directions.nbytes) // n
    milliseconds = f"{1e3 * walked:.1f}", f"{1e3 * ranked:.1f}"
    console.print(
        f"{count} patches of {images} images by DCI, from {n}:",
        f"images    {took['images']:.1f} s / {len(patches.manifest.images)} x {images} = "
        f"{reading:.0f} s",
        f"patches   {took['patches']:.1f} s / {n} x {count} = {projecting:.0f} s",
        f"sorting   {took['sorting']:.1f} s / ({n} x {math.log2(n):.1f}) x {count} x "
        f"{math.log2(count):.1f} = {sorting:.0f} s",
        f"memory    {size} x {count} = {size * count / 1e9:.1f} GB",
        f"distances {compared:.0f} x {then} / {now} = {compared * then / now:.0f}",
        f"a query   {milliseconds[0]} ms x {count} / {n} + {milliseconds[1]} ms x {then} / {now} = "
        f"{walked * count / n + ranked * then / now:.1f} s (the paper: 5 minutes); if memory does "
        "not hold index and images, the disk's time besides",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--patches", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5, help="of all ways to search")
    parser.add_argument("--quick", action="store_true", help="20 000 patches, for a first look")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photographs(folder)
        held = sets.build(
            *(folder / "held", "held", Geometry(), neighbours.indexer()), root=folder / "sets"
        )
        queries = draw(held, options.queries)
        for count in [20_000] if options.quick else options.patches:
            measure(folder, count, queries, options.turns)


if __name__ == "__main__":
    main()
