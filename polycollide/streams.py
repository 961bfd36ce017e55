"""Reading what the service streams: lines, and server-sent events."""

from collections.abc import AsyncIterator

import httpx
from pydantic_core import from_json

from polycollide.answers import Event


async def lines(response: httpx.Response) -> AsyncIterator[bytes]:
    r"""The lines of an answer.

    Unlike httpx's own, only those that end in \n: JSON may hold other line separators as they are.
    """
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


async def server_sent(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a `text/event-stream`; comments, which keep the connection alive, are not."""
    fields: dict[str, str] = {}
    async for line in lines(response):
        name, _, value = line.rstrip(b"\r").decode().partition(":")
        value = value.removeprefix(" ")
        if name == "data" and "data" in fields:
            fields["data"] += f"\n{value}"
        elif name:
            fields[name] = value
        elif not line.rstrip(b"\r"):
            if "data" in fields:
                yield Event.model_validate(fields | {"data": from_json(fields["data"])})
            fields = {}
