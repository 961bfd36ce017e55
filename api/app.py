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
from api.middleware import BodyLimit, Envelope
from store.database import connect_async
from store.settings import Settings
from store.settings import settings as own_settings

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
        hub, doorbell = Hub(reading), Doorbell(settings)
        app.state.services = Services(
            settings=settings,
            engine=engine,
            reading=reading,
            hub=hub,
            doorbell=doorbell,
            decoding=asyncio.Semaphore(2),
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

    # /docs with scripts of its own: it works where the internet is not.
    app = FastAPIOffline(
        title="polycollide",
        version=version("polycollide"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    everywhere = errors.responses(errors.Unauthorized, errors.ForeignPage, errors.Invalid)
    v1 = APIRouter(prefix="/v1", responses=everywhere | errors.responses(errors.Unavailable))
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
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Envelope)
    errors.install(app)
    openapi.install(app)
    return app
