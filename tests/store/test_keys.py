"""Keys: shown once, told from others in constant time, closed for good."""

import asyncio
from uuid import UUID

from sqlalchemy import Connection, Engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from store import keys


def authenticated(engine: Engine, *given: str) -> list[UUID | None]:
    async def ask() -> list[UUID | None]:
        own = create_async_engine(engine.url)
        try:
            async with own.connect() as connection:
                return [await keys.authenticate(connection, key) for key in given]
        finally:
            await own.dispose()

    return asyncio.run(ask())


def test_a_new_key_opens_and_is_kept_only_as_a_hash(engine: Engine, connection: Connection) -> None:
    key, full = keys.create(connection, "notebook")
    connection.commit()
    mark, prefix, secret = full.split("_")
    assert (mark, prefix, len(prefix), len(secret)) == ("pc", key.prefix, 8, 43)
    row = connection.execute(text("SELECT * FROM api_keys")).one()
    assert len(row.sha256) == 32 and secret not in repr(row)
    assert authenticated(engine, full) == [key.id]


def test_nothing_else_opens(engine: Engine, connection: Connection) -> None:
    key, full = keys.create(connection, "a")
    other, other_full = keys.create(connection, "b")
    connection.commit()
    wrong = full[:-1] + ("a" if full[-1] != "a" else "b")
    crossed = f"pc_{key.prefix}_{other_full.split('_')[2]}"
    unknown = f"pc_{'0' * 8}_{'0' * 43}"
    bad = ["", "pc_", full + "a", full.upper(), f" {full}", "pc_\x00", f"pc_{'%' * 8}_{'a' * 43}"]
    assert authenticated(engine, wrong, crossed, unknown, *bad) == [None] * (3 + len(bad))
    assert authenticated(engine, other_full) == [other.id]


def test_keys_are_listed_and_revoked_once_and_for_all(
    engine: Engine, connection: Connection
) -> None:
    keys.create(connection, "a")
    connection.commit()  # else they were as old as each other
    key, full = keys.create(connection, "b")
    revoked = keys.revoke(connection, key.prefix)
    connection.commit()
    assert revoked is not None and revoked.revoked_at is not None
    assert keys.revoke(connection, key.prefix) == revoked
    assert keys.revoke(connection, "00000000") is None
    assert [own.revoked_at is None for own in keys.listed(connection)] == [True, False]
    assert authenticated(engine, full) == [None]


def test_the_built_in_key_is_made_once_and_is_no_key_to_anything(engine: Engine) -> None:
    async def twice() -> set[UUID]:
        own = create_async_engine(engine.url)
        try:
            ids = set()
            for _ in range(2):
                async with own.begin() as connection:
                    ids.add(await keys.local(connection))
            return ids
        finally:
            await own.dispose()

    assert len(asyncio.run(twice())) == 1
    assert authenticated(engine, "local", "pc_local", "pc_local_") == [None] * 3
    with engine.begin() as connection:
        assert keys.revoke(connection, keys.LOCAL) is None
