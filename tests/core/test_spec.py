"""What a job may ask for, what it may not, and what it does not need torch for."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from core.patches.windows import GEOMETRIES
from core.result import Provenance
from core.spec import (
    PRESETS,
    SCHEMA_VERSION,
    Certify,
    CollisionSpec,
    Hull,
    Interpolation,
    Patches,
    Relative,
)

MINIMAL = {"model": "mnist-mlp", "layer": "fc1"}


def build(**settings: Any) -> CollisionSpec:
    return CollisionSpec.model_validate(MINIMAL | settings)


def refusals(**settings: Any) -> list[str]:
    """The places that a spec with these settings is refused for."""
    with pytest.raises(ValidationError) as caught:
        build(**settings)
    return [".".join(map(str, error["loc"])) for error in caught.value.errors()]


# Presets

# What a preset leaves to the user: nothing that moves a pixel or changes what is measured.
LEFT = {"schema_version", "preset", "weights", "target_class", "snapshots", "figures", "seed"}
# Of another objective, of another solver, and of another parametrization.
LEFT |= {"hull", "source_budget", "patches"}
OTHER: dict[str, Any] = {
    "model": "other",
    "layer": "other",
    "corners": 7,
    "objective": "plain",
    "parametrization": "patches",
    "patches": {"set": "photos", "stride": 9, "surround": 8, "source": True},
    "hull": {
        "points": 9,
        "sampling": "worst",
        "diversity": 2.0,
        "goal": 0.5,
        "low_pass": 1.0,
        "margin": 0.25,
        "source": 1.0,
    },
    "solver": "exact",
    "units": "random",
    "alpha": 3.5,
    "beta": 4.5,
    "gamma": 5.5,
    "negative": "hinge",
    "pixel_range": "free",
    "optimizer": "adam",
    "learning_rate": 0.125,
    "schedule": "cosine",
    "l_pos_threshold": 17.0,
    "violation_threshold": 19.0,
    "max_steps": 123,
    "max_seconds": 45.0,
    "interpolation": {"samples": 67, "sampler": "paper"},
    "ball_samples": 89,
    "worst_starts": 99,
    "certify": {"hull": "8bit", "subsimplices": 77, "seconds": 5.0},
    "precision": "bf16",
}


# What the presets that have it by default already are to be set to.
STILL_OTHER = {"negative": "absolute", "optimizer": "gd", "schedule": "rising"}
STILL_OTHER |= {"parametrization": "pixels"}
SET = {"set": "photos"}


def left_open(preset: str) -> dict[str, Any]:
    """What a preset asks the user for."""
    asked = {name: value for name, value in MINIMAL.items() if name not in PRESETS[preset]}
    return asked | ({"patches": SET} if "patches" in PRESETS[preset] else {})


def fixed_by(preset: str) -> dict[str, Any]:
    """What a preset comes to with the patch set that it may ask for."""
    own = PRESETS[preset]
    return own | ({"patches": own["patches"] | SET} if "patches" in own else {})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fixes_every_setting_that_decides_a_result(preset: str) -> None:
    fixed = fixed_by(preset)
    assert {*fixed, *left_open(preset)} - LEFT == set(CollisionSpec.model_fields) - LEFT
    spec = CollisionSpec.model_validate(left_open(preset) | {"preset": preset})
    assert spec.preset == preset
    dumped = spec.model_dump()
    assert {name: dumped[name] for name in fixed} == fixed
    assert ("patches" in fixed) == (spec.parametrization == "patches")


@pytest.mark.parametrize(("preset", "field"), [(p, f) for p in PRESETS for f in PRESETS[p]])
def test_what_the_user_sets_wins_over_the_preset(preset: str, field: str) -> None:
    fixed, other = fixed_by(preset), OTHER[field]
    if field == "solver" and (preset == "hull" or "patches" in fixed):
        other = fixed[field]  # which the other objectives and patches alone leave a choice
    elif fixed[field] == other:
        other = STILL_OTHER[field]
    given = left_open(preset) | {"preset": preset, "patches": SET, field: other}
    dumped = CollisionSpec.model_validate(given).model_dump()
    assert {name: dumped[name] for name in fixed} == fixed | {field: other}


def test_one_of_a_presets_inner_settings_leaves_the_others_as_they_are() -> None:
    spec = build(preset="hull", hull={"goal": 0.5}, beta={"relative": 2.0}, alpha=2.0)
    assert spec.hull == Hull(**PRESETS["hull"]["hull"] | {"goal": 0.5})
    assert spec.hull.diversity != Hull().diversity
    assert build(preset="hull", hull=Hull(goal=0.5)).hull == spec.hull
    assert build(preset="hull", beta=3.0).beta == 3.0
    assert build(preset="paper-mnist", beta={"relative": 2.0}).beta == Relative(relative=2.0)


def test_the_paper_presets_say_what_the_paper_says() -> None:
    mnist = CollisionSpec.model_validate({"preset": "paper-mnist"})
    assert (mnist.model, mnist.layer, mnist.corners, mnist.units) == (
        "mnist-mlp",
        "fc1",
        5,
        "first",
    )
    assert (mnist.l_pos_threshold, mnist.violation_threshold) == (5.0, None)
    assert (mnist.negative, mnist.optimizer, mnist.schedule) == ("absolute", "gd", "constant")
    assert mnist.interpolation == Interpolation(samples=2000, sampler="uniform")
    vgg = CollisionSpec.model_validate({"preset": "paper-vgg16-pixels"})
    assert (vgg.model, vgg.layer, vgg.optimizer) == ("vgg16", "classifier.0", "momentum")
    assert (vgg.alpha, vgg.beta) == (100 / 2, 10)  # TensorFlow's norm is half of ours
    assert vgg.learning_rate == pytest.approx(0.01 / 65025)  # both pixel and gradient scale by 255
    assert (vgg.negative, vgg.pixel_range) == ("absolute", "valid")
    for name, (_, stride, surround) in GEOMETRIES.items():
        preset = f"paper-vgg16-patches-{name}"
        spec = CollisionSpec.model_validate({"preset": preset, "patches": SET})
        assert (spec.model, spec.layer) == ("vgg16", "classifier.0")
        assert (spec.alpha, spec.beta, spec.gamma) == (100 / 2, 10, 100)
        assert (spec.optimizer, spec.schedule, spec.max_steps) == ("gd", "rising", 30_000)
        assert spec.patches == Patches(set="photos", stride=stride, surround=surround)
        with pytest.raises(ValidationError, match=r"set patches\.set to a set's name"):
            CollisionSpec.model_validate({"preset": preset})


def test_an_unknown_preset_is_refused_with_near_ones() -> None:
    with pytest.raises(ValidationError, match="no preset 'paper-mnst'; did you mean 'paper-mnist'"):
        build(preset="paper-mnst")


@pytest.mark.parametrize("preset", [["paper-mnist"], {"paper-mnist": 1}, 3, True])
def test_a_preset_that_is_no_name_is_refused_as_any_other_field_is(preset: object) -> None:
    assert refusals(preset=preset) == ["preset"]


def test_without_a_preset_model_and_layer_must_be_said() -> None:
    for data in ({}, {"preset": None}):
        with pytest.raises(ValidationError) as caught:
            CollisionSpec.model_validate(data)
        assert [error["loc"] for error in caught.value.errors()] == [("model",), ("layer",)]


def test_presets_are_not_changed_by_their_use() -> None:
    before = json.dumps(PRESETS)
    for preset in PRESETS:
        CollisionSpec.model_validate(
            left_open(preset) | {"preset": preset, "alpha": 2, "corners": 2}
        )
    assert json.dumps(PRESETS) == before


# Bounds


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"leaning_rate": 1}, "leaning_rate"),
        ({"interpolation": {"sample": 5}}, "interpolation.sample"),
        ({"l_pos_threshold": {"relative": 1, "absolute": 2}}, "l_pos_threshold.Relative.absolute"),
        ({"preset": "paper-mnist", "unit": "first"}, "unit"),
    ],
)
def test_an_unknown_field_is_an_error(settings: dict[str, Any], place: str) -> None:
    assert place in refusals(**settings)


BOUNDS: list[tuple[str, list[object], list[object]]] = [
    ("corners", [1, 256], [0, -1, 257, 2.5, None]),
    ("alpha", [1e-300, 1e9], [0, -1, 1.1e9, math.nan, math.inf]),
    (
        "beta",
        [0, 1e9, {"relative": 1e3}],
        [{"relative": 0}, {"relative": 1001}, -1e-9, 1.1e9, math.nan, math.inf],
    ),
    ("gamma", [0, 1e9], [-1e-9, 1.1e9, math.nan, math.inf]),
    ("learning_rate", [1e-12, 1e6], [0, -1, 1.1e6, math.nan, math.inf]),
    ("l_pos_threshold", [1e-9, 1e12, {"relative": 1e3}], [0, -1, 1.1e12, math.nan, math.inf, None]),
    ("l_pos_threshold", [{"relative": 1e-9}], [{"relative": v} for v in (0, -1, 1001, math.nan)]),
    ("violation_threshold", [None, 1e-9, {"relative": 1}], [0, -1, {"relative": 0}, math.nan]),
    ("max_steps", [1, 1_000_000], [0, 1_000_001, 1.5]),
    ("max_seconds", [1e-3, 7 * 86400], [0, -1, 7 * 86400 + 1, math.nan, math.inf]),
    ("ball_samples", [0, 100_000], [-1, 100_001]),
    ("snapshots", [0, 64], [-1, 65]),
    ("seed", [0, 2**32 - 1], [-1, 2**32]),
    ("schema_version", [1, SCHEMA_VERSION], [0, SCHEMA_VERSION + 1, None]),
    ("objective", ["corners", "plain", "hull"], ["polytope", ""]),
    ("hull", [{"points": 1}, {"points": 64}], [{"points": 0}, {"points": 65}, None]),
    ("hull", [{"sampling": "worst"}, {"diversity": 0}], [{"sampling": "x"}, {"diversity": -1}]),
    ("hull", [{"margin": 0}, {"margin": 0.99}], [{"margin": 1}, {"margin": -0.1}]),
    ("hull", [{"low_pass": 0}, {"low_pass": 64}], [{"low_pass": -1}, {"low_pass": 65}]),
    ("hull", [{"goal": 10}, {"source": 1e9}], [{"goal": 0}, {"goal": 11}, {"source": -1}]),
    ("solver", ["gradient", "exact", "null_space"], ["linear", None]),
    ("parametrization", ["pixels"], ["fourier", None]),
    ("patches", [{"stride": 1}, {"surround": 0}], [{"stride": 0}, {"surround": -1}, None]),
    (
        "patches",
        [{"set": "a-1.b"}, {"set": None}],
        [{"set": "a/b"}, {"set": ""}, {"set": "x" * 201}],
    ),
    ("source_budget", [None], [0, -1, 1.1, math.nan]),
    ("worst_starts", [0, 4096], [-1, 4097]),
    ("certify", [None, {"hull": "8bit"}], [{"hull": "png"}, {"seconds": 0}, {"seconds": 86401}]),
    ("certify", [{"subsimplices": 1}], [{"subsimplices": 0}, {"subsimplices": 1_000_001}]),
    ("units", ["first", "random", "reachable"], ["last", [], [-1], [2**31], [[]], [[-1]]]),
    ("negative", ["absolute", "hinge"], ["relu"]),
    ("pixel_range", ["valid", "free"], ["any", True]),
    ("optimizer", ["gd", "momentum", "adam"], ["sgd", None]),
    ("schedule", ["constant", "rising", "cosine"], ["linear"]),
    ("precision", ["fp32", "bf16", "tf32"], ["fp16"]),
    ("figures", [True, False], ["perhaps", None]),
    ("interpolation", [{"samples": 0}, {"samples": 100_000}], [{"samples": -1}, None]),
    ("interpolation", [{"sampler": "paper"}], [{"samples": 100_001}, {"sampler": "grid"}]),
    ("model", ["a", "mine-2.b", "x" * 200], ["", "a b", "a/b", "a\n", "x" * 201, None]),
    ("layer", ["layer4.1.relu#1", "block.relu()"], ["", "a b", "a'b", "../x", "x" * 201]),
    ("weights", [None, "IMAGENET1K_V1", "mine.safetensors"], ["", "a b", "x" * 201]),
    (
        "target_class",
        [None, "7", "giant panda", "jack-o'-lantern"],
        ["", "x" * 201, "a\n", "a\0b", "\x7f"],
    ),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, good, _ in BOUNDS for value in good]
)
def test_values_up_to_the_bounds_are_taken_as_they_are(field: str, value: object) -> None:
    got = build(**{field: value}).model_dump(exclude_unset=True)[field]
    assert got == value


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, _, bad in BOUNDS for value in bad]
)
def test_values_past_the_bounds_are_refused_at_their_place(field: str, value: object) -> None:
    assert {place.split(".")[0] for place in refusals(**{field: value})} == {field}


def test_every_field_is_in_the_table_of_bounds() -> None:
    assert {field for field, _, _ in BOUNDS} | {"preset"} == set(CollisionSpec.model_fields)


@pytest.mark.parametrize(
    "settings",
    [
        {"source_budget": 0.5},
        {"objective": "hull"},
        {"objective": "plain"},
        {"pixel_range": "free"},
    ],
)
def test_the_exact_solver_has_a_budget_and_no_other_objective(settings: dict[str, Any]) -> None:
    solver = "gradient" if "source_budget" in settings else "exact"
    assert refusals(solver=solver, **settings) == [""]
    assert build(solver="exact", source_budget=0.5).source_budget == 0.5


def test_patches_are_of_a_set_and_share_a_pass_with_those_laid_alike() -> None:
    assert refusals(parametrization="patches") == [""]
    laid = {"parametrization": "patches", "patches": {"set": "photos", "stride": 14}}
    key = build(**laid).batch_key
    assert build(**laid, gamma=3.0, alpha=2.0).batch_key == key
    assert build(**laid | {"patches": laid["patches"] | {"surround": 8}}).batch_key != key


def test_a_hull_has_corners_to_span_it() -> None:
    assert refusals(objective="hull", corners=1) == [""]
    assert build(objective="hull", corners=2).rows == 2 + 5


@pytest.mark.parametrize("corners", [1, 3, 5])
@pytest.mark.parametrize("entries", [1, 2, 3, 4, 5, 6])
def test_listed_units_must_be_one_entry_for_each_corner(corners: int, entries: int) -> None:
    units = [[i, i + 1] if i % 2 else i for i in range(entries)]
    if corners == entries:
        assert build(corners=corners, units=units).units == units
    else:
        with pytest.raises(ValidationError, match=f"lists {entries} entries for {corners} corners"):
            build(corners=corners, units=units)


def test_named_units_go_with_any_number_of_corners() -> None:
    assert build(corners=200, units="random").units == "random"


def test_a_threshold_is_absolute_or_relative() -> None:
    assert build(l_pos_threshold=5).l_pos_threshold == 5.0
    assert build(l_pos_threshold={"relative": 0.5}).l_pos_threshold == Relative(relative=0.5)
    for field in ("l_pos_threshold", "violation_threshold"):
        assert getattr(build(), field) == Relative(relative=0.01)


def test_a_spec_cannot_be_changed() -> None:
    spec = build()
    with pytest.raises(ValidationError, match="frozen"):
        spec.alpha = 2.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.interpolation.samples = 2  # type: ignore[misc]


# Round trips


def floats(low: float, high: float, *, open_low: bool = False) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min=open_low, allow_nan=False)


NAMES = st.text("abcXYZ019_.()#:+-é漢", min_size=1, max_size=200)
PRINTABLE = st.characters(exclude_categories=["Cc", "Cs"])
UNIT = st.integers(0, 2**31 - 1)
RELATIVE = st.builds(Relative, relative=floats(0, 1e3, open_low=True))
THRESHOLDS = floats(0, 1e12, open_low=True) | RELATIVE
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "preset": st.sampled_from([None, *PRESETS]),
    "weights": st.none() | NAMES,
    "target_class": st.none() | st.text(PRINTABLE, min_size=1, max_size=200),
    "objective": st.sampled_from(["corners", "plain", "hull"]),
    "hull": st.builds(
        Hull,
        points=st.integers(1, 64),
        sampling=st.sampled_from(["uniform", "worst"]),
        diversity=floats(0, 1e9),
        goal=floats(0, 10, open_low=True),
        margin=floats(0, 0.99),
        source=floats(0, 1e9),
    ),
    "parametrization": st.sampled_from(["pixels", "patches"]),
    "patches": st.builds(
        Patches, set=NAMES, stride=st.integers(1, 1024), surround=st.integers(0, 1024)
    ),
    "solver": st.just("gradient"),
    "source_budget": st.none(),
    "worst_starts": st.integers(0, 4096),
    "certify": st.none() | st.builds(Certify, subsimplices=st.integers(1, 1_000_000)),
    "alpha": floats(0, 1e9, open_low=True),
    "beta": floats(0, 1e9) | RELATIVE,
    "gamma": floats(0, 1e9),
    "negative": st.sampled_from(["absolute", "hinge"]),
    "pixel_range": st.sampled_from(["valid", "free"]),
    "optimizer": st.sampled_from(["gd", "momentum", "adam"]),
    "learning_rate": floats(0, 1e6, open_low=True),
    "schedule": st.sampled_from(["constant", "rising", "cosine"]),
    "l_pos_threshold": THRESHOLDS,
    "violation_threshold": st.none() | THRESHOLDS,
    "max_steps": st.integers(1, 1_000_000),
    "max_seconds": floats(0, 7 * 86400, open_low=True),
    "interpolation": st.builds(
        Interpolation,
        samples=st.integers(0, 100_000),
        sampler=st.sampled_from(["uniform", "paper"]),
    ),
    "ball_samples": st.integers(0, 100_000),
    "snapshots": st.integers(0, 64),
    "figures": st.booleans(),
    "precision": st.sampled_from(["fp32", "bf16", "tf32"]),
    "seed": st.integers(0, 2**32 - 1),
    "schema_version": st.just(SCHEMA_VERSION),
}


@st.composite
def specs(draw: st.DrawFn) -> CollisionSpec:
    settings = draw(st.fixed_dictionaries({"model": NAMES, "layer": NAMES}, optional=SETTINGS))
    if units := draw(st.lists(UNIT | st.lists(UNIT, min_size=1, max_size=9), max_size=9)):
        settings |= {"units": units, "corners": len(units)}
    else:
        settings["units"] = draw(st.sampled_from(["first", "random", "reachable"]))
        settings["corners"] = draw(st.integers(1, 256))
    if settings["corners"] == 1 and settings.get("objective") == "hull":
        settings["objective"] = "corners"
    if settings["corners"] == 1 and settings.get("preset") in ("hull", "patches"):
        settings["preset"] = None
    if "patches" not in settings:
        settings["parametrization"] = "pixels"
    return CollisionSpec.model_validate(settings)


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_a_spec_survives_being_written_and_read(spec: CollisionSpec) -> None:
    dumped, text = spec.model_dump(), spec.model_dump_json()
    assert set(dumped) == set(CollisionSpec.model_fields)
    assert CollisionSpec.model_validate(dumped) == spec
    assert CollisionSpec.model_validate_json(text) == spec
    assert CollisionSpec.model_validate(json.loads(text)) == spec
    assert CollisionSpec.model_validate(spec) == spec
    assert CollisionSpec.model_validate_json(text).batch_key == spec.batch_key


def test_the_strategy_reaches_every_setting() -> None:
    assert {*SETTINGS, *MINIMAL, "units", "corners"} == set(CollisionSpec.model_fields)


# Sharing a pass

BASE = build(objective="corners")


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "mnist-cnn"},
        {"layer": "fc2"},
        {"weights": "IMAGENET1K_V1"},
        {"precision": "bf16"},
        {"precision": "tf32"},
        {"optimizer": "gd"},
        {"optimizer": "momentum"},
        {"objective": "plain"},
        {"parametrization": "patches", "patches": {"set": "photos"}},
    ],
)
def test_jobs_that_cannot_share_a_pass_have_other_keys(settings: dict[str, Any]) -> None:
    assert build(**settings).batch_key != BASE.batch_key


@pytest.mark.parametrize(
    "settings",
    [
        {"corners": 9},
        {"units": "random"},
        {"units": [1, 2, 3, [4, 5], 6]},
        {"alpha": 3},
        {"beta": 3},
        {"gamma": 3},
        {"negative": "absolute"},
        {"pixel_range": "free"},
        {"learning_rate": 3},
        {"schedule": "cosine"},
        {"l_pos_threshold": 3},
        {"violation_threshold": None},
        {"max_steps": 3},
        {"max_seconds": 3},
        {"interpolation": {"samples": 3}},
        {"ball_samples": 3},
        {"objective": "hull"},
        {"hull": {"goal": 3}},
        {"solver": "exact"},
        {"solver": "exact", "source_budget": 0.5},
        {"worst_starts": 3},
        {"certify": {}},
        {"snapshots": 3},
        {"figures": False},
        {"seed": 3},
        {"target_class": "3"},
    ],
)
def test_jobs_that_differ_otherwise_share_a_pass(settings: dict[str, Any]) -> None:
    assert build(**settings).batch_key == BASE.batch_key


def test_a_preset_shares_passes_with_the_same_settings_written_out() -> None:
    preset = CollisionSpec.model_validate({"preset": "paper-mnist"})
    assert preset.batch_key == CollisionSpec.model_validate(PRESETS["paper-mnist"]).batch_key


def test_keys_do_not_run_into_one_another() -> None:
    names = [
        ("a", "bc", "d"),
        ("ab", "c", "d"),
        ("a", "b", "cd"),
        ("a", None, "d"),
        ("a", "None", "d"),
    ]
    keys = {CollisionSpec(model=m, weights=w, layer=la).batch_key for m, w, la in names}
    assert len(keys) == len(names)
    assert {len(key) for key in keys} == {16}


# In a process of its own


def in_fresh_process(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module", ["core.spec", "core.result", "core.images", "core.errors", "polycollide.cli"]
)
def test_importing_what_every_room_reads_leaves_torch_out(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, {module!r} in sys.modules)"
    assert in_fresh_process(code, tmp_path) == "False True"


def test_the_schema_is_made_without_torch_and_knows_every_field(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from core.spec import CollisionSpec\n"
        "print(json.dumps(CollisionSpec.model_json_schema()))\n"
        "assert 'torch' not in sys.modules\n"
    )
    schema = json.loads(in_fresh_process(code, tmp_path))
    assert set(schema["properties"]) == set(CollisionSpec.model_fields)
    assert schema["required"] == ["model", "layer"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["corners"]["maximum"] == 256
    told = {"schema_version", "interpolation"}
    assert all("description" in schema["properties"][f] for f in set(schema["properties"]) - told)


def test_a_preset_is_not_applied_again_to_settings_that_are_stored() -> None:
    asked = {"preset": "patches", "model": "mnist-mlp", "layer": "fc1", "patches": {"set": "p"}}
    resolved = CollisionSpec.model_validate(asked)
    assert resolved.hull.low_pass == 4.0
    assert CollisionSpec.stored(resolved.model_dump(mode="json")) == resolved
    earlier = resolved.model_dump(mode="json")
    del earlier["hull"]["low_pass"]  # of a form that had none, which was run without one
    assert CollisionSpec.stored(earlier).hull.low_pass == 0.0
    names = ("weights", "weights_sha256", "source_sha256", "target_sha256", "device", "precision")
    made = {**dict.fromkeys(names, ""), "versions": {}, "seed": 0, "spec": earlier}
    assert Provenance.model_validate_json(json.dumps(made)).spec.hull.low_pass == 0.0
    gone = {**resolved.model_dump(mode="json"), "preset": "a preset that is gone"}
    assert CollisionSpec.stored(gone).hull == resolved.hull


def test_settings_of_a_newer_form_are_not_read_and_older_ones_become_ours() -> None:
    with pytest.raises(ValidationError):
        CollisionSpec.stored({**MINIMAL, "schema_version": SCHEMA_VERSION + 1})
    assert CollisionSpec.stored({**MINIMAL, "schema_version": 1}).schema_version == SCHEMA_VERSION


def test_a_batch_key_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "from core.spec import CollisionSpec\n"
        "print(CollisionSpec(model='mnist-mlp', layer='fc1').batch_key)\n"
    )
    keys = {in_fresh_process(code, tmp_path, PYTHONHASHSEED=seed) for seed in ("1", "2")}
    assert keys == {BASE.batch_key}
