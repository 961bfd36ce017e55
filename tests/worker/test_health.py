"""The worker's health check, as the container runs it."""

import os
import socket
import subprocess
import sys
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, make_url, text

from store import workers
from worker.health import well


@pytest.mark.parametrize(
    "slots, healthy",
    [
        ([], False),
        ([("host:7:0", True)], True),
        ([("host:7:0", True), ("host:7:1", False)], False),
        ([("host:6:0", False), ("host:6:1", True), ("host:7:0", True)], True),
    ],
    ids=["nobody", "one", "half", "one after another that was killed"],
)
def test_healthy_are_hosts_of_which_one_worker_has_all_its_slots_fresh(
    slots: list[tuple[str, bool]], healthy: bool
) -> None:
    assert well(slots) == healthy


def test_the_check_reads_this_hosts_rows_and_opens_no_torch(database: str) -> None:
    env = os.environ | {"POLYCOLLIDE_MODE": "local", "POLYCOLLIDE_DATABASE_URL": database}
    engine = create_engine(make_url(database).set(drivername="postgresql+psycopg"))

    def check() -> int:
        program = "import sys; from worker.health import main; status = main()"
        program += "; sys.exit(2 if 'torch' in sys.modules else status)"
        return subprocess.run([sys.executable, "-c", program], env=env).returncode

    with engine.begin() as connection:
        workers.register(connection, uuid4(), "another-host:7:0", "cpu")
    assert check() == 1
    with engine.begin() as connection:
        workers.register(connection, uuid4(), f"{socket.gethostname()}:7:0", "cpu")
    assert check() == 0
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE workers SET heartbeat_at = heartbeat_at - make_interval(secs => :s)"),
            {"s": 15},
        )
    assert check() == 1
    engine.dispose()
