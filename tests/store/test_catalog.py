"""What is refused when it is submitted, from what workers have reported."""

import pytest

from core.errors import InvalidSpec, UnknownName
from core.spec import CollisionSpec
from store.catalog import Catalog, _Report


def catalog(sizes: dict[str, list[int]] | None, most: int = 2**26) -> Catalog:
    report = _Report(weights=[], input_shape=[3, 64, 48], classes=None, layers=None)
    return Catalog(frozenset({"m"}), {"m": [report]}, sizes, most, 2**29)


def spec_of(**patches: int | str) -> CollisionSpec:
    laid = {"set": "photos", "stride": 16, "surround": 4} | patches
    given = {"model": "m", "layer": "l", "parametrization": "patches", "patches": laid}
    return CollisionSpec.model_validate(given)


def test_windows_that_fit_the_set_of_any_worker_are_taken() -> None:
    """Where workers have different sets under one name."""
    catalog({"photos": [8, 32]}).check(spec_of())
    with pytest.raises(InvalidSpec, match="do not cover"):
        catalog({"photos": [8, 12]}).check(spec_of())


def test_control_parameters_count_as_parameters() -> None:
    """3 x 2 windows of 32 px, whose sources have 40 x 40 pixels, for each of five corners."""
    needed = 5 * 3 * 2 * 40**2
    catalog({"photos": [32]}, needed).check(spec_of())
    with pytest.raises(InvalidSpec, match="48,000 control parameters, over 47,999"):
        catalog({"photos": [32]}, needed - 1).check(spec_of())


def test_a_set_is_unknown_only_where_a_worker_would_know_it() -> None:
    catalog(None).check(spec_of(set="foto"))
    with pytest.raises(UnknownName, match="did you mean 'photos'"):
        catalog({"photos": [32]}).check(spec_of(set="foto"))
