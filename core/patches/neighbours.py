"""The nearest patches of a set: pixel Euclidean distance, the paper's metric.

Every index gives candidates, which are then ranked by their real pixels. Small sets are searched
exactly, block by block. Larger ones have one of two indices. For faiss they are projected onto
their principal components (97 % of the energy of patches of photographs lies in 64 of 3072), where
it keeps an inverted file of product-quantised vectors, of 40 bytes a patch. Prioritized DCI, the
paper's choice, keeps projections of the pixels on random lines, of 240 bytes a patch. Projections
only shorten distances, so that a patch near in pixels is near there, too.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from core.errors import CoreError, UnknownName
from core.patches import dci, faiss_process
from core.patches.dci import PrioritizedDCI, UnreadableIndex
from core.patches.faiss_process import Arrays, receive, send
from core.patches.sets import (
    AGAIN,
    Bytes,
    Ids,
    Indexer,
    PatchSet,
    PatchSetUnusable,
    Report,
    replacing,
    sync,
)

Floats = NDArray[np.float32]

EXACT_UP_TO = 100_000  # patches; a seed image's 289 then take seconds to search for
LEAST_INDEXED = 256  # patches: of fewer a quantiser of 8 bits learns nothing
BLOCK_BYTES = 64 * 2**20  # of patches as floats that are in memory at a time
CANDIDATES = 256  # ranked by their pixels; what is missed with so many, the index misses itself
DIMENSIONS, CODES = 64, 32  # of the projection, and bytes that are kept of it
SAMPLE = 16_384  # patches whose principal components are taken
QUERIES = 256  # that an index is asked for at a time: seconds of exact search, and of faiss
LEAST_PROBES, MOST_PROBES = 16, 64
LEAST_TRAINING = 256 * faiss_process.CODE_SAMPLES  # patches: a byte is one of 256 centroids
PACKED = 2**20  # codes that go to faiss at a time
SIMPLE, COMPOSITE = 15, 2  # lines of a composite index of DCI, and how many such indices
# Candidates of a composite index for so many patches. It grows with the power 0.8 of these: with
# that, recall@1 on held-out photographs was as high at a million (benchmarks/dci.py).
RETRIEVED, RETRIEVED_OF = 1000, 100_000
COMPARED = 2**20  # bytes of patches as floats whose distances are taken at a time: a cache's
UNROUNDED = 256  # differences of bytes whose squares add up in float32 without rounding
MIDDLE = np.float32(128)  # taken from pixels, so that their squares, and what rounds, are smaller


class TooFewPatches(CoreError):
    """The set has fewer patches than are asked for."""

    code = "too_few_patches"


class IndexFailed(CoreError):
    """The index cannot be built or searched."""

    code = "index_failed"


class Index(Protocol):
    """A way to find candidates, which stands in KINDS."""

    memory: int  # bytes

    def __init__(self, patches: PatchSet) -> None:
        """Opens the set's index. Raises UnreadableIndex, or KeyError for a parameter it lacks."""

    @classmethod
    def build(cls, patches: PatchSet, seed: int, report: Report) -> dict[str, Any]:
        """Writes the index into the set's folder, going on where a killed build left it.

        Returns its parameters, which are found again in `patches.manifest.index`.
        """

    def candidates(self, queries: Bytes, count: int, excluded: Ids) -> Iterable[Ids]:
        """For each of queries [Q, D] ids near to it, of no image in `excluded` [E].

        At least `count`; -1 may stand among them. Where a query takes long, one is searched for
        when its ids are asked for, so that the search is seen to go on.
        """

    @property
    def alive(self) -> bool:
        """Whether it can be searched; a process that it needs may have ended."""

    def close(self) -> None: ...


