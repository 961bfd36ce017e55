"""The paper's experiments on photographs, on a small colour network of the operator's own."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from core import figures, job, models
from core.errors import ModelUnavailable
from core.figures import Strip
from core.models import ASSETS
from core.patches import neighbours, sets
from core.patches.sets import Geometry
from core.spec import CollisionSpec
from polycollide import photographs, results
from polycollide.cli import app
from polycollide.photographs import EXPERIMENTS

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4800, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)
    )
"""
MODEL = ("--model", "small", "--layer", "1")
SETTINGS = ("max_steps=20", "interpolation.samples=40", "ball_samples=30", "worst_starts=0")
SETTINGS += ("certify=null", "figures=false", "patches.set=six", "corners=3")
PHOTOS = [f"sample:photos/{file.stem}" for file in sorted((ASSETS / "photos").glob("*.jpg"))]
# What the network takes them for.
CLASSES = ["dingo", "bear", "eel", "eel", "dingo", "dingo"]
KOALA, PANDA, MACAW, CHICKEN, DOG, FISH = PHOTOS
BEAR = 1
PAIR = ("--source", KOALA, "--target", PANDA)
EXACT = ("--set", "preset=null", "--set", "solver=exact")


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a models.toml, and patch sets."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "small_net.py").write_text(NETWORK)
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    torch.manual_seed(4)
    save_file(names["build"]().state_dict(), folder / "small.safetensors")
    sha256 = hashlib.sha256((folder / "small.safetensors").read_bytes()).hexdigest()
    (folder / "models.toml").write_text(
        f"""[[models]]
        name = "small"
        factory = "small_net:build"
        weights = "small.safetensors"
        sha256 = "{sha256}"
        classes = ["ape", "bear", "crane", "dingo", "eel"]
        [models.preprocessing]
        crop = 40
        mean = [0.5]
        std = [0.2]
        """
    )
    geometry = Geometry(size=16, stride=8, resize=64)
    sets.build(ASSETS / "photos", "six", geometry, neighbours.indexer(), root=folder / "sets")
    return folder


@pytest.fixture(autouse=True)
def _registered(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCOLLIDE_MODELS", str(own / "models.toml"))
    monkeypatch.setenv("POLYCOLLIDE_PATCHES", str(own / "sets"))


def call(*arguments: str) -> Result:
    """Calls `polycollide reproduce` in a terminal 80 columns wide."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["reproduce", *arguments])


def told(*settings: str) -> tuple[str, ...]:
    """Settings as they are typed, `settings` last."""
    return tuple(part for one in (*SETTINGS, *settings) for part in ("--set", one))


def small(experiment: str, *arguments: str, settings: Sequence[str] = ()) -> Result:
    """An experiment that ends well on the small network."""
    result = call(experiment, *MODEL, *told(*settings), *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: str) -> str:
    """The one sentence of a command that fails."""
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def rows(result: Result) -> dict[str, list[str]]:
    """A table's lines by their names: the cells behind, which two spaces part."""
    lines = (re.split(r"  +", line.strip()) for line in result.stdout.splitlines())
    return {cells[0]: cells[1:] for cells in lines}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Strip], list[str]]]:
    """The rows and captions of the pictures, as they are drawn."""
    pictures: list[tuple[list[Strip], list[str]]] = []
    draw = figures.draw_strips

    def keep(strips: list[Strip], caption: list[str]) -> bytes:
        pictures.append((strips, caption))
        return draw(strips, caption)

    monkeypatch.setattr(figures, "draw_strips", keep)
    return pictures


