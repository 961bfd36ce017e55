"""faiss in a process of its own: two OpenMP runtimes in one, faiss's and torch's, crash on macOS.

Run by its path (core.patches.neighbours does), so that nothing but faiss and numpy is opened.
Requests come on standard input, answers go to standard output, as `send` writes them: the length
of a JSON header in 8 bytes, the header, and the bytes of the arrays that it describes. When the
input ends, so does the process, even in the middle of its work.
"""

import importlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Arrays = tuple[NDArray[Any], ...]
KMEANS_ITERATIONS = 10
# Samples for each of a quantiser's centroids: more make the index no better.
COARSE_SAMPLES, CODE_SAMPLES = 64, 64


def send(stream: IO[bytes], header: Mapping[str, Any], arrays: Arrays = ()) -> None:
    """Writes a message."""
    described = [[array.dtype.str, array.shape] for array in arrays]
    text = json.dumps({**header, "arrays": described}).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
        stream.write(np.ascontiguousarray(array).tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], Arrays]:
    """Reads a message. Raises EOFError where there is none."""
    size = int.from_bytes(_exactly(stream, 8), "little")
    header: dict[str, Any] = json.loads(_exactly(stream, size))
    arrays = []
    for text, shape in header.pop("arrays"):
        dtype = np.dtype(text)
        data = _exactly(stream, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays.append(np.frombuffer(data, dtype).reshape(shape))
    return header, tuple(arrays)


class Server:
    """An inverted file of product-quantised vectors (IVF-PQ), and what can be asked of it."""

    def __init__(self, faiss: Any) -> None:
        self.faiss = faiss
        self.index: Any = None

    def train(self, sample: NDArray[np.float32], *, lists: int, codes: int, path: str) -> Arrays:
        """Learns the quantisers from `sample` [S, D] and writes the empty index to `path`."""
        size = sample.shape[1]
        index = self.faiss.IndexIVFPQ(self.faiss.IndexFlatL2(size), size, lists, codes, 8)
        # Tables that save arithmetic would take half as much memory again as the codes.
        index.use_precomputed_table = -1
        for clustering, samples in ((index.cp, COARSE_SAMPLES), (index.pq.cp, CODE_SAMPLES)):
            clustering.niter = KMEANS_ITERATIONS
            clustering.max_points_per_centroid = samples
            clustering.min_points_per_centroid = 1  # fewer are no reason for a warning
        index.train(sample)
        self.index = index
        return self.write(path=path)

    def load(self, *, path: str) -> Arrays:
        """Opens the index at `path`; how many vectors it has, and of how many bytes [2]."""
        self.index = self.faiss.read_index(path, self.faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        return (np.array([self.index.ntotal, self.index.sa_code_size()]),)

    def encode(self, vectors: NDArray[np.float32]) -> Arrays:
        """The codes [B, bytes] of vectors [B, D], their lists' numbers in front."""
        return (self.index.sa_encode(vectors),)

    def add(self, codes: NDArray[np.uint8], *, first: int) -> Arrays:
        """Adds vectors by their codes; they have the ids from `first` on."""
        self.index.add_sa_codes(codes, np.arange(first, first + len(codes)))
        return ()

    def write(self, *, path: str) -> Arrays:
        """Writes the index to `path`."""
        with open(path, "wb") as file:  # Python's own, which tells a full disk from other errors
            writer = self.faiss.PyCallbackIOWriter(file.write, 2**20)
            self.faiss.write_index(self.index, writer)
        return ()

    def search(
        self,
        queries: NDArray[np.float32],
        excluded: NDArray[np.int64],
        *,
        count: int,
        at_least: int,
        probes: int,
    ) -> Arrays:
        """The ids [Q, count] nearest to queries [Q, D], none of `excluded` [E, 2], from and to.

        Looks through `probes` lists, and through more where they hold fewer than `at_least`.
        Where there are fewer than `count`, -1 stands at the end of a row.
        """
        settings: dict[str, Any] = {}
        if len(excluded):
            ids = np.concatenate([np.arange(start, end) for start, end in excluded])
            settings["sel"] = self.faiss.IDSelectorNot(self.faiss.IDSelectorBatch(ids))
        while True:
            chosen = self.faiss.SearchParametersIVF(nprobe=probes, **settings)
            _, found = self.index.search(queries, count, params=chosen)
            if probes >= self.index.nlist or (found[:, at_least - 1] >= 0).all():
                return (found,)
            probes *= 4


def main() -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the input
    requests = queue.Queue[tuple[dict[str, Any], Arrays]]()

    def read() -> None:
        try:
            while True:
                requests.put(receive(sys.stdin.buffer))
        except BaseException:
            os._exit(0)  # the parent is gone, and what it asked for with it

    threading.Thread(target=read, daemon=True).start()
    # What libraries print must not come between two answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = Server(importlib.import_module("faiss"))  # here only: others import `send`
    while True:
        header, arrays = requests.get()
        ask: Callable[..., Arrays] = getattr(server, header.pop("ask"))
        try:
            reply: tuple[dict[str, Any], Arrays] = {}, ask(*arrays, **header)
        except OSError as error:
            reply = {"errno": error.errno}, ()
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}, ()
        send(answers, *reply)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


if __name__ == "__main__":
    main()
