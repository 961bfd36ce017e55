"""A patch set on disk: the resized images that patches are read from, and what is known of them.

A set is a folder of POLYCOLLIDE_PATCHES that may be copied anywhere:

    set.json     written last, so that a set with it is whole; nothing in it names a place
    images.u8    uint8 [N, resize, resize, 3]: the images, not their patches, which overlap
    patch-set    empty: tells the folder from others, which we never touch, and is locked by whoever
                 builds or deletes the set
    ...          the files of the index (core.patches.neighbours)

While it is built, `building.jsonl` has a line for every file that was looked at. What a line says
is on disk before the line is, so a build that was killed goes on behind the last whole line.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, ValidationError

from core import images
from core.errors import CoreError, InvalidImage, InvalidSpec, UnknownName
from core.images import Preprocessing

SCHEMA_VERSION = 2
MANIFEST, PIXELS, JOURNAL, LOCK = "set.json", "images.u8", "building.jsonl", "patch-set"
UNFINISHED = ".new"  # ends the names of files that are being written
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
AGAIN = ": delete the set and build it again."
CHUNK = 32  # files between two syncs to disk: what a kill costs at most

Bytes = NDArray[np.uint8]
Ids = NDArray[np.int64]
# Called with what is going on, how much of it is done, and of how much.
Report = Callable[[str, int, int], object]


class InvalidPatches(CoreError):
    """No patch set can be built of this."""

    code = "invalid_patches"


class PatchSetBusy(CoreError):
    """Somebody else is building the patch set."""

    code = "patch_set_busy"


class PatchSetUnusable(CoreError):
    """The patch set is unfinished, damaged or another version's."""

    code = "patch_set_unusable"


class DiskFull(CoreError):
    """The disk has no room for the patch set."""

    code = "disk_full"


@dataclass(frozen=True)
class Geometry:
    """Which patches an image has: `size` x `size` pixels, every `stride`, of `resize` x `resize`.

    The defaults are the paper's: 17 x 17 patches of an image. Raises InvalidPatches.
    """

    size: int = 32
    stride: int = 12
    resize: int = 224

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise InvalidPatches(f"The {name} must be at least 1, not {value}.")
        if self.resize > images.MAX_SIDE:
            raise InvalidPatches(f"Images of {self.resize} pixels are over {images.MAX_SIDE}.")
        if self.size > self.resize:
            raise InvalidPatches(
                f"A patch of {self.size} pixels is larger than the image of {self.resize}; "
                "take smaller patches or larger images."
            )

    @property
    def side(self) -> int:
        """Patches in a row of an image, and in a column."""
        return (self.resize - self.size) // self.stride + 1

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self.size * self.size * 3

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.resize, self.resize, 3

    @property
    def image_bytes(self) -> int:
        return self.resize * self.resize * 3


@dataclass(frozen=True)
class StoredImage:
    """An image of the set: its file, relative to the folder, the sha256 of that file, and its
    thumbnail (`images.Loaded.thumbnail`) in hexadecimal digits.
    """

    name: str
    sha256: str
    thumbnail: str


@dataclass(frozen=True)
class Duplicate:
    """A file with the same bytes as an image of the set."""

    name: str
    of: str


@dataclass(frozen=True)
class Skipped:
    """A file that is no image we can read, and why, in a sentence."""

    name: str
    reason: str


class Manifest(BaseModel):
    """What stands in set.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    name: str
    sha256: str  # of the geometry and the images' sha256, in order
    geometry: Geometry
    seed: int
    listing_sha256: str  # of the names and sizes of all files that were looked at
    index: dict[str, Any]  # "backend", "kind", and its parameters
    files: dict[str, int]  # bytes of every other file of the set
    images: tuple[StoredImage, ...]
    duplicates: tuple[Duplicate, ...]
    skipped: tuple[Skipped, ...]


class Indexer(Protocol):
    """What makes a set's patches searchable."""

    backend: str
    seed: int

    def __call__(self, patches: "PatchSet", report: Report) -> dict[str, Any]:
        """Writes index files into the set's folder, going on where a killed build left them.

        No other files may be left there. Returns what `Manifest.index` is to have.
        """


