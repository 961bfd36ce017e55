"""The service on this machine: how fast a batch drains, how soon the API answers meanwhile, what a
million finished jobs cost, and how soon an idle worker takes its first step.

Each part has a service of its own on an empty database, and leaves nothing behind. Jobs are five
MNIST corners at the paper's setting with all metrics and, as in any batch, without pictures; a
worker has opened its network and run a few before it is measured. Without --seeds the jobs of a
batch repeat after 90, so that many of their files are in the store already when they end.

Times of day come from processes on one machine and are subtracted as they are.
"""

import argparse
import os
import platform
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timedelta
from functools import partial
from uuid import uuid4

import httpx
import numpy as np
from filling import FEW, WHOLE, execute, fill
from rich.progress import track
from rich.table import Table
from serving import (
    OPTIMISE_CPU,
    STAGES,
    Drained,
    Service,
    api,
    items,
    job,
    reconciler,
    servers,
    service,
)
from sqlalchemy import make_url, text
from timing import Floats, Goal, Report, alternate, console, duration, table, verdict

from store import queue

Options = argparse.Namespace


def drain(options: Options) -> None:
    """A batch through a worker whose jobs share an engine, in turn with one that claims one a time.

    The stages go by the clock of the worker's threads: one that waits for a core, or for another
    thread, is still in its stage, so together they may take longer than the whole. Of the stage
    that optimises, what its thread computed is told as well. `idle` is of
    the thread that owns the device, `asleep` the time in which the worker heard no bell.
    """
    fewer = max(1, options.jobs // 10)
    shared, single = list[Drained](), list[Drained]()
    with service() as started:
        for _ in range(options.turns):
            with started.worker():
                shared.append(started.drain(items(options.jobs, seeds=options.seeds)))
            with started.worker(POLYCOLLIDE_JOBS_AT_ONCE="1"):
                single.append(started.drain(items(fewer, seeds=options.seeds)))
    title = f"A batch of {options.jobs} jobs, one by one of {fewer}: medians of {options.turns}"
    made = table(title, "per job", "one by one", "shared", "ratio", "target", "")

    def times(name: str, of: Callable[[Drained], float], goal: Goal | None = None) -> None:
        alone, many = np.array([[of(drained) for drained in turns] for turns in (single, shared)])
        ratio = float(np.median(alone / many)) if many.all() else np.nan
        told = [duration(float(np.median(seconds))) for seconds in (alone, many)]
        made.add_row(name, *told, f"{ratio:.2f}", *verdict(ratio, goal))

    for name in STAGES:
        goal = (">=", 4.0) if name == "optimise" else None
        times(name, lambda drained, name=name: drained.each[name], goal)
        if name == "optimise":
            times("... on the processor", lambda drained: drained.each[OPTIMISE_CPU], goal)
    times("SQL: claim and write", lambda drained: drained.each["claim"] + drained.each["write"])
    times("POST", lambda drained: drained.each["POST"])
    times("from POST to the last status", lambda drained: drained.each["whole"], (">=", 1.5))
    times("Celery, once a batch", lambda drained: drained.celery)
    rates = [1 / float(np.median([d.each["whole"] for d in turns])) for turns in (single, shared)]
    told = [f"{rate:.1f}" for rate in rates]
    made.add_row("jobs per second (we aim at 50)", *told, "", *verdict(rates[1], (">=", 15.0)))
    console.print(made)


def latency(options: Options) -> None:
    """Two clients while a batch drains: one reads a job of it every 20 ms, one submits every 200.

    A client asks again so long after it last asked, or once it is answered where that takes longer.
    """
    made = table("While a batch drains", "", "answers", "p50", "p99", "longest", "target, ms", "")
    done, chosen = threading.Event(), random.Random(0)

    def ask(every: float, request: Callable[[httpx.Client], httpx.Response]) -> Floats:
        seconds = []
        with httpx.Client(base_url=started.client.base_url, timeout=60, trust_env=False) as client:
            client.get("/livez")  # connects
            while not done.is_set():
                began = time.perf_counter()
                request(client).raise_for_status()
                seconds.append(time.perf_counter() - began)
                done.wait(every - seconds[-1])
        return np.array(seconds)

    with service() as started, started.worker(), ThreadPoolExecutor(2) as clients:
        batch = started.post(items(options.jobs, seeds=options.seeds))
        with started.database.begin() as connection:
            of_batch = text("SELECT id FROM jobs WHERE batch_id = :id")
            ids = list(connection.scalars(of_batch, {"id": batch["id"]}))
        try:
            polls = clients.submit(ask, 0.02, lambda c: c.get(f"/v1/jobs/{chosen.choice(ids)}"))
            posts = clients.submit(ask, 0.2, lambda c: c.post("/v1/jobs", json=job(0)))
            started.wait(batch)
        finally:
            done.set()
        add_quantiles(made, "GET /v1/jobs/{id}", polls.result(), p99=50.0)
        add_quantiles(made, "POST /v1/jobs", posts.result())
    console.print(made)


def add_quantiles(
    made: Table, name: str, seconds: Floats, *, p50: float | None = None, p99: float | None = None
) -> None:
    """A line, with at most one target in ms."""
    quantiles = [float(q) for q in np.quantile(seconds, (0.5, 0.99, 1.0))]
    value, limit = (quantiles[0], p50) if p50 else (quantiles[1], p99)
    judged = verdict(value * 1e3, ("<=", limit) if limit else None)
    made.add_row(name, str(len(seconds)), *map(duration, quantiles), *judged)


def doorbell(options: Options) -> None:
    """Single jobs for an idle, warm worker, each half a second after the one before has ended.

    A job is written at `created_at`, when its transaction begins, and claimed at `started_at`; its
    worker logs that it has begun right before its first step. Its client is answered after the
    commit, and only then does the bell ring.
    """
    spans: list[tuple[float, ...]] = []
    with service() as started, started.worker():
        for i in range(30):
            time.sleep(0.5)
            mark = started.mark()
            posted = started.client.post("/v1/jobs", json=job(i, figures=False, snapshots=0))
            answered = time.time()
            url = posted.raise_for_status().json()["urls"]["self"]
            ended = started.client.get(url, params={"wait": 60}).raise_for_status().json()
            assert ended["status"] == "succeeded", ended
            started.rest(mark)
            (began,) = started.events(mark, "began")
            times = (ended["created_at"], ended["started_at"], began["timestamp"])
            written, claimed, first = (datetime.fromisoformat(t).timestamp() for t in times)
            spans.append((claimed - written, first - claimed, first - written, first - answered))
    title = "A job for an idle worker"
    made = table(title, "", "jobs", "p50", "p99", "longest", "target of p50, ms", "")
    written_to_claimed, claimed_to_first, whole, answered_to_first = np.array(spans).T
    add_quantiles(made, "written to claimed", written_to_claimed)
    add_quantiles(made, "claimed to first step", claimed_to_first)
    add_quantiles(made, "written to first step", whole, p50=100.0)
    add_quantiles(made, "answered to first step", answered_to_first)
    console.print(made)


QUEUED, CLAIMED, CHUNK = 2000, 64, 20_000


def million(options: Options) -> None:
    """The same requests to two databases in turn: one with many finished jobs, one with a thousand.

    Finished jobs are copies of a real one; those that are polled are whole, and lie scattered. A
    claim takes 64 of 2000 queued jobs and is rolled back.
    """
    with servers() as (small, log), ExitStack() as started:
        with reconciler(log), api(small, log) as first, first.worker():
            pass  # it has run what is copied
        fill(small, [range(1, FEW + 1)])
        execute(small, "CREATE DATABASE large TEMPLATE polycollide")
        large = make_url(small).set(database="large").render_as_string(hide_password=False)
        last = options.rows + 1
        chunks = [range(n, min(n + CHUNK, last)) for n in range(FEW + 1, last, CHUNK)]
        fill(large, track(chunks, "Fills", console=console))
        both = [Asked(started.enter_context(api(url, log))) for url in (large, small)]
        for url in (large, small):
            execute(url, "VACUUM (ANALYZE)")
        names = list(both[0].requests)
        runs = [asked.requests[name] for name in names for asked in both]
        seconds = alternate(*runs, turns=100, warm_up=10)
        report = Report("With so many finished jobs", f"{options.rows:,}", f"{FEW:,}")
        for name, many, few in zip(names, seconds[::2], seconds[1::2], strict=True):
            report.add(name, many, few, ("<=", 1.5))
        report.show()


class Asked:
    """`requests` of a database, by name; it gets the jobs that are claimed."""

    def __init__(self, started: Service) -> None:
        batch = started.post(items(QUEUED))
        whole = text(f"SELECT id FROM (SELECT id, custom_id::int AS n FROM jobs) _ WHERE {WHOLE}")
        kind = text("SELECT batch_key FROM jobs WHERE batch_id = :id LIMIT 1")
        with started.database.begin() as connection:
            ids = list(connection.scalars(whole))
            self._kind = connection.scalars(kind, {"id": batch["id"]}).one()
        self._started, chosen = started, random.Random(0)
        self.requests: dict[str, Callable[[], object]] = {
            f"claim of {CLAIMED} jobs": self._claim,
            "GET /v1/jobs/{id}": lambda: self._get(f"/{chosen.choice(ids)}"),
        }
        oldest = "label=experiment-0"
        for query in ("limit=50", "status=succeeded", oldest, "label=none"):
            self.requests[f"GET /v1/jobs?{query}"] = partial(self._get, f"?{query}")

    def _get(self, rest: str) -> None:
        self._started.client.get(f"/v1/jobs{rest}").raise_for_status()

    def _claim(self) -> None:
        with self._started.database.connect() as connection:
            queue.kinds(connection)
            taken = queue.claim(
                connection,
                batch_key=self._kind,
                rows=5 * CLAIMED,
                jobs=CLAIMED,
                at_least_one=True,
                worker_id=uuid4(),
                lease=timedelta(seconds=30),
            )
            assert len(taken) == CLAIMED
            connection.rollback()


PARTS = {"drain": drain, "latency": latency, "million": million, "doorbell": doorbell}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the service on this machine.")
    parser.add_argument("parts", nargs="*", choices=PARTS, help="all, if none is named")
    parser.add_argument("--jobs", type=int, default=2000, help="of a batch")
    parser.add_argument("--turns", type=int, default=2, help="batches of each kind (drain)")
    parser.add_argument("--seeds", action="store_true", help="each job of a batch has its own seed")
    parser.add_argument("--rows", type=int, default=1_000_000, help="finished jobs (million)")
    options = parser.parse_args()
    # As Ctrl-C does, it ends what was started on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console.print(f"{os.cpu_count()} cores, {platform.machine()}, Python {sys.version.split()[0]}")
    for name in options.parts or PARTS:
        PARTS[name](options)


if __name__ == "__main__":
    main()
