"""How the app is served: by uvicorn, with an end to what a client leaves half done."""

import asyncio
import socket
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.app import create
from store.settings import Settings

# Where a peer vanishes without a word, so long until its connection is given up.
_UNHEARD_MILLISECONDS = 60_000
# A client that takes nothing of its answer for so long does not want it.
_STALL = 60.0


def config(settings: Settings, **given: Any) -> uvicorn.Config:
    """The app of these settings on their host and port."""

    class Own(Impatient):
        header_seconds = settings.header_timeout.total_seconds()

    own: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "http": Own,
        "limit_concurrency": settings.max_connections,
        "log_config": None,
        "access_log": False,  # our own line has ids
        "server_header": False,
        # Those who wait or watch ask again elsewhere.
        "timeout_graceful_shutdown": 5,
    }
    return uvicorn.Config(create(settings), **own | given)


class Impatient(H11Protocol):
    """uvicorn's own, which waits for ever for the rest of a request and for a slow reader."""

    header_seconds: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            option = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNHEARD_MILLISECONDS)
            connection.setsockopt(*option)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._limit, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def _expect(self) -> None:
        """While no request is being answered, the head of one has to come, or the rest of one that
        was answered before its end; counted from the first byte, not from the last.
        """
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._limit is not None:
            self._limit.cancel()
            self._limit = None
        elif not answering and self._limit is None:
            self._limit = self.loop.call_later(self.header_seconds, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _watch(self, unsent: int) -> None:
        self._stall = self.loop.call_later(_STALL, self._check, unsent)

    def _check(self, unsent: int) -> None:
        if (left := self.transport.get_write_buffer_size()) < unsent:
            self._watch(left)
        else:
            self.transport.abort()