@dataclass(frozen=True)
class PatchSet:
    """A set of patches. A patch is addressed as (image, y, x), y and x its upper left pixel.

    Patches have ids, too: 0 to `len(self) - 1`, image after image, row after row.
    """

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def sha256(self) -> str:
        return self.manifest.sha256

    @property
    def geometry(self) -> Geometry:
        return self.manifest.geometry

    @property
    def per_image(self) -> int:
        return self.geometry.side**2

    def __len__(self) -> int:
        return len(self.manifest.images) * self.per_image

    @cached_property
    def pixels(self) -> Bytes:
        """The images [N, resize, resize, 3], memory-mapped."""
        shape = len(self.manifest.images), *self.geometry.image_shape
        return np.memmap(self.folder / PIXELS, np.uint8, "r", shape=shape)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each image, by its sha256."""
        return {image.sha256: i for i, image in enumerate(self.manifest.images)}

    def like(self, image: images.Loaded) -> list[str]:
        """The sha256 of all images of the set that are this one: its file, or its picture."""
        return [
            stored.sha256
            for stored in self.manifest.images
            if stored.sha256 == image.sha256
            or images.alike(bytes.fromhex(stored.thumbnail), image.thumbnail)
        ]

    def addresses(self, ids: Ids) -> Ids:
        """The addresses [..., 3] of patches by their ids [...]."""
        side, stride = self.geometry.side, self.geometry.stride
        image, place = np.divmod(ids, self.per_image)
        row, column = np.divmod(place, side)
        return np.stack([image, row * stride, column * stride], axis=-1)

    def flat(self, ids: Ids) -> Bytes:
        """The patches [P, size * size * 3] with these ids [P]."""
        image, y, x = self.addresses(ids).T
        patches: Bytes = self._windows[image, y, x, 0].reshape(len(ids), self.geometry.values)
        return patches

    def read(self, addresses: ArrayLike, surround: int = 0) -> Bytes:
        """The patches at `addresses` [P, 3] with what surrounds them, [P, h, h, 3].

        h is size + 2 `surround`. Past its borders an image goes on as its mirror image, border
        pixels included (numpy's "symmetric"): that is defined however far the surroundings reach
        and even for one pixel, and counts no pixel of the image less than others. Patches need
        not lie on the grid. Raises ValueError for one that is not in the set.
        """
        places = np.asarray(addresses, dtype=np.int64).reshape(-1, 3)
        resize, size = self.geometry.resize, self.geometry.size
        last = np.array([len(self.manifest.images) - 1, resize - size, resize - size])
        if surround < 0 or (places < 0).any() or (places > last).any():
            raise ValueError(f"a patch or its surroundings ({surround}) are not in {self.name!r}")
        image, *corner = places.T
        span = np.arange(-surround, size + surround)
        rows, columns = (_mirrored(place[:, None] + span, resize) for place in corner)
        found: Bytes = self.pixels[image[:, None, None], rows[:, :, None], columns[:, None, :]]
        return found

    @cached_property
    def _windows(self) -> Bytes:
        """Every patch of every image without a copy, [N, y, x, 1, size, size, 3]."""
        size = self.geometry.size
        return sliding_window_view(self.pixels, (size, size, 3), axis=(1, 2, 3))


def default_root() -> Path:
    """Where sets are: POLYCOLLIDE_PATCHES, or a folder of the user's. Raises InvalidSpec."""
    setting = os.environ.get("POLYCOLLIDE_PATCHES")
    try:
        return Path(setting).expanduser() if setting else user_data_path("polycollide") / "patches"
    except RuntimeError as error:
        raise InvalidSpec(
            "There is no home folder for patch sets; set POLYCOLLIDE_PATCHES to a folder."
        ) from error


def open_set(name: str, root: Path | None = None) -> PatchSet:
    """The set called `name`, once its version and the sizes of its files have been seen to fit.

    Raises UnknownName, PatchSetBusy (it is being built), PatchSetUnusable (unfinished, damaged,
    built by another version).
    """
    folder = _existing(name, root)
    try:
        written = json.loads((folder / MANIFEST).read_bytes())
        version = written.get("schema_version")
    except FileNotFoundError:
        with _locked(folder):  # or it is still being built
            pass
        raise PatchSetUnusable(
            f"The patch set {name!r} was not built to its end: give its build command again."
        ) from None
    except (ValueError, AttributeError) as error:
        raise PatchSetUnusable(f"{MANIFEST} of patch set {name!r} is damaged{AGAIN}") from error
    if version != SCHEMA_VERSION:
        raise PatchSetUnusable(
            f"The patch set {name!r} was built by another version of polycollide (its format is "
            f"{version!r}, ours {SCHEMA_VERSION}){AGAIN}"
        )
    try:
        patches = PatchSet(folder, Manifest.model_validate(written))
    except (ValidationError, InvalidPatches) as error:
        raise PatchSetUnusable(f"{MANIFEST} of patch set {name!r} is damaged{AGAIN}") from error
    needed = len(patches.manifest.images) * patches.geometry.image_bytes
    for file, size in {**patches.manifest.files, PIXELS: needed}.items():
        path = folder / file
        there = path.stat().st_size if path.is_file() else 0
        if there != size:
            raise PatchSetUnusable(
                f"{file} of patch set {name!r} has {there:,} bytes instead of {size:,}{AGAIN}"
            )
    return patches


def names(root: Path | None = None) -> list[str]:
    """The names of all sets, unfinished ones too, sorted."""
    root = root or default_root()
    if not root.is_dir():
        return []
    found = (folder.name for folder in root.iterdir() if NAME.fullmatch(folder.name))
    return sorted(name for name in found if os.path.isfile(root / name / LOCK))  # or none of ours


def delete(name: str, root: Path | None = None) -> None:
    """Deletes a set, whole or not. Raises UnknownName and PatchSetBusy."""
    folder = _existing(name, root)
    with _locked(folder):
        # At one stroke, so that no half of a set is ever found under its name.
        shutil.rmtree(folder.rename(folder.with_name(f".{name}.{os.getpid()}")))
    # What is left of deletions that were stopped, where it is ours and nobody is at it.
    for lock in folder.parent.glob(f".*/{LOCK}"):
        with suppress(PatchSetBusy, OSError), _locked(lock.parent):
            shutil.rmtree(lock.parent)


def build(
    directory: Path,
    name: str,
    geometry: Geometry,
    index: Indexer,
    *,
    root: Path | None = None,
    report: Report = lambda what, done, total: None,
) -> PatchSet:
    """The set `name` of all images under `directory`, sorted by their names.

    A build that was killed goes on where it was, if the files and the settings are still the same
    (names and sizes are compared), and starts afresh if not. A set that is there already is
    opened. Raises InvalidPatches, PatchSetBusy, DiskFull, PatchSetUnusable.
    """
    root = root or default_root()
    if not NAME.fullmatch(name):
        raise InvalidPatches(
            f"{name!r} is no name for a patch set: take letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit."
        )
    files = _walk(directory, root)
    asked = {
        "schema_version": SCHEMA_VERSION,
        "geometry": asdict(geometry),
        "seed": index.seed,
        "backend": index.backend,
        "listing_sha256": _listing_hash(files),
    }
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LOCK).exists() and any(folder.iterdir()):
        raise InvalidPatches(
            f"{folder} is there already, and no patch set: choose another name, or another folder "
            "in POLYCOLLIDE_PATCHES."
        )
    with _locked(folder), _room(folder):
        if (folder / MANIFEST).is_file():
            (folder / JOURNAL).unlink(missing_ok=True)
            return _same(open_set(name, root), asked)
        for unfinished in folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        store = _Store.open(folder, asked, geometry)
        with store:
            try:
                _read_images(store, directory, [file for file, _ in files], report)
            except InvalidPatches:
                shutil.rmtree(folder)
                raise
        patches = PatchSet(folder, store.manifest(name, asked))
        parameters = index(patches, report)
        sizes = {
            path.name: path.stat().st_size
            for path in sorted(folder.iterdir())
            if path.name not in (JOURNAL, LOCK)
        }
        manifest = patches.manifest.model_copy(update={"index": parameters, "files": sizes})
        write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
        (folder / JOURNAL).unlink()
        return PatchSet(folder, manifest)


