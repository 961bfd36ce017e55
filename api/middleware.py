"""Around every request: its id, its line in the log, and safe headers."""

import re
import time
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError

_log = structlog.get_logger(__name__)
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/livez", "/readyz", "/metrics")


class Envelope:
    """Gives each request an id, which its answer and its logs bear, and survives its errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 0, time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_headers)
            except ClientDisconnect:
                status = 499  # nobody is there to answer
            except Exception:
                _log.exception("request failed")
                if status:
                    raise
                await ApiError().response()(scope, receive, send_with_headers)
            finally:
                if scope["path"] not in _QUIET:
                    milliseconds = round((time.perf_counter() - began) * 1000, 1)
                    line = {"method": scope["method"], "path": scope["path"], "status": status}
                    _log.info("request", **line, milliseconds=milliseconds)
