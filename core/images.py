"""What a user gives, turned into the image a network takes. Torch-free; no file is trusted.

Size and frames are judged from the header, before a pixel is decoded. Pillow's readers are called
directly, not through `Image.open`: its warning about large images goes through filters that all
threads share, and it takes a photograph with an appended preview for an animation.
"""

import hashlib
import io
import stat
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from core.errors import InvalidImage, UnknownName

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
MAX_SIDE = 65_535  # JPEG's own limit; Pillow's resize takes up to 48 bytes per pixel of a side
MAX_SCANS = 50  # of a JPEG of MAX_PIXELS: 70 bytes make a scan, and each walks the whole image
MAX_EXIF_BLOCKS = 100  # Pillow joins those of a JPEG in quadratic time: 3 million fit in MAX_BYTES

# Grey levels between thumbnails: photographs differ by 14 and more, a saved copy by 4 at most.
ALIKE = 7.0

_READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
}
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "RGB", "RGBA", "YCbCr", "CMYK")
_KEY_MISREAD = ("L;2", "L;4", "I;16B", "RGB;16B")  # Pillow compares a PNG's colour key unscaled
_SAMPLE = "sample:"


@dataclass(frozen=True)
class Preprocessing:
    """How a network's authors prepare an image: resize the short side, centre-crop.

    `size` is (height, width) after the crop; without `resize` an image is resized straight to it,
    whatever its aspect ratio. Raises ValueError where `resize` leaves less than the crop needs.
    """

    mode: Literal["L", "RGB"]
    size: tuple[int, int]
    resize: int | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bilinear"

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < max(self.size):
            raise ValueError(f"resize {self.resize} is smaller than the crop {self.size}")


@dataclass(frozen=True)
class Loaded:
    """An image as a network takes it."""

    pixels: NDArray[np.float32]  # [C, H, W] in [0, 1]
    notes: tuple[str, ...]  # what was changed on the way, one sentence each
    sha256: str  # of the bytes given
    thumbnail: bytes  # 64 grey levels of the whole image, by which `alike` knows it again


def sample_names() -> list[str]:
    """The images that come with the package, such as "mnist/3-0"."""
    return sorted(_samples())


def read(reference: str) -> tuple[str, bytes]:
    """A short name and the bytes of a file, or of a sample ("sample:mnist/3-0").

    Raises InvalidImage when there is no such file or it is over MAX_BYTES, and UnknownName when
    there is no such sample.
    """
    if reference.startswith(_SAMPLE):
        name, samples = reference.removeprefix(_SAMPLE), _samples()
        if name not in samples:
            raise UnknownName("sample", name, samples)
        return name, samples[name].read_bytes()
    path = Path(reference)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidImage(f"{reference!r} is not a file; give the path of an image.")
        _check_bytes(path.name, status.st_size)
        with path.open("rb") as file:
            return path.name, file.read(MAX_BYTES + 1)  # one more, so that `load` refuses it
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidImage(f"{reference!r} cannot be read ({reason}); check the path.") from error


def load(name: str, data: bytes, preprocessing: Preprocessing) -> Loaded:
    """The image in `data` (PNG, JPEG, WebP, BMP or GIF) as the network takes it.

    An image that has the network's size already keeps its pixels. Raises InvalidImage, with one
    sentence that starts with `name`, for whatever cannot be used.
    """
    _check_bytes(name, len(data))
    image, changes = _decode(name, data)
    thumbnail = image.resize((8, 8), Image.Resampling.BOX).convert("L").tobytes()
    if image.mode != preprocessing.mode:
        to_grey = preprocessing.mode == "L"
        changes.append(f"converted from {'colour to grey' if to_grey else 'grey to colour'}")
        image = image.convert(preprocessing.mode)
    if image.size != preprocessing.size[::-1]:
        image = _fit(name, image, preprocessing, changes)
    height, width = preprocessing.size
    channels_last = np.asarray(image, dtype=np.float32).reshape(height, width, -1)
    return Loaded(
        pixels=np.ascontiguousarray(channels_last.transpose(2, 0, 1)) / np.float32(255),
        notes=tuple(f"{name}: {change}" for change in changes),
        sha256=hashlib.sha256(data).hexdigest(),
        thumbnail=thumbnail,
    )


def alike(one: bytes, other: bytes) -> bool:
    """Whether two thumbnails are of the same picture, in whatever file or size it was saved.

    Their root mean square difference tells. Of 113 photographs none is nearer than 14.7 grey levels
    to another, or farther than 3.5 from itself as a JPEG of quality 10, or halved or doubled.
    """
    levels = np.frombuffer(one + other, np.uint8).reshape(2, -1).astype(np.float64)
    return bool(np.sqrt(np.mean((levels[0] - levels[1]) ** 2)) < ALIKE)


def check(name: str, data: bytes) -> tuple[str, int, int]:
    """Media type, width and height of an image that `load` takes, whatever the network.

    Raises InvalidImage, as `load` does.
    """
    _check_bytes(name, len(data))
    image, _ = _decode(name, data)
    reader = next(reader for magic, reader in _READERS.items() if data.startswith(magic))
    return Image.MIME[str(reader.format)], image.width, image.height


