"""What a job found, as the files of a folder: the names that `polycollide run --out` writes."""

import json
import re
from pathlib import Path

from polycollide.answers import Job

# What a result may leave in a folder; all of it goes before another result comes in.
OURS = re.compile(
    r"result\.json|corner-\d+\.png|(corners|samples|snapshots)\.npz"
    r"|(figure|curves|hull|regions|snapshots|worst)\.png"
)
ARTIFACT = re.compile(r"([a-z]+)_(npz|png)")


def files(job: Job) -> dict[str, tuple[str, ...]]:
    """The files that the service has of a job: their names here, and what to ask it for."""
    count = len(job.urls.get("corners") or ())
    corners = {f"corner-{i}.png": ("corners", f"{i}.png") for i in range(count)}
    matches = (ARTIFACT.fullmatch(name) for name, url in job.urls.items() if url)
    names = sorted(".".join(match.groups()) for match in matches if match)
    return corners | {name: (name,) for name in names}


def write(folder: Path, job: Job, contents: dict[str, bytes]) -> list[Path]:
    """Writes `contents` and result.json in place of an earlier result, and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    result = json.dumps(job.result, indent=2).encode()
    for name, content in {**contents, "result.json": result}.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in ("result.json", *contents)]


def clear(folder: Path) -> None:
    """Takes away what an earlier result left, lest two be taken for one; no other file.

    result.json goes first and comes last: a folder that has it is whole.
    """
    (folder / "result.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if OURS.fullmatch(file.name):
            file.unlink()
