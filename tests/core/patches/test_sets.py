"""Patch sets on disk: built in any number of attempts, read back, refused where they are wrong."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.errors import CoreError, UnknownName
from core.patches import neighbours, sets
from core.patches.sets import (
    DiskFull,
    Geometry,
    InvalidPatches,
    PatchSet,
    PatchSetBusy,
    PatchSetUnusable,
    build,
    delete,
    open_set,
)

SMALL = Geometry(size=16, stride=4, resize=64)  # of the sets in conftest.py


def contents(patches: PatchSet) -> dict[str, bytes]:
    """Every file of a set but its name."""
    return {
        path.name: path.read_bytes().replace(b'"' + patches.name.encode() + b'"', b"NAME")
        for path in patches.folder.iterdir()
    }


def sentence(error: BaseException) -> str:
    """What an error says, seen to be one sentence."""
    text = str(error)
    assert text.endswith((".", "?")) and "\n" not in text and ". " not in text
    return text


# Reading


def test_a_set_has_the_resized_images_in_the_order_of_their_names(exact, resized):
    names = [image.name for image in exact.manifest.images]
    assert names == sorted(names) and "birds/animal_scarlet_macaw.jpg" in names
    assert np.array_equal(exact.pixels, resized)


def test_patches_by_address_and_by_id_are_those_of_a_plain_loop(exact, resized):
    patches, addresses = [], []
    for i, image in enumerate(resized):
        for y in range(0, 64 - 16 + 1, 4):
            for x in range(0, 64 - 16 + 1, 4):
                addresses.append((i, y, x))
                patches.append(image[y : y + 16, x : x + 16])
    assert len(exact) == len(patches) == 6 * exact.per_image
    ids = np.arange(len(exact))
    assert np.array_equal(exact.addresses(ids), addresses)
    assert np.array_equal(exact.read(np.array(addresses)), patches)
    assert np.array_equal(exact.flat(ids), np.reshape(patches, (len(patches), -1)))


@pytest.mark.parametrize("surround", [1, 8, 64, 200])
def test_surroundings_past_a_border_are_the_image_mirrored(exact, resized, surround):
    addresses = np.array([(0, 0, 0), (1, 48, 48), (5, 0, 31), (3, 17, 48), (2, 20, 20)])
    found = exact.read(addresses, surround)
    assert found.shape == (5, 16 + 2 * surround, 16 + 2 * surround, 3)
    margins = [(surround, surround)] * 2 + [(0, 0)]
    for patch, (i, y, x) in zip(found, addresses, strict=True):
        wide = np.pad(resized[i], margins, mode="symmetric")
        size = 16 + 2 * surround
        assert np.array_equal(patch, wide[y : y + size, x : x + size])


@pytest.mark.parametrize("address", [(6, 0, 0), (-1, 0, 0), (0, 49, 0), (0, 0, -1)])
def test_a_patch_outside_the_set_is_a_mistake(exact, address):
    with pytest.raises(ValueError, match="not in 'exact'"):
        exact.read(np.array([address]))


def test_the_papers_geometry_has_289_patches_an_image():
    assert Geometry().side ** 2 == 17**2 and 128_066 * Geometry().side ** 2 == 37_011_074


# Building


def test_the_hash_of_a_set_is_over_geometry_and_images_alone(exact, indexed, photos):
    files = sorted(photos.rglob("*.jpg"), key=lambda file: file.relative_to(photos).as_posix())
    lines = ["patches 16 4 64", *(hashlib.sha256(f.read_bytes()).hexdigest() for f in files)]
    assert exact.sha256 == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert indexed.sha256 == exact.sha256


def test_no_file_of_a_set_names_a_place_and_a_moved_set_is_the_same(exact, photos, tmp_path):
    shutil.copytree(exact.folder, tmp_path / "moved")
    moved = open_set("moved", tmp_path)
    assert moved.manifest == exact.manifest and np.array_equal(moved.pixels, exact.pixels)
    written = (moved.folder / "set.json").read_text()
    assert str(photos) not in written and str(exact.folder) not in written


def test_what_is_no_image_is_skipped_and_listed_and_copies_are_kept_once(photos, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder)
    koala = (folder / "animal_koala.jpg").read_bytes()
    (folder / "a_copy.jpg").write_bytes(koala)
    (folder / "broken.jpg").write_bytes(koala[:2000])
    (folder / "notes.txt").write_text("notes")
    (folder / "nowhere.jpg").symlink_to(folder / "missing")
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    os.mkfifo(folder / "pipe.jpg")
    patches = build(folder, "mixed", SMALL, neighbours.indexer(), root=tmp_path / "sets")
    assert len(patches.manifest.images) == 6 and len(patches) == 1014
    assert patches.manifest.images[0].name == "a_copy.jpg"
    assert [(d.name, d.of) for d in patches.manifest.duplicates] == [
        ("animal_koala.jpg", "a_copy.jpg")
    ]
    skipped = {file.name: file.reason for file in patches.manifest.skipped}
    assert skipped.keys() == {
        *("broken.jpg", "caf\\udce9.jpg", "notes.txt", "nowhere.jpg", "pipe.jpg")
    }
    assert all(name in reason for name, reason in skipped.items())
    assert "damaged" in skipped["broken.jpg"] and "no PNG" in skipped["notes.txt"]
    assert str(tmp_path) not in (patches.folder / "set.json").read_text()
    assert open_set("mixed", tmp_path / "sets").manifest == patches.manifest


def test_the_same_command_again_opens_the_set_and_another_one_is_refused(exact, photos, root):
    before = contents(exact)
    assert build(photos, "exact", SMALL, neighbours.indexer(), root=root).manifest == exact.manifest
    assert contents(exact) == before
    with pytest.raises(InvalidPatches, match="already") as error:
        build(photos, "exact", Geometry(16, 8, 64), neighbours.indexer(), root=root)
    sentence(error.value)


# Dies at every report once: at every second one at once, else a moment later.
KILLED = """
import os, signal, sys, threading
from pathlib import Path
from core.patches import neighbours, sets
folder, root, places = map(Path, sys.argv[1:4])
sets.CHUNK, neighbours.BLOCK_BYTES, neighbours.SIMPLE = 3, 3 * 2**19, 2
def report(what, done, total):
    place, before = f"{what} {done}", places.read_text().splitlines() if places.exists() else None
    if before is not None and place not in before:
        with places.open("a") as file:
            print(place, file=file)
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)
        threading.Timer(0.03, die).start() if len(before) % 2 else die()
