"""A result as bytes: what the files hold, and that they are the same each time."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from core import artifacts, figures, images, job
from core.outcome import Outcome, run_alone
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
