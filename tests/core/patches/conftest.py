"""Patch sets of the photographs that come with the package."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from core import images
from core.images import Preprocessing
from core.models import ASSETS
from core.patches import neighbours, sets
from core.patches.sets import Geometry, PatchSet

# 13 x 13 patches of an image: 1014 of the six photographs.
SMALL = Geometry(size=16, stride=4, resize=64)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the six photographs, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("photos")
    files = sorted((ASSETS / "photos").glob("*.jpg"))
    (folder / "birds").mkdir()
    for file in files:
        shutil.copy(file, folder / ("birds" if "macaw" in file.name else ".") / file.name)
    return folder


@pytest.fixture(scope="session")
def resized(photos: Path) -> NDArray[np.uint8]:
    """The photographs as the small geometry has them, [6, 64, 64, 3], in the set's order."""
    files = sorted(photos.rglob("*.jpg"), key=lambda file: file.relative_to(photos).as_posix())
    prepare = Preprocessing("RGB", (64, 64), 64)
    loaded = [images.load(file.name, file.read_bytes(), prepare).pixels for file in files]
    return np.stack([np.round(pixels * 255).transpose(1, 2, 0) for pixels in loaded]).astype("u1")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sets below are."""
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="session")
def exact(photos: Path, root: Path) -> PatchSet:
    return sets.build(photos, "exact", SMALL, neighbours.indexer(), root=root)


@pytest.fixture(scope="session")
def indexed(photos: Path, root: Path) -> PatchSet:
    """The same with an inverted file, which a set of this size does not need."""
    return sets.build(photos, "indexed", SMALL, neighbours.indexer(exact_up_to=0), root=root)


@pytest.fixture(scope="session")
def lined(photos: Path, root: Path) -> PatchSet:
    """The same with random lines, by Prioritized DCI."""
    return sets.build(photos, "lined", SMALL, neighbours.indexer("dci", exact_up_to=0), root=root)
