"""What a job found, as the files of a folder: the names that `polycollide run --out` writes."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from polycollide.answers import Job
from polycollide.errors import InvalidInput

# What a result may leave in a folder; all of it goes before another result comes in.
OURS = re.compile(
    r"result\.json|corner-\d+\.png|(corners|samples|snapshots)\.npz"
    r"|(figure|curves|hull|regions|snapshots|worst)\.png"
)
ARTIFACT = re.compile(r"([a-z]+)_(npz|png)")
RESULT = "result.json"
# What a result has left in its folder, as `sha256sum` writes it. Other files are somebody's own.
LIST = ".polycollide.sha256"


def files(job: Job) -> dict[str, tuple[str, ...]]:
    """The files that the service has of a job: their names here, and what to ask it for."""
    count = len(job.urls.get("corners") or ())
    corners = {f"corner-{i}.png": ("corners", f"{i}.png") for i in range(count)}
    matches = (ARTIFACT.fullmatch(name) for name, url in job.urls.items() if url)
    names = sorted(".".join(match.groups()) for match in matches if match)
    return corners | {name: (name,) for name in names}


def of_job(job: Job, contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """`contents`, and the job's result as a file beside them."""
    return {**contents, RESULT: json.dumps(job.result, indent=2).encode()}


def prepare(folder: Path, *, force: bool = False) -> None:
    """Makes `folder`, before the work whose result is to go there.

    Raises InvalidInput where it has files with the names of a result's that no earlier result left
    as they are, unless `force` gives them up, and OSError where nothing can be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check(folder, force)
    TemporaryDirectory(dir=folder).cleanup()


def write(folder: Path, contents: Mapping[str, bytes], *, force: bool = False) -> list[Path]:
    """Puts a result in place of an earlier one, and returns the paths, result.json's first.

    The earlier one stays until all of this one is on the disk. result.json goes first and comes
    last: a folder that has it is whole. No file of somebody's own is touched unless `force` gives
    up those with a result's names. Raises as `prepare` does.
    """
    _check(folder, force)
    names = [RESULT, *(name for name in contents if name != RESULT)]
    with TemporaryDirectory(dir=folder, prefix=".polycollide-") as new:
        for name in names:
            with naming(folder / name):
                Path(new, name).write_bytes(contents[name])
        sums = {name: hashlib.sha256(contents[name]).hexdigest() for name in names}
        listed = "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())
        with naming(folder / LIST):
            Path(new, LIST).write_text(listed)
        (folder / RESULT).unlink(missing_ok=True)
        for file in folder.iterdir():
            if OURS.fullmatch(file.name):
                file.unlink()
        for name in [LIST, *reversed(names)]:
            Path(new, name).replace(folder / name)
    return [folder / name for name in names]


def _check(folder: Path, force: bool) -> None:
    own = [] if force else sorted(_somebodys(folder))
    if own:
        some = ", ".join(own[:3]) + ("" if len(own) < 4 else f" and {len(own) - 3} more")
        raise InvalidInput(
            f"{folder} has {some} that no earlier result left there so: name another folder, or "
            f"move {'it' if len(own) == 1 else 'them'} away; `run` and `fetch` replace what has a "
            "result's name with --force, and Client.download with force=True."
        )


def _somebodys(folder: Path) -> list[str]:
    """Files that have a result's name, and are not as a result has left them."""
    named = [file for file in folder.iterdir() if OURS.fullmatch(file.name)]
    if not named:
        return []
    try:
        lines = (folder / LIST).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    listed = {line.partition("  ")[2]: line.partition("  ")[0] for line in lines}
    return [file.name for file in named if not _is(file, listed.get(file.name))]


def _is(file: Path, sha256: str | None) -> bool:
    if sha256 is None or not file.is_file():
        return False
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == sha256


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of files are of `file`: a full disk does not say which it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
