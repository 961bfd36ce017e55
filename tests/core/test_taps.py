"""f' as the tap reads it equals what a forward pass written out another way computes."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision.models as zoo
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack

from core import images
from core.errors import UnknownName, UntappableLayer
from core.models import ASSETS, Classifier, Model, Normalize
from core.program import is_affine, proves_cut, proves_mixing
from core.taps import Clip, MaxPool, Tap, is_cut, mixes, open_tap, tappable

Floats = NDArray[np.float64]

SQUEEZENET = Path(__file__).resolve().parents[3] / "shared" / "data" / "squeezenet1_0.safetensors"
needs_squeezenet = pytest.mark.skipif(not SQUEEZENET.is_file(), reason=f"there is no {SQUEEZENET}")

AS_IS = nn.Identity()
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def tap_of(model: Model, name: str, probe: Tensor) -> Tap:
    return open_tap(model.classifier.normalize, model.classifier.network, name, probe)


def random(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A torchvision network with random weights, frozen."""
    torch.manual_seed(0)
    return build(weights=None, **options).eval().requires_grad_(False)


def batch(size: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.rand(size, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    return random(zoo.vgg11, num_classes=10)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return random(zoo.resnet18, num_classes=10)


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    return random(zoo.squeezenet1_0, num_classes=10)


@pytest.fixture(scope="module")
def mobilenet() -> nn.Module:
    return random(zoo.mobilenet_v2, num_classes=10)


class Small(nn.Module):
    """A linear layer, `act`, and another, on images [N, 1, 2, 3]; frozen."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 4)
        self.first.weight.data *= 20  # so that some units reach 6
        self.act = act
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x.flatten(1))))


SMALL = (1, 2, 3)


def in_float64(linear: nn.Linear, x: Tensor | Floats) -> Floats:
    weight, bias = (p.detach().double().numpy() for p in (linear.weight, linear.bias))
    return np.asarray(x, np.float64).reshape(len(x), -1) @ weight.T + bias


# The MNIST networks, in float64 numpy


def conv3x3(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """Of [N, C, H, W], padded by 1."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(x), len(weight), height, width))
    for i in range(3):
        for j in range(3):
            part = padded[:, :, i : i + height, j : j + width]
            out += np.einsum("oc,nchw->nohw", weight[:, :, i, j], part)
    return out + bias[:, None, None]


def pool2x2(x: Floats) -> Floats:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def weights_of(name: str) -> dict[str, Floats]:
    state = load_file(ASSETS / f"{name}.safetensors")
    return {key: value.numpy().astype(np.float64) for key, value in state.items()}


def mlp_by_hand(x: Floats) -> dict[str, Floats]:
    w = weights_of("mnist-mlp")
    pre, h = {}, x.reshape(len(x), -1)
    for layer in ("fc1", "fc2", "fc3"):
        pre[layer] = h @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        h = np.maximum(pre[layer], 0)
    return pre


def cnn_by_hand(x: Floats) -> dict[str, Floats]:
    w = weights_of("mnist-cnn")
    pre, h = {}, x
    for layer in ("conv1", "conv2"):
        pre[layer] = conv3x3(h, w[f"{layer}.weight"], w[f"{layer}.bias"])
        h = pool2x2(np.maximum(pre[layer], 0))
    h = h.reshape(len(x), -1)
    for layer in ("fc1", "fc2", "fc3"):
        pre[layer] = h @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        h = np.maximum(pre[layer], 0)
    return {name: value.reshape(len(x), -1) for name, value in pre.items()}


BY_HAND = {"mnist-mlp": mlp_by_hand, "mnist-cnn": cnn_by_hand}
MNIST_LAYERS = [
    ("mnist-mlp", "fc1"),
    ("mnist-mlp", "fc2"),
    ("mnist-cnn", "conv1"),
    ("mnist-cnn", "conv2"),
    ("mnist-cnn", "fc1"),
    ("mnist-cnn", "fc2"),
]


@pytest.fixture
def by_name(mlp: Model, cnn: Model) -> dict[str, Model]:
    return {"mnist-mlp": mlp, "mnist-cnn": cnn}


@pytest.mark.parametrize(("name", "layer"), MNIST_LAYERS)
def test_a_tap_of_an_mnist_network_equals_a_forward_in_float64_numpy(
    by_name: dict[str, Model], digits: Tensor, name: str, layer: str
) -> None:
    tap = tap_of(by_name[name], layer, digits[:1])
    wanted = BY_HAND[name](digits.double().numpy())
    np.testing.assert_allclose(tap(digits).numpy(), wanted[layer], **CLOSE)
    pre, logits = tap.observe(digits)
    np.testing.assert_allclose(pre.numpy(), wanted[layer], **CLOSE)
    np.testing.assert_allclose(logits.numpy(), wanted["fc3"], **CLOSE)
    assert (wanted[layer] < -0.1).any()  # f', not f


@pytest.mark.parametrize("name", BY_HAND)
def test_the_layers_of_an_mnist_network_come_in_order_with_both_their_names(
    by_name: dict[str, Model], digits: Tensor, name: str
) -> None:
    found = tappable(by_name[name].classifier.network, digits[:1])
    one, other = (16, 28, 28), (32, 14, 14)
    wanted: list[tuple[tuple[str, ...], tuple[int, ...], Clip | MaxPool]] = [
        (("conv1", "relu1"), one, Clip()),
        (("pool1",), one, MaxPool(one, (2, 2), (2, 2))),
        (("conv2", "relu2"), other, Clip()),
        (("pool2",), other, MaxPool(other, (2, 2), (2, 2))),
        (("fc1", "relu3"), (256,), Clip()),
        (("fc2", "relu4"), (128,), Clip()),
    ]
    if name == "mnist-mlp":
        wanted = [((f"fc{i}", f"relu{i}"), (256,), Clip()) for i in (1, 2)]
    assert [(la.names, la.shape, la.activation) for la in found] == wanted
    assert [la.call for la in found] == list(range(len(wanted)))
    assert [la.units for la in found] == [math.prod(shape) for _, shape, _ in wanted]


def test_a_layer_answers_to_all_its_names(mlp: Model, digits: Tensor) -> None:
    one, other = (tap_of(mlp, name, digits[:1]) for name in ("fc2", "relu2"))
    assert one.layer == other.layer
    assert one.layer.name == "fc2"


def test_gradients_pass_through_the_tap(mlp: Model, digits: Tensor) -> None:
    tap = tap_of(mlp, "fc2", digits[:1])
    leaf = digits[:3].clone().requires_grad_()
    (got,) = torch.autograd.grad(tap(leaf)[:, 5].sum(), leaf)
    w = weights_of("mnist-mlp")
    alive = mlp_by_hand(digits[:3].double().numpy())["fc1"] > 0
    wanted = (w["fc2.weight"][5] * alive) @ w["fc1.weight"]
    np.testing.assert_allclose(got.flatten(1).numpy(), wanted, **CLOSE)


def test_pinned_logits_go_on_from_the_given_pre_activation(mlp: Model, digits: Tensor) -> None:
    tap = tap_of(mlp, "fc2", digits[:1])
    pre = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * 5
    w = weights_of("mnist-mlp")
    wanted = np.maximum(pre.double().numpy(), 0) @ w["fc3.weight"].T + w["fc3.bias"]
    got = tap.pinned(digits[:4], pre)
    np.testing.assert_allclose(got.numpy(), np.repeat(wanted, 4, 0), **CLOSE)


def test_the_normalisation_is_a_part_of_the_tap() -> None:
    normalize = Normalize("BGR", scale=255, mean=(104, 117, 123), std=(2, 3, 5))
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    network.requires_grad_(False)
    pixels = batch(3, 3, 2, 2)
    means = np.array([104, 117, 123]).reshape(3, 1, 1)
    stds = np.array([2, 3, 5]).reshape(3, 1, 1)
    normal = (pixels.double().numpy()[:, ::-1] * 255 - means) / stds
    wanted = in_float64(network[1], normal)  # type: ignore[arg-type]
    tap = open_tap(normalize, network, "1", pixels[:1])
    np.testing.assert_allclose(tap(pixels).numpy(), wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(tap.observe(pixels)[0].numpy(), wanted, rtol=1e-4, atol=1e-3)


# torchvision's networks, by pieces of their own forward pass


def test_in_place_vgg_gives_what_is_before_the_relu(vgg: nn.Module) -> None:
    assert vgg.features[1].inplace
    assert vgg.classifier[1].inplace
    x = batch(2, 3, 40, 40)
    conv = vgg.features[:9](x)
    flat = vgg.avgpool(vgg.features(x)).flatten(1)
    for name, wanted in (("features.8", conv), ("classifier.0", vgg.classifier[0](flat))):
        assert float(wanted.min()) < 0
        tap = open_tap(AS_IS, vgg, name, x[:1])
        torch.testing.assert_close(tap(x), wanted.flatten(1), **CLOSE)
        pre, logits = tap.observe(x)
        torch.testing.assert_close(pre, wanted.flatten(1), **CLOSE)
        torch.testing.assert_close(logits, vgg(x), **CLOSE)


def resnet_block(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What both ReLUs of a BasicBlock take in, and what the block gives."""
    first = block.bn1(block.conv1(x))
    second = block.bn2(block.conv2(first.clamp(min=0)))
    second = second + (block.downsample(x) if block.downsample else x)
    return first, second, second.clamp(min=0)


def test_every_run_of_a_shared_relu_is_a_layer_of_its_own(resnet: nn.Module) -> None:
    x = batch(2, 3, 64, 64)
    h = resnet.maxpool(resnet.bn1(resnet.conv1(x)).clamp(min=0))
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3):
        h = stage(h)
    _, _, h = resnet_block(resnet.layer4[0], h)
    first, second, _ = resnet_block(resnet.layer4[1], h)
    for name, wanted in (
        ("layer4.1.bn1", first),
        ("layer4.1.relu", first),
        ("layer4.1.relu#1", second),
    ):
        tap = open_tap(AS_IS, resnet, name, x[:1])
        torch.testing.assert_close(tap(x), wanted.flatten(1), **CLOSE)


def offered(message: str) -> list[str]:
    assert message.endswith(".")
    return re.findall("'([^']+)'", message.partition(" take ")[2])


@pytest.mark.parametrize("name", ["layer4.1.bn2", "layer4.1.conv1", "layer4.1", "fc", "avgpool"])
def test_a_layer_not_followed_by_a_clip_is_refused_naming_tappable_ones(
    resnet: nn.Module, name: str
) -> None:
    """bn2's output is changed in place by the residual before ReLU takes it."""
    x = batch(1, 3, 64, 64)
    refusal = rf"Layer '{re.escape(name)}' is not followed by ReLU or ReLU6, nor .* pool .*; take '"
    with pytest.raises(UntappableLayer, match=refusal) as caught:
        open_tap(AS_IS, resnet, name, x)
    names = offered(str(caught.value))
    assert len(names) == 3
    for near in names:
        assert open_tap(AS_IS, resnet, near, x).layer.name == near
    if name.startswith("layer4.1"):
        assert names[0].startswith("layer4.1.")


def test_a_network_without_clips_has_no_layer_and_says_so() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4))
    assert tappable(network, batch(1, *SMALL)) == []
    with pytest.raises(UntappableLayer, match=r"'1' is not followed by ReLU .*none to take"):
        open_tap(AS_IS, network, "1", batch(1, *SMALL))


@pytest.mark.parametrize(
    ("name", "near"),
    [("clasifier.0", "classifier.0"), ("features.08", "features.8"), ("Features.8", "features.8")],
)
def test_unknown_layers_offer_near_names(vgg: nn.Module, name: str, near: str) -> None:
    pattern = rf"no layer '{name}'; did you mean .*'{re.escape(near)}'"
    with pytest.raises(UnknownName, match=pattern):
        open_tap(AS_IS, vgg, name, batch(1, 3, 32, 32))


def test_relu6_networks_clip_at_6_in_every_layer(mobilenet: nn.Module) -> None:
    x = batch(2, 3, 64, 64)
    found = tappable(mobilenet, x[:1])
    assert len(found) == 35
    assert {layer.activation for layer in found} == {Clip(6.0)}
    h = mobilenet.features[:18](x)
    wanted = mobilenet.features[18][1](mobilenet.features[18][0](h))
    tap = open_tap(AS_IS, mobilenet, "features.18.1", x[:1])
    assert isinstance(mobilenet.features[18][2], nn.ReLU6)
    torch.testing.assert_close(tap(x), wanted.flatten(1), **CLOSE)


def test_clip_is_the_activation_itself() -> None:
    pre = torch.tensor([-1.0, 0.0, 3.0, 6.0, 9.0])
    assert torch.equal(Clip()(pre), F.relu(pre))
    assert torch.equal(Clip(6.0)(pre), F.relu6(pre))


# Every way to write a clip

INFINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "x.clamp(min=0)": lambda x: x.clamp(min=0),
    "x.clamp(0)": lambda x: x.clamp(0),
    "x.clamp(0.0, None)": lambda x: x.clamp(0.0, None),
    "x.clamp_": lambda x: x.clamp_(min=0),
    "torch.clamp": lambda x: torch.clamp(x, min=0),
    "torch.clamp(input=x)": lambda x: torch.clamp(input=x, min=0),
    "torch.relu(input=x)": lambda x: torch.relu(input=x),
    "torch.clamp_": lambda x: torch.clamp_(x, 0),
    "torch.clip": lambda x: torch.clip(x, 0),
    "torch.clip_": lambda x: torch.clip_(x, 0),
    "x.clip": lambda x: x.clip(0),
    "x.clip_": lambda x: x.clip_(min=0),
    "torch.clamp_min": lambda x: torch.clamp_min(x, 0),
    "torch.clamp_min_": lambda x: torch.clamp_min_(x, min=0),
    "x.clamp_min": lambda x: x.clamp_min(0),
    "x.clamp_min_": lambda x: x.clamp_min_(0),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
}
AT_6: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu6": F.relu6,
    "F.relu6 in place": lambda x: F.relu6(x, inplace=True),
    "F.hardtanh(0, 6)": lambda x: F.hardtanh(x, 0, 6),
    "F.hardtanh(min_val, max_val)": lambda x: F.hardtanh(x, max_val=6.0, min_val=0.0),
    "F.hardtanh in place": lambda x: F.hardtanh(x, 0.0, 6.0, inplace=True),
    "F.hardtanh_": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "x.clamp(0, 6)": lambda x: x.clamp(0, 6),
    "x.clip(0, 6)": lambda x: x.clip(0, 6),
    "torch.clamp(max, min)": lambda x: torch.clamp(x, max=6, min=0),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "nn.Hardtanh(0, 6)": nn.Hardtanh(0, 6),
}
NO_CLIP: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp(min=-1)": lambda x: x.clamp(min=-1),
    "clamp(min=0.1)": lambda x: x.clamp(min=0.1),
    "clamp(-6, 6)": lambda x: x.clamp(-6, 6),
    "clamp(max=6)": lambda x: x.clamp(max=6),
    "clamp(max=0)": lambda x: x.clamp(max=0),
    "clamp(min=tensor)": lambda x: x.clamp(min=torch.zeros(())),
    "clamp_min(-1)": lambda x: x.clamp_min(-1),
    "F.hardtanh": F.hardtanh,
    "F.hardtanh_": lambda x: F.hardtanh_(x),
    "F.hardtanh(-6, 6)": lambda x: F.hardtanh(x, -6, 6),
    "nn.Hardtanh": nn.Hardtanh(),
    "F.leaky_relu": F.leaky_relu,
    "F.gelu": F.gelu,
    "F.hardswish": F.hardswish,
    "abs": torch.abs,
}


