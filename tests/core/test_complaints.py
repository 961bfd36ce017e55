"""What is wrong with settings is said once, under the name that the user knows."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from core.complaints import MOST, complaints, sentence
from core.spec import CollisionSpec, Strict

GOOD = {"model": "mnist-mlp", "layer": "fc1"}


def refused(**settings: object) -> ValidationError:
    with pytest.raises(ValidationError) as raised:
        CollisionSpec.model_validate(GOOD | settings)
    return raised.value


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"betta": 2}, "There is no setting 'betta'; did you mean 'beta'?"),
        (
            {"interpolation": {"sampels": 5}},
            "interpolation: There is no setting 'sampels'; did you mean 'samples' or 'sampler'?",
        ),
        # An alternative that got further knows better than one that wants a number.
        ({"beta": {"relative": -1}}, "beta.relative: Input should be greater than 0"),
        ({"beta": {"relativ": 1}}, "beta: There is no setting 'relativ'; did you mean 'relative'?"),
        ({"beta": -1}, "beta: Input should be greater than or equal to 0"),
        ({"units": "frist"}, "units: Input should be 'first', 'random' or 'reachable'"),
        ({"units": [1, [2, None]]}, "units.1.1: Input should be a valid integer"),
        ({"units": [1]}, "units lists 1 entries for 5 corners; give one entry for each corner."),
        (
            {"corners": 0, "seed": -1},
            "corners: Input should be greater than or equal to 1; "
            "seed: Input should be greater than or equal to 0",
        ),
    ],
)
def test_each_field_is_complained_of_once_by_its_own_name(
    settings: dict[str, object], said: str
) -> None:
    assert sentence(refused(**settings), CollisionSpec) == said


def test_settings_are_found_inside_of_what_holds_them() -> None:
    class Request(Strict):
        specs: list[CollisionSpec]

    with pytest.raises(ValidationError) as raised:
        Request.model_validate({"specs": [GOOD, GOOD | {"beta": {"relative": 0}}]})
    (complaint,) = complaints(raised.value, Request)
    assert complaint.loc == ("specs", 1, "beta", "relative")


def test_no_number_of_unknown_names_keeps_the_caller_waiting() -> None:
    assert len(complaints(refused(**{f"x{i}": 0 for i in range(5000)}), CollisionSpec)) == MOST


def test_complaints_need_no_torch() -> None:
    code = "import sys, core.complaints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
