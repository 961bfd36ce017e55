"""Servers and databases for whoever asks for them; a test that does not starts none."""

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tenacity

from polycollide import stack

if TYPE_CHECKING:
    import psutil
    import psycopg

# Workers of pytest-xdist share the cores, and so does what they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

TEMPLATE = "template_polycollide"
ROOT = Path(__file__).parent.parent

# Run in the background by a script, we ignore Ctrl-C, and so would what we start to try it on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def new_data_directory() -> Iterator[Callable[[], Path]]:
    """Names places for data that, unlike pytest's own, the user of root's servers can enter."""
    # Databases, of 8 MB each, are made 20 times faster in memory; a container may have 64 MB of it.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**31
    top = Path(tempfile.mkdtemp(prefix="polycollide-", dir=memory if roomy else None))
    if os.geteuid() == 0:
        top.chmod(0o711)
    yield lambda: top / secrets.token_hex(4)
    shutil.rmtree(top)


@pytest.fixture(scope="session")
def postgres(new_data_directory: Callable[[], Path]) -> Iterator[stack.Postgres]:
    """The session's Postgres, fast and forgetful."""
    with stack.Postgres.start(new_data_directory(), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def redis(new_data_directory: Callable[[], Path]) -> Iterator[stack.Redis]:
    """The session's Redis, which forgets at each restart."""
    with stack.Redis.start(new_data_directory(), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def template_database(postgres: stack.Postgres) -> str:
    """The URL of a database with Alembic's head and no rows, to be copied and never opened."""
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import make_url

    url = _named(postgres.url, TEMPLATE)
    config = Config(ROOT / "alembic.ini")
    config.attributes["url"] = make_url(url).set(drivername="postgresql+psycopg")
    with _administer(postgres) as connection:
        connection.execute(f"CREATE DATABASE {TEMPLATE}")
        command.upgrade(config, "head")
        # A template cannot be copied while someone is connected to it.
        connection.execute(f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false")
    return url


@pytest.fixture(scope="session")
def new_database(postgres: stack.Postgres, template_database: str) -> Iterator[Callable[[], str]]:
    """Makes databases with Alembic's head and no rows; their URLs. All go with the session."""
    made: list[str] = []

    def new() -> str:
        made.append(_copy_template(postgres))
        return _named(postgres.url, made[-1])

    yield new
    for name in made:
        _drop(postgres, name)


@pytest.fixture
def database(postgres: stack.Postgres, template_database: str) -> Iterator[str]:
    """The URL of this test's own database."""
    name = _copy_template(postgres)
    yield _named(postgres.url, name)
    _drop(postgres, name)


@pytest.fixture
def empty_database(postgres: stack.Postgres) -> Iterator[str]:
    """The URL of this test's own database, without tables."""
    name = f"test_{secrets.token_hex(6)}"
    with _administer(postgres) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield _named(postgres.url, name)
    _drop(postgres, name)


@pytest.fixture(scope="session")
def gone() -> Callable[..., bool]:
    """Whether processes have all ended in some seconds; a zombie that nobody collects has."""
    import psutil

    def runs(process: "psutil.Process") -> bool:
        try:
            return bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def gone(processes: "list[psutil.Process]", within: float) -> bool:
        deadline = time.monotonic() + within
        while left := [process for process in processes if runs(process)]:
            if time.monotonic() > deadline:
                print(left)
                return False
            time.sleep(0.02)
        return True

    return gone


def _copy_template(postgres: stack.Postgres) -> str:
    name = f"test_{secrets.token_hex(6)}"
    with _administer(postgres) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
    return name


def _drop(postgres: stack.Postgres, name: str) -> None:
    from psycopg.errors import InsufficientPrivilege

    # Autovacuum, a superuser's process, may be in there, and is not ours to end. It ends soon.
    again = tenacity.retry_if_exception_type(InsufficientPrivilege)
    for attempt in tenacity.Retrying(
        retry=again, wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(60), reraise=True
    ):
        with attempt, _administer(postgres) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _administer(postgres: stack.Postgres) -> "psycopg.Connection":
    import psycopg

    return psycopg.connect(postgres.url, autocommit=True)


def _named(url: str, database: str) -> str:
    return f"{url.rpartition('/')[0]}/{database}"
