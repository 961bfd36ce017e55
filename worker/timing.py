"""Where a worker's time goes, by stage, for its log and the benchmarks."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds by name, of all threads together.

    Under `<name>_cpu` stands what the threads themselves computed: the rest they waited, for a
    core, for the interpreter, or for what they had asked.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of its context to `name`."""
        began, computed = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began
            self._seconds[f"{name}_cpu"] += time.thread_time() - computed

    def take(self) -> dict[str, float]:
        """What has gone since the last call."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return {name: round(seconds, 4) for name, seconds in taken.items()}
