"""Patch sets that stay open, and what becomes of them when their folder changes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from core.errors import UnknownName
from core.patches import library as shelves
from core.patches import neighbours, sets
from core.patches.library import Library
from core.patches.sets import PatchSet

from .conftest import SMALL


@pytest.fixture
def own(exact: PatchSet, indexed: PatchSet, tmp_path: Path) -> Path:
    """A root with copies that a test may change."""
    for patches in (exact, indexed):
        shutil.copytree(patches.folder, tmp_path / patches.name)
    return tmp_path


@pytest.fixture
def library(own: Path) -> Iterator[Library]:
    with Library(own) as opened:
        yield opened


def test_a_set_is_opened_once(library: Library) -> None:
    assert library.neighbours("indexed") is library.neighbours("indexed")
    assert library.open("exact") is library.open("exact")
    assert [patches.name for patches in library.sets()] == ["exact", "indexed"]


def test_a_deleted_set_is_closed_and_unknown(library: Library, own: Path) -> None:
    process = library.neighbours("indexed").index.faiss.process
    sets.delete("indexed", own)
    assert [patches.name for patches in library.sets()] == ["exact"]
    with pytest.raises(UnknownName, match="exact"):
        library.neighbours("indexed")
    assert process.poll() is not None


def test_a_set_that_was_built_again_is_opened_anew(
    library: Library, own: Path, photos: Path
) -> None:
    before = library.neighbours("exact").patches
    sets.delete("exact", own)
    (photos_of_two := own.parent / f"{own.name}-two").mkdir()
    for file in sorted(photos.glob("*.jpg"))[:2]:
        shutil.copy(file, photos_of_two)
    sets.build(photos_of_two, "exact", SMALL, neighbours.indexer(), root=own)
    after = library.neighbours("exact").patches
    assert (len(before.manifest.images), len(after.manifest.images)) == (6, 2)


def test_an_unfinished_set_is_not_among_those_that_can_be_used_and_its_builder_not_disturbed(
    library: Library, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "exact" / sets.MANIFEST).unlink()
    monkeypatch.setattr(sets, "_locked", None)  # taking the lock fails
    assert [patches.name for patches in library.sets()] == ["indexed"]


def test_few_indices_are_loaded_at_a_time(
    library: Library, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelves, "MAX_INDICES", 1)
    first = library.neighbours("indexed")
    library.neighbours("exact")
    assert first.index.faiss.process.poll() is not None
    query = np.zeros((1, 16, 16, 3), np.uint8)
    again, _ = library.neighbours("indexed").nearest(query)
    assert again.shape == (1, 1, 3)


def test_a_process_that_was_killed_is_started_again(library: Library) -> None:
    query = np.zeros((1, 16, 16, 3), np.uint8)
    process = library.neighbours("indexed").index.faiss.process
    process.kill()
    process.wait()
    found, _ = library.neighbours("indexed").nearest(query)
    assert found.shape == (1, 1, 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_is_not_ours_to_read_hides_no_set(own: Path) -> None:
    """As the lost+found of a volume."""
    (own / "lost+found").mkdir(mode=0o700)
    shutil.copytree(own / "exact", own / "secret")
    (own / "secret" / sets.MANIFEST).chmod(0o600)
    (own / "secret").chmod(0o755)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from core.patches.library import Library\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print([found.name for found in Library(Path(sys.argv[1])).sets()])"
    )
    for folder in (own, *own.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    command = [sys.executable, "-c", script, str(own)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['exact', 'indexed']"
