"""Nearest patches against brute force in float64, whatever the index."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from core.errors import UnknownName
from core.patches import neighbours, sets
from core.patches.dci import PrioritizedDCI
from core.patches.neighbours import Faiss, IndexFailed, Neighbours, TooFewPatches, indexer
from core.patches.sets import Geometry, PatchSet, PatchSetUnusable, build

SMALL = Geometry(size=16, stride=4, resize=64)  # of the sets in conftest.py
PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"


def brute_force(
    patches: PatchSet, queries: NDArray[np.uint8], k: int, without: tuple[int, ...] = ()
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Addresses [Q, k, 3] and distances [Q, k], by comparing everything with everything."""
    size, stride = patches.geometry.size, patches.geometry.stride
    places = range(0, patches.geometry.resize - size + 1, stride)
    addresses = np.array(
        [
            (i, y, x)
            for i in range(len(patches.pixels))
            if i not in without
            for y in places
            for x in places
        ]
    )
    every = [patches.pixels[i, y : y + size, x : x + size] for i, y, x in addresses]
    flat = np.reshape(every, (len(every), -1)) / 255
    distances = np.stack(
        [np.linalg.norm(flat - query.reshape(-1) / 255, axis=1) for query in queries]
    )
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return addresses[order], np.take_along_axis(distances, order, axis=1)


@pytest.fixture(scope="module")
def queries(resized) -> NDArray[np.uint8]:
    """40 patches off the set's grid, brightened a little, so that none of them is in the set."""
    rng = np.random.default_rng(0)
    places = zip(rng.integers(0, 6, 40), *rng.integers(0, 48, (2, 40)), strict=True)
    found = np.stack([resized[i, y : y + 16, x : x + 16] for i, y, x in places])
    return np.minimum(found.astype(int) + rng.integers(0, 9, found.shape), 255).astype(np.uint8)


def test_exact_neighbours_are_those_of_brute_force(exact, queries, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 100 * 4 * SMALL.values)
    monkeypatch.setattr(neighbours, "QUERIES", 7)
    addresses, distances = Neighbours(exact).nearest(queries, k=5)
    expected, expected_distances = brute_force(exact, queries, 5)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)
    assert np.array_equal(addresses, expected)
    apart = exact.read(addresses.reshape(-1, 3)) / 255 - queries.repeat(5, axis=0) / 255
    np.testing.assert_allclose(
        np.linalg.norm(apart.reshape(200, -1), axis=1), distances.reshape(-1), rtol=1e-12
    )


@pytest.mark.parametrize("kind", ["indexed", "lined"])
def test_an_index_finds_the_nearest_among_few_candidates_and_tells_their_true_distance(
    kind, queries, monkeypatch, request
):
    patches = request.getfixturevalue(kind)
    monkeypatch.setattr(neighbours, "CANDIDATES", 32)
    with Neighbours(patches) as found:
        found.index.retrieve = 32  # which an inverted file does not mind
        addresses, distances = found.nearest(queries, k=2)
        flat = queries.reshape(len(queries), -1)
        nobody = np.empty(0, dtype=np.int64)
        assert max(len(ids) for ids in found.index.candidates(flat, 2, nobody)) <= 64
    _, expected = brute_force(patches, queries, 2)
    assert np.mean(np.isclose(distances[:, 0], expected[:, 0], rtol=1e-12)) > 0.9
    apart = patches.read(addresses[:, 0]) / 255 - queries / 255
    np.testing.assert_allclose(
        np.linalg.norm(apart.reshape(len(queries), -1), axis=1), distances[:, 0], rtol=1e-12
    )
    assert (distances[:, 0] <= distances[:, 1]).all()


@pytest.mark.parametrize("kind", ["exact", "indexed", "lined"])
def test_a_patch_of_the_set_is_its_own_neighbour_and_ties_go_to_the_smaller_address(kind, request):
    patches = request.getfixturevalue(kind)
    own = np.array([(0, 0, 0), (3, 20, 48), (5, 48, 4)])
    with Neighbours(patches) as found:
        addresses, distances = found.nearest(patches.read(own))
    assert np.array_equal(addresses[:, 0], own) and not distances.any()


