"""One key, or one connection, does not take what others need; what never ends is ended."""

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from uuid import uuid4

import httpx
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text

from api import serving
from api.hub import Hub
from api.turns import TooManyRequests, Turns
from store import keys
from store.database import connect_async
from store.moves import CHANNEL, cancel
from store.settings import Settings

from .conftest import JOB, Service, serve

# Turns


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Queue:
    """Who holds a slot, in the order in which they got it."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.served = turns, list[str]()
        self._leave: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str) -> None:
        """The first letter is the key."""
        for name in names:
            self._leave[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._hold(name))
            await _settle()

    async def _hold(self, name: str) -> None:
        async with self.turns.of(name[0]):
            self.served.append(name)
            await self._leave[name].wait()

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await _settle()

    async def give_up(self, name: str) -> None:
        self._tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self._tasks[name]


def test_a_key_has_its_share_and_those_who_wait_come_by_turns_of_their_keys() -> None:
    async def use() -> None:
        queue = Queue(Turns(3, each=2, waiting=9))
        await queue.come("a1", "a2", "a3", "a4", "a5", "b1", "b2", "c1")
        assert queue.served == ["a1", "a2", "b1"]
        for name, then in (("a1", "a3"), ("a2", "b2"), ("b1", "c1"), ("b2", "a4"), ("a3", "a5")):
            await queue.leave(name)
            assert queue.served[-1] == then
        for name in ("a4", "a5", "c1"):
            await queue.leave(name)
        await queue.come("d1", "d2", "d3", "e1")
        assert queue.served[-3:] == ["d1", "d2", "e1"]

    asyncio.run(use())


def test_who_gives_up_leaves_no_gap_and_takes_no_slot_along() -> None:
    async def use() -> None:
        queue = Queue(Turns(1, each=1, waiting=9))
        await queue.come("a1", "a2", "a3", "b1", "c1")
        await queue.give_up("a2")
        await queue.give_up("b1")
        queue._leave["a1"].set()
        queue._tasks["a3"].cancel()  # just as it is its turn
        await _settle()
        assert queue.served == ["a1", "c1"]
        await queue.leave("c1")
        await queue.come("b2")
        assert queue.served == ["a1", "c1", "b2"]

    asyncio.run(use())


def test_past_a_bound_in_number_and_time_a_key_is_refused_and_others_are_not() -> None:
    async def use() -> None:
        turns = Turns(2, each=1, waiting=1, patience=0.05)
        async with turns.of("a"):
            late = asyncio.create_task(turns.take("a"))
            await _settle()
            with pytest.raises(TooManyRequests):
                await turns.take("a")
            async with turns.of("b"):
                pass
            with pytest.raises(TooManyRequests):
                await late
        async with turns.of("a"):
            pass

    asyncio.run(use())


# Waiting


def test_a_thousand_who_wait_for_a_job_ask_once_for_each_notice(
    new_settings: Callable[..., Settings],
) -> None:
    settings, job_id = new_settings(), uuid4()

    async def use() -> None:
        engine = connect_async(settings, reading=True)
        hub, asked, ended = Hub(engine), 0, False

        async def question() -> bool:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.01)
            return ended

        async def wait() -> None:
            async def done() -> bool:
                return await hub.ask(job_id, "ended", question)

            await hub.until(done, job_id=job_id, seconds=30)

        async def notify() -> None:
            async with engine.connect() as connection:
                await connection.execute(text(f"SELECT pg_notify('{CHANNEL}', '{job_id}')"))

        listening = asyncio.create_task(hub.run())
        waiting = [asyncio.create_task(wait()) for _ in range(1000)]
        waiting[0].cancel()  # whose question it was
        while not asked:
            await notify()  # also until it listens
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        before, ended = asked, True
        await notify()
        async with asyncio.timeout(10):
            await asyncio.gather(*waiting[1:])
        assert asked == before + 1
        assert not hub._waiters and not hub._asked
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        await engine.dispose()

    asyncio.run(use())


def test_streams_and_held_back_answers_of_a_key_are_bounded(
    new_settings: Callable[..., Settings],
) -> None:
    with serve(new_settings(mode="server", max_waits=3)) as service, ExitStack() as streams:
        ada, bob = (streams.enter_context(service.client(name)) for name in ("ada", "bob"))
        job = ada.post("/v1/jobs", json=JOB).json()
        for _ in range(3):
            stream = ada.stream("GET", job["urls"]["events"])
            assert streams.enter_context(stream).status_code == 200
        for path, params in ((job["urls"]["events"], {}), (job["urls"]["self"], {"wait": "5"})):
            refused = ada.get(path, params=params)
            assert refused.status_code == 429, refused.text
            assert refused.json()["code"] == "too_many_requests"
            assert int(refused.headers["retry-after"]) > 0
        assert ada.get(job["urls"]["self"]).status_code == 200
        other = bob.post("/v1/jobs", json=JOB).json()
        assert bob.get(other["urls"]["self"], params={"wait": "0.1"}).status_code == 200
        ada.post(job["urls"]["cancel"])  # the streams end, and give their places back
        deadline = time.monotonic() + 20
        while ada.get(job["urls"]["self"], params={"wait": "1"}).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_a_revoked_key_has_open_ends_with_the_next_notice(keyed: Service) -> None:
    with keyed.client("erin") as client, ExitStack() as opened:
        job = client.post("/v1/jobs", json=JOB).json()
        stream = opened.enter_context(client.stream("GET", job["urls"]["events"]))
        lines = stream.iter_lines()
        assert "queued" in next(line for line in lines if line.startswith("data"))
        held = list[int]()
        batch = client.post("/v1/batches", json={"items": [JOB]}).json()
        polls = [
            threading.Thread(target=lambda url=url: held.append(_status(keyed, url)))
            for url in (job["urls"]["self"], batch["urls"]["self"])
        ]
        for poll in polls:
            poll.start()
        time.sleep(0.5)
        with keyed.engine.begin() as connection:
            keys.revoke(connection, keyed.key("erin").split("_")[1])
            connection.execute(cancel("WHERE jobs.key_id IS NOT NULL"))
        assert "canceled" not in "".join(lines)
        for poll in polls:
            poll.join(20)
        assert held == [401, 401]


def _status(service: Service, url: str) -> int:
    with service.client("erin") as client:
        return client.get(url, params={"wait": 20}).status_code


# Connections


@pytest.fixture(scope="module")
def hasty(new_settings: Callable[..., Settings]) -> Iterator[Service]:
    """A service that waits for half a second only."""
    soon = timedelta(seconds=0.5)
    with serve(new_settings(header_timeout=soon, body_timeout=soon)) as running:
        yield running


def _connected(service: Service) -> socket.socket:
    url = httpx.URL(service.url)
    return socket.create_connection((url.host, url.port or 80), timeout=20)


def _rest(connection: socket.socket) -> bytes:
    """What comes until the other side ends the connection."""
    told = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(2**16):
            told += data
    return told


HEAD = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PROBE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("begun", [b"", b"GET /livez HT", PROBE + b"GET", PROBE + HEAD])
def test_a_request_that_never_gets_beyond_its_head_ends_its_connection(
    hasty: Service, begun: bytes
) -> None:
    with _connected(hasty) as connection:
        whole, _, part = begun.rpartition(PROBE)
        told = b""
        if begun != part:
            connection.sendall(whole + PROBE)
            told = connection.recv(2**16)
        connection.sendall(part)
        assert (told + _rest(connection)).count(b"HTTP/1.1 ") == begun.count(PROBE)


def test_a_head_that_comes_in_drops_does_not_last(hasty: Service) -> None:
    with _connected(hasty) as connection:
        dripping = threading.Thread(target=_drip, args=(connection,))
        dripping.start()
        assert _rest(connection) == b""
        dripping.join()


def test_a_body_that_is_not_read_ends_its_connection_too(hasty: Service) -> None:
    with _connected(hasty) as connection:
        connection.sendall(HEAD.replace(b"/v1/jobs", b"/nowhere") + b"Content-Length: 9\r\n\r\n{")
        told = connection.recv(2**16)
        connection.sendall(b" ")
        assert b"HTTP/1.1 404" in told + _rest(connection)


@pytest.mark.parametrize("sent", [b"{", b" " * 3_000_000])
def test_a_body_that_does_not_come_is_a_408(hasty: Service, sent: bytes) -> None:
    with _connected(hasty) as connection:
        connection.sendall(HEAD + b"Content-Length: 90000000\r\n\r\n" + sent)
        answer = _rest(connection)
    assert b"HTTP/1.1 408" in answer and b'"body_too_slow"' in answer


def test_a_body_that_comes_in_drops_is_a_408(hasty: Service) -> None:
    with _connected(hasty) as connection:
        connection.sendall(HEAD + b"Content-Length: 90000000\r\n\r\n")
        dripping = threading.Thread(target=_drip, args=(connection,))
        dripping.start()
        assert b"HTTP/1.1 408" in _rest(connection)
        dripping.join()


def _drip(connection: socket.socket) -> None:
    with suppress(OSError):
        for _ in range(200):
            connection.sendall(b"X")
            time.sleep(0.1)


def test_a_reader_who_takes_nothing_is_let_go(
    service: Service, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), np.uint8)
    Image.fromarray(pixels).save(file, "BMP")
    image = client.post("/v1/images", files={"file": ("a.bmp", file.getvalue())}).json()
    monkeypatch.setattr(serving, "_STALL", 0.3)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        connection.settimeout(20)
        url = httpx.URL(service.url)
        connection.connect((url.host, url.port or 80))
        connection.sendall(f"GET {image['url']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        time.sleep(2)
        assert 0 < len(_rest(connection)) < image["size"]


def test_a_process_takes_so_many_connections(new_settings: Callable[..., Settings]) -> None:
    with serve(new_settings(max_connections=3)) as service, ExitStack() as held:
        for _ in range(3):
            held.enter_context(_connected(service)).sendall(b"GET")
        with service.client() as client:
            time.sleep(0.2)
            assert client.get("/livez").status_code == 503
            held.close()
            time.sleep(0.2)
            assert client.get("/livez").status_code == 200
