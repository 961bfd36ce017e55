"""The local stack: a Postgres and a Redis that end with the process that started them.

    with stack.servers() as urls:
        urls.database, urls.redis

Used by `polycollide up` and by the tests. A server comes from a URL in the environment, from PATH
or from a wheel, in this order. It listens on 127.0.0.1 alone, with a random password, and keeps its
data in a directory of ours. That directory belongs to whoever runs polycollide, and so do the
secrets in it; only `postgres/` and `redis/` belong to the servers' user, who is another one for
root, since Postgres refuses to run as root.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from platformdirs import user_data_path

from polycollide import binaries
from polycollide.binaries import INSTALL
from polycollide.process import Process, StackError, locked, start_process

__all__ = [
    *("Postgres", "Process", "Redis", "Server", "StackError", "Urls"),
    *("default_data", "servers", "start_process"),
]

READY_WITHIN = 60.0  # s; after a crash Postgres first replays its log
# Below what Linux and macOS hand out to outgoing connections: a client that tries a stopped server
# again and again could otherwise be given its port, connect to itself and keep it.
PORTS = range(20_000, 32_000)


class Urls(NamedTuple):
    """Where the servers are, passwords included, and the processes of those started here."""

    database: str
    redis: str
    processes: tuple[Process, ...] = ()


@contextmanager
def servers(data: Path | None = None, *, durable: bool = True) -> Iterator[Urls]:
    """Starts what `POLYCOLLIDE_DATABASE_URL` and `POLYCOLLIDE_REDIS_URL` do not name."""
    data = data or default_data()
    with ExitStack() as started:
        processes: list[Process] = []

        def start(kind: type[Server]) -> str:
            server = started.enter_context(kind.start(data, durable=durable))
            processes.extend([server.process] if server.process else [])
            return server.url

        database = os.environ.get("POLYCOLLIDE_DATABASE_URL") or start(Postgres)
        redis = os.environ.get("POLYCOLLIDE_REDIS_URL") or start(Redis)
        yield Urls(database, redis, tuple(processes))


def default_data() -> Path:
    """Where data is kept: for root not at home, where the servers' user may not go."""
    try:
        return Path("/var/lib/polycollide") if os.geteuid() == 0 else user_data_path("polycollide")
    except RuntimeError:
        raise StackError("There is no home folder for the data; name one with --data.") from None


class Server(ABC):
    """A server on 127.0.0.1, started and ready."""

    name: ClassVar[str]
    grace: ClassVar[float]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, data: Path, durable: bool) -> None:
        self.data = data.absolute()
        self.home = self.data / self.name
        self.log = self.data / f"{self.name}.log"
        self.durable = durable
        self.user = binaries.servers_user()
        self.port = 0
        self.password = ""
        self.process: Process | None = None

    @classmethod
    def start(cls, data: Path, *, durable: bool = True) -> Self:
        """Starts one on its data in `data`; without `durable`, a power cut may lose them."""
        server = cls(data, durable)
        server._launch()
        return server

    def stop(self) -> None:
        """Ends it in good order."""
        if self.process:
            self.process.stop()

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self.process:
            self.process.kill()

    def restart(self) -> None:
        """Ends it unless it has ended, and starts it again with the same URL."""
        self.stop()
        self._launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, with the password."""

    @abstractmethod
    def _prepare(self) -> Path:
        """Finds the server and makes its files; called with the lock held."""

    @abstractmethod
    def _command(self, binary: Path) -> list[str]:
        """The server's command line; its working directory is `home`."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it can be used by now."""

    def _launch(self) -> None:
        binaries.own_directory(self.data, self.user)
        # What a killed owner leaves behind ends within its grace.
        with locked(self.data / f"{self.name}.lock", self.grace + 5) as lock:
            binary = self._prepare()
            chosen = bool(self.port)
            # Again, because someone may have taken the port, or what a crash left behind may still
            # be about to end (Postgres's processes notice the end of their parent one by one).
            for pause in (0.2, 0.6, None):
                self.port = self.port if chosen else _free_port()
                self.process = start_process(
                    self.name,
                    self._command(binary),
                    env=binaries.plain_environment(),
                    cwd=self.home,
                    user=self.user.pw_name if self.user else None,
                    grace=self.grace,
                    stop_signal=self.stop_signal,
                    log=self.log,
                    held=[lock],
                )
                if self._ready(self.process):
                    return
                if pause:
                    time.sleep(pause)
        said = _last(self.log.read_text(errors="replace"))
        raise StackError(f"{self.name} ended while it started, see {self.log}: {said}")

    def _ready(self, process: Process) -> bool:
        """Waits until it answers; False when it has ended instead."""
        deadline = time.monotonic() + READY_WITHIN
        try:
            while process.alive:
                if self._answers():
                    return True
                if time.monotonic() > deadline:
                    raise StackError(f"{self.name} does not answer, see {self.log}.")
                time.sleep(0.03)
        except BaseException:
            process.stop()
            raise
        process.stop()
        return False


