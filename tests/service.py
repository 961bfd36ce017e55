"""The real service for tests: API, reconciler and workers as processes, to be killed at will."""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import Engine, create_engine, make_url, text

from polycollide import stack
from polycollide.stack import Process

PYTHON = [sys.executable, "-m"]
# Seconds that whatever must happen may take on a machine that is doing something else.
WITHIN = 240.0
MNIST = {"model": "mnist-mlp", "layer": "fc1", "figures": False}
# Quick to end, and no measure takes time.
SMALL = MNIST | {"interpolation": {"samples": 100}, "ball_samples": 100, "worst_starts": 0}
# Runs until it is stopped, or for so many seconds.
ENDLESS = SMALL | {"l_pos_threshold": 1e-12, "learning_rate": 1e-6, "max_steps": 1_000_000}


def endless(seconds: float) -> dict[str, Any]:
    """A spec that optimises for so long."""
    return ENDLESS | {"max_seconds": seconds}


def pair(i: int = 0) -> dict[str, str]:
    """Source and target, of 90 pairs."""
    source, target = i % 10, (i + 1 + i // 10) % 10
    return {"source": f"sample:mnist/{source}-0", "target": f"sample:mnist/{target}-1"}


class Service:
    """Processes on one database and one Redis; `client` speaks to the API."""

    def __init__(self, database_url: str, redis_url: str, folder: Path, **settings: str) -> None:
        self.database_url, self.redis_url, self.folder = database_url, redis_url, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.env = os.environ | {
            "POLYCOLLIDE_MODE": "local",
            "POLYCOLLIDE_PORT": str(self.port),
            "POLYCOLLIDE_DATABASE_URL": database_url,
            "POLYCOLLIDE_REDIS_URL": redis_url,
            "POLYCOLLIDE_CHECKPOINT_DIR": str(folder / "checkpoints"),
            "OMP_WAIT_POLICY": "PASSIVE",
            **{f"POLYCOLLIDE_{name.upper()}": value for name, value in settings.items()},
        }
        url = make_url(database_url).set(drivername="postgresql+psycopg")
        self.database: Engine = create_engine(url, pool_pre_ping=True)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=70)
        self.api: Process
        self.reconciler: Process
        self._started: list[Process] = []
        self._workers: list[Process] = []

    def start(self, name: str, *argv: str, **env: str) -> Process:
        """A process of the service, which ends with it."""
        log = self.folder / "service.log"
        process = stack.start_process(name, [*PYTHON, *argv], env=self.env | env, log=log)
        self._started.append(process)
        return process

    def start_api(self) -> Process:
        """The API, once it answers."""
        self.api = self.start("API", "api")
        self.until(self._answers, WITHIN, "the API answers")
        return self.api

    def _answers(self) -> bool:
        try:
            return self.client.get("/livez").is_success
        except httpx.TransportError:
            return False

    def start_reconciler(self) -> Process:
        """A reconciler."""
        self.reconciler = self.start("reconciler", "worker.reconciler")
        return self.reconciler

    def start_worker(self, *, ready: bool = True, **env: str) -> Process:
        """A worker, in a slot of its own; once its child has entered itself in the store."""
        number = len(self._started)
        slot = f"test:{number}:cpu"
        options = ["--concurrency=1", "--without-mingle", "--without-gossip", "--loglevel=WARNING"]
        process = self.start(
            f"worker {slot}",
            *("celery", "--quiet", "--app", "worker.app", "worker", f"--hostname=w{number}@%h"),
            *options,
            POLYCOLLIDE_SLOT=slot,
            **env,
        )
        self._workers.append(process)
        if ready:
            self.until(lambda: slot in self.slots(), WITHIN, "the worker is there")
        return process

    def stop_workers(self) -> None:
        """Ends all workers, at once and without a word."""
        while self._workers:
            self._workers.pop().kill()

    def slots(self) -> list[str]:
        """The workers that are entered."""
        with self.database.begin() as connection:
            return list(connection.scalars(text("SELECT slot FROM workers")))

    def child_of(self, worker: Process) -> psutil.Process:
        """The pool's child, which opens torch."""
        children = psutil.Process(worker.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def submit(self, spec: Mapping[str, Any], i: int = 0, **more: Any) -> str:
        """A job; its id."""
        answer = self.client.post("/v1/jobs", json={**pair(i), "spec": dict(spec), **more})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def submit_many(self, count: int) -> list[str]:
        """Small jobs; their ids."""
        return [self.submit(SMALL, i) for i in range(count)]

    def all_succeed(self, ids: list[str], within: float = WITHIN) -> list[dict[str, Any]]:
        """Jobs, once all of them have succeeded."""
        ended = [self.ended(job_id, within) for job_id in ids]
        assert {job["status"] for job in ended} == {"succeeded"}, self.log()[-5000:]
        self.check()
        return ended

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        """A job as it is, or as it is when it ends within `wait` seconds."""
        answer = self.client.get(f"/v1/jobs/{job_id}", params={"wait": wait} if wait else {})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def ended(self, job_id: str, within: float = WITHIN) -> dict[str, Any]:
        """A job in its final status."""
        deadline = time.monotonic() + within
        while True:
            job = self.job(job_id, wait=min(30, max(1, deadline - time.monotonic())))
            if job["status"] in ("succeeded", "failed", "canceled"):
                return job
            assert time.monotonic() < deadline, f"{job}\n{self.log()[-5000:]}"

    def running(self, job_id: str, within: float = WITHIN) -> dict[str, Any]:
        """A job that steps."""
        self.until(lambda: self.job(job_id)["status"] == "running", within, "it runs")
        return self.job(job_id)

    def run_out(self, *ids: str) -> None:
        """Moves the ends of the leases that jobs have into the past, until they are taken away.

        Of a worker that is dead or stands still: one that lives would renew them.
        """
        of_jobs = "WHERE id = ANY(CAST(:ids AS uuid[])) AND lease_token IS NOT NULL"
        with self.database.begin() as connection:
            leases = connection.scalars(
                text(f"SELECT lease_token FROM jobs {of_jobs}"), {"ids": list(ids)}
            ).all()

        def taken_away() -> bool:
            with self.database.begin() as connection:
                left = connection.execute(
                    text("""
                        UPDATE jobs SET lease_expires_at = '-infinity'
                        WHERE lease_token = ANY(CAST(:leases AS uuid[]))
                    """),
                    {"leases": leases},
                )
                return left.rowcount == 0

        self.until(taken_away, WITHIN, "leases that ran out are taken away")

    def log(self) -> str:
        """What the processes have said."""
        return (self.folder / "service.log").read_text()

    def until(self, condition: Callable[[], Any], within: float, what: str) -> None:
        """Waits for a condition."""
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"not in {within} s: {what}\n{self.log()[-5000:]}"
            time.sleep(0.05)

    def check(self) -> None:
        """Every job has ended, once, with one set of corners if it succeeded."""
        with self.database.begin() as connection:
            jobs = connection.execute(
                text("""
                    SELECT status, corners,
                        (SELECT count(*) FROM corners WHERE job_id = jobs.id) AS written,
                        (SELECT count(*) FROM metrics WHERE job_id = jobs.id) AS measured,
                        (SELECT count(*) FROM job_events WHERE job_id = jobs.id
                            AND type = 'status'
                            AND data->>'status' IN ('succeeded', 'failed', 'canceled')) AS ends
                    FROM jobs
                """)
            ).all()
        for job in jobs:
            succeeded = job.status == "succeeded"
            assert succeeded or job.status in ("failed", "canceled"), job
            assert job.ends == 1, job
            assert (job.written, job.measured) == ((job.corners, 1) if succeeded else (0, 0)), job

    def stop(self) -> None:
        """Ends all processes."""
        for process in reversed(self._started):
            process.kill()
        self.client.close()
        self.database.dispose()
