"""Connections: asynchronous for the API, synchronous for workers; one driver for both."""

from importlib.resources import files
from typing import Any

from alembic import command
from alembic.config import Config
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from store.settings import Settings

# A statement that waits longer than this has met a lock that somebody forgot.
_SESSION = {
    "lock_timeout": "30s",
    "idle_in_transaction_session_timeout": "60s",
    "timezone": "UTC",
}
TIMEOUTS = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
_CONNECT = {
    "connect_timeout": 5,
    # A peer that vanished without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    # Keepalives say nothing while something is on its way: the kernel would send it again for a
    # quarter of an hour. In milliseconds, and well below a lease.
    "tcp_user_timeout": 15_000,
}


def _connect_args(settings: Settings, *, direct: bool) -> dict[str, Any]:
    # A pooler refuses options, and its sessions are anybody's: `migrate` makes them the role's.
    pooled = settings.database_direct_url is not None and not direct
    options = {} if pooled else {"options": TIMEOUTS}
    unprepared = {} if settings.prepare_statements else {"prepare_threshold": None}
    return _CONNECT | options | unprepared


def connect(settings: Settings) -> Engine:
    """For workers, the reconciler and commands. A connection is tested before it is used."""
    engine = create_engine(
        settings.sqlalchemy_url,
        connect_args=_connect_args(settings, direct=False),
        pool_pre_ping=True,
        pool_size=4,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _send_lists_in_binary)
    return engine


def connect_async(
    settings: Settings, *, reading: bool = False, direct: bool = False
) -> AsyncEngine:
    """For the API; for `reading`, each statement is a transaction of its own.

    `direct` goes past a pooler: what a session hears of is lost in one that is shared.
    """
    engine = create_async_engine(
        settings.direct_sqlalchemy_url if direct else settings.sqlalchemy_url,
        # Of the pool, not of a checkout: changing it there takes as long as a query.
        isolation_level="AUTOCOMMIT" if reading else "READ COMMITTED",
        connect_args=_connect_args(settings, direct=direct),
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
    if settings.database_direct_url is not None:
        _set_for_role(settings)


def _set_for_role(settings: Settings) -> None:
    """What a pooler lets no client set becomes what our role's sessions begin with."""
    engine = create_engine(settings.direct_sqlalchemy_url, connect_args=_CONNECT)
    database = engine.dialect.identifier_preparer.quote(engine.url.database or "")
    with engine.begin() as connection:
        for name, value in _SESSION.items():
            role = f"ALTER ROLE CURRENT_USER IN DATABASE {database}"
            connection.execute(text(f"{role} SET {name} = '{value}'"))
    engine.dispose()


def migrations(settings: Settings) -> Config:
    """Alembic, set to this database."""
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.attributes["url"] = settings.direct_sqlalchemy_url
    return config
