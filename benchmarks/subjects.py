"""What the benchmarks run on: three networks, their sample images, and the loop written by hand."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision.models as zoo
from safetensors.torch import load_file
from torch import Tensor, nn

from core import images, job, models
from core.engine import STRIDE, Group
from core.images import Preprocessing
from core.models import Classifier, Model, Normalize
from core.objective import Losses, Target
from core.spec import CollisionSpec
from core.taps import Tap, open_tap

DATA = Path(os.environ.get("POLYCOLLIDE_DATA", Path(__file__).parents[2] / "shared" / "data"))
IMAGENET = Normalize("RGB", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CAFFE = Normalize("BGR", scale=255.0, mean=(104.0, 117.0, 123.0))


@dataclass(frozen=True)
class Net:
    """A network, the layer to collide at, and `forward`, which stops there: f' as [N, U]."""

    title: str
    model: Model
    layer: str
    forward: Callable[[Tensor], Tensor]

    def tap(self) -> Tap:
        return open_tap(
            self.model.classifier.normalize,
            self.model.classifier.network,
            self.layer,
            self.photos(1),
        )

    def photos(self, count: int) -> Tensor:
        """The first `count` sample images of its kind, [N, C, H, W]."""
        return job.reference_images(self.model)[:count]

    def loaded(self, sample: str) -> images.Loaded:
        return images.load(*images.read(f"sample:{sample}"), self.model.preprocessing)

    def subject(self, spec: CollisionSpec) -> job.Subject:
        """As `core.job` has it; the registry cannot open random weights."""
        return job.Subject.of(self.model, spec)


def mnist_mlp() -> Net:
    """The shipped 784-256-256-10 network at its first hidden layer."""
    model = models.load("mnist-mlp")
    network = model.classifier.network

    def forward(x: Tensor) -> Tensor:
        pre: Tensor = network.fc1(x.flatten(1))
        return pre

    return Net("mnist-mlp, fc1", model, "fc1", forward)


def vgg16(side: int = 224) -> Net:
    """VGG-16 at FC-6, random weights; images smaller than 224 only for a quick look."""
    torch.manual_seed(0)
    network = zoo.vgg16(weights=None)
    model = _imagenet_model("vgg16", network, IMAGENET, side)

    def forward(x: Tensor) -> Tensor:
        hidden = network.avgpool(network.features(model.classifier.normalize(x)))
        pre: Tensor = network.classifier[0](hidden.flatten(1))
        return pre

    return Net(f"vgg16, classifier.0, {side} px, random weights", model, "classifier.0", forward)


def squeezenet() -> Net:
    """SqueezeNet 1.0 at its last squeeze layer; published weights where they are on this disk."""
    torch.manual_seed(0)
    network = zoo.squeezenet1_0(weights=None)
    file, normalize, weights = DATA / "squeezenet1_0.safetensors", IMAGENET, "random weights"
    if file.is_file():
        network.load_state_dict(load_file(file))
        network.classifier[1].padding = (1, 1)
        normalize, weights = CAFFE, "published weights"
    model = _imagenet_model("squeezenet1_0", network, normalize, 227)

    def forward(x: Tensor) -> Tensor:
        pre: Tensor = network.features[12].squeeze(network.features[:12](normalize(x)))
        return pre.flatten(1)

    return Net(
        f"squeezenet1_0, features.12.squeeze, {weights}", model, "features.12.squeeze", forward
    )


def endless_group(net: Net, tap: Tap, spec: CollisionSpec, key: str = "job") -> Group:
    """A job from the first sample image to the second whose corners never converge."""
    source, target = net.photos(2)
    with torch.no_grad():
        goal = Target(tap(target[None])[0], tap.layer.activation)
    chosen = nn.functional.one_hot(first_inactive(goal.pre, spec.corners), len(goal.pre)).bool()
    losses = Losses.of_corners(
        goal, chosen, alpha=spec.alpha, beta=spec.beta, negative=spec.negative
    )
    threshold = 1e-9 * goal.energy
    return Group(key=key, spec=spec, source=source, losses=losses, l_pos_threshold=threshold)


def first_inactive(pre: Tensor, count: int) -> Tensor:
    """The numbers of the first units that f'(t) `pre` [U] leaves inactive, as the paper takes."""
    return (pre < 0).nonzero().flatten()[:count]


class HandLoop:
    """The paper's method for K corners at once as one would write it in a script.

    `forward` calls the network's own modules and stops at the layer; the loss is the paper's in
    plain torch, differentiated by autograd; a fixed-rate gradient step; pixels clamped to [0, 1];
    L_pos looked at every tenth step. Rows that are done go on until all are.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        source: Tensor,
        target: Tensor,
        units: Callable[[Tensor], Tensor],
        spec: CollisionSpec,
        threshold: float = 0.0,
    ) -> None:
        with torch.no_grad():
            self.goal = forward(target[None])
        self.active = (self.goal >= 0).float()
        self.chosen = nn.functional.one_hot(units(self.goal[0]), self.goal.shape[1]).float()
        self.others = 1 - self.active - self.chosen
        self.forward, self.threshold = forward, threshold
        self.alpha, self.beta, self.rate = spec.alpha, spec.beta, spec.learning_rate
        self.x = source.repeat(len(self.chosen), 1, 1, 1)

    def stride(self) -> bool:
        """Ten steps, L_pos looked at before the first; whether it was under the threshold."""
        for step in range(STRIDE):
            x = self.x.requires_grad_()
            pre = self.forward(x)
            l_pos = ((pre - self.goal).square() * self.active).sum(1)
            if step == 0 and l_pos.max().item() < self.threshold:
                return True
            l_neg = (pre.abs() * self.others + pre * self.chosen).sum(1)
            loss = (self.alpha * l_pos + self.beta * l_neg).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                self.x = (x - self.rate * gradient).clamp_(0, 1)
        return False


def one_corner_after_another(
    forward: Callable[[Tensor], Tensor],
    source: Tensor,
    target: Tensor,
    spec: CollisionSpec,
    threshold: float,
) -> Sequence[Tensor]:
    """Every corner [1, C, H, W] of a job by a loop of its own, each until its own threshold."""
    corners = []
    for number in range(spec.corners):
        units = partial(_only, number=number)
        loop = HandLoop(forward, source, target, units, spec, threshold)
        for _ in range(0, spec.max_steps, STRIDE):
            if loop.stride():
                break
        corners.append(loop.x.detach())
    return corners


def _only(pre: Tensor, number: int) -> Tensor:
    return first_inactive(pre, number + 1)[number:]


def _imagenet_model(name: str, network: nn.Module, normalize: Normalize, side: int) -> Model:
    return Model(
        name=name,
        # Laid out as `models.load` does it.
        classifier=Classifier(normalize, network).to(memory_format=torch.channels_last),
        preprocessing=Preprocessing("RGB", size=(side, side), resize=max(side, 256)),
        classes=tuple(zoo.AlexNet_Weights.DEFAULT.meta["categories"]),
        weights="none",
        weights_sha256="",
    )