@pytest.mark.parametrize("how", [*INFINITE, *AT_6])
def test_a_clip_is_seen_however_it_is_written(how: str) -> None:
    network = Small((INFINITE | AT_6)[how])
    x = batch(5, *SMALL)
    (layer,) = tappable(network, x[:1])
    assert layer.names == ("first", "act" if how.startswith("nn.") else "relu()")
    assert layer.activation == Clip(math.inf if how in INFINITE else 6.0)
    wanted = in_float64(network.first, x)
    assert (wanted < 0).any()
    assert (wanted > 6).any()
    tap = open_tap(AS_IS, network, "first", x[:1])
    np.testing.assert_allclose(tap(x).numpy(), wanted, **CLOSE)
    pre, logits = tap.observe(x)
    np.testing.assert_allclose(pre.numpy(), wanted, **CLOSE)
    assert torch.equal(logits, network(x))
    clipped = torch.from_numpy(wanted).clamp(0, math.inf if how in INFINITE else 6.0)
    pinned = tap.pinned(x, torch.from_numpy(wanted[:1]).float())
    wanted_logits = in_float64(network.second, clipped[:1])
    np.testing.assert_allclose(pinned.numpy(), np.repeat(wanted_logits, 5, 0), **CLOSE)


@pytest.mark.parametrize("how", NO_CLIP)
def test_what_does_not_clip_from_0_up_is_no_layer(how: str) -> None:
    network = Small(NO_CLIP[how])
    assert tappable(network, batch(1, *SMALL)) == []
    with pytest.raises(UntappableLayer, match="'first' is not followed by ReLU or ReLU6"):
        open_tap(AS_IS, network, "first", batch(1, *SMALL))


