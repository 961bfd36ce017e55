"""Jobs whose corners are composed of patches, on a small colour network with random weights."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from core import images, models
from core.engine import Engine
from core.errors import InvalidSpec, UnknownName
from core.images import Preprocessing
from core.job import Job, Subject, nearest_patches, prepare
from core.models import Classifier, Model, Normalize
from core.outcome import run_alone
from core.patches.composite import Patches
from core.patches.library import Library
from core.patches.neighbours import Neighbours
from core.patches.sets import PatchSet
from core.patches.windows import Windows
from core.spec import CollisionSpec

SIDE = 40
LIBRARY = Library()
SETTINGS: dict[str, Any] = {
    "model": "small",
    "layer": "1",
    "corners": 3,
    "parametrization": "patches",
    "patches": {"set": "exact", "stride": 8, "surround": 4},
    "max_steps": 40,
    "learning_rate": 0.1,
    "snapshots": 2,
    "ball_samples": 0,
    "worst_starts": 16,
    "interpolation": {"samples": 20},
}


@pytest.fixture(autouse=True)
def _sets(exact: PatchSet, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POLYCOLLIDE_PATCHES", str(root))
    yield
    LIBRARY.close()


@pytest.fixture(scope="module")
def small() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 24), nn.ReLU(), nn.Linear(24, 5)
    )
    return Model(
        name="small",
        classifier=Classifier(Normalize("RGB", mean=(0.5,) * 3, std=(0.2,) * 3), network).eval(),
        preprocessing=Preprocessing("RGB", (SIDE, SIDE), SIDE),
        classes=tuple("abcde"),
        weights="random",
        weights_sha256="0" * 64,
    )


def subject_of(model: Model, **settings: Any) -> tuple[CollisionSpec, Subject]:
    spec = CollisionSpec.model_validate(SETTINGS | settings)
    return spec, Subject.of(model, spec)


def photo(subject: Subject, name: str) -> images.Loaded:
    return images.load(*images.read(f"sample:photos/{name}"), subject.model.preprocessing)


def prepared(model: Model, key: str = "job", **settings: Any) -> tuple[Subject, Job]:
    spec, subject = subject_of(model, **settings)
    pair = photo(subject, "animal_panda"), photo(subject, "fish_fish25")
    return subject, prepare(subject, spec, *pair, key=key, library=LIBRARY)


def test_corners_begin_as_the_sources_nearest_patches_of_other_images(
    small: Model, exact: PatchSet
) -> None:
    _, job = prepared(small)
    assert job.group.patches
    seed = np.round(job.source.pixels.transpose(1, 2, 0) * 255).astype(np.uint8)
    # By equation 5, window after window.
    size, surround = exact.geometry.size, 4
    side = size + 2 * surround
    tent = 1 - np.abs((np.arange(side) + 0.5) * 2 / side - 1)
    total, mixed = np.zeros((SIDE, SIDE, 1)), np.zeros((SIDE, SIDE, 3))
    own = exact.numbers[job.source.sha256]
    with Neighbours(exact) as neighbours:
        for y in range(0, SIDE - size + 1, 8):
            for x in range(0, SIDE - size + 1, 8):
                window = seed[None, y : y + size, x : x + size]
                found, _ = neighbours.nearest(window, k=1, exclude=[job.source.sha256])
                assert found[0, 0, 0] != own
                source = exact.read(found[0], surround)[0] / 255
                for i in range(side):
                    for j in range(side):
                        row, column = y + i - surround, x + j - surround
                        if 0 <= row < SIDE and 0 <= column < SIDE:
                            weight = tent[i] * tent[j]
                            total[row, column] += weight
                            mixed[row, column] += weight * source[i, j]
    expected = (mixed / total).transpose(2, 0, 1)
    for corner in job.group.corners:
        np.testing.assert_allclose(corner.numpy(), expected, atol=1e-5)


def test_the_sources_own_patches_give_the_source_where_they_may_be_taken(
    small: Model, exact: PatchSet
) -> None:
    laid = {"set": "exact", "stride": 8, "surround": 0, "source": True}
    spec, subject = subject_of(small, patches=laid)
    source = images.Loaded(
        (exact.pixels[0, :SIDE, :SIDE].transpose(2, 0, 1) / 255).astype(np.float32),
        *((), "of none", bytes(64)),
    )
    job = prepare(subject, spec, source, photo(subject, "fish_fish25"), key="job", library=LIBRARY)
    np.testing.assert_allclose(job.group.corners[0].numpy(), source.pixels, atol=1e-6)


def test_no_patch_is_the_sources_own_though_its_picture_was_saved_anew(
    small: Model, exact: PatchSet
) -> None:
    spec, subject = subject_of(small)
    name = "photos/animal_panda"
    original = Image.open(io.BytesIO(images.read(f"sample:{name}")[1]))
    own = next(i for i, of in enumerate(exact.manifest.images) if "panda" in of.name)
    half = original.resize((original.width // 2, original.height // 2), Image.Resampling.LANCZOS)
    for picture, form in ((original, "PNG"), (original, "JPEG"), (half, "WEBP")):
        picture.save(file := io.BytesIO(), form)
        saved = images.load("saved", file.getvalue(), subject.model.preprocessing)
        windows = Windows.of_job(spec, window=exact.geometry.size, image=saved.pixels.shape)
        addresses = nearest_patches(LIBRARY.neighbours("exact"), windows, spec, saved)
        assert exact.like(saved) == [exact.manifest.images[own].sha256]
        assert own not in addresses[:, 0]


def test_one_image_that_supplies_most_windows_is_told(small: Model, exact: PatchSet) -> None:
    spec, subject = subject_of(small)
    source = photo(subject, "animal_panda")
    # The same picture, but not by its thumbnail: as if it had been cropped.
    cropped = replace(source, sha256="of none", thumbnail=bytes(64))
    pair = cropped, photo(subject, "fish_fish25")
    _, outcome = run_alone(subject, spec, *pair)
    assert any("one image, 'animal_panda.jpg'" in warning for warning in outcome.result.warnings)
    assert not any(
        "one image" in warning
        for warning in run_alone(subject, spec, source, pair[1])[1].result.warnings
    )


def test_a_step_is_that_of_a_loss_written_out_in_float64(small: Model) -> None:
    settings = {"optimizer": "gd", "learning_rate": 0.5, "max_steps": 10}
    subject, job = prepared(small, **settings, beta=0.2, alpha=0.7, negative="absolute")
    group = job.group
    assert group.patches
    # All windows at full size: [W, H, W'] is small here, and autograd does the rest.
    windows = group.patches.windows
    sources = group.patches.sources.double()
    layer = small.classifier.network[1]
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    parameters = group.patches.start(3).double()
    side = windows.source_size
    for _ in range(10):
        leaf = parameters.clone().requires_grad_()
        wide, of = [], []
        for window, (y, x) in enumerate(windows.positions - windows.surround):
            pad = (x, SIDE - x - side, y, SIDE - y - side)  # negative ones cut off
            wide.append(functional.pad(leaf[:, window], pad, value=-torch.inf))
            of.append(functional.pad(sources[window], pad))
        softmax = torch.stack(wide, 1).softmax(1)
        image = torch.einsum("kwyx,wcyx->kcyx", softmax, torch.stack(of))
        pre = ((image - 0.5) / 0.2).flatten(1) @ weight.T + bias
        goal = job.goal.pre.double()
        loss = 0.7 * ((pre - goal)[:, goal >= 0] ** 2).sum()
        for row, (unit,) in enumerate(job.units or []):
            others = [u for u in range(24) if goal[u] < 0 and u != unit]
            loss = loss + 0.2 * (pre[row, unit] + pre[row, others].abs().sum())
        (gradient,) = torch.autograd.grad(loss, leaf)
        parameters = parameters - 0.5 * gradient
    engine = subject.engine(job.spec)
    engine.admit(group)
    engine.advance()
    found = engine.state_of("job")["parameters"].double()
    inert = group.patches.weights(group.patches.start(3)) == 0
    moved = (parameters - group.patches.start(3)).masked_fill(inert, 0).abs().max()
    assert moved > 1e-3
    assert (found - parameters).masked_fill(inert, 0).abs().max() < 1e-3 * moved


def test_gamma_holds_the_total_variation_down(small: Model) -> None:
    varied = []
    for gamma in (0.0, 0.1):
        subject, job = prepared(small, gamma=gamma, optimizer="gd", learning_rate=0.5)
        engine = subject.engine(job.spec)
        engine.admit(job.group)
        engine.advance()
        assert job.group.patches
        moved = engine.state_of("job")["parameters"]
        varied.append(job.group.patches.total_variation(moved))
    assert (varied[1] < 0.9 * varied[0]).all()


def test_a_relative_gamma_is_weighed_by_the_energy_and_the_starts_variation(small: Model) -> None:
    _, job = prepared(small, gamma={"relative": 0.5}, alpha=3.0)
    patches = job.group.patches
    assert patches
    weights = patches.weights(patches.start(1))[0].double().numpy()
    varied = 0.0
    for (rows, columns), own in zip(
        [inside[1:] for inside, _ in patches.places], weights, strict=True
    ):
        here = own[rows, columns]
        varied += np.abs(np.diff(here, axis=0)).sum() + np.abs(np.diff(here, axis=1)).sum()
    energy = float((job.goal.pre.clamp(min=0).double() ** 2).sum())
    assert job.group.gamma == pytest.approx(0.5 * 3.0 * energy / varied, rel=1e-4)


@pytest.mark.parametrize("objective", ["corners", "hull"])
def test_company_and_a_break_leave_a_job_of_patches_as_it_is(small: Model, objective: str) -> None:
    subject, alone = prepared(small, objective=objective)
    engine = subject.engine(alone.spec)
    engine.admit(alone.group)
    while not engine.advance():
        pass
    _, first = prepared(small, objective=objective)
    _, other = prepared(small, key="other", objective="hull", seed=3, gamma=0.1)
    engine = subject.engine(first.spec)
    engine.admit(first.group)
    engine.admit(other.group)
    engine.advance()
    state = engine.withdraw("job")
    _, again = prepared(small, objective=objective)
    fresh = Engine(subject.working_tap, again.spec.optimizer)
    fresh.admit(again.group, state)
    while not fresh.advance():
        pass
    torch.testing.assert_close(again.group.corners, alone.group.corners, rtol=0, atol=1e-4)
    assert again.group.steps.tolist() == alone.group.steps.tolist()


def test_a_job_comes_nearer_to_its_target_and_tells_its_set(small: Model, exact: PatchSet) -> None:
    spec, subject = subject_of(small, max_steps=100, objective="hull")
    pair = photo(subject, "animal_panda"), photo(subject, "fish_fish25")
    start = prepare(subject, spec, *pair, key="start", library=LIBRARY).group.corners
    before = (subject.tap(start)[0] - subject.tap(torch.from_numpy(pair[1].pixels)[None])[0]).norm()
    job, outcome = run_alone(subject, spec, *pair)
    after = [corner.l_pos**0.5 for corner in outcome.result.corners]
    assert max(after) < 0.5 * float(before)
    assert outcome.result.provenance.patch_set_sha256 == exact.sha256
    assert outcome.corners.min() >= 0
    assert outcome.corners.max() <= 1
    assert job.patch_set_sha256 == exact.sha256


def test_what_patches_need_is_said(small: Model) -> None:
    spec, subject = subject_of(small, patches={"set": "exakt"})
    pair = photo(subject, "animal_panda"), photo(subject, "fish_fish25")
    with pytest.raises(UnknownName, match="did you mean 'exact'"):
        prepare(subject, spec, *pair, key="job", library=LIBRARY)
    spec, subject = subject_of(small, patches={"set": "exact", "stride": 17})
    with pytest.raises(InvalidSpec, match="stride of 1 to 16"):
        prepare(subject, spec, *pair, key="job", library=LIBRARY)
    spec, subject = subject_of(small, patches={"set": "exact", "stride": 1, "surround": 1024})
    with pytest.raises(InvalidSpec, match="smaller surroundings"):
        prepare(subject, spec, *pair, key="job", library=LIBRARY)
    grey = CollisionSpec.model_validate(SETTINGS | {"model": "mnist-mlp", "layer": "fc1"})
    digits = Subject.of(models.load("mnist-mlp"), grey)
    two = (
        images.load(*images.read(f"sample:mnist/{name}"), digits.model.preprocessing)
        for name in ("3-0", "7-0")
    )
    with pytest.raises(InvalidSpec, match="grey"):
        prepare(digits, grey, *two, key="job", library=LIBRARY)


def test_patches_of_others_may_collide_with_the_source_itself(small: Model) -> None:
    spec, subject = subject_of(small, max_steps=100)
    panda = photo(subject, "animal_panda")
    job, outcome = run_alone(subject, spec, panda, panda)
    assert outcome.result.source.label == outcome.result.target.label
    start = Patches.images(job.group.patches, job.group.patches.start(1))
    goal = job.goal.pre
    before = float((subject.tap(start)[0] - goal).clamp(min=0).norm())
    assert all(corner.l_pos**0.5 < 0.5 * before for corner in outcome.result.corners)
    pixels = CollisionSpec.model_validate(
        {k: v for k, v in SETTINGS.items() if k not in ("parametrization", "patches")}
    )
    with pytest.raises(InvalidSpec, match="same image"):
        prepare(subject, pixels, panda, panda, key="job")


def test_the_search_for_patches_tells_that_it_goes_on(small: Model) -> None:
    spec, subject = subject_of(small)
    told: list[None] = []
    pair = photo(subject, "animal_panda"), photo(subject, "fish_fish25")
    prepare(subject, spec, *pair, key="job", library=LIBRARY, on_part=lambda: told.append(None))
    assert told
