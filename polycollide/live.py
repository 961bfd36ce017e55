"""Many jobs at a glance while they run: counts, rate, and bars for those at work."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from polycollide.answers import FINAL, Batch, Job
from polycollide.client import Client
from polycollide.listing import aside, cut, listing

STATES = ("succeeded", "failed", "canceled", "running", "canceling", "queued")
FEW = 20  # so many jobs all get a line; of more, those that run
INTERVAL = 1.0
REPORT_INTERVAL = 10.0  # where no terminal shows the bars
SHARE = 0.2  # of the time, at most, is spent asking


@dataclass(frozen=True)
class View:
    """What there is to see at one time."""

    counts: Counter[str]
    jobs: list[Job]

    @property
    def done(self) -> int:
        """Jobs that came to an end."""
        return sum(self.counts[status] for status in FINAL)

    @property
    def ended(self) -> bool:
        """Whether all did."""
        return self.done == self.counts.total()

    def __str__(self) -> str:
        states = (f"{self.counts[s]} {s}" for s in STATES if self.counts[s])
        return f"{self.done} of {self.counts.total()} done: {', '.join(states)}"


Look = Callable[[], View]


def at_jobs(client: Client, ids: Iterable[str]) -> Look:
    """A look at jobs by their ids."""
    known: dict[str, Job | None] = dict.fromkeys(ids)

    def look() -> View:
        left = [id for id, job in known.items() if job is None or not job.done]
        with ThreadPoolExecutor(16) as pool:
            known.update(zip(left, pool.map(client.job, left), strict=True))
        return _view(job for job in known.values() if job)

    return look


def at_label(client: Client, label: str) -> Look:
    """A look at all jobs with a label."""
    return lambda: _view(client.jobs(label=label))


def at_batch(client: Client, id: str) -> Look:
    """A look at a batch, whose counts the service keeps."""

    def look() -> View:
        counts = counts_of(client.get_batch(id))
        few = counts.total() <= FEW
        return View(counts, list(client.jobs(batch=id, status=None if few else "running")))

    return look


def counts_of(batch: Batch) -> Counter[str]:
    """How many of its jobs stand where."""
    return Counter({status: batch.request_counts.get(status, 0) for status in STATES})


def follow(look: Look) -> View:
    """Shows what `look` sees, again and again, until every job is done; the last view."""
    began = reported = time.monotonic()
    view = first = look()
    with Live(console=aside, transient=True, auto_refresh=False) as live:
        while not view.ended:
            asked = time.monotonic()
            summary = f"{view}{_pace(first, view, asked - began)}"
            if aside.is_terminal:
                bars = (_bars(view),) if view.jobs else ()
                live.update(Group(Text(summary), *bars), refresh=True)
            elif asked - reported >= REPORT_INTERVAL:
                reported = asked
                aside.print(summary, highlight=False, soft_wrap=True)
            time.sleep(INTERVAL)
            asked = time.monotonic()
            view = look()
            took = time.monotonic() - asked
            time.sleep(max(0.0, took / SHARE - INTERVAL - took))
    return view


def _view(jobs: Iterable[Job]) -> View:
    jobs = list(jobs)
    return View(Counter(job.status for job in jobs), jobs)


def _pace(first: View, now: View, seconds: float) -> str:
    """Jobs a second since the first look, and how long the rest takes at that pace."""
    finished = now.done - first.done
    if finished <= 0 or seconds <= 0:
        return ""
    rate = finished / seconds
    left = timedelta(seconds=round((now.counts.total() - now.done) / rate))
    return f"; {rate:.3g} jobs/s, {left} left"


def _bars(view: View) -> Table:
    """A line for each job, or for those at work where they are many, as far as the screen goes."""
    jobs = view.jobs
    if len(jobs) > FEW:
        jobs = [job for job in jobs if job.status in ("running", "canceling")]
        jobs.sort(key=lambda job: job.progress is None)  # those that tell of themselves come first
    room = max(1, aside.height - 6)
    columns = ("status", "", "step", "worst L_pos", "rows left", "steps/s")
    table = listing("job", *columns, whole=columns)
    for job in jobs[:room]:
        progress, most = job.progress, job.spec.get("max_steps")
        bar: ProgressBar | str = ""
        cells = ["", "", "", ""]
        if progress and not job.done:
            bar = ProgressBar(total=most or 1, completed=progress.steps, width=12)
            numbers = (progress.worst_l_pos, progress.rows_left, progress.steps_per_second)
            shown = ["" if number is None else f"{number:.3g}" for number in numbers]
            cells = [f"{progress.steps}/{most}" if most else f"{progress.steps}", *shown]
        table.add_row(cut(job.custom_id or job.id), job.status, bar, *cells)
    if len(jobs) > room:
        table.add_row(f"... and {len(jobs) - room} more")
    return table
