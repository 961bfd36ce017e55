"""Images from users: what comes out equals torchvision and numpy, and nothing dangerous goes in."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from core import images
from core.errors import InvalidImage, UnknownName
from core.images import Loaded, Preprocessing, check, load, read, sample_names, to_8bit, to_png

Pixels = NDArray[np.uint8]

GREY = Preprocessing(mode="L", size=(28, 28))
COLOUR = Preprocessing(mode="RGB", size=(20, 20), resize=24)


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    """A colour image that compresses, and whose decoding reads every part of the file."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(x / 7), 127 + 120 * np.cos(y / 5), (x * y) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image | Pixels, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG written by hand: `rows` unfiltered, each after a zero byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + body + chunk(b"IEND", b"")


def as_is(data: bytes, mode: str, size: tuple[int, int]) -> Loaded:
    """Loaded for a network that takes exactly this size."""
    return load("x.png", data, Preprocessing(mode, size))  # type: ignore[arg-type]


def levels(loaded: Loaded) -> Pixels:
    """Back to 0..255, [H, W] or [H, W, 3], without using to_8bit."""
    exact = loaded.pixels.astype(np.float64) * 255
    whole = np.round(exact)
    assert np.abs(exact - whole).max() < 1e-4
    return whole.astype(np.uint8).transpose(1, 2, 0).squeeze(-1 if len(whole) == 1 else ())


def refusal(data: bytes, preprocessing: Preprocessing = COLOUR) -> str:
    with pytest.raises(InvalidImage) as caught:
        load("x.png", data, preprocessing)
    message = str(caught.value)
    assert message.startswith("x.png ") and message.endswith(".")
    assert ". " not in message and "\n" not in message and "; " in message
    return message


# What comes out


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resize_and_crop_equal_torchvision_pixel_by_pixel(mode: str, interpolation: str) -> None:
    numbers = np.random.default_rng(7)
    for _ in range(25):
        height, width = (int(n) for n in numbers.integers(5, 300, 2))
        crop = (int(numbers.integers(1, 49)), int(numbers.integers(1, 49)))
        resize = max(crop) + int(numbers.integers(0, 30))
        image = Image.fromarray(noise(height, width, 3, seed=height)).convert(mode)
        expected = transforms.Compose(
            [
                transforms.Resize(resize, InterpolationMode(interpolation)),
                transforms.CenterCrop(crop),
                transforms.PILToTensor(),
            ]
        )(image)
        preparation = Preprocessing(mode, crop, resize, interpolation)  # type: ignore[arg-type]
        loaded = load("x.png", encode(image), preparation)
        assert torch.equal(torch.from_numpy(loaded.pixels), expected.float() / 255)


@pytest.mark.parametrize("height, width", [(31, 57), (57, 31), (14, 900), (28, 29)])
def test_without_resize_the_image_is_stretched_as_torchvision_does(height: int, width: int) -> None:
    image = Image.fromarray(noise(height, width))
    expected = transforms.PILToTensor()(transforms.Resize((28, 20))(image))
    loaded = load("x.png", encode(image), Preprocessing("L", (28, 20)))
    assert torch.equal(torch.from_numpy(loaded.pixels), expected.float() / 255)
    assert loaded.notes == (f"x.png: resized from {width}x{height} to 20x28",)


def test_pixels_are_contiguous_float32_channels_first() -> None:
    loaded = load("x.png", encode(noise(40, 30, 3)), COLOUR)
    assert loaded.pixels.shape == (3, 20, 20) and loaded.pixels.dtype == np.float32
    assert loaded.pixels.flags.c_contiguous and loaded.pixels.flags.writeable


