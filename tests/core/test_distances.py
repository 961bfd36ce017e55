"""Distances beyond L2: against formulas computed another way, and lpips' own number."""

import hashlib
import io
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from scipy import fft
from torch import Tensor

from core import distances, images
from core.distances import beyond_l2, low_pass_share, perceptual_distance, ssim
from core.errors import ModelUnavailable
from core.interpolate import measure_polytope, pairwise_distance
from core.result import Polytope


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def photographs(side: int) -> Tensor:
    """[6, 3, side, side]"""
    how = images.Preprocessing("RGB", (side, side), side)
    names = [name for name in images.sample_names() if name.startswith("photos/")]
    loaded = [images.load(*images.read(f"sample:{name}"), how) for name in names]
    return torch.from_numpy(np.stack([image.pixels for image in loaded]))


# SSIM


def ssim_by_the_book(a: Tensor, b: Tensor) -> float:
    """Equation 13 of Wang et al. (2004) at each place, of grey images [H, W] in [0, 1]."""
    x, y = a.double().numpy(), b.double().numpy()
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            p, q = (v[i - 5 : i + 6, j - 5 : j + 6] for v in (x, y))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(3, 1, 11, 16), (4, 3, 23, 12), (2, 1, 28, 28)])
def test_ssim_is_the_published_formula(shape: tuple[int, ...]) -> None:
    pixels = random(*shape)
    pixels[1] = 0.9 * pixels[0] + 0.05  # alike, and so far from 0
    found = ssim(pixels)
    assert found is not None
    for i, a in enumerate(pixels):
        for j, b in enumerate(pixels):
            expected = np.mean([ssim_by_the_book(p, q) for p, q in zip(a, b, strict=True)])
            assert found[i, j] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found[0, 1] > 0.9
    assert found[0, -1] < 0.2 or len(pixels) == 2


def test_ssim_is_the_same_however_many_pairs_are_taken_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels, chunks = random(7, 1, 14, 14), []
    whole = ssim(pixels)
    monkeypatch.setattr(distances, "SSIM_CHUNK", 5 * 14 * 14 + 1)
    assert np.array_equal(ssim(pixels, lambda: chunks.append(1)), whole)
    assert len(chunks) == math.ceil(21 / 5)


def test_where_no_window_fits_or_pairs_are_too_many_there_is_no_ssim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ssim(random(3, 1, 10, 40)) is None
    assert ssim(random(3, 1, 40, 10)) is None
    monkeypatch.setattr(distances, "SSIM_MOST", 3 * 20 * 20)
    assert ssim(random(3, 1, 20, 20)) is not None
    assert ssim(random(4, 1, 20, 20)) is None


# The low-pass share


def test_the_low_pass_share_is_that_of_a_gaussian_on_mirrored_images() -> None:
    """Mirrored at half a pixel past its border, an image is a sum of cosines (DCT-II), each of
    which a symmetric kernel multiplies by its own response."""
    pixels = random(4, 2, 40, 23)
    offsets = np.arange(-16, 17)
    kernel = np.exp(-(offsets**2) / (2 * 4.0**2))
    kernel /= kernel.sum()
    down, across = (
        (kernel * np.cos(np.pi * np.arange(n)[:, None] / n * offsets)).sum(1) for n in (40, 23)
    )
    found = low_pass_share(pixels)
    for i in range(4):
        for j in range(i):
            difference = (pixels[i].double() - pixels[j].double()).numpy()
            waves = fft.dctn(difference, axes=(1, 2), norm="ortho")
            left = np.linalg.norm(waves * down[:, None] * across)
            assert found[i, j] == pytest.approx(left / np.linalg.norm(difference), rel=1e-9)
            assert found[j, i] == found[i, j]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 40), (1, 5, 3)])
def test_of_a_constant_all_passes_and_of_a_checkerboard_nearly_nothing(
    shape: tuple[int, int, int],
) -> None:
    first = random(*shape)
    rows, columns = torch.arange(shape[1])[:, None], torch.arange(shape[2])
    board = (1 - 2.0 * ((rows + columns) % 2)).expand(shape)
    found = low_pass_share(torch.stack([first, first + 0.25, first + 0.25 * board, first]))
    assert found[0, 1] == pytest.approx(1, rel=1e-6)
    assert found[0, 2] < (0.01 if min(shape[1:]) >= 28 else 0.3)
    assert np.isnan(found[0, 3]) and np.isnan(np.diag(found)).all()
    assert np.nanmax(found) <= 1 + 1e-6


# LPIPS


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where torch looks for weights: an empty folder; and nothing may be downloaded."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("no job downloads AlexNet for its distances")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    distances._lpips.cache_clear()
    yield tmp_path / "checkpoints"
    distances._lpips.cache_clear()


