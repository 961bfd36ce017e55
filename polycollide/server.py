"""The commands that run the service itself: on one machine with `up`, or each part by itself."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import httpx
from pydantic import ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from polycollide import stack
from polycollide.listing import aside, console, fail, listing
from polycollide.stack import Process, StackError
from store import keys
from store.database import connect, migrate
from store.settings import Settings

PYTHON = [sys.executable, "-m"]
API, RECONCILER = [*PYTHON, "api"], [*PYTHON, "worker.reconciler"]
# A worker hands back what it has: a stride and a write, or a chunk of measurement, away.
WORKER_GRACE = 60.0


def up(data: Path | None, port: int) -> None:
    """Everything on this machine, until Ctrl-C: servers, API, reconciler and worker."""
    with in_one_sentence(), ExitStack() as started:
        ended = first_signal()
        data = data or stack.default_data()
        urls = started.enter_context(stack.servers(data))
        local = {
            "POLYCOLLIDE_MODE": "local",
            "POLYCOLLIDE_HOST": "127.0.0.1",
            "POLYCOLLIDE_PORT": str(port),
            "POLYCOLLIDE_DATABASE_URL": urls.database,
            "POLYCOLLIDE_REDIS_URL": urls.redis,
            "POLYCOLLIDE_CHECKPOINT_DIR": str(data / "checkpoints"),
        }
        os.environ.update(local)
        migrate(Settings())
        log = data / "polycollide.log"
        processes = [
            started.enter_context(running("API", API, log=log)),
            started.enter_context(running("reconciler", RECONCILER, log=log)),
            *started.enter_context(worker_processes(log=log)),
        ]
        _wait_for_api(port, processes)
        console.print(f"polycollide is up: http://127.0.0.1:{port}/docs", soft_wrap=True)
        console.print(
            f"Data and log: {data}. Ctrl-C ends it; jobs go on next time.", soft_wrap=True
        )
        watch(processes, ended)


def worker() -> None:
    """One Celery worker for each GPU that is visible, or one on the CPU, until told to end.

    Ends when one of them does, so that whatever watches over it starts them all afresh.
    """
    with in_one_sentence(), worker_processes() as processes:
        watch(processes, first_signal())


def api() -> None:
    """The API alone: the process becomes it."""
    with in_one_sentence():
        Settings()
        os.execv(API[0], API)  # noqa: S606


def reconciler() -> None:
    """The reconciler alone: the process becomes it."""
    with in_one_sentence():
        Settings()
        os.execv(RECONCILER[0], RECONCILER)  # noqa: S606


def migrate_database() -> None:
    """Brings the database's schema up to date."""
    with in_one_sentence():
        migrate(Settings())


def create_key(name: str) -> None:
    """Makes an API key and shows it, this once."""
    with in_one_sentence(), transaction() as connection:
        _, full = keys.create(connection, name)
        console.print(full, soft_wrap=True)
        aside.print("Keep it: it cannot be shown again.")


def list_keys() -> None:
    """Prints the API keys."""
    with in_one_sentence(), transaction() as connection:
        table = listing("prefix", "name", "created", "revoked")
        for key in keys.listed(connection):
            revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else ""
            table.add_row(key.prefix, key.name, f"{key.created_at:%Y-%m-%d %H:%M}", revoked)
        console.print(table)


def revoke_key(prefix: str) -> None:
    """Closes an API key for good."""
    with in_one_sentence(), transaction() as connection:
        if keys.revoke(connection, prefix) is None:
            raise StackError(f"There is no open key {prefix!r}; see `polycollide keys list`.")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or else all GPUs that the driver lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603
    return listed.stdout.split() if listed.returncode == 0 else []


@contextmanager
def worker_processes(*, log: Path | None = None) -> Iterator[list[Process]]:
    """Celery workers, one for each GPU, and beside them who tells what they can serve."""
    place = f"{socket.gethostname()}:{os.getpid()}"
    celery = [*PYTHON, "celery", "--app", "worker.app", "worker", "--concurrency", "1"]
    celery += ["--without-mingle", "--without-gossip", "--loglevel", "WARNING"]
    slots: list[str] = []
    with ExitStack() as started:
        processes = []
        for gpu in visible_gpus() or [""]:
            slots.append(f"{place}:{gpu or 'cpu'}")
            own = {"POLYCOLLIDE_SLOT": slots[-1], "OMP_WAIT_POLICY": "PASSIVE"}
            own |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
            named = [*celery, "--hostname", f"{slots[-1].replace(':', '-')}@%h"]
            process = running(f"worker {slots[-1]}", named, own, grace=WORKER_GRACE, log=log)
            processes.append(started.enter_context(process))
        describe = [*PYTHON, "worker.describe", *slots]
        started.enter_context(running("describe", describe, log=log))
        yield processes


@contextmanager
def running(
    name: str,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    grace: float = 10.0,
    log: Path | None = None,
) -> Iterator[Process]:
    """A process of ours, which ends with this context."""
    process = stack.start_process(name, argv, env=os.environ | (env or {}), grace=grace, log=log)
    try:
        yield process
    finally:
        process.stop()


def first_signal() -> list[int]:
    """What fills up once this process is asked to end."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    return received


def watch(processes: Sequence[Process], ended: Sequence[int]) -> None:
    """Waits until this process is asked to end, or one of those ends by itself."""
    while not ended:
        for process in processes:
            if not process.alive:
                status = process.popen.returncode
                raise StackError(f"The {process.name} ended by itself with status {status}.")
        time.sleep(0.2)


def _wait_for_api(port: int, processes: Sequence[Process]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not processes[0].alive:
            break
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise StackError(f"The API did not start on port {port}; is the port taken? See its log.")


@contextmanager
def transaction() -> Iterator[Connection]:
    """On the settings' database."""
    database = connect(Settings())
    with database.begin() as connection:
        yield connection
    database.dispose()


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Errors that an operator can act on end the command with a sentence, not a traceback."""
    try:
        yield
    except StackError as error:
        message = str(error)
    except ValidationError as error:
        message = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
    except SQLAlchemyError as error:
        message = f"The database does not answer: {str(error).splitlines()[0]}"
    else:
        return
    fail(message)
