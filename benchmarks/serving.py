"""The service that `service.py` measures: servers, API, reconciler and workers as `polycollide up`
starts them, in a folder that ends with them.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import httpx
from sqlalchemy import Engine, text

from polycollide import server, stack
from polycollide.process import Process
from store.database import connect, migrate
from store.settings import Settings

STAGES = ("prepare", "optimise", "measure", "encode", "claim", "write", "idle", "asleep")
OPTIMISE_CPU = "optimise_cpu"
WARM_UP = 20  # jobs
_seeds = count()


def job(i: int, **spec: Any) -> dict[str, Any]:
    """One of 90 pairs of digits, at the paper's setting."""
    source, target = i % 10, (i + 1 + i // 10 % 9) % 10
    pair = {"source": f"sample:mnist/{source}-0", "target": f"sample:mnist/{target}-1"}
    return {**pair, "spec": {"preset": "paper-mnist", **spec}}


def items(jobs: int, *, seeds: bool = False) -> list[dict[str, Any]]:
    """Jobs for a batch: the pairs over and over; with `seeds`, none twice all the same."""
    return [job(i, **({"seed": next(_seeds)} if seeds else {})) for i in range(jobs)]


@dataclass(frozen=True)
class Drained:
    """Of a batch: seconds per job by stage, and `celery`, once: from its answer to its first claim.

    Beside the stages of the worker's drains there are `asleep`, from the first claim on while none
    drains, `POST`, until the answer, and `whole`, from the POST to the last final status.
    """

    each: Mapping[str, float]
    celery: float


class Service:
    """An API on a database, and what is asked of it."""

    def __init__(self, client: httpx.Client, database: Engine, log: Path) -> None:
        self.client, self.database, self.log = client, database, log
        self._workers: Sequence[Process] = ()

    @contextmanager
    def worker(self, **env: str) -> Iterator[None]:
        """A worker with these variables set, warm: its network is open and has had jobs."""
        with mock.patch.dict(os.environ, env), server.running(server.workers(), log=self.log) as up:
            self._workers = up
            self.drain(items(WARM_UP))
            until("all networks are described", self._described)
            yield

    def _described(self) -> bool:
        models = self.client.get("/v1/models").raise_for_status().json()["models"]
        return all(model["layers_known"] or not model["ready"] for model in models)

    def post(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of them."""
        answer = self.client.post("/v1/batches", json={"items": jobs})
        return dict(answer.raise_for_status().json())

    def wait(self, batch: dict[str, Any]) -> None:
        """Until all of its jobs have succeeded."""
        url, counts = batch["urls"]["self"], batch["request_counts"]
        while (before := counts["succeeded"]) < counts["total"]:
            assert counts["failed"] == counts["refused"] == 0, f"{counts}\n{self.tail()}"
            assert all(worker.alive for worker in self._workers), self.tail()
            answer = self.client.get(url, params={"wait": 60}).raise_for_status()
            counts = answer.json()["request_counts"]
            assert counts["succeeded"] > before, f"nothing in a minute: {counts}\n{self.tail()}"

    def drain(self, jobs: list[dict[str, Any]]) -> Drained:
        """A batch from its POST until the worker rests."""
        mark, began = self.mark(), time.time()
        batch = self.post(jobs)
        answered = time.time()
        self.wait(batch)
        ends = text("""
            SELECT extract(epoch FROM min(started_at)), extract(epoch FROM max(finished_at))
            FROM jobs WHERE batch_id = :id""")
        with self.database.begin() as connection:
            first, last = map(float, connection.execute(ends, {"id": batch["id"]}).one())
        self.rest(mark)
        drains = self.events(mark, "drained")
        names = (*STAGES, OPTIMISE_CPU)
        seconds = {name: sum(d.get(name, 0.0) for d in drains) for name in names}
        seconds |= {"POST": answered - began, "whole": last - began}
        seconds["asleep"] = max(0.0, last - first - sum(d["seconds"] for d in drains))
        each = {name: spent / len(jobs) for name, spent in seconds.items()}
        return Drained(each, celery=first - answered)

    def mark(self) -> int:
        """Where the log ends by now."""
        return self.log.stat().st_size

    def events(self, mark: int, *names: str) -> list[dict[str, Any]]:
        """What has been logged since, of what has these names."""
        lines = self.log.read_bytes()[mark:].splitlines()
        said = [json.loads(line) for line in lines if line[:2] == b'{"' and line[-1:] == b"}"]
        return [event for event in said if event.get("event") in names]

    def tail(self) -> str:
        """The last words of the log, which goes with its folder."""
        return self.log.read_text()[-3000:]

    def rest(self, mark: int) -> None:
        """Waits until the worker, which has had jobs since the mark, listens for the bell again."""

        def rests() -> bool:
            said = self.events(mark, "began", "finished", "drained")
            return bool(said) and said[-1]["event"] == "drained"

        until("the worker rests", rests)


@contextmanager
def servers() -> Iterator[tuple[str, Path]]:
    """Postgres, durable as users have it, and Redis: an empty database's URL, and a log."""
    with ExitStack() as started:
        folder = started.enter_context(TemporaryDirectory(prefix="polycollide-benchmark-"))
        data = Path(folder)
        data.chmod(0o711)  # for root, the servers run as somebody else
        database = started.enter_context(stack.Postgres.start(data)).url
        local = {
            "POLYCOLLIDE_MODE": "local",
            "POLYCOLLIDE_HOST": "127.0.0.1",
            "POLYCOLLIDE_DATABASE_URL": database,
            "POLYCOLLIDE_REDIS_URL": started.enter_context(stack.Redis.start(data)).url,
            "POLYCOLLIDE_CHECKPOINT_DIR": str(data / "checkpoints"),
        }
        started.enter_context(mock.patch.dict(os.environ, local))
        migrate(Settings())
        yield database, data / "service.log"


def reconciler(log: Path) -> AbstractContextManager[object]:
    """A reconciler of these servers."""
    return server.running([server.Part("reconciler", server.RECONCILER)], log=log)


@contextmanager
def api(database_url: str, log: Path) -> Iterator[Service]:
    """An API on a database of these servers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"POLYCOLLIDE_PORT": str(port), "POLYCOLLIDE_DATABASE_URL": database_url}
    with ExitStack() as started:
        started.enter_context(server.running([server.Part("API", server.API, env)], log=log))
        base_url = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=base_url, timeout=70, trust_env=False)
        started.enter_context(client)
        database = connect(Settings(mode="local", database_url=database_url))
        started.callback(database.dispose)

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return client.get("/readyz").is_success
            return False

        until("the API answers", answers)
        yield Service(client, database, log)


@contextmanager
def service() -> Iterator[Service]:
    """Everything but a worker, on an empty database."""
    with servers() as (url, log), reconciler(log), api(url, log) as started:
        yield started


def until(what: str, condition: Callable[[], bool], within: float = 120) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not in {within:g} s: {what}"
        time.sleep(0.02)
