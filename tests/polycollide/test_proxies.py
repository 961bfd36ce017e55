"""Waiting through proxies that end what is silent, over restarts, and answers cut in the middle."""

import hashlib
import socket
import time
from http.server import BaseHTTPRequestHandler

import pytest

from polycollide import ApiError, Client, PolycollideError, transport

from .conftest import END, JOB, RUNNING, Answer, drop, job, problem, reply, stream

BATCH, EVENTS, CORNERS = "GET /v1/batches/a", "GET /v1/jobs/a/events", "GET /v1/jobs/a/corners.npz"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What takes half a minute takes a second here."""
    monkeypatch.setattr(transport, "LONG_POLL", 1.0)
    monkeypatch.setattr("polycollide.jobs.LONG_POLL", 1.0)
    monkeypatch.setattr("polycollide.batches.LONG_POLL", 1.0)
    monkeypatch.setattr(transport, "SILENCE", 0.1)


class Proxied:
    """A server that holds answers back as it is asked to, behind a proxy that is less patient."""

    def __init__(self, service, patience: float, cut: Answer, seconds: float, what: str = JOB):
        self.end, self.patience, self.cut = time.monotonic() + seconds, patience, cut
        self.what, self.asked = what, list[float]()
        service.on(what, self)

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        asked = float(handler.path.partition("wait=")[2] or 0)
        self.asked.append(asked)
        held = min(asked, max(0, self.end - time.monotonic()))
        time.sleep(min(held, self.patience))
        if held > self.patience:
            self.cut(handler)
        else:
            over = time.monotonic() >= self.end
            done = "completed" if "batches" in self.what else "succeeded"
            reply(job(status=done if over else "running"))(handler)


@pytest.mark.parametrize("cut", [drop, problem(504, "gateway_timeout"), reply(b"<html>", 504)])
def test_a_wait_is_split_into_what_a_proxy_bears(service, cut):
    proxied = Proxied(service, 0.4, cut, seconds=2.5)
    with Client(service.url) as client:
        assert client.wait("a", timeout=30).succeeded
    assert proxied.asked[0] == pytest.approx(1, abs=0.1)
    # Now and then it tries whether the proxy has become patient.
    assert sum(asked > 0.4 for asked in proxied.asked) < len(proxied.asked) / 2
    assert len(proxied.asked) < 40


def test_a_batch_and_a_single_long_wait_are_split_too(service):
    Proxied(service, 0.4, drop, seconds=2, what=BATCH)
    with Client(service.url) as client:
        assert client.wait_batch("a", timeout=30).done
    Proxied(service, 0.4, drop, seconds=2)
    with Client(service.url) as client:
        assert client.job("a", wait=10).succeeded
    Proxied(service, 0.4, drop, seconds=60)
    with Client(service.url) as client:
        began = time.monotonic()
        assert client.job("a", wait=1.5).status == "running"
        assert 1.5 <= time.monotonic() - began < 5


def test_a_server_that_holds_nothing_back_answers_once(service, client):
    service.on(JOB, reply(job(status="running")))
    client.job("a", wait=0.9)
    assert len(service.received) == 1


def test_waiting_outlives_an_outage_longer_than_other_requests_do(service, monkeypatch):
    outage = [problem(503, "unavailable")] * 30
    service.on(JOB, reply(job()), *outage, reply(job(status="succeeded")))
    with Client(service.url) as client:
        assert client.wait("a").succeeded
    service.on(JOB, reply(job()), *outage, reply(job(status="succeeded")))
    monkeypatch.setattr(transport, "OUTAGE", 0.0)
    with Client(service.url) as client, pytest.raises(ApiError):
        client.wait("a")


def test_waiting_does_not_outlive_a_server_that_was_never_there():
    began = time.monotonic()
    with Client("http://127.0.0.1:9") as client, pytest.raises(PolycollideError):
        client.wait("a")
    assert time.monotonic() - began < 10


def cut_in_the_middle(body: bytes, **headers: str) -> Answer:
    """An answer without a length, whose end is where the connection ends."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    return answer


def test_an_answer_cut_in_the_middle_is_asked_for_again(service, client):
    half = cut_in_the_middle(b'{"id": "a", "status": "succ', Content_Type="application/json")
    service.on(JOB, half, half, reply(job(status="succeeded")))
    assert client.wait("a").succeeded
    zipped = cut_in_the_middle(b"\x1f\x8b\x08nonsense", Content_Encoding="gzip")
    service.on(JOB, zipped, reply(job(status="succeeded")))
    assert client.wait("a").succeeded
    assert len(service.received) == 5


def test_a_file_cut_in_the_middle_is_asked_for_again(service, client):
    whole = b"PK" + bytes(1000)
    etag = f'"{hashlib.sha256(whole).hexdigest()}"'
    service.on(CORNERS, cut_in_the_middle(whole[:500], ETag=etag), reply(whole, ETag=etag))

    async def fetch(inner) -> bytes:
        return await inner._artifact("a", "corners.npz")

    assert client._run(fetch) == whole


def silent(*chunks: str, seconds: float) -> Answer:
    """A stream that tells so much, is silent for a while, and is cut."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in map(str.encode, chunks):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        handler.wfile.flush()
        time.sleep(seconds)
        drop(handler)

    return answer


def test_a_stream_that_is_cut_for_its_silence_goes_on_however_often(service):
    cuts = [silent(seconds=0.15)] * 8
    service.on(EVENTS, silent(RUNNING, seconds=0.15), *cuts, stream(END))
    with Client(service.url, max_retries=2) as client:
        assert [event.id for event in client.events("a")] == ["1", "4"]


def test_a_stream_that_breaks_at_once_is_given_up(service, monkeypatch):
    monkeypatch.setattr(transport, "OUTAGE", 0.5)
    service.on(EVENTS, silent(seconds=0))
    with Client(service.url, max_retries=2) as client, pytest.raises(PolycollideError):
        list(client.events("a"))
