"""Connections: asynchronous for the API, synchronous for workers; one driver for both."""

from importlib.resources import files
from typing import Any

from alembic import command
from alembic.config import Config
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from store.settings import Settings

# A statement that waits longer than this has met a lock that somebody forgot.
TIMEOUTS = "-c lock_timeout=30s -c idle_in_transaction_session_timeout=60s -c timezone=UTC"
_CONNECT = {
    "connect_timeout": 5,
    "options": TIMEOUTS,
    # A peer that vanished without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}


def connect(settings: Settings) -> Engine:
    """For workers, the reconciler and commands. A connection is tested before it is used."""
    engine = create_engine(
        settings.sqlalchemy_url,
        connect_args=_CONNECT,
        pool_pre_ping=True,
        pool_size=4,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _send_lists_in_binary)
    return engine


def connect_async(settings: Settings, *, reading: bool = False) -> AsyncEngine:
    """For the API; for `reading`, each statement is a transaction of its own."""
    engine = create_async_engine(
        settings.sqlalchemy_url,
        # Of the pool, not of a checkout: changing it there takes as long as a query.
        isolation_level="AUTOCOMMIT" if reading else "READ COMMITTED",
        connect_args=_CONNECT,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=10,
        pool_timeout=10,
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "connect", _send_lists_in_binary)
    return engine


def _send_lists_in_binary(connection: Any, _: object) -> None:
    """As text, which is psycopg's default, an array of blobs takes seven times as long."""
    raw = getattr(connection, "driver_connection", connection)
    raw.adapters.register_dumper(list, ListBinaryDumper)


def migrate(settings: Settings, revision: str = "head") -> None:
    """Brings the schema to `revision`."""
    command.upgrade(migrations(settings), revision)


def migrations(settings: Settings) -> Config:
    """Alembic, set to this database."""
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.attributes["url"] = settings.sqlalchemy_url
    return config
