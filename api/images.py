"""Images: sent once, named by their hash from then on."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from starlette.datastructures import UploadFile

from api import bodies, pictures
from api.bodies import Sent
from api.deps import Decoder, KeyId, Parts, Reading, Writing
from api.errors import (
    ImageInUse,
    Invalid,
    MalformedBody,
    NoSuchImage,
    QuotaExceeded,
    UnsupportedMediaType,
    responses,
)
from api.files import IfNoneMatch, answer, serves, unchanged
from api.openapi import body
from api.schemas import Image
from api.submission import media_type_of
from store import images
from store.images import Picture
from store.jobs import File

router = APIRouter(prefix="/images", tags=["images"])
_MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif")
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"file": {"type": "string", "format": "binary"}},
        "required": ["file"],
        "additionalProperties": False,
    }
}


async def _read(request: Sent, decoding: Decoder) -> Picture:
    if media_type_of(request) != "multipart/form-data":
        raise UnsupportedMediaType("Send `multipart/form-data`.")
    async with request.form(max_files=1, max_fields=0) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Invalid("The only part is `file`, which is a file.")
        name = pictures.short_name(file.filename)
        return await pictures.check(name, file, decoding)


@router.post(
    "",
    status_code=201,
    response_model=Image,
    responses=responses(*bodies.RAISES, MalformedBody, QuotaExceeded, UnsupportedMediaType)
    | {200: {"model": Image, "description": "It was there."}},
    openapi_extra=body({"multipart/form-data": _FORM}),
)
async def put(
    key_id: KeyId,
    picture: Annotated[Picture, Depends(_read, scope="function")],
    connection: Writing,
    parts: Parts,
    response: Response,
) -> Any:
    """Sends an image. It stays until it is deleted, or until no job has used it for long."""
    await parts.quota.take(connection, key_id, len(picture.content))
    if not await images.put(connection, key_id, [picture], inline=False):
        response.status_code = 200
    image = await images.get(connection, key_id, picture.sha256)
    assert image is not None
    return Image(**vars(image), url=f"/v1/images/{image.sha256}")


@serves(router, "/{sha256}", *_MEDIA_TYPES, raises=[NoSuchImage])
async def get(
    sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")],
    key_id: KeyId,
    connection: Reading,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Reads an image, byte for byte as it was sent."""
    found = await images.read(connection, key_id, sha256)
    if found is None:
        raise NoSuchImage
    name, media_type, content = found
    known = unchanged(sha256, if_none_match)
    return answer(File(sha256, media_type), None if known else content, name=name)


@router.delete("/{sha256}", status_code=204, responses=responses(NoSuchImage, ImageInUse))
async def delete(
    sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")],
    key_id: KeyId,
    connection: Writing,
    parts: Parts,
) -> None:
    """Deletes an image that no job of yours uses."""
    keep = parts.settings.keep_unreferenced_blobs
    gone = await images.delete(connection, key_id, sha256, keep)
    if gone is None:
        raise NoSuchImage
    if not gone:
        raise ImageInUse