@pytest.mark.parametrize("block", [200, 10_000])
def test_of_hundreds_of_equal_patches_the_one_with_the_smallest_address_is_found(
    tmp_path, monkeypatch, block
):
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", block * 4 * SMALL.values)
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    for i in range(9):  # patches 4 apart of a pattern that recurs every 4 pixels are all equal
        wallpaper = np.tile(tile, (16, 16, 1))
        wallpaper[:, :16] = rng.integers(0, 256, (64, 16, 3), dtype=np.uint8)
        Image.fromarray(wallpaper).save(tmp_path / f"{i}.png")
    equal = build(tmp_path, "equal", SMALL, indexer(), root=tmp_path.parent / f"equal-{block}")
    shifts = [(y, x) for y in range(4) for x in range(4)]
    queries = np.stack([np.tile(np.roll(tile, shift, (0, 1)), (4, 4, 1)) for shift in shifts])
    with Neighbours(equal) as found:
        addresses, distances = found.nearest(queries, k=3)
    expected = brute_force(equal, queries, 3)
    np.testing.assert_allclose(distances, expected[1], rtol=1e-12)
    np.testing.assert_array_equal(addresses, expected[0])


@pytest.mark.parametrize("kind", ["exact", "indexed", "lined"])
@pytest.mark.parametrize("k", [1, 169 * 4])
def test_patches_of_excluded_images_are_left_out_and_k_are_found_all_the_same(kind, k, request):
    patches = request.getfixturevalue(kind)
    own = patches.read(np.array([(2, 8, 8), (4, 0, 0)]))
    seeds = [patches.manifest.images[i].sha256 for i in (2, 4)]
    with Neighbours(patches) as found:
        addresses, distances = found.nearest(own, k=k, exclude=[*seeds, "f" * 64])
    assert addresses.shape == (2, k, 3) and not np.isin(addresses[..., 0], (2, 4)).any()
    _, expected_distances = brute_force(patches, own, k, without=(2, 4))
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)
    if k > 1:  # every patch that is left, each once
        assert {len(set(map(tuple, row.tolist()))) for row in addresses} == {k}


@pytest.mark.parametrize("kind", ["exact", "indexed", "lined"])
def test_more_neighbours_than_there_are_patches_are_refused(kind, request):
    patches = request.getfixturevalue(kind)
    everything = [image.sha256 for image in patches.manifest.images]
    query = np.zeros((1, 16, 16, 3), np.uint8)
    with Neighbours(patches) as found:
        for k, exclude in ((1, everything), (1015, []), (0, [])):
            with pytest.raises(TooFewPatches, match="not excluded"):
                found.nearest(query, k=k, exclude=exclude)
        with pytest.raises(ValueError, match="uint8"):
            found.nearest(query.astype(np.float32))
        with pytest.raises(ValueError, match="uint8"):
            found.nearest(query[:, :8])
        assert found.nearest(query[:0], k=3)[0].shape == (0, 3, 3)


def test_a_search_on_random_lines_tells_that_it_goes_on_after_each_query(
    lined, queries, monkeypatch
):
    happened = []
    search = PrioritizedDCI._search

    def searched(self, *arguments):
        happened.append("searched")
        return search(self, *arguments)

    monkeypatch.setattr(PrioritizedDCI, "_search", searched)
    with Neighbours(lined) as found:
        found.nearest(queries[:5], on_part=lambda: happened.append("told"))
    assert happened == ["searched", "told"] * 5


def another_kind(patches: PatchSet) -> PatchSet:
    return with_index(patches, {"backend": "later", "kind": "later"})


def another_parameter(patches: PatchSet) -> PatchSet:
    kept = patches.manifest.index.keys() - {"probes", "retrieve"}
    return with_index(patches, {name: patches.manifest.index[name] for name in kept})


def another_faiss(patches: PatchSet) -> PatchSet:
    file = patches.folder / "index.faiss"
    file.write_bytes(b"Iw99" + file.read_bytes()[4:])
    return patches


def another_format(patches: PatchSet) -> PatchSet:
    (patches.folder / "dci.json").write_text('{"format": 2}')
    return patches