def probability_of(label: int, image: np.ndarray) -> float:
    network = models.load("small").classifier
    return float(network(torch.from_numpy(image).float()[None]).softmax(1)[0, label])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_prints_its_table_and_draws_its_pictures(experiment, tmp_path):
    result = small(experiment, "--pairs", "2", "--out", str(tmp_path))
    title, *lines = result.stdout.splitlines()
    number = re.sub("[a-z]+", "", experiment)
    kind = "Table" if experiment.startswith("table") else "Figure"
    assert title.startswith(f"{kind} {number}: ")
    patches = experiment in ("table3", "table5", "fig7", "fig8", "fig10")
    assert ("by patches" in title) == patches and ("by pixels" in title) != patches
    assert "on small at 1, with our settings (preset" in title
    assert "max_steps=20" in title and "patches.set" not in title
    assert title.endswith("not the paper's VGG-16 at FC-6")
    assert lines[1].split() == ["paper", "1", "2", "all", "2"]
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("Distances"))]
    assert max(map(len, table)) <= 80
    assert "of 2" in rows(result)["pairs converged"][-1]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert re.fullmatch(f"{'patches' if patches else 'pixels'}-3-[0-9a-f]{{8}}", folder.name)
    for pair in folder.iterdir():
        kept = {path.name for path in pair.iterdir()}
        assert kept >= {"result.json", "corners.npz", "corner-2.png", "samples.npz"}
    pictures = {path.name for path in tmp_path.iterdir() if path.is_file()}
    if kind == "Table":
        assert pictures == set()
    else:
        assert pictures == {f"{experiment}.png"} | ({"fig8b.png"} & {f"{experiment}b.png"})
        for name in pictures:
            with Image.open(tmp_path / name) as picture:
                assert min(picture.size) > 100


