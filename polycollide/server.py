"""The commands that run the service itself: on one machine with `up`, or each part by itself."""

import os
import shlex
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
from typing import NamedTuple

import httpx
import typer
from alembic.util import CommandError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy import Connection
from sqlalchemy.exc import ArgumentError, ProgrammingError, SQLAlchemyError

from polycollide import binaries, stack
from polycollide.listing import aside, console, fail, listing
from polycollide.process import Process, StackError, start_process, stop_together
from store import keys, usage
from store.database import connect, migrate
from store.settings import Settings

PYTHON = [sys.executable, "-P", "-m"]  # -P: an api.py of the current folder is not run
API, RECONCILER = [*PYTHON, "api"], [*PYTHON, "worker.reconciler"]
SWEEPER = [*PYTHON, "worker.sweeper"]
# A worker hands back what it has: a stride and a write, or a chunk of measurement, away.
WORKER_GRACE = 60.0
# After a kill -9 of ours nobody waits for that, and `up`'s Postgres ends too: leases recover it.
ORPHAN_GRACE = 5.0
READY_WITHIN = 60.0
UP = "(What `polycollide up` runs needs no keys, unless it was started with --keys.)"
# `timeout` and some shells signal a process and then its group: that is one wish, not two.
ONE_WISH = 0.5


class Part(NamedTuple):
    """A process of the service."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = {}
    grace: float = 10.0
    lasts: bool = True  # else it ends by itself when it has done its work


def up(data: Path | None, port: int, host: str, *, keyed: bool) -> None:
    """Everything on this machine, until Ctrl-C: servers, API, reconciler, sweeper, worker."""
    with in_one_sentence(), ExitStack() as started:
        ended = first_signal()
        if not (keyed or Settings(mode="local", host=host).keyless):
            raise StackError(
                f"On {host} everybody who reaches this machine could use it: add --keys, or leave "
                "--host out."
            )
        _need_port(host, port)
        data = (data or stack.default_data()).absolute()
        with aside.status("Starting Postgres and Redis ...") as status:
            urls = started.enter_context(stack.servers(data))
            os.environ |= {
                "POLYCOLLIDE_MODE": "server" if keyed else "local",
                "POLYCOLLIDE_HOST": host,
                "POLYCOLLIDE_PORT": str(port),
                "POLYCOLLIDE_DATABASE_URL": urls.database,
                "POLYCOLLIDE_REDIS_URL": urls.redis,
                "POLYCOLLIDE_CHECKPOINT_DIR": str(data / "checkpoints"),
            }
            if not ended:
                status.update("Preparing the database ...")
                migrate(Settings())
            if ended:
                return
            parts = [Part("API", API), Part("reconciler", RECONCILER), Part("sweeper", SWEEPER)]
            parts += workers()
            ours = started.enter_context(running(parts, log=data / "polycollide.log"))
            processes = [*urls.processes, *ours]
            status.update("Starting the API and a worker ...")
            ready = _wait_for_worker(_url(_reached(host), port), processes, ended)
        if ended:
            return
        shown = host if _reached(host) == host else socket.gethostname()
        console.print(f"polycollide is up: {_url(shown, port)}/docs", soft_wrap=True)
        console.print(_who_may(data if keyed else None), soft_wrap=True)
        console.print(f"Ctrl-C ends it; jobs go on next time. Data and log: {data}", soft_wrap=True)
        if not ready:
            remark = f"No worker is ready yet; jobs wait for it. See {data / 'polycollide.log'}."
            aside.print(remark, soft_wrap=True)
        watch(processes, ended)
        with aside.status("Ending; jobs are handed back. Ctrl-C ends at once ..."):
            started.close()


def worker() -> None:
    """One Celery worker for each GPU that is visible, or one on the CPU, until told to end.

    Ends when one of them does, so that whatever watches over it starts them all afresh.
    """
    with in_one_sentence():
        ended = first_signal()
        Settings()
        with running(workers()) as processes:
            watch(processes, ended)


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


def sweeper() -> None:
    """The sweeper alone: the process becomes it."""
    with in_one_sentence():
        Settings()
        os.execv(SWEEPER[0], SWEEPER)  # noqa: S606


def migrate_database() -> None:
    """Brings the database's schema up to date."""
    with in_one_sentence():
        migrate(Settings())


def create_key(name: str) -> None:
    """Makes an API key and shows it, this once."""
    with in_one_sentence(UP), transaction() as connection:
        _, full = keys.create(connection, name)
        console.print(full, soft_wrap=True)
        aside.print("Keep it: it cannot be shown again.")


def list_keys() -> None:
    """Prints the API keys."""
    with in_one_sentence(UP), transaction() as connection:
        table = listing("prefix", "name", "created", "revoked", "MiB kept", whole=("prefix",))
        kept = usage.by_key(connection)
        for key in keys.listed(connection):
            revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else ""
            mib = f"{kept[key.id].total / 2**20:,.1f}"
            table.add_row(key.prefix, key.name, f"{key.created_at:%Y-%m-%d %H:%M}", revoked, mib)
        console.print(table)


def revoke_key(prefix: str) -> None:
    """Closes an API key for good."""
    with in_one_sentence(UP), transaction() as connection:
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


