"""Behind PgBouncer in transaction mode: a real one, where the machine has it."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text

from polycollide import stack
from store.database import connect, migrate
from store.settings import Settings

from .conftest import JOB, Worker, serve

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.fixture
def pooled(
    empty_database: str,
    postgres: stack.Postgres,
    redis: stack.Redis,
    new_data_directory: Callable[[], Path],
) -> Iterator[Settings]:
    """Settings that lead through a PgBouncer, with few connections to share."""
    if PGBOUNCER is None:
        pytest.skip("no pgbouncer on this machine: apt-get install pgbouncer")
    folder = new_data_directory()
    folder.mkdir(mode=0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = make_url(empty_database)
    (folder / "users").write_text(f'"{url.username}" "{url.password}"\n')
    (folder / "ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={url.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = scram-sha-256\nauth_file = {folder / 'users'}\n"
        "pool_mode = transaction\ndefault_pool_size = 4\n"
    )
    process = stack.start_process(
        "pgbouncer",
        [PGBOUNCER, "-q", folder / "ini"],
        user="nobody" if os.geteuid() == 0 else None,
        log=folder / "log",
    )
    deadline = time.monotonic() + 20
    while not _listens(port):
        assert process.alive and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)
    yield Settings(
        mode="local",
        database_url=url.set(port=port).render_as_string(hide_password=False),
        database_direct_url=empty_database,
        prepare_statements=False,
        redis_url=SecretStr(redis.url),
    )
    process.stop()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_behind_a_pooler_jobs_run_and_those_who_wait_hear_of_it(pooled: Settings) -> None:
    migrate(pooled)
    with serve(pooled) as service, service.client() as client:
        worker = Worker(service.engine)
        for _ in range(12):  # a statement is prepared at its sixth time
            job = client.post("/v1/jobs", json=JOB).json()
            worker.succeed(worker.claim(job))
            assert client.get(job["urls"]["self"]).json()["status"] == "succeeded"
        job = client.post("/v1/jobs", json=JOB).json()
        claimed = worker.claim(job)
        ending = threading.Timer(0.5, worker.succeed, [claimed])
        ending.start()
        began = time.monotonic()
        ended = client.get(job["urls"]["self"], params={"wait": 30}).json()
        assert ended["status"] == "succeeded"
        assert time.monotonic() - began < 8  # by the notice, not by looking again after ten
        ending.join()


def test_behind_a_pooler_sessions_have_our_time_limits(pooled: Settings) -> None:
    migrate(pooled)
    engine = connect(pooled)
    with engine.begin() as connection:
        shown = [
            connection.scalar(text(f"SHOW {name}"))
            for name in ("lock_timeout", "idle_in_transaction_session_timeout", "timezone")
        ]
    engine.dispose()
    assert shown == ["30s", "1min", "UTC"]
