"""Processes that end with the process that started them, however that happens: each on a tether."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from polycollide import tether


class StackError(Exception):
    """Something here did not start, or ended; the message is a sentence that says what to do."""


@dataclass
class Process:
    """A command on a tether: it ends when we do."""

    name: str
    popen: subprocess.Popen[bytes]  # of the tether
    pid: int  # of the command, which leads a group of its own
    grace: float
    stop_signal: signal.Signals
    link: socket.socket
    log: Path | None
    asked: bool = False

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def ask(self) -> None:
        """Asks it to end, and does not wait."""
        if not self.asked:
            self.asked = True
            self.popen.send_signal(self.stop_signal)  # which the tether passes on

    def stop(self, timeout: float | None = None) -> int:
        """Ends it within the grace (or the timeout); its exit status."""
        self.ask()
        try:
            status = self.popen.wait(self.grace if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            return self.kill()
        self.link.close()
        return status

    def kill(self) -> int:
        """Ends its whole group at once, by SIGKILL."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self.link.close()
        return self.popen.wait()


def stop_together(processes: Sequence[Process]) -> None:
    """Asks all to end, then waits for each; one who interrupts us wants them killed."""
    try:
        for process in processes:
            process.ask()
        began = time.monotonic()
        for process in processes:
            process.stop(max(0.0, began + process.grace - time.monotonic()))
    except BaseException:
        for process in processes:
            process.kill()
        raise


def start_process(
    name: str,
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: str | None = None,
    grace: float = 10.0,
    orphan_grace: float | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
    log: Path | None = None,
    held: Collection[int] = (),
) -> Process:
    """Starts a command on a tether, which keeps the descriptors `held` open until it has ended.

    If we end without stopping it, it gets the `orphan_grace`, which is the grace unless given.
    Every user of the machine can read `argv`: secrets go into `env` or a file.
    """
    line = [sys.executable, "-I", "-S", tether.__file__]  # -S: it needs no site-packages
    line += ["--grace", str(grace if orphan_grace is None else orphan_grace)]
    line += ["--signal", stop_signal.name]
    line += ["--user", user] if user else []
    output = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    ours, theirs = socket.socketpair()
    try:
        popen = subprocess.Popen(  # noqa: S603
            [*line, "--", *map(str, argv)],
            stdin=theirs.fileno(),
            stdout=output,
            stderr=output,
            env=env,
            cwd=cwd,
            # Ctrl-C is for us, who then end things in their order.
            start_new_session=True,
            pass_fds=held,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
        if output is not None:
            os.close(output)
    with ours.makefile() as answers:
        answer = answers.readline().strip()
    if answer.isdecimal():
        return Process(name, popen, int(answer), grace, stop_signal, ours, log)
    ours.close()
    popen.wait()
    raise StackError(f"{name} could not be started: {answer or 'its tether broke'}.")


@contextmanager
def locked(path: Path, patience: float) -> Iterator[int]:
    """A lock to be handed to a tether, and so held as long as its command runs.

    An owner that is gone leaves it to a command that is about to end: for that there is patience.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = os.pread(lock, 20, 0).decode()
                if not owner or _runs(int(owner)) or time.monotonic() > deadline:
                    raise StackError(
                        f"{path.parent} is in use by another polycollide (process {owner}): stop "
                        f"it, or choose another directory."
                    ) from None
                time.sleep(0.05)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