geometry = sets.Geometry(size=16, stride=4, resize=64)
index = neighbours.indexer(sys.argv[4], exact_up_to=0)
sets.build(folder, "set", geometry, index, root=root, report=report)
"""


@pytest.mark.parametrize(
    "backend, kind, stages",
    [
        ("faiss", "ivf-pq", {"images", "training", "patches", "packing"}),
        ("dci", "dci", {"images", "patches", "sorting"}),
    ],
)
def test_a_build_that_is_killed_again_and_again_gives_the_very_same_bytes(
    photos, tmp_path, backend, kind, stages
):
    places = tmp_path / "places"

    def attempt(root: str) -> int:
        given = map(str, (photos, tmp_path / root, places, backend))
        command = [sys.executable, "-c", KILLED, *given]
        return subprocess.run(command, check=False, timeout=60).returncode

    assert attempt("whole") == 0
    places.touch()
    deaths = 0
    while (status := attempt("killed")) == -signal.SIGKILL:
        deaths += 1
        with pytest.raises(PatchSetUnusable, match="not built to its end"):
            open_set("set", tmp_path / "killed")
    assert status == 0 and deaths >= 4  # a late death may see two places
    assert {line.split()[0] for line in places.read_text().splitlines()} == stages
    whole, killed = (open_set("set", tmp_path / root) for root in ("whole", "killed"))
    assert contents(whole) == contents(killed)
    assert whole.manifest.index["kind"] == kind


def test_half_a_line_and_pixels_without_one_are_done_again(photos, exact, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def attempt(end: int) -> int:
        """Builds until `end` files have been looked at; how many had been before."""
        reported: list[int] = []

        def report(what: str, done: int, total: int) -> None:
            reported.append(done)
            if done == end:
                raise Stop

        with contextlib.suppress(Stop):
            build(photos, "exact", SMALL, neighbours.indexer(), root=tmp_path, report=report)
        return reported[0]

    monkeypatch.setattr(sets, "CHUNK", 2)
    folder = tmp_path / "exact"
    assert attempt(2) == 0
    for begun in (2, 4):
        assert (folder / "images.u8").stat().st_size == begun * 64 * 64 * 3
        with (folder / "images.u8").open("ab") as pixels:
            pixels.write(b"x" * 777)
        with (folder / "building.jsonl").open("a") as lines:
            lines.write('{"name": "fish')
        assert attempt(begun + 2 if begun == 2 else 0) == begun
    assert contents(open_set("exact", tmp_path)) == contents(exact)


def test_a_build_of_other_files_starts_afresh(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)

    def stop(what: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, "set", SMALL, neighbours.indexer(), root=tmp_path, report=stop)
    (folder / "animal_koala.jpg").unlink()
    patches = build(folder, "set", SMALL, neighbours.indexer(), root=tmp_path)
    assert len(patches.manifest.images) == 5
    assert (patches.folder / "images.u8").stat().st_size == 5 * 64 * 64 * 3


# What is refused


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"size": 65, "resize": 64}, "larger"),
        ({"stride": 0}, "stride"),
        ({"size": 0}, "size"),
        ({"resize": -1}, "resize"),
        ({"resize": 100_000}, "over"),
    ],
)
def test_an_impossible_geometry_is_refused(settings, word):
    with pytest.raises(InvalidPatches, match=word) as error:
        Geometry(**settings)
    sentence(error.value)


@pytest.mark.parametrize("name", ["a/b", "../a", "", ".a", "a b", "a\n", "x" * 101])
def test_a_name_that_is_no_folder_is_refused(photos, tmp_path, name):
    with pytest.raises(InvalidPatches, match="no name") as error:
        build(photos, name, SMALL, neighbours.indexer(), root=tmp_path / "sets")
    sentence(error.value)
    assert not (tmp_path / "sets").exists()
    with pytest.raises(UnknownName):
        open_set(name, tmp_path)


def test_a_folder_that_is_missing_or_empty_or_without_images_is_refused(tmp_path):
    empty, useless = tmp_path / "empty", tmp_path / "useless"
    (empty / "deep").mkdir(parents=True)
    useless.mkdir()
    (useless / "notes.txt").write_text("notes")
    for folder, word in ((tmp_path / "no", "no folder"), (empty, "no files"), (useless, "None")):
        with pytest.raises(InvalidPatches, match=word) as error:
            build(folder, "set", SMALL, neighbours.indexer(), root=tmp_path / "sets")
        sentence(error.value)
        assert sets.names(tmp_path / "sets") == []


def test_an_unknown_set_is_answered_with_near_names(exact, root):
    for use in (open_set, delete):
        with pytest.raises(UnknownName, match="'exakt'; did you mean 'exact'"):
            use("exakt", root)
    assert sets.names(root / "nowhere") == []


def test_a_folder_that_is_no_patch_set_is_never_touched(photos, exact, tmp_path):
    (tmp_path / "holiday").mkdir()
    shutil.copy(exact.folder / "set.json", tmp_path / "holiday")
    shutil.copy(photos / "animal_koala.jpg", tmp_path / "holiday")
    assert sets.names(tmp_path) == []
    for use in (open_set, delete):
        with pytest.raises(UnknownName):
            use("holiday", tmp_path)
    for folder in (photos, tmp_path / "holiday"):
        with pytest.raises(InvalidPatches, match="no patch set"):
            build(folder, "holiday", SMALL, neighbours.indexer(), root=tmp_path)
    assert {p.name for p in (tmp_path / "holiday").iterdir()} == {"set.json", "animal_koala.jpg"}


def copied(patches: PatchSet, root: Path) -> Path:
    shutil.copytree(patches.folder, root / "copy")
    return root / "copy"


def refusal(root: Path) -> str:
    with pytest.raises(PatchSetUnusable) as error:
        open_set("copy", root)
    return sentence(error.value)


@pytest.mark.parametrize("version", [0, 1, None, "2"])
def test_another_versions_set_is_refused(exact, tmp_path, version):
    file = copied(exact, tmp_path) / "set.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": version}))
    assert "another version" in refusal(tmp_path) and "build it again" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["images.u8", "index.faiss", "projection.npy"])
def test_a_file_that_is_cut_or_gone_is_refused(indexed, tmp_path, file):
    path = copied(indexed, tmp_path) / file
    os.truncate(path, path.stat().st_size - 1)
    assert file in refusal(tmp_path)
    path.unlink()
    assert file in refusal(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_damaged_manifest_is_refused(exact, tmp_path, damage):
    (copied(exact, tmp_path) / "set.json").write_text(damage)
    assert "set.json" in refusal(tmp_path)


def test_an_impossible_geometry_in_a_manifest_is_refused(exact, tmp_path):
    file = copied(exact, tmp_path) / "set.json"
    file.write_text(file.read_text().replace('"stride": 4', '"stride": 0'))
    assert "set.json" in refusal(tmp_path)


def test_a_set_that_somebody_else_builds_is_left_alone(photos, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with (folder / "patch-set").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for use in (
            lambda: build(photos, "set", SMALL, neighbours.indexer(), root=tmp_path),
            lambda: open_set("set", tmp_path),
            lambda: delete("set", tmp_path),
        ):
            with pytest.raises(PatchSetBusy) as error:
                use()
            sentence(error.value)
    delete("set", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here is always full")
def test_a_full_disk_is_said_and_does_not_spoil_the_set(photos, exact, tmp_path):
    folder = tmp_path / "exact"
    folder.mkdir()
    (folder / "patch-set").touch()
    (folder / "images.u8").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="disk") as error:
        build(photos, "exact", SMALL, neighbours.indexer(), root=tmp_path)
    sentence(error.value)
    (folder / "images.u8").unlink()
    again = build(photos, "exact", SMALL, neighbours.indexer(), root=tmp_path)
    assert contents(again) == contents(exact)


def test_every_error_here_has_a_code_of_its_own():
    codes = [e.code for e in (InvalidPatches, PatchSetBusy, PatchSetUnusable, DiskFull)]
    codes += [neighbours.TooFewPatches.code, neighbours.IndexFailed.code]
    assert len({CoreError.code, *codes}) == 7


def test_what_a_stopped_deletion_left_goes_with_the_next(photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(photos, name, SMALL, neighbours.indexer(), root=tmp_path)
    left = (tmp_path / "one").rename(tmp_path / ".one.1")
    (tmp_path / ".other").mkdir()
    delete("two", tmp_path)
    assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".other"]
