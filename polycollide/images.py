"""An image as a user has it, made into what the service takes. Knows numpy, not pillow."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polycollide.errors import InvalidInput

# What the service knows by name or by content already.
REFERENCES = ("sample:", "sha256:", "base64:")
# The path of a file, one of REFERENCES, the bytes of a file, or what numpy takes for an array:
# floats in [0, 1] as [H, W] or [C, H, W], or 8-bit integers as [H, W] or [H, W, 3], as Pillow has.
ImageLike = str | Path | ArrayLike
# A reference as it is, or a file's name and content.
Given = str | tuple[str, bytes]


def given(image: ImageLike) -> Given:
    """What there is to send for `image`; raises InvalidInput where it is none."""
    if isinstance(image, bytes | bytearray | memoryview):
        return "image", bytes(image)
    if is_reference(image):
        return str(image)
    if isinstance(image, str | Path):
        try:
            return Path(image).name, Path(image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidInput(
                f"{str(image)!r} cannot be read ({reason}); check the path."
            ) from error
    return "array.png", to_png(image)


def is_reference(image: ImageLike) -> bool:
    """Whether the service has this image already."""
    return isinstance(image, str) and image.startswith(REFERENCES)


def identity(image: ImageLike) -> str | int:
    """Alike for what is surely the same image: one path, one reference, or one object."""
    return str(image) if isinstance(image, str | Path) else id(image)


def to_png(array: ImageLike) -> bytes:
    """An array (see ImageLike) as a PNG of 8 bits, grey or RGB."""
    pixels = given = np.asarray(array)
    if np.issubdtype(pixels.dtype, np.floating):
        if not ((pixels >= 0) & (pixels <= 1)).all():  # NaN is neither
            raise InvalidInput("An image of floats must lie in [0, 1]; divide 0-255 by 255.")
        channels_last = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels
        pixels = np.rint(channels_last * pixels.dtype.type(255)).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not is_image or not pixels.size:
        raise InvalidInput(
            f"An array of {given.dtype} {list(given.shape)} is no image; give "
            "floats [H, W] or [1 or 3, H, W], or uint8 [H, W] or [H, W, 3]."
        )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunks(pixels))


def _chunks(pixels: NDArray[np.uint8]) -> Iterator[bytes]:
    """The parts of a PNG of pixels [H, W] (grey) or [H, W, 3]."""
    height, width = pixels.shape[:2]
    header = struct.pack(">2I5B", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    unfiltered = np.zeros((height, 1), np.uint8)  # each row starts with the filter it went through
    rows = np.hstack([unfiltered, pixels.reshape(height, -1)]).tobytes()
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data)
        yield struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