def another_set(patches: PatchSet) -> PatchSet:
    geometry = Geometry(size=16, stride=8, resize=64)
    manifest = patches.manifest.model_copy(update={"geometry": geometry})
    return PatchSet(patches.folder, manifest)


def with_index(patches: PatchSet, index: dict[str, object]) -> PatchSet:
    return PatchSet(patches.folder, patches.manifest.model_copy(update={"index": index}))


@pytest.mark.parametrize(
    "kind, change",
    [
        ("exact", another_kind),
        ("indexed", another_parameter),
        ("indexed", another_faiss),
        ("lined", another_parameter),
        ("lined", another_format),
        ("lined", another_set),
    ],
)
def test_an_index_of_another_version_is_refused(kind, change, request, tmp_path):
    patches = request.getfixturevalue(kind)
    shutil.copytree(patches.folder, tmp_path / kind)
    changed = change(PatchSet(tmp_path / kind, patches.manifest))
    with pytest.raises(PatchSetUnusable, match="another version") as error:
        Neighbours(changed)
    assert "build it again" in str(error.value)


@pytest.mark.parametrize(
    "kind, backend, files",
    [
        ("indexed", "faiss", {"index.faiss", "projection.npy"}),
        ("lined", "dci", {"directions.npy", "projections.npy", "order.npy"}),
    ],
)
def test_the_same_seed_gives_the_same_index_and_another_one_another(
    kind, backend, files, photos, tmp_path, request
):
    patches = request.getfixturevalue(kind)
    same, other = (
        build(
            photos, f"seed{seed}", SMALL, indexer(backend, seed=seed, exact_up_to=0), root=tmp_path
        )
        for seed in (0, 1)
    )
    assert patches.manifest.files.keys() - {"images.u8", "dci.json"} == files
    for file in files:
        first = (patches.folder / file).read_bytes()
        assert (same.folder / file).read_bytes() == first
        assert (other.folder / file).read_bytes() != first


@pytest.mark.parametrize("backend", ["faiss", "dci"])
def test_a_small_set_is_searched_exactly_and_says_so(backend, photos, tmp_path):
    patches = build(photos, "small", SMALL, indexer(backend), root=tmp_path)
    assert patches.manifest.index == {"backend": backend, "kind": "exact"}
    assert patches.manifest.files.keys() == {"images.u8"}


def test_an_index_takes_less_than_64_bytes_a_patch_and_what_does_not_grow(indexed):
    fixed = indexed.manifest.index["lists"] * 4 * 64 + 256 * 4 * 64 + 65 * 4 * SMALL.values
    with Neighbours(indexed) as found:
        assert found.index.memory - fixed < 64 * len(indexed)


def test_random_lines_take_240_bytes_a_patch_and_what_does_not_grow(lined):
    directions = 30 * 8 * SMALL.values
    with Neighbours(lined) as found:
        assert found.index.memory == 240 * len(lined) + directions
    headers = 3 * 128 + 20
    assert sum(lined.manifest.files.values()) - lined.pixels.nbytes < found.index.memory + headers