def sync(file: BinaryIO) -> None:
    """Sees to it that what was written is on disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to that takes the place of `path` when all is written and on disk."""
    temporary = path.with_name(path.name + UNFINISHED)
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


class _Store:
    """The pixels and the journal of a set that is being built."""

    def __init__(self, folder: Path, geometry: Geometry, lines: list[dict[str, Any]]) -> None:
        self.geometry, self.lines = geometry, lines
        self.first: dict[str, StoredImage] = {}  # by sha256, of files with the same bytes the first
        for line in lines:
            if "sha256" in line:
                self.first.setdefault(line["sha256"], StoredImage(**line))
        self.pixels: BinaryIO = (folder / PIXELS).open("ab")
        self.journal: BinaryIO = (folder / JOURNAL).open("ab")

    @classmethod
    def open(cls, folder: Path, asked: dict[str, Any], geometry: Geometry) -> "_Store":
        """What an earlier build of the same left, or nothing."""
        journal, pixels = folder / JOURNAL, folder / PIXELS
        written = journal.read_bytes() if journal.is_file() else b""
        whole = written[: written.rfind(b"\n") + 1]
        try:
            header, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        except ValueError:  # the machine lost power while it was written
            header, lines = None, []
        stored = len({line["sha256"] for line in lines if "sha256" in line}) * geometry.image_bytes
        if header == asked and pixels.is_file() and pixels.stat().st_size >= stored:
            os.truncate(journal, len(whole))
            os.truncate(pixels, stored)
            return cls(folder, geometry, lines)
        for path in folder.iterdir():
            if path.name not in (LOCK, PIXELS):  # what another command had begun
                path.unlink()
        pixels.write_bytes(b"")
        journal.write_text(json.dumps(asked) + "\n")
        return cls(folder, geometry, [])

    def __enter__(self) -> "_Store":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # what does not fit the disk was said already
            self.pixels.close()
        with suppress(OSError):
            self.journal.close()

    def add(self, looked_at: list[tuple[StoredImage, Bytes] | Skipped]) -> None:
        """Keeps images with their pixels, and files that have none, in order."""
        lines: list[dict[str, Any]] = []
        for found in looked_at:
            if isinstance(found, Skipped):
                lines.append({"name": found.name, "skipped": found.reason})
                continue
            image, pixels = found
            if image.sha256 not in self.first:
                self.first[image.sha256] = image
                self.pixels.write(pixels.tobytes())
            lines.append(asdict(image))
        sync(self.pixels)
        self.journal.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        sync(self.journal)
        self.lines += lines

    def manifest(self, name: str, asked: dict[str, Any]) -> Manifest:
        """What is known when all files have been looked at; without the index."""
        stored = list(self.first.values())
        return Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            sha256=_set_hash(self.geometry, stored),
            geometry=self.geometry,
            seed=asked["seed"],
            listing_sha256=asked["listing_sha256"],
            index={"backend": asked["backend"]},
            files={},
            images=tuple(stored),
            duplicates=tuple(
                Duplicate(name=line["name"], of=self.first[line["sha256"]].name)
                for line in self.lines
                if "sha256" in line and self.first[line["sha256"]].name != line["name"]
            ),
            skipped=tuple(
                Skipped(name=line["name"], reason=line["skipped"])
                for line in self.lines
                if "skipped" in line
            ),
        )