class Neighbours:
    """The nearest patches of a set; for one thread, and to be closed, as `with` does.

    Raises PatchSetUnusable, IndexFailed, and ModuleNotFoundError for want of faiss.
    """

    def __init__(self, patches: PatchSet) -> None:
        self.patches = patches
        kind = patches.manifest.index["kind"]
        try:
            self.index = KINDS[kind](patches)
        except (KeyError, UnreadableIndex) as error:
            raise PatchSetUnusable(
                f"The patch set {patches.name!r} has an index that is damaged or of another "
                f"version ({kind!r}){AGAIN}"
            ) from error

    def nearest(
        self,
        queries: Bytes,
        k: int = 1,
        exclude: Iterable[str] = (),
        on_part: Callable[[], object] = lambda: None,
    ) -> tuple[Ids, NDArray[np.float64]]:
        """Addresses [Q, k, 3] of the patches nearest to `queries` [Q, n, n, 3], and how far.

        Distances [Q, k] are those of pixels in [0, 1], exact for the patches given. `exclude` has
        the sha256 of images whose patches do not count; those that the set does not have are no
        error. Of equals, the one with the smaller address comes first: of all that there are where
        the search is exact, of its candidates where an index gives some only. `on_part` is called
        after each query. Raises TooFewPatches, IndexFailed, and ValueError for queries of another
        shape or type.
        """
        patches, size = self.patches, self.patches.geometry.size
        if queries.dtype != np.uint8 or queries.shape[1:] != (size, size, 3):
            raise ValueError(f"queries are uint8 [Q, {size}, {size}, 3], not {queries.shape}")
        numbers = {patches.numbers[sha256] for sha256 in exclude if sha256 in patches.numbers}
        excluded = np.array(sorted(numbers), dtype=np.int64)
        left = len(patches) - len(excluded) * patches.per_image
        if not 1 <= k <= left:
            raise TooFewPatches(
                f"{k} neighbours were asked for, and {patches.name!r} has {left} patches that "
                "are not excluded."
            )
        flat = queries.reshape(len(queries), patches.geometry.values)
        ids = np.empty((len(flat), k), dtype=np.int64)
        squares = np.empty((len(flat), k))
        for start in range(0, len(flat), QUERIES):
            part = flat[start : start + QUERIES]
            for i, found in enumerate(self.index.candidates(part, k, excluded), start):
                ids[i], squares[i] = self._ranked(flat[i], found[found >= 0], k)
                on_part()
        return patches.addresses(ids), np.sqrt(squares) / 255

    def close(self) -> None:
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ranked(self, query: Bytes, ids: Ids, k: int) -> tuple[Ids, NDArray[np.float64]]:
        """The k nearest to `query` [D] of the patches `ids`, and their squared distances."""
        ids = np.sort(ids)
        rows, width = max(1, COMPARED // (4 * len(query))), math.ceil(len(query) / UNROUNDED)
        apart = np.zeros((rows, width * UNROUNDED), np.float32)
        squares = np.empty(len(ids))
        for start in range(0, len(ids), rows):
            near = self.patches.flat(ids[start : start + rows])
            np.subtract(near, query, out=apart[: len(near), : len(query)], dtype=np.float32)
            parts = apart[: len(near)].reshape(-1, width, UNROUNDED)
            squares[start : start + rows] = np.vecdot(parts, parts).sum(1, dtype=np.float64)
        order = np.argsort(squares, kind="stable")[:k]
        return ids[order], squares[order]


def indexer(backend: str = "faiss", *, seed: int = 0, exact_up_to: int = EXACT_UP_TO) -> Indexer:
    """What `sets.build` is given: exact search up to a number of patches, then the backend's.

    Raises UnknownName.
    """
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS)
    return _Indexer(backend, seed, exact_up_to)


class _Indexer:
    def __init__(self, backend: str, seed: int, exact_up_to: int) -> None:
        self.backend, self.seed, self.exact_up_to = backend, seed, exact_up_to

    def __call__(self, patches: PatchSet, report: Report) -> dict[str, Any]:
        exact = len(patches) <= max(self.exact_up_to, LEAST_INDEXED)
        kind = "exact" if exact else BACKENDS[self.backend]
        parameters = KINDS[kind].build(patches, self.seed, report)
        return {"backend": self.backend, "kind": kind, **parameters}


