import hashlib
import io
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core import images
from core.errors import ModelUnavailable, UnknownName
from core.models import ASSETS, SHIPPED, Classifier, Normalize, listed, load

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MNIST = DATA / "mnist" / "test.npz"
SQUEEZENET = DATA / "squeezenet1_0.safetensors"

needs_mnist = pytest.mark.skipif(not MNIST.is_file(), reason=f"there is no {MNIST}")
needs_squeezenet = pytest.mark.skipif(not SQUEEZENET.is_file(), reason=f"there is no {SQUEEZENET}")

PREPROCESSING = """
[models.preprocessing]
resize = 72
crop = 64
channels = "BGR"
scale = 255
mean = [104, 117, 123]
"""
NO_NETWORK = URLError("Name or service not known")

WriteToml = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_toml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYCOLLIDE_MODELS", raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder of downloads, empty, on a machine without a network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NO_NETWORK

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def write_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteToml:
    """A models.toml with one network named "mine", squeezenet1_1 unless a key says otherwise."""
    torch.manual_seed(0)
    save_file(zoo.squeezenet1_1().state_dict(), tmp_path / "mine.safetensors")

    def write(**changes: str) -> Path:
        digest = hashlib.sha256((tmp_path / "mine.safetensors").read_bytes()).hexdigest()
        keys = {
            "name": '"mine"',
            "factory": '"torchvision:squeezenet1_1"',
            "weights": '"mine.safetensors"',
            "sha256": f'"{digest}"',
            "classes": '"imagenet"',
            **changes,
        }
        preprocessing = keys.pop("preprocessing", PREPROCESSING)
        table = "".join(f"{key} = {value}\n" for key, value in keys.items())
        path = tmp_path / "models.toml"
        path.write_text(f"[[models]]\n{table}{preprocessing}")
        monkeypatch.setenv("POLYCOLLIDE_MODELS", str(path))
        return path

    return write


# Normalisation


def test_normalize_to_bgr_0_255_minus_means_equals_the_plain_formula() -> None:
    pixels = torch.rand(2, 3, 5, 4)
    wanted = torch.stack([pixels[:, c] * 255 - m for c, m in ((2, 104), (1, 117), (0, 123))], 1)
    got = Normalize("BGR", scale=255, mean=(104, 117, 123))(pixels)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-4)


def test_normalize_with_mean_and_std_equals_the_plain_formula_also_in_float64() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    wanted = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    normalize = Normalize("RGB", mean=mean, std=std)
    torch.testing.assert_close(normalize(pixels.float()), wanted.float(), rtol=0, atol=1e-6)
    got = normalize.to(torch.float64)(pixels)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_normalize_takes_one_number_for_all_channels() -> None:
    pixels = torch.rand(1, 3, 2, 2)
    got = Normalize("RGB", scale=255, mean=(127,), std=(128,))(pixels)
    torch.testing.assert_close(got, (pixels * 255 - 127) / 128)


def test_an_identity_normalize_hands_the_images_through() -> None:
    pixels = torch.rand(1, 1, 2, 2)
    assert Normalize("L")(pixels) is pixels
    assert Normalize("L", mean=(0, 0, 0), std=(1.0, 1.0, 1.0))(pixels) is pixels


def test_an_exact_flip_is_all_that_bgr_alone_does() -> None:
    pixels = torch.rand(1, 3, 2, 2)
    assert torch.equal(Normalize("BGR")(pixels), pixels[:, [2, 1, 0]])


def test_gradients_reach_the_pixels_but_not_the_weights() -> None:
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    classifier = Classifier(Normalize("BGR", scale=255), nn.Conv2d(3, 2, 8))
    classifier(pixels).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


# The MNIST networks


