"""How many bytes a job takes on its device, known before it starts, beside those that are free."""

import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.certify import LOOKED
from core.engine import DECAYS, FILL, SMALL_IMAGE
from core.errors import CoreError
from core.interpolate import chunk
from core.patches.windows import Windows
from core.spec import CollisionSpec
from core.taps import Tap

FLOAT = 4
# Of a row and unit: the seven coefficients of its loss, those of them that its group keeps as well,
# and what is made of them while a gradient is.
COEFFICIENTS, KEPT, MADE = 7, 3, 4
# Of control parameters: their gradient, and two more while those of several jobs are put together.
GRADIENTS = 3
# Rows that join an engine are there three times: as admitted, stacked, and filled up.
JOINING = 3
# A checkpoint is there twice, as tensors and as bytes.
CHECKPOINT = 2
# An image is composed, then has a gradient, beside three maps of a channel each.
COMPOSED = 3
CGROUP = Path("/sys/fs/cgroup")


class TooLittleMemory(CoreError):
    """The job takes more memory than there is."""

    code = "out_of_memory"


class MemoryBusy(CoreError):
    """Other jobs hold the memory that this one needs; it waits until it is alone."""

    code = "memory_busy"


class Footprint:
    """What jobs at one layer of a network take on its device in bytes, the network left out.

    Tensors are counted as `core.engine` and `core.outcome` hold them. What a pass takes for each
    image is measured with one, when it is first asked for. Proofs and the exact solver are not
    counted: they have limits of their own.
    """

    def __init__(self, tap: Tap, working_tap: Tap, image: Tensor) -> None:
        """`image` [1, C, H, W] is any; `working_tap` optimises, `tap` measures."""
        self._tap, self._working, self._image = tap, working_tap, image
        self._passes: dict[tuple[bool, bool, bool], int] = {}
        self.checkpoints = False  # whether they are taken of jobs while these are stepped

    def check(
        self, spec: CollisionSpec, windows: Windows | None = None, *, promised: int | None = None
    ) -> None:
        """That a job of `spec`, with `windows` if it is one of patches, fits into free memory.

        Where there are other jobs, which will give back what this process holds, `promised` are
        the bytes that they may still take.

        Raises:
            TooLittleMemory: it does not fit, even alone.
            MemoryBusy: it would fit alone.
        """
        device = self._image.device
        steps, measuring = self.steps(spec, windows), self.measuring(spec)
        needed, there = max(steps, measuring), free(device)
        if needed <= there - (promised or 0):
            return
        if promised is not None and needed <= there + _own(device):
            raise MemoryBusy()
        if measuring > steps and spec.worst_starts:
            less = "fewer worst_starts"
        elif measuring > steps:
            less = "a smaller network"
        elif windows:
            less = "fewer corners, a larger patches.stride or smaller patches.surround"
        else:
            less = "fewer corners"
        raise TooLittleMemory(
            f"The job takes {_told(needed)} of memory and {_told(there)} are free; take {less}, or "
            "a machine with more."
        )

    def steps(self, spec: CollisionSpec, windows: Windows | None = None) -> int:
        """Bytes at most while the job is in an engine, with or without other jobs."""
        if spec.solver != "gradient":
            return 0
        values, units = self._image.numel(), self._tap.layer.units
        points = spec.rows - spec.corners
        corners = _filled(spec.corners, values)
        each = windows.parameters if windows else values
        parameters = corners * each
        mean, square = DECAYS[spec.optimizer]
        moving = (1 + bool(mean) + bool(square)) * parameters
        state = moving + parameters + COEFFICIENTS * corners * units
        group = spec.corners * values + KEPT * spec.rows * units
        if windows:
            group += 3 * windows.parameters
        if self._image.device.type == "cpu":
            snapshots = 2 * spec.snapshots * spec.corners * values
            group += snapshots
            if self.checkpoints:
                group += CHECKPOINT * (moving + parameters + spec.corners * values + snapshots)
        rows = corners + _filled(points, values)
        logits = spec.objective == "hull" and bool(spec.hull.margin)
        network = rows * (self._per_image(True, logits, True) // FLOAT + MADE * units)
        if points:
            network += rows * values
        if windows:
            network += COMPOSED * corners * values
        step = state + moving + max(network, GRADIENTS * parameters if windows else 0)
        return FLOAT * (group + max(JOINING * state, step))

    def measuring(self, spec: CollisionSpec) -> int:
        """Bytes at most while corners, samples and the worst point are measured."""
        values, units, k = self._image.numel(), self._tap.layer.units, spec.corners
        most = chunk(self._image[0])
        looked = min(most, max(k, spec.interpolation.samples, spec.ball_samples))
        taken = looked * (self._per_image(False, True, False) + FLOAT * (2 * values + MADE * units))
        if spec.worst_starts:
            starts = min(most, max(spec.worst_starts, min(LOOKED, k * (k + 1) // 2 + 1)))
            descent = starts * (self._per_image(False, True, True) + FLOAT * values)
            taken = max(taken, descent)
        # In float64 for distances, twice.
        return taken + FLOAT * k * (5 * values + KEPT * units)

    def _per_image(self, working: bool, logits: bool, backward: bool) -> int:
        """What a pass to the layer, or on to the `logits`, adds at most, its results included."""
        key = working, logits, backward
        if key not in self._passes:
            tap = self._working if working else self._tap
            run = tap.observe if logits else tap

            def once() -> None:
                leaf = self._image.detach().requires_grad_(backward)
                with torch.set_grad_enabled(backward):
                    seen = run(leaf)
                    if backward:
                        outputs = seen if isinstance(seen, tuple) else (seen,)
                        ones = [torch.ones_like(output) for output in outputs]
                        torch.autograd.grad(outputs, leaf, ones)

            self._passes[key] = most(once)
        return self._passes[key]


def free(device: torch.device) -> int:
    """Bytes that may still be taken, those included that torch holds in store."""
    if device.type == "cuda":
        stored = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + stored
    available: int = psutil.virtual_memory().available
    return min(available, _granted())


def most(run: Callable[[], object]) -> int:
    """The bytes that `run` adds at most to those that tensors take, on any device.

    Other threads do not count, unlike in the statistics of a device. What libraries take for
    themselves while they compute is left out.
    """
    counting = _Counting()
    with counting:
        run()
    return counting.most


class _Counting(TorchDispatchMode):
    """Follows the tensors that operations make, until they are gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._live: dict[int, object] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._note((args, kwargs), made=False)  # what comes in was there before
        out = func(*args, **kwargs)
        self._note(out, made=True)
        return out

    def _note(self, values: object, *, made: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if made else 0
            if key not in self._live:
                self._live[key] = weakref.ref(storage, partial(self._gone, key, size))
                self.now += size
                self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._live[key]
        self.now -= size


def _own(device: torch.device) -> int:
    """Bytes that this process holds: somewhat more than its jobs do, never less."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident: int = psutil.Process().memory_info().rss
    return resident


def _granted() -> int:
    """Bytes that a container may still take; as good as infinite without a limit.

    Limits of cgroup v1 are not looked at.
    """
    try:
        limit = int((CGROUP / "memory.max").read_text())
        taken = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        cached = int(stat["inactive_file"]) + int(stat["active_file"])  # given up when asked for
    except (OSError, ValueError, KeyError):  # no cgroup v2, or "max"
        return sys.maxsize
    return limit - taken + cached


def _filled(rows: int, values: int) -> int:
    """With the engine's fillers for images of so many values."""
    return rows + (-rows % FILL if values <= SMALL_IMAGE else 0)


def _told(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
