"""A request's body: received to disk within limits of size and time, and handed on whole.

What is half sent holds a connection and a file, neither memory nor a connection to the database.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from tempfile import SpooledTemporaryFile
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from api.deps import KeyId, Parts
from api.errors import ApiError, BodyTooLarge

# A body up to here stays in memory, and is not counted as a large one.
SMALL = 2**20
# Below it a sender is taken for one that only means to stay.
BYTES_PER_SECOND = 2**14
_CHUNK = 2**16


class BodyTooSlow(ApiError):
    """The body did not come in time; send it again over a better connection, or in parts."""

    status, code, title = 408, "body_too_slow", "Body too slow"
    headers = {"Connection": "close"}  # noqa: RUF012 - a constant


class NoRoom(ApiError):
    """This service's disk has no room for the body; try again later, or tell its operator."""

    status, code, title = 507, "no_room", "No room"


async def _receive(request: Request, key_id: KeyId, parts: Parts) -> AsyncIterator[Request]:
    """The request with its body at hand, until it is answered; few large ones at a time."""
    settings = parts.settings
    with SpooledTemporaryFile(max_size=SMALL) as file:
        async with parts.bodies.of(key_id):
            size = await _spool(
                request,
                file,
                most=settings.max_body_bytes,
                silence=settings.body_timeout.total_seconds(),
            )
            async with parts.large.of(key_id) if size > SMALL else nullcontext():
                yield Request(request.scope, _again(file, request.receive))


Sent = Annotated[Request, Depends(_receive, scope="function")]
RAISES: tuple[type[ApiError], ...] = (BodyTooLarge, BodyTooSlow)


async def _spool(
    request: Request, file: "SpooledTemporaryFile[bytes]", *, most: int, silence: float
) -> int:
    """Writes the body into `file`; its size."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise _too_large(most)
    loop = asyncio.get_running_loop()
    began, size = loop.time(), 0
    try:
        while True:
            patience = began + silence + size / BYTES_PER_SECOND - loop.time()
            async with asyncio.timeout(min(silence, patience)):
                message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            if size > SMALL:
                await asyncio.to_thread(file.write, chunk)
            else:
                file.write(chunk)
            if not message.get("more_body", False):
                file.seek(0)
                return size
    except TimeoutError:
        raise BodyTooSlow from None
    except OSError as error:
        raise NoRoom from error


def _again(file: "SpooledTemporaryFile[bytes]", after: Receive) -> Receive:
    """Gives the body as if it came just now, and then what comes after it."""
    ended = False

    async def receive() -> Message:
        nonlocal ended
        if ended:
            return await after()
        chunk = file.read(_CHUNK)
        ended = len(chunk) < _CHUNK
        return {"type": "http.request", "body": chunk, "more_body": not ended}

    return receive


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The body has over {most:,} bytes; send smaller images, or several batches."
    )
