"""Two things in turn: every benchmark is a ratio of times taken alternately in one process.

Whatever slows the machine down for a while slows both down. Printed are medians with quartiles, of
each time and of the ratio within each turn; a target is held against the median ratio.
"""

import argparse
import gc
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

Floats = NDArray[np.float64]
Goal = tuple[str, float]  # (">=" or "<=", the target of a ratio)

# Without a terminal, rich would fold tables at 80 columns.
console = Console() if Console().is_terminal else Console(width=140)


def quick_asked(about: str | None) -> bool:
    """Reads the command line and says where the figures come from; whether --quick is set."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, for a first look")
    quick: bool = parser.parse_args().quick
    remark = "; --quick, so a first look only" if quick else ""
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_processor()}{remark}",
        highlight=False,
    )
    return quick


def alternate(*runs: Callable[[], object], turns: int, warm_up: int = 1) -> list[Floats]:
    """Seconds [turns] that each of `runs` took, run in turn; every second turn goes backwards."""
    for _ in range(warm_up):
        for run in runs:
            run()
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again in somebody's turn
    seconds = np.empty((len(runs), turns))
    for turn in range(turns):
        order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            seconds[i, turn] = clocked(runs[i])
    return list(seconds)


def clocked(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class Report:
    """A table of ratios `first` / `second`."""

    def __init__(self, title: str, first: str, second: str) -> None:
        self.table = table(title, "", first, second, f"{first} / {second}", "target", "")

    def add(
        self, name: str, first: Floats, second: Floats, goal: Goal | None = None, *, per: int = 1
    ) -> float:
        """One line, of times [turns] that each did `per` units of work; gives the median ratio."""
        ratio = first / second
        median = float(np.median(ratio))
        self.table.add_row(
            name,
            quartiles(first / per, duration),
            quartiles(second / per, duration),
            quartiles(ratio, "{:.2f}".format),
            *verdict(median, goal),
        )
        return median

    def show(self) -> None:
        console.print(self.table)


def table(title: str, *columns: str) -> Table:
    """An empty table whose first column is the name of the line."""
    made = Table(*columns, title=title, title_justify="left", title_style="bold")
    for column in made.columns[1:]:
        column.justify = "right"
    return made


def verdict(value: float, goal: Goal | None) -> tuple[str, str]:
    """The target and whether `value` meets it, for a table."""
    if goal is None:
        return "", ""
    sign, limit = goal
    met = value >= limit if sign == ">=" else value <= limit
    return f"{sign} {limit:g}", "[green]met[/]" if met else "[red]not met[/]"


def quartiles(values: Floats | Sequence[float], text: Callable[[float], str]) -> str:
    """`median (first quartile to third)`."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{text(median)} ({text(low)} to {text(high)})"


def duration(seconds: float) -> str:
    """With three digits, in the unit that suits."""
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((name for name, size in units.items() if seconds >= size), "µs")
    number = seconds / units[unit]
    return f"{number:.{max(0, 2 - int(math.log10(max(number, 1))))}f} {unit}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