def test_bounds_left_out_are_those_of_the_function() -> None:
    network = Small(lambda x: F.hardtanh_(x, 0.0))
    (layer,) = tappable(network, batch(1, *SMALL))
    assert layer.activation == Clip(1.0)


def test_clips_that_do_not_count_do_not_shift_the_count_of_those_that_do() -> None:
    def act(x: Tensor) -> Tensor:
        return F.hardtanh(F.hardtanh(x, -50, 50).relu() - 1, -9, 9).relu()

    network = Small(act)
    x = batch(5, *SMALL)
    assert [layer.names for layer in tappable(network, x[:1])] == [("relu()",), ("relu()#1",)]
    first = in_float64(network.first, x)
    for name, wanted in (
        ("relu()", first.clip(-50, 50)),
        ("relu()#1", (first.clip(0, 50) - 1).clip(-9, 9)),
    ):
        tap = open_tap(AS_IS, network, name, x[:1])
        np.testing.assert_allclose(tap(x).numpy(), wanted, **CLOSE)


class Twice(nn.Module):
    """One linear layer that runs twice, and a module that clips three times by a function."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.relu(x) - 0.2)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.inner = nn.Linear(6, 6), self.Inner()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.fc(x.flatten(1)))
        return F.relu(self.fc(h)) @ torch.ones(6, 2)


def test_a_module_that_runs_twice_is_two_layers() -> None:
    network, x = Twice(), batch(4, *SMALL)
    assert [layer.names for layer in tappable(network, x[:1])] == [
        ("fc", "inner.relu()"),
        ("inner.relu()#1",),
        ("fc#1", "relu()"),
    ]
    first = in_float64(network.fc, x)
    second = first.clip(0) - 0.2
    third = in_float64(network.fc, second.clip(0))
    for name, wanted in (("fc", first), ("inner.relu()#1", second), ("fc#1", third)):
        tap = open_tap(AS_IS, network, name, x[:1])
        np.testing.assert_allclose(tap(x).numpy(), wanted, **CLOSE)
    with pytest.raises(UntappableLayer, match="'fc#2' is not followed by"):
        open_tap(AS_IS, network, "fc#2", x[:1])


class Residual(nn.Module):
    def __init__(self, *, in_place: bool, through_view: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.relu = nn.Linear(6, 6), nn.ReLU()
        self.in_place, self.through_view = in_place, through_view

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        h = self.fc(x)
        if self.through_view:
            h.view(-1).add_(x.view(-1))
        elif self.in_place:
            h += x
        else:
            h = h + x
        return self.relu(h)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("through_view", [True, False])
def test_a_layer_to_which_something_is_added_before_the_clip_is_not_the_layer(
    in_place: bool, through_view: bool
) -> None:
    network = Residual(in_place=in_place, through_view=through_view).requires_grad_(False)
    x = batch(3, *SMALL)
    assert [layer.names for layer in tappable(network, x[:1])] == [("relu",)]
    with pytest.raises(UntappableLayer, match=r"'fc' is not followed by .* take 'relu'"):
        open_tap(AS_IS, network, "fc", x[:1])
    wanted = in_float64(network.fc, x) + x.flatten(1).double().numpy()
    tap = open_tap(AS_IS, network, "relu", x[:1])
    np.testing.assert_allclose(tap(x).numpy(), wanted, **CLOSE)


def test_identities_between_layer_and_clip_keep_the_layers_name() -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(6, 6), nn.Dropout()), nn.Identity(), nn.ReLU()
    ).eval()
    (layer,) = tappable(network, batch(1, *SMALL))
    assert layer.names == ("1.0", "3")


def test_what_works_in_place_between_layer_and_clip_gives_the_layer_its_name() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.LeakyReLU(0.1, True), nn.ReLU())
    x = batch(4, *SMALL)
    (layer,) = tappable(network, x[:1])
    assert layer.names == ("2", "3")
    with pytest.raises(UntappableLayer, match=r"'1' is not followed by .* take '2'"):
        open_tap(AS_IS, network, "1", x[:1])
    linear = in_float64(network[1], x)  # type: ignore[arg-type]
    with torch.no_grad():
        got = open_tap(AS_IS, network, "2", x[:1])(x)
    np.testing.assert_allclose(got.numpy(), np.where(linear < 0, 0.1 * linear, linear), **CLOSE)


# Max pools


class Pooling(nn.Module):
    """A convolution, `pool`, and a linear layer, on images [N, 1, 7, 8]; frozen."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.pool, self.last = nn.Conv2d(1, 3, 3, padding=1), pool, nn.LazyLinear(4)
        self.forward(torch.zeros(1, *PLANES))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.conv(x)).flatten(1))