@pytest.mark.parametrize("size", [4, 20])
def test_distances_are_exact_whatever_the_pixels_and_however_many(size, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for i in range(3):
        pixels = rng.choice(np.array([0, 1, 254, 255], np.uint8), (40, 40, 3))
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{i}.png")
    geometry = Geometry(size=size, stride=4, resize=40)
    patches = build(tmp_path / "noise", "noise", geometry, indexer(), root=tmp_path / "sets")
    monkeypatch.setattr(neighbours, "COMPARED", 7 * 4 * geometry.values)
    queries = np.stack([np.full((size, size, 3), value, np.uint8) for value in (0, 255)])
    _, distances = Neighbours(patches).nearest(queries, k=len(patches))
    every = patches.flat(np.arange(len(patches))).astype(np.int64)
    squares = [((every - query.reshape(-1)) ** 2).sum(1) for query in queries.astype(np.int64)]
    assert np.array_equal(distances, np.sqrt(np.sort(squares, axis=1)) / 255)


@pytest.mark.parametrize("backend", ["faiss", "dci"])
@pytest.mark.parametrize("size", [1, 4])
def test_patches_of_few_numbers_are_indexed_too(photos, tmp_path, size, backend):
    geometry = Geometry(size=size, stride=8, resize=64)
    patches = build(photos, "tiny", geometry, indexer(backend, exact_up_to=0), root=tmp_path)
    own = patches.read(patches.addresses(np.array([0, 300])))
    with Neighbours(patches) as found:
        assert not found.nearest(own)[1].any()


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is not here")
@pytest.mark.parametrize("backend", ["faiss", "dci"])
def test_neighbours_of_held_out_photographs_are_nearly_always_the_nearest(
    backend, tmp_path, monkeypatch
):
    monkeypatch.setattr(neighbours, "CANDIDATES", 64)
    monkeypatch.setattr(neighbours, "retrieve_count", lambda patches: 64)
    for i, file in enumerate(sorted(PHOTOS.glob("*.jpg"))):
        folder = tmp_path / ("seen" if i % 11 else "held")
        folder.mkdir(exist_ok=True)
        (folder / file.name).symlink_to(file.resolve())
    geometry = Geometry(size=16, stride=16, resize=112)
    held = build(tmp_path / "held", "held", geometry, indexer(), root=tmp_path / "sets")
    rng = np.random.default_rng(0)
    queries = held.read(rng.integers(0, (len(held.pixels), 97, 97), (100, 3)))
    everything, some = (
        build(
            tmp_path / "seen",
            f"up-to-{most}",
            geometry,
            indexer(backend, exact_up_to=most),
            root=tmp_path / "sets",
        )
        for most in (10**6, 0)
    )
    with Neighbours(everything) as exact, Neighbours(some) as indexed:
        truth, found = exact.nearest(queries)[1], indexed.nearest(queries)[1]
    assert np.mean(found == truth) > 0.9


# The process with faiss in it


def test_neither_torch_nor_faiss_is_opened_here(photos, tmp_path):
    code = f"""
import sys
from pathlib import Path
import polycollide.patches
from core.patches import neighbours, sets
geometry = sets.Geometry(size=16, stride=8, resize=64)
index = neighbours.indexer(exact_up_to=0)
patches = sets.build(Path({str(photos)!r}), "set", geometry, index, root=Path({str(tmp_path)!r}))
with neighbours.Neighbours(patches) as found:
    found.nearest(patches.read([(0, 0, 0)]))
sys.exit(" ".join(name for name in ("torch", "faiss") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") or done.stderr == "\n"


def test_a_process_that_dies_is_an_error_and_not_a_wait(indexed):
    with Neighbours(indexed) as found:
        process = found.index.faiss.process
        process.kill()
        process.wait()
        with pytest.raises(IndexFailed, match="status -9"):
            found.nearest(np.zeros((1, 16, 16, 3), np.uint8))


def test_the_process_ends_with_its_parent_even_in_the_middle_of_work():
    with Faiss() as faiss:
        faiss.ask("train", np.zeros((256, 4), np.float32), lists=1, codes=4, path=os.devnull)
        sample = np.random.default_rng(0).standard_normal((200_000, 64), dtype=np.float32)
        neighbours.send(  # minutes of work
            faiss.process.stdin,
            {"ask": "train", "lists": 3000, "codes": 32, "path": os.devnull},
            (sample,),
        )
        faiss.process.stdin.close()
        assert faiss.process.wait(timeout=20) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here is always full")
def test_what_goes_wrong_there_is_said_here():
    with Faiss() as faiss:
        sample = np.random.default_rng(0).standard_normal((300, 4), dtype=np.float32)
        with pytest.raises(OSError, match="space") as error:
            faiss.ask("train", sample, lists=4, codes=4, path="/dev/full")
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(IndexFailed, match="faiss could not train"):
            faiss.ask("train", sample[:9], lists=4, codes=4, path=os.devnull)
        faiss.ask("train", sample, lists=4, codes=4, path=os.devnull)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'faiss'"):
        indexer("fais")


def test_sets_are_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYCOLLIDE_PATCHES", str(tmp_path / "here"))
    assert sets.default_root() == tmp_path / "here"
    monkeypatch.delenv("POLYCOLLIDE_PATCHES")
    assert sets.default_root().name == "patches"