def test_lpips_is_the_librarys_own_number(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(3)
    alexnet = zoo.alexnet(weights=None)
    buffer = io.BytesIO()
    torch.save(alexnet.state_dict(), buffer)
    prefix = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    url = f"https://download.pytorch.org/models/alexnet-{prefix}.pth"
    monkeypatch.setattr(zoo.AlexNet_Weights.DEFAULT.value, "url", url)
    no_cache.mkdir()
    (no_cache / f"alexnet-{prefix}.pth").write_bytes(buffer.getvalue())

    # Theirs asks torchvision for a trained AlexNet, and gets this one.
    monkeypatch.setattr(lpips.pretrained_networks.tv, "alexnet", lambda pretrained: alexnet)
    theirs = lpips.LPIPS(net="alex", verbose=False)
    colour = photographs(96)[:4]
    for pixels in (colour, colour[:, :1], colour[:2, :, :31, :31], colour[:1]):
        found = perceptual_distance(pixels)
        k = len(pixels)
        with torch.no_grad():
            expected = [
                theirs(*(image.expand(1, 3, -1, -1) for image in pair), normalize=True).item()
                for pair in ((pixels[i], pixels[j]) for i in range(k) for j in range(k))
            ]
        assert found.ravel() == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert found.max() > 0.001 or k == 1
    told = beyond_l2(colour)
    np.testing.assert_allclose(told["perceptual"], perceptual_distance(colour), atol=1e-6)
    assert told["perceptual_missing"] is None


def test_without_the_weights_or_the_library_a_sentence_says_what_to_do(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = random(2, 3, 31, 31)
    with pytest.raises(ModelUnavailable, match="LPIPS takes images of 31 pixels a side and more"):
        perceptual_distance(large[..., 1:])
    pytest.importorskip("lpips")
    with pytest.raises(ModelUnavailable, match="`polycollide layers --model alexnet` puts them"):
        perceptual_distance(large)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ModelUnavailable, match=r"pip install '\.\[perceptual\]'"):
        perceptual_distance(large)
    told = beyond_l2(large)
    assert (told["perceptual"], told["mean_perceptual"]) == (None, None)
    assert "pip install" in told["perceptual_missing"]


# Together


def polytope(corners: Tensor) -> Polytope:
    """As a result has it, read from its JSON."""
    measured = measure_polytope(corners, (1.0, ""))
    told = measured.model_copy(update=beyond_l2(corners))
    return Polytope.model_validate_json(told.model_dump_json())


def test_a_polytope_tells_of_each_pair_and_of_their_mean(no_cache: Path) -> None:
    corners = random(4, 1, 28, 28)
    corners[3] = corners[0]
    found = polytope(corners)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    assert found.ssim is not None and found.low_pass_share is not None
    assert np.array_equal(found.ssim, np.transpose(found.ssim))
    assert np.array_equal(np.diag(found.ssim), np.ones(4))
    assert found.ssim[0][3] == pytest.approx(1, rel=1e-12, abs=1e-6)
    assert found.mean_ssim == pytest.approx(np.mean([found.ssim[i][j] for i, j in pairs]), abs=1e-6)
    shares = [found.low_pass_share[i][j] for i, j in pairs]
    assert shares.count(None) == 1 and found.low_pass_share[3][0] is None
    known = [share for share in shares if share is not None]
    assert found.mean_low_pass_share == pytest.approx(np.mean(known), abs=1e-6)


def test_one_corner_or_corners_all_alike_have_no_means(no_cache: Path) -> None:
    one = polytope(random(1, 1, 28, 28))
    assert (one.ssim, one.low_pass_share) == ([[1.0]], [[None]])
    assert (one.mean_ssim, one.mean_low_pass_share, one.mean_perceptual) == (None, None, None)
    alike = polytope(random(1, 3, 28, 28).expand(3, -1, -1, -1))
    assert alike.mean_ssim == pytest.approx(1)
    assert alike.mean_low_pass_share is None


def test_noise_and_another_motif_as_far_away_are_told_apart(no_cache: Path) -> None:
    panda, other = photographs(128)[[0, 1]]
    noise = torch.randn(panda.shape, generator=torch.Generator().manual_seed(1))
    step = 0.2 * (other - panda)
    noise *= step.norm() / noise.norm()
    corners = torch.stack([panda, panda + step, panda + noise])
    found, apart = polytope(corners), pairwise_distance(corners)
    assert apart[0, 1] == pytest.approx(apart[0, 2], rel=1e-5)
    assert found.low_pass_share is not None
    coarse, fine = found.low_pass_share[0][1:]
    assert coarse is not None and coarse > 0.5
    # Of white noise the norm of the kernel is left, but for the borders.
    assert fine == pytest.approx(1 / (2 * 4 * math.pi**0.5), abs=0.01)


def test_a_result_of_an_earlier_version_has_none_of_these() -> None:
    old = measure_polytope(random(2, 1, 4, 4), (1.0, "")).model_dump(exclude_none=True)
    assert set(old) == {
        *("mean_pairwise_distance", "pairwise_distance", "spread"),
        *("natural_distance", "natural_distance_of"),
    }
    assert Polytope.model_validate(old).ssim is None


def test_photographs_take_seconds_at_most(no_cache: Path) -> None:
    corners = random(5, 3, 224, 224)
    beyond_l2(corners[:2])
    began = time.process_time()
    beyond_l2(corners)
    assert time.process_time() - began < 5  # 0.3 s on a free core
