"""Arrays as the images that go out, judged by Pillow's own reader."""

import io

import numpy as np
import pytest
from PIL import Image

from polycollide import (
    PolycollideError,
    images,
)

from .conftest import PAIR


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_arrays_of_floats_become_the_png_that_pillow_reads(shape, dtype):
    array = np.random.default_rng(0).random(shape).astype(dtype)
    read = np.asarray(Image.open(io.BytesIO(images.to_png(array))))
    channels_last = (
        array[0] if shape[0] == 1 else np.moveaxis(array, 0, -1) if len(shape) == 3 else array
    )
    assert np.array_equal(read, np.rint(channels_last * dtype(255)))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_arrays_of_bytes_and_pillow_images_become_a_png_alike(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    read = np.asarray(Image.open(io.BytesIO(images.to_png(Image.fromarray(array)))))
    assert np.array_equal(read, array)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.full((2, 2), 1.1), r"\[0, 1\]"),
        (np.full((2, 2), np.nan), r"\[0, 1\]"),
        (np.zeros((5, 7, 3)), "no image; give floats"),
        (np.zeros((2, 2), np.int64), "no image"),
        (np.zeros((2, 2, 4), np.uint8), "no image"),
        (np.zeros((0, 2)), "no image"),
        (None, "no image"),
    ],
)
def test_arrays_that_are_no_images_are_refused_in_one_sentence(client, array, sentence):
    with pytest.raises(PolycollideError, match=sentence):
        client.submit(array, PAIR[1])