PLANES, FEATURES = (1, 7, 8), (3, 7, 8)
POOLS: dict[str, tuple[Callable[[Tensor], Tensor], MaxPool]] = {
    "nn.MaxPool2d": (nn.MaxPool2d(2), MaxPool(FEATURES, (2, 2), (2, 2))),
    "nn.MaxPool2d, all set": (
        nn.MaxPool2d((3, 2), (1, 2), (1, 0), (2, 3), ceil_mode=True),
        MaxPool(FEATURES, (3, 2), (1, 2), (1, 0), (2, 3), ceil_mode=True),
    ),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 3), MaxPool(FEATURES, (3, 3), (3, 3))),
    "F.max_pool2d by position": (
        lambda x: F.max_pool2d(x, 3, 2, 1, 1, True),
        MaxPool(FEATURES, (3, 3), (2, 2), (1, 1), ceil_mode=True),
    ),
    "F.max_pool2d by name": (
        lambda x: F.max_pool2d(kernel_size=[3, 2], input=x, padding=(1, 1), stride=(2,)),
        MaxPool(FEATURES, (3, 2), (2, 2), (1, 1)),
    ),
    "torch.max_pool2d": (
        lambda x: torch.max_pool2d(x, 3, ceil_mode=True),
        MaxPool(FEATURES, (3, 3), (3, 3), ceil_mode=True),
    ),
    "torch.max_pool2d by position": (
        lambda x: torch.max_pool2d(x, (2, 2), (1, 3), (0, 1), (1, 2)),
        MaxPool(FEATURES, (2, 2), (1, 3), (0, 1), (1, 2)),
    ),
}


@pytest.mark.parametrize("how", POOLS)
def test_a_max_pool_is_seen_however_it_is_written(how: str) -> None:
    """Its f' is what the convolution gives, its f what the network's own pool gives."""
    pool, activation = POOLS[how]
    network, x = Pooling(pool), batch(4, *PLANES)
    (layer,) = tappable(network, x[:1])
    assert layer.names == ("pool" if how.startswith("nn.") else "max_pool2d()",)
    assert (layer.activation, layer.activation.kind) == (activation, "max_pool")
    assert (layer.shape, layer.units) == (FEATURES, 168)
    weight, bias = (p.double().numpy() for p in network.conv.parameters())
    wanted = conv3x3(x.double().numpy(), weight, bias)
    tap = open_tap(AS_IS, network, layer.name, x[:1])
    np.testing.assert_allclose(tap(x).numpy(), wanted.reshape(4, -1), **CLOSE)
    pre, logits = tap.observe(x)
    own = pool(network.conv(x)).flatten(1)
    assert torch.equal(layer.activation(pre), own)
    assert torch.equal(layer.activation(pre[1]), own[1])
    assert torch.equal(logits, network(x))
    torch.testing.assert_close(tap.pinned(x, pre[:1]), network(x[:1]).expand(4, -1), **CLOSE)
    assert is_cut(tap, x[:1], x[1:2])


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, return_indices=True),
        nn.AdaptiveMaxPool2d(3),
        nn.FractionalMaxPool2d(2, output_size=3),
        nn.MaxPool1d(2),
        nn.AvgPool2d(2),
    ],
)
def test_other_pools_are_no_layers(pool: nn.Module) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.relu = pool, nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.pool(x[:, 0] if isinstance(pool, nn.MaxPool1d) else x)
            return self.relu(pooled[0] if isinstance(pooled, tuple) else pooled).flatten(1)

    x = batch(2, 2, 6, 6)
    (layer,) = tappable(Other(), x[:1])
    assert layer.activation == Clip()
    tap = open_tap(AS_IS, Other(), "relu", x[:1])
    assert tap(x).shape == (2, layer.units)


@pytest.mark.parametrize("prepare", [lambda x: x[:, 0], lambda x: (x * 9).int()])
def test_a_pool_of_a_plane_without_channels_or_of_integers_is_no_layer(
    prepare: Callable[[Tensor], Tensor],
) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(prepare(x)).float().flatten(1)

    x = batch(1, 2, 6, 6)
    assert tappable(Other(), x) == []
    refusal = "nor is it a max pool that can be tapped; there is none"
    with pytest.raises(UntappableLayer, match=refusal):
        open_tap(AS_IS, Other(), "pool", x)


