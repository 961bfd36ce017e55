"""The patch sets of this machine, kept open from one job to the next."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Self

from core.errors import CoreError
from core.patches import sets
from core.patches.neighbours import Neighbours
from core.patches.sets import PatchSet

MAX_INDICES = 2  # that are loaded: of the paper's 37 million patches one takes 1.5 GB

_Stamp = tuple[int, int, int]


class Library:
    """For one thread, and to be closed, as `with` does. A set that changed is opened anew."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root
        self._sets: dict[str, tuple[_Stamp, PatchSet]] = {}
        self._searched: OrderedDict[str, Neighbours] = OrderedDict()

    def sets(self) -> list[PatchSet]:
        """All that can be used now, by name."""
        usable = []
        for name in sets.names(self._root):
            if self._stamp(name) is None:  # unfinished: to ask who builds it would be in their way
                continue
            try:
                usable.append(self.open(name))
            except (CoreError, OSError):  # damaged, not ours to read, or deleted meanwhile
                continue
        self._sets = {patches.name: self._sets[patches.name] for patches in usable}
        return usable

    def open(self, name: str) -> PatchSet:
        """Raises as `open_set` does."""
        stamp = self._stamp(name)
        if stamp is None or name not in self._sets or self._sets[name][0] != stamp:
            self._forget(name)
            opened = sets.open_set(name, self._root)
            if stamp is None:  # it has been finished at this very moment
                return opened
            self._sets[name] = stamp, opened
        return self._sets[name][1]

    def neighbours(self, name: str) -> Neighbours:
        """Raises as `open_set` and `Neighbours` do."""
        if name in self._searched and not self._searched[name].index.alive:
            self._forget(name)
        patches = self.open(name)
        if name not in self._searched:
            self._searched[name] = Neighbours(patches)
            if len(self._searched) > MAX_INDICES:
                self._searched.popitem(last=False)[1].close()
        self._searched.move_to_end(name)
        return self._searched[name]

    def close(self) -> None:
        for name in list(self._searched):
            self._forget(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _forget(self, name: str) -> None:
        self._sets.pop(name, None)
        if name in self._searched:
            self._searched.pop(name).close()

    def _stamp(self, name: str) -> _Stamp | None:
        """What changes when a set's manifest is written again; null where there is none."""
        try:
            status = os.stat((self._root or sets.default_root()) / name / sets.MANIFEST)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