def test_an_image_of_the_networks_size_keeps_its_pixels_whatever_resize_says() -> None:
    pixels = noise(224, 224, 3)
    loaded = load("x.png", encode(pixels), Preprocessing("RGB", (224, 224), resize=256))
    assert np.array_equal(levels(loaded), pixels) and loaded.notes == ()


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
def test_a_downloaded_corner_comes_back_as_the_very_same_pixels(mode: str, channels: int) -> None:
    pixels = np.random.default_rng(1).uniform(-0.1, 1.1, (channels, 32, 24)).astype(np.float32)
    once = as_is(to_png(pixels), mode, (32, 24))
    assert np.array_equal(to_8bit(once.pixels), to_8bit(pixels)) and once.notes == ()
    assert np.array_equal(as_is(to_png(once.pixels), mode, (32, 24)).pixels, once.pixels)


def test_notes_name_the_image_its_sizes_and_the_crop() -> None:
    preparation = Preprocessing("RGB", (224, 224), resize=256)
    loaded = load("source.png", encode(noise(480, 640, 3)), preparation)
    assert loaded.notes == (
        "source.png: resized from 640x480 to 256 on its short side, centre crop 224x224",
    )
    cropped = load("source.png", encode(noise(256, 300, 3)), preparation)
    assert cropped.notes == ("source.png: centre crop 224x224",)


def test_sha256_is_of_the_bytes_given() -> None:
    data = encode(noise(28, 28))
    assert load("x.png", data, GREY).sha256 == hashlib.sha256(data).hexdigest()


def test_every_8_bit_level_survives_the_way_to_floats_and_back() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_8bit(as_is(encode(every), "L", (16, 16)).pixels)[0], every)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_8bit_clips_rounds_halves_to_even_and_agrees_with_torch(dtype: type) -> None:
    halves = (np.arange(255) + 0.5) / 255
    random = np.random.default_rng(3).uniform(-0.2, 1.2, 9_999)
    ends = [-np.inf, np.inf, -1, 0, 1, 2]
    pixels: NDArray[np.floating] = np.concatenate([halves, random, ends]).astype(dtype)
    pixels = pixels.reshape(3, 1, -1)
    expected = torch.from_numpy(pixels).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    assert to_8bit(pixels).dtype == np.uint8 and np.array_equal(to_8bit(pixels), expected)
    exact = np.array([0.5, 1.5, 2.5, 254.5]) / 255
    assert exact[0] * 255 == 0.5 and list(to_8bit(exact)) == [0, 2, 2, 254]


@pytest.mark.parametrize("shape", [(28, 28), (2, 28, 28), (4, 28, 28), (1, 3, 28, 28)])
def test_a_png_has_one_or_three_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 or 3"):
        to_png(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("crop", [(29, 10), (10, 29)])
def test_a_crop_larger_than_the_resized_side_is_a_mistake(crop: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="smaller than the crop"):
        Preprocessing("RGB", crop, resize=28)
    assert Preprocessing("RGB", crop, resize=29).resize == 29


# Formats and modes


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_keep_every_pixel(format: str) -> None:
    pixels = noise(30, 41, 3)
    loaded = as_is(encode(pixels, format, lossless=True), "RGB", (30, 41))
    assert np.array_equal(levels(loaded), pixels)


def test_a_gif_of_one_frame_keeps_every_pixel() -> None:
    pixels = noise(30, 41)
    assert np.array_equal(levels(as_is(encode(pixels, "GIF"), "L", (30, 41))), pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
def test_a_jpeg_is_decoded_as_pillow_does(options: dict[str, object]) -> None:
    data = encode(smooth(30, 41), "JPEG", **options)
    assert np.array_equal(
        levels(as_is(data, "RGB", (30, 41))), np.asarray(Image.open(io.BytesIO(data)))
    )


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "PDF", "JPEG2000"])
def test_other_formats_are_refused(format: str) -> None:
    assert "PNG" in refusal(encode(smooth(32, 32), format))


