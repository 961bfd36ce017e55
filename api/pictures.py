"""Images as requests name them or bring them: bounded, decoded to be sure, and given a hash.

No connection is held meanwhile. What a hash names is looked up later, with what is stored.
"""

import asyncio
import base64
import binascii
import unicodedata
from dataclasses import dataclass
from functools import cache

from starlette.datastructures import UploadFile

from api.turns import Turn
from core import images
from core.errors import InvalidImage
from store.blobs import digest
from store.images import Picture

MAX_NAME = 200
SAMPLE, HASH, INLINE = "sample:", "sha256:", "base64:"


@dataclass(frozen=True)
class Known:
    """An image that is to be in the store already."""

    sha256: str


async def resolve(reference: str, name: str, decoding: Turn) -> Picture | Known:
    """What an image reference names; `name` is for one that comes inline.

    Raises InvalidImage or UnknownName.
    """
    if reference.startswith(HASH):
        sha256 = reference.removeprefix(HASH)
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise InvalidImage(f"{name}: after `sha256:` come 64 hexadecimal digits in lower case.")
        return Known(sha256)
    if reference.startswith(SAMPLE):
        return _sample(reference)
    if reference.startswith(INLINE):
        async with decoding:
            return await asyncio.to_thread(inline, name, reference)
    raise InvalidImage(f"{name} is to be `sample:<name>`, `sha256:<hash>` or `base64:<data>`.")


async def check(name: str, file: UploadFile, decoding: Turn) -> Picture:
    """An image that was sent, decoded once to see that it can be. Raises InvalidImage."""
    async with decoding:
        # One byte more than an image may have, so that one that has more is refused.
        content = await file.read(images.MAX_BYTES + 1)
        return await asyncio.to_thread(_check, name, content)


def short_name(name: str | None) -> str:
    """A file's name as it is kept: no path, nothing that does not print, not too long."""
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    printable = "".join(c for c in last if unicodedata.category(c)[0] not in "CZ" or c == " ")
    return printable.strip()[:MAX_NAME] or "image"


def inline(name: str, reference: str) -> Picture:
    """An image that comes in base64. Blocks while it is decoded. Raises InvalidImage."""
    encoded = reference.removeprefix(INLINE)
    if len(encoded) > (images.MAX_BYTES + 2) * 4 / 3:
        raise InvalidImage(f"{name} has over {images.MAX_BYTES:,} bytes; resize it.")
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(f"{name} is no valid base64.") from error
    return _check(name, content)


@cache
def _sample(reference: str) -> Picture:
    name, content = images.read(reference)
    return _check(name, content)


def _check(name: str, content: bytes) -> Picture:
    media_type, width, height = images.check(name, content)
    return Picture(digest(content), name, media_type, width, height, content)