def shipped_samples() -> tuple[Tensor, Tensor]:
    """The 20 digits that come with the project, `[20, 1, 28, 28]` in [0, 1], and their labels."""
    files = sorted((ASSETS / "mnist").glob("*.png"))
    digits = np.stack([np.asarray(Image.open(file)) for file in files])
    labels = torch.tensor([int(file.name[0]) for file in files])
    return torch.from_numpy(digits).unsqueeze(1) / 255, labels


def metadata(name: str) -> dict[str, str]:
    with safe_open(ASSETS / f"{name}.safetensors", "pt") as file:
        content: dict[str, str] = file.metadata()
    return content


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_network_is_sure_of_all_shipped_digits(name: str) -> None:
    digits, labels = shipped_samples()
    model = load(name)
    assert labels.bincount().tolist() == [2] * 10
    assert model.input_shape == (1, 28, 28)
    probabilities = model.classifier(digits).softmax(1)
    assert (probabilities.gather(1, labels[:, None]) > 0.9).all()
    assert model.classes == tuple("0123456789")


@needs_mnist
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_network_has_the_test_accuracy_in_its_metadata(name: str) -> None:
    test = np.load(MNIST)
    logits = load(name).classifier(torch.from_numpy(test["images"]).unsqueeze(1) / 255)
    accuracy = float((logits.argmax(1).numpy() == test["labels"]).mean())
    assert f"{accuracy:.4f}" == metadata(name)["test_accuracy"]
    assert accuracy > 0.975


@needs_mnist
def test_metadata_names_the_data_by_the_hash_of_its_bytes() -> None:
    digest = hashlib.sha256()
    for part in ("train", "test"):
        arrays = np.load(MNIST.with_name(f"{part}.npz"))
        digest.update(arrays["images"].tobytes() + arrays["labels"].tobytes())
    assert {metadata(name)["data_sha256"] for name in SHIPPED} == {digest.hexdigest()}