@pytest.mark.parametrize("data", [b"", b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"BM"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(format: str) -> None:
    frames = [Image.fromarray(noise(30, 30, 3, seed=seed)) for seed in range(3)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert "frames" in refusal(data)


def test_of_a_photograph_with_appended_pictures_the_main_one_is_used_and_noted() -> None:
    main, preview = smooth(30, 41), smooth(15, 20)
    data = encode(main, "MPO", save_all=True, append_images=[preview])
    loaded = as_is(data, "RGB", (30, 41))
    assert np.array_equal(levels(loaded), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert any("main picture" in note for note in loaded.notes)


def test_black_and_white_becomes_grey() -> None:
    bits = noise(30, 41) > 127
    loaded = as_is(encode(Image.fromarray(bits)), "L", (30, 41))
    assert np.array_equal(levels(loaded), bits * np.uint8(255)) and loaded.notes == ()


def test_colour_to_grey_follows_itu_601_and_is_noted() -> None:
    pixels = noise(28, 28, 3)
    red, green, blue = pixels.astype(np.int64).transpose(2, 0, 1)
    loaded = load("x.png", encode(pixels), GREY)
    expected = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    assert np.array_equal(levels(loaded), expected)
    assert loaded.notes == ("x.png: converted from colour to grey",)


def test_grey_to_colour_repeats_the_channel_and_is_noted() -> None:
    pixels = noise(28, 28)
    loaded = as_is(encode(pixels), "RGB", (28, 28))
    assert all(np.array_equal(levels(loaded)[..., c], pixels) for c in range(3))
    assert loaded.notes == ("x.png: converted from grey to colour",)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP"])
def test_a_palette_is_applied(format: str) -> None:
    indices, palette = noise(30, 41), noise(256, 3, seed=1)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    loaded = as_is(encode(image, format), "RGB", (30, 41))
    assert np.array_equal(levels(loaded), palette[indices]) and loaded.notes == ()


def test_cmyk_is_converted_with_a_note_about_profiles() -> None:
    data = encode(smooth(30, 41).convert("CMYK"), "JPEG", quality=95)
    loaded = as_is(data, "RGB", (30, 41))
    assert np.abs(levels(loaded).astype(int) - np.asarray(smooth(30, 41))).mean() < 12
    assert loaded.notes == ("x.png: converted from CMYK to RGB, ignoring colour profiles",)


def test_16_bit_grey_is_rounded_to_the_nearest_of_256_levels() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    loaded = as_is(encode(Image.fromarray(every)), "L", (256, 256))
    assert np.array_equal(levels(loaded), np.rint(every / 257))
    assert loaded.notes == ("x.png: 16-bit grey rounded to 8 bits",)


def test_16_bit_colour_is_cut_with_a_note() -> None:
    wide = np.random.default_rng(0).integers(0, 65536, (3, 4, 3)).astype(">u2")
    data = raw_png(4, 3, 16, 2, b"".join(b"\0" + row.tobytes() for row in wide))
    loaded = as_is(data, "RGB", (3, 4))
    assert np.array_equal(levels(loaded), wide >> 8)
    assert loaded.notes == ("x.png: 16-bit colours cut to their upper 8 bits",)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(mode: str) -> None:
    with pytest.raises(InvalidImage, match="8 bits per channel"):  # no allowed format has them
        images._plain("x.png", Image.new(mode, (4, 4)), None, [])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied_and_noted(orientation: int, format: str) -> None:
    upright = np.asarray(smooth(40, 64).convert("L"))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(stored), format, exif=exif, lossless=True, quality=100)
    loaded = as_is(data, "L", (40, 64))
    assert np.abs(levels(loaded).astype(int) - upright).max() <= (12 if format == "JPEG" else 0)
    assert any("EXIF" in note for note in loaded.notes) == (orientation != 1)


@pytest.mark.parametrize("mode, plain, size", [("RGBA", "RGB", 3), ("LA", "L", 1)])
def test_opaque_alpha_is_dropped_with_a_note(mode: str, plain: str, size: int) -> None:
    pixels = noise(30, 41, size).squeeze()
    image = Image.fromarray(pixels)
    image.putalpha(255)
    assert image.mode == mode
    loaded = as_is(encode(image), plain, (30, 41))
    assert np.array_equal(levels(loaded), pixels)
    assert loaded.notes == ("x.png: its alpha channel, opaque everywhere, was dropped",)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("alpha", [0, 254])
def test_one_transparent_pixel_is_refused(mode: str, alpha: int) -> None:
    image = Image.new(mode, (30, 30), 255 if mode == "LA" else "white")
    image.putpixel((29, 29), (*[7] * (len(mode) - 1), alpha))
    assert "flatten" in refusal(encode(image))


def test_a_palettes_transparent_entry_counts_where_it_is_used() -> None:
    image = Image.fromarray(noise(30, 30) % 100)
    image.putpalette(noise(256, 3).tobytes())
    assert "flatten" in refusal(encode(image, "PNG", transparency=50))
    assert "flatten" in refusal(encode(image, "GIF", transparency=50))
    unused = load("x.png", encode(image, "PNG", transparency=200), COLOUR)
    assert unused.notes[0] == "x.png: its alpha channel, opaque everywhere, was dropped"


def test_alphas_of_a_palette_count_where_they_are_used() -> None:
    image = Image.fromarray(noise(30, 30) % 100)
    image.putpalette(noise(256, 3).tobytes())
    assert "flatten" in refusal(encode(image, transparency=b"\xff" * 50 + b"\x80" * 2))
    load("x.png", encode(image, transparency=b"\xff" * 100 + b"\x80" * 100), COLOUR)


def test_a_colour_key_counts_where_it_is_used() -> None:
    image = Image.new("RGB", (30, 30), (1, 2, 3))
    assert "flatten" in refusal(encode(image, transparency=(1, 2, 3)))
    assert len(load("x.png", encode(image, transparency=(1, 2, 4)), COLOUR).notes) == 2


@pytest.mark.parametrize(
    "depth, colour, row, key",
    [
        (2, 0, b"\0\x1b", b"\0\1"),  # grey levels 0 1 2 3; Pillow has 0 85 170 255 and compares 1
        (16, 0, b"\0\1\0\2\0\3\0\4\0", b"\2\0"),
        (16, 2, b"\0" + b"\1\0\1\0\1\0" * 4, b"\1\0" * 3),
    ],
)
def test_a_colour_key_of_another_depth_is_refused(
    depth: int, colour: int, row: bytes, key: bytes
) -> None:
    assert "flatten" in refusal(raw_png(4, 1, depth, colour, row, chunk(b"tRNS", key)))


# Files that are too large, damaged or hostile


def huge_headers() -> dict[str, bytes]:
    """Small files that claim 4294836225, 3600000000, 268402689 and 100000000 pixels."""
    gif = b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    bmp = encode(Image.new("RGB", (1, 1)), "BMP")
    jpeg = encode(Image.new("L", (8, 8)), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    vp8x = b"VP8X" + struct.pack("<II", 10, 0) + (16382).to_bytes(3, "little") * 2
    return {
        "PNG": raw_png(60000, 60000, 8, 2, b""),
        "PNG between Pillow's limits": raw_png(10000, 10000, 8, 2, b""),
        "GIF": gif,
        "BMP": bmp[:18] + struct.pack("<ii", 60000, 60000) + bmp[26:],
        "JPEG": jpeg[:frame] + b"\xff\xff\xff\xff" + jpeg[frame + 4 :],
        "WEBP": b"RIFF" + struct.pack("<I", 22) + b"WEBP" + vp8x,
    }


@pytest.mark.parametrize("kind", huge_headers())
def test_too_many_pixels_are_refused_from_the_header_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(self: ImageFile.ImageFile) -> None:
        pytest.fail("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    monkeypatch.setattr("PIL.Image.core.new", decoded)
    message = refusal(huge_headers()[kind])
    assert "50,000,000 pixels" in message


def test_a_whole_image_over_the_limit_is_refused_and_one_below_is_taken() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "7100x7100" in refusal(raw_png(7100, 7100, 8, 0, bytes(7100 * 7101)))
        loaded = load("x.png", raw_png(7000, 7000, 8, 0, bytes(7000 * 7001)), GREY)
    assert loaded.pixels.shape == (1, 28, 28) and limit == Image.MAX_IMAGE_PIXELS


def test_the_bound_does_not_hang_on_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for data in huge_headers().values():
        refusal(data)


def test_long_thin_images_whose_resize_would_be_enormous_are_refused() -> None:
    thin, thinner = raw_png(1, 60000, 1, 0, bytes(120000)), raw_png(70000, 1, 1, 0, bytes(8751))
    short_side_first = Preprocessing("L", (224, 224), resize=256)
    assert "long and thin" in refusal(thin, short_side_first)
    assert load("x.png", thin, GREY).pixels.max() == 0
    assert "side" in refusal(thinner, GREY)


def test_one_pixel_is_enough() -> None:
    loaded = load("x.png", encode(np.full((1, 1, 3), 51, dtype=np.uint8)), COLOUR)
    assert np.array_equal(levels(loaded), np.full((20, 20, 3), 51))


def test_too_many_bytes_are_refused() -> None:
    data = encode(noise(28, 28))
    assert load("x.png", data.ljust(images.MAX_BYTES, b"\0"), GREY).pixels.shape == (1, 28, 28)
    assert "33,554,433 bytes" in refusal(data.ljust(images.MAX_BYTES + 1, b"\0"))


def test_a_jpeg_of_a_thousand_scans_is_refused_before_they_are_decoded() -> None:
    data = encode(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    tables = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))
    assert "scans" in refusal(data[:-2] + data[tables:-2] * 1000 + data[-2:])
    load("x.png", data, COLOUR)


def test_a_jpeg_of_countless_exif_blocks_is_refused() -> None:
    data = encode(smooth(30, 30), "JPEG")
    block = b"\xff\xe1\0\x09Exif\0\0M"
    assert "Exif" in refusal(data[:2] + block * 3_000_000 + data[2:])


def test_a_run_length_encoded_bmp_is_refused() -> None:
    palette = noise(256, 4).tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 8, 1, 4, 0, 0, 256, 0)
    body = header + palette + b"\4\1\0\1"
    assert "run-length" in refusal(b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 1078) + body)


def originals() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    image, grey = smooth(40, 52), smooth(40, 52).convert("L")
    palette = image.quantize(64)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "png": encode(image, exif=exif),
        "png palette": encode(palette, transparency=70),
        "png 16 bits": encode(deep),
        "png alpha": encode(image.convert("RGBA")),
        "jpeg": encode(image, "JPEG", exif=exif),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"),
        "jpeg appended": encode(image, "MPO", save_all=True, append_images=[grey]),
        "webp": encode(image, "WEBP", exif=exif),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "bmp": encode(image, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "gif": encode(palette, "GIF"),
    }


def usable_or_refused(data: bytes) -> bool:
    """Whether `data` loads; anything but a proper image or InvalidImage fails the test."""
    try:
        loaded = load("x.png", data, COLOUR)
    except InvalidImage as error:
        assert str(error).startswith("x.png ") and str(error).endswith(".")
        return False
    assert loaded.pixels.shape == (3, 20, 20) and loaded.pixels.dtype == np.float32
    assert np.isfinite(loaded.pixels).all()
    assert loaded.pixels.min() >= 0 and loaded.pixels.max() <= 1
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", originals())
def test_a_file_cut_anywhere_is_an_image_or_refused(kind: str) -> None:
    data = originals()[kind]
    assert usable_or_refused(data)
    cuts = np.random.default_rng(len(data)).integers(0, len(data), 150)
    for cut in {*map(int, cuts), *range(64)}:
        usable_or_refused(data[:cut])
    assert not usable_or_refused(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", originals())
def test_a_file_with_changed_bytes_is_an_image_or_refused(kind: str) -> None:
    data = originals()[kind]
    numbers = np.random.default_rng(len(data))
    for trial in range(300):
        damaged = bytearray(data)
        reach = len(data) if trial % 2 else min(len(data), 200)  # half of them in the header
        for place in numbers.integers(0, reach, numbers.integers(1, 4)):
            damaged[place] = numbers.integers(0, 256)
        usable_or_refused(bytes(damaged))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [b"IHDR", b"tRNS", b"eXIf", b"PLTE"])
def test_png_chunks_with_valid_checksums_and_random_content_are_survived(kind: bytes) -> None:
    numbers = np.random.default_rng(0)
    palette = chunk(b"PLTE", noise(12).tobytes())
    for trial in range(300):
        depth, colour = [(8, 0), (8, 2), (2, 3), (1, 0), (16, 0)][trial % 5]
        extra = chunk(kind, numbers.bytes(int(numbers.integers(0, 40))))
        usable_or_refused(raw_png(4, 4, depth, colour, bytes(200), palette, extra))


# Where images come from


def test_samples_are_named_by_set_and_sorted() -> None:
    names = sample_names()
    assert names == sorted(names) and len(names) == len(set(names))
    assert {f"mnist/{digit}-{i}" for digit in range(10) for i in (0, 1)} <= set(names)
    assert "photos/animal_panda" in names


def test_every_sample_can_be_loaded() -> None:
    for sample in sample_names():
        name, data = read(f"sample:{sample}")
        assert name == sample
        grey = sample.startswith("mnist/")
        loaded = load(name, data, GREY if grey else COLOUR)
        assert loaded.pixels.std() > 0.01
        if grey:
            assert loaded.notes == ()


@pytest.mark.parametrize(
    "name",
    ["", "mnist", "mnist/", "mnist/3-0.png", "../errors", "mnist/../mnist/3-0", "/etc/hosts"],
)
def test_a_sample_is_known_by_its_exact_name_only(name: str) -> None:
    with pytest.raises(UnknownName, match="sample"):
        read(f"sample:{name}")


def test_a_misspelt_sample_is_answered_with_near_ones() -> None:
    with pytest.raises(UnknownName, match="mnist/3-0"):
        read("sample:mnst/3-0")


def test_a_file_is_read_and_named_by_its_last_part(tmp_path: Path) -> None:
    path = tmp_path / "panda.png"
    path.write_bytes(b"anything")
    assert read(str(path)) == ("panda.png", b"anything")


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(InvalidImage, match=r"^large\.png has 1,099,511,627,776 bytes"):
        read(str(path))


def test_a_file_that_says_it_is_empty_is_still_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    assert len(read("/proc/cpuinfo")[1]) == 11


def test_what_is_no_file_is_refused_with_what_was_asked_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for reference in [str(tmp_path), str(pipe), "/dev/zero", ""]:
        with pytest.raises(InvalidImage, match="is not a file"):
            read(reference)
    for reference in [str(tmp_path / "missing.png"), "a\0b", "x" * 5000, "\ud800"]:
        with pytest.raises(InvalidImage, match=r"cannot be read \(.+\); check the path\.$"):
            read(reference)


def test_images_need_no_torch() -> None:
    code = "import sys, core.images; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(images.__file__).parents[1])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_check_tells_what_an_image_is_without_a_network(format: str) -> None:
    data = encode(smooth(20, 30), format)
    assert check("a", data) == (f"image/{format.lower()}", 30, 20)
    with pytest.raises(InvalidImage, match=r"^a is truncated"):
        check("a", data[: len(data) // 2])


def test_check_sees_an_image_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert check("a", encode(smooth(20, 30), "JPEG", exif=exif)) == ("image/jpeg", 20, 30)