class Exact:
    """Compares queries with every patch; keeps nothing."""

    memory, alive = 0, True

    def __init__(self, patches: PatchSet) -> None:
        self.patches = patches

    @classmethod
    def build(cls, patches: PatchSet, seed: int, report: Report) -> dict[str, Any]:
        return {}

    def candidates(self, queries: Bytes, count: int, excluded: Ids) -> Ids:
        moved = queries.astype(np.float32) - MIDDLE
        lengths, longest = np.linalg.norm(moved, axis=1), np.float32(0)
        best = np.full((len(queries), 0), np.inf, dtype=np.float32)
        found = np.full((len(queries), 0), -1)
        for block_ids in _blocks(self.patches):
            ids = block_ids[~np.isin(block_ids // self.patches.per_image, excluded)]
            if not len(ids):
                continue
            block = self.patches.flat(ids).astype(np.float32)
            block -= MIDDLE
            # ||q - p||^2 but for ||q||^2, which is the same for all p.
            squares = np.einsum("pd,pd->p", block, block)
            score = squares - 2 * (moved @ block.T)
            longest = max(longest, np.sqrt(squares.max()))
            best = np.concatenate([best, score], axis=1)
            found = np.concatenate([found, np.broadcast_to(ids, score.shape)], axis=1)
            if best.shape[1] > count:
                # All that rounding may have put behind the last that counts stay, and so do its
                # equals, however many: of these the one with the smallest address is to be given.
                last = np.partition(best, count - 1, axis=1)[:, count - 1]
                rounding = moved.shape[1] * np.finfo(np.float32).eps
                last += 2 * rounding * (longest**2 + 2 * longest * lengths)
                most = int((best <= last[:, None]).sum(axis=1).max())
                kept = np.argpartition(best, most - 1, axis=1)[:, :most]
                best = np.take_along_axis(best, kept, axis=1)
                found = np.take_along_axis(found, kept, axis=1)
        return found

    def close(self) -> None:
        pass


class Projection:
    """Patches [P, D] onto their principal components [P, d], randomly turned.

    Turned, every component has as much to say: a product quantiser gives each the same bits.
    """

    FILE: ClassVar[str] = "projection.npy"

    def __init__(self, table: Floats) -> None:
        self.mean, self.basis = table[0], table[1:].T
        self.memory = table.nbytes

    @classmethod
    def of(cls, patches: PatchSet, seed: int, dimensions: int) -> Self:
        """That of a set, from its file; taken from a sample of the patches if there is none."""
        path = patches.folder / cls.FILE
        if not path.is_file():
            rng = np.random.default_rng(seed)
            most = max(dimensions, BLOCK_BYTES // patches.geometry.values)
            ids = _sample(patches, min(SAMPLE, most), rng)
            table = _principal(patches.flat(ids), dimensions, rng)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, table)
        return cls.read(patches)

    @classmethod
    def read(cls, patches: PatchSet) -> Self:
        return cls(np.load(patches.folder / cls.FILE, allow_pickle=False))

    def __call__(self, flat: Bytes) -> Floats:
        projected: Floats = (flat.astype(np.float32) - self.mean) @ self.basis
        return projected


class InvertedFile:
    """IVF-PQ by faiss, which lives in a process of its own."""

    FILE, TRAINED, ENCODED = "index.faiss", "trained.faiss", "codes.u8"

    def __init__(self, patches: PatchSet) -> None:
        self.patches, self.projection = patches, Projection.read(patches)
        self.probes: int = patches.manifest.index["probes"]
        path = patches.folder / self.FILE
        self.memory = path.stat().st_size + self.projection.memory
        self.faiss = Faiss()
        try:
            self.faiss.ask("load", path=str(path))
        except IndexFailed as error:
            ended = self.faiss.process.poll() is not None
            self.faiss.close()
            if ended or "MemoryError" in str(error):  # nothing is wrong with the file
                raise
            raise UnreadableIndex(str(error)) from error

    @property
    def alive(self) -> bool:
        return self.faiss.process.poll() is None

    @classmethod
    def build(cls, patches: PatchSet, seed: int, report: Report) -> dict[str, Any]:
        index, trained, encoded = (patches.folder / f for f in (cls.FILE, cls.TRAINED, cls.ENCODED))
        dimensions = min(DIMENSIONS, patches.geometry.values)
        lists = list_count(len(patches))
        codes = CODES if dimensions == DIMENSIONS else dimensions
        if not index.is_file():
            with Faiss() as faiss:
                report("training", 0, 1)
                projection = Projection.of(patches, seed, dimensions)
                if not trained.is_file():
                    count = max(lists * faiss_process.COARSE_SAMPLES, LEAST_TRAINING)
                    ids = _sample(patches, count, np.random.default_rng(seed + 1))
                    parts = np.array_split(ids, 1 + len(ids) // _rows(patches))
                    vectors = np.concatenate([projection(patches.flat(part)) for part in parts])
                    with replacing(trained) as temporary:
                        faiss.ask("train", vectors, lists=lists, codes=codes, path=str(temporary))
                ((_, width),) = faiss.ask("load", path=str(trained))

                def encode(flat: Bytes) -> Bytes:
                    (codes,) = faiss.ask("encode", projection(flat))
                    return codes

                _append(patches, encoded, encode, width, report)
                with replacing(index) as temporary:
                    stored: Bytes = np.memmap(encoded, np.uint8, "r").reshape(-1, width)
                    for first in range(0, len(stored), PACKED):
                        report("packing", first, len(stored))
                        faiss.ask("add", stored[first : first + PACKED], first=first)
                    faiss.ask("write", path=str(temporary))
        for path in (trained, encoded):
            path.unlink(missing_ok=True)
        return {
            "dimensions": dimensions,
            "codes": codes,
            "lists": lists,
            "probes": probe_count(lists),
        }

    def candidates(self, queries: Bytes, count: int, excluded: Ids) -> Ids:
        ranges = np.stack([excluded, excluded + 1], axis=1) * self.patches.per_image
        (found,) = self.faiss.ask(
            *("search", self.projection(queries), ranges),
            count=max(CANDIDATES, 4 * count),
            at_least=count,
            probes=self.probes,
        )
        return found

    def close(self) -> None:
        self.faiss.close()


class RandomLines:
    """Prioritized DCI on the pixels, as the paper has it; its files are mapped into memory."""

    PROJECTED, WRITTEN = "projected.f32", "dci.json"
    alive = True

    def __init__(self, patches: PatchSet) -> None:
        self.patches = patches
        self.retrieve: int = patches.manifest.index["retrieve"]
        self.dci = PrioritizedDCI.load(patches.folder)
        if (self.dci.points, self.dci.dimensions) != (len(patches), patches.geometry.values):
            raise UnreadableIndex(f"The index in {patches.folder} is not of the patches there.")
        self.memory = len(patches) * self.dci.bytes_per_point + self.dci.directions.nbytes

    @classmethod
    def build(cls, patches: PatchSet, seed: int, report: Report) -> dict[str, Any]:
        projected = patches.folder / cls.PROJECTED
        if not (patches.folder / cls.WRITTEN).is_file():
            directions = dci.draw(
                patches.geometry.values, simple=SIMPLE, composite=COMPOSITE, seed=seed
            )

            def project(flat: Bytes) -> Floats:
                return dci.project(flat, directions)

            _append(patches, projected, project, 4 * SIMPLE * COMPOSITE, report)
            lines = cls._lines(patches, np.memmap(projected, np.float32, "r"), report)
            dci.write(patches.folder, directions, len(patches), lines)
        projected.unlink(missing_ok=True)
        retrieve = retrieve_count(len(patches))
        return {"simple": SIMPLE, "composite": COMPOSITE, "retrieve": retrieve}

    @staticmethod
    def _lines(patches: PatchSet, projected: Floats, report: Report) -> Iterator[Floats]:
        """All patches' projections [P] on one line after the other; the file has them by block."""
        count = SIMPLE * COMPOSITE
        for line in range(count):
            report("sorting", line, count)
            starts = ((count * ids[0] + line * len(ids), len(ids)) for ids in _blocks(patches))
            yield np.concatenate([projected[start : start + size] for start, size in starts])

    def candidates(self, queries: Bytes, count: int, excluded: Ids) -> Iterator[Ids]:
        hidden = np.isin(np.arange(len(self.patches.manifest.images)), excluded)
        return self.dci.candidates(
            queries,
            retrieve=max(self.retrieve, 4 * count),
            exclude=hidden.repeat(self.patches.per_image) if len(excluded) else None,
        )

    def close(self) -> None:
        pass


# What a set's index may be, and which kind a backend makes of a large set.
KINDS: dict[str, type[Index]] = {"exact": Exact, "ivf-pq": InvertedFile, "dci": RandomLines}
BACKENDS = {"faiss": "ivf-pq", "dci": "dci"}


def list_count(patches: int) -> int:
    """Lists of an inverted file: about as many as a list has patches, a power of two."""
    return int(2 ** round(math.log2(patches) / 2))


def probe_count(lists: int) -> int:
    """Lists that a search looks through: a sixteenth of them, within bounds."""
    return min(lists, max(LEAST_PROBES, min(MOST_PROBES, lists // 16)))


def retrieve_count(patches: int) -> int:
    """Candidates that each composite index of DCI gives."""
    return int(RETRIEVED * max(0.5, (patches / RETRIEVED_OF) ** 0.8))


class Faiss:
    """A process with faiss in it. Raises ModuleNotFoundError where faiss is not installed."""

    def __init__(self) -> None:
        if not find_spec("faiss"):
            raise ModuleNotFoundError("No module named 'faiss'", name="faiss")
        # -P: what lies beside the file must not hide a module of the same name.
        command = [sys.executable, "-P", faiss_process.__file__]
        self.process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, question: str, *arrays: NDArray[Any], **settings: Any) -> Arrays:
        """What `faiss_process.Server` answers. Raises IndexFailed, and OSError as it did there."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            send(self.process.stdin, {"ask": question, **settings}, arrays)
            header, answer = receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            status = self.process.wait()
            raise IndexFailed(
                f"The process with faiss in it ended (status {status}), perhaps for want of memory."
            ) from None
        if number := header.get("errno"):
            raise OSError(number, os.strerror(number), settings.get("path"))
        if error := header.get("error"):
            raise IndexFailed(f"faiss could not {question}: {error}.")
        return answer

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _rows(patches: PatchSet) -> int:
    """Patches in a block of BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (4 * patches.geometry.values))


def _blocks(patches: PatchSet, done: int = 0) -> Iterator[Ids]:
    """The ids of all patches, block by block, without the first `done` blocks."""
    rows = _rows(patches)
    for start in range(done * rows, len(patches), rows):
        yield np.arange(start, min(start + rows, len(patches)))


def _append(
    patches: PatchSet,
    path: Path,
    code: Callable[[Bytes], NDArray[Any]],
    width: int,
    report: Report,
) -> None:
    """Appends `code` of all patches, `width` bytes each, to a file, going on where it ends."""
    size = _rows(patches) * width
    with path.open("ab") as file:
        # Without its last block: if the machine lost power, that may be of zeros.
        done = max(0, file.tell() // size - 1)
        file.truncate(done * size)
        for ids in _blocks(patches, done):
            report("patches", int(ids[0]), len(patches))
            file.write(code(patches.flat(ids)).tobytes())
            sync(file)


def _sample(patches: PatchSet, count: int, rng: np.random.Generator) -> Ids:
    """The ids of `count` random patches, or of all, in order."""
    return np.sort(rng.choice(len(patches), min(count, len(patches)), replace=False, shuffle=False))


def _principal(sample: Bytes, dimensions: int, rng: np.random.Generator) -> Floats:
    """The mean of `sample` [S, D], and below it its turned principal components, [1 + d, D].

    By subspace iteration: four rounds find a subspace of as much energy as the exact one.
    """
    flat = sample.astype(np.float32)
    mean = flat.mean(axis=0, dtype=np.float64).astype(np.float32)
    flat -= mean
    width = min(2 * dimensions, flat.shape[1])
    basis = rng.standard_normal((flat.shape[1], width), dtype=np.float32)
    for _ in range(4):
        basis = np.linalg.qr(flat.T @ (flat @ basis))[0]
    _, _, components = np.linalg.svd(flat @ basis, full_matrices=False)
    turn = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0].astype(np.float32)
    return np.concatenate([mean[None], turn @ components[:dimensions] @ basis.T])
