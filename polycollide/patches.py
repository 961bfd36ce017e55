"""The commands about patch sets. They open `core`, but neither torch nor faiss in this process."""

import json as jsonlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from core.errors import CoreError
from core.patches import neighbours, sets
from core.patches.sets import Geometry, PatchSet, Report, Skipped
from polycollide.listing import aside, console, fail, listing, show_json, unusable

FEW = 8  # so many skipped files are named when a set has been built


def build(
    directory: Path, name: str, *, size: int, stride: int, resize: int, backend: str, seed: int
) -> None:
    """Builds a set and says what became of the files."""
    with (
        in_one_sentence("Stopped; the same command goes on where it was."),
        progress_bar() as report,
    ):
        geometry = Geometry(size=size, stride=stride, resize=resize)
        index = neighbours.indexer(backend, seed=seed)
        patches = sets.build(directory, name, geometry, index, report=report)
    manifest = patches.manifest
    console.print(
        f"{name}: {_count(len(manifest.images), 'image')}, {_count(len(patches), 'patch')} of "
        f"{size} x {size} pixels, {_megabytes(patches)}, in {patches.folder}",
        highlight=False,
        soft_wrap=True,
    )
    if manifest.duplicates:
        console.print(f"{_count(len(manifest.duplicates), 'file')} with the bytes of another one")
    if skipped := manifest.skipped:
        console.print(f"{_count(len(skipped), 'file')} skipped:")
        _print_skipped(skipped[:FEW])
        if len(skipped) > FEW:
            console.print(f"  and more: polycollide patches info {name}", highlight=False)


def show_all() -> None:
    """Prints a table of the sets, and why others cannot be used."""
    table = listing("set", "images", "patches", "size", "stride", "resize", "index", "on disk")
    unusable = []
    with in_one_sentence():
        for name in sets.names():
            try:
                patches = sets.open_set(name)
            except CoreError as error:
                unusable.append(f"{name}: {error}")
                continue
            g, manifest = patches.geometry, patches.manifest
            numbers = len(manifest.images), len(patches), g.size, g.stride, g.resize
            kind = manifest.index["kind"]
            table.add_row(name, *map(str, numbers), kind, _megabytes(patches))
    console.print(table)
    for line in unusable:
        console.print(line, highlight=False, soft_wrap=True)


def show(name: str, *, json: bool) -> None:
    """Prints what is known of a set."""
    with in_one_sentence():
        patches = sets.open_set(name)
    manifest, geometry = patches.manifest, patches.geometry
    if json:
        show_json(jsonlib.dumps(manifest.model_dump(mode="json"), indent=2))
        return
    facts = Table(show_header=False, box=None, pad_edge=False)
    parameters = {key: value for key, value in manifest.index.items() if key != "kind"}
    for fact in (
        ("images", f"{len(manifest.images)}, resized to {geometry.resize} x {geometry.resize}"),
        ("patches", f"{len(patches)}, {geometry.size} x {geometry.size} every {geometry.stride}"),
        ("index", f"{manifest.index['kind']} ({_listed(parameters)}, seed {manifest.seed})"),
        ("files", f"{_megabytes(patches)} in {patches.folder}"),
        ("sha256", patches.sha256),
        ("duplicates", str(len(manifest.duplicates))),
        ("skipped", str(len(manifest.skipped))),
    ):
        facts.add_row(*fact)
    console.print(facts)
    _print_skipped(manifest.skipped)


def delete(name: str) -> None:
    """Deletes a set."""
    with in_one_sentence():
        sets.delete(name)
    console.print(f"{name} is deleted.", highlight=False)


@contextmanager
def in_one_sentence(stopped: str = "Stopped.") -> Iterator[None]:
    """Errors that a user can act on end the command with a sentence, not a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        aside.print(stopped)
        raise typer.Exit(128 + signal.SIGINT) from None
    except CoreError as error:
        message = str(error)
    except OSError as error:
        message = unusable(error)
    else:
        return
    fail(message)


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A live bar for each thing that building a set takes; gives what updates them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=aside,
        transient=True,
        disable=not aside.is_terminal,
    ) as bar:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for before in tasks.values():
                    bar.update(before, completed=bar.tasks[before].total)
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield report


def _print_skipped(skipped: tuple[Skipped, ...]) -> None:
    for file in skipped:
        console.print(f"  {file.reason}", highlight=False, soft_wrap=True)


def _count(number: int, noun: str) -> str:
    ending = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending if number != 1 else ''}"


def _megabytes(patches: PatchSet) -> str:
    return f"{sum(patches.manifest.files.values()) / 1e6:.1f} MB"


def _listed(parameters: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())
