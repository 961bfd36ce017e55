"""A real HTTP server whose every answer a test writes down, faults included."""

import email
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest

from polycollide import Client, transport

PAIR = ("sample:mnist/3-0", "sample:mnist/7-0")
JOB = "GET /v1/jobs/a"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Received(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedService:
    """Answers in the order in which a test lists them for a route; the last one again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.received: list[Received] = []
        self.at_once = self.most_at_once = 0
        self._answers: dict[str, list[Answer]] = {}
        self._lock = threading.Lock()

    def on(self, route: str, *answers: Answer) -> None:
        self._answers[route] = list(answers)

    def to(self, route: str) -> list[Received]:
        return [r for r in self.received if f"{r.method} {r.path}" == route]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        length = int(handler.headers.get("Content-Length", 0))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        received = Received(
            *(handler.command, parts.path, dict(parse_qsl(parts.query)), headers),
            handler.rfile.read(length),
        )
        with self._lock:
            self.received.append(received)
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
            answers = self._answers.get(
                f"{handler.command} {parts.path}", [problem(404, "unknown")]
            )
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        try:
            answer(handler)
        finally:
            with self._lock:
                self.at_once -= 1


def reply(body: Any, status: int = 200, **headers: str) -> Answer:
    """JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def problem(status: int, code: str, detail: str = "It is so.", **more: Any) -> Answer:
    headers = {k: str(v) for k, v in more.items() if k == "Retry_After"}
    more = {k: v for k, v in more.items() if k not in headers}
    return reply({"status": status, "code": code, "detail": detail, **more}, status, **headers)


def drop(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends without an answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def late(seconds: float, then: Answer) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        try:
            then(handler)
        except OSError:  # nobody waits any more
            handler.close_connection = True

    return answer


def stream(*chunks: str, cut: bool = False) -> Answer:
    """Chunks of a body; with `cut` the connection breaks before the body's end."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in map(str.encode, chunks):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            handler.wfile.flush()
        if cut:
            drop(handler)
        else:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def job(id: str = "a", status: str = "queued", **fields: Any) -> dict[str, Any]:
    """A job as the service shows it."""
    return {"id": id, "status": status, "urls": {"self": f"/v1/jobs/{id}"}, **fields}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client went away
            self.close_connection = True

    def _answer(self) -> None:
        self.server.service.answer(self)  # type: ignore[attr-defined]

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # 5 would leave the sixth connection of a burst waiting for a second


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedService]:
    """A server for one test. Clients of this process send again without long pauses."""
    monkeypatch.setattr(transport, "BACKOFF", lambda state: 0.01)
    with _Server(("127.0.0.1", 0), _Handler) as server:
        scripted = ScriptedService(f"http://127.0.0.1:{server.server_address[1]}")
        server.service = scripted  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield scripted
        server.shutdown()
        thread.join()


def parts(received: Received) -> dict[str, email.message.Message]:
    """The parts of a form by their names."""
    head = f"Content-Type: {received.headers['content-type']}\r\n\r\n".encode()
    form = email.message_from_bytes(head + received.body)
    return {part.get_param("name", header="content-disposition"): part for part in form.walk()}


def event(number: int, kind: str, data: str) -> str:
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n"


RUNNING, STEP = event(1, "status", '{"status": "running"}'), event(2, "progress", '{"steps": 10}')
END = event(4, "status", '{"status": "succeeded"}')


@pytest.fixture
def client(service: ScriptedService) -> Iterator[Client]:
    with Client(service.url, "pc_test") as client:
        yield client
