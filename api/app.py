"""The service's HTTP side, put together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline

from api import batches, errors, events, files, images, jobs, openapi, ops
from api.deps import Services
from api.doorbell import Doorbell
from api.hub import Hub
from api.middleware import Envelope
from api.quota import Quota
from api.turns import TooManyRequests, Turns
from store.database import connect_async
from store.settings import Settings
from store.settings import settings as own_settings

# Requests of a key that wait for their turn, before more of them are refused.
_LINE = 500
_DESCRIPTION = (
    "Finds approximate feature collisions in image classifiers: images that start from a source "
    "and share a target's activations, and the polytope they span."
)


def create(settings: Settings | None = None) -> FastAPI:
    """The app; with this process's settings unless others are given."""
    settings = settings or own_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine, reading = connect_async(settings), connect_async(settings, reading=True)
        direct = connect_async(settings, reading=True, direct=True)
        hub, doorbell = Hub(direct), Doorbell(settings)
        app.state.services = Services(
            settings=settings,
            engine=engine,
            reading=reading,
            hub=hub,
            doorbell=doorbell,
            quota=Quota(settings.max_key_bytes),
            # Of the reading pool's 20 some are left to those who ask who may ask, and who listen.
            database=Turns(16, each=8, waiting=_LINE, patience=20),
            bodies=Turns(64, each=16, waiting=_LINE, patience=60),
            large=Turns(4, each=2, waiting=_LINE, patience=60),
            decoding=Turns(2, each=1, waiting=_LINE),
            waits=Turns(settings.max_connections, each=settings.max_waits, waiting=0),
        )
        listening = asyncio.create_task(hub.run())
        try:
            yield
        finally:
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
            await doorbell.close()
            await engine.dispose()
            await reading.dispose()
            await direct.dispose()

    # /docs with scripts of its own: it works where the internet is not.
    app = FastAPIOffline(
        title="polycollide",
        version=version("polycollide"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    everywhere = errors.responses(
        errors.Unauthorized,
        errors.ForeignPage,
        errors.Invalid,
        TooManyRequests,
        errors.Unavailable,
    )
    v1 = APIRouter(prefix="/v1", responses=everywhere)
    for router in (
        jobs.router,
        events.router,
        files.router,
        images.router,
        batches.router,
        ops.router,
    ):
        v1.include_router(router)
    app.include_router(v1)
    app.include_router(ops.root)
    app.add_middleware(Envelope)
    errors.install(app)
    openapi.install(app)
    return app