class PoolsTwice(nn.Module):
    """One pool that runs twice, once behind a ReLU, and a block that pools by a function."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(x, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.relu, self.block = nn.MaxPool2d(2, 1), nn.ReLU(), self.Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.pool(self.relu(self.pool(x - 0.5)))).flatten(1)


def test_pools_are_named_by_module_and_run_and_a_clip_behind_one_by_itself() -> None:
    x = batch(3, *PLANES)
    found = tappable(PoolsTwice(), x[:1])
    assert [layer.names for layer in found] == [
        ("pool",),
        ("relu",),
        ("pool#1",),
        ("block.max_pool2d()",),
    ]
    taps = {la.name: open_tap(AS_IS, PoolsTwice(), la.name, x[:1]) for la in found}
    first = F.max_pool2d(x - 0.5, 2, 1)
    second = F.max_pool2d(first.relu(), 2, 1)
    for name, pre in (
        ("pool", x - 0.5),
        ("relu", first),
        ("pool#1", first.relu()),
        ("block.max_pool2d()", second),
    ):
        assert torch.equal(taps[name](x), pre.flatten(1))


def test_a_module_that_clips_and_pools_is_a_layer_of_each() -> None:
    class ReluPool(nn.MaxPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.relu())

    network = nn.Sequential(nn.Conv2d(1, 2, 3), ReluPool(2), nn.Flatten())
    found = tappable(network, batch(1, *PLANES))
    assert [layer.names for layer in found] == [("0", "1.relu()"), ("1",)]
    assert [layer.activation.kind for layer in found] == ["relu", "max_pool"]


def test_a_pool_whose_input_goes_on_unpooled_is_no_cut() -> None:
    class Skip(Pooling):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return self.last(torch.cat([self.pool(h).flatten(1), h[:, 0].flatten(1)], 1))

    x = batch(2, *PLANES)
    for build, cut in ((Pooling, True), (Skip, False)):
        tap = open_tap(AS_IS, build(nn.MaxPool2d(2)), "pool", x[:1])
        assert is_cut(tap, x[:1], x[1:]) == cut


def test_the_pools_of_torchvisions_networks_are_layers_that_mix(
    vgg: nn.Module, resnet: nn.Module, squeezenet: nn.Module
) -> None:
    x = batch(3, 3, 64, 64)
    pools = {
        vgg: ["features.2", "features.5", "features.10", "features.15", "features.20"],
        resnet: ["maxpool"],
        squeezenet: ["features.2", "features.6", "features.11"],
    }
    for network, names in pools.items():
        found = tappable(network, x[:1])
        assert [la.name for la in found if isinstance(la.activation, MaxPool)] == names
        tap = open_tap(AS_IS, network, names[-1], x[:1])
        assert is_cut(tap, x[:1], x[1:2])
        assert not is_affine(tap, x[:2])
        assert_mixes(tap, x)


def test_a_pool_that_comes_first_is_affine_and_is_where_images_are_mixed() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4), nn.ReLU()
    )
    x = batch(3, *PLANES)
    with torch.no_grad():
        for name, affine in (("1", True), ("3", False)):
            tap = open_tap(AS_IS, network, name, x[:1])
            assert is_affine(tap, x[:2]) == affine
            assert_mixes(tap, x)


# A layer's output that goes on unclipped as well


class TwoWays(nn.Module):
    """What `fc` gives is clipped, and goes on by `other`."""

    def __init__(self, act: nn.Module, other: Callable[[Tensor], Tensor], last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_act = nn.Linear(6, 6), nn.ReLU()
        self.fc, self.act, self.other, self.last = nn.Linear(6, 6), act, other, last
        self.fc.weight.data *= 40
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(self.stem_act(self.stem(x.flatten(1))))
        first = self.act(h)
        return self.last(torch.cat([first, self.other(h)], 1))


def two_ways(act: nn.Module, other: Callable[[Tensor], Tensor]) -> TwoWays:
    torch.manual_seed(1)
    return TwoWays(act, other, nn.Linear(12, 3))


@pytest.mark.parametrize(
    ("act", "other", "allowed"),
    [
        (nn.ReLU(), lambda h: h, False),
        (nn.ReLU(), torch.abs, False),
        (nn.ReLU(), torch.relu, True),
        (nn.ReLU(), lambda h: h * 0, True),
        (nn.ReLU(), F.relu6, True),  # relu(f') decides relu6(f') too
        (nn.ReLU6(), torch.relu, False),
        (nn.ReLU(inplace=True), lambda h: h, True),  # clipped for everyone
    ],
)
def test_a_layer_used_unclipped_as_well_is_refused(
    act: nn.Module, other: Callable[[Tensor], Tensor], allowed: bool
) -> None:
    network, x = two_ways(act, other), batch(3, *SMALL)
    hidden = in_float64(network.stem, x).clip(0)
    wanted = in_float64(network.fc, torch.from_numpy(hidden))
    assert (wanted[0] < 0).any()
    assert (wanted[0] > 6).any()
    if allowed:
        tap = open_tap(AS_IS, network, "fc", x[:1])
        np.testing.assert_allclose(tap(x).numpy(), wanted, **CLOSE)
    else:
        with pytest.raises(UntappableLayer, match="'fc' gives is clipped in one place") as caught:
            open_tap(AS_IS, network, "fc", x[:1])
        assert "stem" in offered(str(caught.value))
        assert "fc" not in offered(str(caught.value))
    by_its_clip = open_tap(AS_IS, network, "act", x[:1])
    np.testing.assert_allclose(by_its_clip(x).numpy(), wanted, **CLOSE)
    assert torch.equal(by_its_clip.observe(x)[1], network(x))
    if not allowed:  # the refusal is right: its activation does not decide the logits
        assert not is_cut(by_its_clip, x[:1], x[1:2])


class OneRunRaw(nn.Module):
    """`fc` runs twice; what it gives is clipped in one run, and used as it is in the other."""

    def __init__(self, clipped: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.clipped = nn.Linear(6, 6), clipped
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x.flatten(1))
        if self.clipped == 0:
            return self.fc(h.relu())
        return self.fc(h - h.mean()).relu()


@pytest.mark.parametrize(("clipped", "name"), [(0, "fc"), (1, "fc#1")])
def test_another_run_of_the_module_may_go_unclipped(clipped: int, name: str) -> None:
    network, x = OneRunRaw(clipped), batch(3, *SMALL)
    first = in_float64(network.fc, x[:1])
    wanted = (
        first if clipped == 0 else in_float64(network.fc, torch.from_numpy(first - first.mean()))
    )
    tap = open_tap(AS_IS, network, name, x[:1])
    np.testing.assert_allclose(tap(x[:1]).numpy(), wanted, **CLOSE)
    with pytest.raises(UntappableLayer, match="is not followed by"):
        open_tap(AS_IS, network, {"fc": "fc#1", "fc#1": "fc"}[name], x[:1])


def test_a_refusal_with_nothing_to_offer_is_still_a_sentence() -> None:
    class Raw(Small):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1))
            return self.second(h.relu() + h)

    with pytest.raises(UntappableLayer, match=r"follows; there is none to take instead\.$"):
        open_tap(AS_IS, Raw(), "first", batch(1, *SMALL))


# Nothing is left behind, and nothing behind the layer is computed


class Bomb(nn.Module):
    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            raise ZeroDivisionError("the bomb")
        return x


class Guarded(nn.Module):
    """In-place clips, a shared ReLU, and a bomb behind the second layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu, self.bomb = nn.ReLU(inplace=True), Bomb()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.fc1(x.flatten(1)))
        h = self.relu(self.fc2(h))
        return self.fc3(self.bomb(h))


HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
GLOBAL_HOOKS = [name for name in vars(nn_module) if name.startswith("_global_") and "hook" in name]


def state_of(network: nn.Module) -> list[object]:
    """All that a tap might leave on a network or in torch."""
    return [
        [{h: dict(getattr(m, h)) for h in HOOKS} for m in network.modules()],
        [set(vars(m)) for m in network.modules()],
        [m.training for m in network.modules()],
        {k: (v.tolist(), v.requires_grad, v.grad) for k, v in network.state_dict().items()},
        {name: copy.copy(getattr(nn_module, name)) for name in GLOBAL_HOOKS},
        list(_get_current_function_mode_stack()),
        torch.is_grad_enabled(),
    ]


@contextmanager
def untouched(network: nn.Module, x: Tensor) -> Iterator[None]:
    given, before, logits = x.clone(), state_of(network), network(x)
    yield
    assert state_of(network) == before
    assert torch.equal(network(x), logits)
    assert torch.equal(x, given)


X4 = batch(4, *SMALL)
PRE1 = torch.zeros(1, 8)
WEIGHTS = torch.full((5, 4), 0.25)
FUNCTIONS: dict[str, Callable[[Tap], object]] = {
    "tappable": lambda tap: tappable(tap.network, X4[:1]),
    "open_tap": lambda tap: open_tap(AS_IS, tap.network, "fc2", X4[:1]),
    "observe": lambda tap: tap.observe(X4),
    "observe_mixtures": lambda tap: tap.observe_mixtures(X4, WEIGHTS),
    "pinned": lambda tap: tap.pinned(X4, PRE1),
    "is_cut": lambda tap: is_cut(tap, X4[:1], X4[1:2]),
    "mixes": lambda tap: mixes(tap, X4),
}
STOPPING: dict[str, Callable[[Tap], object]] = {
    "tap": lambda tap: tap(X4),
    "is_affine": lambda tap: is_affine(tap, X4[:2]),
}
REFUSED: dict[str, Callable[[Tap], object]] = {
    "open_tap of no layer": lambda tap: open_tap(AS_IS, tap.network, "fc3", X4[:1]),
    "open_tap of nothing": lambda tap: open_tap(AS_IS, tap.network, "fc9", X4[:1]),
}


def guarded() -> tuple[Guarded, Tap]:
    network = Guarded()
    network.fc1.register_forward_hook(lambda *_: None)  # its owner's: it must stay
    (layer,) = (la for la in tappable(network, X4[:1]) if la.name == "fc2")
    return network, Tap(AS_IS, network, layer)


def test_state_of_would_notice_a_hook() -> None:
    network = Guarded()
    before = state_of(network)
    handle = network.relu.register_forward_hook(lambda *_: None)
    assert state_of(network) != before
    handle.remove()
    assert state_of(network) == before
    assert len(HOOKS) >= 6
    assert len(GLOBAL_HOOKS) >= 4


@pytest.mark.parametrize("name", [*FUNCTIONS, *STOPPING])
def test_nothing_is_left_on_the_network(name: str) -> None:
    network, tap = guarded()
    with untouched(network, X4):
        (FUNCTIONS | STOPPING)[name](tap)


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_left_on_the_network_by_a_refusal(name: str) -> None:
    network, tap = guarded()
    with untouched(network, X4), pytest.raises((UnknownName, UntappableLayer)):
        REFUSED[name](tap)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_left_on_the_network_when_it_raises(name: str) -> None:
    network, tap = guarded()
    with untouched(network, X4):
        network.bomb.armed = True
        with pytest.raises(ZeroDivisionError, match="the bomb"):
            FUNCTIONS[name](tap)
        del network.bomb.armed


def test_nothing_is_left_by_the_refusal_of_a_layer_used_unclipped() -> None:
    network, x = two_ways(nn.ReLU(), torch.abs), batch(3, *SMALL)
    with untouched(network, x), pytest.raises(UntappableLayer):
        open_tap(AS_IS, network, "fc", x[:1])


@pytest.mark.parametrize("name", STOPPING)
def test_nothing_behind_the_layer_is_computed(name: str) -> None:
    network, tap = guarded()
    wanted = tap(X4)
    network.bomb.armed = True
    with pytest.raises(ZeroDivisionError):
        network(X4)
    STOPPING[name](tap)
    assert torch.equal(tap(X4), wanted)


def test_a_network_that_does_not_come_to_its_layer_is_refused() -> None:
    network = Small()
    tap = open_tap(AS_IS, network, "first", batch(1, *SMALL))
    network.act = torch.abs
    with pytest.raises(UntappableLayer, match="did not come to 'first'"):
        tap(batch(2, *SMALL))


