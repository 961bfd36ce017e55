"""Runs a command that ends when whoever started it ends, however that happens.

    python -m polycollide.tether [--grace S] [--signal NAME] [--user NAME] -- COMMAND...

Standard input is the tether: a pipe or socket whose other end only the parent holds. The command's
pid is written to it (or why there is none); when it ends, the command gets the signal, then after
the grace SIGKILL with all of its group. The exit status is the command's, 128 + N for signal N.
Only the standard library is imported, so that it starts in no time, without site-packages.
"""

import argparse
import ctypes
import os
import pwd
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ORPHANS = Path("/proc/thread-self/children")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main() -> int:
    """Starts the command and waits for its end, or for the end of the tether."""
    parser = argparse.ArgumentParser(prog="tether")
    parser.add_argument("--grace", type=float, default=10.0)
    parser.add_argument("--signal", type=lambda name: signal.Signals[name], default=signal.SIGTERM)
    parser.add_argument("--user", type=pwd.getpwnam)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()

    # Signals arrive as bytes beside the tether, so that one select waits for all there is.
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become our children
    try:
        child = _start(options.command, options.user)
    except OSError as error:
        _report(str(error))
        return 127
    _report(str(child.pid))

    watched, deadline = [0, signals], None
    while child.poll() is None:
        left = deadline - time.monotonic() if deadline else None
        if left is not None and left <= 0:
            break
        ready, _, _ = select.select(watched, [], [], left)
        for byte in os.read(signals, 64) if signals in ready else b"":
            if byte in FORWARDED:
                child.send_signal(byte)
        if 0 in ready and not _more():
            watched, deadline = [signals], time.monotonic() + options.grace
            child.send_signal(options.signal)
    # The group may outlive the command; macOS calls a group of zombies forbidden.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    status = child.wait()
    _end_orphans()
    return status if status >= 0 else 128 - status


def _start(command: list[str], user: pwd.struct_passwd | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - running what it is given is what it is for
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
        preexec_fn=_die_with_parent(),
    )


def _die_with_parent() -> Callable[[], object] | None:
    """What the child calls last, since a change of user forgets it: kill -9 of us kills it too."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_orphans() -> None:
    """Kills what left the group and then lost its parent, as Postgres's own processes do."""
    with suppress(FileNotFoundError, ChildProcessError):
        while True:
            for pid in ORPHANS.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            os.wait()


def _report(line: str) -> None:
    with suppress(OSError):  # a pipe has no way back
        os.write(0, f"{line}\n".encode())


def _more() -> bytes:
    try:
        return os.read(0, 64)
    except ConnectionResetError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
