"""API keys: `pc_<prefix>_<secret>`, shown once; the store knows the prefix and a hash."""

import hashlib
import secrets
import string
import uuid
from dataclasses import dataclass
from datetime import datetime
from hmac import compare_digest

from sqlalchemy import Connection, RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

LOCAL = "local"  # the built-in key's name and prefix; no secret opens it
_ALPHABET = string.ascii_letters + string.digits
_PREFIX_LENGTH, _SECRET_LENGTH = 8, 43  # 256 bits


@dataclass(frozen=True)
class Key:
    """What may be shown of a key."""

    id: uuid.UUID
    name: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None


_COLUMNS = "id, name, prefix, created_at, revoked_at"
_CREATE = text(f"""
    INSERT INTO api_keys (id, name, prefix, sha256) VALUES (:id, :name, :prefix, :sha256)
    RETURNING {_COLUMNS}
""")
_LIST = text(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, prefix")
_REVOKE = text(f"""
    UPDATE api_keys SET revoked_at = COALESCE(revoked_at, now())
    WHERE prefix = :prefix AND sha256 IS NOT NULL RETURNING {_COLUMNS}
""")
_FIND = text("SELECT id, sha256 FROM api_keys WHERE prefix = :prefix AND revoked_at IS NULL")
_OPEN = text("SELECT EXISTS (SELECT FROM api_keys WHERE id = :id AND revoked_at IS NULL)")
_LOCAL = text("""
    INSERT INTO api_keys (id, name, prefix) VALUES (:id, :name, :name)
    ON CONFLICT (prefix) DO UPDATE SET name = excluded.name RETURNING id
""")


def create(connection: Connection, name: str) -> tuple[Key, str]:
    """A new key, and the key itself, which can never be read again."""
    prefix, secret = _random(_PREFIX_LENGTH), _random(_SECRET_LENGTH)
    full = f"pc_{prefix}_{secret}"
    row = connection.execute(
        _CREATE, {"id": uuid.uuid4(), "name": name, "prefix": prefix, "sha256": _hash(full)}
    )
    return _key(row.mappings().one()), full


def listed(connection: Connection) -> list[Key]:
    """Every key, the revoked ones too, the oldest first."""
    return [_key(row) for row in connection.execute(_LIST).mappings()]


def revoke(connection: Connection, prefix: str) -> Key | None:
    """Closes the key with this prefix for good; None where there is none to close."""
    row = connection.execute(_REVOKE, {"prefix": prefix}).mappings().one_or_none()
    return None if row is None else _key(row)


async def authenticate(connection: AsyncConnection, full: str) -> uuid.UUID | None:
    """The id of the key that `full` is; None where it is none, or is revoked."""
    mark, _, rest = full.partition("_")
    prefix, _, secret = rest.partition("_")
    lengths = (len(prefix), len(secret))
    if mark != "pc" or lengths != (_PREFIX_LENGTH, _SECRET_LENGTH) or not prefix.isalnum():
        return None
    row = (await connection.execute(_FIND, {"prefix": prefix})).one_or_none()
    # Hashed and compared in any case, so that the time taken does not tell which prefixes exist.
    known = row.sha256 if row is not None and row.sha256 is not None else bytes(32)
    return row.id if compare_digest(_hash(full), bytes(known)) and row is not None else None


async def is_open(connection: AsyncConnection, key_id: uuid.UUID) -> bool:
    """Whether a key that was good a while ago still is."""
    return bool(await connection.scalar(_OPEN, {"id": key_id}))


async def local(connection: AsyncConnection) -> uuid.UUID:
    """The id of the built-in key that keyless requests act for; created when first asked for."""
    found: uuid.UUID = await connection.scalar(_LOCAL, {"id": uuid.uuid4(), "name": LOCAL})
    return found


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _hash(full: str) -> bytes:
    return hashlib.sha256(full.encode()).digest()


def _key(row: RowMapping) -> Key:
    return Key(**row)