class OnlyBright(nn.Module):
    """Its first ReLU is called for bright images only; `shared` is called for both layers."""

    def __init__(self, *, function: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = (nn.Linear(6, 6) for _ in range(3))
        self.shared, self.function = nn.ReLU(), function
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        clip = F.relu if self.function else self.shared
        h = self.fc1(x.flatten(1))
        if x.mean() > 0.5:
            h = clip(h)
        h = clip(self.fc2(h))
        return self.fc3(h).relu()


@pytest.mark.parametrize("function", [False, True])
def test_a_network_that_calls_another_activation_on_another_image_is_refused(
    function: bool,
) -> None:
    network = OnlyBright(function=function)
    dark, bright = torch.full((1, *SMALL), 0.2), torch.full((1, *SMALL), 0.8)
    tap = open_tap(AS_IS, network, "fc2", dark)
    wanted = in_float64(network.fc2, torch.from_numpy(in_float64(network.fc1, dark)))
    np.testing.assert_allclose(tap(dark).numpy(), wanted, **CLOSE)
    for call in (
        lambda: tap(bright),
        lambda: tap.observe(bright),
        lambda: tap.pinned(bright, tap(dark)),
        lambda: tap.observe_mixtures(bright, torch.ones(1, 1)),
        lambda: is_cut(tap, dark, bright),
    ):
        with pytest.raises(UntappableLayer, match=r"depends on the image: .* 'fc2' as before"):
            call()
    # One that comes as many times, but later: the second activation is another one, too.
    last = open_tap(AS_IS, network, "relu()" if not function else "relu()#1", dark)
    with pytest.raises(UntappableLayer, match="depends on the image"):
        last(bright)


class Swaps(OnlyBright):
    """As many calls for every image, of other layers."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        for layer in (self.fc1, self.fc2) if x.mean() > 0.5 else (self.fc2, self.fc1):
            h = layer(h)
            h = self.shared(h) if layer is self.fc1 else h.relu()
        return self.fc3(h)


def test_as_many_calls_from_other_places_are_not_the_same() -> None:
    network = Swaps(function=False)
    tap = open_tap(AS_IS, network, "fc1", torch.full((1, *SMALL), 0.2))
    with pytest.raises(UntappableLayer, match="depends on the image"):
        tap(torch.full((1, *SMALL), 0.8))


def test_in_place_clips_do_not_reach_what_was_read() -> None:
    """Behind an in-place ReLU that runs for the layer, f' as it was is what observe gives."""
    network, tap = guarded()
    hidden = in_float64(network.fc1, X4).clip(0)
    wanted = in_float64(network.fc2, torch.from_numpy(hidden))
    assert (wanted < 0).any()
    np.testing.assert_allclose(tap.observe(X4)[0].numpy(), wanted, **CLOSE)
    mixed = tap.observe_mixtures(X4, torch.eye(4))[0]
    np.testing.assert_allclose(mixed.numpy(), wanted, **CLOSE)


def test_pinning_does_not_write_on_the_given_pre_activation() -> None:
    _, tap = guarded()
    pre = -torch.ones(1, 8)
    tap.pinned(X4, pre)
    assert torch.equal(pre, -torch.ones(1, 8))


# Cuts


def test_vggs_first_fully_connected_layer_and_all_its_convolutions_are_cuts(
    vgg: nn.Module,
) -> None:
    x = batch(2, 3, 40, 40)
    for name in ("features.0", "features.8", "classifier.0", "classifier.3"):
        assert is_cut(open_tap(AS_IS, vgg, name, x[:1]), x[:1], x[1:])


CUTS = [
    ("features.0", True),
    ("features.12.squeeze", True),
    ("features.12.expand1x1", False),
    ("features.12.expand3x3", False),
    ("classifier.1", True),
]


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_the_squeeze_of_a_fire_module_is_a_cut_and_a_branch_is_not(
    squeezenet: nn.Module, name: str, cut: bool
) -> None:
    x = batch(2, 3, 96, 96)
    tap = open_tap(AS_IS, squeezenet, name, x[:1])
    assert is_cut(tap, x[:1], x[1:]) == cut == proves_cut(tap, (3, 96, 96))


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("bn1", True),
        ("layer4.0.bn1", False),
        ("layer4.0.relu#1", True),
        ("layer4.1.bn1", False),
        ("layer4.1.relu#1", True),
    ],
)
def test_a_residual_block_is_a_cut_at_its_end_and_not_inside(
    resnet: nn.Module, name: str, cut: bool
) -> None:
    x = batch(2, 3, 40, 40)
    tap = open_tap(AS_IS, resnet, name, x[:1])
    assert is_cut(tap, x[:1], x[1:]) == cut == proves_cut(tap, (3, 40, 40))


def test_all_layers_of_the_mnist_networks_are_cuts(
    by_name: dict[str, Model], digits: Tensor
) -> None:
    for name, layer in MNIST_LAYERS:
        tap = tap_of(by_name[name], layer, digits[:1])
        assert is_cut(tap, digits[:1], digits[6:7]) and proves_cut(tap, (1, 28, 28))


class SidePath(nn.Module):
    """A way around `fc` that only bright images take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)
        self.fc.bias.data += 1
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc(x).relu() + (x.mean(1, keepdim=True) - 0.8).relu()


def test_a_cut_that_images_do_not_refute_is_not_proved_where_a_way_leads_around_it() -> None:
    network, x = SidePath(), batch(3, *SMALL)
    tap = open_tap(AS_IS, network, "fc", x[:1])
    assert is_cut(tap, x[:1], x[1:])
    assert not proves_cut(tap, SMALL)
    assert not is_cut(tap, x[:1], torch.cat([x[1:], torch.ones(1, *SMALL)]))


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.fc(x.flatten(1)).relu() + n.kept,  # of an earlier pass, or of this image
        lambda n, x: n.fc(x.flatten(1)).relu() + torch.rand(3),
        lambda n, x: n.fc(x.flatten(1)).relu() + float(x.mean() > 2),
        lambda n, x: n.fc(x.flatten(1)).relu() + x.data.mean() * 0,
    ],
)
def test_no_cut_is_proved_of_what_is_not_followed(forward: Any) -> None:
    network = SidePath()
    network.kept = torch.zeros(3)
    tap = open_tap(AS_IS, network, "fc", batch(1, *SMALL))
    assert proves_cut(tap, SMALL) is False  # of SidePath itself
    network.__class__ = type("Odd", (SidePath,), {"forward": forward})
    tap = open_tap(AS_IS, network, "relu()", batch(1, *SMALL))
    assert not proves_cut(tap, SMALL)


class Faint(nn.Module):
    """Logits of a thousand, and a change of a hundredth by the image on a way around `fc`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)
        self.fc.weight.data /= 100
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc(x).relu() + x[:, :3] / 100 + 1000


def test_a_network_that_hardly_answers_to_its_input_is_not_all_cuts() -> None:
    x = batch(2, *SMALL)
    assert not is_cut(open_tap(AS_IS, Faint(), "relu()", x[:1]), x[:1], x[1:])


# Affine layers, and mixing behind them


def test_only_first_layers_are_affine(
    by_name: dict[str, Model], resnet: nn.Module, vgg: nn.Module, digits: Tensor
) -> None:
    probes = digits[[3, 14]]
    affine = {
        (name, layer): is_affine(tap_of(by_name[name], layer, digits[:1]), probes)
        for name, layer in MNIST_LAYERS
    }
    assert [key for key, value in affine.items() if value] == [
        ("mnist-mlp", "fc1"),
        ("mnist-cnn", "conv1"),
    ]
    x = batch(2, 3, 40, 40)
    for network, first in ((resnet, "bn1"), (vgg, "features.0")):
        found = tappable(network, x[:1])
        affine_ones = [la.name for la in found if is_affine(Tap(AS_IS, network, la), x)]
        assert affine_ones == [first]


