"""Whether workers can run what a spec asks for, as far as they have reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import InvalidSpec, UnknownName
from core.patches.windows import Windows
from core.spec import CollisionSpec
from store.overview import LIVE
from store.workers import FRESH

# Of workers that are there now: what others knew may be out of date.
_NAMES = text(f"SELECT DISTINCT name FROM models WHERE {LIVE}")
# Classes only where somebody asks for one: ImageNet's are 30 KB.
_MODELS = text(f"""
    SELECT name, weights, input_shape, CASE WHEN :classes THEN classes END AS classes, (
            SELECT jsonb_object_agg(called #>> '{{}}', layer->'units')
            FROM jsonb_path_query(layers, '$[*]') AS layer,
                jsonb_path_query(layer, '$.names[*]') AS called
        ) AS layers
    FROM models WHERE name = ANY(CAST(:names AS text[])) AND {LIVE}
""")


_PATCH_SETS = text(f"SELECT DISTINCT name, size FROM patch_sets WHERE {LIVE}")
_ANY_WORKER = text(f"SELECT EXISTS (SELECT FROM workers WHERE NOT draining AND {FRESH})")


@dataclass(frozen=True)
class _Report:
    weights: list[str]
    input_shape: list[int]
    classes: list[str] | None
    layers: dict[str, int] | None  # how many units each has


@dataclass(frozen=True)
class Catalog:
    """What workers have reported of some models.

    `patch_sets` has the patch sizes of each set; it is null where no worker is there to have any.
    """

    names: frozenset[str]
    reports: dict[str, list[_Report]]
    patch_sets: dict[str, list[int]] | None
    max_parameters: int
    max_result_bytes: int

    def file_bytes(self, spec: CollisionSpec) -> int:
        """What the files of a result come to at most; 0 where nobody knows the network's images."""
        shapes = [report.input_shape for report in self.reports.get(spec.model, [])]
        return max(map(spec.file_bytes, shapes), default=0)

    def check(self, spec: CollisionSpec) -> None:
        """Raises UnknownName or InvalidSpec where no worker can run it.

        What nobody has reported yet is left to the worker to find out.
        """
        sizes: list[int] = []
        if spec.patch_set is not None and self.patch_sets is not None:
            if spec.patch_set not in self.patch_sets:
                raise UnknownName("patch set", spec.patch_set, self.patch_sets)
            sizes = self.patch_sets[spec.patch_set]
        if not self.names:
            return
        if spec.model not in self.names:
            raise UnknownName("model", spec.model, self.names)
        reports = self.reports.get(spec.model, [])
        if spec.weights is not None:
            listed = _union([report.weights for report in reports])
            if listed is not None and spec.weights not in listed:
                raise UnknownName("weights", spec.weights, listed)
        layers = _union([list(report.layers or ()) for report in reports])
        if layers is not None and spec.layer not in layers:
            raise UnknownName("layer", spec.layer, layers)
        if layers is not None:
            _check_units(spec, [(report.layers or {}).get(spec.layer, 0) for report in reports])
        if spec.target_class is not None:
            classes = _union([report.classes for report in reports])
            if classes is not None and spec.target_class not in classes:
                _check_index(spec.target_class, classes)
        for report in reports:
            self._check_size(spec, report.input_shape)
            spec.check_files(report.input_shape, self.max_result_bytes)
        misfits: list[InvalidSpec] = []
        for size, report in product(sizes, reports):
            try:
                self._check_windows(spec, size, report.input_shape)
            except InvalidSpec as error:
                misfits.append(error)
        if misfits and len(misfits) == len(sizes) * len(reports):
            raise misfits[0]

    def _check_windows(self, spec: CollisionSpec, size: int, input_shape: list[int]) -> None:
        windows = Windows.of_job(spec, window=size, image=tuple(input_shape))
        parameters = spec.corners * windows.parameters
        if parameters > self.max_parameters:
            raise InvalidSpec(
                f"{spec.corners} corners of {windows.count} windows are {parameters:,} control "
                f"parameters, over {self.max_parameters:,}; ask for fewer corners, a larger stride "
                "or smaller surroundings."
            )

    def _check_size(self, spec: CollisionSpec, input_shape: list[int]) -> None:
        parameters = spec.rows * math.prod(input_shape)
        if parameters > self.max_parameters:
            points = spec.rows - spec.corners
            between = f" and {points} points between them" if points else ""
            raise InvalidSpec(
                f"{spec.corners} corners{between}, of {'x'.join(map(str, input_shape))}, are "
                f"{parameters:,} parameters, over {self.max_parameters:,}; ask for fewer."
            )


async def read(
    connection: AsyncConnection,
    specs: Sequence[CollisionSpec],
    *,
    max_parameters: int,
    max_result_bytes: int,
) -> Catalog:
    """What is known of the models and patch sets of these specs."""
    wanted = {
        "names": list({spec.model for spec in specs}),
        "classes": any(spec.target_class is not None for spec in specs),
    }
    reports: dict[str, list[_Report]] = {}
    for row in await connection.execute(_MODELS, wanted):
        report = _Report(row.weights, row.input_shape, row.classes, row.layers)
        reports.setdefault(row.name, []).append(report)
    names = set(reports)
    if not names.issuperset(wanted["names"]):  # type: ignore[arg-type]
        names = set((await connection.execute(_NAMES)).scalars())
    patch_sets: dict[str, list[int]] | None = None
    if any(spec.patch_set for spec in specs) and await connection.scalar(_ANY_WORKER):
        patch_sets = {}
        for name, size in await connection.execute(_PATCH_SETS):
            patch_sets.setdefault(name, []).append(size)
    return Catalog(frozenset(names), reports, patch_sets, max_parameters, max_result_bytes)


def _union(lists: Sequence[list[str] | None]) -> list[str] | None:
    """What any worker knows; None where none knows a thing, or one might know more."""
    known = [names for names in lists if names]
    return [name for names in known for name in names] if len(known) == len(lists) > 0 else None


def _check_units(spec: CollisionSpec, sizes: Sequence[int]) -> None:
    """That a layer of one of these sizes has the units that are listed."""
    if isinstance(spec.units, list):
        most = max(each if isinstance(each, int) else max(each) for each in spec.units)
        if most >= max(sizes):
            raise InvalidSpec(
                f"There is no unit {most}: layer {spec.layer!r} has {max(sizes)}, from 0."
            )


def _check_index(wanted: str, classes: list[str]) -> None:
    if not (wanted.isdecimal() and wanted.isascii() and int(wanted) < len(classes)):
        raise UnknownName("class", wanted, classes)
