"""What routes ask for: the key, connections, settings, and the process's own long-lived parts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from api.doorbell import Doorbell
from api.errors import ForeignPage, Unauthorized
from api.hub import Hub
from api.quota import Quota
from api.turns import Turn, Turns
from store import keys
from store.settings import Settings


@dataclass
class Services:
    """What lives as long as the process."""

    settings: Settings
    engine: AsyncEngine  # transactions
    reading: AsyncEngine  # each statement by itself
    hub: Hub
    doorbell: Doorbell
    quota: Quota
    # Of which each key has a share:
    database: Turns  # connections
    bodies: Turns  # requests with a body
    large: Turns  # those whose body is large, once it is here: each may take 300 MB
    decoding: Turns  # images at once: each may take 600 MB
    waits: Turns  # streams and held-back answers
    local_key: UUID | None = None  # once it is known to exist

    @asynccontextmanager
    async def read(self, key_id: UUID) -> AsyncIterator[AsyncConnection]:
        """A connection on which each statement is a transaction, when it is the key's turn."""
        async with self.database.of(key_id), self.reading.connect() as connection:
            yield connection

    async def check(self, key_id: UUID) -> None:
        """Raises Unauthorized where the key was revoked while something took its time."""
        async with self.read(key_id) as connection:
            if not await keys.is_open(connection, key_id):
                raise Unauthorized


def services(request: Request) -> Services:
    """The process's parts."""
    found: Services = request.app.state.services
    return found


Parts = Annotated[Services, Depends(services)]


async def _key(
    request: Request,
    parts: Parts,
    bearer: Annotated[
        HTTPAuthorizationCredentials | None,
        Security(HTTPBearer(auto_error=False, description="An API key, `pc_...`.")),
    ],
) -> UUID:
    if parts.settings.keyless and bearer is None:
        _check_local(request)
        if parts.local_key is None:
            async with parts.engine.begin() as connection:
                parts.local_key = await keys.local(connection)
        return parts.local_key
    if bearer is None:
        raise Unauthorized
    async with parts.reading.connect() as connection:
        key_id = await keys.authenticate(connection, bearer.credentials)
    if key_id is None:
        raise Unauthorized
    return key_id


# Scopes end, and transactions commit, before the response is sent.
KeyId = Annotated[UUID, Depends(_key)]


async def _decoder(key_id: KeyId, parts: Parts) -> Turn:
    return parts.decoding.of(key_id)


async def _read(key_id: KeyId, parts: Parts) -> AsyncIterator[AsyncConnection]:
    async with parts.read(key_id) as connection:
        yield connection


async def _write(key_id: KeyId, parts: Parts) -> AsyncIterator[AsyncConnection]:
    async with parts.database.of(key_id), parts.engine.begin() as connection:
        # The body may have come for minutes since the key was looked at.
        if not await keys.is_open(connection, key_id):
            raise Unauthorized
        yield connection


Decoder = Annotated[Turn, Depends(_decoder)]
Reading = Annotated[AsyncConnection, Depends(_read, scope="function")]
Writing = Annotated[AsyncConnection, Depends(_write, scope="function")]

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def _check_local(request: Request) -> None:
    """Raises ForeignPage where a name that is not ours led here, or another site's page asks."""
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    origin = request.headers.get("origin")
    if name.lower() not in _LOCAL_HOSTS or origin not in (None, f"http://{host}"):
        raise ForeignPage