class Branches(nn.Module):
    """Two first layers side by side, and one behind a pooling that is not affine."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.pooled = nn.Linear(36, 5), nn.Linear(36, 5), nn.Linear(9, 5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x.flatten(1)).relu(), self.right(x.flatten(1)).relu()
        return left + right + self.pooled(F.max_pool2d(x, 2).flatten(1)).relu()


def test_a_first_layer_need_not_be_the_first_clip_and_pooling_is_not_affine() -> None:
    network, x = Branches(), batch(2, 1, 6, 6)
    affine = {la.name: is_affine(Tap(AS_IS, network, la), x) for la in tappable(network, x[:1])}
    assert affine == {"left": True, "right": True, "max_pool2d()": True, "pooled": False}


def assert_mixes(tap: Tap, corners: Tensor) -> None:
    k = len(corners)
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(k), 4)).float()
    got = tap.observe_mixtures(corners, weights)
    wanted = tap.observe(torch.einsum("nk,kchw->nchw", weights, corners))
    for value, truth in zip(got, wanted, strict=True):
        assert value.shape == truth.shape
        assert (value - truth).norm() < 1e-4 * truth.norm()
    assert mixes(tap, corners)
    first = tappable(tap.network, tap.normalize(corners[:1]))[0]
    assert proves_mixing(tap, first, tuple(corners.shape[1:]))


@pytest.mark.parametrize("corners", [1, 2, 4, 5])
@pytest.mark.parametrize(("name", "layer"), MNIST_LAYERS)
def test_observe_mixtures_equals_observe_on_the_mixtures(
    by_name: dict[str, Model], digits: Tensor, name: str, layer: str, corners: int
) -> None:
    assert_mixes(tap_of(by_name[name], layer, digits[:1]), digits[3 : 3 + corners])


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("vgg", ["features.0", "classifier.0"]),
        ("resnet", ["bn1", "layer2.0.relu#1", "layer4.1.relu#1"]),
        ("squeezenet", ["features.0", "features.12.squeeze"]),
        ("mobilenet", ["features.0.1", "features.18.1"]),
    ],
)
def test_observe_mixtures_equals_observe_for_torchvisions_networks(
    request: pytest.FixtureRequest, network: str, layers: list[str]
) -> None:
    x = batch(3, 3, 40, 40)
    for layer in layers:
        assert_mixes(open_tap(AS_IS, request.getfixturevalue(network), layer, x[:1]), x)


class BatchSize(nn.Module):
    """A network that takes the size of its batch from the images, and uses it behind a clip."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.use = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4), use
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        h = self.conv(x).relu()
        if self.use == "scale":
            h = h * n
        if self.use == "view that fits by chance":  # [4, 8, 6, 6] has a third of it as well
            return self.fc(h.reshape(n, 8, -1).mean(2))
        if self.use == "expand":
            return self.fc(h.mean((2, 3))) + torch.zeros(1, 4).expand(n, 4)
        if self.use == "view":
            return self.fc(h.mean((2, 3)).view(n, 8))
        return self.fc(h.mean((2, 3)))


@pytest.mark.parametrize("use", ["scale", "view", "view that fits by chance", "expand"])
def test_a_network_that_remembers_its_batch_does_not_mix(use: str) -> None:
    x = batch(3, 1, 6, 6)
    tap = open_tap(AS_IS, BatchSize(use), "conv", x[:1])
    assert not mixes(tap, x)
    assert mixes(open_tap(AS_IS, BatchSize("not"), "conv", x[:1]), x)


class Around(nn.Module):
    """A way around the first clip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)).relu() + x.flatten(1)


def test_a_network_with_a_way_around_the_first_clip_does_not_mix() -> None:
    x = batch(3, *SMALL)
    assert not mixes(open_tap(AS_IS, Around(), "fc", x[:1]), x)


def test_a_network_that_is_not_affine_up_to_its_first_clip_does_not_mix() -> None:
    x = batch(3, 3, 64, 64)
    late = random(zoo.mobilenet_v3_small, num_classes=10)  # Hardswish comes before its first ReLU
    for layer in tappable(late, x[:1])[:3]:
        assert not mixes(Tap(AS_IS, late, layer), x)
    pooled = nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(9, 4), nn.ReLU())
    assert not mixes(open_tap(AS_IS, pooled, "2", batch(1, 1, 6, 6)), batch(3, 1, 6, 6))


# Another precision


@pytest.mark.parametrize(("name", "layer"), [("mnist-mlp", "fc1"), ("mnist-cnn", "fc1")])
def test_a_bf16_tap_is_close_to_fp32_and_gives_float32(
    by_name: dict[str, Model], digits: Tensor, name: str, layer: str
) -> None:
    tap = tap_of(by_name[name], layer, digits[:1])
    cast = copy.deepcopy(tap.network).to(torch.bfloat16)
    half = Tap(tap.normalize, cast, tap.layer, torch.bfloat16)
    wanted = tap(digits)
    got = half(digits)
    pre, logits = half.observe(digits)
    assert {value.dtype for value in (got, pre, logits)} == {torch.float32}
    for value in (got, pre):
        assert 1e-5 < float((value - wanted).norm() / wanted.norm()) < 2e-2
    assert logits.argmax(1).tolist() == tap.observe(digits)[1].argmax(1).tolist()
    weights = torch.full((2, 20), 0.05)
    mixed, exact = half.observe_mixtures(digits, weights), tap.observe_mixtures(digits, weights)
    for value, truth in zip(mixed, exact, strict=True):
        assert value.dtype == torch.float32
        assert float((value - truth).norm() / truth.norm()) < 5e-2


# SqueezeNet as it was published


@pytest.fixture(scope="module")
def published() -> tuple[Classifier, Tensor]:
    """SqueezeNet with its ImageNet weights, and four photographs that it knows."""
    network = zoo.squeezenet1_0(weights=None)
    network.classifier[1].padding = (1, 1)
    network.load_state_dict(load_file(SQUEEZENET))
    classifier = Classifier(Normalize("BGR", scale=255, mean=(104, 117, 123)), network)
    prepare = images.Preprocessing("RGB", (227, 227), 256)
    names = ("animal_koala", "animal_panda", "farm_dog", "farm_chicken")
    files = [ASSETS / "photos" / f"{name}.jpg" for name in names]
    pixels = [images.load(file.name, file.read_bytes(), prepare).pixels for file in files]
    return classifier, torch.from_numpy(np.stack(pixels))


@needs_squeezenet
@pytest.mark.parametrize(("name", "cut"), CUTS[1:3])
def test_the_published_squeezenet_has_a_cut_at_its_last_squeeze_and_none_at_a_branch(
    published: tuple[Classifier, Tensor], name: str, cut: bool
) -> None:
    classifier, photos = published
    tap = open_tap(classifier.normalize, classifier.network, name, photos[:1])
    assert is_cut(tap, photos[:1], photos[1:2]) == cut


@needs_squeezenet
def test_the_published_squeezenet_is_read_before_its_in_place_clip(
    published: tuple[Classifier, Tensor],
) -> None:
    classifier, photos = published
    features = classifier.network.features
    means = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    wanted = features[12].squeeze(features[:12](photos[:, [2, 1, 0]] * 255 - means))
    tap = open_tap(classifier.normalize, classifier.network, "features.12.squeeze", photos[:1])
    assert tap.layer.shape == tuple(wanted.shape[1:])
    assert (tap(photos) - wanted.flatten(1)).norm() < 1e-5 * wanted.norm()
    assert mixes(tap, photos[:3])
    assert not is_affine(tap, photos[:2])
    first = open_tap(classifier.normalize, classifier.network, "features.0", photos[:1])
    assert is_affine(first, photos[:2])
