"""The thread that tells the store which patch sets this machine has, as they come and go."""

import threading
import time
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from core.patches.library import Library
from core.patches.sets import MANIFEST, PatchSet
from store import workers

log = structlog.get_logger(__name__)

EVERY = 3.0  # seconds between two looks, each at a file of every set


class PatchSets(threading.Thread):
    """Shared with the worker's claimer, which reads `names`."""

    def __init__(self, database: Engine, slot: str) -> None:
        super().__init__(name="patch sets", daemon=True)
        self._database, self._slot = database, slot
        self._library = Library()  # this thread's own; it loads no index
        self._found: list[PatchSet] = []

    @property
    def names(self) -> set[str]:
        """Those that can be used, and that nobody has deleted since the last look."""
        return {each.name for each in self._found if (each.folder / MANIFEST).is_file()}

    def look(self) -> list[dict[str, Any]]:
        """What there is now, as `report_patch_sets` takes it."""
        try:
            self._found = self._library.sets()
        except OSError as error:  # changed under our eyes, or not ours to read
            log.warning("patch sets cannot be read", error=str(error))
        return [_report(each) for each in self._found]

    def run(self) -> None:
        while True:
            time.sleep(EVERY)
            try:
                found = self.look()
                with self._database.begin() as connection:
                    workers.report_patch_sets(connection, self._slot, found)
            except SQLAlchemyError as error:
                log.warning("the store does not answer", error=str(error).splitlines()[0])
            except Exception:  # this thread must outlive whatever happens to it
                log.exception("a look at patch sets failed")


def _report(patches: PatchSet) -> dict[str, Any]:
    geometry, manifest = patches.geometry, patches.manifest
    return {
        "name": patches.name,
        "sha256": patches.sha256,
        "images": len(manifest.images),
        "patches": len(patches),
        "size": geometry.size,
        "stride": geometry.stride,
        "resize": geometry.resize,
        "index": manifest.index["kind"],
    }