class Postgres(Server):
    """A Postgres with a database and a role `polycollide`; its superuser cannot log in."""

    name = "postgres"
    grace = 30.0
    stop_signal = signal.SIGINT  # disconnects clients; SIGTERM would wait for them

    @property
    def url(self) -> str:
        return f"postgresql://polycollide:{self.password}@127.0.0.1:{self.port}/polycollide"

    def _prepare(self) -> Path:
        binary = binaries.find_postgres(self.home, self.user)
        access = "host all polycollide 127.0.0.1/32 scram-sha-256\n"
        binaries.write(self.data / "pg_hba.conf", access, self.user)
        secret = self.data / "postgres.password"
        if not self.home.exists():
            binaries.write(secret, secrets.token_urlsafe(24))
            self._create(binary, secret.read_text())
        elif not secret.exists():
            raise StackError(f"The password of {self.home} is lost; bring back {secret}.")
        self.password = secret.read_text()
        return binary

    def _create(self, binary: Path, password: str) -> None:
        """Makes the data directory, aside, so that a half-made one is never taken for whole."""
        new = self.home.with_name("postgres.new")
        shutil.rmtree(new, ignore_errors=True)
        binaries.their_directory(new, self.user)
        initdb = [str(binary.with_name("initdb")), f"--pgdata={new}", "--username=postgres"]
        initdb += ["--auth=reject", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        initdb += [] if self.durable else ["--no-sync"]
        made = binaries.run(initdb, self.user)
        if made.returncode:
            raise StackError(f"initdb failed in {new}: {_last(made.stdout)}")
        roles = (
            f"CREATE ROLE polycollide LOGIN CREATEDB PASSWORD '{password}'\n"
            "CREATE DATABASE polycollide OWNER polycollide\n"
        )
        made = binaries.run([str(binary), "--single", "-D", str(new), "postgres"], self.user, roles)
        if made.returncode or re.search("ERROR|FATAL|PANIC", made.stdout):
            raise StackError(f"The database could not be created in {new}.")
        new.rename(self.home)

    def _command(self, binary: Path) -> list[str]:
        settings = {
            "hba_file": self.data / "pg_hba.conf",
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            # None, whose paths might not be longer than 107 bytes.
            "unix_socket_directories": "",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self.durable:
            settings |= dict.fromkeys(("fsync", "synchronous_commit", "full_page_writes"), "off")
        given = [f"--{name}={value}" for name, value in settings.items()]
        return [str(binary), "-D", str(self.home), *given]

    def _answers(self) -> bool:
        try:
            import psycopg
        except ModuleNotFoundError:
            raise StackError(f"Postgres needs psycopg: {INSTALL}.") from None
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


class Redis(Server):
    """A Redis or Valkey; its password is new at each start."""

    name = "redis"
    grace = 10.0
    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> Path:
        self.password = self.password or secrets.token_urlsafe(24)
        binaries.their_directory(self.home, self.user)
        return binaries.find_redis(self.home, self.user)

    def _command(self, binary: Path) -> list[str]:
        settings = (
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\n"
            f"appendonly {'yes' if self.durable else 'no'}\nsave ''\nmaxmemory-policy noeviction\n"
        )
        binaries.write(self.data / "redis.conf", settings, self.user)
        return [str(binary), str(self.data / "redis.conf")]

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with connection.makefile() as answers:
                    return (answers.readline(), answers.readline()) == ("+OK\n", "+PONG\n")
        except OSError:
            return False


def _free_port() -> int:
    for port in secrets.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise StackError(f"No port from {PORTS.start} to {PORTS.stop} is free on 127.0.0.1.")


def _last(said: str) -> str:
    """The last words, on one line."""
    return " / ".join(said.strip().splitlines()[-3:])
