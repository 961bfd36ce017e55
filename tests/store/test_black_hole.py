"""A network that is gone without a word: a real one, whose cable is pulled."""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from polycollide import stack
from store.database import _CONNECT
from store.settings import Settings

ROOT = Path(__file__).parent.parent.parent
# Speaks to Postgres, or waits for Redis, as our processes do, only less patiently.
CLIENT = """
import sys, time
from sqlalchemy import text
from store import database
from store.settings import Settings
from worker.app import KEEPALIVE
import redis, socket

database._CONNECT |= {"connect_timeout": 2}
if "tcp_user_timeout" in database._CONNECT:
    database._CONNECT["tcp_user_timeout"] = 1500
settings = Settings()
if sys.argv[1] == "postgres":
    engine = database.connect(settings)
    def use():
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
else:
    less = {name: 1500 if value > 1000 else 1 for name, value in KEEPALIVE.items()}
    server = redis.Redis.from_url(
        settings.redis_url.get_secret_value(), socket_keepalive=True,
        socket_keepalive_options=less, socket_timeout=None, socket_connect_timeout=2,
        retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    )
    server.ping()
    def use():
        server.brpop("nothing", timeout=1 if first else 0)
first = True
use()
first = False
print("used", flush=True)
if sys.argv[1] == "postgres":  # who listens to Redis waits already
    sys.stdin.readline()
try:
    use()
except Exception as error:
    print(type(error).__name__, flush=True)
"""
RELAY = """
import socket, sys, threading
def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
while True:
    ours, _ = listener.accept()
    theirs = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    for pair in ((ours, theirs), (theirs, ours)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""


class Cable:
    """Between this machine, as `address`, and a network namespace."""

    def __init__(self) -> None:
        name = secrets.token_hex(3)
        self.space, self.end, self.far = f"pc-{name}", f"pca{name}", f"pcb{name}"
        net = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
        self.address = f"{net}.1"
        self._ip("netns", "add", self.space)
        self._ip("link", "add", self.end, "type", "veth", "peer", self.far, "netns", self.space)
        self._ip("addr", "add", f"{self.address}/24", "dev", self.end)
        self._ip("link", "set", self.end, "up")
        self._ip("-n", self.space, "addr", "add", f"{net}.2/24", "dev", self.far)
        self._ip("-n", self.space, "link", "set", self.far, "up")

    @staticmethod
    def _ip(*argv: str) -> None:
        subprocess.run(["ip", *argv], check=True, capture_output=True)

    def pull(self) -> None:
        self._ip("link", "set", self.end, "down")

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.space], check=False, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        cable = Cable()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made: {error.stderr.decode().strip()}")
    yield cable
    cable.remove()


@pytest.mark.parametrize("server", ["postgres", "redis"])
def test_a_connection_into_a_black_hole_is_given_up(
    server: str, cable: Cable, database: str, redis: stack.Redis
) -> None:
    urls = {"postgres": make_url(database), "redis": make_url(redis.url)}
    relay = [sys.executable, "-c", RELAY, cable.address, str(urls[server].port)]
    with subprocess.Popen(relay, stdout=subprocess.PIPE, text=True) as between:
        port = int(between.stdout.readline())  # type: ignore[union-attr]
        urls[server] = urls[server].set(host=cable.address, port=port)
        given = {name: url.render_as_string(hide_password=False) for name, url in urls.items()}
        env = os.environ | {
            "POLYCOLLIDE_MODE": "local",
            "POLYCOLLIDE_DATABASE_URL": given["postgres"],
            "POLYCOLLIDE_REDIS_URL": given["redis"],
        }
        command = ["ip", "netns", "exec", cable.space, sys.executable, "-c", CLIENT, server]
        with subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as client:
            try:
                assert client.stdout.readline() == "used\n"  # type: ignore[union-attr]
                time.sleep(0.5)
                cable.pull()
                told, _ = client.communicate("\n", timeout=40)
                assert told.strip() in ("OperationalError", "TimeoutError", "ConnectionError")
            finally:
                client.kill()
                between.kill()


def test_a_black_hole_is_noticed_well_within_a_lease() -> None:
    assert isinstance(patience := _CONNECT["tcp_user_timeout"], int)
    assert 1000 <= patience <= 1000 * Settings(mode="local").lease.total_seconds() / 2