def test_the_mlp_equals_a_forward_written_out_in_float64() -> None:
    state = load_file(ASSETS / "mnist-mlp.safetensors")
    weights = {key: value.numpy().astype(np.float64) for key, value in state.items()}
    digits, _ = shipped_samples()
    hidden = digits.numpy().astype(np.float64).reshape(20, 784)
    for layer in ("fc1", "fc2"):
        hidden = np.maximum(hidden @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"], 0)
    wanted = hidden @ weights["fc3.weight"].T + weights["fc3.bias"]
    classifier = load("mnist-mlp").classifier
    np.testing.assert_allclose(classifier(digits).numpy(), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(classifier.double()(digits.double()).numpy(), wanted, atol=1e-10)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_loaded_network_is_in_eval_mode_and_frozen(name: str) -> None:
    classifier = load(name).classifier
    assert not any(module.training for module in classifier.modules())
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_the_weights_hash_follows_names_and_bytes_and_nothing_else() -> None:
    first, again, other = load("mnist-mlp"), load("mnist-mlp"), load("mnist-cnn")
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(ASSETS / "mnist-mlp.safetensors").items()):
        digest.update(f"{key} torch.float32 {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert first.weights_sha256 == digest.hexdigest()


# torchvision's networks


def test_every_network_is_listed_with_a_sane_shape_and_its_classes(cache: Path) -> None:
    names = {entry.name for entry in listed()}
    assert {"mnist-mlp", "mnist-cnn", "vgg16", "resnet50", "vit_b_16", "inception_v3"} <= names
    assert not any("quantized" in name or "rcnn" in name for name in names)
    for entry in listed():
        channels, height, width = entry.input_shape
        if entry.origin == "shipped":
            assert (entry.input_shape, entry.classes, entry.ready) == ((1, 28, 28), 10, True)
        else:
            assert entry.origin == "torchvision"
            assert channels == 3
            assert 200 <= height == width <= 600
            assert entry.classes == 1000
            assert not entry.ready
            assert all(name.startswith("IMAGENET1K") for name in entry.weights)


def test_the_default_weights_are_listed_first_and_featureless_ones_left_out(cache: Path) -> None:
    weights = {entry.name: entry.weights for entry in listed()}
    assert weights["resnet50"] == ("IMAGENET1K_V2", "IMAGENET1K_V1")
    assert weights["vgg16"] == ("IMAGENET1K_V1",)


def test_without_weights_or_network_one_sentence_says_which_file_goes_where(cache: Path) -> None:
    patience = socket.getdefaulttimeout()
    with pytest.raises(ModelUnavailable) as caught:
        load("vgg16")
    message = str(caught.value)
    assert "put vgg16-397923af.pth from https://download.pytorch.org/models/" in message
    assert f"into {cache}." in message
    assert "Name or service not known" in message
    assert "\n" not in message
    assert socket.getdefaulttimeout() == patience


def put_into_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: object
) -> Path:
    """A file that stands for the weights of a torchvision network, under its own hash's name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    prefix = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    url = f"https://download.pytorch.org/models/{name}-{prefix}.pth"
    monkeypatch.setattr(zoo.get_model_weights(name).DEFAULT.value, "url", url)
    cache.mkdir(parents=True)
    file = cache / f"{name}-{prefix}.pth"
    file.write_bytes(buffer.getvalue())
    return file


@pytest.mark.parametrize(
    ("name", "resize", "crop", "interpolation"),
    [
        ("squeezenet1_1", 256, 224, "bilinear"),
        ("resnet18", 256, 224, "bilinear"),
        ("inception_v3", 342, 299, "bilinear"),
        ("googlenet", 256, 224, "bilinear"),
        ("swin_t", 232, 224, "bicubic"),
    ],
)
def test_a_torchvision_network_is_loaded_from_the_cache_and_gives_plain_logits(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    resize: int,
    crop: int,
    interpolation: Literal["bilinear", "bicubic"],
) -> None:
    torch.manual_seed(0)
    of_google = name in ("inception_v3", "googlenet")
    theirs = zoo.get_model(name, weights=None, **({"init_weights": False} if of_google else {}))
    put_into_cache(cache, monkeypatch, name, theirs.state_dict())
    (entry,) = (entry for entry in listed() if entry.name == name)
    assert entry.ready
    model = load(name)
    assert model.weights == entry.weights[0]
    assert model.input_shape == entry.input_shape == (3, crop, crop)
    assert model.preprocessing == images.Preprocessing("RGB", (crop, crop), resize, interpolation)
    assert len(model.classes) == 1000
    assert model.classes[388] == "giant panda"
    pixels = torch.rand(2, 3, crop, crop)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    theirs.transform_input = of_google  # their weights were trained on [-1, 1]
    with torch.no_grad():
        wanted = theirs.eval()((pixels - mean) / std)
    torch.testing.assert_close(model.classifier(pixels), wanted, rtol=1e-3, atol=1e-4)


def test_a_cached_file_with_another_hash_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = put_into_cache(cache, monkeypatch, "squeezenet1_1", {})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelUnavailable, match="does not begin with"):
        load("squeezenet1_1")


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_cached_file_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_cache(cache, monkeypatch, "squeezenet1_1", Harm(tmp_path / "harm"))
    with pytest.raises(ModelUnavailable, match="holds no weights of squeezenet1_1: remove it"):
        load("squeezenet1_1")
    assert not (tmp_path / "harm").exists()


def test_unknown_names_are_refused_with_near_ones(cache: Path) -> None:
    with pytest.raises(UnknownName, match=r"no model 'vgg-16'; did you mean .*'vgg16'"):
        load("vgg-16")
    with pytest.raises(UnknownName, match="no model 'mnist'; did you mean 'mnist-"):
        load("mnist")
    with pytest.raises(UnknownName, match=r"no weights 'IMAGENET1K_V3'.* 'IMAGENET1K_V1'"):
        load("vgg16", weights="IMAGENET1K_V3")
    with pytest.raises(UnknownName, match="no weights 'IMAGENET1K_FEATURES'"):
        load("vgg16", weights="IMAGENET1K_FEATURES")
    with pytest.raises(UnknownName, match="no weights 'other'"):
        load("mnist-mlp", weights="other")


# A models.toml


def test_a_network_from_models_toml_equals_the_one_it_was_saved_from(
    write_toml: WriteToml, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_toml()
    monkeypatch.chdir("/")
    model = load("mine", weights="mine.safetensors")
    assert model.input_shape == (3, 64, 64)
    assert model.preprocessing == images.Preprocessing("RGB", (64, 64), 72, "bilinear")
    assert len(model.classes) == 1000
    (entry,) = (entry for entry in listed() if entry.name == "mine")
    assert (entry.weights, entry.input_shape) == (("mine.safetensors",), (3, 64, 64))
    assert (entry.classes, entry.origin, entry.ready) == (1000, str(path), True)
    theirs = zoo.squeezenet1_1().eval()
    theirs.load_state_dict(load_file(path.with_name("mine.safetensors")))
    pixels = torch.rand(2, 3, 64, 64)
    means = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    with torch.no_grad():
        wanted = theirs(pixels[:, [2, 1, 0]] * 255 - means)
    torch.testing.assert_close(model.classifier(pixels), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("module", ["polycollide_test_factory", "store"])
def test_a_factory_beside_models_toml_takes_its_arguments(
    write_toml: WriteToml, module: str
) -> None:
    path = write_toml(
        factory=f'"{module}:build"',
        arguments="{ inputs = 12, outputs = 2 }",
        classes='["yes", "no"]',
        preprocessing='[models.preprocessing]\ncrop = [3, 4]\nchannels = "L"\n',
    )
    path.with_name(f"{module}.py").write_text(
        "from torch import nn\n"
        "def build(inputs, outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))\n"
    )
    state = {"1.weight": torch.ones(2, 12).half(), "1.bias": torch.tensor([0.0, 1.0]).half()}
    save_file(state, path.with_name("mine.safetensors"))
    digest = hashlib.sha256(path.with_name("mine.safetensors").read_bytes()).hexdigest()
    path.write_text(re.sub(r"[0-9a-f]{64}", digest, path.read_text()))
    model = load("mine")
    assert model.classes == ("yes", "no")
    assert model.input_shape == (1, 3, 4)
    logits = model.classifier(torch.ones(1, 1, 3, 4))
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[12.0, 13.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": f'"{"0" * 64}"'}, "has not the sha256"),
        ({"weights": '"absent.safetensors"'}, "there is no file .*absent.safetensors"),
        ({"classes": '["cat", "dog"]'}, r"2 class names, but gives \(1, 1000\)"),
        (
            {"factory": '"no.such.module:build"'},
            "'no.such.module:build' .* failed: ModuleNotFoundError: No module",
        ),
        ({"factory": '"torchvision:no_net"'}, "failed: ValueError: Unknown model no_net"),
        ({"factory": '"math:no_such"'}, "failed: AttributeError: module 'math' has no"),
        ({"factory": '"platform:machine"'}, "returns no torch.nn.Module"),
        ({"arguments": "{ wrong = 1 }"}, "failed: .*unexpected keyword argument 'wrong'"),
        ({"factory": '"squeezenet"'}, "models.0.factory: String should match"),
        ({"name": '"vgg16"'}, "the name 'vgg16' is taken"),
        ({"sha": '""'}, "models.0.sha: Extra inputs"),
        ({"classes": "5"}, "models.0.classes"),
        ({"preprocessing": "[models.preprocessing]\ncrop = 224\nresize = 200\n"}, "resize 200"),
        ({"preprocessing": "[models.preprocessing]\ncrop = 64\nmean = [1, 2]\n"}, "mean and std"),
        ({"preprocessing": "[models.preprocessing]\ncrop = 64\nstd = [0]\n"}, "greater than 0"),
        ({"preprocessing": "[models.preprocessing]\ncrop = 8\n"}, r"of shape \(3, 8, 8\)"),
        ({"preprocessing": ""}, "models.0.preprocessing: Field required"),
        ({"preprocessing": "[models.preproc"}, "cannot be read"),
    ],
)
def test_what_is_wrong_with_models_toml_is_said_in_one_sentence(
    write_toml: WriteToml, changes: dict[str, str], message: str
) -> None:
    write_toml(**changes)
    with pytest.raises(ModelUnavailable, match=message) as caught:
        load("mine")
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused_by_their_keys(write_toml: WriteToml) -> None:
    file = write_toml().with_name("mine.safetensors")
    state = load_file(file)
    state["extra"] = torch.zeros(1)
    del state["features.0.bias"]
    state["classifier.1.bias"] = torch.zeros(10)
    save_file(state, file)
    write_toml()
    with pytest.raises(ModelUnavailable) as caught:
        load("mine")
    assert str(caught.value).endswith(
        "does not fit 'mine': it lacks features.0.bias; it has too much: extra; "
        "it has in another shape: classifier.1.bias."
    )


def test_a_file_that_is_no_safetensors_file_is_refused(write_toml: WriteToml) -> None:
    write_toml().with_name("mine.safetensors").write_bytes(b"\x80\x04not safetensors")
    write_toml()
    with pytest.raises(ModelUnavailable, match="cannot be read as safetensors"):
        load("mine")


def test_a_missing_models_toml_stops_neither_shipped_networks_nor_goes_unsaid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYCOLLIDE_MODELS", str(tmp_path / "models.toml"))
    assert load("mnist-mlp").name == "mnist-mlp"
    for ask in (listed, lambda: load("mine")):
        with pytest.raises(ModelUnavailable, match="POLYCOLLIDE_MODELS"):
            ask()


@needs_squeezenet
def test_the_published_squeezenet_knows_the_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squeezenet_padded.py").write_text(
        "from torchvision.models import squeezenet1_0\n"
        "def build(padding):\n"
        "    network = squeezenet1_0()\n"
        "    network.classifier[1].padding = (padding, padding)\n"
        "    return network\n"
    )
    (tmp_path / "models.toml").write_text(
        "[[models]]\n"
        'name = "squeezenet-bgr"\n'
        'factory = "squeezenet_padded:build"\n'
        "arguments = { padding = 1 }\n"
        f'weights = "{SQUEEZENET}"\n'
        f'sha256 = "{hashlib.sha256(SQUEEZENET.read_bytes()).hexdigest()}"\n'
        'classes = "imagenet"\n'
        "[models.preprocessing]\n"
        "resize = 256\n"
        "crop = 227\n"
        'channels = "BGR"\n'
        "scale = 255\n"
        "mean = [104, 117, 123]\n"
    )
    monkeypatch.setenv("POLYCOLLIDE_MODELS", str(tmp_path / "models.toml"))
    model = load("squeezenet-bgr")
    wanted = {  # shared/data/README.md
        "animal_panda": ("giant panda", "1.00"),
        "animal_koala": ("koala", "1.00"),
        "animal_scarlet_macaw": ("macaw", "1.00"),
        "fish_fish28": ("puffer", "1.00"),
        "animal_polar_bear": ("ice bear", "0.99"),
        "farm_dog": ("German shepherd", "0.99"),
        "fish_fish25": ("goldfish", "0.98"),
        "animal_lemur": ("Madagascar cat", "0.93"),
        "farm_chicken": ("hen", "0.93"),
    }
    got = {}
    for name in wanted:
        data = (DATA / "photos" / f"{name}.jpg").read_bytes()
        pixels = torch.from_numpy(images.load(name, data, model.preprocessing).pixels)
        probability, label = model.classifier(pixels[None]).softmax(1).max(1)
        got[name] = (model.classes[int(label)], f"{float(probability):.2f}")
    assert got == wanted
