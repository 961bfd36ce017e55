"""Pictures, drawn in a process of its own: matplotlib holds the interpreter for a third of a second
a job, in which no step and no write would get through.

That process reads what to draw from its standard input and answers on its standard output, so that
it ends with whoever started it. (Celery's children may have none of `multiprocessing`.)
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

Pictures = dict[str, bytes]
Task = Callable[[], Pictures]
NICENESS = 10  # who steps, measures and writes comes first
TRIES = 3  # to draw with a process that somebody kills


class Artist:
    """Draws one job after the other; its process starts with the first."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="artist")
        self._process: subprocess.Popen[bytes] | None = None

    def draw(self, task: Task) -> Future[Pictures]:
        """What `task` makes, or why it makes nothing."""
        return self._thread.submit(self._draw, task)

    def _draw(self, task: Task) -> Pictures:
        for _ in range(TRIES):
            with suppress(OSError, EOFError, pickle.UnpicklingError):
                answer = self._ask(task)
                if isinstance(answer, Exception):
                    raise answer
                return answer
            self._end()
        raise ChildProcessError("The process that draws was killed each time.")

    def _ask(self, task: Task) -> Pictures | Exception:
        if self._process is None:
            command = [sys.executable, "-P", "-m", "worker.artist"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)  # noqa: S603
        assert self._process.stdin
        assert self._process.stdout
        pickle.dump(task, self._process.stdin)
        self._process.stdin.flush()
        answer: Pictures | Exception = pickle.load(self._process.stdout)  # noqa: S301 - ours
        return answer

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            with suppress(BrokenPipeError):  # of what it was not told to the end
                self._process.communicate()
        self._process = None


def main() -> None:
    """Draws until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for whatever prints
    while True:
        try:
            task: Task = pickle.load(sys.stdin.buffer)  # noqa: S301 - the worker's
        except EOFError:
            return
        try:
            answer: Pictures | Exception = task()
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")  # any other may not pickle
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
