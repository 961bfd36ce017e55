"""Postgres tells which job has changed: LISTEN and NOTIFY."""

from collections.abc import AsyncIterator
from uuid import UUID

import psycopg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from store.moves import CHANNEL


async def listen(engine: AsyncEngine) -> AsyncIterator[UUID | None]:
    """The ids of jobs as they change; first None, once it hears. Ends with its connection.

    Raises SQLAlchemy's OperationalError when there is no connection to be had.
    """
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text(f"LISTEN {CHANNEL}"))
        raw = (await connection.get_raw_connection()).driver_connection
        assert isinstance(raw, psycopg.AsyncConnection)
        yield None
        try:
            async for notice in raw.notifies():
                yield UUID(notice.payload)
        except psycopg.OperationalError:
            return
        finally:
            # It must not go back to the pool: it would go on listening there.
            await connection.invalidate()