def _read_images(store: _Store, directory: Path, files: list[str], report: Report) -> None:
    """Reads the files that the store has not seen yet."""
    resize = store.geometry.resize
    prepare = Preprocessing("RGB", size=(resize, resize), resize=resize)

    def look_at(name: str) -> tuple[StoredImage, Bytes] | Skipped:
        path = str(directory.absolute() / name)
        shown = name.encode("utf-8", "backslashreplace").decode()  # not every name is Unicode
        try:
            _, data = images.read(path)
            loaded = images.load(shown, data, prepare)
        except InvalidImage as error:
            # A set names no places.
            return Skipped(shown, str(error).replace(repr(path), repr(shown)))
        image = StoredImage(shown, loaded.sha256, loaded.thumbnail.hex())
        return image, images.to_8bit(loaded.pixels).transpose(1, 2, 0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes beside Python's lock
        for start in range(len(store.lines), len(files), CHUNK):
            report("images", start, len(files))
            store.add(list(pool.map(look_at, files[start : start + CHUNK])))
    report("images", len(files), len(files))
    if not store.first:
        reasons = [line["skipped"] for line in store.lines]
        raise InvalidPatches(
            f"None of the {len(files)} files in {directory} is an image we can read; the first: "
            f"{reasons[0]}"
        )


def _walk(directory: Path, root: Path) -> list[tuple[str, int]]:
    """All files under a folder with their sizes, by names relative to it; not the sets' own."""
    if not directory.is_dir():
        raise InvalidPatches(f"There is no folder {str(directory)!r}; give one with images.")
    found, own = [], root.resolve()
    closed: list[str] = []  # folders that may not be read: listed, so that they count as skipped
    for place, folders, here in os.walk(directory, onerror=lambda e: closed.append(e.filename)):
        folders[:] = [folder for folder in folders if Path(place, folder).resolve() != own]
        found += [Path(place, name) for name in here]
    found += [Path(name) for name in closed]
    if not found:
        raise InvalidPatches(f"The folder {str(directory)!r} has no files; give one with images.")
    return sorted((path.relative_to(directory).as_posix(), _bytes(path)) for path in found)


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere
        return 0


def _same(patches: PatchSet, asked: dict[str, Any]) -> PatchSet:
    """The set that is there already, if it is what is asked for."""
    manifest = patches.manifest
    is_so = {
        "schema_version": manifest.schema_version,
        "geometry": asdict(manifest.geometry),
        "seed": manifest.seed,
        "backend": manifest.index["backend"],
        "listing_sha256": manifest.listing_sha256,
    }
    if is_so != asked:
        raise InvalidPatches(
            f"There is a patch set {patches.name!r} already, of other files or settings: delete "
            "it or choose another name."
        )
    return patches


def _existing(name: str, root: Path | None) -> Path:
    known = names(root)
    if name not in known:
        raise UnknownName("patch set", name, known)
    return (root or default_root()) / name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The right to change a set; the system takes it back from a process that ends in any way."""
    lock = os.open(folder / LOCK, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PatchSetBusy(
                f"The patch set {folder.name!r} is being built by another process: wait for it, "
                "or stop it."
            ) from None
        yield
    finally:
        os.close(lock)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"The disk of {folder} is full: make room and give the same command again, which goes "
            "on where it was, or delete the set."
        ) from error


def _listing_hash(files: list[tuple[str, int]]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _set_hash(geometry: Geometry, stored: list[StoredImage]) -> str:
    lines = [f"patches {geometry.size} {geometry.stride} {geometry.resize}"]
    lines += [image.sha256 for image in stored]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _mirrored(places: Ids, size: int) -> Ids:
    """Places [...] on a line of `size` pixels that goes on as its own mirror image, as indices."""
    places = places % (2 * size)
    return np.minimum(places, 2 * size - 1 - places)
