"""How the commands speak: tables on standard output, all else beside it."""

from typing import NoReturn

import typer
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

console = Console(markup=False)
# For progress and remarks: standard output stays clean for --json and pipes.
aside = Console(stderr=True, markup=False)


def listing(*columns: str, justify: JustifyMethod = "left") -> Table:
    """An open table whose long words are folded rather than cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table


def fail(message: str) -> NoReturn:
    """Ends the command with a sentence."""
    aside.print(Text.assemble(("Error:", "red"), " ", message), soft_wrap=True)
    raise typer.Exit(1)