def workers() -> list[Part]:
    """Celery workers, one for each GPU, and beside them who tells what they can serve."""
    place = f"{socket.gethostname()}:{os.getpid()}"
    # Quiet, since its banner is no JSON.
    celery = [*PYTHON, "celery", "--quiet", "--app", "worker.app", "worker", "--concurrency", "1"]
    celery += ["--without-mingle", "--without-gossip", "--loglevel", "WARNING"]
    parts, slots = [], []
    for gpu in visible_gpus() or [""]:
        slot = f"{place}:{gpu or 'cpu'}"
        own = {"POLYCOLLIDE_SLOT": slot, "OMP_WAIT_POLICY": "PASSIVE"}
        own |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        named = [*celery, "--hostname", f"{slot.replace(':', '-')}@%h"]
        parts.append(Part(f"worker {slot}", named, own, WORKER_GRACE))
        slots.append(slot)
    return [*parts, Part("describe", [*PYTHON, "worker.describe", *slots], lasts=False)]


@contextmanager
def running(parts: Sequence[Part], *, log: Path | None = None) -> Iterator[list[Process]]:
    """Processes that end together with this context; those that should last until then."""
    started: list[Process] = []
    try:
        for part in parts:
            env = os.environ | part.env
            process = start_process(
                part.name,
                part.argv,
                env=env,
                grace=part.grace,
                orphan_grace=ORPHAN_GRACE,
                log=log,
            )
            started.append(process)
        yield [process for process, part in zip(started, parts, strict=True) if part.lasts]
    finally:
        stop_together(started)


def first_signal() -> list[int]:
    """What fills up once this process is asked to end; a second Ctrl-C interrupts the ending.

    To be called before anything is started: process 1 of a container, for one, ignores signals
    that it has no handler for.
    """
    received: list[int] = []
    at = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal at
        received.append(number)
        at = at or time.monotonic()
        if number == signal.SIGINT and time.monotonic() - at > ONE_WISH:
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    return received


def watch(processes: Sequence[Process], ended: Sequence[int]) -> None:
    """Waits until this process is asked to end, or one of those ends by itself."""
    while not ended:
        _all_alive(processes)
        time.sleep(0.2)


def _all_alive(processes: Sequence[Process]) -> None:
    for process in processes:
        if not process.alive:
            status = process.popen.returncode
            see = f"; see {process.log}" if process.log else ""
            raise StackError(f"The {process.name} ended by itself with status {status}{see}.")


def _reached(host: str) -> str:
    """Where this machine itself reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _who_may(keyed: Path | None) -> str:
    """Who can use what is up; with keys, it is told how to make one for the data there."""
    if keyed is None:
        return "It asks for no key: every user of this machine can use it (--keys asks for one)."
    names = [f"POLYCOLLIDE_{name}" for name in ("MODE", "DATABASE_URL")]
    given = "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names)
    file = keyed / "environment"  # with a password
    binaries.write(file, given)
    return (
        f"It asks for keys: `. {file}; polycollide keys create NAME` makes one. They travel as "
        "they are: before a network that is not your own put a proxy that speaks TLS."
    )


def _need_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the API will
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StackError(
                f"Port {port} cannot be used ({error.strerror}): end what listens there, perhaps "
                f"another `polycollide up`, or choose another one with --port."
            ) from None


def _wait_for_worker(url: str, processes: Sequence[Process], ended: Sequence[int]) -> bool:
    """Waits until a worker has entered itself; whether one did in time."""
    ready, checks = False, {"workers": 0}
    deadline = time.monotonic() + READY_WITHIN
    # No proxy of the environment's stands between us and ourselves.
    with httpx.Client(base_url=url, trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline and not ended:
            _all_alive(processes)
            try:
                answer = client.get("/readyz")
                ready, checks = answer.is_success, answer.json()["checks"]
            except httpx.TransportError:
                ready = False
            if ready and checks["workers"]:
                return True
            time.sleep(0.1)
    if not ready and not ended:
        raise StackError(f"The API does not answer at {url}; see {processes[-1].log}.")
    return False


@contextmanager
def transaction() -> Iterator[Connection]:
    """On the settings' database."""
    database = connect(Settings())
    with database.begin() as connection:
        yield connection
    database.dispose()


@contextmanager
def in_one_sentence(hint: str = "") -> Iterator[None]:
    """Errors that an operator can act on end the command with a sentence, not a traceback.

    `hint` is for those who may be at the wrong database, or at none.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except StackError as error:
        message, hint = str(error), ""
    except ValidationError as error:
        message = "; ".join(map(_of_setting, error.errors()))
    except ArgumentError:
        message = "POLYCOLLIDE_DATABASE_URL is not the URL of a database."
    except ProgrammingError as error:
        said = str(error.orig).splitlines()[0]
        message = f"The database is not as expected ({said}): run `polycollide migrate`."
    except SQLAlchemyError as error:
        message = f"The database does not answer: {str(error).splitlines()[0]}"
    except CommandError as error:
        message = f"The database cannot be migrated; it may be newer than this program: {error}"
    else:
        return
    fail(f"{message} {hint}".rstrip())


def _of_setting(error: ErrorDetails) -> str:
    """What is wrong with a setting, and with which; never its value, which may be a secret."""
    name = "".join(f"POLYCOLLIDE_{part}: ".upper() for part in error["loc"][:1])
    return name + error["msg"].removeprefix("Value error, ")