def test_a_pair_is_done_as_run_does_it(tmp_path):
    small("table3", *PAIR, "--out", str(tmp_path / "a"))
    (pair,) = (tmp_path / "a").glob("patches-3-*/*")
    assert pair.name == "animal_koala-animal_panda"
    alone = ["run", *MODEL, *PAIR, "--preset", "patches", *told(), "--out", str(tmp_path / "b")]
    assert CliRunner().invoke(app, alone).exit_code == 0
    assert {path.name for path in pair.iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}
    for name in ("corners.npz", "samples.npz", "corner-0.png"):
        assert (pair / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_distances_in_a_table_are_on_the_papers_scale(tmp_path):
    result = small("table2", *PAIR, "--out", str(tmp_path))
    with np.load(next(tmp_path.rglob("corners.npz"))) as arrays:
        corners = arrays["corners"].astype(np.float64) * 255
    apart = [np.linalg.norm(a - b) for a, b in combinations(corners, 2)]
    assert rows(result)["distance apart"] == ["4907 to 9588", f"{np.mean(apart):.0f}"]
    assert rows(result)["natural images"][0] == "37538"
    assert "0-255" in result.stdout
    assert "1: animal_koala (dingo) to animal_panda (bear)." in result.stdout


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_papers_figures_stand_beside_corners_by_pixels_alone(experiment, tmp_path):
    presets = {"patches": "patches", "pixels": "hull"}
    if experiment == "fig8":
        del presets["pixels"]  # which collide no image with itself
    for kind, preset in presets.items():
        settings = [f"preset={preset}", "max_steps=1"]
        result = small(experiment, "--pairs", "1", "--out", str(tmp_path), settings=settings)
        assert f"corners by {kind}" in result.stdout.splitlines()[0]
        by_pixels, cells = kind == "pixels", rows(result)
        if experiment in ("table4", "table5"):
            names = ("colliding in it", "in the polytope")
        else:
            names = ("distance apart", "spread")
            assert cells["natural images"][0] == "37538"
        assert [len(cells[name]) for name in names] == [1 + by_pixels] * 2


def test_tables_by_pixels_and_by_patches_have_the_same_rows(tmp_path):
    by_pixels, by_patches = (
        small(experiment, *PAIR, "--out", str(tmp_path)) for experiment in ("table2", "table3")
    )
    (told,) = (json.loads(file.read_text()) for file in tmp_path.glob("pixels-*/*/result.json"))
    cells = rows(by_pixels)
    assert cells["SSIM"] == [f"{told['polytope']['mean_ssim']:.2f}"]
    assert cells["low-pass share"] == [f"{told['polytope']['mean_low_pass_share']:.2f}"]
    names = [[name for name in rows(each) if "─" not in name] for each in (by_pixels, by_patches)]
    assert names[0][1:] == names[1][1:]


def test_the_ball_stands_beside_the_papers_and_the_polytope(tmp_path):
    cells = rows(small("table4", *PAIR, "--out", str(tmp_path)))
    told = json.loads(next(tmp_path.rglob("result.json")).read_text())
    ball = told["ball"]
    assert ball["samples"] == 30
    assert cells["colliding in it"] == ["0.0 to 24.8 %", f"{100 * ball['accuracy']:.1f} %"]
    inside = told["interpolation"]["accuracy"]
    assert cells["in the polytope"] == ["100 %", f"{100 * inside:.1f} %"]
    assert cells["radius of the ball"] == [f"{255 * ball['radius']:.0f}"]


def test_a_title_names_the_weights_that_were_asked_for():
    given = ("--weights", "small.safetensors")
    title = small("table2", "--pairs", "1", *given, settings=["max_steps=1"]).stdout.splitlines()[0]
    assert "our settings (preset hull) but weights=small.safetensors, max_steps=20, " in title


def test_more_pairs_than_columns_are_told_by_their_means_alone():
    result = small("table2", "--pairs", "6", settings=["max_steps=1"])
    assert result.stdout.splitlines()[2].split() == ["paper", "all", "6"]
    assert "\n1: " not in result.stdout
    assert re.fullmatch(r"\d+±\d+", rows(result)["distance apart"][-1])


def test_pairs_there_are_not_run_again_unless_something_decides_otherwise(tmp_path, monkeypatch):
    ran = []
    run_alone = photographs.run_alone

    def counted(*arguments: Any) -> Any:
        ran.append(arguments)
        return run_alone(*arguments)

    monkeypatch.setattr(photographs, "run_alone", counted)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("koala", "panda"):
        shutil.copy(ASSETS / "photos" / f"animal_{name}.jpg", photos / f"{name}.jpg")
    out = ("--out", str(tmp_path / "out"))
    pair = ("--source", str(photos / "koala.jpg"), "--target", str(photos / "panda.jpg"))
    first = small("fig3", *pair, *out)
    again = small("table2", *pair, *out)  # of the same jobs
    assert len(ran) == 1
    assert rows(again)["distance apart"] == rows(first)["distance apart"]
    small("table3", *pair, *out)  # others, which leave the first where they are
    assert len(ran) == 2
    small("fig9", *pair, *out)
    assert len(ran) == 2
    small("fig9", *pair, *out, settings=["seed=1"])
    assert len(ran) == 3
    small("fig9", *pair, *out, settings=["seed=1"])
    small("table2", *pair, *out)  # which other settings have left where they were
    assert len(ran) == 3
    shutil.copy(ASSETS / "photos" / "farm_dog.jpg", photos / "koala.jpg")
    small("fig9", *pair, *out, settings=["seed=1"])
    assert len(ran) == 4
    for told in (tmp_path / "out").glob("pixels-3-*/koala-panda/result.json"):
        told.unlink()  # as a kill leaves it
    small("fig9", *pair, *out, settings=["seed=1"])
    assert len(ran) == 5


def test_a_folder_that_has_a_result_is_whole_while_another_takes_its_place(tmp_path, monkeypatch):
    earlier = ("corner-0.png", "corner-1.png", "corners.npz", "figure.png", "result.json")
    results.write(tmp_path, dict.fromkeys(earlier, b"earlier"))
    unlink, replace, changed = Path.unlink, Path.replace, []

    def gone(path: Path, missing_ok: bool = False) -> None:
        changed.append((path.name, "gone"))
        unlink(path, missing_ok)

    def placed(path: Path, target: Path) -> Path:
        changed.append((target.name, "there"))
        return replace(path, target)

    monkeypatch.setattr(Path, "unlink", gone)
    monkeypatch.setattr(Path, "replace", placed)
    results.write(tmp_path, dict.fromkeys(("corner-0.png", "corners.npz", "result.json"), b"new"))
    assert changed[0] == ("result.json", "gone")
    assert sorted(changed[1:5]) == [(name, "gone") for name in earlier[:4]]
    assert changed[5] == (results.LIST, "there")
    assert changed[-1] == ("result.json", "there")
    assert {file.read_bytes() for file in tmp_path.glob("[!.]*")} == {b"new"}


def test_a_patch_set_built_anew_is_searched_anew(tmp_path, own, monkeypatch):
    root = tmp_path / "sets"
    shutil.copytree(own / "sets", root)
    monkeypatch.setenv("POLYCOLLIDE_PATCHES", str(root))
    out = ("--out", str(tmp_path / "out"))
    small("table3", *PAIR, *out)
    told = next((tmp_path / "out").rglob("result.json"))
    before = json.loads(told.read_text())["provenance"]["patch_set_sha256"]
    sets.delete("six", root)
    geometry = Geometry(size=16, stride=16, resize=64)
    patches = sets.build(ASSETS / "photos", "six", geometry, neighbours.indexer(), root=root)
    small("table3", *PAIR, *out)
    after = json.loads(told.read_text())["provenance"]["patch_set_sha256"]
    assert (before != after) and after == patches.sha256


def test_ctrl_c_keeps_the_pairs_that_are_done(tmp_path, monkeypatch):
    run_alone, ran = photographs.run_alone, []

    def interrupted(*arguments: Any) -> Any:
        if ran:
            raise KeyboardInterrupt
        ran.append(arguments)
        return run_alone(*arguments)

    monkeypatch.setattr(photographs, "run_alone", interrupted)
    result = call("table2", *MODEL, *told(), "--pairs", "2", "--out", str(tmp_path))
    assert result.exit_code == 130
    assert "the same command goes on with the pairs that are left" in result.stderr
    assert len(list(tmp_path.rglob("result.json"))) == 1


def test_drawn_pairs_are_of_two_classes_and_more_of_them_begin_with_the_same():
    few, many = (
        json.loads(small("table2", "--pairs", str(n), "--json", settings=["max_steps=1"]).stdout)
        for n in (2, 8)
    )
    assert list(many)[:2] == list(few) and len(many) == 8
    for result in many.values():
        assert result["source"]["class"] != result["target"]["class"]
    named = dict(zip([photo.rpartition("/")[2] for photo in PHOTOS], CLASSES, strict=True))
    for name, result in many.items():
        source, target = name.split("-")
        assert named[source] == result["source"]["class"]
        assert named[target] == result["target"]["class"]


def test_all_pairs_of_a_folder_are_drawn_once_and_what_is_no_image_is_left_out(tmp_path):
    (tmp_path / "within").mkdir()
    for name in ("animal_panda", "within/animal_koala", "farm_dog"):
        photo = ASSETS / "photos" / f"{Path(name).name}.jpg"
        shutil.copy(photo, tmp_path / f"{name}.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    arguments = ("--images", str(tmp_path), "--pairs", "100", "--json")
    result = small("table2", *arguments, settings=["max_steps=1"])
    found = json.loads(result.stdout)
    pairs = {("animal_panda", "animal_koala"), ("animal_panda", "farm_dog")}
    assert set(found) == {f"{a}-{b}" for a, b in pairs} | {f"{b}-{a}" for a, b in pairs}
    assert "These images make 4 pairs, not 100." in result.stderr


@pytest.fixture
def classified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that the network is asked about for the sake of pairs."""
    label, asked = photographs._label, list[str]()

    def counted(subject: job.Subject, reference: str) -> int:
        asked.append(reference)
        return label(subject, reference)

    monkeypatch.setattr(photographs, "_label", counted)
    return asked


def test_images_are_classified_once_and_as_far_as_it_takes(classified):
    small("table2", "--pairs", "1", settings=["max_steps=1"])
    assert 2 <= len(classified) < len(PHOTOS)
    few = classified.copy()
    classified.clear()
    small("table2", "--pairs", "22", settings=["max_steps=1"])  # all there are
    assert classified[: len(few)] == few
    assert sorted(classified) == PHOTOS


def test_many_images_of_one_class_are_each_classified_once(tmp_path, monkeypatch):
    for i in range(2000):
        (tmp_path / f"{i}.jpg").touch()
    asked = []
    monkeypatch.setattr(photographs, "_label", lambda _, reference: asked.append(reference) or 0)
    sentence = refused("table2", *MODEL, *told(), "--images", str(tmp_path))
    assert "No two of these images are of different classes" in sentence
    assert len(asked) == len(set(asked)) == 2000


def test_results_are_no_images_to_draw(tmp_path):
    for name in ("animal_koala", "animal_panda"):
        shutil.copy(ASSETS / "photos" / f"{name}.jpg", tmp_path)
    arguments = ("--images", str(tmp_path), "--pairs", "9")
    for out in (tmp_path / "in" / "side", tmp_path.parent):
        for _ in range(2):
            small("fig3", *arguments, "--out", str(out), settings=["max_steps=1"])
        drawn = {path.name for path in out.glob("pixels-3-*/*")}
        assert drawn == {"animal_koala-animal_panda", "animal_panda-animal_koala"}
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
    sentence = refused(
        "fig3", *MODEL, *told(), *arguments, "--out", f"{tmp_path}/../{tmp_path.name}"
    )
    assert "--out is the folder of --images; name another one" in sentence


@pytest.mark.parametrize("experiment", ["table2", "fig8"])
def test_a_folder_without_an_image_is_told_from_one_of_one_class(experiment, tmp_path):
    where = ("--images", str(tmp_path), "--out", str(tmp_path / "out"))
    for _ in range(2):
        sentence = refused(experiment, *MODEL, *told(), *where)
        assert f"There is no image below '{tmp_path}'; give --images" in sentence
        (tmp_path / "notes.txt").write_text("no image")


def test_images_of_one_name_keep_their_own_results(tmp_path):
    for folder, name in (("a", "animal_koala"), ("b", "farm_dog")):
        (tmp_path / folder).mkdir()
        shutil.copy(ASSETS / "photos" / f"{name}.jpg", tmp_path / folder / "same.jpg")
    pairs = [f"--source={tmp_path / folder / 'same.jpg'}" for folder in "ab"]
    pairs += [f"--target={PANDA}", f"--target={PANDA}"]
    found = json.loads(small("table2", *pairs, "--json", settings=["max_steps=1"]).stdout)
    assert list(found) == ["same-animal_panda", "same-animal_panda-2"]
    hashes = [result["provenance"]["source_sha256"] for result in found.values()]
    folders = (tmp_path / folder / "same.jpg" for folder in "ab")
    assert hashes == [hashlib.sha256(file.read_bytes()).hexdigest() for file in folders]


def test_interpolations_are_mixtures_with_the_probability_that_the_network_gives(tmp_path, drawn):
    for experiment in ("fig9", "fig10"):
        small(experiment, *PAIR, "--out", str(tmp_path))
    for (strips, caption), kind in zip(drawn, ("pixels", "patches"), strict=True):
        (strip,) = strips
        assert f"corners by {kind}" in caption[0]
        (file,) = tmp_path.glob(f"{kind}-3-*/animal_koala-animal_panda/corners.npz")
        with np.load(file) as arrays:
            corners = arrays["corners"].astype(np.float64)
        assert len(strip.images) == 6
        for image, (below,) in zip(strip.images, strip.below, strict=True):
            weights, *_ = np.linalg.lstsq(corners.reshape(3, -1).T, image.ravel(), rcond=None)
            assert weights.min() >= -1e-4 and weights.sum() == pytest.approx(1, abs=1e-3)
            share = 100 * probability_of(BEAR, image)
            shown = float(re.sub(r"[^\d.]", "", below))
            assert shown == pytest.approx(share, abs=0.11)


def test_figure_8_collides_images_with_themselves_and_boxes_where_corners_differ(tmp_path, drawn):
    small("fig8", "--pairs", "2", "--out", str(tmp_path))
    (plain, _), (boxed, caption) = drawn
    assert [strip.boxes for strip in plain] == [[], []]
    assert all(strip.boxes for strip in boxed)
    assert "Boxes" in caption[1]
    for strip in plain:
        assert np.array_equal(strip.source, strip.target)
        assert not np.array_equal(strip.images[0], strip.source)


def test_figure_8_takes_pairs_of_one_class_alone(tmp_path):
    one = ("--source", KOALA, "--target", DOG, "--out", str(tmp_path))
    assert "animal_koala (dingo) to farm_dog (dingo)" in small("fig8", *one).stdout
    two = ("--source", KOALA, "--target", DOG, "--source", KOALA, "--target", PANDA)
    sentence = refused("fig8", *MODEL, *told(), *two, "--out", str(tmp_path))
    assert "takes sample:photos/animal_koala for 'dingo' and" in sentence
    assert "animal_panda for 'bear'; give other pairs" in sentence


def test_ten_corners_are_drawn_and_the_way_to_each(tmp_path, drawn):
    call("fig11", *MODEL, *told()[:-2], *PAIR, "--out", str(tmp_path))
    longer = ["max_steps=60", "l_pos_threshold=1e-6"]
    small("fig12", *PAIR, "--out", str(tmp_path), settings=longer)
    ((ten,), _), (way, _) = drawn
    assert len(ten.images) == 10
    assert [strip.below[-1][0] for strip in way] == ["corner 0", "corner 1", "corner 2"]
    (file,) = tmp_path.glob("pixels-3-*/animal_koala-animal_panda/corners.npz")
    for k, strip in enumerate(way):
        with np.load(file) as arrays:
            assert np.array_equal(strip.images[-1], arrays["corners"][k])
        assert strip.above[-1] == "final" and strip.above[0].startswith("step ")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> list[CollisionSpec]:
    """The settings that a network is asked for by; none is here."""
    asked: list[CollisionSpec] = []

    def fail(spec: CollisionSpec, device: torch.device) -> None:
        asked.append(spec)
        raise ModelUnavailable("The weights are not on this machine: put them there.")

    monkeypatch.setattr(job.Subject, "open", fail)
    return asked


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_papers_network_and_settings_are_the_default(experiment, absent, tmp_path):
    sentence = refused(experiment, "--set", "patches.set=six", "--out", str(tmp_path))
    assert "put them there; or take another network, with --model NAME --layer LAYER" in sentence
    (spec,) = absent
    assert (spec.model, spec.layer) == ("vgg16", "classifier.0")
    kind = {"pixels": "pixels", "patches": "patches-text"}[spec.parametrization]
    assert spec.preset == f"paper-vgg16-{kind}"
    assert spec.corners == (10 if experiment == "fig11" else 5)


def test_the_papers_settings_are_for_its_layer_alone_and_a_preset_may_be_chosen(absent):
    patches = ("--set", "patches.set=six")
    assert "NAME" not in refused("table2", "--model", "vgg16")
    refused("table2", "--layer", "features.0")
    refused("table3", "--set", "layer=features.0", *patches)
    refused("table3", "--set", "preset=paper-vgg16-patches-code", *patches)
    assert [(spec.preset, spec.layer) for spec in absent] == [
        ("paper-vgg16-pixels", "classifier.0"),
        ("hull", "features.0"),
        ("patches", "features.0"),
        ("paper-vgg16-patches-code", "classifier.0"),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fig1",), "There is no experiment 'fig1'; did you mean"),
        (("table3",), "`polycollide patches build FOLDER --name NAME`, then --set patches.set="),
        (("table3", "--set", "patches.set=my photos"), "patches.set: String should match"),
        (("table3", "--set", "patches.set=sixt"), "There is no patch set 'sixt'; did you mean"),
        (("fig3", *MODEL), "fig3 is a picture; say where it goes with --out DIR"),
        (("fig9", *MODEL, "--set", "interpolation.samples=0"), "needs interpolation.samples"),
        (("table4", *MODEL, "--set", "ball_samples=0"), "table4 needs ball_samples"),
        (("fig12", *MODEL, "--set", "snapshots=0"), "fig12 needs snapshots"),
        (("fig12", *MODEL, *EXACT), "step by step, and solver exact takes no steps"),
        (("table2", "--model", "small"), "`polycollide layers --model small`"),
        (("table2", "--model", "smal", "--layer", "1"), "did you mean 'small'"),
        (("table2", *MODEL, "--set", "betta=1"), "did you mean 'beta'"),
        (("table2", *MODEL, "--set", "beta"), "--set takes NAME=VALUE, not 'beta'"),
        (("table2", *MODEL, "--images", "/nowhere"), "There is no folder '/nowhere'"),
        (("table2", *MODEL, "--source", KOALA), "Give as many --target as --source"),
        (("table2", *MODEL, *PAIR, "--pairs", "2"), "or have them drawn"),
        (("table2", *MODEL, *PAIR[:3], "no.png"), "'no.png' cannot be read"),
        (("table2", *MODEL, "--beyond"), "Only table1 goes beyond the paper"),
        (("table1", *PAIR), "table1 takes --pairs, --beyond, --json and --device alone"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, sentence):
    assert sentence in refused(*arguments)


def test_images_of_one_class_are_no_pairs(tmp_path):
    for name in ("animal_koala", "farm_dog"):
        shutil.copy(ASSETS / "photos" / f"{name}.jpg", tmp_path)
    sentence = refused("table2", *MODEL, *told(), "--images", str(tmp_path))
    assert "No two of these images are of different classes" in sentence
