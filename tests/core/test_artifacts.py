"""A result as bytes: what the files hold, and that they are the same each time."""

import io
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from core import artifacts, figures, images, job
from core.outcome import PICTURES, Outcome, _missing, run_alone
from core.spec import CollisionSpec


@pytest.fixture(scope="module")
def made() -> tuple[job.Job, Outcome]:
    spec = CollisionSpec(preset="paper-mnist", figures=False, snapshots=3)
    subject = job.Subject.open(spec, torch.device("cpu"))
    pair = [
        images.load(*images.read(f"sample:mnist/{name}"), subject.model.preprocessing)
        for name in ("3-0", "7-0")
    ]
    return run_alone(subject, spec, *pair)


def test_arrays_come_back_as_they_were_computed(made):
    done, outcome = made
    files = artifacts.encode(*made)
    assert set(files) == {
        *(f"corner-{k}.png" for k in range(5)),
        *("corners.npz", "samples.npz", "snapshots.npz", "worst.png"),
    }
    corners = np.load(io.BytesIO(files["corners.npz"]))["corners"]
    assert corners.dtype == np.float32
    assert np.array_equal(corners, outcome.corners)
    png = np.asarray(Image.open(io.BytesIO(files["corner-2.png"])))
    assert np.array_equal(png, images.to_8bit(corners[2, 0]))
    samples = np.load(io.BytesIO(files["samples.npz"]))
    for name, array in outcome.samples.arrays().items():
        kept = array.astype(np.float32) if name == "weights" else array
        assert np.array_equal(samples[name], kept), name
    snapshots = np.load(io.BytesIO(files["snapshots.npz"]))
    assert snapshots["images"].shape == (len(snapshots["steps"]), 5, 1, 28, 28)
    for step, image in zip(snapshots["steps"], snapshots["images"], strict=True):
        at = done.group.snapshots.steps.index(step)
        assert np.array_equal(image, done.group.snapshots.values[at].numpy())
    assert snapshots["corner_steps"].tolist() == [c.steps for c in outcome.result.corners]
    assert snapshots["steps"].min() > 0 and snapshots["steps"].max() < done.group.steps.max()
    drawn = figures.Course.of(done.group)
    assert drawn.snapshot_steps == snapshots["steps"].tolist()
    assert np.array_equal(drawn.snapshots, snapshots["images"])


def test_the_same_outcome_gives_the_same_bytes_at_another_time(made, monkeypatch):
    before = artifacts.encode(*made)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert artifacts.encode(*made) == before


def test_only_figures_need_matplotlib():
    code = "import sys, core.artifacts; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"figures": False, "snapshots": 0},
        {"interpolation": {"samples": 0}, "worst_starts": 0, "max_steps": 10},
        {"corners": 1, "objective": "plain", "ball_samples": 0},
        {"solver": "exact", "corners": 2, "l_pos_threshold": 5.0},
    ],
)
def test_each_file_that_a_result_could_have_is_there_or_is_said_to_be_missing(settings):
    spec = CollisionSpec(model="mnist-mlp", layer="fc1", **settings)
    subject = job.Subject.open(spec, torch.device("cpu"))
    pair = [
        images.load(*images.read(f"sample:mnist/{name}"), subject.model.preprocessing)
        for name in ("3-0", "7-0")
    ]
    done, outcome = run_alone(subject, spec, *pair)
    made = set(artifacts.encode(done, outcome))
    if spec.figures:
        made |= set(artifacts.pictures(done, outcome)())
    missing = outcome.result.missing
    possible = {"corners.npz", "samples.npz", "snapshots.npz", "worst.png", *PICTURES}
    assert made - {f"corner-{k}.png" for k in range(5)} == possible - set(missing)
    assert not made & set(missing)
    assert "regions.png" in missing
    if not spec.snapshots:
        assert "items of a batch" in missing["snapshots.npz"]


def test_regions_that_are_not_drawn_are_missing_for_a_reason():
    source = np.zeros((3, 80, 80), np.float32)
    alike = torch.zeros(3, 3, 80, 80)
    apart = alike.clone()
    apart[1, :, 20:40, 20:40] = 1
    spec = CollisionSpec(model="m", layer="l", corners=3)
    for corners, told in (
        (alike, "The corners differ nowhere by what 8 bits show."),
        (apart, None),
    ):
        group = SimpleNamespace(curves=SimpleNamespace(steps=[0]), on_the_way=[1], corners=corners)
        pixels = SimpleNamespace(pixels=source)
        made = dict(_missing(SimpleNamespace(spec=spec, group=group, source=pixels)))
        assert made.get("regions.png") == told