def to_8bit(pixels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Pixels in [0, 1] (clipped; finite, any shape) as 0 to 255, halves rounded to even.

    Computed in the precision given, so that it agrees with the same expression on tensors.
    """
    levels: NDArray[np.uint8] = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return levels


def to_png(pixels: NDArray[np.floating]) -> bytes:
    """Pixels [C, H, W] in [0, 1], C 1 (grey) or 3 (RGB), as a PNG of 8 bits."""
    if pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise ValueError(f"expected [1 or 3, H, W], got {list(pixels.shape)}")
    channels = [Image.fromarray(channel) for channel in to_8bit(pixels)]
    file = io.BytesIO()
    Image.merge("L" if len(channels) == 1 else "RGB", channels).save(file, format="PNG")
    return file.getvalue()


def _samples() -> dict[str, Traversable]:
    return {
        f"{folder.name}/{PurePosixPath(file.name).stem}": file
        for folder in (resources.files("core") / "assets").iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith((".png", ".jpg"))
    }


def _check_bytes(name: str, size: int) -> None:
    if size > MAX_BYTES:
        raise InvalidImage(f"{name} has {size:,} bytes, over {MAX_BYTES:,}; resize it.")


def _decode(name: str, data: bytes) -> tuple[Image.Image, list[str]]:
    """The upright, opaque "L" or "RGB" image in `data`, and what was changed to get it."""
    reader = next((reader for magic, reader in _READERS.items() if data.startswith(magic)), None)
    if reader is None:
        raise InvalidImage(f"{name} is no PNG, JPEG, WebP, BMP or GIF image; convert it to PNG.")
    if reader is JpegImageFile and data.count(b"Exif\0\0") > MAX_EXIF_BLOCKS:
        raise InvalidImage(f"{name} has too many Exif blocks; save it without metadata.")
    changes: list[str] = []
    try:
        file = reader(io.BytesIO(data))
        _check_header(name, file, scans=data.count(b"\xff\xda"))
        raw_mode = file.tile[0].args if file.tile else None
        file.load()
        image = _upright(file, changes)
        return _plain(name, image, raw_mode, changes), changes
    except InvalidImage:
        raise
    except Image.DecompressionBombError as error:  # from the WebP and GIF readers themselves
        raise InvalidImage(f"{name} has over {MAX_PIXELS:,} pixels; resize it.") from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise InvalidImage(f"{name} is truncated or damaged; save it again as a PNG.") from error


def _check_header(name: str, file: ImageFile.ImageFile, *, scans: int) -> None:
    width, height = file.size
    if width * height > MAX_PIXELS:
        raise InvalidImage(f"{name} is {width}x{height}, over {MAX_PIXELS:,} pixels; resize it.")
    if max(width, height) > MAX_SIDE:
        raise InvalidImage(f"{name} is {width}x{height}, a side over {MAX_SIDE:,}; resize it.")
    if getattr(file, "is_animated", False):
        raise InvalidImage(f"{name} has several frames; save the one you want as a PNG.")
    if file.format == "JPEG" and scans * width * height > MAX_SCANS * MAX_PIXELS:
        raise InvalidImage(f"{name} has too many progressive scans; save it again as a PNG.")
    if file.format == "BMP" and file.info["compression"] in (1, 2):  # decoded in slow Python
        raise InvalidImage(f"{name} is a run-length encoded BMP; save it as a PNG.")


def _upright(file: ImageFile.ImageFile, changes: list[str]) -> Image.Image:
    if "mp" in file.info:
        changes.append("only its main picture is used, not the ones appended to it")
    if file.getexif().get(ExifTag.Orientation, 1) not in range(2, 9):
        return file
    changes.append("turned upright as its EXIF orientation says")
    return ImageOps.exif_transpose(file)


def _plain(name: str, image: Image.Image, raw_mode: object, changes: list[str]) -> Image.Image:
    if image.has_transparency_data:
        misread = "transparency" in image.info and raw_mode in _KEY_MISREAD
        if misread or image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise InvalidImage(f"{name} has transparent pixels; flatten it on a background first.")
        image.info.pop("transparency", None)
        changes.append("its alpha channel, opaque everywhere, was dropped")
    if image.mode.startswith("I;16"):
        changes.append("16-bit grey rounded to 8 bits")
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # round(wide / 257)
    if image.mode not in _GREY + _COLOUR:
        raise InvalidImage(f"{name} has {image.mode} pixels; save it with 8 bits per channel.")
    if str(raw_mode).endswith(";16B"):
        changes.append("16-bit colours cut to their upper 8 bits")
    if image.mode == "CMYK":
        changes.append("converted from CMYK to RGB, ignoring colour profiles")
    return image.convert("L" if image.mode in _GREY else "RGB")


def _fit(
    name: str, image: Image.Image, preprocessing: Preprocessing, changes: list[str]
) -> Image.Image:
    """Resize and centre crop with the roundings of torchvision's `Resize(int)` and `CenterCrop`."""
    (width, height), (crop_height, crop_width) = image.size, preprocessing.size
    crop, short = f"{crop_width}x{crop_height}", preprocessing.resize
    resampling = Image.Resampling[preprocessing.interpolation.upper()]
    if short is None:
        changes.append(f"resized from {width}x{height} to {crop}")
        return image.resize((crop_width, crop_height), resampling)
    long = int(short * max(image.size) / min(image.size))
    if short * long > MAX_PIXELS:
        raise InvalidImage(f"{name} is {width}x{height}, too long and thin to resize; crop it.")
    resized = image.resize((short, long) if width <= height else (long, short), resampling)
    left, top = round((resized.width - crop_width) / 2), round((resized.height - crop_height) / 2)
    resize = f"resized from {width}x{height} to {short} on its short side, "
    changes.append((resize if resized.size != image.size else "") + f"centre crop {crop}")
    return resized.crop((left, top, left + crop_width, top + crop_height))
