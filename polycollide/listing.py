"""How the commands speak: tables on standard output, all else beside it."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import typer
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

console = Console(markup=False)
# For progress and remarks: standard output stays clean for --json and pipes.
aside = Console(stderr=True, markup=False)


def listing(*columns: str, justify: JustifyMethod = "left", whole: Sequence[str] = ()) -> Table:
    """An open table whose long words are folded rather than cut; columns of `whole` never give."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in whole)
    return table


def cut(text: str) -> Text:
    """A cell that ends in an ellipsis where its column is too narrow."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def show_json(text: str) -> None:
    """Prints for programs; one that has read enough, as `head` does, ends the command silently."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed later
        raise typer.Exit(1) from None


def unusable(error: OSError) -> str:
    """What is wrong with a file, or with standard output, in a sentence."""
    what = error.filename or "A file, or standard output,"
    return f"{what} cannot be used: {error.strerror or error}."


def say_missing(missing: Mapping[str, str]) -> None:
    """Prints which files a result has not, and why; once what is true of several."""
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, why in missing.items() if why == reason)
        console.print(f"no {names}: {reason}", highlight=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Ends the command with a sentence."""
    aside.print(Text.assemble(("Error:", "red"), " ", message), soft_wrap=True)
    raise typer.Exit(1)
